"""Long audio through a codec, some windows at a time, with the results of `encode` and `decode` on the whole."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..modeling_sat import SatModel


@torch.no_grad()
def encode_blocks(codec: "SatModel", blocks: Iterable[torch.Tensor]) -> Iterator[torch.LongTensor]:
    """
    Args:
        codec ([`SatModel`]): the codec.
        blocks (`Iterable[torch.FloatTensor]`): consecutive blocks `(audio_channels, num_samples)` of one sound, of any
            lengths.

    Yields:
        `torch.LongTensor` of shape `(num_windows, tokens_per_window)`, on the codec's device: up to
        `codec.windows_per_batch` windows at a time.
    """
    config = codec.config
    overlap = config.window_length - config.window_stride
    step = codec.windows_per_batch * config.window_stride
    buffer, is_first = None, True
    for block in blocks:
        buffer = block if buffer is None else torch.cat([buffer, block], dim=-1)
        while buffer.shape[-1] >= step + overlap:
            yield _encode(codec, buffer[:, : step + overlap])
            buffer, is_first = buffer[:, step:], False
    # what overlaps the windows before is already in them
    if buffer is not None and (is_first or buffer.shape[-1] > overlap):
        yield _encode(codec, buffer)


@torch.no_grad()
def decode_blocks(
    codec: "SatModel", codes: Iterable[torch.LongTensor], num_samples: int
) -> Iterator[torch.FloatTensor]:
    """
    Args:
        codec ([`SatModel`]): the codec.
        codes (`Iterable[torch.LongTensor]`): codes `(num_windows, tokens_per_window)` of consecutive windows.
        num_samples (`int`): length of the whole sound in samples.

    Yields:
        `torch.FloatTensor` of shape `(audio_channels, samples)` on the CPU; `num_samples` samples in all.
    """
    for samples in _decode_windows(codec, codes):
        yield samples[:, :num_samples].float().cpu()
        num_samples = max(0, num_samples - samples.shape[-1])


class Excerpt:
    """
    Keeps the beginning of a sound that passes by in blocks.

    Args:
        max_samples (`int`): how many samples to keep.

    Attributes:
        num_samples (`int`): samples that have passed so far.
    """

    def __init__(self, max_samples: int):
        self.max_samples = max_samples
        self.num_samples = 0
        self._blocks: list[torch.Tensor] = []

    def watch(self, blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Passes on blocks `(channels, num_samples)`."""
        for block in blocks:
            if self.num_samples < self.max_samples:
                self._blocks.append(block[:, : self.max_samples - self.num_samples].clone())
            self.num_samples += block.shape[-1]
            yield block

    @property
    def samples(self) -> torch.Tensor:
        """What was kept, `(channels, num_samples)`."""
        return torch.cat(self._blocks, dim=-1)


def _encode(codec: "SatModel", samples: torch.Tensor) -> torch.LongTensor:
    return codec.encode(samples[None].to(codec.device)).audio_codes[0]


def _decode_windows(codec: "SatModel", codes: Iterable[torch.LongTensor]) -> Iterator[torch.Tensor]:
    """Waveform of all windows to the end of the last one."""
    stride = codec.config.window_stride
    has_overlap = stride < codec.config.window_length
    previous = tail = None
    for batch in codes:
        batch = batch.to(codec.device, torch.long)
        # a window fades into the next one only, since at most half of it overlaps
        margin = 0 if previous is None or not has_overlap else 1
        with_margin = torch.cat([previous, batch]) if margin else batch
        samples = codec.decode(with_margin[None]).audio_values[0, :, margin * stride :]
        yield samples[:, : len(batch) * stride]
        previous, tail = batch[-1:], samples[:, len(batch) * stride :]
    if tail is not None:
        yield tail
