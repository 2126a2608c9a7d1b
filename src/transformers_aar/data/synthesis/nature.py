"""Weather, water and fire."""

import numpy as np
from scipy.signal import sosfilt

from .blocks import (
    RATE,
    band_noise,
    decaying_modes,
    drift,
    fades,
    log_uniform,
    mix_events,
    mix_grains,
    repeated_onsets,
    resonators,
    seconds,
)


def rain(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Steady hiss of distant drops and short high pings of near ones."""
    hiss = band_noise(rng, num_samples, rng.uniform(1200, 2500), rng.uniform(8500, 11000), order=1)
    drops = np.zeros(num_samples)
    for frequency in rng.uniform(3500, 9000, 4):
        onsets = rng.integers(0, num_samples, int(rng.uniform(10, 50) * num_samples / RATE))
        ping = decaying_modes(512, np.array([frequency]), np.array([0.002]), np.array([1.0]))
        drops += mix_grains(rng, num_samples, onsets, ping)
    return hiss * drift(rng, num_samples, 2, 0.85, 1.0) + rng.uniform(1.5, 4.0) * drops


def wind(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Gusts: a whistle that wanders between noise resonances, over a low rush, all swelling and fading."""
    air = band_noise(rng, num_samples, 60, rng.uniform(500, 800), order=1)
    wind = rng.uniform(0.2, 0.5) * air
    resonances = log_uniform(rng, 260, 400) * 1.3 ** np.arange(5)
    position = drift(rng, num_samples, 2.5, 0, len(resonances) - 1)
    for index, frequency in enumerate(resonances):
        whistle = sosfilt(resonators([frequency], [0.08 * frequency]), air)
        wind += whistle / whistle.std() * np.exp(-((position - index) ** 2))
    return wind * drift(rng, num_samples, 2.0, 0.3, 1.0)


def thunder(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Rolling: low noise in overlapping surges, the nearest of which begin with a crack."""
    rumble = band_noise(rng, num_samples, 25, rng.uniform(90, 160))
    surges = np.full(num_samples, 0.15)
    cracks = np.zeros(num_samples)
    for onset in repeated_onsets(rng, num_samples, rng.uniform(0.3, 0.6), 0.9):
        time = seconds(num_samples - onset)
        level = rng.uniform(0.2, 1.0)
        surges[onset:] += level * np.exp(-time / rng.uniform(0.3, 0.9)) * (1 - np.exp(-time / 0.03))
        cracks[onset:] += (level > 0.75) * np.exp(-time / 0.12)
    crack = band_noise(rng, num_samples, 80, 3500, order=1) * cracks * drift(rng, num_samples, 30, 0, 1)
    return rumble * surges + rng.uniform(0.2, 0.5) * crack


def waves(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Surf: every wave swells slowly, breaks with a bright crash, and runs back hissing."""
    period = rng.uniform(2.0, 4.0)
    cycle = (seconds(num_samples) / period * drift(rng, num_samples, 0.3, 0.9, 1.1) + rng.uniform()) % 1
    breaking = rng.uniform(0.4, 0.6)
    swell = np.where(cycle < breaking, (cycle / breaking) ** 2.5, ((1 - cycle) / (1 - breaking)) ** 3)
    roar = band_noise(rng, num_samples, 80, 900, order=1)
    foam = band_noise(rng, num_samples, 1200, 9000, order=1)
    hiss = np.where(cycle < breaking, swell**2, swell**0.5)
    return roar * (0.25 + 0.75 * swell) + rng.uniform(0.5, 0.9) * foam * (0.05 + 0.95 * hiss)


def fire(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Crackling: snaps of very different strength over a low, fluttering roar."""
    roar = band_noise(rng, num_samples, 40, rng.uniform(200, 400), order=1) * drift(rng, num_samples, 8, 0.5, 1.0)
    density = log_uniform(rng, 15, 50)
    length = int(0.02 * RATE)
    snaps = [
        band_noise(rng, length, low, 2.5 * low, order=1) * np.exp(-seconds(length) / rng.uniform(0.0008, 0.004))
        for low in log_uniform(rng, 700, 4000, 6)
    ]
    onsets = rng.integers(0, num_samples, int(density * num_samples / RATE))
    crackle = mix_events(num_samples, onsets, lambda: rng.lognormal(-0.5, 0.7) * snaps[rng.integers(len(snaps))])
    return rng.uniform(0.15, 0.35) * roar + crackle


def stream(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Gurgling: bubbles, each a decaying tone that rises (K. van den Doel, "Physically based models for liquid
    sounds", 2005), low ones rare and loud, over a faint wash."""
    length = int(0.1 * RATE)
    time = seconds(length)
    bubbles = []
    for frequency in log_uniform(rng, 400, 3500, 24):
        decay = 25 / frequency
        phase = 2 * np.pi * frequency * (time + rng.uniform(0.2, 1.0) / decay * time**2 / 2)
        bubbles.append(np.sin(phase) * np.exp(-time / decay) * (700 / frequency) ** 0.5 * fades(length, 0.001, 0.01))
    onsets = rng.integers(0, num_samples, int(log_uniform(rng, 60, 140) * num_samples / RATE))
    gurgle = mix_events(num_samples, onsets, lambda: rng.uniform(0.1, 1) ** 2 * bubbles[rng.integers(len(bubbles))])
    wash = band_noise(rng, num_samples, 600, 5000, order=1) * drift(rng, num_samples, 2, 0.7, 1.0)
    return gurgle + rng.uniform(0.02, 0.06) * wash
