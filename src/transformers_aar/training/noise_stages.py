"""Trainings of a recipe's models without data, to measure what a step costs."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from ..configuration_aar import AarConfig
from ..configuration_sat import SatConfig
from ..data.examples import CropExamples, TokenExamples
from ..modeling_sat import SatModel
from . import arguments
from .aar_training import AarStage, collate_generation_examples, num_draws
from .loop import Stage, make_accelerator
from .runs import load_discriminator, make_generator, make_stage_data
from .sat_training import SatStage, collate_crops

# AudioSet's unbalanced training split and its labels
NUM_CLIPS = 2_041_789
LABELS = [f"label {number}" for number in range(527)]


def make_stage(recipe: Path, batch_size: int, folder: Path) -> tuple[Stage, arguments.LoopArguments, range]:
    """
    A recipe's training on noise and random tokens, at a batch of its own.

    Args:
        recipe (`Path`): YAML file of `train_sat.py` or `train_aar.py`.
        batch_size (`int`): sounds of a step.
        folder (`Path`): an empty folder, which must exist as long as the training is used.

    Returns:
        The training; the recipe's own options; and the numbers of steps that are a fair sample of all.
    """
    is_sat = "model_config" not in arguments.read_recipe(recipe)
    words = [str(recipe), f"--output_dir={folder}", "--report_to=none"]
    words += [] if is_sat else ["--codec=none", "--token_cache=none", "--validation_token_cache=none"]
    types = arguments.LoopArguments, arguments.SatArguments if is_sat else arguments.AarArguments
    _, loop, args = arguments.parse_arguments(words, arguments.DataArguments, *types)
    small = replace(loop, per_device_batch_size=batch_size, gradient_accumulation_steps=1)
    if not is_sat:
        return _aar_stage(small, args), loop, range(1)
    # with all losses, and from one step in which the discriminator rests until the next
    interval = max(1, args.discriminator_skip_interval)
    first = math.ceil(args.discriminator_start_step / interval) * interval
    return _sat_stage(small, args, folder), loop, range(first, first + interval)


def _sat_stage(loop: arguments.LoopArguments, args: arguments.SatArguments, folder: Path) -> SatStage:
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


def _aar_stage(loop: arguments.LoopArguments, args: arguments.AarArguments) -> AarStage:
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
