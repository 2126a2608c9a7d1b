"""What codecs lose and cost, against NumPy and closed forms."""

import math

import numpy as np
import pytest
import torch

from transformers_aar import SatConfig
from transformers_aar.evaluation.reconstruction import (
    mel_distance,
    multi_resolution_stft_distance,
    si_sdr,
    tokens_per_second,
)
from transformers_aar.training.losses import MelLoss


def numpy_magnitudes(waveform, num_fft, hop, window_length):
    """Magnitudes of centred frames, mirrored at the edges, with the window in the middle of the frame."""
    window = np.zeros(num_fft)
    start = (num_fft - window_length) // 2
    window[start : start + window_length] = np.hanning(window_length + 1)[:-1]
    padded = np.pad(waveform, num_fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, num_fft)[::hop]
    return np.sqrt(np.maximum(np.abs(np.fft.rfft(frames * window)) ** 2, 1e-7))


def test_stft_distance_by_the_formula(sounds):
    predictions, references = sounds(2, 4800).double(), sounds(2, 4800, seed=1).double()
    for sound, distance in enumerate(multi_resolution_stft_distance(predictions, references)):
        terms = []
        for sizes in ((512, 50, 240), (1024, 120, 600), (2048, 240, 1200)):
            fake, real = (numpy_magnitudes(batch[sound].numpy(), *sizes) for batch in (predictions, references))
            terms.append(np.linalg.norm(real - fake) / np.linalg.norm(real))
            terms[-1] += np.abs(np.log(real) - np.log(fake)).mean()
        assert float(distance) == pytest.approx(np.mean(terms), rel=1e-9)


def test_stft_distance_of_a_halved_sound(sounds):
    references = sounds(3, 4800).double() * 100  # loud enough that no bin lies at the floor
    assert multi_resolution_stft_distance(references, references).tolist() == [0, 0, 0]
    halved = multi_resolution_stft_distance(references / 2, references)
    assert halved.tolist() == pytest.approx([0.5 + math.log(2)] * 3, rel=1e-6)


def test_mel_distance_is_the_training_loss_of_each_sound(sounds):
    predictions, references = sounds(3, 4800), sounds(3, 4800, seed=1)
    distances = mel_distance(predictions, references, 24_000)
    loss = MelLoss(24_000)
    torch.testing.assert_close(distances[1], loss(predictions[1:2, None], references[1:2, None]))
    torch.testing.assert_close(distances.mean(), loss(predictions[:, None], references[:, None]))
    assert distances.unique().numel() == 3


def test_si_sdr_by_the_formula(sounds):
    predictions, references = sounds(3, 4800) + 0.1, sounds(3, 4800, seed=1) - 0.2
    fake, real = (batch.double().numpy() for batch in (predictions, references))
    fake, real = fake - fake.mean(1, keepdims=True), real - real.mean(1, keepdims=True)
    target = (fake * real).sum(1, keepdims=True) / (real**2).sum(1, keepdims=True) * real
    expected = 10 * np.log10((target**2).sum(1) / ((target - fake) ** 2).sum(1))
    np.testing.assert_allclose(si_sdr(predictions, references), expected, rtol=1e-6)


def test_si_sdr_knows_the_noise_and_not_the_level():
    times = torch.arange(4800) / 4800
    tone, noise = torch.sin(2 * math.pi * 50 * times), torch.cos(2 * math.pi * 50 * times)
    # orthogonal and a tenth as loud: 20 dB
    predictions = 0.3 * (tone + 0.1 * noise) + 0.05
    assert si_sdr(predictions[None], tone[None]).tolist() == [pytest.approx(20, abs=1e-4)]


def test_rates_of_the_published_codec():
    config = SatConfig()
    assert tokens_per_second(config) == 455
    assert config.bandwidth == pytest.approx(4.55)
    assert tokens_per_second(SatConfig(overlap=0.01)) == pytest.approx(455 / 0.99)


def test_refuses_what_does_not_pair():
    figures = (multi_resolution_stft_distance, si_sdr, lambda *pair: mel_distance(*pair, 24_000))
    for figure in figures:
        for shapes in (((2, 4000), (2, 4001)), ((2, 2047), (2, 2047)), ((4000,), (4000,))):
            with pytest.raises(ValueError, match="two batches of waveforms of one shape"):
                figure(*map(torch.zeros, shapes))
