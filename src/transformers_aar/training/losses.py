"""Losses of the tokenizer's adversarial training, and their weighted sum.

The generator minimises `3 adversarial + 3 feature + 0.1 wave + mel + commitment` (arXiv 2408.09027).
The published wave loss is `torch.nn.functional.l1_loss` on samples, and the commitment loss comes from the quantizer.
All are computed in float32, or in float64 where their arguments have it.
"""

import warnings
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torchaudio.transforms import MelSpectrogram

from ..layers_sat import at_least_fp32

SAT_LOSS_WEIGHTS = {"adversarial": 3.0, "feature": 3.0, "wave": 0.1, "mel": 1.0, "commitment": 1.0}
# The losses that need a discriminator.
ADVERSARIAL_LOSSES = ("adversarial", "feature")


class MelLoss(nn.Module):
    """L1 plus mean squared distance of log-mel spectrograms, summed over window lengths of 32, 64, … 2048 samples.

    Each resolution has 64 bands on the Slaney scale from 0 Hz to Nyquist, a Hann window, a hop of a quarter of it, and
    takes log10 of the power. Autocast makes no difference.

    Args:
        sampling_rate (`int`): samples per second of the audio that is compared.
    """

    window_lengths = tuple(2**exponent for exponent in range(5, 12))
    num_bands = 64
    floor = 1e-5

    def __init__(self, sampling_rate: int):
        super().__init__()
        with warnings.catch_warnings():
            # The shortest windows have more bands than bins. The empty bands only dilute the mean, and are kept
            # so that values compare with published ones.
            warnings.filterwarnings("ignore", message="At least one mel filterbank")
            self.spectrograms = nn.ModuleList(
                MelSpectrogram(
                    sampling_rate,
                    n_fft=length,
                    hop_length=length // 4,
                    n_mels=self.num_bands,
                    center=False,
                    norm="slaney",
                    mel_scale="slaney",
                )
                for length in self.window_lengths
            )

    def forward(self, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Distance between two batches of audio.

        Args:
            fake (`torch.Tensor` of shape `(batch_size, 1, num_samples)`): the reconstruction.
            real (`torch.Tensor` of the same shape): the recording.

        Returns:
            `torch.FloatTensor` of shape `()`.
        """
        losses = []
        with torch.autocast(fake.device.type, enabled=False):
            for spectrogram in self.spectrograms:
                fake_mel, real_mel = self._log_mel(spectrogram, fake), self._log_mel(spectrogram, real)
                losses += [F.l1_loss(fake_mel, real_mel), F.mse_loss(fake_mel, real_mel)]
        return torch.stack(losses).sum()

    def _log_mel(self, spectrogram: MelSpectrogram, audio: torch.Tensor) -> torch.Tensor:
        padding = (spectrogram.n_fft - spectrogram.hop_length) // 2
        padded = F.pad(at_least_fp32(audio), (padding, padding), mode="reflect")
        return spectrogram(padded).clamp(min=self.floor).log10()


def relative_error(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Energy of the difference over that of the recording, averaged over recordings: a scalar.

    A figure of the validation, no loss. Recordings below -40 dB count as if they were that loud: otherwise the
    quietest ones, which are mostly background, would decide what it is.

    Args:
        fake (`torch.Tensor` of shape `(batch_size, 1, num_samples)`): the reconstruction.
        real (`torch.Tensor` of the same shape): the recording.
    """
    real = at_least_fp32(real)
    powers = real.square().mean((1, 2)).clamp(min=1e-4)
    return ((fake - real).square().mean((1, 2)) / powers).mean()


def adversarial_loss(fake_logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """The generator's hinge loss, `mean_k relu(1 - D_k(fake))`, a scalar.

    Args:
        fake_logits (`Sequence[torch.Tensor]`): each discriminator's logits on the reconstruction, of any shape.
    """
    return torch.stack([F.relu(1 - at_least_fp32(logits)).mean() for logits in fake_logits]).mean()


def discriminator_loss(real_logits: Sequence[torch.Tensor], fake_logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """The discriminators' hinge loss, `mean_k relu(1 - D_k(real)) + relu(1 + D_k(fake))`, a scalar.

    Args:
        real_logits (`Sequence[torch.Tensor]`): each discriminator's logits on the recording, of any shape.
        fake_logits (`Sequence[torch.Tensor]`): the same on the reconstruction, which the caller detaches.
    """
    # relu(1 + D(fake)) is the hinge loss of -D(fake)
    return adversarial_loss(real_logits) + adversarial_loss([-logits for logits in fake_logits])


def feature_matching_loss(
    real_features: Sequence[Sequence[torch.Tensor]],
    fake_features: Sequence[Sequence[torch.Tensor]],
    magnitudes: torch.Tensor | None = None,
) -> torch.Tensor:
    """L1 distance of the discriminators' activations relative to the recording's mean magnitude, a scalar.

    The mean over discriminators k and layers l of `L1(D_k^l(real), D_k^l(fake)) / mean |D_k^l(real)|`.

    Args:
        real_features (`Sequence[Sequence[torch.Tensor]]`): per discriminator and layer, activations on the recording.
        fake_features (`Sequence[Sequence[torch.Tensor]]`): the same on the reconstruction.
        magnitudes (`torch.Tensor` of shape `(num_layers,)`, *optional*): the denominators, where the batch is a part
            of a larger one: the mean over all parts of their [`mean_magnitudes`]. By default those of this batch.
    """
    if magnitudes is None:
        magnitudes = mean_magnitudes(real_features)
    distances = [
        F.l1_loss(at_least_fp32(fake), at_least_fp32(real.detach()))
        for real_layers, fake_layers in zip(real_features, fake_features, strict=True)
        for real, fake in zip(real_layers, fake_layers, strict=True)
    ]
    return (torch.stack(distances) / magnitudes).mean()


@torch.no_grad()
def mean_magnitudes(real_features: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Mean magnitude of each layer's activations, of shape `(num_layers,)`, discriminator by discriminator.

    Args:
        real_features (`Sequence[Sequence[torch.Tensor]]`): per discriminator and layer, activations on the recording.
    """
    return torch.stack([at_least_fp32(real).abs().mean() for layers in real_features for real in layers])


def weighted_sum(losses: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """The sum of each loss times its weight, a scalar.

    Args:
        losses (`Mapping[str, torch.Tensor]`): scalars by name.
        weights (`Mapping[str, float]`): a weight for each of these names, such as `SAT_LOSS_WEIGHTS`.
    """
    return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
