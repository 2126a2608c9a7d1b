"""The discriminator of the adversarial training of SAT (arXiv 2408.09027): convolutions on complex spectrograms at
several resolutions, as in EnCodec (arXiv 2210.13438, section 3.4), on the layout (channels, frames, bins).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


class DiscriminatorOutput(NamedTuple):
    """What a multi-scale discriminator says about a batch of audio.

    Attributes:
        logits (`list[torch.FloatTensor]`): per resolution, of shape
            `(batch_size, 1, num_frames, reduced_bins)`; high means real.
        features (`list[list[torch.FloatTensor]]`): per resolution, the five hidden layers' activations, each of shape
            `(batch_size, num_filters, num_frames, reduced_bins)`.
    """

    logits: list[torch.Tensor]
    features: list[list[torch.Tensor]]


class STFTDiscriminator(nn.Module):
    """Convolutions on the complex spectrogram at one resolution.

    Args:
        n_fft (`int`): length of the Fourier transform, in samples.
        hop_length (`int`): samples between frames.
        win_length (`int`): length of the Hann window, in samples.
        num_filters (`int`): channels of the hidden layers.
    """

    time_dilations = (1, 2, 4)
    negative_slope = 0.2

    def __init__(self, n_fft: int, hop_length: int, win_length: int, num_filters: int):
        super().__init__()
        self.n_fft, self.hop_length, self.win_length = n_fft, hop_length, win_length
        self.register_buffer("window", torch.hann_window(win_length), persistent=False)
        # Only the first convolution has no weight norm: published discriminators were trained so.
        self.convs = nn.ModuleList([nn.Conv2d(2, num_filters, (3, 9), padding=(1, 4))])
        for dilation in self.time_dilations:
            strided = nn.Conv2d(
                num_filters, num_filters, (3, 9), stride=(1, 2), dilation=(dilation, 1), padding=(dilation, 4)
            )
            self.convs.append(weight_norm(strided))
        self.convs.append(weight_norm(nn.Conv2d(num_filters, num_filters, 3, padding=1)))
        self.conv_post = weight_norm(nn.Conv2d(num_filters, 1, 3, padding=1))

    def forward(self, audio: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The logits and the hidden layers' activations for audio of shape `(batch_size, 1, num_samples)`."""
        hidden_states = self._spectrogram(audio)
        features = []
        for conv in self.convs:
            hidden_states = F.leaky_relu(conv(hidden_states), self.negative_slope)
            features.append(hidden_states)
        return self.conv_post(hidden_states), features

    def _spectrogram(self, audio: torch.Tensor) -> torch.Tensor:
        spectrogram = torch.stft(
            audio.squeeze(1).float(),
            self.n_fft,
            self.hop_length,
            self.win_length,
            self.window,
            center=False,
            return_complex=True,
        )
        scaled = spectrogram / (self.n_fft / 2) ** 0.5
        return torch.view_as_real(scaled).permute(0, 3, 2, 1)


class MultiScaleSTFTDiscriminator(nn.Module):
    """One `STFTDiscriminator` per resolution.

    Args:
        n_ffts (`Sequence[int]`): lengths of the Fourier transforms, in samples.
        hop_lengths (`Sequence[int]`, *optional*): samples between frames; a quarter of each transform by default.
        win_lengths (`Sequence[int]`, *optional*): lengths of the Hann windows; those of the transforms by default.
        num_filters (`int`): channels of the hidden layers.
    """

    def __init__(
        self,
        n_ffts: Sequence[int] = (1024, 2048, 512, 256, 128),
        hop_lengths: Sequence[int] | None = None,
        win_lengths: Sequence[int] | None = None,
        num_filters: int = 32,
    ):
        super().__init__()
        hop_lengths = hop_lengths or [n_fft // 4 for n_fft in n_ffts]
        win_lengths = win_lengths or n_ffts
        self.discriminators = nn.ModuleList(
            STFTDiscriminator(n_fft, hop_length, win_length, num_filters)
            for n_fft, hop_length, win_length in zip(n_ffts, hop_lengths, win_lengths, strict=True)
        )

    def forward(self, audio: torch.Tensor) -> DiscriminatorOutput:
        """Judges audio.

        Args:
            audio (`torch.Tensor` of shape `(batch_size, 1, num_samples)`): no shorter than the longest transform.
        """
        logits, features = zip(*(discriminator(audio) for discriminator in self.discriminators), strict=True)
        return DiscriminatorOutput(list(logits), list(features))
