"""The synthetic sounds: reproducible, well levelled, refused by name when unknown, told apart by simple statistics."""

import hashlib
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchaudio

from transformers_aar.data.synthesis import SOUND_KINDS, synthesize
from transformers_aar.evaluation.nearest_centroid import NearestCentroid

SAMPLING_RATE = 24_000


def digest_of_all_kinds() -> str:
    """Hash of one sound of each kind at 16 bits."""
    digest = hashlib.sha256()
    for kind in SOUND_KINDS:
        digest.update(np.round(synthesize(kind, seed=7) * 32767).astype("<i2").tobytes())
    return digest.hexdigest()


def sounds_and_kinds(seeds: range) -> tuple[torch.Tensor, torch.Tensor]:
    """One sound of every kind per seed, `(sounds, samples)`, and their kinds."""
    sounds = np.stack([synthesize(kind, seed) for seed in seeds for kind in SOUND_KINDS])
    return torch.from_numpy(sounds), torch.arange(len(SOUND_KINDS)).repeat(len(seeds))


def test_there_are_twelve_kinds_with_siren_among_them():
    assert len(set(SOUND_KINDS)) == len(SOUND_KINDS) == 12
    assert "Siren" in SOUND_KINDS


def test_a_fresh_interpreter_makes_the_same_sounds():
    """Neither the process, its hash seed nor NumPy's global random state plays a part."""
    np.random.seed(1)
    script = "\n".join(
        [
            "import hashlib, numpy as np",
            "from transformers_aar.data.synthesis import SOUND_KINDS, synthesize",
            inspect.getsource(digest_of_all_kinds),
            "print(digest_of_all_kinds())",
        ]
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == digest_of_all_kinds()


@pytest.mark.parametrize("kind", SOUND_KINDS)
def test_length_type_and_level(kind):
    for seed in range(8):
        wave = synthesize(kind, seed)
        assert wave.shape == (SAMPLING_RATE,) and wave.dtype == np.float32
        assert np.isfinite(wave).all()
        assert 0.39 < np.abs(wave).max() < 0.95
        assert wave.std() > 0.02


@pytest.mark.parametrize("kind", SOUND_KINDS)
def test_every_second_of_a_long_sound_is_audible(kind):
    wave = synthesize(kind, seed=3, duration_s=6.0)
    assert wave.reshape(6, SAMPLING_RATE).std(axis=1).min() > 0.25 * wave.std()


@pytest.mark.parametrize("kind", SOUND_KINDS)
def test_seeds_make_different_sounds(kind):
    first, second = synthesize(kind, seed=0), synthesize(kind, seed=1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.6


@pytest.mark.parametrize("sampling_rate", [16_000, 44_100])
def test_other_sampling_rates_carry_the_same_sound(sampling_rate):
    duration_s = 1.3
    wave = synthesize("Siren", 5, duration_s, sampling_rate)
    assert wave.shape == (round(duration_s * sampling_rate),)
    reference = torch.from_numpy(synthesize("Siren", 5, duration_s))
    back = torchaudio.functional.resample(torch.from_numpy(wave), sampling_rate, SAMPLING_RATE)[: len(reference)]
    assert np.corrcoef(back, reference[: len(back)])[0, 1] > 0.98


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kind": "siren", "seed": 0}, r"There is no sound kind 'siren'; the nearest are Siren; "),
        ({"kind": "Siren", "seed": -1}, "The seed must be a non-negative integer, but is -1."),
        ({"kind": "Siren", "seed": 0, "duration_s": 0.1}, "The duration must be at least 0.5 seconds, but is 0.1."),
        (
            {"kind": "Siren", "seed": 0, "duration_s": float("nan")},
            "The duration must be at least 0.5 seconds, but is nan.",
        ),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        synthesize(**arguments)


def test_nearest_centroid_names_held_out_sounds():
    """Centroids of 40 seeds per kind name at least 95 % of 20 other seeds per kind."""
    classifier = NearestCentroid(*sounds_and_kinds(range(40)), SAMPLING_RATE)
    sounds, kinds = sounds_and_kinds(range(40, 60))
    correct = (classifier(sounds) == kinds).float().view(-1, len(SOUND_KINDS)).mean(0)
    assert correct.mean() >= 0.95, dict(zip(SOUND_KINDS, correct.tolist(), strict=True))
