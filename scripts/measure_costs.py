"""
What the training of a recipe costs: `python scripts/measure_costs.py scripts/configs/sat_c64.yaml …` prints a Markdown
table with a column per recipe.

The recipe's own models take their own training steps, on noise and random tokens and at a small batch. Operations and
bytes are counted in them, seconds are measured on this machine; GPU hours and dollars rest on the assumptions below.
"""

import json
import multiprocessing
import time
import weakref
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from transformers_aar.data.staging import staged_file
from transformers_aar.evaluation.floors import LSTM_FLOPS
from transformers_aar.memory import keep_freed_memory
from transformers_aar.training.arguments import LoopArguments
from transformers_aar.training.loop import Stage, num_steps
from transformers_aar.training.noise_stages import NUM_CLIPS, make_stage

# the number of GPUs that the published recipes write their batches for
NUM_GPUS = 8

# Assumed, not measured: dense peaks of an H100 SXM for bf16 and for TF32, in which GPUs compute fp32 convolutions (the
# halves of what NVIDIA's data sheet says, which counts on sparsity), the share that a training reaches, and a price.
PEAK_TFLOPS = {"bf16": 989, "no": 495}
UTILIZATION = {"sat": 0.10, "aar": 0.40}
DOLLARS_PER_HOUR = 2.50


def count_flops(stage: Stage, batches: list[dict], steps: range) -> float:
    """Operations of a step, on average: all matrix products and convolutions, but no FFTs and nothing elementwise."""
    # without fused attention and GPUs' LSTMs, which the counter knows in part, there are matrix products
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        with FlopCounterMode(display=False, custom_mapping=LSTM_FLOPS) as counter:
            for step in steps:
                stage.step(batches, step)
    return counter.get_total_flops() / len(steps)


@dataclass(eq=False)
class Kept:
    """A tensor that is kept for the backward pass."""

    tensor: torch.Tensor


class KeptMemory(torch.autograd.graph.saved_tensors_hooks):
    """
    Within this context `peak` is the most bytes that were kept for the backward pass at a time.

    Args:
        weights (`Iterable[torch.Tensor]`): aren't counted, since they are there anyway.
    """

    def __init__(self, weights: Iterable[torch.Tensor]):
        super().__init__(self._keep, lambda kept: kept.tensor)
        self._left_out = {weight.untyped_storage().data_ptr() for weight in weights}
        self._num_kept = Counter()  # tensors by the address of their memory, which several may share
        self._bytes = self.peak = 0

    def _keep(self, tensor: torch.Tensor) -> Kept:
        kept, storage = Kept(tensor), tensor.untyped_storage()
        if storage.data_ptr() not in self._left_out:
            self._count(storage.data_ptr(), storage.nbytes(), 1)
            weakref.finalize(kept, self._count, storage.data_ptr(), storage.nbytes(), -1)
        return kept

    def _count(self, address: int, num_bytes: int, change: int) -> None:
        was_there = self._num_kept[address] > 0
        self._num_kept[address] += change
        self._bytes += num_bytes * ((self._num_kept[address] > 0) - was_there)
        self.peak = max(self.peak, self._bytes)


def count_kept_bytes(stage: Stage, batches: list[dict], step: int) -> int:
    """What a step keeps for its backward passes at a time, weights aside."""
    memory = KeptMemory(stage.model.parameters())
    with memory:
        stage.step(batches, step)
    return memory.peak


def seconds_per_step(stage: Stage, batches: list[dict], steps: range) -> tuple[float, float]:
    """Elapsed seconds, and those that processors worked for this process, which others' work prolongs less."""
    elapsed, busy = time.perf_counter(), time.process_time()
    for step in steps:
        stage.step(batches, step)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - elapsed) / len(steps), (time.process_time() - busy) / len(steps)


def measure(recipe: Path, batch_size: int, repeats: int, folder: Path) -> dict[str, float]:
    """The figures of a recipe, by their names in the table."""
    keep_freed_memory()  # as trainings do
    stage, loop, steps = make_stage(recipe, batch_size, folder)
    batches, one_sound = [[stage.stream.read(range(size))] for size in (batch_size, 1)]
    stage.step(batches, steps[0])  # starts the codebooks and warms up
    # copies of weights in another precision are kept whatever the batch
    kept = count_kept_bytes(stage, batches, steps[0]) - count_kept_bytes(stage, one_sound, steps[0])
    flops = count_flops(stage, batches, steps) / batch_size
    elapsed, busy = map(min, zip(*(seconds_per_step(stage, batches, steps) for _ in range(repeats))))
    measured = {
        "counted: kept for the backward pass per sound (MB)": kept / (batch_size - 1) / 1e6,
        "counted: GFLOP per sound": flops / 1e9,
        "measured here: sounds per step": batch_size,
        "measured here: seconds per step": elapsed,
        "measured here: CPU seconds per step": busy,
        "measured here: GFLOP per CPU second": flops * batch_size / busy / 1e9,
    }
    return count_weights(stage) | measured | costs(stage.name, loop, flops)


def costs(stage_name: str, loop: LoopArguments, flops: float) -> dict[str, float]:
    """What follows from the recipe and the operations of a sound."""
    global_batch_size = loop.per_device_batch_size * loop.gradient_accumulation_steps * NUM_GPUS
    num_sounds = global_batch_size * num_steps(loop, NUM_CLIPS, NUM_GPUS)
    speed = PEAK_TFLOPS[loop.mixed_precision] * 1e12 * UTILIZATION[stage_name]
    hours = num_sounds * flops / speed / 3600
    return {
        "recipe: sounds per step": global_batch_size,
        "recipe: steps": num_sounds / global_batch_size,
        "recipe: EFLOP, 10^18": num_sounds * flops / 1e18,
        "assumed: TFLOP/s of a GPU": speed / 1e12,
        "following: sounds per second and GPU": speed / flops,
        "following: GPU hours": hours,
        "following: dollars": hours * DOLLARS_PER_HOUR,
    }


def count_weights(stage: Stage) -> dict[str, float]:
    """The figures that no step is needed for."""
    optimizers = [stage.optimizer, getattr(stage, "discriminator_optimizer", None)]
    trained = [
        part for optimizer in optimizers if optimizer for group in optimizer.param_groups for part in group["params"]
    ]
    num_trained = sum(parameter.numel() for parameter in trained)
    modules = [stage.model, getattr(stage, "discriminator", None)]
    written = sum(tensor.nbytes for module in modules if module for tensor in module.state_dict().values())
    quantizer = stage.codec.quantizer if stage.name == "sat" else None
    # counts, sums and, where codes are dead, replacements
    summed = quantizer.cluster_size.nbytes + 2 * quantizer.codebook_sum.nbytes if quantizer else 0
    return {
        "counted: parameters that are trained (M)": num_trained / 1e6,
        "counted: weights, gradients and Adam's moments on a GPU (MB)": 16 * num_trained / 1e6,
        "counted: gradients that GPUs sum per step (MB)": 4 * num_trained / 1e6,
        "counted: codebook statistics that they sum, at most (MB)": summed / 1e6,
        "counted: a checkpoint (MB)": (written + 8 * num_trained) / 1e6,
    }


def measure_alone(recipe: Path, batch_size: int, repeats: int) -> dict[str, float]:
    """As `measure`, in a process of its own: Accelerate has one precision per process."""
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, recipe, batch_size, repeats, Path(folder)).result()


def table(columns: dict[str, dict[str, float]]) -> str:
    """All figures in Markdown."""
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name in next(iter(columns.values())):
        values = [figures[name] for figures in columns.values()]
        cells = [f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    recipes: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, help="YAML files of train_sat.py or train_aar.py.")
    ],
    batch_size: Annotated[int, typer.Option(min=2, help="Sounds of a measured step.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Times that steps are measured; the fastest counts.")] = 2,
    json_file: Annotated[Path | None, typer.Option(help="File for the table as JSON.")] = None,
) -> None:
    """Prints what the trainings of RECIPES cost."""
    columns = {recipe.stem: measure_alone(recipe, batch_size, repeats) for recipe in recipes}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU thread(s)"
    print(f"{device}, PyTorch {torch.__version__}\n\n{table(columns)}")
    if json_file is not None:
        with staged_file(json_file) as staged:
            staged.write_text(json.dumps(columns, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
