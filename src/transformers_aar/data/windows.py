"""Whole sounds, cut into the windows of a codec."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from datasets import Dataset as AudioDataset
from torch.utils.data import Dataset
from transformers import ClapFeatureExtractor

from ..configuration_sat import SatConfig
from .audio import read_sound
from .crops import check_present, hidden_decoder_messages
from .examples import example_name, labels_of_span


@dataclass
class ClipWindows:
    """
    A sound, cut into windows.

    Args:
        id (`str`): the sound's id.
        input_values (`torch.FloatTensor` of shape `(num_windows, audio_channels, window_length)`): for the codec.
        labels (`list[list[int]]`): label ids of what is heard in each window.
        conditioner_inputs (`dict[str, torch.Tensor]`): for CLAP, first axis `num_windows`; empty without one.
    """

    id: str
    input_values: torch.Tensor
    labels: list[list[int]]
    conditioner_inputs: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class SkippedClip:
    """A sound that can't be read: what it is called, and why."""

    name: str
    reason: str


class WindowedClips(Dataset):
    """
    Some rows of a dataset, read and cut into the codec's windows.

    A last window that the sound doesn't fill is kept when at least half of what it adds is sound, and when it is the
    only one; it is filled up with zeros.

    Args:
        dataset (`datasets.Dataset`): see [`load_audio_dataset`].
        rows (`range`): the rows.
        config ([`SatConfig`]): the codec's.
        conditioner_feature_extractor ([`ClapFeatureExtractor`], *optional*): for a CLAP that listens as well.
    """

    def __init__(
        self,
        dataset: AudioDataset,
        rows: range,
        config: SatConfig,
        conditioner_feature_extractor: ClapFeatureExtractor | None = None,
    ):
        self.dataset = dataset
        self.rows = rows
        self.config = config
        self.conditioner_feature_extractor = conditioner_feature_extractor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> ClipWindows | SkippedClip:
        row = self.dataset[self.rows[position]]
        name = example_name(row, self.rows[position])
        try:
            return self._cut(row, name)
        except (ValueError, OSError) as error:
            return SkippedClip(name, str(error))

    def _cut(self, row: dict, name: str) -> ClipWindows:
        config = self.config
        samples = read_whole(row["audio"], name, config.sampling_rate, config.audio_channels)
        missing = samples.shape[-1] - config.window_length
        num_windows = 1 + max(0, (2 * missing + config.window_stride) // (2 * config.window_stride))
        starts_s = [window * config.window_stride / config.sampling_rate for window in range(num_windows)]
        conditioner_inputs = {}
        if self.conditioner_feature_extractor is not None:
            conditioner_inputs = self._listen(row["audio"], name, starts_s)
        return ClipWindows(
            id=str(row.get("id") or name),
            input_values=cut_windows(samples, config.sampling_rate, starts_s, config.window_length),
            labels=[labels_of_span(row, start_s, start_s + config.window_length_s) for start_s in starts_s],
            conditioner_inputs=conditioner_inputs,
        )

    def _listen(self, audio: dict, name: str, starts_s: list[float]) -> dict[str, torch.Tensor]:
        extractor = self.conditioner_feature_extractor
        rate = extractor.sampling_rate
        samples = read_whole(audio, name, rate)
        windows = cut_windows(samples, rate, starts_s, round(self.config.window_length_s * rate))
        return hear_one_by_one(extractor, windows)


def hear_one_by_one(extractor: ClapFeatureExtractor, waveforms: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    CLAP's `input_features` and `is_longer` of waveforms `(1, num_samples)` at the extractor's rate. In a batch some
    extractors treat one sound, drawn at random, in another way.
    """
    rate = extractor.sampling_rate
    inputs = [extractor(waveform[0].numpy(), sampling_rate=rate, return_tensors="pt") for waveform in waveforms]
    return {key: torch.cat([entry[key] for entry in inputs]) for key in ("input_features", "is_longer")}


def read_whole(audio: dict | None, name: str, sampling_rate: int, channels: int = 1) -> torch.Tensor:
    """A sound `(channels, num_samples)` from its `path` or `bytes`; see [`read_sound`]."""
    check_present(audio)
    with hidden_decoder_messages():
        blocks = list(read_sound(audio["path"] or name, sampling_rate, channels, data=audio["bytes"]))
    return torch.cat(blocks, dim=-1)


def cut_windows(samples: torch.Tensor, sampling_rate: int, starts_s: list[float], length: int) -> torch.Tensor:
    """Windows `(num_windows, channels, length)` of `(channels, num_samples)`, filled up with zeros at the end."""
    starts = [round(start_s * sampling_rate) for start_s in starts_s]
    samples = F.pad(samples, (0, max(0, starts[-1] + length - samples.shape[-1])))
    return torch.stack([samples[:, start : start + length] for start in starts])
