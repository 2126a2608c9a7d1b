"""Procedural sounds of AudioSet classes, for tests and for training small models without any recordings. Each kind is
a small physical or acoustic model (modal sums, plucked strings, formants, grains, frequency modulation, filtered
noise) whose pitch, tempo, timbre, level and start are drawn from a seed."""

import difflib
import math
from collections.abc import Callable

import numpy as np
from scipy.signal import lfilter, resample_poly

from . import alarms, animals, impacts, machines, music, nature, voices
from .blocks import RATE

# Rendered and thrown away, so that a clip may begin in the middle of an event.
LEAD_IN = RATE // 2

# A kind's position seeds its sounds, so new kinds go to the end.
SYNTHESIZERS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "Applause": voices.applause,
    "Bell": alarms.bell,
    "Bird": animals.bird,
    "Dog": animals.dog,
    "Drum": impacts.drum,
    "Engine": machines.engine,
    "Plucked string instrument": music.plucked_string,
    "Rain": nature.rain,
    "Siren": alarms.siren,
    "Smoke detector, smoke alarm": alarms.smoke_alarm,
    "Speech": voices.speech,
    "Wind": nature.wind,
    "Piano": music.piano,
    "Organ": music.organ,
    "Flute": music.flute,
    "Violin, fiddle": music.violin,
    "Trumpet": music.trumpet,
    "Synthesizer": music.synthesizer,
    "Marimba, xylophone": music.marimba,
    "Singing": voices.singing,
    "Whistling": voices.whistling,
    "Laughter": voices.laughter,
    "Baby cry, infant cry": voices.baby_cry,
    "Cat": animals.cat,
    "Cattle, bovinae": animals.cattle,
    "Crowing, cock-a-doodle-doo": animals.rooster,
    "Frog": animals.frog,
    "Cricket": animals.cricket,
    "Bee, wasp, etc.": animals.bee,
    "Crow": animals.crow,
    "Motorcycle": machines.motorcycle,
    "Helicopter": machines.helicopter,
    "Vacuum cleaner": machines.vacuum_cleaner,
    "Sewing machine": machines.sewing_machine,
    "Typewriter": machines.typewriter,
    "Train": machines.train,
    "Thunder": nature.thunder,
    "Waves, surf": nature.waves,
    "Fire": nature.fire,
    "Stream": nature.stream,
    "Alarm clock": alarms.alarm_clock,
    "Telephone bell ringing": alarms.telephone,
    "Vehicle horn, car horn, honking": alarms.car_horn,
    "Telephone dialing, DTMF": alarms.dialling,
    "Knock": impacts.knock,
    "Hammer": impacts.hammer,
    "Walk, footsteps": impacts.footsteps,
    "Shatter": impacts.shatter,
    "Gunshot, gunfire": impacts.gunshot,
    "Tick-tock": impacts.tick_tock,
}

SOUND_KINDS: tuple[str, ...] = tuple(SYNTHESIZERS)
"""Display names of the AudioSet classes that can be synthesised; a name's position is its label id."""


def _record(rng: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """What a recording adds: early reflections, the microphone's spectral tilt and a faint noise floor."""
    reflected = sound.copy()
    for delay in (rng.uniform(0.002, 0.03, 6) * RATE).astype(int):
        reflected[delay:] += rng.uniform(-0.12, 0.12) * sound[:-delay]
    sound = lfilter([1.0, rng.uniform(-0.25, 0.25)], [1.0], reflected)[LEAD_IN:]
    floor = 10 ** (rng.uniform(-66, -58) / 20) * rng.standard_normal(len(sound))
    return sound / np.max(np.abs(sound)) + floor


def synthesize(kind: str, seed: int, duration_s: float = 1.0, sampling_rate: int = 24_000) -> np.ndarray:
    """
    Synthesises one sound. A kind and a seed name the same sound everywhere (but for the last bits of the platform's
    elementary functions), independent of NumPy's global random state.

    Args:
        kind: one of `SOUND_KINDS`.
        seed: non-negative integer.
        duration_s: length in seconds; another length is another sound, of the same kind.
        sampling_rate: in Hz; the sound is made at 24 kHz and resampled.

    Returns:
        `np.ndarray` of dtype float32 and shape `(round(duration_s * sampling_rate),)`, with a peak of 0.4 to 0.9.

    Raises:
        ValueError: if the kind is unknown, the seed negative, or the duration shorter than half a second.
    """
    if kind not in SYNTHESIZERS:
        nearest = difflib.get_close_matches(kind, SOUND_KINDS, n=3, cutoff=0.0)
        raise ValueError(f"There is no sound kind {kind!r}; the nearest are {'; '.join(nearest)}.")
    if seed < 0:
        raise ValueError(f"The seed must be a non-negative integer, but is {seed}.")
    # Shorter clips could fall between two events.
    if not duration_s >= 0.5:
        raise ValueError(f"The duration must be at least 0.5 seconds, but is {duration_s}.")
    rng = np.random.Generator(np.random.PCG64([SOUND_KINDS.index(kind), seed]))
    num_samples = LEAD_IN + math.ceil(duration_s * RATE)
    sound = _record(rng, SYNTHESIZERS[kind](rng, num_samples))
    if sampling_rate != RATE:
        sound = resample_poly(sound, sampling_rate, RATE)
    sound = sound[: round(duration_s * sampling_rate)]
    return (sound * rng.uniform(0.4, 0.9) / np.max(np.abs(sound))).astype(np.float32)
