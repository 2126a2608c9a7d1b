"""Crops of sound files: about as much is decoded as the crop is long, not the whole file."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from threading import Lock
from typing import TextIO

import soundfile
import torch
from torchaudio.transforms import Resample

from .audio import ForwardSoundFile, filter_margin, resampling_ratio

# Samples of an MP3 file that are decoded before a crop and thrown away. A frame takes bits from up to 511 bytes before
# it (255 below 32 kHz), which a decoder that has just jumped there lacks. Until decoding agrees within 1e-6 with that
# from the start, it takes up to 6,700 samples at 32 to 48 kHz and 11,500 below (measured with noise bursts in silence,
# at constant, average and variable bit rates).
MP3_LEAD_IN = 12 * 1152

_stderr_lock = Lock()


@dataclass(frozen=True)
class Crop:
    """
    A piece of a sound.

    Args:
        samples (`list[torch.FloatTensor]`): the mono waveform `(1, num_samples)` at each of the rates asked for.
        start_s (`float`): where in the sound it begins, in seconds.
    """

    samples: list[torch.Tensor]
    start_s: float


def read_crop(
    audio: Mapping | None,
    duration_s: float,
    sampling_rates: Sequence[int],
    position: float,
    span: tuple[float, float] | None = None,
) -> Crop:
    """
    Reads a piece of a sound, mixes it down to mono and resamples it. It equals the same piece of the whole file,
    resampled by `torchaudio.transforms.Resample`.

    Args:
        audio (`Mapping`): `{"path", "bytes"}` as `datasets.Audio(decode=False)` gives it; the file at `path` is read
            where `bytes` is `None`.
        duration_s (`float`): length in seconds. Shorter sounds are followed by silence.
        sampling_rates (`Sequence[int]`): rates in Hz; one waveform of `round(duration_s * rate)` samples each.
        position (`float`): number in [0, 1) that chooses the start evenly among all that leave `duration_s` of sound,
            in steps of some milliseconds (samples that both the file's rate and all of `sampling_rates` have).
        span (`tuple[float, float]`, *optional*): seconds of the sound between which the piece lies; by default all.

    Raises:
        ValueError: for a file that is missing, no sound, empty, damaged within or before this piece, or holds NaN or
            infinite samples, for a row without one, and for a rate as `resample_blocks`.
    """
    check_present(audio)
    name = audio["path"] or "A sound without a path"
    source = audio["path"] if audio["bytes"] is None else BytesIO(audio["bytes"])
    try:
        with hidden_decoder_messages(), ForwardSoundFile(source) as file:
            orig_rate = file.samplerate
            step, margin = _grid(orig_rate, sampling_rates)
            length = math.ceil(duration_s * orig_rate)
            first, stop = (0, file.frames) if span is None else (int(edge * orig_rate) for edge in span)
            last = min(stop, file.frames) - length
            start = (first + int(position * (max(0, last - first) + 1))) // step * step
            begin = max(0, start - margin)
            samples = _read_mono(file, name, begin, start + length + margin)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name} can't be read: it is missing, damaged or no sound file.") from error
    resampled = [
        _resample(samples, orig_rate, rate, start - begin, round(duration_s * rate)) for rate in sampling_rates
    ]
    return Crop(resampled, start / orig_rate)


def check_present(audio: Mapping | None) -> None:
    """Raises a ValueError for a row without a sound, as tables of other formats than folders may have."""
    if audio is None or (audio["path"] is None and audio["bytes"] is None):
        raise ValueError("The row holds no sound, neither a path nor bytes.")


@contextmanager
def hidden_decoder_messages() -> Iterator[TextIO]:
    """
    Sends the process's stderr nowhere, and gives a file that still writes there. libsndfile's MP3 decoder complains on
    stderr, past Python, about the frames after every jump, of healthy files too.
    """
    with _stderr_lock, open(os.dup(2), "w") as stderr, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield stderr
        finally:
            os.dup2(stderr.fileno(), 2)


def _grid(orig_rate: int, sampling_rates: Sequence[int]) -> tuple[int, int]:
    """
    Distance in samples of the file at which all rates have a sample too, and a multiple of it that covers what the
    resampling filters reach to each side.
    """
    ratios = [resampling_ratio(orig_rate, rate) for rate in sampling_rates]
    step = math.lcm(*(orig for orig, _ in ratios))
    reach = max(filter_margin(orig, new) * orig for orig, new in ratios)
    return step, math.ceil(reach / step) * step


def _read_mono(file: soundfile.SoundFile, name: str, start: int, stop: int) -> torch.Tensor:
    """The mean of all channels `(1, num_samples)` from sample `start` to `stop` or the end of the file."""
    if file.frames < 1:
        raise ValueError(f"{name} is empty: it holds no samples.")
    lead_in = min(start, MP3_LEAD_IN) if file.format == "MP3" else 0
    stop = min(stop, file.frames)
    file.seek(start - lead_in)
    block = file.read(stop - start + lead_in, dtype="float32", always_2d=True)
    if len(block) < stop - start + lead_in:
        raise ValueError(f"{name} is truncated or damaged: it can't be read at {stop / file.samplerate:.2f} s.")
    samples = torch.from_numpy(block[lead_in:]).mean(1).unsqueeze(0)
    if not samples.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite samples: clean it first.")
    return samples


def _resample(samples: torch.Tensor, orig_rate: int, new_rate: int, skipped: int, num_samples: int) -> torch.Tensor:
    """
    `num_samples` at `new_rate` that begin `skipped` samples of `orig_rate` after the first, followed by zeros where
    there are too few.
    """
    start = skipped * new_rate // orig_rate
    resampled = _resampler(orig_rate, new_rate)(samples)[:, start : start + num_samples]
    return torch.nn.functional.pad(resampled, (0, num_samples - resampled.shape[-1]))


# kernels of odd rates take up to 200 MB
@lru_cache(maxsize=16)
def _resampler(orig_rate: int, new_rate: int) -> Resample:
    return Resample(orig_rate, new_rate)
