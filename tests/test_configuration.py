"""SatConfig and AarConfig: what follows from the fields, what is refused, and the way to JSON and back."""

import pytest
import torch
from transformers import ClapConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from transformers_aar import AarConfig, SatConfig, SatModel

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
        for value in (0, -1, 1.5, "2", None, True, [2], float("nan"), float("inf"))
    ],
    *[
        ({name: value}, name)
        for name in ("upsampling_ratios", "scales", "phi_kernel_sizes")
        for value in (5, None, "8542", True, {"a": 1}, ["8"], [True], [None], [float("nan")], [[1]])
    ],
    *[
        ({name: value}, name)
        for name in ("window_length_s", "overlap", "codebook_decay", "dead_code_threshold", "trim_right_ratio")
        for value in (None, "1", "a", True, [1.0], float("nan"), float("inf"), -float("inf"), 1e308, 10**400)
    ],
    *[({name: value}, name) for name in ("use_causal_conv", "use_conv_shortcut") for value in (None, 1, "yes")],
    *[({name: value}, name) for name in ("pad_mode", "norm_type") for value in (None, 1, ["reflect"])],
    ({"num_filters": 1}, "compress"),
    ({"num_filters": 4, "compress": 5}, "compress"),
    ({"trim_right_ratio": 0.5}, "trim_right_ratio"),
    ({"trim_right_ratio": -0.1, "use_causal_conv": True}, "trim_right_ratio"),
    ({"trim_right_ratio": 1.1, "use_causal_conv": True}, "trim_right_ratio"),
    ({"window_length_s": 1e-9}, "window_length_s"),
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


@pytest.mark.parametrize("fields, name", IMPOSSIBLE_CODECS, ids=lambda value: str(value)[:60])
def test_impossible_codec_names_the_field(fields, name):
    with pytest.raises(ValueError, match=f"`{name}`") as caught:
        SatConfig(**fields)
    assert "\n" not in str(caught.value)


def test_smallest_possible_codec(codec_fields):
    """The last values that aren't refused make a model."""
    fields = codec_fields | {"num_filters": 2, "compress": 2, "use_causal_conv": True, "trim_right_ratio": 0.5}
    model = SatModel(SatConfig(**fields)).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 24_000)).audio_values.shape == (1, 1, 24_000)


IMPOSSIBLE_GENERATORS = [
    *[
        ({name: value}, name)
        for name in ("conditioning_dim", "hidden_size", "num_hidden_layers", "num_attention_heads")
        for value in (0, -1, 2.5, "2", True, None, [2], float("nan"))
    ],
    *[
        ({name: value}, name)
        for name in ("mlp_ratio", "drop_path_rate", "conditioning_dropout")
        for value in ("x", True, [1.0], float("nan"), float("inf"))
    ],
    ({"mlp_ratio": None}, "mlp_ratio"),
    ({"conditioning_dropout": None}, "conditioning_dropout"),
    *[({name: value}, name) for name in ("conditioning", "adaln") for value in (None, 1, ["none"])],
    *[({"use_qk_norm": value}, "use_qk_norm") for value in (None, 1, "yes")],
    *[({"codec_config": value}, "codec_config") for value in ("x", 5, [], ClapConfig(), {"model_type": "encodec"})],
    *[({"conditioner_config": value}, "conditioner_config") for value in ("x", 5, SatConfig())],
    ({"conditioner_config": {"projection_dim": "wide"}}, "conditioner_config"),
    *[
        ({"conditioning": "label", "labels": value}, "labels")
        for value in (
            *("Dog", 5, True, {"Dog": 0}, [1, 2, 3], [None], ["Dog", ""], ["Dog "], ["\tDog"], ["Dog", "[PAD]"]),
            *(["[UNK]"], ["a [PAD]"], float("nan")),
        )
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
    with pytest.raises(ValueError, match=f"`{name}`") as caught:
        AarConfig(**fields)
    assert "\n" not in str(caught.value)


def test_configurations_need_not_be_of_our_classes(tmp_path):
    """Under remote code each folder brings classes of its own, whose objects come together all the same."""
    SatConfig(codebook_size=64).save_pretrained(tmp_path)
    remote = get_class_from_dynamic_module("configuration_sat.SatConfig", str(tmp_path))
    assert remote is not SatConfig
    assert AarConfig(codec_config=remote(codebook_size=64)).codec_config.codebook_size == 64


def test_tuple_of_labels_becomes_a_list():
    assert AarConfig(conditioning="label", labels=("Dog", "Straße")).labels == ["Dog", "Straße"]


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
