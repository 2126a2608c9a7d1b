"""
Discriminators and losses against the reference's numbers for `wave` (real) and `recon` (fake), and what the reference
doesn't have: discriminators of the waveform, files, and batches in parts.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from transformers_aar.training.discriminators import (
    AudioDiscriminator,
    MultiPeriodDiscriminator,
    MultiScaleDiscriminator,
    MultiScaleSTFTDiscriminator,
)
from transformers_aar.training.losses import (
    SAT_LOSS_WEIGHTS,
    MelLoss,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
    mean_magnitudes,
    relative_error,
    weighted_sum,
)

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAMES = ["tiny", "tiny_noproj", "tiny_noaln"]


def reference_key(name: str) -> str:
    """The reference's name of one of our discriminator's parameters."""
    name = name.replace(".parametrizations.weight.original0", ".weight_g")
    name = name.replace(".parametrizations.weight.original1", ".weight_v")
    layer, parameter = name.rsplit(".", 1)
    return f"{layer}.conv.{parameter}"


def load_discriminator(checkpoint: Path, settings: dict) -> MultiScaleSTFTDiscriminator:
    """A discriminator with the reference's weights."""
    discriminator = MultiScaleSTFTDiscriminator(
        settings["n_ffts"], settings["hop_lengths"], settings["win_lengths"], settings["filters"]
    )
    weights = torch.load(checkpoint, weights_only=True)["disc_state_dict"]
    discriminator.load_state_dict(
        {name: weights[f"module.{reference_key(name)}"] for name in discriminator.state_dict()}
    )
    return discriminator


@pytest.fixture(params=NAMES)
def case(request):
    """One configuration's discriminator, sounds and expected values."""
    folder = FIXTURES / request.param
    expected = load_file(folder / "expected.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    discriminator = load_discriminator(folder / "sat_upstream.pth", settings["disc"])
    return SimpleNamespace(
        expected=expected, discriminator=discriminator, real=expected["wave"], fake=expected["recon"]
    )


def assert_outputs(discriminator: MultiScaleSTFTDiscriminator, expected: dict, prefix: str) -> None:
    """Logits whole; of the features the shape, a corner, and statistics."""
    with torch.no_grad():
        output = discriminator(expected["wave"])
    for index, (logits, features) in enumerate(zip(output.logits, output.features, strict=True)):
        torch.testing.assert_close(logits, expected[f"{prefix}.{index}.logits"], atol=5e-5, rtol=0)
        assert len(features) == 5
        for layer, feature in enumerate(features):
            key = f"{prefix}.{index}.fmap{layer}"
            assert list(feature.shape) == expected[f"{key}.shape"].tolist()
            torch.testing.assert_close(feature[:, :, :3, :5], expected[f"{key}.corner"], atol=1e-5, rtol=0)
            statistics = torch.stack(
                [feature.mean(), feature.std(), feature.abs().mean(), feature.min(), feature.max()]
            )
            torch.testing.assert_close(statistics, expected[f"{key}.stats"], atol=1e-5, rtol=0)


def test_discriminator_is_the_references(case):
    """Among the resolutions are a transform of 160 samples, and a hop that is half the transform."""
    assert_outputs(case.discriminator, case.expected, "disc")


def test_published_resolutions_are_the_references():
    """The defaults are the five published resolutions."""
    folder = FIXTURES / "tiny"
    settings = json.loads((folder / "config.json").read_text())["disc5"]
    discriminator = load_discriminator(folder / "disc5_upstream.pth", settings)
    assert_outputs(discriminator, load_file(folder / "expected.safetensors"), "disc5")

    defaults = MultiScaleSTFTDiscriminator(num_filters=settings["filters"])
    defaults.load_state_dict(discriminator.state_dict())
    audio = torch.randn(1, 1, 4096, generator=torch.Generator().manual_seed(0))
    for ours, published in zip(defaults(audio).logits, discriminator(audio).logits, strict=True):
        assert torch.equal(ours, published)


def generator_losses(case, fake: torch.Tensor) -> dict[str, torch.Tensor]:
    """The generator's losses but the commitment loss, which belongs to the quantizer."""
    real_output, fake_output = case.discriminator(case.real), case.discriminator(fake)
    return {
        "adversarial": adversarial_loss(fake_output.logits),
        "feature": feature_matching_loss(real_output.features, fake_output.features),
        "wave": F.l1_loss(fake, case.real),
        "mel": MelLoss(24_000)(fake, case.real),
    }


def test_generator_losses_are_the_references(case):
    """The reference divides the adversarial loss by the number of discriminators a second time; we don't."""
    losses = generator_losses(case, case.fake)
    num_discriminators = len(case.discriminator.discriminators)
    torch.testing.assert_close(losses["wave"], case.expected["loss.l_t"], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["mel"], case.expected["loss.l_f"], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["feature"], case.expected["loss.l_feat"], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        losses["adversarial"] / num_discriminators, case.expected["loss.l_g"], rtol=1e-5, atol=0
    )


def test_generator_gradient_is_the_references(case):
    """The published balance is had by dividing the adversarial weight by the number of discriminators."""
    fake = case.fake.clone().requires_grad_()
    weights = {name: weight for name, weight in SAT_LOSS_WEIGHTS.items() if name != "commitment"}
    weights["adversarial"] /= len(case.discriminator.discriminators)
    loss = weighted_sum(generator_losses(case, fake), weights)
    torch.testing.assert_close(loss, case.expected["loss.generator_without_commit"], rtol=1e-5, atol=0)

    loss.backward()
    expected = case.expected["loss.generator_without_commit.grad_fake"]
    batch_size, _, num_samples = expected.shape
    error = (fake.grad[:batch_size, :, :num_samples] - expected).norm() / expected.norm()
    # of the gradient's size, as losses are held to
    assert error < 1e-5


def test_discriminator_loss_is_the_references(case):
    """And so is the norm of its gradient in every parameter."""
    loss = discriminator_loss(case.discriminator(case.real).logits, case.discriminator(case.fake).logits)
    torch.testing.assert_close(loss, case.expected["loss.disc"], rtol=1e-5, atol=0)

    loss.backward()
    for name, parameter in case.discriminator.named_parameters():
        norm = case.expected[f"loss.disc.grad_norm/{reference_key(name)}"]
        torch.testing.assert_close(parameter.grad.norm(), norm, rtol=1e-4, atol=1e-6, msg=name)


def test_mel_loss_ignores_autocast(case):
    """Half precision would spoil log-power spectrograms."""
    mel_loss = MelLoss(24_000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mel_loss(case.fake, case.real)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, mel_loss(case.fake, case.real))


def test_feature_loss_trains_the_fake_side_only():
    """The recording's activations are a target."""
    real_features = [[torch.tensor([1.0, -3.0], requires_grad=True)]]
    fake_features = [[torch.tensor([2.0, -3.0], requires_grad=True)]]
    loss = feature_matching_loss(real_features, fake_features)
    loss.backward()
    assert loss.item() == pytest.approx(0.25)
    assert fake_features[0][0].grad.tolist() == [0.25, 0.0]
    assert real_features[0][0].grad is None


def test_hinge_losses_stop_at_the_margin():
    """Certain and right costs a discriminator nothing, and resolutions count alike whatever their size."""
    sure_real, sure_fake = torch.full((2, 3), 1.5), torch.full((2, 3), -1.5)
    assert discriminator_loss([sure_real], [sure_fake]).item() == 0
    assert discriminator_loss([sure_fake], [sure_real]).item() == pytest.approx(5.0)
    assert adversarial_loss([sure_real, sure_fake[:1]]).item() == pytest.approx(1.25)


def test_weighted_sum():
    """Weights of losses that haven't begun change nothing."""
    losses = {"wave": torch.tensor(2.0), "mel": torch.tensor(3.0)}
    assert weighted_sum(losses, {"mel": 0.0, "wave": 0.5, "feature": 3.0}).item() == pytest.approx(1.0)


# --- Beyond the reference ---

TINY_DISCRIMINATORS = {
    "stft": {"n_ffts": [64, 32], "num_filters": 4},
    "period": {"periods": [2, 3], "channels": [4, 8, 8]},
    "scale": {"num_rates": 2, "channels": [4, 8, 16]},
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_discriminator() -> AudioDiscriminator:
    torch.manual_seed(0)
    return AudioDiscriminator(TINY_DISCRIMINATORS)


def test_periods_see_their_samples_apart():
    """A change of one sample in `period` moves one column of the logits only."""
    discriminator = MultiPeriodDiscriminator([3], [4, 8])
    audio = noise(1, 1, 31)
    changed = audio.clone()
    changed[..., 4] += 1.0
    (before,), _ = discriminator(audio)
    (after,), _ = discriminator(changed)
    # 31 samples are padded to 33, which make 11 rows; the first of two layers has stride 3
    assert before.shape == (1, 1, 4, 3)
    moved = (before != after).any(2).flatten()
    assert moved.tolist() == [False, True, False]


def test_rates_are_halved_by_averaging():
    """What alternates from sample to sample is heard at the full rate only."""
    discriminator = MultiScaleDiscriminator(2, [4, 8])
    silence = torch.zeros(1, 1, 64)
    tone = torch.tensor([1.0, -1.0]).repeat(32)[None, None]
    quiet, loud = discriminator(silence).features, discriminator(tone).features
    assert [layers[0].shape for layers in loud] == [(1, 4, 64), (1, 4, 32)]
    assert not torch.allclose(loud[0][0], quiet[0][0], atol=1e-3)
    inner = slice(8, -8)
    torch.testing.assert_close(loud[1][0][..., inner], quiet[1][0][..., inner], atol=1e-6, rtol=0)


def test_published_sizes_of_waveform_discriminators():
    """Channels and layers of the papers: five periods with five hidden layers, three rates with six."""
    with torch.device("meta"):
        periods, rates = MultiPeriodDiscriminator(), MultiScaleDiscriminator()
    assert [discriminator.period for discriminator in periods.discriminators] == [2, 3, 5, 7, 11]
    channels = [conv.out_channels for conv in periods.discriminators[0].convs]
    assert channels == [32, 128, 512, 1024, 1024]
    assert [len(discriminator.pools) for discriminator in rates.discriminators] == [0, 1, 2]
    assert [conv.groups for conv in rates.discriminators[0].convs] == [1, 4, 16, 64, 256, 1]


def test_judgements_are_listed_one_after_the_other():
    """Together they say what each says alone."""
    discriminator, audio = tiny_discriminator(), noise(2, 1, 500)
    output = discriminator(audio)
    alone = [part(audio) for part in discriminator.discriminators.values()]
    assert len(output.logits) == len(output.features) == 6
    for ours, single in zip(output.logits, [logits for part in alone for logits in part.logits], strict=True):
        assert torch.equal(ours, single)
    for ours, single in zip(output.features, [layers for part in alone for layers in part.features], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, single, strict=True))


def test_the_published_one_is_the_stft_discriminator_alone():
    """With the same random start."""
    audio = noise(1, 1, 500)
    torch.manual_seed(0)
    together = AudioDiscriminator({"stft": TINY_DISCRIMINATORS["stft"]})(audio)
    torch.manual_seed(0)
    alone = MultiScaleSTFTDiscriminator(**TINY_DISCRIMINATORS["stft"])(audio)
    for ours, single in zip(together.logits, alone.logits, strict=True):
        assert torch.equal(ours, single)


def test_gradients_reach_everything():
    """Every parameter, and the whole of the sound."""
    discriminator, fake = tiny_discriminator(), noise(2, 1, 500).requires_grad_()
    adversarial_loss(discriminator(fake).logits).backward()
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert (fake.grad != 0).all()


def test_saved_discriminators_come_back(tmp_path):
    """With their kinds, sizes and weights."""
    path = tmp_path / "discriminator.safetensors"
    discriminator, audio = tiny_discriminator(), noise(1, 1, 500)
    discriminator.save(path)
    loaded = AudioDiscriminator.load(path)
    assert loaded.arguments == TINY_DISCRIMINATORS
    for ours, theirs in zip(loaded(audio).logits, discriminator(audio).logits, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "unknown kind", "other sizes", "tensor missing"])
def test_files_of_no_discriminator_are_refused(tmp_path, damage):
    """In one sentence that names the file."""
    path = tmp_path / "discriminator.safetensors"
    weights = tiny_discriminator().state_dict()
    if damage == "tensor missing":
        weights.popitem()
    arguments = TINY_DISCRIMINATORS | {
        "unknown kind": {"spectral": {}},
        "other sizes": {"scale": {"num_rates": 2, "channels": [4, 8, 8]}},
    }.get(damage, {})
    save_file(weights, path, metadata=None if damage == "foreign" else {"discriminators": json.dumps(arguments)})
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="discriminator.safetensors is no discriminator"):
        AudioDiscriminator.load(path)


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_nothing_is_rounded_in_double_precision(double_precision):
    """A change far below what fp32 can hold passes through to every loss."""
    discriminator, mel_loss = tiny_discriminator(), MelLoss(24_000)
    real, fake = noise(1, 1, 4096), noise(1, 1, 4096, seed=1)

    def losses(fake: torch.Tensor) -> dict[str, torch.Tensor]:
        real_output, fake_output = discriminator(real), discriminator(fake)
        return {
            "adversarial": adversarial_loss(fake_output.logits),
            "discriminator": discriminator_loss(real_output.logits, fake_output.logits),
            "feature": feature_matching_loss(real_output.features, fake_output.features),
            "mel": mel_loss(fake, real),
            "relative": relative_error(fake, real),
        }

    before, after = losses(fake), losses(fake * (1 + 1e-12))
    for name in before:
        assert before[name].dtype == torch.float64
        assert 0 < abs(before[name] - after[name]) < 1e-9, name


def test_losses_of_half_precision_are_summed_in_single():
    """Under autocast, activations come in half precision, whose mean over many loses what training needs."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tiny_discriminator()(noise(1, 1, 500))
    assert {logits.dtype for logits in output.logits} == {torch.bfloat16}
    halves = [[layer.float() for layer in layers] for layers in output.features]
    other = [[layer + 0.1 for layer in layers] for layers in halves]
    half_other = [[layer.bfloat16() for layer in layers] for layers in other]
    rounded = [[layer.float() for layer in layers] for layers in half_other]
    loss = feature_matching_loss(output.features, half_other)
    assert loss.dtype == adversarial_loss(output.logits).dtype == torch.float32
    assert torch.equal(loss, feature_matching_loss(halves, rounded))


def test_parts_of_a_batch_share_their_denominators():
    """The feature loss of a batch is the mean over its parts once they know each other's magnitudes."""
    discriminator, real = tiny_discriminator(), noise(4, 1, 500)
    real[:2] *= 10  # so that the parts' own magnitudes differ
    fake = noise(4, 1, 500, seed=1)
    whole = feature_matching_loss(discriminator(real).features, discriminator(fake).features)
    parts = [
        (discriminator(real_part).features, discriminator(fake_part).features)
        for real_part, fake_part in zip(real.split(2), fake.split(2), strict=True)
    ]
    magnitudes = torch.stack([mean_magnitudes(real_features) for real_features, _ in parts]).mean(0)
    assert magnitudes.shape == (sum(map(len, parts[0][0])),)
    shared = [feature_matching_loss(*part, magnitudes) for part in parts]
    torch.testing.assert_close(torch.stack(shared).mean(), whole, rtol=1e-5, atol=0)
    own = torch.stack([feature_matching_loss(*part) for part in parts]).mean()
    assert abs(own - whole) > 1e-3


def test_relative_error():
    """Loud and quiet sounds count alike, down to -40 dB; below that they count less and less."""
    real = torch.stack([torch.full((1, 100), 0.5), torch.full((1, 100), 0.05), torch.zeros(1, 100)])
    assert relative_error(real * 0.9, real).item() == pytest.approx((0.01 + 0.01 + 0) / 3)
    assert relative_error(torch.zeros_like(real), real).item() == pytest.approx(2 / 3)
    assert torch.isfinite(relative_error(real + 1, real))
    murmur = torch.full((1, 1, 100), 1e-3)
    assert relative_error(torch.zeros_like(murmur), murmur).item() == pytest.approx(0.01)


def test_mel_transforms_are_built_once():
    """A loss that has been built moves with its module, and makes nothing anew when it is called."""
    mel_loss = MelLoss(24_000)
    buffers = {name: buffer.data_ptr() for name, buffer in mel_loss.named_buffers()}
    mel_loss(noise(1, 1, 4096), noise(1, 1, 4096, seed=1))
    assert len(buffers) == 2 * len(mel_loss.window_lengths)
    assert {name: buffer.data_ptr() for name, buffer in mel_loss.named_buffers()} == buffers
