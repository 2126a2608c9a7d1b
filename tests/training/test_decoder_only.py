"""Training of the decoder alone."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from transformers_aar.hub.loading import load_codec
from transformers_aar.training.arguments import DataArguments, LoopArguments, SatArguments, make_arguments
from transformers_aar.training.runs import train_sat


def train(options: dict, folder, **others):
    chosen = options | {"output_dir": str(folder), "data_dir": str(options["data_dir"])} | others
    return train_sat(*make_arguments(chosen, DataArguments, LoopArguments, SatArguments))


@pytest.fixture
def codec(sat_options, tmp_path):
    return train(sat_options, tmp_path / "codec", max_steps=2)


def test_codes_stay_and_the_decoder_learns(sat_options, codec, tmp_path):
    others = {"model_name_or_path": str(codec), "decoder_only": True, "max_steps": 3, "save_steps": 2}
    final = train(sat_options, tmp_path / "decoder", **others)
    before, after = (load_file(folder / "model.safetensors") for folder in (codec, final))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("decoder.")}
    assert load_codec(final).fingerprint() == load_codec(codec).fingerprint()


def test_a_run_goes_on(sat_options, codec, tmp_path):
    """Optimizer states are there for the decoder alone."""
    others = {"model_name_or_path": str(codec), "decoder_only": True, "save_steps": 2, "max_steps": 4}
    whole = train(sat_options, tmp_path / "whole", **others)
    shutil.copytree(tmp_path / "whole" / "checkpoint-000002", tmp_path / "part" / "checkpoint-000002")
    part = train(sat_options, tmp_path / "part", resume="latest", **others)
    left, right = (load_file(folder / "model.safetensors") for folder in (whole, part))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_needs_a_codec(sat_options, tmp_path):
    with pytest.raises(ValueError, match="`decoder_only` goes on from a trained codec"):
        train(sat_options, tmp_path, decoder_only=True)
