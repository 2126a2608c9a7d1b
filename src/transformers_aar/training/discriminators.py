"""The discriminators of the adversarial training of SAT (arXiv 2408.09027): on complex spectrograms at several
resolutions, as in EnCodec (arXiv 2210.13438, section 3.4), and, as in its ablations, on the waveform: folded into
several periods (HiFi-GAN, arXiv 2010.05646, section 2.3) and at several rates (MelGAN, arXiv 1910.06711, section 2.2).
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from ..data.staging import staged_file
from ..layers_sat import at_least_fp32


class DiscriminatorOutput(NamedTuple):
    """What discriminators say about a batch of audio.

    Attributes:
        logits (`list[torch.FloatTensor]`): per resolution, period or rate, of shape `(batch_size, 1, …)`, where `…`
            is `num_frames, reduced_bins` for spectrograms, `reduced_length, period` for periods, and `reduced_length`
            for rates; high means real.
        features (`list[list[torch.FloatTensor]]`): for each of these, the hidden layers' activations, each of shape
            `(batch_size, num_channels, …)`.
    """

    logits: list[torch.Tensor]
    features: list[list[torch.Tensor]]


def judge(
    hidden_states: torch.Tensor, convs: nn.ModuleList, conv_post: nn.Module, negative_slope: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The logits and the hidden layers' activations of a stack of convolutions."""
    features = []
    for conv in convs:
        hidden_states = F.leaky_relu(conv(hidden_states), negative_slope)
        features.append(hidden_states)
    return conv_post(hidden_states), features


class STFTDiscriminator(nn.Module):
    """Convolutions on the complex spectrogram at one resolution, of the layout (channels, frames, bins).

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
        return judge(self._spectrogram(audio), self.convs, self.conv_post, self.negative_slope)

    def _spectrogram(self, audio: torch.Tensor) -> torch.Tensor:
        spectrogram = torch.stft(
            at_least_fp32(audio.squeeze(1)),
            self.n_fft,
            self.hop_length,
            self.win_length,
            self.window,
            center=False,
            return_complex=True,
        )
        scaled = spectrogram / (self.n_fft / 2) ** 0.5
        channels = torch.view_as_real(scaled).permute(0, 3, 2, 1)
        # side by side, which oneDNN's kernels are faster with
        return channels.contiguous(memory_format=torch.channels_last) if audio.device.type == "cpu" else channels


class PeriodDiscriminator(nn.Module):
    """Convolutions along every `period`-th sample of the waveform.

    Args:
        period (`int`): samples.
        channels (`Sequence[int]`): channels of the hidden layers, all of which but the last have stride 3.
    """

    kernel_size = 5
    stride = 3
    negative_slope = 0.1

    def __init__(self, period: int, channels: Sequence[int]):
        super().__init__()
        self.period = period
        self.convs = nn.ModuleList()
        for index, (num_inputs, num_outputs) in enumerate(pairwise((1, *channels)), start=1):
            stride = self.stride if index < len(channels) else 1
            conv = nn.Conv2d(
                num_inputs, num_outputs, (self.kernel_size, 1), (stride, 1), padding=(self.kernel_size // 2, 0)
            )
            self.convs.append(weight_norm(conv))
        self.conv_post = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, audio: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The logits and the hidden layers' activations for audio of shape `(batch_size, 1, num_samples)`."""
        padded = F.pad(audio, (0, -audio.shape[-1] % self.period), mode="reflect")
        return judge(padded.unflatten(-1, (-1, self.period)), self.convs, self.conv_post, self.negative_slope)


class ScaleDiscriminator(nn.Module):
    """Grouped convolutions with wide kernels on the waveform at one rate.

    Args:
        num_poolings (`int`): how often the rate is halved first.
        channels (`Sequence[int]`): multiples of 4, the channels of the hidden layers: the first keeps the rate, the
            others have stride 4 and four input channels per group; one more with the last number of channels follows.
    """

    negative_slope = 0.2
    channels_per_group = 4

    def __init__(self, num_poolings: int, channels: Sequence[int]):
        super().__init__()
        self.pools = nn.Sequential(
            *(nn.AvgPool1d(4, stride=2, padding=1, count_include_pad=False) for _ in range(num_poolings))
        )
        self.convs = nn.ModuleList([weight_norm(nn.Conv1d(1, channels[0], 15, padding=7))])
        for num_inputs, num_outputs in pairwise(channels):
            groups = num_inputs // self.channels_per_group
            strided = nn.Conv1d(num_inputs, num_outputs, 41, stride=4, padding=20, groups=groups)
            self.convs.append(weight_norm(strided))
        self.convs.append(weight_norm(nn.Conv1d(channels[-1], channels[-1], 5, padding=2)))
        self.conv_post = weight_norm(nn.Conv1d(channels[-1], 1, 3, padding=1))

    def forward(self, audio: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The logits and the hidden layers' activations for audio of shape `(batch_size, 1, num_samples)`."""
        return judge(self.pools(audio), self.convs, self.conv_post, self.negative_slope)


class MultiDiscriminator(nn.Module):
    """Several discriminators that judge the same audio.

    Args:
        discriminators (`Sequence[nn.Module]`): each gives logits and a list of activations.
    """

    def __init__(self, discriminators: Sequence[nn.Module]):
        super().__init__()
        self.discriminators = nn.ModuleList(discriminators)

    def forward(self, audio: torch.Tensor) -> DiscriminatorOutput:
        """Judges audio.

        Args:
            audio (`torch.Tensor` of shape `(batch_size, 1, num_samples)`): no shorter than the longest transform.
        """
        logits, features = zip(*(discriminator(audio) for discriminator in self.discriminators), strict=True)
        return DiscriminatorOutput(list(logits), list(features))


class MultiScaleSTFTDiscriminator(MultiDiscriminator):
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
        hop_lengths = hop_lengths or [n_fft // 4 for n_fft in n_ffts]
        win_lengths = win_lengths or n_ffts
        resolutions = zip(n_ffts, hop_lengths, win_lengths, strict=True)
        super().__init__([STFTDiscriminator(*resolution, num_filters) for resolution in resolutions])


class MultiPeriodDiscriminator(MultiDiscriminator):
    """One `PeriodDiscriminator` per period (arXiv 2010.05646, section 2.3).

    Args:
        periods (`Sequence[int]`): in samples; primes, so that they overlap as little as possible.
        channels (`Sequence[int]`): channels of the hidden layers.
    """

    def __init__(
        self, periods: Sequence[int] = (2, 3, 5, 7, 11), channels: Sequence[int] = (32, 128, 512, 1024, 1024)
    ):
        super().__init__([PeriodDiscriminator(period, channels) for period in periods])


class MultiScaleDiscriminator(MultiDiscriminator):
    """One `ScaleDiscriminator` each for the waveform as it is, at half the rate, at a quarter, … (arXiv 1910.06711).

    All layers have weight norm. HiFi-GAN's spectral norm on the first of them counts forward passes, so that training
    would depend on how many micro-batches a batch is cut into.

    Args:
        num_rates (`int`): how many there are.
        channels (`Sequence[int]`): channels of the hidden layers, multiples of 4.
    """

    def __init__(self, num_rates: int = 3, channels: Sequence[int] = (16, 64, 256, 1024, 1024)):
        super().__init__([ScaleDiscriminator(num_poolings, channels) for num_poolings in range(num_rates)])


DISCRIMINATORS = {
    "stft": MultiScaleSTFTDiscriminator,
    "period": MultiPeriodDiscriminator,
    "scale": MultiScaleDiscriminator,
}


class AudioDiscriminator(nn.Module):
    """Any of `DISCRIMINATORS`, whose judgements are listed one after the other.

    Args:
        arguments (`Mapping[str, Mapping[str, Any]]`): by name, the arguments that differ from the defaults.
    """

    def __init__(self, arguments: Mapping[str, Mapping[str, Any]]):
        super().__init__()
        self.arguments = {name: dict(values) for name, values in arguments.items()}
        self.discriminators = nn.ModuleDict(
            {name: DISCRIMINATORS[name](**values) for name, values in self.arguments.items()}
        )

    def forward(self, audio: torch.Tensor) -> DiscriminatorOutput:
        """Judges audio.

        Args:
            audio (`torch.Tensor` of shape `(batch_size, 1, num_samples)`): no shorter than the longest transform.
        """
        outputs = [discriminator(audio) for discriminator in self.discriminators.values()]
        return DiscriminatorOutput(
            [logits for output in outputs for logits in output.logits],
            [features for output in outputs for features in output.features],
        )

    def save(self, path: str | Path) -> None:
        """
        Saves the weights as safetensors, with the arguments in the metadata.

        Raises:
            OSError: where the file can't be written.
        """
        with staged_file(path) as staged:
            save_file(self.state_dict(), staged, metadata={"discriminators": json.dumps(self.arguments)})

    @classmethod
    def load(cls, path: str | Path) -> "AudioDiscriminator":
        """
        Builds the discriminators of a file that `save` wrote, with their weights.

        Raises:
            ValueError: where it is no such file.
        """
        try:
            with safe_open(path, "pt") as file:
                discriminator = cls(json.loads(file.metadata()["discriminators"]))
                discriminator.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} is no discriminator as this package saves it; remove it to start anew."
            ) from error
        return discriminator
