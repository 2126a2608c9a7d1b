"""The synthetic AudioSet: AudioSet's layout, true labels, the same clips however they are made, clear refusals."""

import csv
import re
import resource
import sys

import numpy as np
import pytest
import soundfile

from transformers_aar.cli import main
from transformers_aar.data.synthesis import SOUND_KINDS
from transformers_aar.data.synthesis.scenes import plan_scene, render_scene
from transformers_aar.data.synthetic_audioset import write_audioset

CLIP_HOURS = 10 / 3600
LISTS = {"unbalanced_train": "audioset_unbalanced_train_mp3", "eval": "audioset_eval_raw_mp3"}


@pytest.fixture(scope="module")
def audioset(tmp_path_factory):
    """Twelve clips to train on and three to evaluate, made by two processes."""
    folder = tmp_path_factory.mktemp("audioset") / "synthetic"
    write_audioset(folder, 12 * CLIP_HOURS, 3 * CLIP_HOURS, seed=5, audio_format="flac", num_processes=2)
    return folder


def segments(folder, split):
    """Rows of a list as readers of AudioSet take them: past three lines of comments."""
    with (folder / f"{split}_segments.csv").open(newline="") as file:
        comments = [next(file) for _ in range(3)]
        assert all(line.startswith("# ") for line in comments)
        return list(csv.reader(file, skipinitialspace=True))


def strong_labels(folder, split):
    with (folder / f"audioset_{split}_strong.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def clips(folder):
    """Bytes of all clips by their relative path."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.glob("audioset_*/*")}


def test_layout_is_that_of_audioset(audioset):
    for split, num_clips in (("unbalanced_train", 12), ("eval", 3)):
        rows = segments(audioset, split)
        assert len(rows) == num_clips
        assert {f"Y{row[0]}.flac" for row in rows} == {path.name for path in (audioset / LISTS[split]).iterdir()}
        for name, start, end, labels in rows:
            assert re.fullmatch(r"[\w-]{11}", name)
            assert (start, end) == ("0.000", "10.000")
            assert all(re.fullmatch(r"/[mtg]/\w+", label) for label in labels.split(","))
    for path in audioset.glob("audioset_*/*"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.frames) == (24_000, 1, 240_000)


def test_classes_are_named(audioset):
    with (audioset / "class_labels_indices.csv").open(newline="") as file:
        classes = list(csv.DictReader(file))
    assert [row["display_name"] for row in classes] == list(SOUND_KINDS)
    assert [row["index"] for row in classes] == [str(index) for index in range(len(SOUND_KINDS))]
    assert {row["display_name"]: row["mid"] for row in classes}["Siren"] == "/m/03kmc9"
    used = {label for split in LISTS for row in segments(audioset, split) for label in row[3].split(",")}
    assert used <= {row["mid"] for row in classes}


def test_strong_labels_agree_with_the_clips_labels(audioset):
    for split in LISTS:
        events = strong_labels(audioset, split)
        for name, _, _, labels in segments(audioset, split):
            own = [event for event in events if event["segment_id"] == f"{name}_0"]
            assert 1 <= len(own) <= 3
            assert [event["label"] for event in own] == labels.split(",")
            assert all(
                0 <= float(event["start_time_seconds"]) < float(event["end_time_seconds"]) <= 10 for event in own
            )


def test_events_sound_when_their_labels_say():
    """Clips with one event: it is much louder than what is there before it and a while after it."""
    scenes = [(seed := (0, 0, index), plan_scene(seed)) for index in range(40)]
    single = [(seed, events[0]) for seed, events in scenes if len(events) == 1 and events[0].end_s < 8]
    assert len(single) >= 5
    for seed, event in single:
        sound = render_scene(seed, [event])
        start, end = int(event.start_s * 24_000), int(event.end_s * 24_000)
        rest = np.concatenate([sound[:start], sound[end + 24_000 :]])
        assert sound[start:end].std() > 2 * rest.std(), event


def test_scenes_differ_between_splits_and_datasets():
    plans = {str(plan_scene((seed, split, 0))) for seed in range(4) for split in (0, 1)}
    assert len(plans) == 8


def test_one_process_makes_the_same_clips_as_two(audioset, tmp_path):
    write_audioset(tmp_path, 2 * CLIP_HOURS, CLIP_HOURS, seed=5, audio_format="flac")
    made = clips(tmp_path)
    assert len(made) == 3
    assert made.items() <= clips(audioset).items()


def test_a_begun_folder_is_completed(tmp_path):
    """A lost clip comes back as it was, the others aren't touched, and more hours only add to them."""
    write_audioset(tmp_path, 2 * CLIP_HOURS, CLIP_HOURS, audio_format="flac")
    before = clips(tmp_path)
    lost, *kept = sorted((tmp_path / LISTS["unbalanced_train"]).iterdir())
    times = [path.stat().st_mtime_ns for path in kept]
    lost.unlink()
    (tmp_path / "eval_segments.csv").unlink()
    write_audioset(tmp_path, 3 * CLIP_HOURS, CLIP_HOURS, audio_format="flac")
    assert len(clips(tmp_path)) == 4
    assert before.items() <= clips(tmp_path).items()
    assert times == [path.stat().st_mtime_ns for path in kept]
    assert len(segments(tmp_path, "unbalanced_train")) == 3 and len(segments(tmp_path, "eval")) == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"hours": 0}, "The length must be a positive number of hours, but is 0."),
        ({"hours": float("nan")}, "The length must be a positive number of hours, but is nan."),
        ({"eval_hours": -1}, "The length must be a positive number of hours, but is -1."),
        ({"seed": -1}, "The seed must be a non-negative integer, but is -1."),
        ({"audio_format": "wma"}, "There is no format 'wma': choose mp3 or flac."),
        ({"num_processes": 0}, "The number of processes must be at least 1, but is 0."),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(options, sentence, tmp_path):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        write_audioset(tmp_path / "new", **{"hours": 1, **options})
    assert not (tmp_path / "new").exists()


def test_folders_of_others_are_left_alone(audioset, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="already holds other files: name a new or an empty folder"):
        write_audioset(tmp_path, hours=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="is a file, or lies below one"):
        write_audioset(tmp_path / "thesis.txt" / "sounds", hours=1)
    with pytest.raises(ValueError, match="was begun with another seed, format or version"):
        write_audioset(audioset, hours=1, seed=6, audio_format="flac")


def test_a_full_disk_ends_in_one_sentence(tmp_path):
    """Here a limit on the size of files stands in for the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"Y[\w-]{11}\.flac can't be written: File too large\."):
            write_audioset(tmp_path, CLIP_HOURS, CLIP_HOURS, audio_format="flac")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert clips(tmp_path) == {}
    assert not list(tmp_path.glob("*.csv"))


def test_the_command_makes_mp3(monkeypatch, capsys, tmp_path):
    hours = str(CLIP_HOURS)
    arguments = ["dataset", "synth", tmp_path / "sounds", "--hours", hours, "--eval-hours", hours, "--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["transformers-aar", *map(str, arguments)])
    with pytest.raises(SystemExit) as ending:
        main()
    assert not ending.value.code
    assert "sounds: " in capsys.readouterr().out
    (path,) = (tmp_path / "sounds" / LISTS["eval"]).iterdir()
    assert path.suffix == ".mp3"
    sound, rate = soundfile.read(path)
    reference = render_scene((3, 1, 0), plan_scene((3, 1, 0)))
    assert rate == 24_000 and len(sound) == len(reference)
    assert np.corrcoef(sound, reference)[0, 1] > 0.95
