"""
What the training of a recipe costs: `python scripts/measure_costs.py scripts/configs/sat_c64.yaml …` prints a Markdown
table with a column per recipe.

The recipe's own models take their own training steps, on noise and random tokens and at a small batch. Operations and
bytes are counted in them, seconds are measured on this machine; GPU hours and dollars rest on the assumptions below.
"""

import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import soundfile
import torch
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from transformers_aar import AarConfig, SatConfig, SatModel
from transformers_aar.data.examples import CropExamples, TokenExamples
from transformers_aar.data.staging import staged_file
from transformers_aar.training import arguments
from transformers_aar.training.aar_training import AarStage, collate_generation_examples, num_draws
from transformers_aar.training.loop import Stage, make_accelerator, num_steps
from transformers_aar.training.runs import load_discriminator, make_generator, make_stage_data
from transformers_aar.training.sat_training import SatStage, collate_crops

# AudioSet's unbalanced training split, and the number of GPUs that the published recipes write their batches for.
NUM_CLIPS = 2_041_789
NUM_GPUS = 8
LABELS = [f"label {number}" for number in range(527)]

# Assumed, not measured: dense peaks of an H100 SXM for bf16 and for TF32, in which GPUs compute fp32 convolutions (the
# halves of what NVIDIA's data sheet says, which counts on sparsity), the share that a training reaches, and a price.
PEAK_TFLOPS = {"bf16": 989, "no": 495}
UTILIZATION = {"sat": 0.10, "aar": 0.40}
DOLLARS_PER_HOUR = 2.50


def sat_stage(loop: arguments.LoopArguments, args: arguments.SatArguments, folder: Path) -> SatStage:
    """The tokenizer's training on noise."""
    config = SatConfig(**args.codec_config)
    args.codebook_start_examples = None
    noise = 0.1 * np.random.default_rng(0).standard_normal(2 * config.window_length)
    soundfile.write(folder / "noise.wav", noise, config.sampling_rate)
    clips = [{"audio": {"path": str(folder / "noise.wav"), "bytes": None}}] * loop.per_device_batch_size
    crops = CropExamples(clips, config.window_length_s, [config.sampling_rate], loop.seed)
    accelerator = make_accelerator(loop)
    data = make_stage_data(crops, crops, collate_crops, arguments.DataArguments(), loop, accelerator)
    return SatStage(accelerator, args, loop, SatModel(config), load_discriminator(args), *data, NUM_CLIPS)


def aar_stage(loop: arguments.LoopArguments, args: arguments.AarArguments) -> AarStage:
    """The generator's training on random tokens of the default codec, as from a token cache."""
    codec = SatModel(AarConfig().codec_config)
    codec.quantizer.codebook.normal_()
    args.conditioner = None  # its embeddings are in the cache
    generator = make_generator(args, codec, LABELS)
    config, rng = generator.config, np.random.default_rng(0)
    windows = [
        {
            "id": "noise",
            "window": window,
            "codes": rng.integers(codec.config.codebook_size, size=config.num_slots),
            "labels": [window % len(LABELS)],
            "conditioning": rng.standard_normal(config.conditioning_dim),
        }
        for window in range(loop.per_device_batch_size)
    ]
    examples = TokenExamples(windows, loop.seed, num_draws(config.num_hidden_layers))
    collate = partial(collate_generation_examples, conditioning=config.conditioning)
    accelerator = make_accelerator(loop)
    data = make_stage_data(examples, examples, collate, arguments.DataArguments(), loop, accelerator)
    return AarStage(accelerator, args, loop, generator, None, *data, NUM_CLIPS)


def lstm_flops(inputs: tuple, input_weight: tuple, hidden_weight: tuple, *_, factor: int = 2, **__) -> int:
    """Operations of an LSTM's layer, from the shapes of its sequence and its weights."""
    return factor * inputs[0] * inputs[1] * (math.prod(input_weight) + math.prod(hidden_weight))


# kernels of CPUs that PyTorch's counter doesn't know
LSTM_FLOPS = {
    torch.ops.aten.mkldnn_rnn_layer: lstm_flops,
    torch.ops.aten.mkldnn_rnn_layer_backward: partial(lstm_flops, factor=4),
}


def count_flops(stage: Stage, batches: list[dict], steps: range) -> float:
    """Operations of a step, on average: all matrix products and convolutions, but no FFTs and nothing elementwise."""
    # without fused attention and GPUs' LSTMs, which the counter knows in part, there are matrix products
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        with FlopCounterMode(display=False, custom_mapping=LSTM_FLOPS) as counter:
            for step in steps:
                stage.step(batches, step)
    return counter.get_total_flops() / len(steps)


def count_saved_bytes(stage: Stage, batches: list[dict], step: int) -> int:
    """What a step keeps for its backward pass, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in stage.model.parameters()}
    sizes = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        stage.step(batches, step)
    return sum(size for address, size in sizes.items() if address not in weights)


def seconds_per_step(stage: Stage, batches: list[dict], steps: range) -> tuple[float, float]:
    """Elapsed seconds, and those that processors worked for this process, which others' work prolongs less."""
    elapsed, busy = time.perf_counter(), time.process_time()
    for step in steps:
        stage.step(batches, step)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - elapsed) / len(steps), (time.process_time() - busy) / len(steps)


def make_stage(recipe: Path, batch_size: int, folder: Path) -> tuple[Stage, arguments.LoopArguments, range]:
    """A recipe's training at a small batch, its own options, and the steps that are a fair sample."""
    is_sat = "model_config" not in arguments.read_recipe(recipe)
    words = [str(recipe), f"--output_dir={folder}", "--report_to=none"]
    words += [] if is_sat else ["--codec=none", "--token_cache=none", "--validation_token_cache=none"]
    types = arguments.LoopArguments, arguments.SatArguments if is_sat else arguments.AarArguments
    _, loop, args = arguments.parse_arguments(words, arguments.DataArguments, *types)
    small = replace(loop, per_device_batch_size=batch_size, gradient_accumulation_steps=1)
    if not is_sat:
        return aar_stage(small, args), loop, range(1)
    # with all losses, and from one step in which the discriminator rests until the next
    interval = max(1, args.discriminator_skip_interval)
    first = math.ceil(max(args.quantizer_start_step, args.discriminator_start_step) / interval) * interval
    return sat_stage(small, args, folder), loop, range(first, first + interval)


def measure(recipe: Path, batch_size: int, repeats: int, folder: Path) -> dict[str, float]:
    """The figures of a recipe, by their names in the table."""
    stage, loop, steps = make_stage(recipe, batch_size, folder)
    batches, one_sound = [[stage.stream.read(range(size))] for size in (batch_size, 1)]
    stage.step(batches, steps[0])  # starts the codebooks and warms up
    # copies of weights in another precision are kept whatever the batch
    saved = count_saved_bytes(stage, batches, steps[0]) - count_saved_bytes(stage, one_sound, steps[0])
    flops = count_flops(stage, batches, steps) / batch_size
    elapsed, busy = map(min, zip(*(seconds_per_step(stage, batches, steps) for _ in range(repeats))))
    global_batch_size = loop.per_device_batch_size * loop.gradient_accumulation_steps * NUM_GPUS
    num_sounds = global_batch_size * num_steps(loop, NUM_CLIPS, NUM_GPUS)
    speed = PEAK_TFLOPS[loop.mixed_precision] * 1e12 * UTILIZATION[stage.name]
    hours = num_sounds * flops / speed / 3600
    return count_weights(stage) | {
        "counted: kept for the backward pass per sound (MB)": saved / (batch_size - 1) / 1e6,
        "counted: GFLOP per sound": flops / 1e9,
        "measured here: sounds per step": batch_size,
        "measured here: seconds per step": elapsed,
        "measured here: CPU seconds per step": busy,
        "measured here: GFLOP per CPU second": flops * batch_size / busy / 1e9,
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
    # counts, sums and replacements
    summed = quantizer.cluster_size.nbytes + 2 * quantizer.codebook_sum.nbytes if quantizer else 0
    return {
        "counted: parameters that are trained (M)": num_trained / 1e6,
        "counted: weights, gradients and Adam's moments on a GPU (MB)": 16 * num_trained / 1e6,
        "counted: gradients that GPUs sum per step (MB)": 4 * num_trained / 1e6,
        "counted: codebook statistics that they sum (MB)": summed / 1e6,
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
    recipes: Annotated[list[Path], typer.Argument(help="YAML files of train_sat.py or train_aar.py.")],
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
