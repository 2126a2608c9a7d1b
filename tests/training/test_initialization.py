import math

import pytest
import torch

from transformers_aar import SatConfig, SatModel
from transformers_aar.training.initialization import initialize_from_data
from transformers_aar.training.losses import relative_error

SMALL = {"num_filters": 8, "num_lstm_layers": 1, "hidden_size": 64, "codebook_dim": 64, "codebook_size": 16}


def chords(count: int, seed: int) -> torch.Tensor:
    """Sounds `(count, 1, 9600)` of three sines below 1.2 kHz, half of what 64 numbers per frame can hold."""
    generator = torch.Generator().manual_seed(seed)
    frequencies, phases = torch.rand(2, count, 3, 1, generator=generator)
    time = torch.arange(9600) / 24_000
    waves = torch.sin(2 * math.pi * (100 + 1100 * frequencies) * time + 2 * math.pi * phases)
    return 0.1 * waves.sum(1, keepdim=True)


def autoencode(codec: SatModel, sounds: torch.Tensor) -> torch.Tensor:
    """The sounds past the quantizer."""
    latents = codec.quantizer.project_in(codec.encoder(sounds).transpose(1, 2))
    return codec.decoder(codec.quantizer.project_out(latents).transpose(1, 2))


def error_after_start(**options) -> float:
    torch.manual_seed(0)
    codec = SatModel(SatConfig(**SMALL | options)).eval()
    initialize_from_data(codec, chords(24, seed=0))
    held_out = chords(8, seed=1)
    with torch.no_grad():
        return float(relative_error(autoencode(codec, held_out), held_out))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"upsampling_ratios": [5, 4, 4, 4]},
        {"use_causal_conv": True},
        {"use_causal_conv": True, "trim_right_ratio": 0.5},
        {"use_conv_shortcut": False, "num_residual_layers": 2},
        {"hidden_size": 80},
    ],
)
def test_untrained_codec_passes_on_what_it_has_never_heard(options):
    assert error_after_start(**options) < 0.15


def test_narrow_latents_keep_the_strongest_components():
    """A quarter of the numbers keeps less, but more than silence would, whose error is 1."""
    wide, narrow = error_after_start(), error_after_start(codebook_dim=16)
    assert wide < narrow < 0.9


def test_every_scale_reaches_the_decoder():
    """φ starts as the identity: what is decoded from a code vector of the finest scale is that vector."""
    codec = SatModel(SatConfig(**SMALL)).eval()
    initialize_from_data(codec, chords(24, seed=0))
    hidden = torch.randn(2, 64, 75)
    for phi in codec.quantizer.phi:
        torch.testing.assert_close(phi(hidden), hidden)


def test_all_weights_still_learn():
    torch.manual_seed(0)
    codec = SatModel(SatConfig(**SMALL))
    sounds = chords(24, seed=0)
    initialize_from_data(codec, sounds)
    autoencode(codec, sounds[:4]).square().mean().backward()
    blocks = [*codec.encoder.named_parameters(), *codec.decoder.named_parameters()]
    assert all(parameter.grad.abs().sum() > 0 for _, parameter in blocks)


@pytest.mark.parametrize("options", [{"num_filters": 7}, {"norm_type": "time_group_norm"}])
def test_what_cannot_start_so(options):
    with pytest.raises(ValueError, match=f"data_dependent_init.*{next(iter(options))}"):
        initialize_from_data(SatModel(SatConfig(**SMALL | options)), chords(4, seed=0))


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 16}])
def test_variance_of_what_is_quantized(options):
    """The commitment loss is measured in it."""
    codec = SatModel(SatConfig(**SMALL | options))
    sounds = chords(24, seed=0)
    initialize_from_data(codec, sounds)
    with torch.no_grad():
        latents = codec.quantizer.project_in(codec.encoder(sounds).transpose(1, 2))
    assert latents.std().item() == pytest.approx(1, rel=0.02)
