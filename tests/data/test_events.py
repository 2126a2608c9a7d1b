"""Single events: the parts of sounds in which just one of them is heard."""

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, ClassLabel, Dataset, Features, List, Value

from transformers_aar.data.events import single_events, spans_alone
from transformers_aar.data.examples import CropExamples

RATE = 24_000
LABELS = ["Dog", "Siren", "Rain"]


def event(label: int, start_s: float, end_s: float) -> dict:
    return {"label": label, "start_s": start_s, "end_s": end_s}


@pytest.mark.parametrize(
    "events, spans",
    [
        ([], []),
        ([event(1, 2.0, 5.0)], [(2.0, 5.0, 1)]),
        # one after the other, with and without silence in between
        ([event(0, 0.0, 1.0), event(2, 3.0, 4.0)], [(0.0, 1.0, 0), (3.0, 4.0, 2)]),
        ([event(0, 0.0, 1.0), event(2, 1.0, 4.0)], [(0.0, 1.0, 0), (1.0, 4.0, 2)]),
        # overlapping: before and after
        ([event(0, 0.0, 3.0), event(1, 2.0, 5.0)], [(0.0, 2.0, 0), (3.0, 5.0, 1)]),
        # one within another
        ([event(2, 0.0, 10.0), event(0, 4.0, 5.0)], [(0.0, 4.0, 2), (5.0, 10.0, 2)]),
        # at the same time
        ([event(0, 1.0, 2.0), event(1, 1.0, 2.0)], []),
        # a class twice at once is no single event either
        ([event(0, 1.0, 3.0), event(0, 2.0, 4.0)], [(1.0, 2.0, 0), (3.0, 4.0, 0)]),
        # in whatever order they are listed
        ([event(1, 2.0, 5.0), event(0, 0.0, 3.0)], [(0.0, 2.0, 0), (3.0, 5.0, 1)]),
    ],
)
def test_spans_alone(events, spans):
    assert list(spans_alone(events)) == spans


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """Three sounds of four seconds, in which each sample tells where it is: second / 10."""
    folder = tmp_path_factory.mktemp("sounds")
    paths = [str(folder / f"{number}.wav") for number in range(3)]
    for path in paths:
        soundfile.write(path, np.arange(4 * RATE) / (10 * RATE), RATE, "FLOAT")
    label = ClassLabel(names=LABELS)
    features = Features(
        {
            **{"audio": Value("string"), "id": Value("string"), "labels": List(label)},
            "events": List({"label": label, "start_s": Value("float32"), "end_s": Value("float32")}),
        }
    )
    rows = {
        "audio": paths,
        "id": ["a", "b", "c"],
        "labels": [[0, 1], [2], [1]],
        "events": [[event(0, 0.0, 2.0), event(1, 1.0, 3.5)], [event(2, 0.5, 1.0)], []],
    }
    return Dataset.from_dict(rows, features=features).cast_column("audio", Audio(decode=False))


def test_single_events_of_a_dataset(dataset):
    parts = single_events(dataset, 0.5)
    rows = [(row["id"], row["labels"], row["start_s"], row["end_s"]) for row in parts]
    assert rows == [("a", [0], 0.0, 1.0), ("a", [1], 2.0, 3.5), ("b", [2], 0.5, 1.0)]
    assert parts.features["labels"] == dataset.features["labels"]
    assert [row["audio"]["path"] for row in parts] == [dataset[index]["audio"]["path"] for index in (0, 0, 1)]
    assert parts["clip"][:] == [0, 0, 1]
    # shorter ones are left out
    assert [row["labels"] for row in single_events(dataset, 1.2)] == [[1]]


def test_datasets_without_such_events_are_refused(dataset):
    with pytest.raises(ValueError, match="doesn't tell when its events happen.*--single_events False"):
        single_events(dataset.remove_columns("events"), 0.5)
    with pytest.raises(ValueError, match="No event of the dataset is heard alone for 3.0 s"):
        single_events(dataset, 3.0)


def test_crops_of_single_events_lie_within_them(dataset):
    """At any position, with the one event's label."""
    parts = single_events(dataset, 0.5)
    examples = CropExamples(parts, 0.5, [RATE], seed=0)
    starts = {index: set() for index in range(len(parts))}
    for epoch in range(20):
        for index, part in enumerate(parts):
            example = examples[epoch, index]
            seconds = 10 * example["waveforms"][0][0]
            assert seconds.shape == (RATE // 2,) and example["skipped"] == []
            assert part["start_s"] - 1e-3 <= seconds.min() and seconds.max() <= part["end_s"] + 1e-3
            assert example["labels"] == part["labels"]
            starts[index].add(round(seconds[0].item(), 4))
    # the last event leaves no choice
    assert [len(values) for values in starts.values()] == [20, 20, 1]


def test_events_at_the_end_of_a_sound(dataset):
    """Labels may promise more sound than there is."""
    row = dataset[0] | {"labels": [1], "start_s": 3.0, "end_s": 6.0}
    row.pop("events")
    crops = CropExamples([row], 0.5, [RATE], seed=0)
    for epoch in range(5):
        seconds = 10 * crops[epoch, 0]["waveforms"][0][0]
        assert 3.0 - 1e-3 <= seconds[0] <= 3.5 + 1e-3
        torch.testing.assert_close(seconds[-1] - seconds[0], torch.tensor(0.5), atol=1e-3, rtol=0)
