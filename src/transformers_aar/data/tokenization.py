"""Runs a codec over a whole dataset and writes a token cache; see `token_cache`. It can be stopped at any time."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import ClapFeatureExtractor, ClapModel

from .staging import staged_file
from .token_cache import (
    IDENTITY,
    MANIFEST_FILE,
    REPORT_FILE,
    TokenCacheManifest,
    describe_codec,
    describe_conditioner,
    describe_dataset,
    read_manifest,
    write_json,
    write_manifest,
)
from .windows import ClipWindows, SkippedClip, WindowedClips

if TYPE_CHECKING:
    from ..modeling_sat import SatModel

CLIPS_PER_SHARD = 1000


def write_token_cache(
    dataset: Dataset,
    folder: str | Path,
    codec: "SatModel",
    accelerator: Accelerator,
    conditioner: ClapModel | None = None,
    conditioner_feature_extractor: ClapFeatureExtractor | None = None,
    num_shards: int | None = None,
    max_skipped_share: float = 0.01,
    num_workers: int = 0,
    description: str = "",
) -> None:
    """
    Writes a token cache, or finishes one: shards that are there stay. Every process calls it, and writes every
    `num_processes`-th shard. `codec.windows_per_batch` windows are encoded at once.

    Args:
        dataset (`datasets.Dataset`): see [`load_audio_dataset`].
        folder (`str` or `Path`): the cache; made when missing.
        codec ([`SatModel`]): makes the codes; moved to the accelerator's device.
        accelerator ([`Accelerator`]): the processes.
        conditioner ([`ClapModel`]) with conditioner_feature_extractor ([`ClapFeatureExtractor`], both *optional*):
            add the embedding of each window's sound.
        num_shards (`int`, *optional*): Arrow files; by default as many as the cache has that is to be finished, and in
            a new one one per 1000 sounds, at least one per process.
        max_skipped_share (`float`, defaults to 0.01): share of broken sounds above which this stops.
        num_workers (`int`, defaults to 0): processes that read sounds for each one that encodes.
        description (`str`, *optional*): the dataset in words, for the manifest.

    Raises:
        ValueError: for a codec with more than 65536 codes, a folder with another cache, and too many broken sounds.
        OSError: when the folder can't be written.
    """
    folder = Path(folder)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            default = max(accelerator.num_processes, math.ceil(len(dataset) / CLIPS_PER_SHARD))
            manifest = TokenCacheManifest(
                **describe_codec(codec),
                **describe_conditioner(conditioner),
                **describe_dataset(dataset, description),
                num_shards=num_shards or _existing_num_shards(folder) or default,
            )
            _start(folder, manifest)
        manifest = read_manifest(folder)
    writer = ShardWriter(folder, manifest, codec.to(accelerator.device), conditioner, max_skipped_share)
    shards = range(accelerator.process_index, manifest.num_shards, accelerator.num_processes)
    shards = [shard for shard in shards if not writer.is_written(shard)]
    num_clips = sum(len(manifest.rows_of_shard(shard)) for shard in shards)
    with tqdm(total=num_clips, unit=" sounds", disable=not accelerator.is_main_process) as progress:
        for shard in shards:
            clips = WindowedClips(dataset, manifest.rows_of_shard(shard), codec.config, conditioner_feature_extractor)
            writer.write(shard, _count(DataLoader(clips, batch_size=None, num_workers=num_workers), progress))
    accelerator.wait_for_everyone()
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            writer.write_report()


class ShardWriter:
    """
    Turns windows into rows of a cache's shards.

    Args:
        folder (`Path`): the cache.
        manifest ([`TokenCacheManifest`]): what it is to hold.
        codec ([`SatModel`]), conditioner ([`ClapModel`], *optional*): the models.
        max_skipped_share (`float`): share of broken sounds above which `write` and `write_report` raise an error.
    """

    def __init__(
        self,
        folder: Path,
        manifest: TokenCacheManifest,
        codec: "SatModel",
        conditioner: ClapModel | None,
        max_skipped_share: float,
    ):
        self.folder = folder
        self.manifest = manifest
        self.codec = codec.eval()
        self.conditioner = conditioner and conditioner.to(codec.device).eval()
        self.max_skipped = max_skipped_share * manifest.num_clips
        self._num_skipped = len(self._report()["skipped"])

    def is_written(self, shard: int) -> bool:
        return self._path(shard, ".arrow").exists()

    def write(self, shard: int, clips: Iterable[ClipWindows | SkippedClip]) -> None:
        """Writes a shard's Arrow file, and beside it how many windows it has and which sounds are not in it."""
        skipped = []
        windows = self._windows(clips, skipped)
        with staged_file(self._path(shard, ".arrow")) as staged:
            with ArrowWriter(features=self.manifest.features, path=str(staged)) as writer:
                while batch := list(itertools.islice(windows, self.codec.windows_per_batch)):
                    for row in self._tokenize(batch):
                        writer.write(row)
                num_windows, _ = writer.finalize()
            # once the shard appears, everything about it is there
            write_json(self._path(shard, ".json"), {"num_windows": num_windows, "skipped": skipped})

    def write_report(self) -> None:
        """Gathers the notes of all shards, which makes the cache complete."""
        report = self._report()
        self._num_skipped = len(report["skipped"])
        self._refuse_too_many_skipped(report["skipped"])
        write_json(self.folder / REPORT_FILE, report)

    def _path(self, shard: int, suffix: str) -> Path:
        return self.folder / (self.manifest.shard_name(shard) + suffix)

    def _report(self) -> dict:
        """See [`read_report`]; over the shards that are there."""
        shards = filter(self.is_written, range(self.manifest.num_shards))
        notes = [json.loads(self._path(shard, ".json").read_text(encoding="utf-8")) for shard in shards]
        skipped = [clip for note in notes for clip in note["skipped"]]
        return {
            "num_clips": self.manifest.num_clips - len(skipped),
            "num_windows": [note["num_windows"] for note in notes],
            "skipped": skipped,
        }

    def _windows(
        self, clips: Iterable[ClipWindows | SkippedClip], skipped: list[dict]
    ) -> Iterator[tuple[ClipWindows, int]]:
        """The sounds' windows, as a sound and a number; sounds that can't be read go to `skipped`."""
        for clip in clips:
            if isinstance(clip, ClipWindows):
                yield from ((clip, window) for window in range(len(clip.labels)))
                continue
            skipped.append(asdict(clip))
            self._num_skipped += 1
            self._refuse_too_many_skipped(skipped)

    def _refuse_too_many_skipped(self, skipped: list[dict]) -> None:
        if self._num_skipped > self.max_skipped:
            raise ValueError(
                f"{self._num_skipped} of {self.manifest.num_clips} sounds can't be read, more than max_skipped_share "
                f"allows; the last one: {skipped[-1]['reason']}"
            )

    @torch.inference_mode()
    def _tokenize(self, windows: list[tuple[ClipWindows, int]]) -> Iterator[dict]:
        """Rows of the cache."""
        device = self.codec.device
        input_values = torch.stack([clip.input_values[window] for clip, window in windows]).to(device)
        columns = {"codes": self.codec.encode(input_values).audio_codes[:, 0].cpu().numpy().astype(np.uint16)}
        if self.conditioner is not None:
            inputs = {
                name: torch.stack([clip.conditioner_inputs[name][window] for clip, window in windows]).to(device)
                for name in windows[0][0].conditioner_inputs
            }
            inputs["input_features"] = inputs["input_features"].to(self.conditioner.dtype)
            embeds = self.conditioner.get_audio_features(**inputs).pooler_output
            columns["conditioning"] = embeds.to(torch.float16).cpu().numpy()
        if self.manifest.label_names is not None:
            columns["labels"] = [clip.labels[window] for clip, window in windows]
        for number, (clip, window) in enumerate(windows):
            yield {"id": clip.id, "window": window} | {name: column[number] for name, column in columns.items()}


def _existing_num_shards(folder: Path) -> int | None:
    return read_manifest(folder).num_shards if (folder / MANIFEST_FILE).exists() else None


def _start(folder: Path, manifest: TokenCacheManifest) -> None:
    """Makes the folder and its manifest, or makes sure that it holds this cache; removes half-written files."""
    if (folder / MANIFEST_FILE).exists():
        existing = read_manifest(folder)
        for name, words in IDENTITY.items():
            if getattr(existing, name) != getattr(manifest, name):
                raise ValueError(
                    f"{folder} holds a token cache of another {words}: name another folder, or remove that one."
                )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"The folder {folder} can't be made: {error.strerror}.") from error
    for leftover in [*folder.glob(".tokens*"), *folder.glob(".report*")]:
        leftover.unlink()
    write_manifest(folder, manifest)


def _count(clips: Iterable, progress: tqdm) -> Iterator:
    for clip in clips:
        yield clip
        progress.update()
