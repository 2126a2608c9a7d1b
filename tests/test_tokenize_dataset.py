"""scripts/tokenize_dataset.py as a user runs it: on a folder of AudioSet, in one process and in two."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from transformers_aar.data.token_cache import load_token_cache, read_manifest

SCRIPT = Path(__file__).parents[1] / "scripts" / "tokenize_dataset.py"
# Dog, Siren
LABELS = ["/m/0bt9lr", "/m/03kmc9"]
NUM_CLIPS = 6


@pytest.fixture(scope="module")
def codec(build_codec):
    return build_codec()


@pytest.fixture(scope="module")
def codec_dir(codec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec")
    codec.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def audioset_dir(tmp_path_factory):
    """Six clips of the evaluation split, one of them broken."""
    folder = tmp_path_factory.mktemp("audioset")
    clips = folder / "audioset_eval_raw_mp3"
    clips.mkdir()
    rng = np.random.default_rng(0)
    lines = ["# one", "# two", "# YTID, start_seconds, end_seconds, positive_labels"]
    for number in range(NUM_CLIPS):
        name = f"clip-{number:06d}"
        soundfile.write(clips / f"Y{name}.wav", 0.3 * rng.standard_normal(24_000 * (1 + number % 3) // 4), 24_000)
        lines.append(f'{name}, 0.000, 1.000, "{",".join(LABELS[: 1 + number % 2])}"')
    (clips / "Yclip-000004.wav").write_bytes(b"no sound")
    (folder / "eval_segments.csv").write_text("\n".join(lines) + "\n")
    return folder


def run(num_processes, *arguments, cwd):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", "--standalone"]
    command = [sys.executable, *(launcher if num_processes > 1 else []), SCRIPT, *arguments]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )


def options(codec_dir, audioset_dir, output_dir, num_workers=0):
    return (
        *("--codec", codec_dir, "--data_dir", audioset_dir, "--split", "eval", "--output_dir", output_dir),
        *("--num_shards", 3, "--max_skipped_share", 0.2, "--dataloader_num_workers", num_workers),
    )


@pytest.fixture(scope="module")
def single(codec_dir, audioset_dir, tmp_path_factory):
    """A cache made by one process, and what that wrote."""
    folder = tmp_path_factory.mktemp("single")
    return folder, run(1, *options(codec_dir, audioset_dir, folder / "cache", num_workers=2), cwd=folder)


def test_one_process(single, codec, audioset_dir):
    folder, result = single
    assert result.returncode == 0, result.stderr
    tokens = load_token_cache(folder / "cache", codec)
    clips = [f"clip-{number:06d}" for number in (0, 1, 2, 3, 5)]
    assert sorted(set(tokens["id"])) == clips
    names = tokens.features["labels"].feature.names
    assert [names[label] for label in tokens[0]["labels"]] == ["Dog"]
    assert {names[label] for label in tokens[len(tokens) - 1]["labels"]} == {"Dog", "Siren"}
    assert read_manifest(folder / "cache").num_shards == 3
    *lines, last = result.stdout.splitlines()
    assert last == (
        f"{folder / 'cache'}: {len(tokens)} windows, 0.00 hours, {13 * len(tokens)} tokens from 5 sounds (1 skipped), "
        "by 1 process(es)"
    )
    assert any("Yclip-000004.wav is no sound file" in line for line in lines)
    # one line per scale, with its tokens, the share of its codes in use, and the perplexity
    table = [line.split() for line in lines[1:5]]
    assert [line[:2] for line in table] == [["0", "1"], ["1", "2"], ["2", "4"], ["3", "6"]]
    assert all(0 < float(used.rstrip("%")) <= 100 and 1 < float(perplexity) <= 16 for _, _, used, perplexity in table)


def test_two_processes_make_the_same_cache(single, codec_dir, audioset_dir, tmp_path):
    result = run(2, *options(codec_dir, audioset_dir, tmp_path / "cache"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith("by 2 process(es)")
    expected = single[0] / "cache"
    assert {path.name for path in expected.iterdir()} == {path.name for path in (tmp_path / "cache").iterdir()}
    for path in expected.iterdir():
        assert (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes()
    # the codes were counted by both
    assert result.stdout.splitlines()[:-1] == single[1].stdout.splitlines()[:-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed, message",
    [
        ({"--max_skipped_share": 0.1}, "1 of 6 sounds can't be read"),
        ({"--data_dir": "nowhere"}, "nowhere"),
        ({"--batch_size": 0}, "`batch_size` must be a positive whole number"),
        ({"--splits": "eval"}, "`splits` is no option: the nearest is `split`"),
    ],
)
def test_mistakes_end_in_one_sentence(changed, message, codec_dir, audioset_dir, tmp_path):
    arguments = options(codec_dir, audioset_dir, tmp_path / "cache")
    result = run(1, *arguments, *next(iter(changed.items())), cwd=tmp_path)
    assert result.returncode in (1, 2)
    error = result.stderr.splitlines()[-1]
    assert error.startswith("Error: ") and message in error
    assert "Traceback" not in result.stderr
