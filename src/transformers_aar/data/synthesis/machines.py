"""Engines, vehicles and household machines."""

import numpy as np
from scipy.signal import sosfilt

from .blocks import (
    RATE,
    additive,
    band_noise,
    buzz,
    chain_events,
    contour,
    decaying_modes,
    drift,
    fades,
    log_uniform,
    mix_events,
    mix_grains,
    repeated_onsets,
    resonators,
    running_phase,
    seconds,
)


def engine(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Combustion engine: firing pulses with uneven cylinders, the exhaust's resonances, and noise at each firing."""
    firing = log_uniform(rng, 28, 85) * drift(rng, num_samples, 1.5, 0.93, 1.07)
    phase = running_phase(rng, firing)
    unevenness = 1 + rng.uniform(0.1, 0.3) * np.sin(phase / 2) + rng.uniform(0.05, 0.2) * np.sin(phase / 4)
    pulses = buzz(phase, firing, rng.uniform(350, 700)) * unevenness
    exhaust = resonators([rng.uniform(110, 220), rng.uniform(350, 700)], [120, 300])
    rumble = sosfilt(exhaust, pulses)
    hiss = band_noise(rng, num_samples, 300, 2500, order=1) * (0.5 + 0.5 * np.cos(phase)) ** 3
    return rumble / rumble.std() + rng.uniform(0.08, 0.25) * hiss


def motorcycle(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Revving: two uneven cylinders run up and down, and the exhaust opens as they do."""
    idle = log_uniform(rng, 32, 50)

    def rev() -> np.ndarray:
        top = rng.uniform(2.5, 4.5)
        return idle * contour(int(rng.uniform(0.7, 1.8) * RATE), 1.0, 0.8 * top, top, 0.7 * top, 1.3, 1.0)

    firing = chain_events(rng, num_samples, rev)
    phase = running_phase(rng, firing)
    pulses = buzz(phase, firing, 500 + 8 * firing) * (1 + rng.uniform(0.4, 0.7) * np.sin(phase / 2))
    hiss = band_noise(rng, num_samples, 500, 5000, order=1) * (0.5 + 0.5 * np.cos(phase)) ** 4
    exhaust = pulses + 0.4 * sosfilt(resonators([rng.uniform(250, 400)], [200]), pulses)
    return exhaust / exhaust.std() * (firing / idle) ** 0.4 + rng.uniform(0.1, 0.3) * hiss


def helicopter(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Rotor blades that slap the air ten to twenty times a second, over the rush and whine of a turbine."""
    rate = log_uniform(rng, 9, 18) * drift(rng, num_samples, 0.7, 0.97, 1.03)
    phase = running_phase(rng, rate)
    slap = np.exp(rng.uniform(4, 9) * (np.cos(phase) - 1))
    thump = band_noise(rng, num_samples, 40, 220) * slap
    swish = band_noise(rng, num_samples, 250, 2500, order=1) * np.exp(3 * (np.cos(phase - 0.7) - 1))
    turbine = rng.uniform(1500, 3500) * drift(rng, num_samples, 0.7, 0.98, 1.02)
    whine = np.sin(running_phase(rng, turbine)) + band_noise(rng, num_samples, 2000, 6000, order=1)
    return thump + rng.uniform(0.2, 0.45) * swish + rng.uniform(0.01, 0.04) * whine


def vacuum_cleaner(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A steady rush of air with the whine of the motor and its fan on top."""
    speed = log_uniform(rng, 240, 420) * drift(rng, num_samples, 0.5, 0.985, 1.015)
    phase = running_phase(rng, speed)
    blades = rng.integers(7, 12)
    whine = additive(phase, rng.uniform(0.1, 0.8, 14)) + rng.uniform(0.5, 1.0) * np.sin(blades * phase)
    air = band_noise(rng, num_samples, 250, rng.uniform(4000, 7000), order=1)
    hose = sosfilt(resonators([rng.uniform(450, 800)], [250]), air)
    return air + hose / hose.std() + rng.uniform(0.5, 1.2) * whine


def sewing_machine(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Stitches: two different clacks per turn of a humming motor, at a speed that the pedal changes."""
    rate = log_uniform(rng, 9, 16) * drift(rng, num_samples, 0.8, 0.8, 1.2)
    turns = running_phase(rng, rate) / (2 * np.pi)
    length = int(0.05 * RATE)
    track = np.zeros(num_samples)
    for offset, level in ((0.0, 1.0), (rng.uniform(0.35, 0.6), rng.uniform(0.4, 0.8))):
        modes = log_uniform(rng, 700, 5000, 6)
        clack = decaying_modes(length, modes, rng.uniform(0.003, 0.009, 6), rng.uniform(0.3, 1, 6))
        clack += band_noise(rng, length, 300, 6000, order=1) * np.exp(-seconds(length) / 0.004)
        onsets = np.flatnonzero(np.diff(np.floor(turns + offset)))
        track += level * mix_grains(rng, num_samples, onsets, clack)
    motor = 12 * rate
    hum = buzz(running_phase(rng, motor), motor, 700)
    return track + rng.uniform(0.1, 0.25) * hum


def typewriter(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Keys struck unevenly; now and then the bell, and the carriage pulled back over its ratchet."""
    length = int(0.06 * RATE)
    time = seconds(length)
    keys = []
    for _ in range(5):
        frequencies = log_uniform(rng, 1200, 6000, 8)
        metal = decaying_modes(length, frequencies, rng.uniform(0.003, 0.012, 8), rng.uniform(0.2, 1, 8))
        platen = band_noise(rng, length, 120, 500) * np.exp(-time / 0.012)
        keys.append(metal + 0.4 * platen + band_noise(rng, length, 2000, 10_000) * np.exp(-time / 0.002))
    period = rng.uniform(0.1, 0.17)
    bell_frequency = rng.uniform(2200, 3200)
    tick = 0.4 * keys[0][: int(0.012 * RATE)]

    def line() -> np.ndarray:
        typed = int(rng.uniform(1.5, 3.0) * RATE)
        onsets = repeated_onsets(rng, typed, period, 0.7)
        bell_sound = decaying_modes(
            int(0.5 * RATE), bell_frequency * np.array([1, 2.76]), np.array([0.25, 0.1]), np.array([0.7, 0.3])
        )
        carriage = np.tile(tick, rng.integers(18, 30))
        strokes = mix_events(typed, onsets, lambda: rng.uniform(0.4, 1) * keys[rng.integers(len(keys))])
        return np.concatenate([strokes, bell_sound, carriage * fades(len(carriage), 0.05, 0.02)])

    return chain_events(rng, num_samples, line)


def train(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Clickety-clack: four wheels of two bogies over every joint of the rails, above a rolling rumble."""
    period = rng.uniform(0.55, 1.0)
    wheels = np.array([0, 0.16, 0.5, 0.66]) * period
    length = int(0.16 * RATE)
    time = seconds(length)
    clack = 1.5 * band_noise(rng, length, 60, 250) * np.exp(-time / 0.03)
    clack += 0.6 * band_noise(rng, length, 400, 2500) * np.exp(-time / 0.012)
    clack += decaying_modes(length, log_uniform(rng, 500, 2500, 5), np.full(5, 0.025), np.full(5, 0.15))
    joints = np.arange(rng.uniform(-period, 0), num_samples / RATE, period)
    onsets = ((joints[:, None] + wheels) * RATE).astype(int).ravel()
    onsets = onsets[(onsets >= 0) & (onsets < num_samples)]
    rumble = band_noise(rng, num_samples, 40, 300, order=1) * drift(rng, num_samples, 2, 0.7, 1.0)
    hiss = band_noise(rng, num_samples, 500, 3000, order=1)
    return mix_grains(rng, num_samples, onsets, clack) + rng.uniform(0.15, 0.35) * rumble + 0.03 * hiss
