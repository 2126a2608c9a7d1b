"""Learning-rate and weight-decay schedules, and the parameter groups that weight decay acts on.

A learning-rate schedule maps an iteration to a factor of the peak rate, as
`torch.optim.lr_scheduler.LambdaLR` wants it:
`LambdaLR(optimizer, partial(lin0, warmup_iterations=600, total_iterations=20_000))`.
"""

import math
from typing import Any

import torch
from torch import nn

# The generator's parameters that weight decay leaves alone although they are matrices: what is added to the input per
# slot and per scale, and each block's offset to a shared modulation.
UNDECAYED_TABLES = {"start_position", "positions", "levels", "modulation_offset"}


def lin0(
    iteration: int,
    warmup_iterations: int,
    total_iterations: int,
    start_ratio: float = 0.005,
    end_ratio: float = 0.01,
) -> float:
    """Linear warm-up, the peak for the first twentieth of what remains, then linear down to `end_ratio`.

    Args:
        iteration (`int`): counted from 0.
        warmup_iterations (`int`): length of the warm-up; 0 for none.
        total_iterations (`int`): length of the whole run, warm-up included.
        start_ratio (`float`): the factor at iteration 0 of a warm-up.
        end_ratio (`float`): the factor at the last iteration.

    Returns:
        `float`: the factor of the peak learning rate.
    """
    if iteration < warmup_iterations:
        return _warmup(iteration, warmup_iterations, start_ratio)
    flat = 0.05
    remaining = (1 - max(_progress(iteration, warmup_iterations, total_iterations), flat)) / (1 - flat)
    return end_ratio + (1 - end_ratio) * remaining


def cosine(
    iteration: int,
    warmup_iterations: int,
    total_iterations: int,
    start_ratio: float = 0.005,
    end_ratio: float = 0.01,
) -> float:
    """Linear warm-up, then half a cosine down to `end_ratio`. Arguments and result are those of [`lin0`]."""
    if iteration < warmup_iterations:
        return _warmup(iteration, warmup_iterations, start_ratio)
    return end_ratio + (1 - end_ratio) * _half_cosine(_progress(iteration, warmup_iterations, total_iterations))


LEARNING_RATE_SCHEDULES = {"lin0": lin0, "cosine": cosine}


def annealed_weight_decay(iteration: int, total_iterations: int, initial: float = 0.05, final: float = 0.0) -> float:
    """Weight decay that goes from `initial` to `final` in half a cosine over the whole run, warm-up included.

    Args:
        iteration (`int`): counted from 0.
        total_iterations (`int`): length of the run.
        initial (`float`): weight decay at iteration 0.
        final (`float`): weight decay at the last iteration.
    """
    return final + (initial - final) * _half_cosine(_progress(iteration, 0, total_iterations))


def weight_decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """A model's trainable parameters, as two groups for an optimizer: those that decay and those that don't.

    Matrices and convolution kernels decay. Biases, gains and everything else with one dimension don't, nor do
    positions, level embeddings and modulation offsets. A group's entry `"decays"` is for [`set_weight_decay`].

    Args:
        model (`nn.Module`): parameters that need no gradient are left out.
    """
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and UNDECAYED_TABLES.isdisjoint(name.split("."))].append(parameter)
    return [
        {"params": groups[True], "decays": True},
        {"params": groups[False], "decays": False, "weight_decay": 0.0},
    ]


def set_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """Gives `weight_decay` to those groups of [`weight_decay_groups`] that decay.

    Args:
        optimizer (`torch.optim.Optimizer`): made from these groups.
        weight_decay (`float`): the new value, in force from the next step on.
    """
    for group in optimizer.param_groups:
        if group["decays"]:
            group["weight_decay"] = weight_decay


def _warmup(iteration: int, warmup_iterations: int, start_ratio: float) -> float:
    return start_ratio + (1 - start_ratio) * iteration / warmup_iterations


def _progress(iteration: int, warmup_iterations: int, total_iterations: int) -> float:
    # A run of one iteration, or one that ends with its warm-up, has nothing left to anneal.
    last = total_iterations - 1
    return min((iteration - warmup_iterations) / (last - warmup_iterations), 1.0) if last > warmup_iterations else 0.0


def _half_cosine(progress: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * progress)
