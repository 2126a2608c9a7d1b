"""Single events of sounds whose strong labels tell when what is heard."""

from collections.abc import Iterator, Sequence

from datasets import Dataset, List


def single_events(dataset: Dataset, duration_s: float) -> Dataset:
    """
    The parts of sounds in which one event is heard alone.

    Args:
        dataset (`datasets.Dataset`): with `events`, see [`load_audio_dataset`].
        duration_s (`float`): shorter parts are left out.

    Returns:
        `datasets.Dataset` with a row for each part: `audio` and `id` of the sound, the number of its row as `clip`,
        `labels` with the one event's, and `start_s` and `end_s`, between which it is.

    Raises:
        ValueError: for a dataset that doesn't tell when its events happen, or has none of that length.
    """
    if "events" not in dataset.column_names:
        raise ValueError(
            "The dataset doesn't tell when its events happen: take one with strong labels, or train and evaluate with "
            "--single_events False."
        )
    parts = [
        (index, *part)
        for index, events in enumerate(dataset.select_columns("events")["events"])
        for part in spans_alone(events)
        if part[1] - part[0] >= duration_s
    ]
    if not parts:
        raise ValueError(f"No event of the dataset is heard alone for {duration_s} s: take shorter crops.")
    indices, starts, ends, labels = zip(*parts)
    rows = dataset.select(indices).remove_columns(["labels", "events"])
    rows = rows.add_column("clip", list(indices))
    rows = rows.add_column("labels", [[label] for label in labels], feature=List(dataset.features["labels"].feature))
    return rows.add_column("start_s", list(starts)).add_column("end_s", list(ends))


def spans_alone(events: Sequence[dict]) -> Iterator[tuple[float, float, int]]:
    """Start, end and label of every span between the edges of events in which just one of them sounds."""
    edges = sorted({edge for event in events for edge in (event["start_s"], event["end_s"])})
    for start, end in zip(edges[:-1], edges[1:]):
        heard = [event["label"] for event in events if event["start_s"] <= start and event["end_s"] >= end]
        if len(heard) == 1:
            yield start, end, heard[0]
