import math

import pytest
import torch

from transformers_aar import SatConfig, SatModel
from transformers_aar.training.initialization import ChannelVocoder, initialize_from_data

SMALL = {"num_filters": 8, "num_lstm_layers": 1, "hidden_size": 32, "codebook_dim": 32, "codebook_size": 16}
VOCODER = ChannelVocoder(24_000, 320, 32, (160, 160))


def chords(count: int, seed: int) -> torch.Tensor:
    """Sounds `(count, 1, 9600)` of three sines that swell and fade, over a faint hiss."""
    generator = torch.Generator().manual_seed(seed)
    frequencies, phases, centres = torch.rand(3, count, 3, 1, generator=generator)
    time = torch.arange(9600) / 24_000
    waves = torch.sin(2 * math.pi * (100 + 6000 * frequencies.square()) * time + 2 * math.pi * phases)
    waves = waves * torch.exp(-(((time - 0.4 * centres) / 0.1) ** 2))
    return 0.1 * waves.sum(1, keepdim=True) + 0.001 * torch.randn(count, 1, 9600, generator=generator)


def started(**options) -> SatModel:
    torch.manual_seed(0)
    codec = SatModel(SatConfig(**SMALL | options)).eval()
    initialize_from_data(codec, chords(200, seed=0))
    return codec


def autoencode(codec: SatModel, sounds: torch.Tensor) -> torch.Tensor:
    """The sounds past the quantizer."""
    latents = codec.quantizer.project_in(codec.encoder(sounds).transpose(1, 2))
    return codec.decoder(codec.quantizer.project_out(latents).transpose(1, 2))


def error(codec: SatModel) -> float:
    """In the levels of bands and frames, of their variance: what a vocoder makes of sounds never heard is wanted."""
    sounds = chords(16, seed=1)
    with torch.no_grad():
        wanted = VOCODER.levels(VOCODER.synthesize(VOCODER.levels(sounds)))
        levels = VOCODER.levels(autoencode(codec, sounds))
    return float((levels - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"upsampling_ratios": [5, 4, 4, 4]},
        {"use_causal_conv": True},
        {"use_causal_conv": True, "trim_right_ratio": 0.5},
        {"use_conv_shortcut": False, "num_residual_layers": 2},
        {"num_lstm_layers": 2},
        {"hidden_size": 40},
        {"codebook_dim": 40},
    ],
)
def test_untrained_codec_is_a_vocoder(options):
    assert error(started(**options)) < 0.2


def test_narrow_latents_tell_fewer_bands_apart():
    wide, narrow = error(started()), error(started(codebook_dim=8))
    assert 2 * wide < narrow < 1


def test_channel_vocoder_keeps_levels():
    """Of noise, since what is faint beside something loud is drowned by the neighbouring bands."""
    noise = 0.1 * torch.randn(8, 1, 9600, generator=torch.Generator().manual_seed(0))
    levels = VOCODER.levels(noise)
    again = VOCODER.levels(VOCODER.synthesize(levels))
    assert levels.shape == (8, 32, 30)
    torch.testing.assert_close(again.mean(2), levels.mean(2), atol=1.0, rtol=0)


def test_silence_has_a_level():
    levels = VOCODER.levels(torch.zeros(1, 1, 9600))
    torch.testing.assert_close(levels.exp(), torch.full((1, 32, 30), 4e-8))


def test_every_scale_reaches_the_decoder():
    """φ starts as the identity: what is decoded from a code vector of the finest scale is that vector."""
    hidden = torch.randn(2, 32, 75)
    for phi in started().quantizer.phi:
        torch.testing.assert_close(phi(hidden), hidden)


def test_all_weights_still_learn():
    codec = started()
    autoencode(codec, chords(4, seed=0)).square().mean().backward()
    blocks = [*codec.encoder.named_parameters(), *codec.decoder.named_parameters()]
    assert all(parameter.grad.abs().sum() > 0 for _, parameter in blocks)


@pytest.mark.parametrize(
    "options",
    [{"num_filters": 7}, {"norm_type": "time_group_norm"}, {"audio_channels": 2}, {"upsampling_ratios": [320]}],
)
def test_what_cannot_start_so(options):
    with pytest.raises(ValueError, match=f"data_dependent_init.*{next(iter(options))}"):
        initialize_from_data(SatModel(SatConfig(**SMALL | options)), chords(4, seed=0))


@pytest.mark.parametrize(
    "options", [{"num_filters": 2}, {"hidden_size": 2}, {"num_filters": 2, "upsampling_ratios": [20, 16]}]
)
def test_codecs_too_small_to_be_good_start_all_the_same(options):
    with torch.no_grad():
        assert autoencode(started(**options), chords(2, seed=1)).isfinite().all()


def test_nothing_but_silence():
    with pytest.raises(ValueError, match="these are all silent"):
        initialize_from_data(SatModel(SatConfig(**SMALL)), torch.zeros(4, 1, 9600))


def test_bands_that_no_frame_could_tell_apart():
    with pytest.raises(ValueError, match="can't tell 32 bands of 24000 Hz apart"):
        ChannelVocoder(24_000, 16, 32, (8, 8))


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 16}])
def test_variance_of_what_is_quantized(options):
    """The commitment loss is measured in it."""
    codec = started(**options)
    with torch.no_grad():
        latents = codec.quantizer.project_in(codec.encoder(chords(200, seed=0)).transpose(1, 2))
    assert latents.std().item() == pytest.approx(1, rel=0.1)
