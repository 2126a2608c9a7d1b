"""Ten-second scenes of one to three synthesised sounds, each at its own distance, in one room, over a background."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.signal import butter, oaconvolve, sosfilt

from . import SOUND_KINDS, synthesize
from .blocks import RATE, fades, seconds

SCENE_SECONDS = 10.0
NUM_SAMPLES = int(SCENE_SECONDS * RATE)
SHORTEST_EVENT_SECONDS = 1.5
MAX_EVENTS = 3
# Kinds that go on for as long as a scene does.
SUSTAINED_KINDS = frozenset(
    (
        "Applause",
        "Cricket",
        "Engine",
        "Fire",
        "Helicopter",
        "Rain",
        "Stream",
        "Thunder",
        "Train",
        "Vacuum cleaner",
        "Waves, surf",
        "Wind",
    )
)
# Reverberation times in seconds of the open air, a small and a large room, and a hall.
REVERBERATION_SECONDS = ((0.05, 0.1), (0.15, 0.35), (0.35, 0.8), (0.9, 2.0))


class Event(NamedTuple):
    """
    A sound within a scene.

    Args:
        kind (`str`): one of `SOUND_KINDS`.
        start_s (`float`): where it begins, in seconds from the scene's beginning, to the millisecond.
        end_s (`float`): where it ends; its reverberation fades after that.
    """

    kind: str
    start_s: float
    end_s: float


def plan_scene(seed: Sequence[int]) -> list[Event]:
    """Draws the events of the scene that three non-negative numbers (dataset, split, index) name, by their start."""
    rng = _generator(seed, purpose=1)
    kinds = rng.choice(SOUND_KINDS, rng.choice(MAX_EVENTS, p=[0.55, 0.3, 0.15]) + 1, replace=False)
    return sorted((_plan_event(rng, str(kind)) for kind in kinds), key=lambda event: event.start_s)


def render_scene(seed: Sequence[int], events: Sequence[Event]) -> np.ndarray:
    """
    Makes the sound of the scene that `plan_scene` drew from the same seed.

    Returns:
        `np.ndarray` of dtype float32 and shape `(240000,)` at 24 kHz, with a peak of 0.3 to 0.95.
    """
    rng = _generator(seed, purpose=2)
    dry, sent = np.zeros(NUM_SAMPLES), np.zeros(NUM_SAMPLES)
    quietest = np.inf
    for number, event in enumerate(events):
        distance = rng.uniform()
        sound = _at_distance(synthesize(event.kind, _sound_seed(seed, number), event.end_s - event.start_s), distance)
        start = round(event.start_s * RATE)
        dry[start : start + len(sound)] += sound
        sent[start : start + len(sound)] += (0.15 + 0.85 * distance) * sound
        quietest = min(quietest, sound.std())
    scene = dry + 10 ** (rng.uniform(-18, -4) / 20) * _reverberate(rng, sent)
    background = _background(rng, _sound_seed(seed, MAX_EVENTS))
    scene += quietest * 10 ** (-rng.uniform(10, 30) / 20) * background
    return (scene * rng.uniform(0.3, 0.95) / np.max(np.abs(scene))).astype(np.float32)


def _generator(seed: Sequence[int], purpose: int) -> np.random.Generator:
    # the purpose isn't 0, because NumPy takes seeds that differ in zeros at their end for the same
    return np.random.Generator(np.random.PCG64([*seed, purpose]))


def _sound_seed(seed: Sequence[int], number: int) -> int:
    """A number of its own for every sound of every dataset, above those that people try by hand."""
    dataset, split, index = seed
    return ((2 * (dataset + 1) + split) * 2**40 + index) * (MAX_EVENTS + 1) + number


def _plan_event(rng: np.random.Generator, kind: str) -> Event:
    if kind in SUSTAINED_KINDS:
        return Event(kind, 0.0, SCENE_SECONDS)
    duration_s = rng.uniform(SHORTEST_EVENT_SECONDS, SCENE_SECONDS)
    start_s = rng.uniform(0, SCENE_SECONDS - duration_s)
    return Event(kind, round(start_s, 3), round(start_s + duration_s, 3))


def _at_distance(sound: np.ndarray, distance: float) -> np.ndarray:
    """Evens out the level, and makes a sound quieter and duller, by 12 dB and to 3.5 kHz at the distance 1."""
    # single knocks would be deafening if they had the mean power of a steady sound
    sound = sound / max(sound.std(), 0.15 * np.max(np.abs(sound)))
    sound = sosfilt(butter(1, 11_000 * (3_500 / 11_000) ** distance, fs=RATE, output="sos"), sound)
    return 10 ** (-12 * distance / 20) * sound * fades(len(sound), 0.005, 0.02)


def _reverberate(rng: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """Convolution with noise that decays by 60 dB in the reverberation time of a random room, high notes sooner."""
    decay_s = rng.uniform(*REVERBERATION_SECONDS[rng.integers(len(REVERBERATION_SECONDS))])
    time = seconds(int(decay_s * RATE))
    noise = rng.standard_normal(len(time))
    dull = sosfilt(butter(1, rng.uniform(1500, 4000), fs=RATE, output="sos"), noise)
    response = dull * 10 ** (-3 * time / decay_s) + 0.5 * noise * 10 ** (-6 * time / decay_s)
    delay = int(rng.uniform(0.002, 0.02) * RATE)
    reverberation = oaconvolve(sound, response / np.linalg.norm(response))[: len(sound) - delay]
    return np.pad(reverberation, (delay, 0))


def _background(rng: np.random.Generator, sound_seed: int) -> np.ndarray:
    """Noise between white and brown, mains hum, or the distant murmur of a sustained kind, at unit power."""
    choice = rng.integers(4)
    if choice == 3:
        texture = synthesize(str(rng.choice(sorted(SUSTAINED_KINDS))), sound_seed, SCENE_SECONDS)
        background = sosfilt(butter(2, 1000, fs=RATE, output="sos"), texture)
    else:
        spectrum = np.fft.rfft(rng.standard_normal(NUM_SAMPLES))
        frequencies = np.fft.rfftfreq(NUM_SAMPLES, 1 / RATE)
        spectrum *= np.maximum(frequencies, 20) ** -rng.uniform(0.3, 1.0)
        background = np.fft.irfft(spectrum, NUM_SAMPLES)
    if choice == 2:
        phase = 2 * np.pi * rng.choice([50, 60]) * seconds(NUM_SAMPLES)
        hum = sum(np.sin(harmonic * phase) / harmonic for harmonic in (1, 2, 3, 5))
        background += rng.uniform(0.5, 2.0) * background.std() * hum
    return background / background.std()
