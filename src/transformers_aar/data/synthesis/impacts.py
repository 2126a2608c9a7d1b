"""Things that hit each other: drums, wood, metal, glass, shoes and powder."""

import numpy as np

from .blocks import (
    RATE,
    band_noise,
    chain_events,
    decaying_modes,
    drift,
    fades,
    log_uniform,
    mix_events,
    mix_grains,
    repeated_onsets,
    seconds,
    with_pause,
)

# Modes of an ideal circular membrane relative to the lowest: ratios of zeros of Bessel functions.
MEMBRANE_RATIOS = np.array([1.0, 1.59, 2.14, 2.3, 2.65, 2.92])


def drum(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Beats on two drums: membrane modes, a lowest mode whose pitch drops after the stroke, and the stick's click."""
    tunings = log_uniform(rng, 60, 150) * np.array([1.0, rng.uniform(1.3, 2.0)])
    decay = rng.uniform(0.06, 0.14)
    hit_length = int(0.4 * RATE)
    time = seconds(hit_length)
    click = rng.uniform(0.05, 0.25) * band_noise(rng, hit_length, 400, 5000) * np.exp(-time / 0.008)
    fade = fades(hit_length, 0.001, 0.1)

    def hit() -> np.ndarray:
        fundamental = rng.choice(tunings)
        glide = fundamental * (1 + 0.8 * np.exp(-time / 0.025))
        body = np.sin(2 * np.pi * np.cumsum(glide) / RATE) * np.exp(-time / decay)
        overtones = decaying_modes(
            hit_length, fundamental * MEMBRANE_RATIOS, decay / MEMBRANE_RATIOS, 0.4 / MEMBRANE_RATIOS
        )
        return rng.uniform(0.6, 1.0) * fade * (body + overtones + click)

    return mix_events(num_samples, repeated_onsets(rng, num_samples, log_uniform(rng, 0.16, 0.4), 0.08), hit)


def knock(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Knuckles on a door: groups of strokes that excite the panel's short modes."""
    length = int(0.15 * RATE)
    modes = log_uniform(rng, 110, 220) * np.array([1.0, 1.6, 2.3, 3.4, 4.9, 7.1]) * rng.uniform(0.95, 1.05, 6)
    decays = rng.uniform(0.012, 0.03) / np.arange(1, 7) ** 0.4
    rap = decaying_modes(length, modes, decays, np.array([1, 0.8, 0.7, 0.5, 0.35, 0.2]))
    rap += 0.4 * band_noise(rng, length, 500, 3000) * np.exp(-seconds(length) / 0.003)
    interval = rng.uniform(0.15, 0.24)

    def group() -> np.ndarray:
        strokes = np.arange(rng.integers(3, 6)) * interval * RATE
        raps = mix_grains(rng, int(strokes[-1]) + length, strokes.astype(int), rap)
        return with_pause(raps, rng.uniform(0.15, 0.4))

    return chain_events(rng, num_samples, group)


def hammer(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Blows on a nail: a ring of steel, higher with every blow, and the thump of the wood below."""
    length = int(0.3 * RATE)
    time = seconds(length)
    steel = log_uniform(rng, 1800, 3000) * np.array([1.0, 1.52, 2.13, 2.9, 3.4])
    decays = rng.uniform(0.03, 0.07, 5)
    amplitudes = rng.uniform(0.3, 1.0, 5)
    wood = band_noise(rng, length, 120, 600) * np.exp(-time / 0.02)
    click = band_noise(rng, length, 1500, 9000) * np.exp(-time / 0.003)

    def blow() -> np.ndarray:
        ring = decaying_modes(length, steel * rng.uniform(0.97, 1.03), decays, amplitudes)
        return rng.uniform(0.7, 1.0) * (0.5 * ring + 0.8 * wood + click)

    return mix_events(num_samples, repeated_onsets(rng, num_samples, rng.uniform(0.3, 0.55), 0.1), blow)


def footsteps(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Walking: the heel's thud, then the sole, which grinds on gravel or taps on a floor."""
    gravel = rng.uniform()
    length = int(0.3 * RATE)
    time = seconds(length)
    roll = rng.uniform(0.07, 0.12)

    def step() -> np.ndarray:
        heel = band_noise(rng, length, 70, 350) * np.exp(-time / 0.018)
        tap = (1 - gravel) * band_noise(rng, length, 800, 3500) * np.exp(-time / 0.008)
        grinding = np.exp(-((time - roll) ** 2) / 0.0015) * drift(rng, length, 120, 0, 1) ** 3
        grit = gravel * band_noise(rng, length, 1500, 8000, order=1) * grinding
        sole = 0.3 * band_noise(rng, length, 200, 1500) * np.exp(-np.abs(time - roll) / 0.012)
        return heel + 0.6 * tap + grit + sole

    steps = [step() for _ in range(6)]
    onsets = repeated_onsets(rng, num_samples, rng.uniform(0.4, 0.6), 0.08)
    return mix_events(num_samples, onsets, lambda: rng.uniform(0.7, 1.0) * steps[rng.integers(len(steps))])


def shatter(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Breaking glass: a burst, then shards that ring high and inharmonically as they fall, fewer and fewer."""

    def shard() -> np.ndarray:
        frequencies = log_uniform(rng, 2500, 10_500, 3)
        return decaying_modes(int(0.12 * RATE), frequencies, rng.uniform(0.01, 0.04, 3), rng.uniform(0.3, 1, 3))

    shards = [shard() for _ in range(24)]

    def crash() -> np.ndarray:
        length = int(rng.uniform(0.9, 1.3) * RATE)
        times = rng.exponential(0.22, rng.integers(50, 110))
        onsets = (times * RATE).astype(int)
        tinkling = mix_events(
            length, onsets[onsets < length], lambda: rng.uniform(0.1, 1) * shards[rng.integers(len(shards))]
        )
        burst = band_noise(rng, length, 1500, 9000, order=1) * np.exp(-seconds(length) / 0.04)
        return (tinkling + 1.5 * burst) * fades(length, 0.001, 0.1)

    return chain_events(rng, num_samples, crash)


def gunshot(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Single shots: a crack of some milliseconds, the blast of the muzzle, and an echo of the surroundings."""
    length = int(0.5 * RATE)
    time = seconds(length)
    blast_s = rng.uniform(0.015, 0.04)
    tail_s = rng.uniform(0.08, 0.2)
    body_hz = rng.uniform(400, 900)

    def shot() -> np.ndarray:
        crack = 2 * band_noise(rng, length, 1000, 10_000, order=1) * np.exp(-time / 0.004)
        blast = band_noise(rng, length, 60, body_hz, order=1) * np.exp(-time / blast_s)
        tail = 0.25 * band_noise(rng, length, 150, 2500, order=1) * np.exp(-time / tail_s)
        return (crack + 1.5 * blast + tail) * fades(length, 0.0005, 0.1)

    shots = [shot() for _ in range(4)]
    onsets = repeated_onsets(rng, num_samples, rng.uniform(0.35, 0.7), 0.2)
    return mix_events(num_samples, onsets, lambda: rng.uniform(0.7, 1.0) * shots[rng.integers(len(shots))])


def tick_tock(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A clock: two alternating clicks in strict time."""
    length = int(0.15 * RATE)
    frequencies = log_uniform(rng, 1500, 4500, 5)
    decays = rng.uniform(0.006, 0.025, 5)
    tick = decaying_modes(length, frequencies, decays, rng.uniform(0.3, 1, 5))
    tock = 0.8 * decaying_modes(length, frequencies * rng.uniform(0.7, 0.85), 1.5 * decays, rng.uniform(0.3, 1, 5))
    interval = rng.choice([0.2, 0.25, 0.5]) * rng.uniform(0.95, 1.05)
    pause = interval - length / RATE
    pair = np.concatenate([with_pause(tick, pause), with_pause(tock, pause)])
    return chain_events(rng, num_samples, lambda: pair)
