"""The layers of SAT: EnCodec's convolutions and weight norm as inference is fastest with, and precision floors."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from transformers.models.encodec.modeling_encodec import EncodecConv1d


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
    Weight normalisation w = g · v / ‖v‖ whose result is kept where both factors are frozen, until one of them is
    replaced or changed in place. Trainable ones are normalised anew each time: PyTorch's fused optimizers change them
    without leaving a trace. Nor does writing to a frozen factor through `.data`; replace it instead.
    """

    def __init__(self):
        super().__init__()
        # what was folded, as it was then, and the product; in one piece, since threads may share it
        self._folded: tuple | None = None

    def forward(self, magnitude: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        is_trainable = magnitude.requires_grad or direction.requires_grad
        # neither of the other two lets changes be noticed
        if is_trainable or torch.compiler.is_compiling() or direction.is_inference():
            return torch._weight_norm(direction, magnitude, 0)
        state = [(part.data_ptr(), part._version, part.dtype, part.device) for part in (magnitude, direction)]
        folded = self._folded
        if folded is None or folded[0] != state:
            # held, so that replaced factors can't turn up at the address of those that were folded
            factors = magnitude.detach(), direction.detach()
            with torch.inference_mode(False):  # a later call may want gradients of the convolution's input
                self._folded = folded = state, factors, torch._weight_norm(factors[1], factors[0], 0)
        return folded[2]


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
