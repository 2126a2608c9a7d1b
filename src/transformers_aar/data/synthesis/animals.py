"""Animals: barks and other calls, songs, chirps and buzzing."""

import numpy as np
from scipy.signal import sosfilt

from .blocks import (
    RATE,
    band_noise,
    buzz,
    chain_events,
    contour,
    drift,
    fades,
    log_uniform,
    mix_events,
    mix_grains,
    moving_vocal_tract,
    repeated_onsets,
    resonators,
    roughness,
    running_phase,
    seconds,
    vocal_tract,
    with_pause,
)


def dog(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Barks: a rough voice whose pitch jumps up and falls, through the formants of an opening mouth."""
    pitch = log_uniform(rng, 280, 650)
    bark_length = int(rng.uniform(0.13, 0.22) * RATE)
    formants = np.array([650, 1300, 2500]) * rng.uniform(0.85, 1.35)
    mouth = resonators(formants, [160, 220, 350])
    hoarseness = rng.uniform(0.1, 0.3)
    brightness = rng.uniform(900, 1600)
    progress = np.linspace(0, 1, bark_length)
    contour = 0.65 + 0.9 * np.sqrt(progress) * (1 - progress) ** 0.8
    envelope = fades(bark_length, 0.012, 0.08)

    def bark() -> np.ndarray:
        frequency = pitch * rng.uniform(0.92, 1.08) * contour
        voice = buzz(running_phase(rng, frequency), frequency, brightness)
        breath = hoarseness * band_noise(rng, bark_length, 400, 5000)
        return rng.uniform(0.75, 1.0) * sosfilt(mouth, (voice + breath) * envelope) * envelope

    return mix_events(num_samples, repeated_onsets(rng, num_samples, rng.uniform(0.3, 0.5), 0.2), bark)


def bird(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Song: a motif of two or three whistled notes, each a quick sweep, repeated."""
    centre = log_uniform(rng, 2600, 4200)
    note_period = rng.uniform(0.08, 0.17)
    motif = [
        (centre * rng.uniform(0.85, 1.3), rng.choice([-1, 1]) * rng.uniform(0.25, 0.6), rng.uniform(0.5, 0.85))
        for _ in range(rng.integers(2, 4))
    ]
    overtone = rng.uniform(0.02, 0.12)
    position = rng.integers(len(motif))

    def chirp() -> np.ndarray:
        nonlocal position
        middle, sweep, fill = motif[position % len(motif)]
        position += 1
        progress = np.linspace(-0.5, 0.5, int(note_period * fill * RATE))
        phase = running_phase(rng, middle * np.exp2(sweep * progress - abs(sweep) * progress**2))
        return (np.sin(phase) + overtone * np.sin(2 * phase)) * np.cos(np.pi * progress) ** 1.5

    return mix_events(num_samples, repeated_onsets(rng, num_samples, note_period, 0.1), chirp)


def cat(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Meows: the pitch rises and falls in an arch while the mouth opens and closes."""
    pitch = log_uniform(rng, 420, 720)
    size = rng.uniform(0.9, 1.15)
    closed, open_, round_ = ([450, 2300, 3800], [1100, 1900, 3700], [550, 1050, 3300])

    def meow() -> np.ndarray:
        length = int(rng.uniform(0.45, 0.9) * RATE)
        frequency = pitch * rng.uniform(0.9, 1.1) * contour(length, 0.75, 1.1, 1.2, 1.0, rng.uniform(0.55, 0.75))
        voice = buzz(running_phase(rng, frequency), frequency, 2200)
        voice = moving_vocal_tract(voice, *(size * np.array(shape) for shape in (closed, open_, open_, round_)))
        return with_pause(voice * fades(length, 0.08, 0.2), rng.uniform(0.1, 0.35))

    return chain_events(rng, num_samples, meow)


def cattle(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Moos: a low, long voice behind closed lips that open, breaking a little in the middle."""
    pitch = log_uniform(rng, 85, 160)
    size = rng.uniform(0.85, 1.15)

    def moo() -> np.ndarray:
        length = int(rng.uniform(1.0, 1.9) * RATE)
        frequency = pitch * rng.uniform(0.95, 1.05) * contour(length, 0.8, 1.0, 1.2, 1.15, 0.75)
        voice = buzz(running_phase(rng, frequency), frequency, 1200) * roughness(rng, length, 0.3)
        voice += 0.2 * band_noise(rng, length, 300, 6000, order=1)
        shapes = ([200, 700, 1800], [300, 800, 2000], [480, 950, 2200], [350, 800, 2000])
        voice = moving_vocal_tract(voice, *(size * np.array(shape) for shape in shapes))
        return with_pause(voice * fades(length, 0.25, 0.3), rng.uniform(0.05, 0.3))

    return chain_events(rng, num_samples, moo)


def rooster(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Cock-a-doodle-doo: three short syllables and a long one that climbs and falls, all harsh."""
    pitch = log_uniform(rng, 520, 760)
    formants = np.array([1300, 2400, 3900]) * rng.uniform(0.9, 1.15)
    breath = rng.uniform(0.2, 0.5)
    syllables = ((0.16, (0.75, 0.95, 0.8)), (0.1, (0.9, 0.95)), (0.22, (1.0, 1.3, 1.05)), (0.75, (1.1, 1.4, 1.3, 0.6)))

    def syllable(duration_s: float, points: tuple[float, ...]) -> np.ndarray:
        length = int(duration_s * RATE)
        frequency = pitch * contour(length, *points)
        voice = buzz(running_phase(rng, frequency), frequency, 3000) * roughness(rng, length, 0.35)
        voice += breath * band_noise(rng, length, 1500, 10_000)
        return with_pause(vocal_tract(voice, formants, [200, 300, 500]) * fades(length, 0.02, 0.06), 0.03)

    def crow() -> np.ndarray:
        tempo = rng.uniform(0.85, 1.3)
        call = np.concatenate([syllable(tempo * duration_s, points) for duration_s, points in syllables])
        return with_pause(call, rng.uniform(0.2, 0.45))

    return chain_events(rng, num_samples, crow)


def frog(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Croaks: trains of slow pulses, each of which rings in the vocal sac."""
    pulse_rate = log_uniform(rng, 35, 75)
    formants = log_uniform(rng, 450, 800) * np.array([1.0, rng.uniform(2.0, 2.6)])

    def croak() -> np.ndarray:
        length = int(rng.uniform(0.16, 0.4) * RATE)
        frequency = pulse_rate * contour(length, 0.8, 1.05, 1.0)
        pulses = buzz(running_phase(rng, frequency), frequency, 4000)
        ring = sum(vocal_tract(pulses, [formant], [90]) * weight for formant, weight in zip(formants, (1.0, 0.7)))
        return with_pause(ring * contour(length, 0.3, 0.8, 1.0) * fades(length, 0.01, 0.04), rng.uniform(0.12, 0.3))

    return chain_events(rng, num_samples, croak)


def cricket(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Chirps of three to five pulses of a high tone; a second cricket farther away trills on."""
    track = np.zeros(num_samples)
    for level in (1.0, rng.uniform(0.1, 0.4)):
        carrier = rng.uniform(3900, 5300)
        pulse_length = int(rng.uniform(0.011, 0.018) * RATE)
        pulse = np.sin(2 * np.pi * carrier * seconds(pulse_length)) * np.hanning(pulse_length)
        chirp = np.tile(with_pause(pulse, rng.uniform(0.012, 0.02)), rng.integers(3, 6))
        onsets = repeated_onsets(rng, num_samples, len(chirp) / RATE + rng.uniform(0.1, 0.25), 0.1)
        track += level * mix_grains(rng, num_samples, onsets, chirp)
    return track


def bee(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Wing beats of an insect that flies near and away: a buzz whose pitch wavers."""
    frequency = log_uniform(rng, 170, 280) * drift(rng, num_samples, 3, 0.85, 1.15)
    frequency *= drift(rng, num_samples, 25, 0.98, 1.02)
    wings = buzz(running_phase(rng, frequency), frequency, rng.uniform(1800, 3000)) * roughness(rng, num_samples, 0.3)
    nearness = drift(rng, num_samples, 2.5, 0.1, 1.0)
    return nearness * wings


def crow(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Caws: harsh, nasal, falling, in quick series."""
    pitch = log_uniform(rng, 320, 480)
    formants = np.array([1250, 1800, 3400]) * rng.uniform(0.9, 1.15)

    def caw() -> np.ndarray:
        length = int(rng.uniform(0.24, 0.42) * RATE)
        frequency = pitch * contour(length, 0.95, 1.1, 0.85) * (1 + 0.05 * band_noise(rng, length, 20, 150, order=1))
        voice = buzz(running_phase(rng, frequency), frequency, 3000) + 0.5 * band_noise(rng, length, 800, 5000)
        voice = vocal_tract(voice, formants, [180, 220, 500]) * roughness(rng, length, 0.4)
        return with_pause(voice * fades(length, 0.03, 0.1), rng.uniform(0.1, 0.4))

    return chain_events(rng, num_samples, caw)
