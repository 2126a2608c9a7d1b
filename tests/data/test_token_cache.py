"""Token caches: real sound files through tiny models, to disk and back."""

import json
import multiprocessing
import time

import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator
from datasets import Audio, ClassLabel, Dataset, Features, List, Value
from transformers import ClapModel

from transformers_aar.data.audio import read_sound
from transformers_aar.data.token_cache import load_token_cache, read_manifest, read_report
from transformers_aar.data.tokenization import write_token_cache
from transformers_aar.data.windows import WindowedClips

RATE = 24_000
WINDOW = 1920  # samples, 80 ms
NAMES = ["Dog", "Rain", "Siren"]
FEATURES = Features(
    {
        "id": Value("string"),
        "audio": Value("string"),
        "labels": List(ClassLabel(names=NAMES)),
        "events": List({"label": ClassLabel(names=NAMES), "start_s": Value("float32"), "end_s": Value("float32")}),
    }
)


def make_dataset(rows):
    return Dataset.from_list(rows, features=FEATURES).cast_column("audio", Audio(decode=False))


@pytest.fixture(scope="module")
def codec(build_codec):
    return build_codec()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Nine sounds of one to five windows."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(9):
        path = folder / f"sound-{number}.flac"
        soundfile.write(path, 0.3 * rng.standard_normal(WINDOW * (1 + number % 5)), RATE)
        rows.append({"id": f"id-{number}", "audio": str(path), "labels": [number % 3], "events": []})
    return rows


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def cache(rows, codec, accelerator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    write_token_cache(make_dataset(rows), folder, codec, accelerator, num_shards=4)
    return folder


def test_codes_are_those_of_the_codec(cache, rows, codec):
    tokens = load_token_cache(cache, codec)
    expected = []
    for row in rows:
        samples = torch.cat(list(read_sound(row["audio"], RATE)), dim=-1)
        for window, codes in enumerate(codec.encode(samples[None]).audio_codes[0].tolist()):
            expected.append({"id": row["id"], "window": window, "codes": codes, "labels": row["labels"]})
    assert tokens.to_list() == expected
    assert len({tuple(row["codes"]) for row in expected}) > len(expected) // 2


def test_layout(cache, codec):
    tokens = load_token_cache(cache, codec)
    assert tokens.features["codes"] == List(Value("uint16"), length=codec.config.tokens_per_window)
    assert tokens.features["labels"].feature.names == NAMES
    names = [f"tokens-{shard:05d}-of-00004" for shard in range(4)]
    expected = {f"{name}{suffix}" for name in names for suffix in (".arrow", ".json")}
    assert {path.name for path in cache.iterdir()} == expected | {"tokens.json", "report.json"}
    # memory-mapped, not read
    assert {file["filename"] for file in tokens.cache_files} == {str(cache / f"{name}.arrow") for name in names}
    assert read_report(cache) == {"num_clips": 9, "num_windows": [3, 7, 6, 9], "skipped": []}


@pytest.mark.parametrize(
    "num_samples, num_windows",
    [(1, 1), (WINDOW, 1), (WINDOW * 3 // 2 - 1, 1), (WINDOW * 3 // 2, 2), (WINDOW * 3, 3)],
)
def test_last_window_is_kept_from_half_on(num_samples, num_windows, codec, tmp_path):
    samples = np.full(num_samples, 0.5)
    soundfile.write(tmp_path / "sound.wav", samples, RATE)
    rows = [{"id": "a", "audio": str(tmp_path / "sound.wav"), "labels": [], "events": []}]
    clip = WindowedClips(make_dataset(rows), range(1), codec.config)[0]
    assert clip.input_values.shape == (num_windows, 1, WINDOW)
    kept = min(num_samples, num_windows * WINDOW)
    assert torch.equal(clip.input_values.flatten() == 0.5, torch.arange(num_windows * WINDOW) < kept)
    assert not clip.input_values.flatten()[kept:].any()


def test_overlapping_windows(build_codec, rows):
    config = build_codec(overlap=0.25).config
    clip = WindowedClips(make_dataset(rows), range(4, 5), config)[0]
    samples = torch.cat(list(read_sound(rows[4]["audio"], RATE)), dim=-1)
    # five windows' worth of sound, of which each further window adds three quarters: 1 + 5.33, rounded
    assert len(clip.input_values) == len(clip.labels) == 6
    for window, values in enumerate(clip.input_values):
        assert torch.equal(values, samples[:, window * 1440 : window * 1440 + WINDOW])


def test_labels_of_events(rows, codec, accelerator, tmp_path):
    events = [
        {"label": 0, "start_s": 0.0, "end_s": 0.06},  # most of window 0
        {"label": 1, "start_s": 0.13, "end_s": 0.2},  # 30 ms in window 1 and 40 ms in window 2
        {"label": 2, "start_s": 0.3, "end_s": 0.31},  # short, but all of it in window 3
    ]
    row = rows[4] | {"labels": [0, 1, 2], "events": events}
    write_token_cache(make_dataset([row, rows[0]]), tmp_path, codec, accelerator)
    labels = load_token_cache(tmp_path, codec)["labels"]
    assert list(labels) == [[0], [], [1], [2], [], [0]]


def test_sounds_held_in_memory(rows, cache, codec, accelerator, tmp_path):
    embedded = []
    for row in rows:
        with open(row["audio"], "rb") as file:
            embedded.append({"id": row["id"], "audio": {"path": None, "bytes": file.read()}})
    features = Features({"id": Value("string"), "audio": {"path": Value("string"), "bytes": Value("binary")}})
    write_token_cache(Dataset.from_list(embedded, features=features), tmp_path, codec, accelerator)
    tokens = load_token_cache(tmp_path, codec)
    assert list(tokens["codes"]) == list(load_token_cache(cache, codec)["codes"])
    assert tokens.column_names == ["id", "window", "codes"]


def test_conditioning_is_what_a_generator_makes_of_the_sound(
    rows, accelerator, build_generator, clap_config, build_clap_processor, tmp_path
):
    torch.manual_seed(0)
    clap = ClapModel(clap_config)
    generator = build_generator(conditioning="clap")
    generator.attach_conditioner(clap)
    codec, extractor = generator.codec_model, build_clap_processor().feature_extractor
    write_token_cache(make_dataset(rows[3:5]), tmp_path, codec, accelerator, clap, extractor, num_shards=1)
    tokens = load_token_cache(tmp_path, codec)
    assert tokens.features["conditioning"] == List(Value("float16"), length=32)
    samples = torch.cat(list(read_sound(rows[4]["audio"], 48_000)), dim=-1)[0]
    for window in range(5):
        heard = samples[window * 2 * WINDOW : (window + 1) * 2 * WINDOW].numpy()
        expected = generator.encode_conditioning(**extractor(heard, sampling_rate=48_000, return_tensors="pt"))[0]
        actual = torch.tensor(tokens[4 + window]["conditioning"])
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    assert read_manifest(tmp_path).conditioning_dim == 32


def test_broken_sounds_are_skipped_and_listed(rows, codec, accelerator, tmp_path):
    truncated = tmp_path / "truncated.flac"
    with open(rows[4]["audio"], "rb") as file:
        truncated.write_bytes(file.read()[:3000])
    missing = tmp_path / "missing.mp3"
    broken = [
        rows[0],
        rows[1] | {"audio": str(truncated)},
        rows[2],
        rows[3] | {"audio": str(missing)},
    ]
    write_token_cache(make_dataset(broken), tmp_path / "cache", codec, accelerator, max_skipped_share=0.5)
    assert list(load_token_cache(tmp_path / "cache", codec)["id"]) == ["id-0"] + ["id-2"] * 3
    report = read_report(tmp_path / "cache")
    assert report["num_clips"] == 2
    assert [clip["name"] for clip in report["skipped"]] == [str(truncated), str(missing)]
    assert str(missing) in report["skipped"][1]["reason"]


def test_too_many_broken_sounds(rows, codec, accelerator, tmp_path):
    broken = [row | {"audio": f"nowhere-{number}.wav"} if number in (1, 7) else row for number, row in enumerate(rows)]
    dataset, folder = make_dataset(broken), tmp_path / "cache"
    with pytest.raises(ValueError, match=r"2 of 9 sounds can't be read, .* nowhere-7\.wav doesn't exist"):
        write_token_cache(dataset, folder, codec, accelerator, num_shards=3, max_skipped_share=0.2)
    assert not list(folder.glob(".*"))
    with pytest.raises(ValueError, match="incomplete, 1 of its 3 shards"):
        load_token_cache(folder, codec)
    # more patience finishes it
    write_token_cache(dataset, folder, codec, accelerator, max_skipped_share=0.3)
    assert len(load_token_cache(folder, codec)) == 25 - 2 - 3


def test_no_sound_can_be_read(codec, accelerator, rows, tmp_path):
    dataset = make_dataset([row | {"audio": "nowhere.wav"} for row in rows])
    write_token_cache(dataset, tmp_path, codec, accelerator, max_skipped_share=1.0)
    assert len(load_token_cache(tmp_path, codec)) == 0


def test_killed_and_started_again(rows, codec, accelerator, tmp_path):
    dataset = make_dataset([row | {"id": f"{row['id']}-{copy}"} for copy in range(20) for row in rows])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    write_token_cache(dataset, whole, codec, accelerator, num_shards=30)
    arguments = {"num_shards": 30}
    for num_shards_before in (1, 15):
        process = multiprocessing.get_context("fork").Process(
            target=write_token_cache, args=(dataset, killed, codec, accelerator), kwargs=arguments
        )
        process.start()
        while process.is_alive() and len(list(killed.glob("tokens-*.arrow"))) < num_shards_before:
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -9
        finished = {path: path.stat().st_mtime_ns for path in killed.glob("tokens-*.arrow")}
        assert num_shards_before <= len(finished) < 30
        with pytest.raises(ValueError, match="incomplete"):
            load_token_cache(killed, codec)
        arguments = {}  # the number of shards is known by now
    write_token_cache(dataset, killed, codec, accelerator)
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        assert (killed / path.name).read_bytes() == path.read_bytes()


def test_cache_of_another_codec_is_refused(cache, build_codec):
    with pytest.raises(ValueError, match="was made by another codec"):
        load_token_cache(cache, build_codec(seed=1))


def test_restart_with_other_settings_is_refused(cache, rows, codec, build_codec, accelerator, clap_config):
    dataset = make_dataset(rows)
    attempts = {
        "codec": (dataset, cache, build_codec(seed=1), accelerator),
        "dataset": (make_dataset(rows[::-1]), cache, codec, accelerator),
        "list of labels": (dataset.remove_columns("labels"), cache, codec, accelerator),
        "conditioner": (dataset, cache, codec, accelerator, ClapModel(clap_config)),
        "number of shards": (dataset, cache, codec, accelerator, None, None, 5),
    }
    before = {path: path.read_bytes() for path in cache.iterdir()}
    for words, arguments in attempts.items():
        with pytest.raises(ValueError, match=f"token cache of another {words}: name another folder"):
            write_token_cache(*arguments)
    assert {path: path.read_bytes() for path in cache.iterdir()} == before


def test_damaged_caches_are_refused(rows, codec, accelerator, tmp_path):
    with pytest.raises(ValueError, match="is no token cache"):
        load_token_cache(tmp_path, codec)
    write_token_cache(make_dataset(rows), tmp_path, codec, accelerator, num_shards=2)
    shard, manifest = tmp_path / "tokens-00001-of-00002.arrow", tmp_path / "tokens.json"
    content = shard.read_bytes()
    for damaged in (content[:-100], content[: len(content) // 2], b"", (tmp_path / "report.json").read_bytes()):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match="00001-of-00002.arrow is missing or damaged"):
            load_token_cache(tmp_path, codec)
    # what the message advises
    shard.unlink()
    (tmp_path / "report.json").unlink()
    write_token_cache(make_dataset(rows), tmp_path, codec, accelerator)
    assert shard.read_bytes() == content
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 2}))
    with pytest.raises(ValueError, match="version 2"):
        load_token_cache(tmp_path, codec)
    manifest.write_text("{}")
    with pytest.raises(ValueError, match="is no token cache"):
        load_token_cache(tmp_path, codec)


def test_codes_that_need_more_than_16_bits_are_refused(rows, build_codec, accelerator, tmp_path):
    codec = build_codec()
    codec.config.codebook_size = 2**16 + 1
    with pytest.raises(ValueError, match="16 bits per code"):
        write_token_cache(make_dataset(rows), tmp_path / "cache", codec, accelerator)
    assert not (tmp_path / "cache").exists()
