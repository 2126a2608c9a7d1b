"""
Token caches: the codes of a whole dataset as Arrow files, one row per window, with what it takes to know them again.

A cache is a folder: a manifest, shards that each hold the windows of a contiguous range of sounds, a note beside each
shard, and a report, which is written last. Columns are `id` (of the sound), `window` (its number within the sound),
`codes`, where the dataset has labels `labels` (ids of what is heard in the window), and where a CLAP has listened
`conditioning`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import ClassLabel, Dataset, Features, List, Value, concatenate_datasets
from transformers import ClapModel

from .audioset import label_names
from .staging import staged_file
from .token_files import DESCRIPTION

if TYPE_CHECKING:
    from ..modeling_sat import SatModel

FORMAT = "transformers-aar token cache"
VERSION = 1
MANIFEST_FILE = "tokens.json"
REPORT_FILE = "report.json"
# Fields that the parts of one cache must agree on, in words.
IDENTITY = {
    "codec_fingerprint": "codec",
    "conditioner_fingerprint": "conditioner",
    "dataset_fingerprint": "dataset",
    "label_names": "list of labels",
    "num_shards": "number of shards",
}


@dataclass(frozen=True)
class TokenCacheManifest:
    """
    What a cache holds; written before anything else of it.

    Args:
        codec_fingerprint (`str`): see [`SatModel.fingerprint`].
        codec_config (`dict`): the codec's fields that tell a reader what the codes are.
        conditioner (`str`, *optional*): name of the CLAP whose embeddings are in `conditioning`.
        conditioner_fingerprint (`str`, *optional*): see [`clap_fingerprint`].
        conditioning_dim (`int`, *optional*): width of these embeddings.
        label_names (`list[str]`, *optional*): names of the label ids, where the dataset has labels.
        dataset (`str`): the dataset and split, in words.
        dataset_fingerprint (`str`): see [`dataset_fingerprint`].
        num_clips (`int`): sounds of the dataset.
        num_shards (`int`): Arrow files.
    """

    codec_fingerprint: str
    codec_config: dict
    conditioner: str | None
    conditioner_fingerprint: str | None
    conditioning_dim: int | None
    label_names: list[str] | None
    dataset: str
    dataset_fingerprint: str
    num_clips: int
    num_shards: int

    @property
    def features(self) -> Features:
        """The columns of every shard."""
        num_tokens = sum(self.codec_config["scales"])
        columns = {
            "id": Value("string"),
            "window": Value("int32"),
            "codes": List(Value("uint16"), length=num_tokens),
        }
        if self.label_names is not None:
            columns["labels"] = List(ClassLabel(names=self.label_names))
        if self.conditioning_dim is not None:
            columns["conditioning"] = List(Value("float16"), length=self.conditioning_dim)
        return Features(columns)

    def shard_name(self, shard: int) -> str:
        """Name of a shard's file, without its suffix."""
        return f"tokens-{shard:05d}-of-{self.num_shards:05d}"

    def rows_of_shard(self, shard: int) -> range:
        """The dataset's rows that a shard holds."""
        return range(shard * self.num_clips // self.num_shards, (shard + 1) * self.num_clips // self.num_shards)


def describe_codec(codec: "SatModel") -> dict:
    """
    The manifest's fields about the codec.

    Raises:
        ValueError: when the codes don't fit into 16 bits.
    """
    if codec.config.codebook_size > 2**16:
        raise ValueError(
            f"A token cache has 16 bits per code, too few for `codebook_size` {codec.config.codebook_size}: train "
            "from audio."
        )
    return {
        "codec_fingerprint": codec.fingerprint(),
        "codec_config": {name: getattr(codec.config, name) for name in ("sampling_rate", *DESCRIPTION)},
    }


def describe_conditioner(conditioner: ClapModel | None) -> dict:
    """The manifest's fields about the CLAP that listens, if one does."""
    is_there = conditioner is not None
    return {
        "conditioner": conditioner.name_or_path if is_there else None,
        "conditioner_fingerprint": clap_fingerprint(conditioner) if is_there else None,
        "conditioning_dim": conditioner.config.projection_dim if is_there else None,
    }


def describe_dataset(dataset: Dataset, description: str) -> dict:
    """The manifest's fields about the sounds."""
    return {
        "label_names": label_names(dataset),
        "dataset": description,
        "dataset_fingerprint": dataset_fingerprint(dataset),
        "num_clips": len(dataset),
    }


def clap_fingerprint(conditioner: ClapModel) -> str:
    """SHA-256, in hexadecimal digits, of the layers that end CLAP's audio half."""
    digest = hashlib.sha256()
    for parameter in conditioner.audio_projection.parameters():
        digest.update(parameter.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def dataset_fingerprint(dataset: Dataset) -> str:
    """SHA-256, in hexadecimal digits, of the ids of a dataset's sounds, or of their files' names, in their order."""
    digest = hashlib.sha256()
    if "id" in dataset.column_names:
        names = dataset.select_columns("id")["id"]
    else:
        paths = dataset.select_columns("audio").flatten()["audio.path"]
        names = (Path(path).name if path else None for path in paths)
    for name in names:
        digest.update(f"{name}\n".encode())
    return digest.hexdigest()


def write_json(path: Path, content: dict) -> None:
    with staged_file(path) as staged:
        staged.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_manifest(folder: Path, manifest: TokenCacheManifest) -> None:
    write_json(folder / MANIFEST_FILE, {"format": FORMAT, "version": VERSION} | asdict(manifest))


def read_manifest(folder: str | Path) -> TokenCacheManifest:
    """
    Raises:
        ValueError: when the folder is no token cache, or one of another version.
    """
    try:
        content = json.loads((Path(folder) / MANIFEST_FILE).read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        version = content.pop("version")
        if version == VERSION:
            return TokenCacheManifest(**{field.name: content[field.name] for field in fields(TokenCacheManifest)})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder} is no token cache: name a folder that tokenize_dataset.py wrote.") from error
    raise ValueError(f"{folder} is a token cache of version {version}, and this package reads version {VERSION}.")


def load_token_cache(folder: str | Path, codec: "SatModel") -> Dataset:
    """
    Opens a cache without reading it into memory.

    Args:
        folder (`str` or `Path`): the cache.
        codec ([`SatModel`]): the codec that the codes are to be used with.

    Returns:
        The windows, sound by sound in the order of the dataset; the names of the labels are in the features.

    Raises:
        ValueError: when the folder is no complete token cache of this version, or was made by another codec.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest.codec_fingerprint != codec.fingerprint():
        raise ValueError(
            f"{folder} was made by another codec, to which its codes belong: name that codec, or tokenize the dataset "
            "again with this one."
        )
    if not (folder / REPORT_FILE).is_file():
        missing = sum(not (folder / f"{manifest.shard_name(k)}.arrow").exists() for k in range(manifest.num_shards))
        raise ValueError(
            f"{folder} is incomplete, {missing} of its {manifest.num_shards} shards are missing: run "
            "tokenize_dataset.py again as before to finish it."
        )
    expected = read_report(folder)["num_windows"]
    return concatenate_datasets([_open_shard(folder, manifest, k, expected[k]) for k in range(manifest.num_shards)])


def read_report(folder: str | Path) -> dict:
    """
    The report of a finished cache: `num_clips` (sounds that were read), `num_windows` (rows of each shard) and
    `skipped` (`name` and `reason` of each sound that couldn't be read).
    """
    return json.loads((Path(folder) / REPORT_FILE).read_text(encoding="utf-8"))


def _open_shard(folder: Path, manifest: TokenCacheManifest, shard: int, num_windows: int) -> Dataset:
    path = folder / f"{manifest.shard_name(shard)}.arrow"
    try:
        dataset = Dataset.from_file(str(path))
        if len(dataset) != num_windows or dataset.features != manifest.features:
            raise ValueError("other rows or columns than the report says")
    except (OSError, ValueError) as error:  # as are Arrow's own errors
        raise ValueError(
            f"{path} is missing or damaged: remove it and {REPORT_FILE}, and run tokenize_dataset.py again as before "
            "to restore it."
        ) from error
    return dataset
