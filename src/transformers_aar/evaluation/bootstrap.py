"""How far a figure would move with other clips of the same kind."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Estimate:
    """
    Args:
        value (`float`): the figure of all clips.
        low (`float`): lower end of its confidence interval.
        high (`float`): upper end.
    """

    value: float
    low: float
    high: float


def bootstrap_interval(
    sample: torch.Tensor,
    statistic: Callable[[torch.Tensor], float | torch.Tensor] = torch.mean,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """
    Bootstrap confidence interval of a statistic (Efron 1979): percentiles of its values over samples drawn with
    replacement, less the resamples' bias. A resample repeats clips, and statistics such as the Fréchet distance grow
    with that; so the interval holds the resampled values' deviations from their own mean. For a mean there is no such
    bias, and the interval is the percentile interval.

    Args:
        sample (`torch.Tensor` of shape `(num_clips, …)`): what each clip has, such as its distance or embedding.
        statistic (`Callable`, defaults to `torch.mean`): from a sample, of the same shape, to its figure.
        num_resamples (`int`, defaults to 1000): samples drawn.
        confidence (`float`, defaults to 0.95): share of the resampled values in the interval.
        seed (`int`, defaults to 0): of the draws; equal seeds give equal intervals.

    Raises:
        ValueError: for fewer than two clips, and for NaN or infinite values.
    """
    if len(sample) < 2:
        raise ValueError(f"A confidence interval takes at least 2 clips, got {len(sample)}.")
    if not sample.isfinite().all():
        raise ValueError("A clip's value is NaN or infinite: look at the clips, there is no interval with it.")
    sample = sample.double()
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(sample), (len(sample),), generator=generator) for _ in range(num_resamples))
    values = torch.tensor([float(statistic(sample[draw.to(sample.device)])) for draw in draws], dtype=torch.float64)
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    value = float(statistic(sample))
    low, high = (value + (values - values.mean()).quantile(tails)).tolist()
    return Estimate(value, low, high)
