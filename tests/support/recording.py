"""
What tests look into a training with. As a script it runs one of ours and writes down what each process does in each
step:

    python recording.py FOLDER scripts/train_sat.py --option value …
"""

import hashlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from transformers_aar.quantizer_sat import SatQuantizer
from transformers_aar.training import aar_training, loop, sat_training


def share_lstm_storage(model: nn.Module) -> None:
    """Lays each LSTM's weights into one buffer, as cuDNN does in the first forward on a GPU."""
    for lstm in (module for module in model.modules() if isinstance(module, nn.LSTM)):
        flat = torch.cat([parameter.detach().flatten() for parameter in lstm.parameters()])
        pieces = flat.split([parameter.numel() for parameter in lstm.parameters()])
        for parameter, piece in zip(lstm.parameters(), pieces, strict=True):
            parameter.data = piece.view_as(parameter)


class Killer:
    """Kills its process before the n-th thing that it is about to do to files in a folder."""

    changes = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

    def __init__(self, root: Path, deadline: int):
        self.root, self.remaining = str(root), deadline
        sys.addaudithook(self.hook)
        self.save_file = safetensors.torch.save_file
        for module in (safetensors.torch, sat_training, aar_training):
            module.save_file = self.save_half

    def hook(self, event: str, args: tuple) -> None:
        if event in self.changes and isinstance(args[0], str | os.PathLike):
            # removing a tree names files by their folder's descriptor: no path to compare
            inside = os.fspath(args[0]).startswith(self.root) or event in ("os.remove", "os.rmdir")
        elif event == "open":
            path, mode, flags = args
            writes = any(letter in (mode or "") for letter in "wax+") or flags & (os.O_WRONLY | os.O_RDWR)
            inside = writes and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.root)
        else:
            return
        if inside:
            self.count()

    def save_half(self, tensors: dict, path: Path, *args, **kwargs) -> None:
        """As safetensors writes without Python's knowledge: killed before, in the middle, or after."""
        self.save_file(tensors, path, *args, **kwargs)
        self.count(lambda: os.truncate(path, os.path.getsize(path) // 2))

    def count(self, before=lambda: None) -> None:
        self.remaining -= 1
        if self.remaining == 0:
            before()
            os.kill(os.getpid(), signal.SIGKILL)


def leave_out_pictures() -> None:
    """From now on validation draws nothing, which would take longer than all the rest."""
    loop.TrainingLog._write_sounds = lambda *_: None


def codebook_digest(quantizer: SatQuantizer) -> str:
    digest = hashlib.sha256()
    for tensor in (quantizer.codebook, quantizer.codebook_sum, quantizer.cluster_size):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def record_steps(folder: Path) -> None:
    """
    From now on every step leaves a line in `process-<rank>.jsonl`: its sounds, and of the codebooks a digest and how
    many codes were revived.
    """
    samples = []  # those of the last update, from which dead codes restart

    def sample_vectors(quantizer, pooled, original=SatQuantizer._sample_vectors):
        samples[:] = [original(quantizer, pooled)]
        return samples[0]

    def record(stage, micro_batches: list[dict], step: int) -> None:
        codec = stage.codec if isinstance(stage, sat_training.SatStage) else stage.generator.codec_model
        quantizer = codec.quantizer
        entry = {
            "step": step,
            "num_processes": stage.accelerator.num_processes,
            "names": [[Path(name).name for name in batch["names"]] for batch in micro_batches],
            "initialized": bool(quantizer.initialized),
            "codebooks": codebook_digest(quantizer),
            "revived": int((samples[0] == quantizer.codebook).all(-1).sum()) if samples else 0,
        }
        with (folder / f"process-{stage.accelerator.process_index}.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def recorded(original):
        def step(stage, micro_batches, number):
            losses = original(stage, micro_batches, number)
            record(stage, micro_batches, number)
            return losses

        return step

    SatQuantizer._sample_vectors = sample_vectors
    for stage in (sat_training.SatStage, aar_training.AarStage):
        stage.step = recorded(stage.step)


if __name__ == "__main__":
    record_steps(Path(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
