"""How far a figure would move with other clips of the same kind."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

TAILS = torch.tensor([0.025, 0.975], dtype=torch.float64)


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
    clips: torch.LongTensor | None = None,
    num_resamples: int = 1000,
) -> Estimate:
    """
    Bootstrap confidence interval of 95 % of a statistic (Efron 1979): percentiles of its values over samples drawn
    with replacement, less the resamples' bias. A resample repeats clips, and statistics such as the Fréchet distance
    grow with that; so the interval holds the resampled values' deviations from their own mean. For a mean there is no
    such bias, and the interval is the percentile interval.

    Clips are drawn, each with all of its crops (the cluster bootstrap, Davison and Hinkley 1997, section 3.8): crops
    of one clip are alike, and drawn one by one they would make the interval too narrow. The draws are the same every
    time.

    Args:
        sample (`torch.Tensor` of shape `(num_crops, …)`): what each crop has, such as its distance or embedding.
        statistic (`Callable`, defaults to `torch.mean`): from a sample, of the same shape, to its figure.
        clips (`torch.LongTensor` of shape `(num_crops,)`, *optional*):
            Equal numbers for crops of one clip; by default each is of another.
        num_resamples (`int`, defaults to 1000): samples drawn.

    Raises:
        ValueError: for fewer than two clips, and for NaN or infinite values.
    """
    clips = torch.arange(len(sample)) if clips is None else clips.cpu()
    if (num_clips := len(clips.unique())) < 2:
        raise ValueError(f"A confidence interval takes at least 2 clips, got {num_clips}.")
    if not sample.isfinite().all():
        raise ValueError("A clip's value is NaN or infinite: look at the clips, there is no interval with it.")
    sample = sample.double()
    draws = _draws(clips, num_resamples)
    values = torch.tensor([float(statistic(sample[draw.to(sample.device)])) for draw in draws], dtype=torch.float64)
    value = float(statistic(sample))
    low, high = (value + (values - values.mean()).quantile(TAILS)).tolist()
    return Estimate(value, low, high)


def _draws(clips: torch.LongTensor, count: int) -> Iterator[torch.LongTensor]:
    """Places of the crops of as many clips as there are, drawn with replacement."""
    numbers = {}  # in the order of the rows, so that what the clips are called makes no difference
    places = torch.tensor([numbers.setdefault(clip, len(numbers)) for clip in clips.tolist()])
    sizes = places.bincount()
    by_clip, ends = places.argsort(stable=True), sizes.cumsum(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        drawn = torch.randint(len(sizes), (len(sizes),), generator=generator)
        # counted from the end of each drawn clip's crops to that of all
        to_ends = (ends[drawn] - sizes[drawn].cumsum(0)).repeat_interleave(sizes[drawn])
        yield by_clip[to_ends + torch.arange(len(to_ends))]
