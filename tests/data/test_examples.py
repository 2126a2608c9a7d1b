"""Training examples: functions of seed, epoch and index, whatever files are broken."""

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset, Features, List, Value

from transformers_aar import SatConfig
from transformers_aar.data.examples import MAX_ATTEMPTS, CropExamples, TokenExamples, example_generator, labels_of_span
from transformers_aar.data.windows import SkippedClip, WindowedClips

RATE = 24_000


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Six sounds of a second, in which each sample tells where it is; the second and the last are broken."""
    folder = tmp_path_factory.mktemp("sounds")
    paths = [folder / f"sound-{number}.wav" for number in range(6)]
    for number, path in enumerate(paths):
        soundfile.write(path, np.linspace(0, 0.1, RATE) + 0.1 * number, RATE, "FLOAT")
    for path in (paths[1], paths[5]):
        path.write_bytes(b"no sound")
    return paths


def as_dataset(paths, **columns) -> Dataset:
    rows = {"audio": [str(path) for path in paths], **columns}
    return Dataset.from_dict(rows).cast_column("audio", Audio(decode=False))


@pytest.fixture(scope="module")
def dataset(paths):
    return as_dataset(paths, labels=[[number] for number in range(6)])


def test_an_example_depends_on_seed_epoch_and_index_alone(dataset):
    keys = [(epoch, index) for epoch in range(3) for index in (0, 2, 3)]
    forwards = {key: CropExamples(dataset, 0.1, [RATE], seed=0, num_draws=4)[key] for key in keys}
    examples = CropExamples(dataset, 0.1, [RATE], seed=0, num_draws=4)
    backwards = {key: examples[key] for key in reversed(keys)}
    for key in keys:
        assert torch.equal(forwards[key]["waveforms"][0], backwards[key]["waveforms"][0])
        assert torch.equal(forwards[key]["draws"], backwards[key]["draws"])
        assert forwards[key]["waveforms"][0].shape == (1, RATE // 10)
        assert forwards[key]["name"] == dataset[key[1]]["audio"]["path"]
        assert forwards[key]["labels"] == [key[1]]
        assert forwards[key]["skipped"] == []
    # other epochs, indices and seeds: other crops and draws
    starts = {round(example["waveforms"][0][0, 0].item() % 0.1, 6) for example in forwards.values()}
    assert len(starts) == len(keys)
    other = CropExamples(dataset, 0.1, [RATE], seed=1, num_draws=4)[0, 0]
    draws = [example["draws"] for example in (*forwards.values(), other)]
    assert len({tuple(values.tolist()) for values in draws}) == len(draws)
    assert all(values.shape == (4,) and 0 <= values.min() and values.max() < 1 for values in draws)
    assert not torch.equal(other["waveforms"][0], forwards[0, 0]["waveforms"][0])


def test_nothing_is_drawn_from_global_generators(dataset):
    examples = CropExamples(dataset, 0.1, [RATE], seed=0)
    crops = []
    for seed in range(2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        crops.append(examples[0, 1]["waveforms"][0])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(*crops)


def test_two_rates_hear_the_same_piece(dataset):
    low, high = CropExamples(dataset, 0.1, [RATE, 2 * RATE], seed=0)[0, 3]["waveforms"]
    assert low.shape == (1, 2400) and high.shape == (1, 4800)
    torch.testing.assert_close(low[0, 100:-100], high[0, 200:-200:2], atol=1e-3, rtol=0)


def test_a_broken_file_is_replaced_and_named(dataset, paths):
    examples = CropExamples(dataset, 0.1, [RATE], seed=0)
    replacements = set()
    for epoch in range(10):
        example = examples[epoch, 1]
        assert example["name"] not in map(str, (paths[1], paths[5]))
        first, *others = example["skipped"]
        assert first[0] == str(paths[1]) and str(paths[1]) in first[1]
        assert {name for name, _ in others} <= {str(paths[1]), str(paths[5])}
        index = paths.index(type(paths[0])(example["name"]))
        assert example["labels"] == [index]
        assert example["waveforms"][0].mean().item() == pytest.approx(0.05 + 0.1 * index, abs=0.06)
        assert examples[epoch, 1]["name"] == example["name"]
        replacements.add(index)
    assert len(replacements) > 1


def test_nothing_but_broken_files(paths):
    examples = CropExamples(as_dataset([paths[1], paths[5]]), 0.1, [RATE], seed=0)
    with pytest.raises(ValueError, match=f"^{MAX_ATTEMPTS} files in a row can't be read; the last one: .*sound-"):
        examples[0, 0]


@pytest.mark.parametrize("nothing", [None, {"path": None, "bytes": None}])
def test_rows_without_a_sound(paths, nothing):
    """As Parquet files may have: they are left out like broken files, in training and in a token cache."""
    features = Features({"audio": {"path": Value("string"), "bytes": Value("binary")}})
    rows = [{"path": None, "bytes": paths[0].read_bytes()}, nothing]
    dataset = Dataset.from_dict({"audio": rows}, features=features).cast_column("audio", Audio(decode=False))
    reason = "The row holds no sound, neither a path nor bytes."
    example = CropExamples(dataset, 0.1, [RATE], seed=0)[0, 1]
    assert example["name"] == "row 0" and set(example["skipped"]) == {("row 1", reason)}
    assert WindowedClips(dataset, range(2), SatConfig())[1] == SkippedClip("row 1", reason)


def test_sounds_without_a_file(paths):
    """Held in the dataset, they are called by their id, else by their number."""
    content = {"bytes": paths[0].read_bytes(), "path": None}
    rows = {"audio": [content, {"bytes": b"no sound", "path": None}]}
    features = Features({"audio": {"bytes": Value("binary"), "path": Value("string")}})
    dataset = Dataset.from_dict(rows, features=features)
    example = CropExamples(dataset, 0.1, [RATE], seed=0)[0, 1]
    assert example["name"] == "row 0"
    assert {name for name, _ in example["skipped"]} == {"row 1"}
    named = dataset.add_column("id", ["first", "second"])
    assert CropExamples(named, 0.1, [RATE], seed=0)[0, 0]["name"] == "first"


def test_labels_are_those_that_are_heard_in_the_crop(paths):
    events = [[{"label": 7, "start_s": 0.0, "end_s": 0.5}, {"label": 3, "start_s": 0.5, "end_s": 1.0}]]
    examples = CropExamples(as_dataset(paths[:1], labels=[[3, 7]], events=events), 0.1, [RATE], seed=0)
    heard = set()
    for epoch in range(30):
        example = examples[epoch, 0]
        middle = example["waveforms"][0][0, RATE // 20].item() * 10  # seconds
        if abs(middle - 0.5) > 0.01:
            assert example["labels"] == ([7] if middle < 0.5 else [3])
            heard.update(example["labels"])
    assert heard == {3, 7}


EVENTS = [
    {"label": 5, "start_s": 1.0, "end_s": 2.0},
    {"label": 2, "start_s": 1.5, "end_s": 9.0},
    {"label": 5, "start_s": 3.0, "end_s": 3.2},
    {"label": 4, "start_s": 5.0, "end_s": 5.1},
]


@pytest.mark.parametrize(
    "span, labels",
    [
        ((0.0, 1.0), []),
        ((0.5, 1.5), [5]),  # half of the event
        ((0.4, 1.4), []),
        ((1.0, 2.0), [2, 5]),  # half of the crop
        ((2.9, 3.9), [2, 5]),  # the whole of a short event
        ((3.1, 4.1), [2, 5]),
        ((3.15, 4.15), [2]),
        ((4.5, 5.5), [2, 4]),
        ((9.0, 10.0), []),
    ],
)
def test_labels_of_span(span, labels):
    assert labels_of_span({"labels": [2, 4, 5], "events": EVENTS}, *span) == labels


@pytest.mark.parametrize(
    "row", [{"labels": [2, 4]}, {"labels": [2, 4], "events": []}, {"labels": [2, 4], "events": None}]
)
def test_labels_of_a_sound_whose_events_arent_known(row):
    assert labels_of_span(row, 0.0, 1.0) == [2, 4]
    assert labels_of_span({}, 0.0, 1.0) == []


def test_token_examples():
    features = Features(
        {
            **{"id": Value("string"), "window": Value("int32"), "codes": List(Value("uint16"), length=3)},
            **{"labels": List(Value("int32")), "conditioning": List(Value("float16"), length=2)},
        }
    )
    row = {"id": "a", "window": 4, "codes": [0, 65535, 7], "labels": [1, 2], "conditioning": [0.5, -1.0]}
    examples = TokenExamples(Dataset.from_list([row, row], features=features), seed=3, num_draws=5)
    assert len(examples) == 2
    example = examples[2, 1]
    assert example["codes"].tolist() == [0, 65535, 7] and example["codes"].dtype == torch.long
    assert example["conditioning"].tolist() == [0.5, -1.0] and example["conditioning"].dtype == torch.float32
    assert (example["labels"], example["name"], example["skipped"]) == ([1, 2], "a, window 4", [])
    assert example["draws"].tolist() == example_generator(3, 2, 1).random(5).tolist()
    assert not torch.equal(example["draws"], examples[2, 0]["draws"])


def test_random_numbers_are_the_same_on_every_machine():
    """These are numpy's for the seed sequences [0, 0, 0] and [7, 3, 1000000]; with others no run could be resumed."""
    assert example_generator(0, 0, 0).random() == 0.6369616873214543
    assert example_generator(7, 3, 1_000_000).random() == 0.7572039650237351
