"""Sounds of people: voices through formants, whistling, and hands."""

import numpy as np
from scipy.signal import sosfilt

from .blocks import (
    RATE,
    articulation,
    band_noise,
    buzz,
    chain_events,
    contour,
    drift,
    fades,
    log_uniform,
    melody,
    mix_grains,
    moving_vocal_tract,
    repeated_onsets,
    resonators,
    roughness,
    running_phase,
    seconds,
    vibrato,
    vocal_tract,
)

# Mean formant frequencies in Hz of the vowels in heed, hid, head, had, hod, hawed, hood, who'd, hud, heard (men),
# Peterson and Barney, "Control methods used in a study of the vowels", JASA 24 (1952), table II.
VOWEL_FORMANTS = np.array(
    [
        (270, 2290, 3010),
        (390, 1990, 2550),
        (530, 1840, 2480),
        (660, 1720, 2410),
        (730, 1090, 2440),
        (570, 840, 2410),
        (440, 1020, 2240),
        (300, 870, 2240),
        (640, 1190, 2390),
        (490, 1350, 1690),
    ],
    dtype=float,
)


def speech(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Syllables of random vowels (a pulse train through formant resonators, Klatt 1980), some begun by a fricative."""
    pitch = log_uniform(rng, 95, 230) * drift(rng, num_samples, 3, 0.82, 1.22)
    tract_scale = 1.0 + 0.18 * (pitch.mean() > 150)
    source = buzz(running_phase(rng, pitch), pitch, rng.uniform(1100, 1900))
    vowels = rng.choice(len(VOWEL_FORMANTS), 3, replace=False)
    voices = [
        sosfilt(resonators([*formants * tract_scale, 3600 * tract_scale], [70, 100, 140, 250]), source)
        for formants in VOWEL_FORMANTS[vowels]
    ]
    voices = [voice / voice.std() for voice in voices]
    period = rng.uniform(0.17, 0.27)
    onsets = repeated_onsets(rng, num_samples, period, 0.1)
    track = np.zeros(num_samples)
    for onset in onsets:
        length = min(int(period * rng.uniform(0.7, 0.95) * RATE), num_samples - onset)
        first, second = rng.integers(len(voices), size=2)
        blend = np.linspace(0, 1, length)
        stretch = slice(onset, onset + length)
        syllable = (1 - blend) * voices[first][stretch] + blend * voices[second][stretch]
        track[stretch] += rng.uniform(0.6, 1.0) * syllable * fades(length, 0.03, 0.07)
    length = int(0.07 * RATE)
    fricative = band_noise(rng, length, rng.uniform(2800, 4500), 8500) * fades(length, 0.02, 0.03)
    return track + rng.uniform(0.15, 0.35) * mix_grains(
        rng, num_samples, onsets[rng.random(len(onsets)) < 0.6], fricative
    )


def applause(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A small audience: each person claps at an own steady pace with an own hand resonance."""
    track = np.zeros(num_samples)
    time = seconds(int(0.03 * RATE))
    for _ in range(rng.integers(8, 18)):
        frequency = log_uniform(rng, 800, 1900)
        hands = resonators([frequency], [frequency * rng.uniform(0.25, 0.5)])
        impact = np.diff(rng.standard_normal(len(time) + 1)) * np.exp(-time / rng.uniform(0.003, 0.007))
        clap = sosfilt(hands, impact)
        onsets = repeated_onsets(rng, num_samples, rng.uniform(0.19, 0.32), 0.15)
        track += rng.uniform(0.6, 1.0) * mix_grains(rng, num_samples, onsets, clap / np.max(np.abs(clap)))
    return track


def singing(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Held vowels on a melody, with vibrato and the singer's formant near 3 kHz (Sundberg 1974)."""
    tonic = log_uniform(rng, 160, 360)
    pitch, onsets = melody(rng, num_samples, tonic * 2 ** (np.array([0, 2, 4, 5, 7, 9, 12]) / 12), (0.35, 0.9), 0.07)
    frequency = pitch * vibrato(rng, num_samples, rng.uniform(0.012, 0.025))
    source = buzz(running_phase(rng, frequency), frequency, rng.uniform(1500, 2200))
    tract_scale = 1.0 + 0.15 * (tonic > 220)
    vowels = rng.choice(VOWEL_FORMANTS[[4, 5, 6, 7, 1]], 2, replace=False) * tract_scale
    voices = [
        vocal_tract(source, [*formants[:2], 2700 * tract_scale, 3100 * tract_scale], [70, 90, 120, 140])
        for formants in vowels
    ]
    blend = drift(rng, num_samples, 1.2, 0, 1)
    voice = blend * voices[0] + (1 - blend) * voices[1]
    return voice * articulation(num_samples, onsets, 0.12, rng.uniform(0.5, 0.9))


def whistling(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A tune of nearly pure tones that slide into each other."""
    scale = log_uniform(rng, 800, 1250) * 2 ** (np.array([0, 2, 4, 5, 7, 9, 12]) / 12)
    pitch, onsets = melody(rng, num_samples, scale, (0.2, 0.6), rng.uniform(0.06, 0.12))
    phase = running_phase(rng, pitch * vibrato(rng, num_samples, rng.uniform(0.005, 0.015)))
    tone = np.sin(phase) + rng.uniform(0.005, 0.03) * np.sin(2 * phase)
    air = band_noise(rng, num_samples, 800, 2500) * rng.uniform(0.005, 0.02)
    return (tone + air) * articulation(num_samples, onsets, 0.1, rng.uniform(0.4, 0.95))


def laughter(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Ha-ha-ha: a breath and an open vowel in quick repetition, pitch and level falling, then air drawn in."""
    pitch = log_uniform(rng, 170, 420)
    period = rng.uniform(0.16, 0.23)
    formants = np.array([800, 1300, 2600, 3700]) * rng.uniform(0.9, 1.25)
    bandwidths = [110, 140, 200, 300]
    brightness = rng.uniform(1300, 2200)

    def syllable(height: float) -> np.ndarray:
        length = int(period * rng.uniform(0.9, 1.1) * RATE)
        voiced = int(rng.uniform(0.5, 0.65) * length)
        frequency = pitch * height * contour(voiced, 0.92, 1.08, 0.85)
        voice = vocal_tract(buzz(running_phase(rng, frequency), frequency, brightness), formants, bandwidths)
        air = band_noise(rng, length, 500, 9000, order=1)
        breath = (0.4 * vocal_tract(air, formants, bandwidths) + 0.06 * air) * fades(length, 0.04, 0.06)
        return breath + np.pad(voice * fades(voiced, 0.02, 0.05), (length - voiced, 0))

    def laugh() -> np.ndarray:
        fall = np.linspace(rng.uniform(1.1, 1.35), 0.85, rng.integers(4, 8))
        inhaled = int(rng.uniform(0.2, 0.35) * RATE)
        inhalation = 0.3 * band_noise(rng, inhaled, 900, 8000) * fades(inhaled, 0.1, 0.08)
        return np.concatenate([height * syllable(height) for height in fall] + [inhalation])

    return chain_events(rng, num_samples, laugh)


def baby_cry(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Cries of about a second that rise, stay and fall, rich in harmonics, with gasps in between."""
    pitch = log_uniform(rng, 370, 560)
    formants = np.array([1100, 2900, 4600]) * rng.uniform(0.9, 1.15)
    hoarseness = rng.uniform(0.05, 0.3)

    def cry() -> np.ndarray:
        length = int(rng.uniform(0.6, 1.2) * RATE)
        frequency = pitch * rng.uniform(0.92, 1.08) * contour(length, 0.75, 1.1, 1.15, 1.05, 0.7)
        frequency *= drift(rng, length, 9, 0.97, 1.03)
        voice = buzz(running_phase(rng, frequency), frequency, 3500) * roughness(rng, length, hoarseness)
        voice = moving_vocal_tract(voice, 0.75 * formants, formants, formants, 0.8 * formants)
        gasp_length = int(rng.uniform(0.15, 0.3) * RATE)
        gasp = 0.12 * band_noise(rng, gasp_length, 1000, 6000) * fades(gasp_length, 0.08, 0.05)
        return np.concatenate([voice * fades(length, 0.06, 0.15), gasp])

    return chain_events(rng, num_samples, cry)
