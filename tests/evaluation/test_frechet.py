"""The Fréchet distance, against closed forms, SciPy's square root of a matrix, and bounds on memory."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from transformers_aar.evaluation.embeddings import EmbeddingInfo
from transformers_aar.evaluation.frechet import FrechetStatistics, frechet_distance, frechet_interval

pytestmark = pytest.mark.filterwarnings("ignore:A set has")


def info(width, name="test"):
    return EmbeddingInfo(name, "1", width, 16_000)


def statistics_of(*batches):
    statistics = FrechetStatistics(info(batches[0].shape[1]))
    for batch in batches:
        statistics.update(torch.as_tensor(batch))
    return statistics


def gaussian_sample(mean, covariance, count, seed):
    """A sample that has exactly this mean and (unbiased) covariance, up to float64's rounding."""
    noise = np.random.default_rng(seed).standard_normal((count, len(mean)))
    whitened = np.linalg.qr(noise - noise.mean(0))[0] * np.sqrt(count - 1)
    return mean + whitened @ np.linalg.cholesky(covariance).T


def random_covariance(width, seed):
    factor = np.random.default_rng(seed).standard_normal((width, 2 * width))
    return factor @ factor.T / width


def reference_distance(first, second):
    """The textbook formula, by NumPy's covariance and SciPy's square root."""
    root = scipy.linalg.sqrtm(np.cov(first.T) @ np.cov(second.T)).real
    traces = np.trace(np.cov(first.T)) + np.trace(np.cov(second.T)) - 2 * np.trace(root)
    return ((first.mean(0) - second.mean(0)) ** 2).sum() + traces


@pytest.mark.parametrize("count", [10, 64, 65, 1000])
def test_identical_sets_have_distance_zero(count):
    # large numbers beside small ones: rounding of the largest is what shows in a rank-deficient covariance
    sample = np.random.default_rng(0).standard_normal((count, 64)) * np.geomspace(1, 100, 64) + 30
    shuffled = sample[np.random.default_rng(1).permutation(count)]
    assert frechet_distance(statistics_of(sample), statistics_of(sample)) < 1e-6
    assert frechet_distance(statistics_of(sample), statistics_of(shuffled[:7], shuffled[7:])) < 1e-6


def test_closed_form_of_gaussians_with_common_axes():
    width = 8
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0]
    first_std, second_std = np.linspace(0.1, 3, width), np.linspace(2, 0.5, width)
    first_mean, second_mean = np.arange(width) / 4, np.ones(width)
    first = gaussian_sample(first_mean, axes * first_std**2 @ axes.T, 100, seed=1)
    second = gaussian_sample(second_mean, axes * second_std**2 @ axes.T, 90, seed=2)
    # independent one-dimensional Gaussians along the axes
    expected = ((first_mean - second_mean) ** 2).sum() + ((first_std - second_std) ** 2).sum()
    assert frechet_distance(statistics_of(first), statistics_of(second)) == pytest.approx(expected, abs=1e-6)


def test_closed_form_of_two_by_two_covariances():
    # tr √(AB) = √(tr AB + 2 √det AB) for two by two matrices
    first, second = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    product = first @ second
    root_trace = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = 25 + np.trace(first) + np.trace(second) - 2 * root_trace
    distance = frechet_distance(
        statistics_of(gaussian_sample(np.array([3.0, 0.0]), first, 50, seed=0)),
        statistics_of(gaussian_sample(np.array([0.0, 4.0]), second, 60, seed=1)),
    )
    assert distance == pytest.approx(expected, abs=1e-6)


def test_general_covariances_as_scipy_has_them():
    width = 32
    first = gaussian_sample(np.zeros(width), random_covariance(width, 0), 200, seed=2)
    second = gaussian_sample(np.ones(width), random_covariance(width, 1), 300, seed=3)
    distance = frechet_distance(statistics_of(first), statistics_of(second))
    assert distance == pytest.approx(reference_distance(first, second), abs=1e-6)
    assert distance == pytest.approx(frechet_distance(statistics_of(second), statistics_of(first)), abs=1e-9)


def test_closed_form_with_covariances_of_low_rank():
    # 5 sounds vary along 4 axes, 4 sounds along 3 others: nothing in common, so the root's trace is 0
    rng = np.random.default_rng(0)
    first, second = np.zeros((5, 512)), np.zeros((4, 512))
    first[:, :4], second[:, 100:103] = rng.standard_normal((5, 4)), rng.standard_normal((4, 3))
    apart = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(np.cov(first.T)) + np.trace(np.cov(second.T))
    assert frechet_distance(statistics_of(first), statistics_of(second)) == pytest.approx(apart, abs=1e-6)
    # the same sounds, moved and doubled: std 2σ instead of σ along each axis leaves tr Σ
    moved = 2 * first + 1
    expected = ((moved.mean(0) - first.mean(0)) ** 2).sum() + np.trace(np.cov(first.T))
    assert frechet_distance(statistics_of(first), statistics_of(moved)) == pytest.approx(expected, abs=1e-6)


def test_streaming_equals_the_whole_far_from_zero():
    # at a mean of 1e6 and a spread of 1e-2, E[x²] − E[x]² in float64 has lost all digits
    sample = 1e6 + 1e-2 * np.random.default_rng(0).standard_normal((1000, 6))
    statistics = statistics_of(sample[:1], sample[1:300], sample[300:301], sample[301:])
    assert statistics.count == 1000
    np.testing.assert_allclose(statistics.mean, sample.mean(0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance, np.cov(sample.T), rtol=1e-6, atol=1e-11)


def test_an_update_leaves_the_embeddings_alone():
    embeddings = torch.ones(3, 2, dtype=torch.float64)
    statistics_of(embeddings, torch.empty(0, 2))
    assert torch.equal(embeddings, torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.filterwarnings("error:A set has")
def test_warns_of_fewer_sounds_than_the_embedding_is_wide():
    sample = np.random.default_rng(0).standard_normal((20, 10))
    frechet_distance(statistics_of(sample), statistics_of(sample[:10]))
    with pytest.warns(UserWarning, match="9 sounds, fewer than the embedding's 10 numbers"):
        frechet_distance(statistics_of(sample), statistics_of(sample[:9]))
    with pytest.warns(UserWarning, match="9 sounds, fewer than the embedding's 10 numbers"):
        frechet_interval(torch.from_numpy(sample[:9]), statistics_of(sample), num_resamples=2)


def test_refuses_what_does_not_compare():
    sample = torch.randn(20, 4)
    mine, other = statistics_of(sample), FrechetStatistics(info(4, "other"))
    other.update(sample)
    with pytest.raises(ValueError, match=r"different embeddings don't compare: test 1 .* and other 1 "):
        frechet_distance(mine, other)
    with pytest.raises(ValueError, match="at least 2 sounds, got 1"):
        frechet_distance(mine, statistics_of(sample[:1]))
    with pytest.raises(ValueError, match=r"shape \(batch_size, 4\)"):
        mine.update(torch.randn(3, 5))
    sample[3, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        mine.update(sample)
    assert mine.count == 20


def test_interval_holds_the_distances_of_other_samples():
    generator = torch.Generator().manual_seed(0)
    references = statistics_of(torch.randn(5000, 4, generator=generator))
    sets = [1.5 * torch.randn(150, 4, generator=generator) + 0.3 for _ in range(30)]
    distances = [frechet_distance(statistics_of(sample), references) for sample in sets]
    expected = sum(distances) / len(distances)
    estimates = [frechet_interval(sample, references, num_resamples=100) for sample in sets]
    assert [estimate.value for estimate in estimates] == distances
    covered = sum(estimate.low <= expected <= estimate.high for estimate in estimates)
    assert covered >= 25  # of 30, where 95 % are meant
    # and are no wider than that takes
    width = sum(estimate.high - estimate.low for estimate in estimates) / len(estimates)
    assert width == pytest.approx(2 * 1.96 * np.std(distances), rel=0.3)


def test_interval_of_several_crops_per_clip_is_wider():
    sample = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    references = statistics_of(torch.randn(1000, 4, generator=torch.Generator().manual_seed(1)))
    alone = frechet_interval(sample, references)
    together = frechet_interval(sample, references, clips=torch.arange(30).repeat(4))
    assert together.value == alone.value
    # four times as many crops of no more clips: half the interval would be too narrow
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


def test_interval_of_equal_sets_begins_at_zero():
    sample = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    estimate = frechet_interval(sample, statistics_of(sample), num_resamples=50)
    assert 0 <= estimate.low <= estimate.value < 1e-6 < estimate.high


STREAM = """
import resource, sys, torch
from transformers_aar.evaluation.embeddings import EmbeddingInfo
from transformers_aar.evaluation.frechet import FrechetStatistics

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
batch = torch.randn(4096, 512, generator=generator)
before = peak_mb()
statistics = FrechetStatistics(EmbeddingInfo("clap", "1", 512, 48_000))
peaks = []
for number in range(int(sys.argv[1])):
    statistics.update(batch.normal_(generator=generator))
    peaks.append(peak_mb())
state = statistics.mean.nbytes + statistics.scatter.nbytes
print(statistics.count, state, peaks[-1] - before, peaks[-1] - peaks[4], float(statistics.covariance.trace()))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_count():
    # so two million take what 200 thousand do
    result = subprocess.run([sys.executable, "-c", STREAM, "49"], check=True, capture_output=True, text=True)
    count, state, used, growth, trace = map(float, result.stdout.split())
    assert count == 49 * 4096
    assert state == 8 * (512 * 512 + 512)
    assert used < 200
    assert growth < 40  # 44 updates, of batches of 8 MB
    assert trace == pytest.approx(512, rel=1e-3)
