"""Folders of sounds to evaluate."""

from pathlib import Path

import torch
from torch.utils.data import Dataset

from ..data.audio import read_sound
from ..data.audioset_folder import SOUND_SUFFIXES
from .embeddings import MIN_SECONDS

# -80 dB: below it is only the noise of 16-bit files
SILENCE_PEAK = 1e-4


class SoundFolder(Dataset):
    """
    All WAV, FLAC, OGG and MP3 files in a folder and those below it, but hidden ones, as mono waveforms: of type
    `torch.FloatTensor` and shape `(num_samples,)`.

    Args:
        folder (`str` or `Path`): the folder.
        sampling_rate (`int`): rate in Hz that all sounds are resampled to.

    Attributes:
        paths (`list[Path]`): the files, sorted.

    Raises:
        ValueError: for a folder without any sound. Reading raises one that names the file, for those that
            [`read_sound`] refuses (empty, truncated, with NaN or infinite samples), that last less than
            `MIN_SECONDS` and that are silent.
    """

    def __init__(self, folder: str | Path, sampling_rate: int):
        self.sampling_rate = sampling_rate
        files = (path for path in Path(folder).rglob("[!.]*") if path.suffix.lower() in SOUND_SUFFIXES)
        self.paths = sorted(files)
        if not self.paths:
            raise ValueError(
                f"{folder} is no folder with sounds: name one that holds {', '.join(SOUND_SUFFIXES)} files."
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        path = self.paths[index]
        waveform = torch.cat(list(read_sound(path, self.sampling_rate)), dim=-1)[0]
        if len(waveform) < MIN_SECONDS * self.sampling_rate:
            raise ValueError(f"{path} is too short: evaluation takes sounds of at least {MIN_SECONDS} s.")
        if waveform.abs().max() < SILENCE_PEAK:
            raise ValueError(f"{path} is silent, with all channels mixed: leave it out.")
        return waveform
