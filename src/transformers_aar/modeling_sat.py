"""SAT, the scale-level audio tokenizer: SEANet blocks around a multi-scale residual quantizer (arXiv 2408.09027)."""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
from transformers.models.encodec.modeling_encodec import EncodecConv1d, EncodecDecoder, EncodecEncoder
from transformers.utils import ModelOutput

from .configuration_sat import SatConfig


@dataclass
class SatEncoderOutput(ModelOutput):
    """
    Args:
        audio_codes (`torch.LongTensor` of shape `(batch_size, num_windows, tokens)`):
            Codes of every window, one scale after the other, coarse first. `tokens` is `config.tokens_per_window`, or
            less when only the first scales were asked for. Windows that lie entirely in the padding hold zeros.
        audio_codes_mask (`torch.BoolTensor` of shape `(batch_size, num_windows)`):
            False for windows that lie entirely in the padding.
    """

    audio_codes: torch.LongTensor | None = None
    audio_codes_mask: torch.BoolTensor | None = None


@dataclass
class SatDecoderOutput(ModelOutput):
    """
    Args:
        audio_values (`torch.FloatTensor` of shape `(batch_size, audio_channels, num_samples)`):
            Decoded waveform.
    """

    audio_values: torch.FloatTensor | None = None


@dataclass
class SatOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            Mean absolute error of the waveform plus the commitment loss: a complete, if plain, training objective.
            Absent when `audio_codes` were given.
        audio_codes (`torch.LongTensor` of shape `(batch_size, num_windows, tokens_per_window)`):
            Codes of every window, coarse scales first.
        audio_values (`torch.FloatTensor` of shape `(batch_size, audio_channels, num_samples)`):
            Reconstruction, of the input's length.
        commitment_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Mean of the scales' commitment losses. Absent when `audio_codes` were given.
    """

    loss: torch.FloatTensor | None = None
    audio_codes: torch.LongTensor | None = None
    audio_values: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None


@dataclass
class SatQuantizerOutput(ModelOutput):
    """
    Args:
        audio_codes (`torch.LongTensor` of shape `(batch_size, tokens_per_window)`):
            Codes of all scales, coarse first.
        quantized (`torch.FloatTensor` of shape `(batch_size, hidden_size, num_frames)`):
            Sum of the scales' contributions, projected to the decoder's width; gradients pass straight through.
        commitment_losses (`torch.FloatTensor` of shape `(num_scales,)`):
            Commitment loss of each scale.
    """

    audio_codes: torch.LongTensor | None = None
    quantized: torch.FloatTensor | None = None
    commitment_losses: torch.FloatTensor | None = None


@dataclass
class _ScaleStep:
    """What the residual quantization of one scale yields; see `SatQuantizer._quantize`."""

    codes: torch.LongTensor
    pooled: torch.Tensor
    residual: torch.Tensor
    contribution: torch.Tensor


def _channels_last(hidden_states: torch.Tensor) -> torch.Tensor:
    """`(batch_size, channels, length)` as an image `(batch_size, channels, 1, length)`, its channels side by side."""
    return hidden_states[:, :, None].contiguous(memory_format=torch.channels_last)


class ChannelsLastConv1d(nn.Conv1d):
    """
    `nn.Conv1d` that takes and leaves the channels of a frame side by side in memory on CPUs, where oneDNN's kernels
    are up to twice as fast that way. PyTorch has the layout for images only; what is elementwise keeps it.
    """

    def _conv_forward(self, hidden_states, weight, bias):
        if hidden_states.device.type != "cpu":
            return super()._conv_forward(hidden_states, weight, bias)
        if self.kernel_size == (1,) and self.stride == (1,) and hidden_states.dtype == torch.float32:
            # which PyTorch gives to a kernel without that layout
            return F.linear(hidden_states.transpose(1, 2), weight[:, :, 0], bias).transpose(1, 2)
        stride, padding, dilation = (1, *self.stride), (0, *self.padding), (1, *self.dilation)
        image = _channels_last(hidden_states)
        return F.conv2d(image, weight[:, :, None], bias, stride, padding, dilation).squeeze(2)


class ChannelsLastConvTranspose1d(nn.ConvTranspose1d):
    """As [`ChannelsLastConv1d`]."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.device.type != "cpu":
            return super().forward(hidden_states)
        image = _channels_last(hidden_states)
        return F.conv_transpose2d(image, self.weight[:, :, None], self.bias, (1, *self.stride)).squeeze(2)


def specialize(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives a module that others have built this class, beneath its parametrization if it has one."""
    if parametrize.is_parametrized(module):  # which has made a class for this module alone
        type(module).__bases__ = (cls,)
    else:
        module.__class__ = cls


class SatConv1d(EncodecConv1d):
    """
    EnCodec's convolution with its padding in plain integers. The parent keeps strides and paddings in buffers, so that
    each layer waits for the device to learn how much to pad.
    """

    @classmethod
    def convert(cls, conv: EncodecConv1d) -> None:
        """Turns a convolution that [`EncodecEncoder`] or [`EncodecDecoder`] has built into one of this class."""
        conv.__class__ = cls
        for name in ("stride", "kernel_size", "padding_total"):
            delattr(conv, name)
        conv.stride = conv.conv.stride[0]
        conv.kernel_size = (conv.conv.kernel_size[0] - 1) * conv.conv.dilation[0] + 1
        conv.padding_total = conv.kernel_size - conv.stride

    def _get_extra_padding_for_conv1d(self, hidden_states: torch.Tensor) -> int:
        # all samples must be covered by a stride: the padded length is a multiple of it
        return -hidden_states.shape[-1] % self.stride

    @staticmethod
    def _pad1d(hidden_states: torch.Tensor, paddings: tuple[int, int], mode: str = "zero", value: float = 0.0):
        """The parent's, but without a copy where there is nothing to pad, and frame by frame on CPUs."""
        if not any(paddings):
            return hidden_states
        is_plain = mode == "reflect" and hidden_states.shape[-1] > max(paddings)
        if not is_plain or hidden_states.device.type != "cpu":
            return EncodecConv1d._pad1d(hidden_states, paddings, mode, value)
        left, right = paddings
        frames = hidden_states.transpose(1, 2)
        before, after = frames[:, 1 : left + 1].flip(1), frames[:, frames.shape[1] - right - 1 : -1].flip(1)
        return torch.cat([before, frames, after], dim=1).transpose(1, 2)


class FoldedWeightNorm(nn.Module):
    """
    Weight normalisation w = g · v / ‖v‖ that is computed anew only when a gradient is wanted. Otherwise the product is
    kept until one of its factors changes, so that inference pays for it once and checkpoints have one layout.
    """

    def __init__(self):
        super().__init__()
        self._folded = None
        self._folded_from = None
        self._factors = None

    def forward(self, magnitude: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and (magnitude.requires_grad or direction.requires_grad):
            self._folded = self._folded_from = self._factors = None
            return torch._weight_norm(direction, magnitude, 0)
        if torch.compiler.is_compiling() or direction.is_inference():  # neither lets changes be noticed
            return torch._weight_norm(direction, magnitude, 0)
        state = [(part.data_ptr(), part._version, part.dtype, part.device) for part in (magnitude, direction)]
        if state != self._folded_from:
            # held, so that replaced factors can't turn up at the address of those that were folded
            self._factors = magnitude.detach(), direction.detach()
            with torch.inference_mode(False):  # a later call may want gradients of the convolution's input
                self._folded = torch._weight_norm(direction.detach(), magnitude.detach(), 0)
            self._folded_from = state
        return self._folded


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32, or in its own dtype where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class AtLeastFp32:
    """
    Mixin for modules whose tensors follow the model to any device but never fall below fp32. Where PyTorch's default
    is a shorter dtype they start in it, until anything is applied to them.
    """

    def _apply(self, fn, recurse=True):
        def at_least_fp32(tensor):
            moved = fn(tensor)
            if moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32:
                return tensor.to(moved.device, torch.float32)
            return moved

        return super()._apply(at_least_fp32, recurse)


def nearest_phi(num_scales: int, num_phi: int) -> list[int]:
    """
    Index of the convolution φ that each scale uses: the one whose tick lies nearest to s/(S − 1) ("partially shared").

    Args:
        num_scales (`int`): S. num_phi (`int`): K, at least 1.

    Returns:
        `list[int]` of length S. Exact ties are decided by float64 rounding; published checkpoints depend on it.
    """
    # the reference spaces its ticks differently for K = 4
    margin = 1 / (3 * num_phi) if num_phi == 4 else 1 / (2 * num_phi)
    ticks = torch.linspace(margin, 1 - margin, num_phi, dtype=torch.float64, device="cpu").tolist()
    positions = [scale / max(num_scales - 1, 1) for scale in range(num_scales)]
    return [min(range(num_phi), key=lambda index: abs(ticks[index] - position)) for position in positions]  # noqa: B023


def in_full_precision(method):
    """Runs a quantizer's method without autocast: nearest codes and running sums don't survive half precision."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        with torch.autocast(self.codebook.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return wrapper


class SatQuantizer(AtLeastFp32, nn.Module):
    """
    MSRQ, multi-scale residual quantization (paper, section 3.1). Scale s pools the residual r to n_s vectors, replaces
    each by the nearest of its own codebook, interpolates them back to H frames and subtracts h = φ_s(…) from r. All of
    it runs in fp32 or wider, whatever the dtype of the model around it.

    In training mode every forward also moves the codebooks: k-means on the first batch, then exponential moving
    averages of the pooled vectors, and a restart of codes that hardly any vector chooses. Sums are taken over all
    processes, and random choices are drawn alike on each, so that codebooks never drift apart.
    """

    def __init__(self, config: SatConfig):
        super().__init__()
        self.scales = list(config.scales)
        self.codebook_size = config.codebook_size
        self.codebook_decay = config.codebook_decay
        self.dead_code_threshold = config.dead_code_threshold
        self.kmeans_iterations = config.kmeans_iterations
        num_scales, dim = config.num_scales, config.codebook_dim

        has_projections = config.hidden_size != dim
        self.project_in = nn.Linear(config.hidden_size, dim) if has_projections else nn.Identity()
        self.project_out = nn.Linear(dim, config.hidden_size) if has_projections else nn.Identity()
        self.phi = nn.ModuleList(
            ChannelsLastConv1d(dim, dim, size, padding=size // 2) for size in config.phi_kernel_sizes
        )
        self.phi_of_scale = nearest_phi(num_scales, len(self.phi)) if len(self.phi) else []

        self.register_buffer("codebook", torch.empty(num_scales, config.codebook_size, dim))
        self.register_buffer("codebook_sum", torch.empty(num_scales, config.codebook_size, dim))
        self.register_buffer("cluster_size", torch.empty(num_scales, config.codebook_size))
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("num_updates", torch.tensor(0))

        # (pooled vectors of every scale, codes of every scale) of each forward since the last codebook update
        self._pending: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        self._defer_update = False

    # --- from vectors to codes and back ------------------------------------------------------------------------------

    def _nearest(self, vectors: torch.Tensor, scale: int) -> torch.LongTensor:
        """Codes `(batch_size, n_s)` of vectors `(batch_size, n_s, codebook_dim)`: argmin_k ‖u − e_k‖²."""
        codebook = self.codebook[scale]
        # ‖u‖² is the same for all entries
        similarity = torch.addmm(codebook.square().sum(-1) / -2, vectors.flatten(0, 1), codebook.T)
        return similarity.argmax(-1).view(vectors.shape[:-1])

    @staticmethod
    def _pool(hidden: torch.Tensor, length: int) -> torch.Tensor:
        """Area interpolation of `(batch_size, codebook_dim, num_frames)` to `(batch_size, length, codebook_dim)`."""
        if hidden.shape[-1] != length:
            hidden = F.interpolate(hidden, size=length, mode="area")
        return hidden.transpose(1, 2)

    def _contribution(self, vectors: torch.Tensor, scale: int, num_frames: int) -> torch.Tensor:
        """h = φ_s(v), `(batch_size, codebook_dim, num_frames)`, of code vectors `(batch_size, n_s, codebook_dim)`."""
        hidden = vectors.transpose(1, 2)
        if hidden.shape[-1] != num_frames:
            hidden = F.interpolate(hidden, size=num_frames, mode="linear", align_corners=False)
        if not self.phi_of_scale:
            return hidden
        return 0.5 * hidden + 0.5 * self.phi[self.phi_of_scale[scale]](hidden)

    def _quantize(self, latents: torch.Tensor, num_scales: int, start_codebooks: bool = False) -> Iterator[_ScaleStep]:
        """Residual quantization of `(batch_size, codebook_dim, num_frames)`, scale by scale (SPEC step a to e)."""
        residual = latents
        for scale, length in enumerate(self.scales[:num_scales]):
            pooled = self._pool(residual, length)
            if start_codebooks:
                self._start_codebook(scale, pooled.flatten(0, 1))
            codes = self._nearest(pooled.detach(), scale)
            contribution = self._contribution(self.codebook[scale][codes], scale, latents.shape[-1])
            yield _ScaleStep(codes, pooled, residual, contribution)
            residual = residual - contribution.detach()

    def _project_in(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.project_in(hidden.to(self.codebook.dtype).transpose(1, 2)).transpose(1, 2)

    @in_full_precision
    def project_f_hat(self, f_hat: torch.Tensor) -> torch.Tensor:
        """The decoder's input `(batch_size, hidden_size, num_frames)` of a running sum."""
        return self.project_out(f_hat.transpose(1, 2)).transpose(1, 2)

    @in_full_precision
    def encode(self, hidden: torch.Tensor, max_scales: int | None = None) -> torch.LongTensor:
        """
        Codes of the encoder's output.

        Args:
            hidden (`torch.Tensor` of shape `(batch_size, hidden_size, num_frames)`).
            max_scales (`int`, *optional*): stop after this many scales.

        Returns:
            `torch.LongTensor` of shape `(batch_size, tokens)`, coarse scales first.
        """
        steps = self._quantize(self._project_in(hidden), max_scales or len(self.scales))
        return torch.cat([step.codes for step in steps], dim=-1)

    @in_full_precision
    def decode(self, codes: torch.LongTensor) -> torch.Tensor:
        """
        The decoder's input from codes `(batch_size, tokens)` of all or of the first scales.

        Returns:
            `torch.Tensor` of shape `(batch_size, hidden_size, num_frames)`.
        """
        f_hat = self.empty_f_hat(codes.shape[0])
        for scale, scale_codes in enumerate(self.split(codes)):
            f_hat = f_hat + self._contribution(self.codebook[scale][scale_codes], scale, self.scales[-1])
        return self.project_f_hat(f_hat)

    @in_full_precision
    def forward(self, hidden: torch.Tensor) -> SatQuantizerOutput:
        """
        Quantizes `(batch_size, hidden_size, num_frames)` with gradients, and in training mode moves the codebooks.

        The commitment loss of a scale is mse(sg(h), r) + mse(h, sg(r)): the first term trains the encoder, the second
        φ. The output passes its gradient straight through to the encoder, once.
        """
        latents = self._project_in(hidden)
        if self.training and not self.initialized:
            self.start_codebooks(hidden)
        f_hat, codes, pooled, losses = 0.0, [], [], []
        for step in self._quantize(latents, len(self.scales)):
            f_hat = f_hat + step.contribution.detach()
            codes.append(step.codes)
            pooled.append(step.pooled.detach())
            losses.append(
                F.mse_loss(step.contribution.detach(), step.residual)
                + F.mse_loss(step.contribution, step.residual.detach())
            )
        straight_through = latents + (f_hat - latents).detach()
        output = SatQuantizerOutput(
            audio_codes=torch.cat(codes, dim=-1),
            quantized=self.project_f_hat(straight_through),
            commitment_losses=torch.stack(losses),
        )
        if self.training:
            self._pending.append((pooled, codes))
            if not self._defer_update:
                self._update_codebooks()
        return output

    # --- scale by scale, for a generator -----------------------------------------------------------------------------

    def split(self, codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Splits the last axis, which holds all or the first few whole scales, into one tensor per scale."""
        num_scales = len(self._whole_scales(codes.shape[-1]))
        return codes.split(self.scales[:num_scales], dim=-1)

    def _whole_scales(self, num_tokens: int) -> list[int]:
        """The scales that `num_tokens` tokens fill; a `ValueError` when the last one isn't complete."""
        for count in range(1, len(self.scales) + 1):
            if sum(self.scales[:count]) == num_tokens:
                return self.scales[:count]
        lengths = [sum(self.scales[: count + 1]) for count in range(len(self.scales))]
        raise ValueError(
            f"A window of {num_tokens} codes is not a number of whole scales; give one of {lengths} codes per window."
        )

    def empty_f_hat(self, batch_size: int) -> torch.Tensor:
        """Zeros `(batch_size, codebook_dim, num_frames)`: the running sum before the first scale."""
        return self.codebook.new_zeros(batch_size, self.codebook.shape[-1], self.scales[-1])

    @in_full_precision
    def accumulate(
        self, f_hat: torch.Tensor, tokens: torch.Tensor, scale: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Adds one scale to the running sum.

        Args:
            f_hat (`torch.FloatTensor` of shape `(batch_size, codebook_dim, num_frames)`): sum of the scales before.
            tokens (`torch.LongTensor` of shape `(batch_size, n_s)`, or `torch.FloatTensor` of shape
                `(batch_size, n_s, codebook_dim)`): codes of the scale, or mixtures of its code vectors.
            scale (`int`): s, counted from 0.

        Returns:
            The new sum, and the sum pooled to `(batch_size, n_{s+1}, codebook_dim)`, from which the next scale is
            predicted; `None` after the last scale.
        """
        vectors = tokens if tokens.is_floating_point() else self.codebook[scale][tokens]
        f_hat = f_hat + self._contribution(vectors, scale, f_hat.shape[-1])
        if scale + 1 == len(self.scales):
            return f_hat, None
        return f_hat, self._pool(f_hat, self.scales[scale + 1])

    @in_full_precision
    def mix(self, weights: torch.Tensor, scale: int) -> torch.Tensor:
        """Mixtures `(batch_size, n_s, codebook_dim)` of a scale's code vectors, by weights `(…, codebook_size)`."""
        return weights.to(self.codebook.dtype) @ self.codebook[scale]

    @in_full_precision
    def next_scale_inputs(self, audio_codes: torch.LongTensor) -> torch.Tensor:
        """
        What a generator sees of codes when it is trained on them (teacher forcing): before each scale but the first
        the sum of all earlier scales, pooled to the scale's length.

        Args:
            audio_codes (`torch.LongTensor` of shape `(..., tokens_per_window)`).

        Returns:
            `torch.FloatTensor` of shape `(windows, tokens_per_window − n_0, codebook_dim)`, leading axes flattened.
        """
        codes = audio_codes.flatten(0, -2)
        f_hat, inputs = self.empty_f_hat(codes.shape[0]), []
        for scale, scale_codes in enumerate(self.split(codes)[:-1]):
            f_hat, next_input = self.accumulate(f_hat, scale_codes, scale)
            inputs.append(next_input)
        if not inputs:
            return f_hat.new_zeros(codes.shape[0], 0, f_hat.shape[1])
        return torch.cat(inputs, dim=1)

    # --- codebook training -------------------------------------------------------------------------------------------

    @in_full_precision
    @torch.no_grad()
    def start_codebooks(self, hidden: torch.Tensor) -> None:
        """
        k-means start of all codebooks, coarse scales first, from encoder outputs `(batch_size, hidden_size,
        num_frames)` of this process and all others. Training mode calls it with its first batch; call it yourself to
        start from more than that.
        """
        for _ in self._quantize(self._project_in(hidden), len(self.scales), start_codebooks=True):
            pass
        self.initialized.fill_(True)

    def _start_codebook(self, scale: int, vectors: torch.Tensor) -> None:
        vectors = _gather(vectors)
        generator = torch.Generator().manual_seed(scale)
        means, counts = _kmeans(vectors, self.codebook_size, self.kmeans_iterations, generator)
        for tensor in (means, counts):  # sums on a GPU depend on their order: all processes take the first one's
            if _is_distributed():
                dist.broadcast(tensor, src=0)
        self.codebook[scale] = means
        self.cluster_size[scale] = counts
        self.codebook_sum[scale] = means * counts[:, None]

    @torch.no_grad()
    def _update_codebooks(self) -> None:
        """
        One step of the moving averages from every vector quantized since the last step, on all processes:
        N ← decay·N + (1 − decay)·n, m ← decay·m + (1 − decay)·Σu, e = m / N with Laplace-smoothed N. Codes whose N is
        below a share of the scale's mean then restart from vectors of the batch.
        """
        pooled = [torch.cat(parts) for parts in zip(*(entry[0] for entry in self._pending), strict=True)]
        codes = [torch.cat(parts) for parts in zip(*(entry[1] for entry in self._pending), strict=True)]
        self._pending.clear()

        counts = torch.zeros_like(self.cluster_size)
        sums = torch.zeros_like(self.codebook_sum)
        for scale, (scale_vectors, scale_codes) in enumerate(zip(pooled, codes, strict=True)):
            index = scale_codes.flatten()
            counts[scale].index_add_(0, index, counts.new_ones(len(index)))
            sums[scale].index_add_(0, index, scale_vectors.flatten(0, 1))
        if _is_distributed():
            for tensor in (counts, sums):
                dist.all_reduce(tensor)

        self.cluster_size.lerp_(counts, 1 - self.codebook_decay)
        self.codebook_sum.lerp_(sums, 1 - self.codebook_decay)
        epsilon = 1e-5
        total = self.cluster_size.sum(-1, keepdim=True)
        smoothed = (self.cluster_size + epsilon) / (total + self.codebook_size * epsilon) * total
        self.codebook.copy_(self.codebook_sum / smoothed[..., None])

        mean_size = self.cluster_size.mean(-1, keepdim=True).expand_as(self.cluster_size)
        dead = self.cluster_size < self.dead_code_threshold * mean_size
        # sampling takes the host far longer than asking; of summed counts all processes get the same answer
        if dead.any():
            samples = self._sample_vectors(pooled)
            self.codebook.copy_(torch.where(dead[..., None], samples, self.codebook))
            self.codebook_sum.copy_(torch.where(dead[..., None], samples * mean_size[..., None], self.codebook_sum))
            self.cluster_size.copy_(torch.where(dead, mean_size, self.cluster_size))
        self.num_updates += 1

    def _sample_vectors(self, pooled: list[torch.Tensor]) -> torch.Tensor:
        """
        One random vector of the batch per code, `(num_scales, codebook_size, codebook_dim)`. The choice is made over
        the batch of all processes, of which each fills in the vectors that it owns. Where a vector is drawn again it
        gets a little noise: which of two equal codes is nearer would be left to rounding, and that depends on how a
        batch is shared by processes.
        """
        batch_sizes = _gather(torch.tensor([len(pooled[0])], device=self.codebook.device))
        rank = dist.get_rank() if _is_distributed() else 0
        first, total = int(batch_sizes[:rank].sum()), int(batch_sizes.sum())
        generator = torch.Generator().manual_seed(int(self.num_updates))
        draws = torch.rand(len(self.scales), self.codebook_size, generator=generator, dtype=torch.float64)
        noise = torch.randn(self.codebook.shape, generator=generator, dtype=torch.float64)
        samples = torch.zeros_like(self.codebook_sum)
        for scale, vectors in enumerate(pooled):
            length = vectors.shape[1]
            drawn = (draws[scale] * total * length).long()
            index = drawn.to(vectors.device) - first * length
            owned = (index >= 0) & (index < len(vectors) * length)
            chosen = vectors.flatten(0, 1)[index.clamp(0, len(vectors) * length - 1)]
            factors = 1 + 0.01 * noise[scale] * _is_repeated(drawn)[:, None]
            samples[scale] = chosen * owned[:, None] * factors.to(chosen)
        if _is_distributed():
            dist.all_reduce(samples)
        return samples


def _is_repeated(values: torch.Tensor) -> torch.BoolTensor:
    """Which entries of a vector have occurred before in it."""
    order = values.argsort(stable=True)
    repeated = torch.zeros_like(values, dtype=torch.bool)
    repeated[order[1:]] = values[order[1:]] == values[order[:-1]]
    return repeated


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenates every process's tensor along the first axis, in the order of the ranks; lengths may differ."""
    if not _is_distributed():
        return tensor
    length = torch.tensor([len(tensor)], device=tensor.device)
    lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    longest = max(int(entry) for entry in lengths)
    padded = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(entry)] for part, entry in zip(parts, lengths, strict=True)])


def _kmeans(
    vectors: torch.Tensor, num_clusters: int, iterations: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Means `(num_clusters, dim)` and sizes `(num_clusters,)` of vectors `(num_vectors, dim)`. Clusters that stay empty
    (always, when there are fewer vectors than clusters) are given a sampled vector with a little noise and size 1.
    """

    def sample() -> torch.Tensor:
        if len(vectors) >= num_clusters:
            index = torch.randperm(len(vectors), generator=generator)[:num_clusters]
        else:
            index = torch.randint(len(vectors), (num_clusters,), generator=generator)
        return vectors[index.to(vectors.device)]

    means = sample()
    for _ in range(iterations):
        nearest = (vectors @ means.T - means.square().sum(-1) / 2).argmax(-1)
        counts = vectors.new_zeros(num_clusters).index_add_(0, nearest, vectors.new_ones(len(vectors)))
        sums = torch.zeros_like(means).index_add_(0, nearest, vectors)
        means = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], means)
    noise = torch.randn(means.shape, generator=generator, dtype=torch.float64).to(means)
    spread = vectors.std(0, correction=0) if len(vectors) > 1 else torch.ones_like(means[0])
    empty = counts == 0
    means = torch.where(empty[:, None], sample() + 0.01 * spread * noise, means)
    return means, torch.where(empty, torch.ones_like(counts), counts)


class SharingMixin:
    """
    What both models do when they are saved: name all their Auto classes, and bring a model card. Loaded they are from
    safetensors only.
    """

    # called with (model, folder); the package sets it, and without the package there is no card
    model_card_writer: ClassVar[Callable | None] = None
    # Auto classes besides the one that the library records by itself
    other_auto_classes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        if kwargs.get("use_safetensors") is False:
            raise ValueError("Only safetensors are loaded: leave out `use_safetensors=False`, or convert the weights.")
        return super().from_pretrained(*args, **kwargs | {"use_safetensors": True})

    def save_pretrained(self, save_directory, **kwargs):
        for name in self.config.sub_configs:
            # what loading writes there: a model that was loaded is saved with the same configuration again
            if (sub_config := getattr(self.config, name)) is not None:
                sub_config.dtype = self.dtype
        for name in self.config._get_generation_parameters():
            # the pipeline of some versions leaves its arguments here, and the library then refuses to save
            delattr(self.config, name)
        if self._auto_class is not None:
            name = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
            known = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = known | dict.fromkeys(self.other_auto_classes, name)
        super().save_pretrained(save_directory, **kwargs)
        self._write_model_card(save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # by now the library has put its stock card over ours
        self._write_model_card(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _write_model_card(self, folder) -> None:
        # a backbone by itself has no Auto class, and no card
        if SharingMixin.model_card_writer is not None and self._auto_class is not None:
            SharingMixin.model_card_writer(self, folder)


class SatPreTrainedModel(SharingMixin, PreTrainedAudioTokenizerBase):
    config_class = SatConfig
    base_model_prefix = "sat"
    main_input_name = "input_values"
    input_modalities = "audio"
    other_auto_classes = ("AutoModelForAudioTokenization",)
    _no_split_modules = ["SatQuantizer", "EncodecResnetBlock", "EncodecLSTM"]
    # not all of the quantizer: its flag and its counter are no floating-point tensors, and would become some
    _keep_in_fp32_modules_strict = [
        *("quantizer.codebook", "quantizer.cluster_size", "quantizer.phi"),
        *("quantizer.project_in", "quantizer.project_out"),
    ]
    # published folders may leave out what only training needs; it then restarts from the codebooks
    _keys_to_ignore_on_load_missing = [r"quantizer\.codebook_sum$"]
    # the codec has no attention; a generator's choice is handed down to it all the same
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    @torch.no_grad()
    def _init_weights(self, module):
        """PyTorch's own defaults, as in the reference, through helpers that leave loaded tensors alone."""
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d, nn.Linear)):
            if parametrize.is_parametrized(module, "weight"):
                magnitude = module.parametrizations.weight.original0
                weight = module.parametrizations.weight.original1
                init.kaiming_uniform_(weight, a=math.sqrt(5))
                init.copy_(magnitude, torch.norm_except_dim(weight, 2, 0))
            else:
                weight = module.weight
                init.kaiming_uniform_(weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LSTM):
            for parameter in module.parameters():
                init.uniform_(parameter, -1 / math.sqrt(module.hidden_size), 1 / math.sqrt(module.hidden_size))
        elif isinstance(module, SatQuantizer):
            init.uniform_(module.codebook, -1.0, 1.0)
            init.ones_(module.cluster_size)
            init.copy_(module.codebook_sum, module.codebook * module.cluster_size[..., None])
            init.zeros_(module.initialized)
            init.zeros_(module.num_updates)


class SatModel(SatPreTrainedModel):
    """
    The scale-level audio tokenizer: audio of any length becomes windows of one second, and each window
    `config.tokens_per_window` codes in `config.num_scales` scales, coarse to fine.

    Example:

    ```python
    >>> from transformers import AutoFeatureExtractor, AutoModel
    >>> import transformers_aar

    >>> model = AutoModel.from_pretrained(folder)
    >>> feature_extractor = AutoFeatureExtractor.from_pretrained(folder)
    >>> inputs = feature_extractor(waveform, sampling_rate=24_000, return_tensors="pt")
    >>> with torch.no_grad():
    ...     codes = model.encode(**inputs).audio_codes
    ...     waveform = model.decode(codes, padding_mask=inputs["padding_mask"]).audio_values
    ```"""

    # windows that `encode` and `decode` hold in memory at once, some 30 MB each for the published sizes
    windows_per_batch = 32

    def __init__(self, config: SatConfig):
        super().__init__(config)
        self.encoder = EncodecEncoder(config)
        self.decoder = EncodecDecoder(config)
        self.quantizer = SatQuantizer(config)
        for module in [*self.encoder.modules(), *self.decoder.modules()]:
            if isinstance(module, EncodecConv1d):
                SatConv1d.convert(module)
            elif isinstance(module, nn.Conv1d):
                specialize(module, ChannelsLastConv1d)
            elif isinstance(module, nn.ConvTranspose1d):
                specialize(module, ChannelsLastConvTranspose1d)
            if parametrize.is_parametrized(module, "weight"):
                module.parametrizations.weight[0] = FoldedWeightNorm()
        self._apply(lambda tensor: tensor)  # see AtLeastFp32
        self.post_init()

    def encode(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        max_scales: int | None = None,
        return_dict: bool | None = None,
    ) -> SatEncoderOutput | tuple:
        """
        Args:
            input_values (`torch.FloatTensor` of shape `(batch_size, audio_channels, num_samples)`):
                Waveform at `config.sampling_rate`.
            padding_mask (`torch.BoolTensor` or `torch.LongTensor` of shape `(batch_size, num_samples)`, *optional*):
                1 for samples of the sound, 0 for padding at its end.
            max_scales (`int`, *optional*):
                Codes of the first, coarse scales only.
            return_dict (`bool`, *optional*):
                `False` for a tuple.

        Returns:
            [`SatEncoderOutput`] with the codes `(batch_size, num_windows, tokens)`. Each item gets the codes that it
            gets alone.

        Raises:
            ValueError: for a wrong shape or number of scales, and for padding that isn't at the end.
        """
        num_scales = self._check_max_scales(max_scales)
        windows, window_mask = self._split_windows(input_values, padding_mask)
        codes = [
            self.quantizer.encode(self.encoder(batch), num_scales)
            for batch in windows[window_mask].split(self.windows_per_batch)
        ]
        tokens = sum(self.config.scales[:num_scales])
        audio_codes = torch.zeros(*window_mask.shape, tokens, dtype=torch.long, device=windows.device)
        audio_codes[window_mask] = torch.cat(codes)
        return self._output(SatEncoderOutput(audio_codes=audio_codes, audio_codes_mask=window_mask), return_dict)

    def decode(
        self,
        audio_codes: torch.LongTensor,
        padding_mask: torch.Tensor | None = None,
        max_scales: int | None = None,
        return_dict: bool | None = None,
    ) -> SatDecoderOutput | tuple:
        """
        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_windows, tokens)`):
                Codes of all scales, or of the first few.
            padding_mask (`torch.BoolTensor` or `torch.LongTensor` of shape `(batch_size, num_samples)`, *optional*):
                The mask that the sound was encoded with; the result then has exactly its length, with zeros in the
                padding. Without it the result is as long as its windows.
            max_scales (`int`, *optional*):
                Decode the first, coarse scales only.
            return_dict (`bool`, *optional*):
                `False` for a tuple.

        Returns:
            [`SatDecoderOutput`] with the waveform `(batch_size, audio_channels, num_samples)`.

        Raises:
            ValueError: for codes out of range, incomplete scales, or a mask of another length.
        """
        num_scales = self._check_max_scales(max_scales)
        self._check_codes(audio_codes)
        audio_codes = audio_codes[..., : sum(self.config.scales[:num_scales])].long()
        if padding_mask is None:
            window_mask = torch.ones(audio_codes.shape[:2], dtype=torch.bool, device=audio_codes.device)
        else:
            window_mask = self._window_mask(padding_mask)
            if window_mask.shape != audio_codes.shape[:2]:
                raise ValueError(
                    f"`padding_mask` belongs to {tuple(window_mask.shape)} windows (batch, windows) but `audio_codes` "
                    f"holds {tuple(audio_codes.shape[:2])}; pass the mask that the sound was encoded with."
                )
        decoded = [self._decode_windows(batch) for batch in audio_codes[window_mask].split(self.windows_per_batch)]
        decoded = torch.cat(decoded)
        windows = decoded.new_zeros(*window_mask.shape, *decoded.shape[1:])
        windows[window_mask] = decoded
        audio_values = self._join_windows(windows, window_mask)
        if padding_mask is not None:
            audio_values = audio_values[..., : padding_mask.shape[-1]]
            audio_values = audio_values * padding_mask[:, None].to(audio_values.dtype)
        return self._output(SatDecoderOutput(audio_values=audio_values), return_dict)

    def decode_f_hat(self, f_hat: torch.Tensor) -> torch.FloatTensor:
        """
        Waveform `(batch_size, audio_channels, num_samples)` of the quantizer's running sums `(batch_size, num_windows,
        codebook_dim, num_frames)`, as a generator has them in hand; see [`SatQuantizer.accumulate`].
        """
        latents = self.quantizer.project_f_hat(f_hat.flatten(0, 1)).to(self.dtype)
        windows = torch.cat([self.decoder(batch) for batch in latents.split(self.windows_per_batch)])
        windows = windows.unflatten(0, f_hat.shape[:2])
        return self._join_windows(windows, torch.ones(f_hat.shape[:2], dtype=torch.bool, device=windows.device))

    def forward(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        audio_codes: torch.LongTensor | None = None,
        return_dict: bool | None = None,
    ) -> SatOutput | tuple:
        """
        Encodes and decodes with gradients, all windows at once. In training mode the codebooks move; see
        [`SatQuantizer`]. For long audio without gradients use `encode` and `decode`.

        Args:
            input_values (`torch.FloatTensor` of shape `(batch_size, audio_channels, num_samples)`).
            padding_mask (`torch.Tensor` of shape `(batch_size, num_samples)`, *optional*): 0 for padding at the end.
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_windows, tokens)`, *optional*):
                Decode these instead of the input's own.
            return_dict (`bool`, *optional*): `False` for a tuple.

        Returns:
            [`SatOutput`].
        """
        if padding_mask is None:
            padding_mask = input_values.new_ones(input_values.shape[0], input_values.shape[-1], dtype=torch.bool)
        if audio_codes is not None:
            audio_values = self.decode(audio_codes, padding_mask).audio_values
            return self._output(SatOutput(audio_codes=audio_codes, audio_values=audio_values), return_dict)

        windows, window_mask = self._split_windows(input_values, padding_mask)
        quantized = self.quantizer(self.encoder(windows[window_mask]))
        decoded = self.decoder(quantized.quantized.to(self.dtype))
        audio_codes = quantized.audio_codes.new_zeros(*window_mask.shape, self.config.tokens_per_window)
        audio_codes[window_mask] = quantized.audio_codes
        decoded_windows = decoded.new_zeros(*window_mask.shape, *decoded.shape[1:])
        decoded_windows[window_mask] = decoded
        audio_values = self._join_windows(decoded_windows, window_mask)[..., : input_values.shape[-1]]
        audio_values = audio_values * padding_mask[:, None].to(audio_values.dtype)

        error = (at_least_fp32(audio_values) - at_least_fp32(input_values)).abs() * padding_mask[:, None]
        reconstruction_loss = error.sum() / (padding_mask.sum() * input_values.shape[1])
        commitment_loss = quantized.commitment_losses.mean()
        output = SatOutput(
            loss=reconstruction_loss + commitment_loss,
            audio_codes=audio_codes,
            audio_values=audio_values,
            commitment_loss=commitment_loss,
        )
        return self._output(output, return_dict)

    def split_scales(self, audio_codes: torch.LongTensor) -> list[torch.LongTensor]:
        """Codes `(batch_size, num_windows, tokens)` as one tensor `(batch_size, num_windows, n_s)` per scale."""
        return list(self.quantizer.split(audio_codes))

    def merge_scales(self, scale_codes: list[torch.LongTensor]) -> torch.LongTensor:
        """Joins what `split_scales` has split; all or the first few scales."""
        audio_codes = torch.cat(list(scale_codes), dim=-1)
        self.quantizer.split(audio_codes)  # refuses incomplete scales
        return audio_codes

    def start_codebooks(self, input_values: torch.Tensor) -> None:
        """k-means start of the codebooks from windows `(batch_size, audio_channels, window_length)`; see training."""
        with torch.no_grad():
            hidden = [self.encoder(batch.to(self.dtype)) for batch in input_values.split(self.windows_per_batch)]
            self.quantizer.start_codebooks(torch.cat(hidden))

    @contextmanager
    def accumulate_codebook_statistics(self):
        """
        Within this context forwards in training mode leave the codebooks alone; the first forward outside moves them
        by all vectors seen since the last move. For gradient accumulation, as `no_sync` of DistributedDataParallel.
        """
        self.quantizer._defer_update = True
        try:
            yield
        finally:
            self.quantizer._defer_update = False

    def fingerprint(self) -> str:
        """
        SHA-256, as 64 hexadecimal digits, of everything that gives codes their meaning: the framing, the codebooks and
        φ. Codes of a model with another fingerprint can't be decoded by this one.
        """
        fields = ("sampling_rate", "audio_channels", "hop_length", "scales", "window_length", "window_stride")
        digest = hashlib.sha256(json.dumps({name: getattr(self.config, name) for name in fields}).encode())
        for tensor in (self.quantizer.codebook, *self.quantizer.phi.parameters()):
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _check_max_scales(self, max_scales: int | None) -> int:
        if max_scales is None:
            return self.config.num_scales
        if not isinstance(max_scales, int) or not 1 <= max_scales <= self.config.num_scales:
            raise ValueError(f"`max_scales` must lie between 1 and {self.config.num_scales}, got {max_scales}.")
        return max_scales

    def _check_codes(self, audio_codes: torch.LongTensor) -> None:
        if audio_codes.ndim != 3:
            raise ValueError(
                f"`audio_codes` must have the shape (batch_size, num_windows, tokens), got {tuple(audio_codes.shape)}."
            )
        self.quantizer.split(audio_codes)  # refuses incomplete scales
        if audio_codes.is_floating_point() or audio_codes.dtype == torch.bool or audio_codes.numel() == 0:
            raise ValueError("`audio_codes` must hold whole numbers, at least one window of them.")
        low, high = torch.stack(torch.aminmax(audio_codes)).tolist()
        if low < 0 or high >= self.config.codebook_size:
            raise ValueError(
                f"`audio_codes` must lie between 0 and {self.config.codebook_size - 1}, got {low} to {high}; they "
                "belong to another codec."
            )

    def _window_mask(self, padding_mask: torch.Tensor) -> torch.BoolTensor:
        """True `(batch_size, num_windows)` for the windows that an item needs when it is encoded alone."""
        num_windows = self.config.num_windows(padding_mask.shape[-1])
        covered_before = torch.arange(num_windows, device=padding_mask.device) * self.config.window_stride
        covered_before = covered_before + self.config.window_length - self.config.window_stride
        covered_before[0] = -1
        return covered_before < padding_mask.sum(-1, keepdim=True)

    def _split_windows(
        self, input_values: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.BoolTensor]:
        """Windows `(batch_size, num_windows, audio_channels, window_length)`, zero-padded, and which of them count."""
        if input_values.ndim != 3 or input_values.shape[1] != self.config.audio_channels or not input_values.numel():
            raise ValueError(
                f"`input_values` must have the shape (batch_size, {self.config.audio_channels}, num_samples) with at "
                f"least one sample, got {tuple(input_values.shape)}."
            )
        batch_size, _, num_samples = input_values.shape
        if padding_mask is None:
            padding_mask = torch.ones(batch_size, num_samples, dtype=torch.bool, device=input_values.device)
        elif padding_mask.shape != (batch_size, num_samples):
            raise ValueError(
                f"`padding_mask` must have the shape {(batch_size, num_samples)}, got {tuple(padding_mask.shape)}."
            )
        elif (padding_mask[:, 1:].long() > padding_mask[:, :-1].long()).any():
            raise ValueError("`padding_mask` has padding before sound; padding belongs at the end.")
        input_values = input_values.to(self.dtype) * padding_mask[:, None].to(self.dtype)
        window_mask = self._window_mask(padding_mask)
        full_length = (window_mask.shape[1] - 1) * self.config.window_stride + self.config.window_length
        padded = F.pad(input_values, (0, full_length - num_samples))
        windows = padded.unfold(-1, self.config.window_length, self.config.window_stride)
        return windows.transpose(1, 2), window_mask

    def _decode_windows(self, codes: torch.LongTensor) -> torch.Tensor:
        """Waveforms `(windows, audio_channels, window_length)` of codes `(windows, tokens)`."""
        return self.decoder(self.quantizer.decode(codes).to(self.dtype))

    def _join_windows(self, windows: torch.Tensor, window_mask: torch.BoolTensor) -> torch.Tensor:
        """
        Waveform `(batch_size, audio_channels, num_samples)` of windows `(batch_size, num_windows, audio_channels,
        window_length)`. Where windows overlap they are cross-faded linearly; absent windows have no weight.
        """
        batch_size, num_windows, channels, length = windows.shape
        stride = self.config.window_stride
        if stride == length or num_windows == 1:
            return windows.transpose(1, 2).reshape(batch_size, channels, num_windows * length)
        ramp = (torch.arange(length, device=windows.device) + 0.5) / (length - stride)
        fade = torch.minimum(ramp, ramp.flip(0)).clamp(max=1.0).to(windows.dtype)
        weights = fade * window_mask[:, :, None, None]
        total = (num_windows - 1) * stride + length
        joined = windows.new_zeros(batch_size, channels, total)
        weight_sum = windows.new_zeros(batch_size, 1, total)
        for index in range(num_windows):
            span = slice(index * stride, index * stride + length)
            joined[..., span] += windows[:, index] * weights[:, index]
            weight_sum[..., span] += weights[:, index]
        # absent windows at the end leave samples without any weight, which stay zero
        return joined / weight_sum.clamp(min=torch.finfo(weight_sum.dtype).tiny)

    def _output(self, output: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return self.config.return_dict if return_dict is None else return_dict


SatModel.register_for_auto_class("AutoModel")

__all__ = ["SatPreTrainedModel", "SatModel", "SatQuantizer", "nearest_phi"]
