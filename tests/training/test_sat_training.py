"""How a codec's training starts."""

import pytest
import torch

from transformers_aar import SatConfig, SatModel
from transformers_aar.training.initialization import initialize_from_data
from transformers_aar.training.sat_training import autoencode, normalize_latents

TINY = {"num_filters": 4, "hidden_size": 8, "codebook_size": 16, "num_lstm_layers": 1}


@pytest.fixture(params=[4, 8], ids=["projections", "no projections"])
def codec(request) -> SatModel:
    torch.manual_seed(0)
    return SatModel(SatConfig(**TINY, codebook_dim=request.param)).train()


@pytest.fixture
def sounds() -> torch.Tensor:
    """Tones of different pitch and loudness, `(6, 1, 4800)`."""
    time = torch.arange(4800) / 24_000
    frequencies = torch.tensor([110, 220, 440, 880, 1760, 3520])
    loudness = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.4, 0.5])
    return (loudness[:, None] * torch.sin(2 * torch.pi * frequencies[:, None] * time))[:, None]


def latents(codec: SatModel, sounds: torch.Tensor) -> torch.Tensor:
    return codec.quantizer.project_in(codec.encoder(sounds).transpose(1, 2))


def test_normalized_latents(codec, sounds):
    """Variance 1 where the quantizer will be, and the same sound at the end."""
    initialize_from_data(codec, sounds)
    with torch.no_grad():
        for parameter in codec.encoder.layers[-1].conv.parameters():
            parameter.mul_(5)
        before = autoencode(codec, sounds)
        assert latents(codec, sounds).std() > 1.5
        normalize_latents(codec, sounds)
        torch.testing.assert_close(latents(codec, sounds).std(), torch.tensor(1.0), rtol=1e-3, atol=0)
        torch.testing.assert_close(autoencode(codec, sounds), before, rtol=1e-4, atol=1e-5)
