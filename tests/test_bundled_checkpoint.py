"""The checkpoint in the package: small, complete, and what its card says of it."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor

from transformers_aar import BUNDLED_CHECKPOINT
from transformers_aar.data.synthesis import SOUND_KINDS, synthesize
from transformers_aar.evaluation.nearest_centroid import NearestCentroid
from transformers_aar.training.losses import MelLoss

FIRST_HELD_OUT_SEED = 1_000_000
# the kinds that the checkpoint was trained on
KINDS = SOUND_KINDS[:12]


def sounds_of_all_kinds(seeds: range) -> tuple[torch.Tensor, torch.Tensor]:
    sounds = torch.stack([torch.from_numpy(synthesize(kind, seed)) for seed in seeds for kind in KINDS])
    return sounds, torch.arange(len(KINDS)).repeat(len(seeds))


def card_figure(pattern: str) -> float:
    card = (Path(BUNDLED_CHECKPOINT) / "README.md").read_text()
    return float(re.search(rf"^\| {pattern} \| ([\d.]+)", card, flags=re.MULTILINE)[1])


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(BUNDLED_CHECKPOINT)


def test_size_and_contents(model):
    folder = Path(BUNDLED_CHECKPOINT)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    assert not list(folder.glob("*.py"))  # the package is the code
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert weights.get_tensor("codec_model.quantizer.codebook").dtype == torch.float32
    assert model.dtype == torch.float32
    assert json.loads((folder / "config.json").read_text())["labels"] == list(KINDS)


@torch.no_grad()
def test_reconstruction_is_what_the_card_says(model):
    held_out, _ = sounds_of_all_kinds(range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + 5))
    codec = model.codec_model
    reconstructed = codec.decode(codec.encode(held_out[:, None]).audio_codes).audio_values
    distance = MelLoss(24_000)(reconstructed, held_out[:, None]).item()
    assert distance == pytest.approx(card_figure("mel distance of 60 held-out sounds' reconstructions"), rel=0.02)


def test_generated_sounds_are_named_rightly(model):
    """Five sounds of each of the twelve kinds: at least half are what was asked for, and as many as the card says."""
    classifier = NearestCentroid(*sounds_of_all_kinds(range(100)), 24_000)
    processor = AutoProcessor.from_pretrained(BUNDLED_CHECKPOINT)
    kinds = torch.arange(len(KINDS)).repeat(5)
    generators = [torch.Generator().manual_seed(FIRST_HELD_OUT_SEED + index) for index in range(len(kinds))]
    waveforms = model.generate(**processor([KINDS[kind] for kind in kinds]), generator=generators)
    right = int((classifier(waveforms[:, 0]) == kinds).sum())
    assert right >= 30
    claimed = card_figure("generated sounds that a nearest-centroid classifier names rightly")
    assert abs(right - claimed) <= 3  # rounding on another processor may turn a draw
