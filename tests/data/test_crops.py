"""Crops of sound files: they are what the whole file holds there, and broken files are named."""

import numpy as np
import pytest
import soundfile
import torch
from torchaudio.transforms import Resample

from transformers_aar.data.audio import read_sound
from transformers_aar.data.crops import read_crop

RATES = [24_000, 48_000]


def clip(rate, seconds=4.0, channels=2):
    """A glide in noise that comes and goes, so that variable bit rates vary."""
    generator = np.random.default_rng(0)
    times = np.arange(int(rate * seconds)) / rate
    noise = generator.standard_normal((len(times), channels)) * (np.sin(7 * times) > 0.3)[:, None]
    return 0.3 * np.sin(2 * np.pi * (200 + 50 * times) * times)[:, None] + 0.1 * noise


def stored(path):
    return {"path": str(path), "bytes": None}


def write_mp3(path, sound, rate, mode, level):
    options = {"format": "MP3", "bitrate_mode": mode, "compression_level": level}
    with soundfile.SoundFile(path, "w", rate, sound.shape[1], "MPEG_LAYER_III", **options) as file:
        file.write(sound)


def assert_crops_equal_the_whole(path, atol):
    """At any position and at two rates at once, compared with the whole file decoded from its start."""
    rate = soundfile.info(path).samplerate
    original = torch.cat(list(read_sound(path, rate)), dim=-1)
    starts = set()
    for position in np.linspace(0, 1, 9, endpoint=False).tolist() + [0.999999]:
        crop = read_crop(stored(path), 0.75, RATES, position)
        starts.add(crop.start_s)
        for new_rate, samples in zip(RATES, crop.samples):
            whole = Resample(rate, new_rate)(original)
            start = round(crop.start_s * new_rate)
            assert start == pytest.approx(crop.start_s * new_rate, abs=1e-6)
            assert samples.shape == (1, 0.75 * new_rate) and samples.dtype == torch.float32
            torch.testing.assert_close(samples, whole[:, start : start + samples.shape[-1]], atol=atol, rtol=0)
    assert len(starts) == 10
    assert min(starts) == 0 and max(starts) > original.shape[-1] / rate - 0.75 - 0.2


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000])
@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_crop_is_that_part_of_the_whole_resampled(tmp_path, suffix, rate):
    soundfile.write(tmp_path / f"clip.{suffix}", clip(rate), rate)
    assert_crops_equal_the_whole(tmp_path / f"clip.{suffix}", atol=1e-6)


@pytest.mark.parametrize("rate", [22_050, 44_100])
def test_ogg(tmp_path, rate):
    soundfile.write(tmp_path / "clip.ogg", clip(rate), rate)
    assert_crops_equal_the_whole(tmp_path / "clip.ogg", atol=1e-6)


@pytest.mark.parametrize("rate, channels", [(44_100, 2), (48_000, 2), (32_000, 1), (24_000, 1), (16_000, 1)])
@pytest.mark.parametrize("mode, level", [("CONSTANT", 0.5), ("VARIABLE", 0.0), ("VARIABLE", 0.99), ("AVERAGE", 0.99)])
def test_mp3_is_as_if_decoded_from_its_start(tmp_path, capfd, rate, channels, mode, level):
    """A decoder that jumps lacks what earlier frames keep for later ones, and complains on stderr."""
    write_mp3(tmp_path / "clip.mp3", clip(rate, channels=channels), rate, mode, level)
    assert_crops_equal_the_whole(tmp_path / "clip.mp3", atol=2e-6)
    assert capfd.readouterr() == ("", "")


def test_sounds_held_in_memory(tmp_path):
    soundfile.write(tmp_path / "clip.mp3", clip(44_100), 44_100)
    in_memory = {"bytes": (tmp_path / "clip.mp3").read_bytes(), "path": None}
    crop, expected = (
        read_crop(in_memory, 1.0, [24_000], 0.6),
        read_crop(stored(tmp_path / "clip.mp3"), 1.0, [24_000], 0.6),
    )
    assert crop.start_s == expected.start_s
    assert torch.equal(crop.samples[0], expected.samples[0])


def test_a_short_sound_is_followed_by_silence(tmp_path):
    soundfile.write(tmp_path / "clip.wav", clip(44_100, seconds=0.25, channels=1), 44_100, subtype="FLOAT")
    crop = read_crop(stored(tmp_path / "clip.wav"), 1.0, [24_000], 0.9)
    assert crop.start_s == 0 and crop.samples[0].shape == (1, 24_000)
    assert crop.samples[0][:, :6_000].abs().mean() > 0.1
    assert crop.samples[0][:, 6_000:].abs().max() == 0


@pytest.mark.parametrize("suffix", ["mp3", "flac"])
def test_damage_is_named_and_what_lies_before_it_is_read(tmp_path, capfd, suffix):
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, clip(44_100), 44_100)
    expected = read_crop(stored(path), 1.0, [24_000], 0.1).samples[0]
    data = path.read_bytes()
    garbage = np.random.default_rng(0).integers(0, 256, len(data), dtype=np.uint8).tobytes()
    for damaged in (
        data[: len(data) // 2],
        data[: len(data) // 2] + garbage,
        data[: len(data) // 2] + bytes(len(data)),
    ):
        path.write_bytes(damaged)
        torch.testing.assert_close(read_crop(stored(path), 1.0, [24_000], 0.1).samples[0], expected)
        for position in (0.5, 0.7, 0.999):
            with pytest.raises(ValueError, match=f"clip.{suffix} "):
                read_crop(stored(path), 1.0, [24_000], position)
    assert capfd.readouterr() == ("", "")


def test_bad_files_are_named(tmp_path):
    (tmp_path / "text.mp3").write_text("no sound" * 100)
    (tmp_path / "nothing.mp3").touch()
    (tmp_path / "folder.wav").mkdir()
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 24_000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 24_000, subtype="FLOAT")
    for name, complaint in {
        "missing.wav": "can't be read",
        "text.mp3": "can't be read",
        "nothing.mp3": "can't be read",
        "folder.wav": "can't be read",
        "empty.wav": "empty",
        "nan.wav": "NaN",
    }.items():
        with pytest.raises(ValueError, match=f"{name} .*{complaint}"):
            read_crop(stored(tmp_path / name), 1.0, [24_000], 0.5)
    with pytest.raises(ValueError, match="can't be read"):
        read_crop({"bytes": b"no sound", "path": None}, 1.0, [24_000], 0.5)
    soundfile.write(tmp_path / "odd.wav", np.zeros(100), 44_101)
    with pytest.raises(ValueError, match="24000 Hz"):
        read_crop(stored(tmp_path / "odd.wav"), 1.0, [24_000], 0.5)


def test_a_crop_of_a_span_lies_within_it(tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, clip(44_100), 44_100, subtype="FLOAT")
    spans = {(1.0, 3.0): (1.0, 2.25), (0.0, 0.75): (0.0, 0.0), (3.25, 4.0): (3.25, 3.25), (2.0, 9.0): (2.0, 3.25)}
    for span, (first, last) in spans.items():
        starts = [read_crop(stored(path), 0.75, RATES, position, span).start_s for position in (0.0, 0.5, 0.999999)]
        # samples that all rates have are some milliseconds apart
        assert first - 0.01 <= starts[0] <= first and last - 0.01 <= starts[-1] <= last
        assert starts == sorted(starts)


def test_the_whole_is_the_span_by_default(tmp_path):
    soundfile.write(tmp_path / "clip.wav", clip(24_000), 24_000, subtype="FLOAT")
    for position in (0.0, 0.3, 0.9):
        whole = read_crop(stored(tmp_path / "clip.wav"), 1.0, [24_000], position)
        span = read_crop(stored(tmp_path / "clip.wav"), 1.0, [24_000], position, (0.0, 4.0))
        assert whole.start_s == span.start_s and torch.equal(whole.samples[0], span.samples[0])


def test_a_span_shorter_than_the_crop_begins_it(tmp_path):
    soundfile.write(tmp_path / "clip.wav", clip(24_000), 24_000, subtype="FLOAT")
    for position in (0.0, 0.9):
        assert read_crop(stored(tmp_path / "clip.wav"), 1.0, [24_000], position, (1.5, 2.0)).start_s == 1.5
