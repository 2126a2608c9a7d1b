"""Sound files: reading in blocks, resampling in blocks, writing, and what is refused."""

import resource
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from transformers_aar.data.audio import inspect_sound, read_sound, resample_blocks, write_sound


def read_all(path, sampling_rate=24_000, channels=1):
    return torch.cat(list(read_sound(path, sampling_rate, channels)), dim=-1)


def noise(num_samples, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(channels, num_samples, generator=generator) - 0.5


@pytest.mark.parametrize(
    "orig_rate, new_rate",
    [(8_000, 24_000), (11_025, 24_000), (22_050, 24_000), (24_000, 24_000), (44_100, 24_000), (48_000, 24_000)]
    + [(48_000, 8_000), (44_100, 16_000), (8_000, 44_100), (44_056, 24_000)],
)
def test_resampling_blocks_equals_resampling_the_whole(orig_rate, new_rate):
    """Whatever the blocks are, down to single samples at the start, the result is that of torchaudio on everything."""
    whole = noise(30_011, channels=2)
    lengths = [1, 1, 3, 500, 7_000, 1, 12_000, 10_505]
    blocks = list(resample_blocks(whole.split(lengths, dim=-1), orig_rate, new_rate))
    expected = torchaudio.functional.resample(whole, orig_rate, new_rate)
    torch.testing.assert_close(torch.cat(blocks, dim=-1), expected, atol=1e-6, rtol=0)
    assert len(blocks) > 1


def test_resampling_holds_back_little():
    """A long stream comes out as it goes in: no block but the last waits for the end."""
    given = made = 0

    def blocks():
        nonlocal given
        for seed in range(20):
            assert given * 24_000 - made * 44_100 < 500 * 24_000
            given += 4_410
            yield noise(4_410, seed=seed)

    for block in resample_blocks(blocks(), 44_100, 24_000):
        made += block.shape[-1]
    assert made == 20 * 2_400


def test_resampling_refuses_a_filter_that_does_not_fit():
    with pytest.raises(ValueError, match="24000 Hz"):
        list(resample_blocks([noise(10)], 44_101, 24_000))


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_reads_the_common_formats(tmp_path, suffix):
    """More than one block of 10 s, at the file's own rate; blocks join without a seam."""
    times = np.arange(11 * 24_000) / 24_000
    sound = 0.5 * np.sin(2 * np.pi * 220 * times)
    path = tmp_path / f"sound.{suffix}"
    soundfile.write(path, sound, 24_000)
    samples = read_all(path)[0].numpy()
    assert inspect_sound(path).num_samples == len(samples) == len(sound)
    np.testing.assert_allclose(samples, soundfile.read(path, dtype="float32")[0], atol=1e-6)
    assert np.square(samples - sound).mean() < 0.01 * np.square(sound).mean()


def test_stereo_is_mixed_down_and_resampled(tmp_path):
    stereo = noise(44_100, channels=2)
    soundfile.write(tmp_path / "stereo.wav", stereo.T.numpy(), 44_100, subtype="FLOAT")
    expected = torchaudio.functional.resample(stereo.mean(0, keepdim=True), 44_100, 24_000)
    torch.testing.assert_close(read_all(tmp_path / "stereo.wav"), expected, atol=1e-6, rtol=0)
    assert inspect_sound(tmp_path / "stereo.wav").length_at(24_000) == expected.shape[-1]


def test_channels_of_a_stereo_codec(tmp_path):
    """A codec with two channels gets both, or a mono file twice; three don't fit."""
    for channels in (1, 2, 3):
        soundfile.write(tmp_path / f"{channels}.wav", noise(100, channels).T.numpy(), 24_000, subtype="FLOAT")
    torch.testing.assert_close(read_all(tmp_path / "1.wav", channels=2), noise(100).expand(2, -1))
    torch.testing.assert_close(read_all(tmp_path / "2.wav", channels=2), noise(100, 2))
    with pytest.raises(ValueError, match="3 channels"):
        read_all(tmp_path / "3.wav", channels=2)


def test_one_sample(tmp_path):
    soundfile.write(tmp_path / "one.wav", np.array([0.5]), 24_000)
    assert read_all(tmp_path / "one.wav").tolist() == [[0.5]]


@pytest.mark.parametrize("suffix", ["wav", "aiff", "flac", "ogg", "mp3"])
def test_truncated_files_are_refused(tmp_path, suffix):
    soundfile.write(tmp_path / f"whole.{suffix}", noise(72_000)[0].numpy(), 24_000)
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"half.{suffix}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="truncated"):
        read_all(path)


def test_a_wav_of_unstated_length_is_read(tmp_path):
    """Programs that write into a pipe leave the largest number in the header."""
    path = tmp_path / "piped.wav"
    soundfile.write(path, noise(1000)[0].numpy(), 24_000, subtype="PCM_16")
    data = bytearray(path.read_bytes())
    position = data.index(b"data") + 4
    data[4:8] = data[position : position + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert read_all(path).shape == (1, 1000)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "nothing.wav").touch()
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 24_000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 24_000, subtype="FLOAT")
    soundfile.write(tmp_path / "infinite.wav", np.array([0.0, np.inf]), 24_000, subtype="FLOAT")
    for name, complaint in {
        "missing.wav": "doesn't exist",
        "text.wav": "no sound file",
        "nothing.wav": "empty",
        "empty.wav": "empty",
        "nan.wav": "NaN",
        "infinite.wav": "NaN",
        ".": "is a folder",
    }.items():
        with pytest.raises(ValueError, match=complaint) as error:
            read_all(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_sound_with_too_high_a_peak_is_scaled_as_a_whole(tmp_path, suffix, channels):
    """Also what was written before the peak came. The quiet ones stay as they are."""
    loud, quiet = tmp_path / f"loud.{suffix}", tmp_path / f"quiet.{suffix}"
    samples = noise(11 * 24_000, channels)
    samples[-1, -1] = -4.0
    with write_sound(loud, 24_000, channels) as writer:
        writer.write(samples[:, :100])
        assert not loud.exists()
        writer.write(samples[:, 100:100])
        writer.write(samples[:, 100:])
    assert (writer.peak, writer.num_samples) == (4.0, 11 * 24_000)
    assert soundfile.info(loud).subtype == "PCM_16"
    torch.testing.assert_close(read_all(loud, channels=channels), samples / 4, atol=1e-4, rtol=0)

    with write_sound(quiet, 24_000, channels) as writer:
        writer.write(samples[:, :100])
    torch.testing.assert_close(read_all(quiet, channels=channels), samples[:, :100], atol=1e-4, rtol=0)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "out.wav"
    path.write_text("before")
    with pytest.raises(ValueError, match="NaN"):
        with write_sound(path, 24_000) as writer:
            writer.write(torch.zeros(1, 100))
            writer.write(torch.tensor([[float("nan")]]))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_and_a_full_disk_are_errors(tmp_path):
    with pytest.raises(OSError, match="can't be written"):
        with write_sound(tmp_path / "missing" / "out.wav", 24_000):
            pass

    program = (
        "import sys, torch; from transformers_aar.data.audio import write_sound\n"
        "with write_sound(sys.argv[1], 24_000) as writer:\n"
        "    for _ in range(10): writer.write(torch.rand(1, 24_000) - 0.5)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "out.wav"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"OSError: {tmp_path / 'out.wav'} can't be written")
    assert list(tmp_path.iterdir()) == []
