"""Building blocks of procedural sounds: oscillators, resonators, noises, curves, and events in time, all at 24 kHz."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import uniform_filter1d
from scipy.signal import butter, sosfilt

RATE = 24_000
PENTATONIC = np.array([0, 2, 4, 7, 9, 12])


def log_uniform(rng: np.random.Generator, low: float, high: float, size: int | None = None):
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def seconds(num_samples: int) -> np.ndarray:
    return np.arange(num_samples) / RATE


def drift(rng: np.random.Generator, num_samples: int, rate_hz: float, low: float, high: float) -> np.ndarray:
    """Smooth random curve between `low` and `high` that turns about `rate_hz` times per second."""
    num_knots = int(num_samples / RATE * rate_hz) + 3
    knots = (np.arange(num_knots) - rng.uniform()) / rate_hz
    return PchipInterpolator(knots, rng.uniform(low, high, num_knots))(seconds(num_samples))


def running_phase(rng: np.random.Generator, frequency: np.ndarray) -> np.ndarray:
    """Phase in radians of an oscillator with the momentary `frequency` in Hz."""
    return 2 * np.pi * (np.cumsum(frequency) / RATE + rng.uniform())


def buzz(phase: np.ndarray, frequency: np.ndarray, brightness_hz: float) -> np.ndarray:
    """All harmonics of `phase`, falling as exp(-f / brightness_hz): the closed form of sum_k a^k sin(k phase)
    (J. A. Moorer, "The synthesis of complex audio spectra by means of discrete summation formulas", 1976)."""
    a = np.exp(-frequency / brightness_hz)
    return a * np.sin(phase) / (1 - 2 * a * np.cos(phase) + a * a)


def decaying_modes(
    num_samples: int, frequencies: np.ndarray, decays_s: np.ndarray, amplitudes: np.ndarray
) -> np.ndarray:
    """Sum of exponentially decaying sines; `decays_s` are the times in which an amplitude falls to 1/e."""
    block = 256
    poles = (2j * np.pi * frequencies - 1 / decays_s) / RATE
    # exp(p (256 m + r)) = exp(256 p m) exp(p r) turns the sum over modes into one small matrix product.
    coarse = np.exp(np.arange(-(-num_samples // block))[:, None] * block * poles)
    fine = amplitudes[:, None] * np.exp(poles[:, None] * np.arange(block))
    return (coarse @ fine).imag.ravel()[:num_samples]


@lru_cache(maxsize=128)  # designing a filter takes longer than filtering a short event
def _band_pass(order: int, low_hz: float, high_hz: float) -> np.ndarray:
    return butter(order, (low_hz, high_hz), "bandpass", fs=RATE, output="sos")


def band_noise(
    rng: np.random.Generator, num_samples: int, low_hz: float, high_hz: float, order: int = 2
) -> np.ndarray:
    """Band-limited noise of unit standard deviation."""
    noise = sosfilt(_band_pass(order, low_hz, high_hz), rng.standard_normal(num_samples))
    return noise / (noise.std() + 1e-9)


def resonators(frequencies: Sequence[float], bandwidths: Sequence[float]) -> np.ndarray:
    """Cascade of two-pole resonators with unit gain at 0 Hz (Klatt 1980, eq. 2) as second-order sections."""
    radius = np.exp(-np.pi * np.asarray(bandwidths) / RATE)
    a1 = -2 * radius * np.cos(2 * np.pi * np.asarray(frequencies) / RATE)
    a2 = radius**2
    zero, one = np.zeros_like(a1), np.ones_like(a1)
    return np.stack([one + a1 + a2, zero, zero, one, a1, a2], axis=-1)


def fades(num_samples: int, attack_s: float, release_s: float) -> np.ndarray:
    """Raised-cosine attack and release around a flat top."""
    time = seconds(num_samples)
    rise = np.clip(time / attack_s, 0, 1)
    fall = np.clip((num_samples / RATE - time) / release_s, 0, 1)
    return (0.5 - 0.5 * np.cos(np.pi * rise)) * (0.5 - 0.5 * np.cos(np.pi * fall))


def repeated_onsets(rng: np.random.Generator, num_samples: int, period_s: float, jitter: float) -> np.ndarray:
    """Sample indices of repeated events whose spacing varies by up to `jitter` of the period."""
    times = np.arange(rng.uniform(), num_samples / RATE / period_s)
    times = (times + rng.uniform(0, jitter, len(times))) * period_s * RATE
    return times.astype(int)[times < num_samples]


def mix_events(num_samples: int, onsets: np.ndarray, make_event: Callable[[], np.ndarray]) -> np.ndarray:
    """Mixes a fresh event into silence at every onset."""
    track = np.zeros(num_samples)
    for onset in onsets:
        event = make_event()[: num_samples - onset]
        track[onset : onset + len(event)] += event
    return track


def mix_grains(rng: np.random.Generator, num_samples: int, onsets: np.ndarray, grain: np.ndarray) -> np.ndarray:
    """Mixes one grain into silence at every onset, each time with another level."""
    return mix_events(num_samples, onsets, lambda: rng.uniform(0.4, 1.0) * grain)


def chain_events(rng: np.random.Generator, num_samples: int, make_event: Callable[[], np.ndarray]) -> np.ndarray:
    """Events end to end, pauses being part of them, from a random moment of the first one on."""
    events = [make_event()]
    skipped = rng.integers(len(events[0]))
    length = len(events[0]) - skipped
    while length < num_samples:
        events.append(make_event())
        length += len(events[-1])
    return np.concatenate(events)[skipped : skipped + num_samples]


def with_pause(event: np.ndarray, pause_s: float) -> np.ndarray:
    return np.concatenate([event, np.zeros(int(pause_s * RATE))])


def contour(num_samples: int, *points: float) -> np.ndarray:
    """Smooth curve through positive values at equal distances, on a logarithmic scale."""
    curve = PchipInterpolator(np.linspace(0, 1, len(points)), np.log(points))
    return np.exp(curve(np.linspace(0, 1, num_samples)))


def steady_modes(num_samples: int, frequencies: np.ndarray, amplitudes: np.ndarray) -> np.ndarray:
    """Sum of sines that don't decay."""
    return decaying_modes(num_samples, frequencies, np.full(len(frequencies), np.inf), amplitudes)


def additive(phase: np.ndarray, amplitudes: Sequence[float]) -> np.ndarray:
    """Harmonics of `phase` with the given amplitudes, by Horner's rule on exp(i phase)."""
    rotation = np.exp(1j * phase)
    total = np.zeros_like(rotation)
    for amplitude in reversed(amplitudes):
        total = (total + amplitude) * rotation
    return total.imag


def melody(
    rng: np.random.Generator, num_samples: int, scale: np.ndarray, note_s: tuple[float, float], glide_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """
    A random melody over the pitches `scale` in Hz, notes lasting between `note_s` seconds and gliding into each other.

    Returns:
        The momentary frequency in Hz, and the sample indices at which notes begin.
    """
    lengths = (rng.uniform(*note_s, int(num_samples / RATE / note_s[0]) + 2) * RATE).astype(int)
    starts = np.cumsum(lengths) - lengths - rng.integers(lengths[0])
    steps = rng.choice([-2, -1, -1, 1, 1, 2], len(starts))
    # a walk that is reflected at both ends of the scale
    walk = np.abs((rng.integers(len(scale)) + np.cumsum(steps)) % (2 * len(scale) - 2))
    pitches = np.log(scale)[np.minimum(walk, 2 * len(scale) - 2 - walk)]
    note = np.searchsorted(starts, np.arange(num_samples), side="right") - 1
    frequency = np.exp(uniform_filter1d(pitches[note], int(glide_s * RATE), mode="nearest"))
    return frequency, starts[(starts >= 0) & (starts < num_samples)]


def vibrato(rng: np.random.Generator, num_samples: int, depth: float) -> np.ndarray:
    """Factor on a frequency that sways by the share `depth`, 4.5 to 6.5 times per second."""
    rate = rng.uniform(4.5, 6.5) * drift(rng, num_samples, 1, 0.95, 1.05)
    return 1 + depth * np.sin(running_phase(rng, rate))


def articulation(num_samples: int, onsets: np.ndarray, attack_s: float, depth: float) -> np.ndarray:
    """Envelope of a line of notes: falls by the share `depth` at every onset and rises again in `attack_s`."""
    length = int(attack_s * RATE)
    dip = mix_events(num_samples, onsets, lambda: np.linspace(1, 0, length) ** 2)
    return 1 - depth * uniform_filter1d(np.minimum(dip, 1), length // 4)


def vocal_tract(source: np.ndarray, formants: Sequence[float], bandwidths: Sequence[float]) -> np.ndarray:
    """A voice source through formant resonators, at unit standard deviation."""
    voice = sosfilt(resonators(formants, bandwidths), source)
    return voice / (voice.std() + 1e-9)


def moving_vocal_tract(source: np.ndarray, *shapes: Sequence[float]) -> np.ndarray:
    """A voice source through a tract that passes at an even pace through `shapes`, each of 3 or 4 formants in Hz."""
    position = np.linspace(0, len(shapes) - 1, len(source))
    voice = np.zeros_like(source)
    for index, formants in enumerate(shapes):
        weight = np.clip(1 - np.abs(position - index), 0, 1)
        voice += weight * vocal_tract(source, formants, [80, 110, 160, 250][: len(formants)])
    return voice


def roughness(rng: np.random.Generator, num_samples: int, depth: float) -> np.ndarray:
    """Factor on a sound that flutters irregularly, as in a hoarse voice."""
    return 1 + depth * band_noise(rng, num_samples, 30, 120, order=1)
