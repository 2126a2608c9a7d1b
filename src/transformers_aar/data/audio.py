"""Sound files, read and written block by block, so that their length doesn't matter for memory."""

import io
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
import soundfile
import torch
import torchaudio

from .staging import staged_file

BLOCK_SECONDS = 10
# Header of WAV, AIFF and their relatives, in libsndfile's log: the length it states and what the file has left.
DATA_CHUNK = re.compile(r"^\s*(?:data|SSND) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
# Writers that can't seek back leave the largest number, or nearly, as the length.
UNKNOWN_LENGTH = 2**31 - 2**16
# Number of coefficients of torchaudio's polyphase filter that still fits comfortably, 200 MB.
MAX_FILTER_SIZE = 50_000_000


@dataclass(frozen=True)
class SoundInfo:
    """
    What the header of a sound file says.

    Args:
        path (`Path`): the file.
        sampling_rate (`int`): samples per second, in Hz.
        channels (`int`): number of channels.
        num_samples (`int`): samples per channel, at least 1.
        data (`bytes`, *optional*): the file's contents, where they aren't read from `path`.
    """

    path: Path
    sampling_rate: int
    channels: int
    num_samples: int
    data: bytes | None = field(default=None, repr=False)

    def length_at(self, sampling_rate: int) -> int:
        """Samples per channel after resampling to `sampling_rate` Hz."""
        return math.ceil(self.num_samples * sampling_rate / self.sampling_rate)


def inspect_sound(path: str | Path, data: bytes | None = None) -> SoundInfo:
    """
    Looks at the header of a sound file without reading it.

    Args:
        path (`str` or `Path`): the file.
        data (`bytes`, *optional*): its contents, where they are at hand; `path` is then only what messages call it.

    Raises:
        ValueError: when the file is missing, is no sound that libsndfile reads, is empty or ends too early.
    """
    with _open(Path(path), data) as file:
        _refuse_truncated_container(file.extra_info, path)
        if file.frames < 1:
            raise ValueError(f"{path} is empty: it holds no samples.")
        return SoundInfo(Path(path), file.samplerate, file.channels, file.frames, data)


def read_sound(
    path: str | Path, sampling_rate: int, channels: int = 1, data: bytes | None = None
) -> Iterator[torch.Tensor]:
    """
    Reads WAV, FLAC, OGG, MP3 and what else libsndfile knows, block by block.

    Args:
        path (`str` or `Path`): the file.
        sampling_rate (`int`): rate in Hz to resample to; the result equals resampling the whole file at once.
        channels (`int`, defaults to 1): 1 mixes all channels down to their mean; another number must be the file's, or
            the file must be mono, which is then repeated.
        data (`bytes`, *optional*): as for `inspect_sound`.

    Yields:
        `torch.FloatTensor` of shape `(channels, num_samples)`; together they have `SoundInfo.length_at(sampling_rate)`
        samples.

    Raises:
        ValueError: as `inspect_sound`, and for NaN or infinite samples, a file that ends before its header says so,
            and a number of channels that doesn't fit.
    """
    info = inspect_sound(path, data)
    blocks = (_as_channels(block, channels, path) for block in _read_blocks(info))
    yield from resample_blocks(blocks, info.sampling_rate, sampling_rate)


def resample_blocks(blocks: Iterable[torch.Tensor], orig_rate: int, new_rate: int) -> Iterator[torch.Tensor]:
    """
    `torchaudio.functional.resample` for a signal that comes in consecutive blocks `(channels, num_samples)` of any
    lengths. The blocks that it yields, put together, equal the resampled whole.

    Raises:
        ValueError: for two rates with so small a common divisor that the filter wouldn't fit into memory.
    """
    orig, new = resampling_ratio(orig_rate, new_rate)
    if orig == new:
        yield from blocks
        return
    margin = filter_margin(orig, new)
    buffer, done = None, 0
    for block in blocks:
        buffer = block if buffer is None else torch.cat([buffer, block], dim=-1)
        ready = buffer.shape[-1] // orig - margin
        if ready > done:
            resampled = torchaudio.functional.resample(buffer[..., : (ready + margin) * orig], orig, new)
            yield resampled[..., done * new : ready * new]
            done = min(ready, margin)
            buffer = buffer[..., (ready - done) * orig :]
    if buffer is not None:
        yield torchaudio.functional.resample(buffer, orig, new)[..., done * new :]


def resampling_ratio(orig_rate: int, new_rate: int) -> tuple[int, int]:
    """
    The two rates in lowest terms: every `orig` samples make `new` samples, always with the same filters.

    Raises:
        ValueError: as `resample_blocks`.
    """
    divisor = math.gcd(orig_rate, new_rate)
    orig, new = orig_rate // divisor, new_rate // divisor
    if orig * new > MAX_FILTER_SIZE:
        raise ValueError(
            f"Resampling from {orig_rate} Hz to {new_rate} Hz takes too large a filter: convert the file to "
            f"{new_rate} Hz or a common rate first, for example with ffmpeg -ar {new_rate}."
        )
    return orig, new


def filter_margin(orig: int, new: int) -> int:
    """
    How far torchaudio's filters reach to both sides, rounded up to steps of `orig` samples: six zero crossings of the
    lower rate (lowpass_filter_width 6, rolloff 0.99).
    """
    return math.ceil(6 / (0.99 * min(orig, new))) + 1


class SoundWriter:
    """
    Takes the samples of a file that `write_sound` has opened.

    Attributes:
        peak (`float`): largest magnitude so far.
        num_samples (`int`): samples per channel so far.
    """

    def __init__(self, file: BinaryIO):
        self.peak = 0.0
        self.num_samples = 0
        self._file = file

    def write(self, samples: torch.Tensor) -> None:
        """
        Appends samples `(channels, num_samples)`.

        Raises:
            ValueError: for NaN or infinite samples.
        """
        samples = samples.detach().float().cpu()
        if not samples.isfinite().all():
            raise ValueError("The model made NaN or infinite samples, so nothing was written.")
        if samples.numel() > 0:
            self.peak = max(self.peak, float(samples.abs().max()))
        self.num_samples += samples.shape[-1]
        self._file.write(samples.T.numpy().tobytes())


@contextmanager
def write_sound(path: str | Path, sampling_rate: int, channels: int = 1) -> Iterator[SoundWriter]:
    """
    Opens a 16-bit WAV or FLAC file, by the suffix of `path`, to write block by block. The file appears when the `with`
    block ends without an error. A sound with samples outside ±1 is scaled down as a whole, so that its peak is 1.
    Until that is known its samples are in a temporary file beside `path`, 4 bytes each.

    Raises:
        OSError: when the file can't be written.
    """
    with staged_file(path) as staged:
        # unlike libsndfile's, Python's errors say what is wrong with a folder
        staged.touch()
        # the peak is known at the end only, and a sound may be longer than memory
        with TemporaryFile(dir=staged.parent) as buffer:
            writer = SoundWriter(buffer)
            yield writer
            buffer.seek(0)
            try:
                with soundfile.SoundFile(staged, "w", sampling_rate, channels, "PCM_16") as file:
                    while block := buffer.read(BLOCK_SECONDS * sampling_rate * channels * 4):
                        samples = np.frombuffer(block, np.float32).reshape(-1, channels)
                        file.write(samples / max(1.0, writer.peak))
            except soundfile.LibsndfileError as error:
                raise OSError("the disk is full, or the sound too long for this format") from error


class ForwardSoundFile(soundfile.SoundFile):
    """
    A file that is read from its beginning to its end. Otherwise soundfile seeks to the current position after every
    read, which makes MP3 decoders start anew and garbles some thousand samples of each block.
    """

    def seekable(self) -> bool:
        return False


def _open(path: Path, data: bytes | None = None) -> soundfile.SoundFile:
    if data is None and not path.exists():
        raise ValueError(f"{path} doesn't exist.")
    if data is None and path.is_dir():
        raise ValueError(f"{path} is a folder: name the sound files in it.")
    if (path.stat().st_size if data is None else len(data)) == 0:
        raise ValueError(f"{path} is empty: it holds no samples.")
    try:
        return ForwardSoundFile(path if data is None else io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is no sound file that can be read (WAV, FLAC, OGG and MP3 can).") from error


def _refuse_truncated_container(log: str, path: str | Path) -> None:
    """libsndfile shortens a file that ends early without an error, but its log tells."""
    chunk = DATA_CHUNK.search(log)
    is_short = chunk is not None and int(chunk[2]) < int(chunk[1]) < UNKNOWN_LENGTH
    if is_short or "lacks an end-of-stream bit" in log:
        raise ValueError(f"{path} is truncated: it ends before the sound does.")


def _read_blocks(info: SoundInfo) -> Iterator[torch.Tensor]:
    """Blocks `(channels, num_samples)` of finite samples at the file's rate, `info.num_samples` in all."""
    position = 0
    with _open(info.path, info.data) as file:
        while position < info.num_samples:
            try:
                block = file.read(BLOCK_SECONDS * info.sampling_rate, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError:
                block = ()
            if len(block) == 0:
                raise ValueError(f"{info.path} is truncated or damaged: it can't be read to its end.")
            position += len(block)
            samples = torch.from_numpy(block).T
            if not samples.isfinite().all():
                raise ValueError(f"{info.path} holds NaN or infinite samples: clean it first.")
            yield samples


def _as_channels(samples: torch.Tensor, channels: int, path: str | Path) -> torch.Tensor:
    if channels == 1:
        return samples.mean(0, keepdim=True)
    if len(samples) not in (1, channels):
        raise ValueError(
            f"{path} has {len(samples)} channels and the codec {channels}: mix it to {channels} or 1 first."
        )
    return samples.expand(channels, -1)
