"""Confidence intervals, against SciPy's bootstrap and the normal distribution."""

import numpy as np
import pytest
import scipy.stats
import torch

from transformers_aar.evaluation.bootstrap import bootstrap_interval


def test_interval_of_a_mean_is_scipys_and_the_normal_one():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).exp()
    estimate = bootstrap_interval(values, num_resamples=4000)
    assert estimate.value == pytest.approx(float(values.mean()))
    expected = scipy.stats.bootstrap(
        (values.double().numpy(),), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    # both are random: their ends move by about 2 % of the width
    width = expected.high - expected.low
    assert estimate.low == pytest.approx(expected.low, abs=0.1 * width)
    assert estimate.high == pytest.approx(expected.high, abs=0.1 * width)
    assert width == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.1)


def test_a_resamples_bias_is_taken_off():
    # the squared mean of n values is too large by σ²/n, and that of a resample by as much again
    values = torch.randn(20, generator=torch.Generator().manual_seed(0))
    values -= values.mean()
    estimate = bootstrap_interval(values, lambda sample: sample.mean() ** 2, num_resamples=2000)
    assert estimate.value == pytest.approx(0, abs=1e-12)
    assert estimate.low < 0 < estimate.high


def test_crops_of_a_clip_are_drawn_together():
    """Of crops that are alike the mean is as uncertain as that of the clips; ten times as many would say the same."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 20, (60,), generator=generator)
    clips = torch.arange(60).repeat_interleave(sizes)[torch.randperm(int(sizes.sum()), generator=generator)]
    values = torch.randn(60, generator=generator, dtype=torch.float64)[clips]
    estimate = bootstrap_interval(values, clips=7 * clips - 3, num_resamples=4000)
    # a ratio of sums over clips, whose standard error is that of Cochran 1977, section 2.11
    sums = torch.zeros(60, dtype=torch.float64).index_add_(0, clips, values - values.mean())
    error = sums.std() * 60**0.5 / len(clips)
    assert estimate.value == values.mean()
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * float(error), rel=0.1)
    alone = bootstrap_interval(values)
    assert estimate.high - estimate.low > 2 * (alone.high - alone.low)


def test_draws_are_the_same_every_time():
    values = torch.arange(50.0)
    estimate = bootstrap_interval(values)
    assert bootstrap_interval(values) == estimate
    # whatever the clips are called
    assert bootstrap_interval(values, clips=torch.randperm(50, generator=torch.Generator().manual_seed(1))) == estimate


def test_refuses_what_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 clips, got 1"):
        bootstrap_interval(torch.ones(1))
    with pytest.raises(ValueError, match="at least 2 clips, got 1"):
        bootstrap_interval(torch.arange(9.0), clips=torch.full((9,), 5))
    with pytest.raises(ValueError, match="NaN or infinite"):
        bootstrap_interval(torch.tensor([1.0, float("inf")]))
