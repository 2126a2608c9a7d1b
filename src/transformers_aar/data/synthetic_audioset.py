"""AudioSet's layout on disk, filled with synthesised sounds."""

import base64
import csv
import hashlib
import io
import json
import math
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import TextIO

import soundfile
from tqdm import tqdm

from .staging import staged_file
from .synthesis import SOUND_KINDS
from .synthesis.blocks import RATE
from .synthesis.scenes import SCENE_SECONDS, plan_scene, render_scene

AUDIO_FORMATS = ("mp3", "flac")
# Says what a folder was made with, so that work on it can go on, and that it isn't somebody's own.
MANIFEST = "synthesis.json"
CLIPS_AT_ONCE = 4


@dataclass(frozen=True)
class Split:
    """
    One part of the dataset.

    Args:
        name (`str`): as in AudioSet's file names.
        clips_folder (`str`): name of the folder of the clips.
        number (`int`): what its seeds begin with, so that no sound is in two splits.
    """

    name: str
    clips_folder: str
    number: int


TRAIN = Split("unbalanced_train", "audioset_unbalanced_train_mp3", 0)
EVAL = Split("eval", "audioset_eval_raw_mp3", 1)


def write_audioset(
    folder: str | Path,
    hours: float,
    eval_hours: float = 1.0,
    seed: int = 0,
    audio_format: str = "mp3",
    num_processes: int = 1,
) -> None:
    """
    Fills a folder with synthesised clips of ten seconds (24 kHz, mono) as AudioSet's users have it:
    `audioset_unbalanced_train_mp3/Y<id>.mp3` and `audioset_eval_raw_mp3/`, `unbalanced_train_segments.csv` and
    `eval_segments.csv`, `class_labels_indices.csv`, and the times of the single events in
    `audioset_unbalanced_train_strong.tsv` and `audioset_eval_strong.tsv`.

    A clip depends on the seed, its split and its index alone, not on the number of processes or of hours, and is the
    same on every machine but for the rounding of elementary functions and the bytes that the MP3 encoder makes of it.
    A folder that was begun with the same settings is completed: what it has is kept, and the lists come last.

    Args:
        folder (`str` or `Path`): a new or empty folder, or one that was begun with the same seed and format.
        hours (`float`): length of the training split.
        eval_hours (`float`, defaults to 1): length of the evaluation split, none of whose sounds is in the other.
        seed (`int`, defaults to 0): non-negative.
        audio_format (`str`, defaults to `"mp3"`): `"mp3"` or `"flac"`.
        num_processes (`int`, defaults to 1): number of processes that make clips.

    Raises:
        ValueError: for lengths that aren't positive, a negative seed, an unknown format, and a folder with other
            files or other settings.
        OSError: when the folder can't be written or the disk is full.
    """
    folder = Path(folder)
    sizes = {split: _num_clips(length) for split, length in ((TRAIN, hours), (EVAL, eval_hours))}
    if seed < 0:
        raise ValueError(f"The seed must be a non-negative integer, but is {seed}.")
    if audio_format not in AUDIO_FORMATS:
        raise ValueError(f"There is no format {audio_format!r}: choose {' or '.join(AUDIO_FORMATS)}.")
    if num_processes < 1:
        raise ValueError(f"The number of processes must be at least 1, but is {num_processes}.")
    _claim(folder, {"seed": seed, "audio_format": audio_format, "kinds": list(SOUND_KINDS)})
    tasks = [
        (path, (seed, split.number, index))
        for split, num_clips in sizes.items()
        for index, path in enumerate(_clip_paths(folder, split, num_clips, seed, audio_format))
        if not path.exists()
    ]
    with tqdm(desc=folder.name, total=sum(sizes.values()), unit="clip", disable=None) as progress:
        progress.update(progress.total - len(tasks))
        for _ in _run(tasks, num_processes):
            progress.update()
    for split, num_clips in sizes.items():
        _write_labels(folder, split, num_clips, seed)
    _write_classes(folder / "class_labels_indices.csv")


def clip_id(seed: int, split: Split, index: int) -> str:
    """Eleven characters, which encode 64 bits as YouTube's do."""
    digest = hashlib.sha256(f"{seed}/{split.name}/{index}".encode()).digest()
    return base64.urlsafe_b64encode(digest[:8]).decode().rstrip("=")


def _clip_paths(folder: Path, split: Split, num_clips: int, seed: int, audio_format: str) -> Iterator[Path]:
    for index in range(num_clips):
        yield folder / split.clips_folder / f"Y{clip_id(seed, split, index)}.{audio_format}"


def _num_clips(hours: float) -> int:
    if not 0 < hours < math.inf:
        raise ValueError(f"The length must be a positive number of hours, but is {hours}.")
    return math.ceil(hours * 3600 / SCENE_SECONDS)


def _claim(folder: Path, settings: dict) -> None:
    """Makes the folders and notes the settings; refuses a folder that was made otherwise."""
    manifest = folder / MANIFEST
    try:
        if manifest.exists():
            if json.loads(manifest.read_text()) != settings:
                raise ValueError(f"{folder} was begun with another seed, format or version: name another folder.")
        elif folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} already holds other files: name a new or an empty folder.")
        for split in (TRAIN, EVAL):
            (folder / split.clips_folder).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} is a file, or lies below one: name a folder.") from error
    except OSError as error:
        raise OSError(f"The folder {folder} can't be written: {error.strerror}.") from error
    with staged_file(manifest) as staged:
        staged.write_text(json.dumps(settings, indent=1) + "\n")


def _run(tasks: list[tuple[Path, tuple[int, int, int]]], num_processes: int) -> Iterator[None]:
    if num_processes == 1:
        yield from map(_write_clip, tasks)
        return
    # forks of this process could inherit locks of its threads; those of the server import this package only once
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(num_processes, context, _leave_interrupts_to_parent) as executor:
        yield from executor.map(_write_clip, tasks, chunksize=CLIPS_AT_ONCE)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_clip(task: tuple[Path, tuple[int, int, int]]) -> None:
    path, seed = task
    sound = render_scene(seed, plan_scene(seed))
    encoded = io.BytesIO()
    # into memory first: Python says what is wrong with a disk, and libsndfile doesn't
    soundfile.write(encoded, sound, RATE, format=path.suffix[1:])
    with staged_file(path) as staged:
        staged.write_bytes(encoded.getvalue())


def _write_labels(folder: Path, split: Split, num_clips: int, seed: int) -> None:
    """The split's lists: labels per clip, and the times of its events."""
    scenes = [(clip_id(seed, split, index), plan_scene((seed, split.number, index))) for index in range(num_clips)]
    mids = _machine_ids()
    positive = [[mids[event.kind] for event in events] for _, events in scenes]
    with _text_file(folder / f"{split.name}_segments.csv") as file:
        file.write(f"# Segments csv of synthesised sounds, seed {seed}\n")
        file.write(
            f"# num_ytids={num_clips}, num_segs={num_clips}, num_unique_labels={len(set(chain(*positive)))}, "
            f"num_positive_labels={sum(map(len, positive))}\n"
        )
        file.write("# YTID, start_seconds, end_seconds, positive_labels\n")
        for (name, _), labels in zip(scenes, positive):
            file.write(f'{name}, {0:.3f}, {SCENE_SECONDS:.3f}, "{",".join(labels)}"\n')
    with _text_file(folder / f"audioset_{split.name}_strong.tsv") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["segment_id", "start_time_seconds", "end_time_seconds", "label"])
        for name, events in scenes:
            writer.writerows(
                [f"{name}_0", f"{event.start_s:.3f}", f"{event.end_s:.3f}", mids[event.kind]] for event in events
            )


def _write_classes(path: Path) -> None:
    mids = _machine_ids()
    with _text_file(path) as file:
        file.write("index,mid,display_name\n")
        file.writelines(f'{index},{mids[kind]},"{kind}"\n' for index, kind in enumerate(SOUND_KINDS))


def _machine_ids() -> dict[str, str]:
    """AudioSet's identifiers of its classes by their display names."""
    with files(__package__).joinpath("audioset_classes.csv").open(encoding="utf-8", newline="") as file:
        return {row["display_name"]: row["mid"] for row in csv.DictReader(file)}


@contextmanager
def _text_file(path: Path) -> Iterator[TextIO]:
    with staged_file(path) as staged, staged.open("w", encoding="utf-8", newline="") as file:
        yield file
