"""Checkpoints of a training: folders that are complete or passed over, and the tensors that go into them."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from transformers.utils import logging

logger = logging.get_logger(__name__)

MANIFEST = "checkpoint.json"
MANIFEST_FORMAT = 2
FINAL = "final"
# folders on their way in or out; see `CheckpointFolder._settle`
PARTIAL, REPLACED = ".partial", ".replaced"


@dataclass(frozen=True)
class Checkpoint:
    """
    Attributes:
        path (`Path`): folder with the files that were written.
        state (`dict`): what was given to [`CheckpointFolder.save`], as JSON brings it back.
    """

    path: Path
    state: dict[str, Any]


class CheckpointFolder:
    """
    The checkpoints of one training, `checkpoint-000010` and so on, and its finished model, `final`.

    A folder appears under its name only once everything in it is on the disk. It is listed in a manifest with sizes
    and SHA-256, so that what was damaged later is noticed as well. A process may be killed at any moment: the newest
    complete checkpoint is still there, and the next save clears up. "Newest" is the one that was written last, which
    is not that of the highest step when a training went on from an earlier one.

    Args:
        output_dir (`Path`): is made when something is saved.
        stage (`str`): "sat" or "aar"; checkpoints of the other stage are never taken.
        keep (`int`): how many of the newest checkpoints stay, at least 1.
    """

    def __init__(self, output_dir: Path, stage: str, keep: int):
        if keep < 1:
            raise ValueError(f"At least one checkpoint must be kept, got {keep}.")
        self.output_dir = Path(output_dir)
        self.stage = stage
        self.keep = keep

    def save(self, step: int, state: dict[str, Any], write_files: Callable[[Path], None]) -> Path:
        """
        Writes a checkpoint and removes old ones. One process calls it.

        Args:
            step (`int`): optimizer steps taken. A checkpoint of the same step is replaced.
            state (`dict`): whatever JSON can hold.
            write_files (`Callable`): is given an empty folder to write the tensors and all other files to.

        Returns:
            `Path` of the checkpoint.

        Raises:
            OSError: where it can't be written, in one sentence. Nothing of it is left, and nothing older is lost.
        """
        target = self.output_dir / f"checkpoint-{step:06d}"

        def write(folder: Path) -> None:
            write_files(folder)
            serial = 1 + max((manifest["serial"] for _, manifest in self._manifests()), default=0)
            manifest = {"format": MANIFEST_FORMAT, "stage": self.stage, "step": step, "serial": serial}
            write_manifest(folder, manifest | {"state": state, "files": describe_files(folder)})

        with self._explained(target):
            self._write(target, write)
        self._rotate()
        return target

    def finish(self, write_files: Callable[[Path], None]) -> Path:
        """
        Writes the finished model to `final`; a former one is replaced. One process calls it.

        Raises:
            OSError: where it can't be written, in one sentence. A former one is still there.
        """
        target = self.output_dir / FINAL
        with self._explained(target):
            self._write(target, write_files)
        return target

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint of this stage, None without one. Others are named in a warning each."""
        for folder, manifest in self._manifests():
            try:
                check_files(folder, manifest["files"])
                return Checkpoint(folder, manifest["state"])
            except ValueError as error:
                logger.warning_once(f"{folder} is passed over: {error}.")
        return None

    def occupant(self) -> Path | None:
        """A checkpoint or a finished model, of whatever stage, that the next save might replace."""
        occupants = [*sorted(self.output_dir.glob("checkpoint-*")), *self.output_dir.glob(FINAL)]
        return occupants[0] if occupants else None

    def load(self, folder: str | Path) -> Checkpoint:
        """
        A certain checkpoint.

        Raises:
            ValueError: when it is no complete checkpoint of this stage.
        """
        folder = Path(folder)
        try:
            manifest = self._read_manifest(folder)
            check_files(folder, manifest["files"])
        except ValueError as error:
            raise ValueError(f'{folder} can\'t be used: {error}; name another checkpoint, or "latest".') from None
        return Checkpoint(folder, manifest["state"])

    def _manifests(self) -> list[tuple[Path, dict[str, Any]]]:
        """Checkpoints whose manifest is one of this stage, newest first; their files haven't been looked at."""
        entries = []
        for folder in [*self.output_dir.glob("checkpoint-*"), *self.output_dir.glob(f".checkpoint-*{REPLACED}")]:
            try:
                entries.append((folder, self._read_manifest(folder)))
            except ValueError as error:
                logger.warning_once(f"{folder} is passed over: {error}.")
        return sorted(entries, key=lambda entry: entry[1]["serial"], reverse=True)

    def _read_manifest(self, folder: Path) -> dict[str, Any]:
        manifest = read_manifest(folder)
        if manifest["stage"] != self.stage:
            raise ValueError(f"it belongs to stage {manifest['stage']!r}, not {self.stage!r}")
        return manifest

    @contextmanager
    def _explained(self, target: Path) -> Iterator[None]:
        """Turns what goes wrong on a disk into one sentence."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            if getattr(error, "filename", None):
                reason = f"{reason} ({error.filename})"
            latest = self.latest()
            last_good = f"the last good checkpoint is {latest.path}" if latest else "there is no checkpoint yet"
            raise OSError(f"{target} can't be written: {reason}; {last_good}.") from error

    def _write(self, target: Path, write: Callable[[Path], None]) -> None:
        """Lets a folder be written aside and renames it, a former one of that name making way only then."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._settle()
        partial = hidden(target, PARTIAL)
        try:
            partial.mkdir()
            write(partial)
            sync_tree(partial)
            if target.exists():
                target.rename(hidden(target, REPLACED))
            partial.rename(target)
            sync(self.output_dir)
        finally:
            self._settle()

    def _settle(self) -> None:
        """
        Clears up after a save, also one of a killed process: half-written folders go, and a replaced one goes if its
        successor is there, and comes back if not.
        """
        for folder in list(self.output_dir.glob(".*")):
            match = re.fullmatch(rf"\.(checkpoint-\d+|{FINAL})({PARTIAL}|{REPLACED})", folder.name)
            if match is None:
                continue
            target = self.output_dir / match[1]
            if match[2] == REPLACED and not target.exists():
                folder.rename(target)
            else:
                # what can't be removed now is tried again by the next save
                shutil.rmtree(folder, ignore_errors=True)

    def _rotate(self) -> None:
        for folder, _ in self._manifests()[self.keep :]:
            # renamed first, since a checkpoint must not be seen with some of its files
            folder.rename(hidden(folder, PARTIAL))
        self._settle()


def hidden(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}{suffix}")


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def json_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file in a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": file_digest(path)}
        for path in files
    }


def check_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Raises a ValueError for the first file that isn't what [`describe_files`] has seen."""
    for name, known in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        size = path.stat().st_size
        if size != known["size"]:
            raise ValueError(f"{name} has {size} bytes instead of {known['size']}")
        if file_digest(path) != known["sha256"]:
            raise ValueError(f"{name} has changed since it was written")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    content = json.loads(json.dumps(manifest))  # keys as they will be read
    text = json.dumps({"sha256": json_digest(content), "manifest": content}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises a ValueError for a manifest that is missing, damaged or of another format."""
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest, digest = document["manifest"], document["sha256"]
    except OSError:
        raise ValueError(f"it has no {MANIFEST}, so it is no complete checkpoint") from None
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"its {MANIFEST} is damaged") from None
    if json_digest(manifest) != digest:
        raise ValueError(f"its {MANIFEST} is damaged")
    if manifest["format"] != MANIFEST_FORMAT:
        raise ValueError(f"it has format {manifest['format']}, and this version reads {MANIFEST_FORMAT}")
    return manifest


# Not strict: a parameter that never had a gradient has no state.
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def independent(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The tensors with storage of their own, taken out of the dictionary one by one. cuDNN lays the weights of an LSTM
    into one buffer, of which savers that look for shared storage keep a single tensor.
    """
    return {name: tensors.pop(name).clone(memory_format=torch.contiguous_format) for name in list(tensors)}


def uncompiled(model: nn.Module) -> nn.Module:
    """A model without Accelerate's `torch.compile`, of the whole or of its blocks, which would show in its names."""
    return getattr(model, "_orig_mod", model)


def model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    Parameters and persistent buffers on the CPU, under the names that the model has without wrappers of DDP, FSDP or
    `torch.compile`: for `save_pretrained(folder, state_dict=…)` or `safetensors.torch.save_file`.

    Every process calls it; the main process has the tensors, the others an empty dictionary.
    """
    return independent(get_model_state_dict(uncompiled(model), options=FULL_STATE))


def load_model_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Puts back what [`model_state`] has given, bit for bit. Every process calls it, each with the whole state."""
    set_model_state_dict(uncompiled(model), state, options=StateDictOptions(full_state_dict=True))


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """
    What an optimizer of the Adam kind has gathered about each parameter, on the CPU, by names such as
    `encoder.layers.0.conv.bias.exp_avg`. Learning rates and other settings aren't part of it: the recipe sets them.

    Every process calls it; the main process has the tensors, the others an empty dictionary. It is empty too before
    the optimizer's first step.

    Args:
        model (`nn.Module`): the model, plain or wrapped by DDP, FSDP or `torch.compile`.
        optimizer (`Optimizer`): one of its optimizers, plain or wrapped by Accelerate.
    """
    if not optimizer.state:  # PyTorch would take a step to get one, and training would go on from there
        return {}
    state = get_optimizer_state_dict(uncompiled(model), optimizer, options=FULL_STATE).get("state", {})
    return independent(
        {f"{parameter}.{entry}": value for parameter, entries in state.items() for entry, value in entries.items()}
    )


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, torch.Tensor]) -> None:
    """
    Puts back what [`optimizer_state`] has given, bit for bit; gradients are dropped. Every process calls it, each with
    the whole state.

    Raises:
        ValueError: for a state of parameters that the optimizer doesn't have.
    """
    model = uncompiled(model)
    # Accelerate's wrapper may leave out the step by which PyTorch lays out a new optimizer's state
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not state:
        optimizer.state.clear()
        return
    entries = {}
    for name, tensor in state.items():
        parameter, _, entry = name.rpartition(".")
        entries.setdefault(parameter, {})[entry] = tensor

    optimizer.zero_grad()  # where there are gradients, PyTorch doesn't lay it out
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    unknown = entries.keys() - {name for group in groups for name in group["params"]}
    if unknown:
        raise ValueError(
            f"The optimizer has no {min(unknown)}, whose state was saved: resume with the recipe of the checkpoint."
        )
    set_optimizer_state_dict(model, optimizer, {"state": entries, "param_groups": groups}, options=FULL_STATE)
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        for parameter, name in zip(own["params"], group["params"], strict=True):
            if name not in entries:  # laid out by PyTorch, as if a step had been taken
                optimizer.state.pop(parameter, None)
