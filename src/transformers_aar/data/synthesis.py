"""Procedural sounds of twelve AudioSet classes, for tests and for training small models without any recordings. Each
kind is a small physical or acoustic model (modal sums, plucked strings, formants, grains, filtered noise) whose pitch,
tempo, timbre, level and start are drawn from a seed. Everything is made at 24 kHz and resampled for other rates."""

import difflib
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.signal import butter, lfilter, resample_poly, sosfilt

_RATE = 24_000
# Rendered and thrown away, so that a clip may begin in the middle of an event.
_LEAD_IN = _RATE // 2
# Mean formant frequencies in Hz of the vowels in heed, hid, head, had, hod, hawed, hood, who'd, hud, heard (men),
# Peterson and Barney, "Control methods used in a study of the vowels", JASA 24 (1952), table II.
_VOWEL_FORMANTS = np.array(
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
# Partials of a tuned church bell relative to its prime: hum, prime, tierce, quint, nominal and the next five.
_BELL_RATIOS = np.array([0.5, 1.0, 1.2, 1.5, 2.0, 2.5, 2.67, 3.0, 4.0, 5.33])
# Modes of an ideal circular membrane relative to the lowest: ratios of zeros of Bessel functions.
_MEMBRANE_RATIOS = np.array([1.0, 1.59, 2.14, 2.3, 2.65, 2.92])
_PENTATONIC = np.array([0, 2, 4, 7, 9, 12])


def _log_uniform(rng: np.random.Generator, low: float, high: float, size: int | None = None):
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def _seconds(num_samples: int) -> np.ndarray:
    return np.arange(num_samples) / _RATE


def _drift(rng: np.random.Generator, num_samples: int, rate_hz: float, low: float, high: float) -> np.ndarray:
    """Smooth random curve between `low` and `high` that turns about `rate_hz` times per second."""
    num_knots = int(num_samples / _RATE * rate_hz) + 3
    knots = (np.arange(num_knots) - rng.uniform()) / rate_hz
    return PchipInterpolator(knots, rng.uniform(low, high, num_knots))(_seconds(num_samples))


def _phase(rng: np.random.Generator, frequency: np.ndarray) -> np.ndarray:
    """Phase in radians of an oscillator with the momentary `frequency` in Hz."""
    return 2 * np.pi * (np.cumsum(frequency) / _RATE + rng.uniform())


def _buzz(phase: np.ndarray, frequency: np.ndarray, brightness_hz: float) -> np.ndarray:
    """All harmonics of `phase`, falling as exp(-f / brightness_hz): the closed form of sum_k a^k sin(k phase)
    (J. A. Moorer, "The synthesis of complex audio spectra by means of discrete summation formulas", 1976)."""
    a = np.exp(-frequency / brightness_hz)
    return a * np.sin(phase) / (1 - 2 * a * np.cos(phase) + a * a)


def _modes(num_samples: int, frequencies: np.ndarray, decays_s: np.ndarray, amplitudes: np.ndarray) -> np.ndarray:
    """Sum of exponentially decaying sines; `decays_s` are the times in which an amplitude falls to 1/e."""
    block = 256
    poles = (2j * np.pi * frequencies - 1 / decays_s) / _RATE
    # exp(p (256 m + r)) = exp(256 p m) exp(p r) turns the sum over modes into one small matrix product.
    coarse = np.exp(np.arange(-(-num_samples // block))[:, None] * block * poles)
    fine = amplitudes[:, None] * np.exp(poles[:, None] * np.arange(block))
    return (coarse @ fine).imag.ravel()[:num_samples]


def _noise(rng: np.random.Generator, num_samples: int, low_hz: float, high_hz: float, order: int = 2) -> np.ndarray:
    """Band-limited noise of unit standard deviation."""
    sos = butter(order, (low_hz, high_hz), "bandpass", fs=_RATE, output="sos")
    noise = sosfilt(sos, rng.standard_normal(num_samples))
    return noise / (noise.std() + 1e-9)


def _resonators(frequencies: Sequence[float], bandwidths: Sequence[float]) -> np.ndarray:
    """Cascade of two-pole resonators with unit gain at 0 Hz (Klatt 1980, eq. 2) as second-order sections."""
    radius = np.exp(-np.pi * np.asarray(bandwidths) / _RATE)
    a1 = -2 * radius * np.cos(2 * np.pi * np.asarray(frequencies) / _RATE)
    a2 = radius**2
    zero, one = np.zeros_like(a1), np.ones_like(a1)
    return np.stack([one + a1 + a2, zero, zero, one, a1, a2], axis=-1)


def _fade(num_samples: int, attack_s: float, release_s: float) -> np.ndarray:
    """Raised-cosine attack and release around a flat top."""
    time = _seconds(num_samples)
    rise = np.clip(time / attack_s, 0, 1)
    fall = np.clip((num_samples / _RATE - time) / release_s, 0, 1)
    return (0.5 - 0.5 * np.cos(np.pi * rise)) * (0.5 - 0.5 * np.cos(np.pi * fall))


def _onsets(rng: np.random.Generator, num_samples: int, period_s: float, jitter: float) -> np.ndarray:
    """Sample indices of repeated events whose spacing varies by up to `jitter` of the period."""
    times = np.arange(rng.uniform(), num_samples / _RATE / period_s)
    times = (times + rng.uniform(0, jitter, len(times))) * period_s * _RATE
    return times.astype(int)[times < num_samples]


def _sequence(num_samples: int, onsets: np.ndarray, make_event: Callable[[], np.ndarray]) -> np.ndarray:
    """Mixes a fresh event into silence at every onset."""
    track = np.zeros(num_samples)
    for onset in onsets:
        event = make_event()[: num_samples - onset]
        track[onset : onset + len(event)] += event
    return track


def _grains(rng: np.random.Generator, num_samples: int, onsets: np.ndarray, grain: np.ndarray) -> np.ndarray:
    """Mixes one grain into silence at every onset, each time with another level."""
    return _sequence(num_samples, onsets, lambda: rng.uniform(0.4, 1.0) * grain)


def _siren(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Electronic wail to yelp: a horn tone that glides up and down without a pause."""
    cycle = (_seconds(num_samples) * _log_uniform(rng, 0.8, 4.5) + rng.uniform()) % 1
    rise = rng.uniform(0.35, 0.75)
    glide = 0.5 - 0.5 * np.cos(np.pi * np.where(cycle < rise, cycle / rise, (1 - cycle) / (1 - rise)))
    frequency = _log_uniform(rng, 450, 750) * rng.uniform(1.9, 2.8) ** glide
    tone = _buzz(_phase(rng, frequency), frequency, rng.uniform(500, 1200))
    return tone / np.exp(-frequency / 900)


def _smoke_alarm(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Piezo beeps near 3 kHz, gated on and off."""
    frequency = rng.uniform(2800, 3600)
    period = _log_uniform(rng, 0.18, 0.6)
    beep_length = int(period * rng.uniform(0.45, 0.7) * _RATE)
    overtone = rng.uniform(0.1, 0.35)
    phase = 2 * np.pi * frequency * _seconds(beep_length)
    beep = (np.sin(phase) + overtone * np.sin(3 * phase)) * _fade(beep_length, 0.004, 0.006)
    return _sequence(num_samples, _onsets(rng, num_samples, period, 0.0), lambda: beep)


def _bell(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Strokes on a bell: inharmonic modes, each with a slightly detuned twin that beats with it."""
    prime = _log_uniform(rng, 400, 900)
    ratios = _BELL_RATIOS * rng.uniform(0.99, 1.01, len(_BELL_RATIOS))
    frequencies = prime * np.concatenate([ratios, ratios * rng.uniform(1.001, 1.004, len(ratios))])
    decays = rng.uniform(0.7, 1.8) / np.tile(_BELL_RATIOS, 2) ** 0.7
    amplitudes = np.tile(rng.uniform(0.3, 1.0, len(ratios)) / _BELL_RATIOS**0.3, 2)
    stroke_length = int(1.5 * _RATE)

    def stroke() -> np.ndarray:
        return rng.uniform(0.7, 1.0) * _modes(stroke_length, frequencies, decays, amplitudes) * attack

    attack = _fade(stroke_length, 0.002, 0.3)
    return _sequence(num_samples, _onsets(rng, num_samples, rng.uniform(0.5, 0.7), 0.1), stroke)


def _plucked_string(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A pentatonic run of notes. A string plucked at p of its length has harmonics of amplitude sin(pi k p) / k^2
    (less steep at the ear: bodies radiate high notes better), sharpened by stiffness and dying sooner as k grows."""
    tonic = _log_uniform(rng, 130, 240)
    pluck_position = rng.uniform(0.12, 0.35)
    stiffness = _log_uniform(rng, 5e-5, 4e-4)
    ring = rng.uniform(0.3, 0.7)
    slope = rng.uniform(0.9, 1.2)
    period = _log_uniform(rng, 0.16, 0.32)
    note_length = int(max(0.3, 2 * period) * _RATE)
    fade = _fade(note_length, 0.001, 0.05)
    harmonics = np.arange(1, 25)

    def note() -> np.ndarray:
        frequencies = tonic * 2 ** (rng.choice(_PENTATONIC) / 12) * harmonics * np.sqrt(1 + stiffness * harmonics**2)
        amplitudes = np.sin(np.pi * harmonics * pluck_position) / harmonics**slope * (frequencies < 0.45 * _RATE)
        return rng.uniform(0.6, 1.0) * fade * _modes(note_length, frequencies, ring / harmonics**0.7, amplitudes)

    return _sequence(num_samples, _onsets(rng, num_samples, period, 0.1), note)


def _drum(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Beats on two drums: membrane modes, a lowest mode whose pitch drops after the stroke, and the stick's click."""
    tunings = _log_uniform(rng, 60, 150) * np.array([1.0, rng.uniform(1.3, 2.0)])
    decay = rng.uniform(0.06, 0.14)
    hit_length = int(0.4 * _RATE)
    time = _seconds(hit_length)
    click = rng.uniform(0.05, 0.25) * _noise(rng, hit_length, 400, 5000) * np.exp(-time / 0.008)
    fade = _fade(hit_length, 0.001, 0.1)

    def hit() -> np.ndarray:
        fundamental = rng.choice(tunings)
        glide = fundamental * (1 + 0.8 * np.exp(-time / 0.025))
        body = np.sin(2 * np.pi * np.cumsum(glide) / _RATE) * np.exp(-time / decay)
        overtones = _modes(
            hit_length, fundamental * _MEMBRANE_RATIOS, decay / _MEMBRANE_RATIOS, 0.4 / _MEMBRANE_RATIOS
        )
        return rng.uniform(0.6, 1.0) * fade * (body + overtones + click)

    return _sequence(num_samples, _onsets(rng, num_samples, _log_uniform(rng, 0.16, 0.4), 0.08), hit)


def _dog(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Barks: a rough voice whose pitch jumps up and falls, through the formants of an opening mouth."""
    pitch = _log_uniform(rng, 280, 650)
    bark_length = int(rng.uniform(0.13, 0.22) * _RATE)
    formants = np.array([650, 1300, 2500]) * rng.uniform(0.85, 1.35)
    mouth = _resonators(formants, [160, 220, 350])
    hoarseness = rng.uniform(0.1, 0.3)
    brightness = rng.uniform(900, 1600)
    progress = np.linspace(0, 1, bark_length)
    contour = 0.65 + 0.9 * np.sqrt(progress) * (1 - progress) ** 0.8
    envelope = _fade(bark_length, 0.012, 0.08)

    def bark() -> np.ndarray:
        frequency = pitch * rng.uniform(0.92, 1.08) * contour
        voice = _buzz(_phase(rng, frequency), frequency, brightness)
        breath = hoarseness * _noise(rng, bark_length, 400, 5000)
        return rng.uniform(0.75, 1.0) * sosfilt(mouth, (voice + breath) * envelope) * envelope

    return _sequence(num_samples, _onsets(rng, num_samples, rng.uniform(0.3, 0.5), 0.2), bark)


def _bird(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Song: a motif of two or three whistled notes, each a quick sweep, repeated."""
    centre = _log_uniform(rng, 2600, 4200)
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
        progress = np.linspace(-0.5, 0.5, int(note_period * fill * _RATE))
        phase = _phase(rng, middle * np.exp2(sweep * progress - abs(sweep) * progress**2))
        return (np.sin(phase) + overtone * np.sin(2 * phase)) * np.cos(np.pi * progress) ** 1.5

    return _sequence(num_samples, _onsets(rng, num_samples, note_period, 0.1), chirp)


def _engine(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Combustion engine: firing pulses with uneven cylinders, the exhaust's resonances, and noise at each firing."""
    firing = _log_uniform(rng, 28, 85) * _drift(rng, num_samples, 1.5, 0.93, 1.07)
    phase = _phase(rng, firing)
    unevenness = 1 + rng.uniform(0.1, 0.3) * np.sin(phase / 2) + rng.uniform(0.05, 0.2) * np.sin(phase / 4)
    pulses = _buzz(phase, firing, rng.uniform(350, 700)) * unevenness
    exhaust = _resonators([rng.uniform(110, 220), rng.uniform(350, 700)], [120, 300])
    rumble = sosfilt(exhaust, pulses)
    hiss = _noise(rng, num_samples, 300, 2500, order=1) * (0.5 + 0.5 * np.cos(phase)) ** 3
    return rumble / rumble.std() + rng.uniform(0.08, 0.25) * hiss


def _rain(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Steady hiss of distant drops and short high pings of near ones."""
    hiss = _noise(rng, num_samples, rng.uniform(1200, 2500), rng.uniform(8500, 11000), order=1)
    drops = np.zeros(num_samples)
    for frequency in rng.uniform(3500, 9000, 4):
        onsets = rng.integers(0, num_samples, int(rng.uniform(10, 50) * num_samples / _RATE))
        ping = _modes(512, np.array([frequency]), np.array([0.002]), np.array([1.0]))
        drops += _grains(rng, num_samples, onsets, ping)
    return hiss * _drift(rng, num_samples, 2, 0.85, 1.0) + rng.uniform(1.5, 4.0) * drops


def _wind(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Gusts: a whistle that wanders between noise resonances, over a low rush, all swelling and fading."""
    air = _noise(rng, num_samples, 60, rng.uniform(500, 800), order=1)
    wind = rng.uniform(0.2, 0.5) * air
    resonances = _log_uniform(rng, 260, 400) * 1.3 ** np.arange(5)
    position = _drift(rng, num_samples, 2.5, 0, len(resonances) - 1)
    for index, frequency in enumerate(resonances):
        whistle = sosfilt(_resonators([frequency], [0.08 * frequency]), air)
        wind += whistle / whistle.std() * np.exp(-((position - index) ** 2))
    return wind * _drift(rng, num_samples, 2.0, 0.3, 1.0)


def _speech(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Syllables of random vowels (a pulse train through formant resonators, Klatt 1980), some begun by a fricative."""
    pitch = _log_uniform(rng, 95, 230) * _drift(rng, num_samples, 3, 0.82, 1.22)
    tract_scale = 1.0 + 0.18 * (pitch.mean() > 150)
    source = _buzz(_phase(rng, pitch), pitch, rng.uniform(1100, 1900))
    vowels = rng.choice(len(_VOWEL_FORMANTS), 3, replace=False)
    voices = [
        sosfilt(_resonators([*formants * tract_scale, 3600 * tract_scale], [70, 100, 140, 250]), source)
        for formants in _VOWEL_FORMANTS[vowels]
    ]
    voices = [voice / voice.std() for voice in voices]
    period = rng.uniform(0.17, 0.27)
    onsets = _onsets(rng, num_samples, period, 0.1)
    track = np.zeros(num_samples)
    for onset in onsets:
        length = min(int(period * rng.uniform(0.7, 0.95) * _RATE), num_samples - onset)
        first, second = rng.integers(len(voices), size=2)
        blend = np.linspace(0, 1, length)
        stretch = slice(onset, onset + length)
        syllable = (1 - blend) * voices[first][stretch] + blend * voices[second][stretch]
        track[stretch] += rng.uniform(0.6, 1.0) * syllable * _fade(length, 0.03, 0.07)
    length = int(0.07 * _RATE)
    fricative = _noise(rng, length, rng.uniform(2800, 4500), 8500) * _fade(length, 0.02, 0.03)
    return track + rng.uniform(0.15, 0.35) * _grains(
        rng, num_samples, onsets[rng.random(len(onsets)) < 0.6], fricative
    )


def _applause(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A small audience: each person claps at an own steady pace with an own hand resonance."""
    track = np.zeros(num_samples)
    time = _seconds(int(0.03 * _RATE))
    for _ in range(rng.integers(8, 18)):
        frequency = _log_uniform(rng, 800, 1900)
        hands = _resonators([frequency], [frequency * rng.uniform(0.25, 0.5)])
        impact = np.diff(rng.standard_normal(len(time) + 1)) * np.exp(-time / rng.uniform(0.003, 0.007))
        clap = sosfilt(hands, impact)
        onsets = _onsets(rng, num_samples, rng.uniform(0.19, 0.32), 0.15)
        track += rng.uniform(0.6, 1.0) * _grains(rng, num_samples, onsets, clap / np.max(np.abs(clap)))
    return track


_SYNTHESIZERS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "Applause": _applause,
    "Bell": _bell,
    "Bird": _bird,
    "Dog": _dog,
    "Drum": _drum,
    "Engine": _engine,
    "Plucked string instrument": _plucked_string,
    "Rain": _rain,
    "Siren": _siren,
    "Smoke detector, smoke alarm": _smoke_alarm,
    "Speech": _speech,
    "Wind": _wind,
}

SOUND_KINDS: tuple[str, ...] = tuple(_SYNTHESIZERS)
"""Display names of the AudioSet classes that can be synthesised; a name's position is its label id."""


def _record(rng: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """What a recording adds: early reflections, the microphone's spectral tilt and a faint noise floor."""
    reflected = sound.copy()
    for delay in (rng.uniform(0.002, 0.03, 6) * _RATE).astype(int):
        reflected[delay:] += rng.uniform(-0.12, 0.12) * sound[:-delay]
    sound = lfilter([1.0, rng.uniform(-0.25, 0.25)], [1.0], reflected)[_LEAD_IN:]
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
    if kind not in _SYNTHESIZERS:
        nearest = difflib.get_close_matches(kind, SOUND_KINDS, n=3, cutoff=0.0)
        raise ValueError(f"There is no sound kind {kind!r}; the nearest are {'; '.join(nearest)}.")
    if seed < 0:
        raise ValueError(f"The seed must be a non-negative integer, but is {seed}.")
    # Shorter clips could fall between two events.
    if not duration_s >= 0.5:
        raise ValueError(f"The duration must be at least 0.5 seconds, but is {duration_s}.")
    rng = np.random.Generator(np.random.PCG64([SOUND_KINDS.index(kind), seed]))
    num_samples = _LEAD_IN + math.ceil(duration_s * _RATE)
    sound = _record(rng, _SYNTHESIZERS[kind](rng, num_samples))
    if sampling_rate != _RATE:
        sound = resample_poly(sound, sampling_rate, _RATE)
    sound = sound[: round(duration_s * sampling_rate)]
    return (sound * rng.uniform(0.4, 0.9) / np.max(np.abs(sound))).astype(np.float32)
