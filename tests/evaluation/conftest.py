"""Tiny networks with random weights, and sounds, for the figures that need them."""

import pytest
import torch

from transformers_aar.evaluation.embeddings import AstEmbedding, ClapEmbedding


@pytest.fixture(scope="session")
def clap(clap_config, build_clap_processor) -> ClapEmbedding:
    from transformers import ClapModel

    torch.manual_seed(0)
    return ClapEmbedding(ClapModel(clap_config), build_clap_processor())


@pytest.fixture(scope="session")
def ast() -> AstEmbedding:
    """An AST 16 numbers wide, of five classes and spectrograms of 64 frames, 0.66 s."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = ASTConfig(**sizes, max_length=64, num_mel_bins=16, num_labels=5)
    return AstEmbedding(ASTForAudioClassification(config), ASTFeatureExtractor(max_length=64, num_mel_bins=16))


@pytest.fixture(scope="session")
def sounds():
    """Makes that many sounds `(count, num_samples)` of noise, each with a colour and a level of its own."""

    def make(count: int, num_samples: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, num_samples, generator=generator)
        colour = torch.rand(count, 1, generator=generator)
        noise[:, 1:] += colour * noise[:, :-1].clone()
        return noise * (0.05 + 0.2 * torch.rand(count, 1, generator=generator))

    return make
