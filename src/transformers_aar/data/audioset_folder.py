"""
AudioSet as people have it on disk: CSV files that list the clips of each split, and folders of sound files.

The class list beside this module, `audioset_classes.csv`, is that of Google's AudioSet (J. F. Gemmeke et al., "Audio
Set: an ontology and human-labeled dataset for audio events", ICASSP 2017), licensed under CC BY 4.0.
"""

import csv
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# lossless ones first: of several files of one clip the first is taken
SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
CLASS_LIST = "class_labels_indices.csv"
BUNDLED_CLASS_LIST = Path(__file__).with_name("audioset_classes.csv")


@dataclass(frozen=True)
class SplitFiles:
    """
    Where a split lies in the folder of AudioSet.

    Args:
        segments (`str`): CSV file with the id, start, end and labels of each clip.
        sounds (`str`): folder with the sound files `Y<id>.<suffix>`, also in sub-folders, but not in
            linked ones.
        events (`tuple[str, ...]`): names that the TSV file with the strong labels may have (S. Hershey et al., "The
            benefit of temporally-strong labels in audio event classification", ICASSP 2021).
    """

    segments: str
    sounds: str
    events: tuple[str, ...]


SPLITS = {
    "unbalanced_train": SplitFiles(
        "unbalanced_train_segments.csv",
        "audioset_unbalanced_train_mp3",
        ("audioset_unbalanced_train_strong.tsv", "audioset_train_strong.tsv"),
    ),
    "balanced_train": SplitFiles(
        "balanced_train_segments.csv",
        "audioset_balanced_train_mp3",
        ("audioset_balanced_train_strong.tsv", "audioset_train_strong.tsv"),
    ),
    "eval": SplitFiles("eval_segments.csv", "audioset_eval_raw_mp3", ("audioset_eval_strong.tsv",)),
}


class Event(NamedTuple):
    """What is heard from `start_s` to `end_s`, in seconds from the start of the clip; `label` counts from 0."""

    label: int
    start_s: float
    end_s: float


class Clip(NamedTuple):
    """A clip whose sound file is there; `labels` count from 0."""

    id: str
    audio: str
    labels: list[int]
    events: list[Event]


@dataclass(frozen=True)
class SplitIndex:
    """
    What the CSV file of a split lists, and which of it is there.

    Args:
        clips (`list[Clip]`): those with a file, in the order of the CSV.
        missing_ids (`list[str]`): ids without a file.
        refused_ids (`list[str]`): ids that would leave the folder; nothing was looked up for them.
        has_events (`bool`): whether there are strong labels.
    """

    clips: list[Clip]
    missing_ids: list[str]
    refused_ids: list[str]
    has_events: bool

    @property
    def num_rows(self) -> int:
        """Clips listed, whether there or not."""
        return len(self.clips) + len(self.missing_ids) + len(self.refused_ids)


def find_splits(data_dir: str | Path) -> list[str]:
    """
    The splits whose CSV file is there.

    Raises:
        ValueError: when there is none.
    """
    splits = [split for split, files in SPLITS.items() if (Path(data_dir) / files.segments).is_file()]
    if not splits:
        files = SPLITS["eval"]
        raise ValueError(
            f"{data_dir} isn't a folder in AudioSet's layout: none of "
            f"{', '.join(files.segments for files in SPLITS.values())} is there, the first of which lists the sounds "
            f"{SPLITS['unbalanced_train'].sounds}/Y<id>.mp3, the last {files.sounds}/Y<id>.mp3. To train on any other "
            "folder of sounds pass --dataset_name audiofolder."
        )
    return splits


def read_classes(data_dir: str | Path) -> dict[str, str]:
    """
    Display names by label ("/m/09x0r": "Speech") in the order of their indices, from the folder's
    `class_labels_indices.csv`, else AudioSet's 527.

    Raises:
        ValueError: for a file in another format.
    """
    path = Path(data_dir) / CLASS_LIST
    path = path if path.is_file() else BUNDLED_CLASS_LIST
    classes = {}
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.DictReader(file)
        for row in rows:
            mid, name = row.get("mid"), row.get("display_name")
            if not mid or not name or row.get("index") != str(len(classes)) or name in classes.values():
                raise ValueError(
                    f"{path}, line {rows.line_num}: expected the columns index (0, 1, …), mid and display_name, each "
                    "name once."
                )
            classes[mid] = name
    return classes


def index_audioset(data_dir: str | Path, split: str) -> SplitIndex:
    """
    Compares the CSV file of a split with the names of the sound files. No sound file is opened.

    Raises:
        ValueError: for a split that isn't there, a line that can't be read, and a label that the class list lacks.
    """
    folder = Path(data_dir)
    if split not in find_splits(folder):
        raise ValueError(f"{folder} has no {split}: {', '.join(find_splits(folder))} is there.")
    labels = {mid: label for label, mid in enumerate(read_classes(folder))}
    sounds = _find_sounds(folder / SPLITS[split].sounds)
    events_path = _events_path(folder, split)
    events = _read_events(events_path, labels) if events_path else {}
    index = SplitIndex([], [], [], has_events=events_path is not None)
    for clip_id, clip_labels in _read_segments(folder / SPLITS[split].segments, labels):
        if not clip_id.isprintable() or "/" in clip_id or "\\" in clip_id:
            index.refused_ids.append(clip_id)
        elif clip_id not in sounds:
            index.missing_ids.append(clip_id)
        else:
            index.clips.append(Clip(clip_id, sounds[clip_id], clip_labels, events.get(clip_id, [])))
    return index


def fingerprint(data_dir: str | Path) -> str:
    """A hash of all that `index_audioset` depends on: where the folder is, its tables and the names of its sounds."""
    folder = Path(data_dir).resolve()
    digest = hashlib.sha256(str(folder).encode())
    for split in find_splits(folder):
        tables = [folder / CLASS_LIST, folder / SPLITS[split].segments, _events_path(folder, split)]
        for path in tables:
            digest.update(path.read_bytes() if path and path.is_file() else b"none")
        sounds = sorted(_find_sounds(folder / SPLITS[split].sounds).values())
        digest.update(os.fsencode("\0".join(sounds)))
    return digest.hexdigest()


def _events_path(folder: Path, split: str) -> Path | None:
    return next((folder / name for name in SPLITS[split].events if (folder / name).is_file()), None)


def _find_sounds(folder: Path) -> dict[str, str]:
    """Absolute paths of the sound files by clip id."""

    def fail(error: OSError) -> None:
        raise error

    if not folder.is_dir():
        return {}
    sounds = {}
    for parent, _, names in os.walk(folder.resolve(), onerror=fail):
        for name in names:
            stem, suffix = os.path.splitext(name)
            if stem.startswith("Y") and suffix.lower() in SOUND_SUFFIXES:
                path = os.path.join(parent, name)
                known = sounds.get(stem[1:])
                if known is None or _preference(path) < _preference(known):
                    sounds[stem[1:]] = path
    return sounds


def _preference(path: str) -> tuple[int, str]:
    return SOUND_SUFFIXES.index(os.path.splitext(path)[1].lower()), path


def _read_segments(path: Path, labels: dict[str, int]) -> Iterator[tuple[str, list[int]]]:
    """Id and labels of each line."""
    for number, line in _lines(path):
        try:
            clip_id, start, end, mids = next(csv.reader([line], skipinitialspace=True, strict=True))
            if not clip_id or not float(start) < float(end):
                raise ValueError("no id, or no duration")
        except (csv.Error, ValueError) as error:
            raise ValueError(
                f'{path}, line {number}: expected an id, start, end and "label,label", got {line[:80]!r}.'
            ) from error
        mids = [mid.strip() for mid in mids.split(",")]
        unknown = [mid for mid in mids if mid not in labels]
        if unknown:
            raise ValueError(f"{path}, line {number}: {CLASS_LIST} lacks the label {unknown[0]!r}: add it there.")
        yield clip_id, [labels[mid] for mid in mids]


def _read_events(path: Path, labels: dict[str, int]) -> dict[str, list[Event]]:
    """
    Events by clip id. Those of classes that the list lacks are left out: the strong labels use some that no whole clip
    is labelled with.
    """
    events = {}
    for number, line in _lines(path):
        if line.startswith("segment_id"):
            continue
        try:
            # the segment's id is the clip's with the start in milliseconds
            segment_id, start, end, mid = line.split("\t")
            clip_id, _ = segment_id.rsplit("_", 1)
            event = Event(labels.get(mid, -1), float(start), float(end))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: expected <id>_<milliseconds>, start, end and label with tabs between them, "
                f"got {line[:80]!r}."
            ) from error
        if mid in labels:
            events.setdefault(clip_id, []).append(event)
    return events


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, without comments and empty ones."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and not line.startswith("#"):
                yield number, line.strip()
