"""What a folder in AudioSet's layout holds, and what is wrong with it."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from .audio import SoundInfo, inspect_sound, read_sound
from .audioset_folder import SPLITS, Clip, SplitIndex, find_splits, index_audioset, read_classes
from .crops import hidden_decoder_messages
from .staging import staged_file

# reading a header is mostly waiting for the disk
NUM_THREADS = 16
# as many ids and labels are named on the terminal
NUM_NAMED = 5


@dataclass(frozen=True)
class SplitReport:
    """
    What was found of a split.

    Args:
        split (`str`): its name.
        index (`SplitIndex`): what is listed and there.
        class_names (`list[str]`): names of the labels.
        sounds (`list[SoundInfo]`): headers of the sounds that can be read.
        unreadable (`dict[str, str]`): why the others can't, by id.
    """

    split: str
    index: SplitIndex
    class_names: list[str]
    sounds: list[SoundInfo]
    unreadable: dict[str, str]

    def problems(self) -> list[tuple[str, str]]:
        """Id and problem of every clip that can't be used."""
        missing = [(clip_id, "missing") for clip_id in self.index.missing_ids]
        refused = [(clip_id, "refused: the id leaves the folder") for clip_id in self.index.refused_ids]
        return [*missing, *refused, *self.unreadable.items()]

    def label_counts(self) -> Counter:
        """Clips that are there by name of label, most frequent first."""
        counts = Counter(label for clip in self.index.clips for label in clip.labels)
        return Counter({self.class_names[label]: count for label, count in counts.most_common()})


def check_audioset(data_dir: str | Path, decode: bool = False) -> list[SplitReport]:
    """
    Reads the tables and the header of every sound of a folder, with a progress bar on stderr.

    Args:
        data_dir (`str` or `Path`): the folder.
        decode (`bool`, defaults to `False`): decodes every sound to its end, which also finds truncated MP3 files.

    Raises:
        ValueError: for a folder in another layout, and tables that can't be read.
    """
    class_names = list(read_classes(data_dir).values())
    reports = []
    for split in find_splits(data_dir):
        index = index_audioset(data_dir, split)
        sounds, unreadable = _read_sounds(index.clips, decode, split)
        reports.append(SplitReport(split, index, class_names, sounds, unreadable))
    return reports


def describe_split(report: SplitReport) -> list[str]:
    """Lines for a terminal."""
    index = report.index
    seconds = sum(sound.num_samples / sound.sampling_rate for sound in report.sounds)
    formats = Counter(
        f"{sound.path.suffix[1:].lower()} {sound.sampling_rate} Hz {sound.channels} ch" for sound in report.sounds
    )
    counts = report.label_counts()
    absent = [name for name in report.class_names if name not in counts]
    lines = {
        "listed": f"{index.num_rows}",
        "present": f"{len(index.clips)}, {seconds / 3600:.2f} hours",
        "missing": _some(index.missing_ids),
        "refused": _some([ascii(clip_id) for clip_id in index.refused_ids]),
        "unreadable": _some([f"{clip_id} ({reason})" for clip_id, reason in report.unreadable.items()]),
        "formats": _counted(formats.most_common()),
        "frequent labels": _counted(counts.most_common(NUM_NAMED)),
        "rare labels": _counted(counts.most_common()[: -NUM_NAMED - 1 : -1]),
        "labels without clip": _some(absent),
        "strong labels": f"{sum(bool(clip.events) for clip in index.clips)} clips" if index.has_events else "none",
    }
    warnings = [f"  warning: {warning}" for warning in _warnings(report, seconds)]
    return [report.split, *(f"  {name:<20} {text}" for name, text in lines.items()), *warnings]


def write_report(path: str | Path, reports: Sequence[SplitReport]) -> None:
    """
    Writes split, id and problem of every clip that can't be used, with tabs between them.

    Raises:
        OSError: when the file can't be written.
    """
    with staged_file(path) as staged, open(staged, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["split", "id", "problem"])
        writer.writerows([report.split, *problem] for report in reports for problem in report.problems())


def _read_sounds(clips: Sequence[Clip], decode: bool, name: str) -> tuple[list[SoundInfo], dict[str, str]]:
    """Headers of the sounds that can be read, and why the others can't by id."""
    sounds, unreadable = [], {}
    with hidden_decoder_messages() as stderr, ThreadPool(NUM_THREADS) as pool:
        found = pool.imap(partial(_read_sound, decode=decode), clips, chunksize=16)
        for clip, sound in zip(clips, tqdm(found, name, len(clips), unit="sound", file=stderr, disable=None)):
            if isinstance(sound, SoundInfo):
                sounds.append(sound)
            else:
                unreadable[clip.id] = sound
    return sounds, unreadable


def _read_sound(clip: Clip, decode: bool) -> SoundInfo | str:
    """The header, or what is wrong."""
    try:
        sound = inspect_sound(clip.audio)
        if decode:
            for _ in read_sound(clip.audio, sound.sampling_rate):
                pass
    except (ValueError, OSError) as error:
        return str(error).replace(clip.audio, os.path.basename(clip.audio))
    return sound


def _warnings(report: SplitReport, seconds: float) -> list[str]:
    index = report.index
    warnings = []
    if not index.clips:
        files = SPLITS[report.split]
        warnings.append(f"{files.segments} lists sounds, but {files.sounds}/Y<id>.mp3 (wav, flac, ogg) aren't there.")
    elif report.problems():
        share = len(report.problems()) / index.num_rows
        warnings.append(f"{share:.1%} of the clips can't be used.")
    short = sum(sound.num_samples < sound.sampling_rate for sound in report.sounds)
    if short:
        warnings.append(f"{short} sounds are shorter than one second and will be followed by silence.")
    return warnings


def _some(names: Sequence[str]) -> str:
    """How many, and the first of them."""
    more = "; …" if len(names) > NUM_NAMED else ""
    return f"{len(names)}: {'; '.join(names[:NUM_NAMED])}{more}" if names else "0"


def _counted(counts: Sequence[tuple[str, int]]) -> str:
    return "; ".join(f"{name}: {count}" for name, count in counts) or "none"
