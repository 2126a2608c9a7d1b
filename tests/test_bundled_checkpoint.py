"""The checkpoint in the package: small, complete, and what its card says of it."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor

from transformers_aar import BUNDLED_CHECKPOINT
from transformers_aar.data.audioset import load_audio_dataset
from transformers_aar.data.events import single_events
from transformers_aar.data.examples import CropExamples
from transformers_aar.data.synthesis import SOUND_KINDS
from transformers_aar.data.synthetic_audioset import write_audioset
from transformers_aar.evaluation.sound_classifier import SoundClassifier
from transformers_aar.training.losses import MelLoss

NUM_CROPS = 50


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops `(50, 1, 24000)` of single events and their labels, from the split that the card's figures are of."""
    folder = tmp_path_factory.mktemp("sounds")
    write_audioset(folder, hours=0.003, eval_hours=0.15, audio_format="flac")
    events = single_events(load_audio_dataset("eval", folder), 1.0)
    examples = [CropExamples(events, 1.0, [24_000], 0)[0, index] for index in range(NUM_CROPS)]
    sounds = torch.stack([example["waveforms"][0] for example in examples])
    return sounds, torch.tensor([example["labels"][0] for example in examples])


def card_figure(pattern: str) -> float:
    card = (Path(BUNDLED_CHECKPOINT) / "README.md").read_text()
    return float(re.search(rf"^\| {pattern} \| ([\d.]+)", card, flags=re.MULTILINE)[1])


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(BUNDLED_CHECKPOINT)


@pytest.fixture(scope="module")
def classifier() -> SoundClassifier:
    return SoundClassifier.load("bundled")


def test_size_and_contents(model):
    folder = Path(BUNDLED_CHECKPOINT)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 24e6
    assert not list(folder.glob("*.py"))  # the package is the code
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert weights.get_tensor("codec_model.quantizer.codebook").dtype == torch.float32
    assert model.dtype == torch.float32
    assert json.loads((folder / "config.json").read_text())["labels"] == list(SOUND_KINDS)


@torch.no_grad()
def test_reconstructions_are_what_the_card_says(model, classifier, held_out):
    """Within what fifty sounds can tell."""
    sounds, labels = held_out
    assert (classifier.predict(sounds[:, 0]) == labels).float().mean() > 0.95
    codec = model.codec_model
    reconstructed = codec.decode(codec.encode(sounds).audio_codes).audio_values
    distance = MelLoss(24_000)(reconstructed, sounds).item()
    assert distance == pytest.approx(card_figure("mel distance of held-out sounds' reconstructions"), rel=0.15)
    named = (classifier.predict(reconstructed[:, 0]) == labels).float().mean().item()
    assert named == pytest.approx(card_figure("their reconstructions that it names rightly"), abs=0.15)


@torch.no_grad()
def test_distance_falls_with_the_scales(model, held_out):
    codec, sounds = model.codec_model, held_out[0]
    codes = codec.encode(sounds).audio_codes
    decoded = {count: codec.decode(codes, max_scales=count).audio_values for count in (8, 12, 16)}
    distances = [MelLoss(24_000)(audio, sounds).item() for audio in decoded.values()]
    assert distances == sorted(distances, reverse=True)


def test_generated_sounds_are_named_rightly(model, classifier):
    """Two of each kind, as many as the card says within what so few can tell."""
    processor = AutoProcessor.from_pretrained(BUNDLED_CHECKPOINT)
    kinds = torch.arange(len(SOUND_KINDS)).repeat(2)
    generators = [torch.Generator().manual_seed(index) for index in range(len(kinds))]
    waveforms = model.generate(**processor([SOUND_KINDS[kind] for kind in kinds]), generator=generators)
    named = (classifier.predict(waveforms[:, 0]) == kinds).float().mean().item()
    assert named == pytest.approx(card_figure("generated sounds that it names rightly"), abs=0.12)
