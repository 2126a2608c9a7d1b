"""Training examples whose randomness is a function of (seed, epoch, index), whoever reads them and in what batch."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from .crops import read_crop

# so many broken files in a row are no accident
MAX_ATTEMPTS = 20


def example_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one example in one epoch: the same on every machine, process and worker."""
    return np.random.Generator(np.random.PCG64([seed, epoch, index]))


class CropExamples(Dataset):
    """
    Random crops of a dataset's sounds. An example is asked for by `(epoch, index)`. In place of a file that can't be
    read another one is drawn, and the file is named.

    Args:
        dataset (`datasets.Dataset`): see [`load_audio_dataset`] and [`single_events`].
        duration_s (`float`): length of a crop in seconds.
        sampling_rates (`Sequence[int]`): rates in Hz, one waveform each.
        seed (`int`): another seed, other crops.
        num_draws (`int`, defaults to 0): uniform random numbers that come along, for what a model drops.
    """

    def __init__(self, dataset, duration_s: float, sampling_rates: Sequence[int], seed: int, num_draws: int = 0):
        self.dataset = dataset
        self.duration_s = duration_s
        self.sampling_rates = list(sampling_rates)
        self.seed = seed
        self.num_draws = num_draws

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """
        Returns:
            `dict` with `waveforms` (one `torch.FloatTensor` of shape `(1, num_samples)` per sampling rate), `labels`
            (`list[int]`, those that are heard in the crop, where the dataset tells), `name` (`str`), `draws`
            (`torch.FloatTensor` of shape `(num_draws,)` in [0, 1)) and `skipped` (`list[tuple[str, str]]`: names and
            reasons of files that couldn't be read).

        Raises:
            ValueError: when one file after the other can't be read.
        """
        epoch, index = key
        rng = example_generator(self.seed, epoch, index)
        draws = torch.from_numpy(rng.random(self.num_draws))
        skipped = []
        for _ in range(MAX_ATTEMPTS):
            row = self.dataset[index]
            try:
                span = (row["start_s"], row["end_s"]) if "start_s" in row else None
                crop = read_crop(row["audio"], self.duration_s, self.sampling_rates, rng.random(), span)
            except (ValueError, OSError) as error:
                skipped.append((example_name(row, index), str(error)))
                index = int(rng.integers(len(self.dataset)))
                continue
            return {
                "waveforms": crop.samples,
                "labels": labels_of_span(row, crop.start_s, crop.start_s + self.duration_s),
                "name": example_name(row, index),
                "draws": draws,
                "skipped": skipped,
            }
        raise ValueError(f"{MAX_ATTEMPTS} files in a row can't be read; the last one: {skipped[-1][1]}")


class TokenExamples(Dataset):
    """
    Windows of a token cache; see [`load_token_cache`]. An example is asked for by `(epoch, index)`.

    Args:
        dataset (`datasets.Dataset`): the cache's windows.
        seed (`int`): another seed, other draws.
        num_draws (`int`): uniform random numbers that come along, for what a model drops.
    """

    def __init__(self, dataset, seed: int, num_draws: int):
        self.dataset = dataset
        self.seed = seed
        self.num_draws = num_draws

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """
        Returns:
            `dict` with `codes` (`torch.LongTensor` of shape `(tokens_per_window,)`), `labels` (`list[int]`),
            `conditioning` (`torch.FloatTensor` of shape `(conditioning_dim,)`, where the cache has it), `name`,
            `draws` and `skipped` as in [`CropExamples`].
        """
        epoch, index = key
        row = self.dataset[index]
        example = {
            "codes": torch.as_tensor(row["codes"], dtype=torch.long),
            "labels": row.get("labels") or [],
            "name": f"{row['id']}, window {row['window']}",
            "draws": torch.from_numpy(example_generator(self.seed, epoch, index).random(self.num_draws)),
            "skipped": [],
        }
        if "conditioning" in row:
            example["conditioning"] = torch.as_tensor(row["conditioning"], dtype=torch.float32)
        return example


def example_name(row: dict, index: int) -> str:
    """What to call a sound in messages: its file, else its id, else its number."""
    return (row["audio"] or {}).get("path") or row.get("id") or f"row {index}"


def labels_of_span(row: dict, start_s: float, end_s: float) -> list[int]:
    """
    Label ids of what is heard from `start_s` to `end_s` seconds of a sound: of the events that overlap that span by at
    least half of the shorter of the two, where the dataset knows when its events happen; else of the whole sound.
    """
    if not row.get("events"):
        return list(row.get("labels") or [])
    heard = []
    for event in row["events"]:
        overlap = min(end_s, event["end_s"]) - max(start_s, event["start_s"])
        if overlap >= 0.5 * min(end_s - start_s, event["end_s"] - event["start_s"]):
            heard.append(event["label"])
    return sorted(set(heard))
