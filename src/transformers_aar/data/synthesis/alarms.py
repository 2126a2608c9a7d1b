"""Sirens, beepers, bells and horns."""

import numpy as np

from .blocks import (
    RATE,
    buzz,
    chain_events,
    decaying_modes,
    fades,
    log_uniform,
    mix_events,
    repeated_onsets,
    running_phase,
    seconds,
    steady_modes,
    with_pause,
)

# Partials of a tuned church bell relative to its prime: hum, prime, tierce, quint, nominal and the next five.
BELL_RATIOS = np.array([0.5, 1.0, 1.2, 1.5, 2.0, 2.5, 2.67, 3.0, 4.0, 5.33])


def siren(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Electronic wail to yelp: a horn tone that glides up and down without a pause."""
    cycle = (seconds(num_samples) * log_uniform(rng, 0.8, 4.5) + rng.uniform()) % 1
    rise = rng.uniform(0.35, 0.75)
    glide = 0.5 - 0.5 * np.cos(np.pi * np.where(cycle < rise, cycle / rise, (1 - cycle) / (1 - rise)))
    frequency = log_uniform(rng, 450, 750) * rng.uniform(1.9, 2.8) ** glide
    tone = buzz(running_phase(rng, frequency), frequency, rng.uniform(500, 1200))
    return tone / np.exp(-frequency / 900)


def smoke_alarm(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Piezo beeps near 3 kHz, gated on and off."""
    frequency = rng.uniform(2800, 3600)
    period = log_uniform(rng, 0.18, 0.6)
    beep_length = int(period * rng.uniform(0.45, 0.7) * RATE)
    overtone = rng.uniform(0.1, 0.35)
    phase = 2 * np.pi * frequency * seconds(beep_length)
    beep = (np.sin(phase) + overtone * np.sin(3 * phase)) * fades(beep_length, 0.004, 0.006)
    return mix_events(num_samples, repeated_onsets(rng, num_samples, period, 0.0), lambda: beep)


def bell(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Strokes on a bell: inharmonic modes, each with a slightly detuned twin that beats with it."""
    prime = log_uniform(rng, 400, 900)
    ratios = BELL_RATIOS * rng.uniform(0.99, 1.01, len(BELL_RATIOS))
    frequencies = prime * np.concatenate([ratios, ratios * rng.uniform(1.001, 1.004, len(ratios))])
    decays = rng.uniform(0.7, 1.8) / np.tile(BELL_RATIOS, 2) ** 0.7
    amplitudes = np.tile(rng.uniform(0.3, 1.0, len(ratios)) / BELL_RATIOS**0.3, 2)
    stroke_length = int(1.5 * RATE)

    def stroke() -> np.ndarray:
        return rng.uniform(0.7, 1.0) * decaying_modes(stroke_length, frequencies, decays, amplitudes) * attack

    attack = fades(stroke_length, 0.002, 0.3)
    return mix_events(num_samples, repeated_onsets(rng, num_samples, rng.uniform(0.5, 0.7), 0.1), stroke)


def alarm_clock(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Digital: groups of four quick beeps of a square wave."""
    pitch = log_uniform(rng, 900, 2000)
    length = int(rng.uniform(0.05, 0.09) * RATE)
    odd = np.arange(1, 0.45 * RATE / pitch, 2)
    beep = steady_modes(length, pitch * odd, 1 / odd) * fades(length, 0.002, 0.003)
    group = with_pause(np.tile(with_pause(beep, rng.uniform(0.04, 0.07)), 4), rng.uniform(0.25, 0.45))
    return chain_events(rng, num_samples, lambda: group)


def telephone(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A clapper that runs between two small bells, ringing and pausing."""
    pitch = log_uniform(rng, 900, 1500)
    length = int(0.5 * RATE)
    ratios = np.array([1.0, 2.72, 4.9])
    gongs = [
        decaying_modes(length, tuned * ratios, np.array([0.22, 0.12, 0.05]), np.array([1.0, 0.5, 0.3]))
        for tuned in (pitch, pitch * rng.uniform(1.15, 1.35))
    ]
    interval = 1 / rng.uniform(20, 28)

    def ring() -> np.ndarray:
        strokes = np.arange(0, rng.uniform(0.8, 1.6), interval) * RATE
        sounding = int(strokes[-1]) + length
        position = 0

        def stroke() -> np.ndarray:
            nonlocal position
            position += 1
            return rng.uniform(0.8, 1.0) * gongs[position % 2]

        return mix_events(sounding, strokes.astype(int), stroke)

    return chain_events(rng, num_samples, ring)


def car_horn(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Honks of two reedy horns about a third apart."""
    pitches = log_uniform(rng, 330, 460) * np.array([1.0, rng.uniform(1.18, 1.27)])
    brightness = rng.uniform(1800, 3000)

    def honk() -> np.ndarray:
        length = int(rng.choice([0.15, 0.3, 0.8]) * rng.uniform(0.8, 1.3) * RATE)
        scoop = 1 - 0.04 * np.exp(-seconds(length) / 0.015)
        horns = sum(buzz(running_phase(rng, pitch * scoop), pitch * scoop, brightness) for pitch in pitches)
        return with_pause(horns * fades(length, 0.015, 0.03), rng.uniform(0.06, 0.3))

    return chain_events(rng, num_samples, honk)


def dialling(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Keys of a telephone, each of which sounds one of four low and one of three high tones (ITU-T Q.23)."""
    length = int(rng.uniform(0.08, 0.16) * RATE)
    pause = rng.uniform(0.05, 0.12)

    def key() -> np.ndarray:
        tones = np.array([rng.choice([697, 770, 852, 941]), rng.choice([1209, 1336, 1477])])
        return with_pause(steady_modes(length, tones, np.array([0.8, 1.0])) * fades(length, 0.003, 0.003), pause)

    return chain_events(rng, num_samples, key)
