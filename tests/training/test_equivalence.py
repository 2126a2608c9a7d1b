"""However many processes and micro-batches share a batch, the training is the same."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from forking import Forked, rank_environments, read_lines, read_tensors
from recording import leave_out_pictures, record_steps

NUM_STEPS = 20
GLOBAL_BATCH_SIZE = 8


@dataclass
class Training:
    """What is left of a training: losses of each step, the last checkpoint's tensors, each process's records."""

    losses: list[dict[str, float]]
    tensors: dict[str, torch.Tensor]
    records: list[list[dict]]


def train(stage: str, options: dict, folder: Path, num_processes: int, num_micro_batches: int, dtype=torch.float64):
    """Runs the script in this precision, its global batch dealt out to so many processes and micro-batches."""
    options = options | {
        "output_dir": folder / "run",
        "per_device_batch_size": GLOBAL_BATCH_SIZE // (num_processes * num_micro_batches),
        "gradient_accumulation_steps": num_micro_batches,
    }

    def prepare() -> None:
        torch.set_default_dtype(dtype)
        leave_out_pictures()
        record_steps(folder)

    processes = [
        Forked(f"train_{stage}.py", options, folder / f"output-{rank}", prepare, environment)
        for rank, environment in enumerate(rank_environments(num_processes))
    ]
    for finished in [process.wait() for process in processes]:
        assert finished.status == 0, finished.stderr
    return Training(
        losses=[entry for entry in read_lines(folder / "run" / "metrics.jsonl") if "train/grad_norm" in entry],
        tensors=read_tensors(folder / "run" / f"checkpoint-{options['max_steps']:06d}"),
        records=[read_lines(path) for path in sorted(folder.glob("process-*.jsonl"))],
    )


def assert_same_losses(left: Training, right: Training, **bounds: float) -> None:
    assert len(left.losses) == len(right.losses)
    for one, other in zip(left.losses, right.losses):
        assert one.keys() == other.keys()
        for name in one.keys() - {"seconds"}:
            assert one[name] == pytest.approx(other[name], **bounds), f"{name} of step {one['step']}"


def assert_same_training(left: Training, right: Training) -> None:
    """In float64: losses, weights, moments of the optimizers and codebooks."""
    assert_same_losses(left, right, abs=1e-9, rel=0)
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        other = right.tensors[name]
        assert tensor.dtype == other.dtype
        assert tensor.dtype != torch.float32 or name.endswith(".step")
        assert (tensor.double() - other.double()).abs().max() < 1e-9, name


def assert_two_processes(training: Training) -> None:
    """Which had the same codebooks after every step, to the bit, and half of the sounds each."""
    first, second = training.records
    assert {entry["num_processes"] for entry in (*first, *second)} == {2}
    assert [entry["codebooks"] for entry in first] == [entry["codebooks"] for entry in second]
    assert {len(names) for entry in (*first, *second) for names in entry["names"]} == {GLOBAL_BATCH_SIZE // 2}


@pytest.mark.slow
def test_two_processes_and_accumulation_train_the_codec_alike(tmp_path, sat_options):
    """k-means start and revivals of dead codes included, with adversarial and feature losses."""
    chosen = sat_options | {"max_steps": NUM_STEPS}
    whole = train("sat", chosen, tmp_path / "whole", 1, 1)
    (records,) = whole.records
    assert [entry["step"] for entry in records] == list(range(NUM_STEPS))
    assert sum(entry["revived"] for entry in records) > NUM_STEPS
    assert len({entry["codebooks"] for entry in records}) == NUM_STEPS
    assert {"train/adversarial", "train/feature", "train/discriminator"} < whole.losses[1].keys()

    divided = train("sat", chosen, tmp_path / "divided", 2, 1)
    assert_two_processes(divided)
    assert_same_training(whole, divided)
    accumulated = train("sat", chosen, tmp_path / "accumulated", 1, 2)
    assert [len(entry["names"]) for entry in accumulated.records[0]] == [2] * NUM_STEPS
    assert_same_training(whole, accumulated)


@pytest.mark.slow
def test_the_small_recipe(tmp_path, sat_options):
    """Everything that it does besides; the adversary joins later."""
    chosen = sat_options | {
        **{"max_steps": NUM_STEPS, "codebook_start_examples": 24, "learning_rate": 1e-4},
        **{"data_dependent_init": True, "loss_weights": '{"wave": 0.0}', "discriminator_start_step": 10},
    }
    whole = train("sat", chosen, tmp_path / "whole", 1, 1)
    assert sum(entry["revived"] for entry in whole.records[0]) > 5
    assert ["train/adversarial" in losses for losses in whole.losses] == [False] * 10 + [True] * 10
    divided = train("sat", chosen, tmp_path / "divided", 2, 1)
    assert_two_processes(divided)
    assert_same_training(whole, divided)
    assert_same_training(whole, train("sat", chosen, tmp_path / "accumulated", 1, 2))


@pytest.mark.slow
def test_two_processes_and_accumulation_train_the_generator_alike(tmp_path, aar_options):
    """Conditioning dropout and stochastic depth included, averages of weights and of the losses of scales, too."""
    chosen = aar_options | {"max_steps": NUM_STEPS, "loss_average": "scales"}
    whole = train("aar", chosen, tmp_path / "whole", 1, 1)
    assert any(name.startswith("average") for name in whole.tensors)
    divided = train("aar", chosen, tmp_path / "divided", 2, 1)
    assert_two_processes(divided)
    assert_same_training(whole, divided)
    assert_same_training(whole, train("aar", chosen, tmp_path / "accumulated", 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sat", "aar"])
def test_single_precision(tmp_path, options, stage):
    """Two steps only: later ones may choose other codes by rounding."""
    chosen = options[stage] | {"max_steps": 2}
    whole = train(stage, chosen, tmp_path / "whole", 1, 1, torch.float32)
    divided = train(stage, chosen, tmp_path / "divided", 2, 1, torch.float32)
    assert_two_processes(divided)
    accumulated = train(stage, chosen, tmp_path / "accumulated", 1, 2, torch.float32)
    for other in (divided, accumulated):
        assert_same_losses(whole, other, rel=1e-4)
    assert torch.float64 not in {tensor.dtype for tensor in whole.tensors.values()}
