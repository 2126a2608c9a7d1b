"""Discriminators and losses against the reference's numbers for `wave` (real) and `recon` (fake)."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from transformers_aar.training.discriminators import MultiScaleSTFTDiscriminator
from transformers_aar.training.losses import (
    SAT_LOSS_WEIGHTS,
    MelLoss,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
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
    torch.testing.assert_close(fake.grad[:batch_size, :, :num_samples], expected, atol=1e-6, rtol=0)


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


def test_losses_and_weights_must_name_the_same():
    """A misspelt weight in a recipe is an error, not a loss left out."""
    losses = {"wave": torch.tensor(2.0), "mel": torch.tensor(3.0)}
    assert weighted_sum(losses, {"mel": 0.0, "wave": 0.5}).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="mel, wave, but weights were given for mle, wave"):
        weighted_sum(losses, {"wave": 0.5, "mle": 1.0})
