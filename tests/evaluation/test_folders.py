"""Folders of sounds, with files as they come."""

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from torch.utils.data import DataLoader

from transformers_aar.evaluation.folders import SoundFolder


@pytest.fixture
def write(tmp_path):
    def write(name, samples, rate=24_000, **kwargs):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, samples, rate, **kwargs)

    return write


def noise(num_samples, channels=1, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (num_samples, channels))


def test_all_formats_as_mono_at_one_rate(write, tmp_path):
    write("b.WAV", noise(24_000))
    write("a/c.flac", noise(48_000, channels=2), 48_000)
    write("d.ogg", noise(16_000), 16_000)
    write("e.mp3", noise(44_100, channels=2), 44_100)
    write(".f.wav", noise(24_000))
    (tmp_path / "notes.txt").write_text("not a sound")
    folder = SoundFolder(tmp_path, 24_000)
    assert [path.name for path in folder.paths] == ["c.flac", "b.WAV", "d.ogg", "e.mp3"]
    assert [tuple(waveform.shape) for waveform in folder] == [(24_000,)] * 4
    stereo = torch.from_numpy(soundfile.read(tmp_path / "a" / "c.flac", dtype="float32")[0]).mean(1)
    torch.testing.assert_close(folder[0], torchaudio.functional.resample(stereo, 48_000, 24_000))
    loaded = list(DataLoader(folder, batch_size=None, num_workers=1))
    assert all(torch.equal(waveform, folder[index]) for index, waveform in enumerate(loaded))


@pytest.mark.parametrize("name", ["nothing", "empty", "text"])
def test_a_folder_without_sound(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("not a sound")
    with pytest.raises(ValueError, match=rf"{name} is no folder with sounds: name one that holds \.wav"):
        SoundFolder(tmp_path / name, 24_000)


def test_files_that_cannot_be_judged_are_named(write, tmp_path):
    write("antiphase.wav", noise(24_000) * [1, -1])
    write("empty.wav", np.zeros(0))
    write("nan.wav", np.full(24_000, np.nan), subtype="FLOAT")
    write("short.wav", noise(2399))
    write("silent.flac", np.zeros(24_000))
    (tmp_path / "text.mp3").write_text("not a sound")
    (tmp_path / "void.ogg").touch()
    folder = SoundFolder(tmp_path, 24_000)
    messages = []
    for index, path in enumerate(folder.paths):
        with pytest.raises(ValueError) as error:
            folder[index]
        assert str(path) in str(error.value)
        messages.append(str(error.value))
    for message, reason in zip(
        messages, ("silent", "empty", "NaN", "too short", "silent", "no sound file", "empty"), strict=True
    ):
        assert reason in message


def test_the_shortest_sound_that_counts(write, tmp_path):
    write("short.wav", noise(800), 8_000)
    assert len(SoundFolder(tmp_path, 24_000)[0]) == 2400
