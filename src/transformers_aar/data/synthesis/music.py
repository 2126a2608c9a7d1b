"""Musical instruments: struck, plucked, blown, bowed and electronic."""

import numpy as np
from scipy.signal import iirpeak, lfilter

from .blocks import (
    PENTATONIC,
    RATE,
    additive,
    articulation,
    band_noise,
    buzz,
    chain_events,
    decaying_modes,
    drift,
    fades,
    log_uniform,
    melody,
    mix_events,
    repeated_onsets,
    running_phase,
    seconds,
    steady_modes,
    vibrato,
)


def plucked_string(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A pentatonic run of notes. A string plucked at p of its length has harmonics of amplitude sin(pi k p) / k^2
    (less steep at the ear: bodies radiate high notes better), sharpened by stiffness and dying sooner as k grows."""
    tonic = log_uniform(rng, 130, 240)
    pluck_position = rng.uniform(0.12, 0.35)
    stiffness = log_uniform(rng, 5e-5, 4e-4)
    ring = rng.uniform(0.3, 0.7)
    slope = rng.uniform(0.9, 1.2)
    period = log_uniform(rng, 0.16, 0.32)
    note_length = int(max(0.3, 2 * period) * RATE)
    fade = fades(note_length, 0.001, 0.05)
    harmonics = np.arange(1, 25)

    def note() -> np.ndarray:
        frequencies = tonic * 2 ** (rng.choice(PENTATONIC) / 12) * harmonics * np.sqrt(1 + stiffness * harmonics**2)
        amplitudes = np.sin(np.pi * harmonics * pluck_position) / harmonics**slope * (frequencies < 0.45 * RATE)
        return (
            rng.uniform(0.6, 1.0) * fade * decaying_modes(note_length, frequencies, ring / harmonics**0.7, amplitudes)
        )

    return mix_events(num_samples, repeated_onsets(rng, num_samples, period, 0.1), note)


def piano(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Chords and notes of struck strings: partials sharpened by stiffness as k sqrt(1 + B k^2), each from two strings
    that beat, one of which dies soon and one late, bright at the hammer's stroke and duller as they ring."""
    scale = log_uniform(rng, 130, 260) * 2 ** (np.array([-12, -5, 0, 2, 4, 7, 9, 12, 16]) / 12)
    stiffness = log_uniform(rng, 2e-4, 8e-4)
    hammer_hz = rng.uniform(900, 1800)
    note_length = int(1.6 * RATE)
    harmonics = np.arange(1, 17)
    thud = 0.25 * band_noise(rng, note_length, 80, 500) * np.exp(-seconds(note_length) / 0.015)
    release = fades(note_length, 0.002, 0.2)

    def note(pitch: float) -> np.ndarray:
        partials = pitch * harmonics * np.sqrt(1 + stiffness * harmonics**2)
        amplitudes = np.exp(-partials / hammer_hz) * (partials < 0.45 * RATE) / np.exp(-pitch / hammer_hz)
        decays = (260 / pitch) ** 0.5 / harmonics**0.6
        pairs = np.concatenate([partials, partials * rng.uniform(1.0005, 1.002)])
        tone = decaying_modes(
            note_length, pairs, np.concatenate([0.25 * decays, decays]), np.concatenate([amplitudes, 0.5 * amplitudes])
        )
        return (tone + thud) * release

    notes = [note(pitch) for pitch in scale]

    def chord() -> np.ndarray:
        keys = rng.choice(len(notes), rng.integers(1, 4), replace=False)
        return rng.uniform(0.5, 1.0) * sum(notes[key] for key in keys)

    return mix_events(num_samples, repeated_onsets(rng, num_samples, log_uniform(rng, 0.2, 0.5), 0.1), chord)


def organ(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Sustained chords of pipes; the stops sound octaves and quints above every key."""
    tonic = log_uniform(rng, 130, 240)
    stops = np.array([0.5, 1, 1.5, 2, 3, 4, 5, 6, 8])
    drawn = rng.uniform(0.1, 1.0, len(stops)) * (rng.random(len(stops)) < 0.8) / stops**0.3
    drawn[1] = 1.0
    chords = np.array([[0, 4, 7, 12], [5, 9, 12, 17], [7, 11, 14, 19], [-3, 0, 4, 9], [2, 5, 9, 14]])
    tremulant = rng.uniform(0, 0.12)

    def chord() -> np.ndarray:
        length = int(rng.uniform(0.6, 1.6) * RATE)
        keys = tonic * 2 ** (rng.choice(chords) / 12)
        tuning = rng.uniform(0.998, 1.002, (len(keys), len(stops)))
        frequencies = (keys[:, None] * stops * tuning).ravel()
        return fades(length, 0.03, 0.06) * steady_modes(length, frequencies, np.tile(drawn, len(keys)))

    shake = 1 + tremulant * np.sin(2 * np.pi * rng.uniform(5.5, 7) * seconds(num_samples))
    return chain_events(rng, num_samples, chord) * shake


def flute(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A legato line: few harmonics, a slow vibrato, and breath that is loudest when a note begins."""
    scale = log_uniform(rng, 440, 700) * 2 ** (np.array([0, 2, 4, 5, 7, 9, 11, 12]) / 12)
    pitch, onsets = melody(rng, num_samples, scale, (0.18, 0.55), 0.015)
    phase = running_phase(rng, pitch * vibrato(rng, num_samples, rng.uniform(0.003, 0.01)))
    tone = additive(phase, [1.0, rng.uniform(0.25, 0.6), rng.uniform(0.1, 0.3), rng.uniform(0.02, 0.08), 0.02])
    envelope = articulation(num_samples, onsets, 0.08, rng.uniform(0.6, 0.9))
    breath = band_noise(rng, num_samples, 700, 5000, order=1) * (1.6 - envelope)
    return tone * envelope + rng.uniform(0.04, 0.12) * breath


def violin(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Bowed string: a sawtooth with vibrato through the resonances of the body, and the bow's noise."""
    scale = log_uniform(rng, 196, 440) * 2 ** (np.array([0, 2, 4, 5, 7, 9, 11, 12, 14, 16]) / 12)
    pitch, onsets = melody(rng, num_samples, scale, (0.3, 0.9), 0.04)
    frequency = pitch * vibrato(rng, num_samples, rng.uniform(0.008, 0.016))
    string = buzz(running_phase(rng, frequency), frequency, rng.uniform(2500, 4000))
    string += 0.06 * band_noise(rng, num_samples, 1500, 7000, order=1)
    body = 0.4 * string
    for resonance in (280, 460, 560, 1100, 2600, 3300):
        body += lfilter(*iirpeak(resonance * rng.uniform(0.93, 1.07), rng.uniform(4, 9), fs=RATE), string)
    return body * articulation(num_samples, onsets, 0.14, rng.uniform(0.5, 0.85))


def trumpet(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Fanfare by frequency modulation: brass grows brighter as it grows louder, so the index follows the envelope
    (J. M. Chowning, "The synthesis of complex audio spectra by means of frequency modulation", 1973)."""
    scale = log_uniform(rng, 230, 400) * 2 ** (np.array([0, 4, 7, 12]) / 12)
    beat = rng.uniform(0.14, 0.24)
    index = rng.uniform(3.5, 6.0)

    def note() -> np.ndarray:
        length = int(beat * rng.choice([1, 1, 2, 4]) * RATE)
        sounding = int(rng.uniform(0.75, 0.95) * length)
        time = seconds(sounding)
        scoop = 1 - 0.03 * np.exp(-time / 0.02)
        sway = 1 + 0.006 * np.clip(4 * (time - 0.25), 0, 1) * np.sin(2 * np.pi * 5.5 * time)
        phase = running_phase(rng, rng.choice(scale) * scoop * sway)
        swell = fades(sounding, 0.035, 0.05) * (0.75 + 0.25 * np.exp(-time / 0.1))
        return np.pad(swell * np.sin(phase + index * swell * np.sin(phase)), (0, length - sounding))

    return chain_events(rng, num_samples, note)


def synthesizer(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Sequenced arpeggio of two detuned sawtooth oscillators, whose cutoff falls in every note and sweeps slowly."""
    scale = log_uniform(rng, 50, 95) * 2 ** (np.array([0, 3, 7, 10, 12, 15, 19, 24]) / 12)
    length = int(rng.uniform(0.1, 0.16) * RATE)
    pattern = rng.choice(scale, rng.choice([4, 6, 8]))
    num_notes = num_samples // length + 2
    pitch = np.repeat(np.resize(pattern, num_notes), length)[:num_samples]
    pluck = np.tile(np.exp(-np.linspace(0, rng.uniform(1.5, 3), length)), num_notes)[:num_samples]
    cutoff = drift(rng, num_samples, 0.7, 1800, 4500) * (0.3 + 0.7 * pluck)
    saws = sum(buzz(running_phase(rng, tuned), tuned, cutoff) for tuned in (pitch, pitch * rng.uniform(1.004, 1.01)))
    gate = np.tile(fades(length, 0.003, 0.02), num_notes)[:num_samples]
    return saws * gate * (0.7 + 0.3 * pluck)


def marimba(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Runs on wooden bars, tuned so that the second mode lies two octaves above the first, and the mallet's knock."""
    tonic = log_uniform(rng, 260, 520)
    ratios = np.array([1.0, 3.95, rng.uniform(9, 10)])
    decays = np.array([rng.uniform(0.12, 0.25), 0.05, 0.02])
    length = int(0.6 * RATE)
    knock = 0.3 * band_noise(rng, length, 800, 4000) * np.exp(-seconds(length) / 0.004)
    attack = fades(length, 0.001, 0.1)
    notes = [
        attack
        * (decaying_modes(length, tonic * 2 ** (step / 12) * ratios, decays, np.array([1.0, 0.35, 0.2])) + knock)
        for step in PENTATONIC
    ]
    onsets = repeated_onsets(rng, num_samples, log_uniform(rng, 0.1, 0.2), 0.05)
    return mix_events(num_samples, onsets, lambda: rng.uniform(0.5, 1.0) * notes[rng.integers(len(notes))])
