"""`transformers-aar dataset check`, run as a user runs it."""

import sys

import numpy as np
import pytest
import soundfile

from transformers_aar.cli import main

SPEECH, DOG = "/m/09x0r", "/m/0bt9lr"


@pytest.fixture
def check(monkeypatch, capfd):
    """Runs the command; returns its exit status and what it, and the decoders, wrote on stdout and stderr."""

    def check(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["transformers-aar", "dataset", "check", *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            main()
        return ending.value.code or 0, *capfd.readouterr()

    return check


def write_sound(path, seconds=36, rate=8_000, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, (int(seconds * rate), channels)), rate)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "audioset"
    sounds = folder / "audioset_eval_raw_mp3"
    write_sound(sounds / "Ygood.wav")
    write_sound(sounds / "nested" / "Ystereo.flac", rate=16_000, channels=2)
    write_sound(sounds / "Yshort.mp3", seconds=0.5)
    write_sound(sounds / "Yhalf.mp3")
    half = (sounds / "Yhalf.mp3").read_bytes()
    (sounds / "Yhalf.mp3").write_bytes(half[: len(half) // 2])
    (sounds / "Ytext.mp3").write_text("no sound" * 100)
    ids = ["good", "stereo", "short", "half", "text", "gone", "../../outside", "\x1b[2Jx"]
    rows = [f'{clip_id}, 0.000, 10.000, "{SPEECH}{"," + DOG if clip_id == "good" else ""}"\n' for clip_id in ids]
    (folder / "eval_segments.csv").write_text("# comment\n" * 3 + "".join(rows))
    return folder


def test_what_a_folder_holds(check, folder):
    status, out, err = check(folder)
    assert (status, err) == (0, "")
    lines = dict(line.strip().split("  ", 1) for line in out.splitlines() if "  " in line.strip())
    lines = {name: text.strip() for name, text in lines.items()}
    assert out.splitlines()[0] == "eval"
    assert lines["listed"] == "8"
    assert lines["present"] == "5, 0.03 hours"
    assert lines["missing"] == "1: gone"
    assert lines["refused"] == "2: '../../outside'; '\\x1b[2Jx'"
    assert lines["unreadable"].startswith("1: text (Ytext.mp3 is no sound file")
    assert lines["formats"] == "mp3 8000 Hz 1 ch: 2; wav 8000 Hz 1 ch: 1; flac 16000 Hz 2 ch: 1"
    assert lines["frequent labels"] == "Speech: 5; Dog: 1"
    assert lines["labels without clip"].startswith("525: Male speech, man speaking; ")
    assert lines["strong labels"] == "none"
    assert "warning: 50.0% of the clips can't be used." in out
    assert "warning: 1 sounds are shorter than one second" in out


def test_decoding_finds_truncated_files_and_the_report_names_all(check, folder, tmp_path):
    status, out, err = check(folder, "--decode", "--report", tmp_path / "new" / "report.tsv")
    assert (status, err) == (0, "")
    assert "unreadable           2: half (Yhalf.mp3 is truncated or damaged" in out
    rows = [line.split("\t") for line in (tmp_path / "new" / "report.tsv").read_text().splitlines()]
    assert rows[0] == ["split", "id", "problem"]
    assert [row[1] for row in rows[1:]] == ["gone", "../../outside", "\x1b[2Jx", "half", "text"]
    assert {row[0] for row in rows[1:]} == {"eval"}


def test_strong_labels(check, folder):
    events = f"segment_id\tstart_time_seconds\tend_time_seconds\tlabel\ngood_0\t0.0\t1.0\t{DOG}\n"
    (folder / "audioset_eval_strong.tsv").write_text(events)
    assert "strong labels        1 clips" in check(folder)[1]


def test_nothing_usable_is_an_error(check, folder, tmp_path):
    (folder / "audioset_eval_raw_mp3").rename(tmp_path / "elsewhere")
    status, out, err = check(folder)
    assert status == 1
    assert "audioset_eval_raw_mp3/Y<id>.mp3 (wav, flac, ogg) aren't there" in out
    assert err == f"Error: {folder} holds no sound that can be used.\n"


def test_another_layout_is_an_error(check, tmp_path):
    status, out, err = check(tmp_path)
    assert (status, out) == (1, "")
    assert err.startswith(f"Error: {tmp_path} isn't a folder in AudioSet's layout") and err.count("\n") == 1
