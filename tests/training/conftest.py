"""Trainings so small that a step takes less than a tenth of a second."""

import json
from pathlib import Path

import pytest
from clips import write_clips


@pytest.fixture(scope="session")
def audioset_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audioset")
    write_clips(folder, "unbalanced_train", 11)
    write_clips(folder, "eval", 5)
    return folder


@pytest.fixture(scope="session")
def codec_dir(tmp_path_factory, build_codec) -> Path:
    folder = tmp_path_factory.mktemp("codec")
    build_codec().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def common_options(audioset_dir) -> dict:
    return {
        **{"data_dir": audioset_dir, "num_validation_examples": 4, "dataloader_num_workers": 0},
        **{"per_device_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1, "validation_steps": 100},
        **{"save_steps": 100, "report_to": "none", "use_cpu": True},
    }


@pytest.fixture(scope="session")
def sat_options(common_options, short_codec_fields) -> dict:
    """The tokenizer's whole training in small; codes are revived in most steps."""
    codec_config = short_codec_fields | {"dead_code_threshold": 0.3, "codebook_decay": 0.8}
    discriminators = {"stft": {"n_ffts": [256, 128], "num_filters": 2}}
    return common_options | {"codec_config": json.dumps(codec_config), "discriminators": json.dumps(discriminators)}


@pytest.fixture(scope="session")
def aar_options(common_options, codec_dir) -> dict:
    """The generator's from labels in small, with everything that is random."""
    model_config = {
        **{"conditioning": "label", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"adaln": "shared", "drop_path_rate": 0.3, "conditioning_dropout": 0.3},
    }
    return common_options | {"codec": codec_dir, "model_config": json.dumps(model_config), "ema_decay": 0.9}


@pytest.fixture(scope="session")
def options(sat_options, aar_options) -> dict[str, dict]:
    """Options of each stage."""
    return {"sat": sat_options, "aar": aar_options}
