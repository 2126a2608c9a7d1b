"""Datasets of sounds for training: AudioSet from a folder, and any other that `datasets` loads."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from datasets import Audio, ClassLabel, Dataset, Features, List, Value

from .audioset_folder import Clip, find_splits, fingerprint, index_audioset, read_classes

# a multiple of most numbers of processes, each of which then streams whole shards
MAX_SHARDS = 96


@dataclass
class AudioSetConfig(datasets.BuilderConfig):
    """Which folder, and in what state: when that changes, the builder makes new Arrow files."""

    def create_config_id(self, config_kwargs: dict, custom_features: Features | None = None) -> str:
        return super().create_config_id({**config_kwargs, "state": fingerprint(self.data_dir)}, custom_features)


class AudioSet(datasets.GeneratorBasedBuilder):
    """
    AudioSet on `datasets`: `AudioSet(data_dir=folder)`, as Arrow files (`download_and_prepare`, `as_dataset`) or
    streaming (`as_streaming_dataset`), with the splits whose CSV files are there. Clips without a file are left out;
    [`index_audioset`] tells which.

    A row has the `id`, the path of the sound as `audio`, the `labels` by name, and `events`: label, `start_s` and
    `end_s` in seconds of each, where the folder has strong labels.
    """

    BUILDER_CONFIG_CLASS = AudioSetConfig

    def _info(self) -> datasets.DatasetInfo:
        label = ClassLabel(names=list(read_classes(self.config.data_dir).values()))
        event = {"label": label, "start_s": Value("float32"), "end_s": Value("float32")}
        # not Audio, which needs torchcodec to take a mere path
        columns = {"id": Value("string"), "audio": Value("string"), "labels": List(label), "events": List(event)}
        return datasets.DatasetInfo(features=Features(columns))

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(
                name=split, gen_kwargs={"shards": _as_shards(index_audioset(self.config.data_dir, split).clips)}
            )
            for split in find_splits(self.config.data_dir)
        ]

    def _generate_examples(self, shards: list[list[Clip]]) -> Iterator[tuple[str, dict]]:
        for shard, clips in enumerate(shards):
            for row, clip in enumerate(clips):
                yield f"{shard}-{row}", {**clip._asdict(), "events": [event._asdict() for event in clip.events]}


def load_audio_dataset(
    split: str,
    data_dir: str | Path | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    audio_column: str = "audio",
) -> Dataset:
    """
    Loads a dataset of sounds, map-style and without decoding any: [`AudioSet`], or what `datasets.load_dataset` knows.

    Args:
        split (`str`): name of the split, or a part of it as in `"train[:90%]"`.
        data_dir (`str` or `Path`, *optional*): the folder, in AudioSet's layout where there is no `dataset_name`.
        dataset_name (`str`, *optional*): repository on the Hub, folder, or kind of folder (`"audiofolder"`).
        dataset_config_name (`str`, *optional*): its configuration.
        audio_column (`str`, defaults to `"audio"`): the column with the sounds.

    Returns:
        `datasets.Dataset` with `audio` (`{"path", "bytes"}`, one of which may be `None`), and those of `id`, `labels`
        (list of class labels, also made of a single class label `labels` or `label`) and `events` that it has.

    Raises:
        ValueError: for what isn't there, in one sentence.
    """
    try:
        if dataset_name is None:
            dataset = _load_audioset(split, data_dir)
        else:
            dataset = _load_dataset(split, data_dir, dataset_name, dataset_config_name)
    except ValueError as error:
        if not str(error).startswith("Unknown split"):
            raise
        raise ValueError(
            f"{error} Name one with --split, or in training with --train_split and --validation_split."
        ) from error
    if audio_column not in dataset.column_names:
        raise ValueError(f"The dataset has no column {audio_column!r}: it has {', '.join(dataset.column_names)}.")
    if audio_column != "audio":
        dataset = dataset.select_columns([name for name in dataset.column_names if name != "audio"])
        dataset = dataset.rename_column(audio_column, "audio")
    dataset = _with_label_list(dataset.cast_column("audio", Audio(decode=False)))
    kept = ["audio", "id", "labels", "events"]
    return dataset.select_columns([name for name in kept if name in dataset.column_names])


def label_names(dataset: Dataset) -> list[str] | None:
    """Names of the labels that `dataset["labels"]` counts from 0; `None` for a dataset without labels."""
    labels = dataset.features.get("labels")
    return labels.feature.names if labels is not None else None


class StoredAudio(Audio):
    """`Audio` that takes encoded sounds as they are, where the library's needs torchcodec even to store a path."""

    def encode_example(self, value: str | dict) -> dict:
        if isinstance(value, str):
            return {"bytes": None, "path": value}
        if "array" in value:
            return super().encode_example(value)
        return {"bytes": value.get("bytes"), "path": value.get("path")}


def _load_audioset(split: str, data_dir: str | Path | None) -> Dataset:
    if data_dir is None:
        raise ValueError("Name a folder in AudioSet's layout (data_dir), or a dataset (dataset_name).")
    builder = AudioSet(data_dir=str(Path(data_dir).resolve()))
    builder.download_and_prepare()
    name = split.split("[")[0]
    if name in builder.info.splits and builder.info.splits[name].num_examples == 0:
        raise ValueError(
            f"{data_dir} has none of the sounds that its {name} lists: see transformers-aar dataset check."
        )
    return builder.as_dataset(split)


def _load_dataset(
    split: str, data_dir: str | Path | None, dataset_name: str, dataset_config_name: str | None
) -> Dataset:
    options = {"name": dataset_config_name, "data_dir": data_dir and str(data_dir)}
    # streams know the columns before anything is encoded
    streams = datasets.load_dataset(dataset_name, **options, streaming=True)
    features = next(iter(streams.values())).features
    if features is not None:
        features = Features(
            {
                name: StoredAudio(decode=False) if isinstance(feature, Audio) else feature
                for name, feature in features.items()
            }
        )
    dataset = datasets.load_dataset(dataset_name, **options, split=split, features=features)
    label = dataset.features.get("label")
    # audiofolder takes the folders of splits for labels where there are none below them
    if isinstance(label, ClassLabel) and set(label.names) <= set(streams):
        return dataset.remove_columns("label")
    return dataset


def _with_label_list(dataset: Dataset) -> Dataset:
    """The dataset with `labels` as a list of class labels, made of a single one where need be, or without `labels`."""
    feature = dataset.features.get("labels")
    if isinstance(feature, List) and isinstance(feature.feature, ClassLabel):
        return dataset
    names = [name for name in ("labels", "label") if name in dataset.column_names]
    unlabelled = dataset.remove_columns(names)
    for name in names:
        if isinstance(dataset.features[name], ClassLabel):
            column = [[] if label is None else [label] for label in dataset[name]]
            return unlabelled.add_column("labels", column, feature=List(dataset.features[name]))
    return unlabelled


def _as_shards(clips: list[Clip]) -> list[list[Clip]]:
    """Contiguous parts of nearly equal length, at least one."""
    bounds = np.linspace(0, len(clips), max(1, min(MAX_SHARDS, len(clips))) + 1).astype(int)
    return [clips[start:stop] for start, stop in zip(bounds[:-1], bounds[1:])]
