"""What a codec loses, and what its codes cost."""

import torch

from ..configuration_sat import SatConfig
from ..training.losses import MelLoss

# FFT size, hop and window of each resolution, in samples: Yamamoto et al. 2020 (arXiv 1910.11480), Table 1
STFT_RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
# so that the logarithm of silence stays finite; as in the widespread code github.com/kan-bayashi/ParallelWaveGAN
STFT_POWER_FLOOR = 1e-7
# the largest window of both spectral distances
MIN_SAMPLES = 2048


def multi_resolution_stft_distance(predictions: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """
    Spectral convergence plus L1 distance of log magnitudes, the mean of three resolutions (Yamamoto et al. 2020,
    Equations 3 to 6). The resolutions are in samples and were chosen for 24 kHz.

    Args:
        predictions (`torch.FloatTensor` of shape `(num_sounds, num_samples)`): reconstructions.
        references (`torch.FloatTensor` of the same shape): recordings.

    Returns:
        `torch.FloatTensor` of shape `(num_sounds,)`; the figure is their mean.

    Raises:
        ValueError: for different shapes, and for fewer than 2048 samples.
    """
    _check_pairs(predictions, references)
    return torch.stack([_stft_distance(predictions, references, *sizes) for sizes in STFT_RESOLUTIONS]).mean(0)


def mel_distance(predictions: torch.Tensor, references: torch.Tensor, sampling_rate: int) -> torch.Tensor:
    """
    [`MelLoss`], the mel loss of training, of each sound.

    Args:
        predictions (`torch.FloatTensor` of shape `(num_sounds, num_samples)`): reconstructions.
        references (`torch.FloatTensor` of the same shape): recordings.
        sampling_rate (`int`): of both, in Hz.

    Returns:
        `torch.FloatTensor` of shape `(num_sounds,)`; the figure is their mean.

    Raises:
        ValueError: for different shapes, and for fewer than 2048 samples.
    """
    _check_pairs(predictions, references)
    distance = MelLoss(sampling_rate).to(predictions.device)
    pairs = zip(predictions[:, None, None], references[:, None, None])
    return torch.stack([distance(prediction, reference) for prediction, reference in pairs])


def si_sdr(predictions: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """
    Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019, arXiv 1811.02508), of waveforms without
    their means: a constant isn't heard. Needs torchmetrics, which the extra `eval` installs.

    Args:
        predictions (`torch.FloatTensor` of shape `(num_sounds, num_samples)`): reconstructions.
        references (`torch.FloatTensor` of the same shape): recordings.

    Returns:
        `torch.DoubleTensor` of shape `(num_sounds,)`, larger is better; the figure is their mean.

    Raises:
        ValueError: for different shapes, and for fewer than 2048 samples.
    """
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    _check_pairs(predictions, references)
    return scale_invariant_signal_distortion_ratio(predictions.double(), references.double(), zero_mean=True)


def tokens_per_second(config: SatConfig) -> float:
    """Codes per second of audio; `config.bandwidth` is their bit rate in kbit/s."""
    return config.tokens_per_window * config.sampling_rate / config.window_stride


def _stft_distance(
    predictions: torch.Tensor, references: torch.Tensor, num_fft: int, hop_length: int, window_length: int
) -> torch.Tensor:
    window = torch.hann_window(window_length, dtype=predictions.dtype, device=predictions.device)

    def magnitude(waveforms: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(waveforms, num_fft, hop_length, window_length, window, return_complex=True)
        return (spectrum.real.square() + spectrum.imag.square()).clamp_min(STFT_POWER_FLOOR).sqrt()

    prediction, reference = magnitude(predictions), magnitude(references)
    convergence = torch.linalg.matrix_norm(reference - prediction) / torch.linalg.matrix_norm(reference)
    return convergence + (reference.log() - prediction.log()).abs().mean((-2, -1))


def _check_pairs(predictions: torch.Tensor, references: torch.Tensor) -> None:
    if predictions.ndim != 2 or predictions.shape != references.shape or predictions.shape[1] < MIN_SAMPLES:
        raise ValueError(
            f"Give two batches of waveforms of one shape (num_sounds, num_samples) with at least {MIN_SAMPLES} "
            f"samples, got {tuple(predictions.shape)} and {tuple(references.shape)}."
        )
