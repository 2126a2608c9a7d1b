"""What every test shares: no network, a Hub cache of its own, one thread per process, and the reference's fixtures."""

import os
import tempfile
from pathlib import Path

# The libraries read these once, when they are imported; processes started by a test inherit them.
_hub_cache = tempfile.TemporaryDirectory(prefix="transformers-aar-tests-")
os.environ["HF_HOME"] = _hub_cache.name
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from host_syncs import HostSyncCounter  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Folder with the reference's tiny checkpoints and the numbers that they must give."""
    return Path(__file__).parent / "fixtures"


def _perturb(module: torch.nn.Module, std: float, seed: int) -> None:
    """Adds noise to every parameter: freshly initialised blocks are too close to identities for a test to see much."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session")
def codec_fields() -> dict:
    """The smallest codec with the 16 published scales."""
    return {"num_filters": 2, "hidden_size": 8, "codebook_dim": 4, "codebook_size": 16, "num_lstm_layers": 1}


@pytest.fixture(scope="session")
def short_codec_fields(codec_fields) -> dict:
    """A codec with windows of 80 ms, 1920 samples, in four scales: for tests that need many passes."""
    return codec_fields | {"window_length_s": 0.08, "scales": [1, 2, 4, 6], "phi_kernel_sizes": [3, 3]}


@pytest.fixture(scope="session")
def build_codec(short_codec_fields):
    """Builds a SatModel with lively random weights and codebooks that fit them, in evaluation mode."""
    from transformers_aar import SatConfig, SatModel

    def build(base: dict = short_codec_fields, seed: int = 0, **fields) -> SatModel:
        torch.manual_seed(seed)
        model = SatModel(SatConfig(**{**base, **fields})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("weight.original0"):  # PyTorch's defaults make a signal fade from layer to layer
                    parameter.mul_(2)
        noise = torch.randn(16, model.config.audio_channels, model.config.window_length)
        model.start_codebooks(noise)
        return model

    return build


@pytest.fixture(scope="session")
def build_generator(build_codec):
    """Builds an AarForConditionalGeneration (64 wide, 2 blocks) with lively random weights, in evaluation mode."""
    from transformers_aar import AarConfig, AarForConditionalGeneration

    def build(codec_base: dict | None = None, seed: int = 0, codec_fields: dict | None = None, **fields):
        bases = {} if codec_base is None else {"base": codec_base}
        codec = build_codec(seed=seed, **bases, **(codec_fields or {}))
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "conditioning_dim": 32}
        config = AarConfig(codec_config=codec.config.to_dict(), **{**sizes, **fields})
        model = AarForConditionalGeneration(config).eval()
        model.codec_model.load_state_dict(codec.state_dict())
        _perturb(model.model, 0.1, seed + 1)
        _perturb(model.lm_head, 0.3, seed + 2)
        return model

    return build


@pytest.fixture(scope="session")
def clap_config():
    """A CLAP of 32 dimensions, small enough for tests; weights are random."""
    from transformers import ClapConfig

    return ClapConfig(
        text_config={"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"intermediate_size": 16, "projection_dim": 32},
        audio_config={"patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1], "num_hidden_layers": 2}
        | {"num_attention_heads": [1, 2], "spec_size": 64, "num_mel_bins": 16, "window_size": 4}
        | {"projection_dim": 32},
        projection_dim=32,
    )


@pytest.fixture
def host_sync_counter() -> HostSyncCounter:
    return HostSyncCounter()


@pytest.fixture(scope="session")
def build_clap_processor():
    """Builds the processor of the CLAP above: a tokenizer of letters, and reference sounds of up to one second."""
    from transformers import ClapFeatureExtractor, ClapProcessor, RobertaTokenizer

    def build() -> ClapProcessor:
        tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *"abcdefghijklmnopqrstuvwxyz"]
        tokenizer = RobertaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
        feature_extractor = ClapFeatureExtractor(
            feature_size=16, hop_length=480, fft_window_size=512, max_length_s=1, truncation="rand_trunc"
        )
        return ClapProcessor(feature_extractor, tokenizer)

    return build
