"""AudioSet folders as datasets: what is indexed, Arrow files and streams, and datasets of other kinds."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
from datasets import Audio, ClassLabel, Features, Value
from datasets.distributed import split_dataset_by_node

from transformers_aar.data.audioset import AudioSet, label_names, load_audio_dataset
from transformers_aar.data.audioset_folder import BUNDLED_CLASS_LIST, index_audioset, read_classes

SPEECH, MALE_SPEECH, DOG, BARK = "/m/09x0r", "/m/05zppz", "/m/0bt9lr", "/m/05tny_"
COMMENTS = (
    "# Segments csv created Sun Mar  5 10:54:25 2017\n# num_ytids=3\n# YTID, start_seconds, end_seconds, labels\n"
)


def write_segments(folder, split, labels_by_id):
    lines = [f'{clip_id}, 30.000, 40.000, "{labels}"\n' for clip_id, labels in labels_by_id.items()]
    (folder / f"{split}_segments.csv").write_text(COMMENTS + "".join(lines))


def write_sound(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.5, 0.5, 800), 8_000)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """Arrow files of a test go into a folder of its own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path):
    """Two splits with all formats, a nested folder, ids with odd characters, a missing clip and two that escape."""
    folder = tmp_path / "audioset"
    sounds = folder / "audioset_unbalanced_train_mp3"
    write_sound(sounds / "Y--PJHxphWEs.mp3")
    write_sound(sounds / "part_1" / "Yabc_def-gh1.wav")
    write_sound(sounds / "part_1" / "Yflacflacfla.flac")
    write_sound(folder / "audioset_eval_raw_mp3" / "Yoggoggoggog.OGG")
    write_sound(tmp_path / "outside.wav")
    write_segments(
        folder,
        "unbalanced_train",
        {
            "--PJHxphWEs": f"{SPEECH},{MALE_SPEECH}",
            "missing_one": DOG,
            "abc_def-gh1": f"{DOG}, {BARK}",
            "/../../../outside": DOG,
            "flacflacfla": "/t/dd00135",
            "x\\..\\outside": DOG,
        },
    )
    write_segments(folder, "eval", {"oggoggoggog": BARK})
    return folder


def stream(folder, split="unbalanced_train"):
    return AudioSet(data_dir=str(folder)).as_streaming_dataset(split)


def test_the_bundled_class_list():
    classes = read_classes(BUNDLED_CLASS_LIST.parent)
    assert len(classes) == 527
    assert classes[SPEECH] == "Speech" and classes[MALE_SPEECH] == "Male speech, man speaking"
    assert list(classes)[-1] == "/m/07hvw1"


def test_index(folder):
    index = index_audioset(folder, "unbalanced_train")
    assert [clip.id for clip in index.clips] == ["--PJHxphWEs", "abc_def-gh1", "flacflacfla"]
    assert index.clips[1].audio == str(folder / "audioset_unbalanced_train_mp3" / "part_1" / "Yabc_def-gh1.wav")
    assert index.clips[1].labels == [74, 75]
    assert index.missing_ids == ["missing_one"]
    assert index.refused_ids == ["/../../../outside", "x\\..\\outside"]
    assert index.num_rows == 6
    assert not index.has_events


def test_of_several_files_of_one_clip_the_lossless_one_is_taken(folder):
    write_sound(folder / "audioset_eval_raw_mp3" / "Yoggoggoggog.mp3")
    write_sound(folder / "audioset_eval_raw_mp3" / "b" / "Yoggoggoggog.flac")
    write_sound(folder / "audioset_eval_raw_mp3" / "a" / "Yoggoggoggog.flac")
    [clip] = index_audioset(folder, "eval").clips
    assert clip.audio == str(folder / "audioset_eval_raw_mp3" / "a" / "Yoggoggoggog.flac")


@pytest.mark.parametrize("load", ["arrow", "stream"])
def test_rows(folder, load):
    rows = list(load_audio_dataset("unbalanced_train", folder) if load == "arrow" else stream(folder))
    assert [row["id"] for row in rows] == ["--PJHxphWEs", "abc_def-gh1", "flacflacfla"]
    assert [row["labels"] for row in rows] == [[0, 1], [74, 75], [13]]
    assert [row["events"] for row in rows] == [[], [], []]
    path = str(folder / "audioset_unbalanced_train_mp3" / "Y--PJHxphWEs.mp3")
    assert rows[0]["audio"] == ({"bytes": None, "path": path} if load == "arrow" else path)


def test_label_names(folder):
    dataset = load_audio_dataset("eval", folder)
    assert label_names(dataset)[74:76] == ["Dog", "Bark"]
    assert label_names(dataset.select_columns("audio")) is None


def test_an_own_class_list(folder):
    (folder / "class_labels_indices.csv").write_text(f'index,mid,display_name\n0,{BARK},"Loud, barking"\n')
    with pytest.raises(ValueError, match="unbalanced_train_segments.csv, line 4: .*'/m/09x0r'"):
        load_audio_dataset("eval", folder)
    (folder / "unbalanced_train_segments.csv").unlink()
    dataset = load_audio_dataset("eval", folder)
    assert label_names(dataset) == ["Loud, barking"]
    assert dataset[0]["labels"] == [0]


def test_strong_labels(folder):
    header = "segment_id\tstart_time_seconds\tend_time_seconds\tlabel\n"
    events = f"abc_def-gh1_30000\t0.5\t1.25\t{BARK}\nabc_def-gh1_30000\t2.000\t10.000\t/m/0dgw9r\n"
    (folder / "audioset_unbalanced_train_strong.tsv").write_text(header + events)
    rows = load_audio_dataset("unbalanced_train", folder)
    assert rows["events"] == [[], [{"label": 75, "start_s": 0.5, "end_s": 1.25}], []]
    assert index_audioset(folder, "unbalanced_train").has_events
    (folder / "audioset_unbalanced_train_strong.tsv").write_text(header + "abc_def-gh1\t0.5\n")
    with pytest.raises(ValueError, match="strong.tsv, line 2"):
        index_audioset(folder, "unbalanced_train")


def test_changes_of_the_folder_are_seen(folder):
    assert len(load_audio_dataset("unbalanced_train", folder)) == 3
    write_sound(folder / "audioset_unbalanced_train_mp3" / "Ymissing_one.wav")
    assert len(load_audio_dataset("unbalanced_train", folder)) == 4
    write_segments(folder, "unbalanced_train", {"missing_one": BARK})
    assert load_audio_dataset("unbalanced_train", folder)["labels"] == [[75]]


def test_a_moved_folder_is_another(folder, monkeypatch):
    """Arrow files hold absolute paths, so the same relative name elsewhere is another dataset."""
    for name in ("a", "b"):
        shutil.copytree(folder, folder.parent / name / "data")
        monkeypatch.chdir(folder.parent / name)
        assert load_audio_dataset("eval", "data")[0]["audio"]["path"].startswith(str(folder.parent / name))


@pytest.fixture
def many(tmp_path):
    ids = [f"clip{number:07d}" for number in range(200)]
    (tmp_path / "audioset_eval_raw_mp3").mkdir()
    for clip_id in ids:
        (tmp_path / "audioset_eval_raw_mp3" / f"Y{clip_id}.mp3").touch()
    write_segments(tmp_path, "eval", dict.fromkeys(ids, SPEECH))
    return tmp_path, ids


def test_a_stream_goes_on_within_a_shard(many):
    folder, ids = many
    dataset = stream(folder, "eval")
    assert 1 < dataset.num_shards < len(ids)
    rows = iter(dataset)
    for _ in range(5):
        next(rows)
    state = dataset.state_dict()
    resumed = stream(folder, "eval")
    resumed.load_state_dict(state)
    assert [row["id"] for row in resumed] == ids[5:] == [row["id"] for row in rows]


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("load", ["arrow", "stream"])
def test_nodes_share_the_rows(many, load, world_size):
    folder, ids = many
    dataset = load_audio_dataset("eval", folder) if load == "arrow" else stream(folder, "eval")
    parts = [[row["id"] for row in split_dataset_by_node(dataset, rank, world_size)] for rank in range(world_size)]
    assert sorted(sum(parts, [])) == ids
    assert all(parts)


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="Name a folder"):
        load_audio_dataset("eval")
    with pytest.raises(ValueError, match="isn't a folder in AudioSet's layout.*--dataset_name audiofolder"):
        load_audio_dataset("eval", tmp_path)
    with pytest.raises(ValueError, match="balanced_train"):
        load_audio_dataset("balanced_train", folder)
    with pytest.raises(ValueError, match="has no column 'sound'"):
        load_audio_dataset("eval", folder, audio_column="sound")
    shutil.rmtree(folder / "audioset_eval_raw_mp3")
    with pytest.raises(ValueError, match="none of the sounds"):
        load_audio_dataset("eval", folder)
    assert len(load_audio_dataset("unbalanced_train[:2]", folder)) == 2


@pytest.mark.parametrize(
    "line", ['x, 0, 10, "/m/09x0r', "x, 0, 10", "x, 0, ten, /m/09x0r", "x, 0, 10, /m/09x0r, y", ", 0, 1, a"]
)
def test_broken_lines_are_named(folder, line):
    with open(folder / "eval_segments.csv", "a") as file:
        file.write(f"{line}\nlast, 0.0, 10.0, {SPEECH}\n")
    with pytest.raises(ValueError, match="eval_segments.csv, line 5: expected"):
        index_audioset(folder, "eval")


def test_broken_class_lists_are_named(folder):
    for rows in (f"0,{BARK},Bark\n1,{DOG},Bark\n", f"1,{BARK},Bark\n", f"0,{BARK}\n"):
        (folder / "class_labels_indices.csv").write_text("index,mid,display_name\n" + rows)
        with pytest.raises(ValueError, match="class_labels_indices.csv, line"):
            index_audioset(folder, "eval")


def test_a_folder_of_labelled_folders(tmp_path):
    for number, label in enumerate(["dog", "cat", "dog"]):
        write_sound(tmp_path / label / f"{number}.wav", seed=number)
    dataset = load_audio_dataset("train", tmp_path, dataset_name="audiofolder")
    assert label_names(dataset) == ["cat", "dog"]
    assert [row["labels"] for row in dataset] == [[0], [1], [1]]
    assert [soundfile.info(row["audio"]["path"]).frames for row in dataset] == [800] * 3
    assert len(load_audio_dataset("train[:2]", tmp_path, dataset_name="audiofolder")) == 2
    with pytest.raises(
        ValueError, match=r"Unknown split \"eval\".*'train'.*--split.*--train_split and --validation_sp"
    ):
        load_audio_dataset("eval", tmp_path, dataset_name="audiofolder")


def test_a_folder_without_labels(tmp_path):
    """The folders of the splits are no labels."""
    write_sound(tmp_path / "train" / "0.wav")
    write_sound(tmp_path / "validation" / "1.wav")
    for split in ("train", "validation"):
        assert load_audio_dataset(split, tmp_path, dataset_name="audiofolder").column_names == ["audio"]


def test_a_folder_with_metadata(tmp_path):
    write_sound(tmp_path / "sounds" / "a.wav")
    (tmp_path / "metadata.csv").write_text("file_name,id\nsounds/a.wav,first\n")
    [row] = load_audio_dataset("train", tmp_path, dataset_name="audiofolder")
    assert row == {"id": "first", "audio": {"bytes": None, "path": str(tmp_path / "sounds" / "a.wav")}}


def test_parquet_with_sounds_inside(tmp_path):
    write_sound(tmp_path / "a.wav")
    sound = {"bytes": (tmp_path / "a.wav").read_bytes(), "path": "a.wav"}
    table = pa.table({"sound": [sound], "audio": ["something else"], "labels": [["text"]], "id": ["first"]})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    dataset = load_audio_dataset("train", tmp_path, dataset_name="parquet", audio_column="sound")
    assert list(dataset) == [{"audio": sound, "id": "first"}]
    assert label_names(dataset) is None


def test_parquet_as_datasets_writes_it(tmp_path):
    """With the library's own columns of sounds and of a single label."""
    sound = {"bytes": b"encoded", "path": "a.wav"}
    features = Features({"audio": Audio(), "label": ClassLabel(names=["cat", "dog"]), "labels": Value("string")})
    table = pa.table({"audio": [sound], "label": [1], "labels": ["text"]})
    pyarrow.parquet.write_table(
        table.cast(features.arrow_schema).replace_schema_metadata(features.arrow_schema.metadata),
        tmp_path / "train.parquet",
    )
    dataset = load_audio_dataset("train", dataset_name=str(tmp_path))
    assert list(dataset) == [{"audio": sound, "labels": [1]}]
    assert label_names(dataset) == ["cat", "dog"]
