"""SatConfig and AarConfig: what follows from the fields, what is refused, and the way to JSON and back."""

import pytest
from transformers import ClapConfig

from transformers_aar import AarConfig, SatConfig

PUBLISHED_SCALES = [1, 2, 4, 6, 9, 12, 16, 20, 25, 31, 37, 43, 50, 58, 66, 75]


def test_default_codec_is_the_published_one():
    config = SatConfig()
    assert config.scales == PUBLISHED_SCALES
    assert config.hop_length == 320
    assert config.frame_rate == 75
    assert config.window_length == config.window_stride == 24_000
    assert config.num_scales == 16
    assert config.tokens_per_window == 455
    assert config.bandwidth == pytest.approx(4.55)


def test_overlap_costs_bandwidth():
    """Windows that share a quarter follow each other every three quarters of a second."""
    config = SatConfig(overlap=0.25)
    assert config.window_stride == 18_000
    assert config.bandwidth == pytest.approx(4.55 / 0.75)


@pytest.mark.parametrize(
    "samples, overlap, windows",
    [(1, 0, 1), (24_000, 0, 1), (24_001, 0, 2), (48_000, 0, 2), (42_000, 0.25, 2), (42_001, 0.25, 3)],
)
def test_windows_cover_the_audio(samples, overlap, windows):
    assert SatConfig(overlap=overlap).num_windows(samples) == windows


def test_plain_residual_codec():
    """Ten equal scales without φ: the token count that the paper compares with."""
    config = SatConfig(scales=[75] * 10, phi_kernel_sizes=[])
    assert config.tokens_per_window == 750
    assert config.bandwidth == pytest.approx(7.5)


def test_other_framing():
    config = SatConfig(
        sampling_rate=16_000, upsampling_ratios=(4, 4), window_length_s=0.5, scales=(10, 500), phi_kernel_sizes=[9]
    )
    assert (config.hop_length, config.frame_rate, config.window_length) == (16, 1000, 8000)


IMPOSSIBLE_CODECS = [
    *[
        ({name: value}, name)
        for name in (
            *("sampling_rate", "audio_channels", "num_filters", "num_residual_layers", "kernel_size", "compress"),
            *("last_kernel_size", "residual_kernel_size", "dilation_growth_rate", "hidden_size", "codebook_dim"),
            *("codebook_size", "num_lstm_layers", "kmeans_iterations"),
        )
        for value in (0, -1, 1.5, "2")
    ],
    ({"scales": []}, "scales"),
    ({"scales": [0, 75]}, "scales"),
    ({"scales": [1.5, 75]}, "scales"),
    ({"scales": [2, 1, 75], "phi_kernel_sizes": []}, "scales"),
    ({"scales": [1, 2, 4, 8, 16, 32, 74]}, "scales"),
    ({"upsampling_ratios": []}, "upsampling_ratios"),
    ({"upsampling_ratios": [8, 0]}, "upsampling_ratios"),
    ({"upsampling_ratios": [7, 5, 4, 2]}, "upsampling_ratios"),
    ({"phi_kernel_sizes": [8]}, "phi_kernel_sizes"),
    ({"phi_kernel_sizes": [0]}, "phi_kernel_sizes"),
    ({"phi_kernel_sizes": [9] * 17}, "phi_kernel_sizes"),
    ({"window_length_s": 0.0}, "window_length_s"),
    ({"window_length_s": -1.0}, "window_length_s"),
    ({"window_length_s": 1.001}, "window_length_s"),
    ({"window_length_s": 2.0}, "scales"),
    ({"overlap": -0.1}, "overlap"),
    ({"overlap": 0.6}, "overlap"),
    ({"codebook_decay": 1.0}, "codebook_decay"),
    ({"codebook_decay": -0.1}, "codebook_decay"),
    ({"dead_code_threshold": 1.0}, "dead_code_threshold"),
    ({"dead_code_threshold": -1.0}, "dead_code_threshold"),
    ({"pad_mode": "mirror"}, "pad_mode"),
    ({"norm_type": "batch_norm"}, "norm_type"),
]


@pytest.mark.parametrize("fields, name", IMPOSSIBLE_CODECS, ids=str)
def test_impossible_codec_names_the_field(fields, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        SatConfig(**fields)


IMPOSSIBLE_GENERATORS = [
    *[
        ({name: value}, name)
        for name in ("conditioning_dim", "hidden_size", "num_hidden_layers", "num_attention_heads")
        for value in (0, -1, 2.5, "2", True)
    ],
    ({"hidden_size": 100, "num_attention_heads": 3}, "hidden_size"),
    ({"mlp_ratio": 0}, "mlp_ratio"),
    ({"mlp_ratio": -1.0}, "mlp_ratio"),
    ({"conditioning": "text"}, "conditioning"),
    ({"adaln": "all"}, "adaln"),
    ({"drop_path_rate": 1.0}, "drop_path_rate"),
    ({"drop_path_rate": -0.1}, "drop_path_rate"),
    ({"conditioning_dropout": 1.0}, "conditioning_dropout"),
    ({"conditioning": "label"}, "labels"),
    ({"conditioning": "label", "labels": []}, "labels"),
    ({"conditioning": "none", "labels": ["Dog"]}, "labels"),
    ({"conditioning": "label", "labels": ["Dog", "Dog"]}, "labels"),
    ({"conditioning": "label", "labels": ["Dog", "dog"]}, "labels"),
    ({"conditioning": "label", "labels": ["Dog; Rain"]}, "labels"),
    ({"conditioning": "label", "labels": ["Dog", " "]}, "labels"),
    ({"conditioning": "none", "conditioner_config": ClapConfig()}, "conditioner_config"),
    ({"conditioner_config": ClapConfig(projection_dim=256)}, "conditioner_config.projection_dim"),
    ({"codec_config": {"scales": [1, 2], "phi_kernel_sizes": []}}, "scales"),
]


@pytest.mark.parametrize("fields, name", IMPOSSIBLE_GENERATORS, ids=lambda value: str(value)[:60])
def test_impossible_generator_names_the_field(fields, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        AarConfig(**fields)


def test_generator_delegates_to_its_codec():
    config = AarConfig(codec_config={"sampling_rate": 16_000, "scales": [1, 50], "phi_kernel_sizes": []})
    assert config.sampling_rate == 16_000
    assert config.num_slots == 51
    assert AarConfig().num_slots == 455
    assert AarConfig().head_dim == 64


def test_stochastic_depth_grows_with_the_model():
    """0.1 · depth / 24, unless it is set."""
    assert AarConfig().drop_path_rate == pytest.approx(0.1 * 16 / 24)
    assert AarConfig(num_hidden_layers=24).drop_path_rate == pytest.approx(0.1)
    assert AarConfig(drop_path_rate=0.0).drop_path_rate == 0


@pytest.mark.parametrize(
    "config",
    [
        SatConfig(),
        SatConfig(scales=(1, 75), phi_kernel_sizes=(), overlap=0.5, num_filters=4),
        AarConfig(),
        AarConfig(conditioning="label", labels=["Dog", "Straße"], adaln="shared", use_qk_norm=False),
        AarConfig(conditioner_config=ClapConfig(), codec_config=SatConfig(codebook_size=64)),
        AarConfig(conditioning="none", drop_path_rate=0.25, conditioning_dropout=0.0),
    ],
    ids=["SAT", "small SAT", "AAR", "labels", "CLAP", "none"],
)
def test_round_trip(config, tmp_path):
    """Every field survives, nested configurations included, and the second file is the first."""
    config.save_pretrained(tmp_path / "first")
    loaded = type(config).from_pretrained(tmp_path / "first")
    assert loaded.to_dict() == config.to_dict() | {"transformers_version": loaded.transformers_version}
    for name in config.sub_configs:
        assert type(getattr(loaded, name)) is type(getattr(config, name))
    loaded.save_pretrained(tmp_path / "second")
    first, second = (tmp_path / name / "config.json" for name in ("first", "second"))
    assert first.read_text() == second.read_text()
