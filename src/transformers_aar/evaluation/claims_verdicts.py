"""What figures of systems say about the paper's claims: sentences that are computed, in either direction."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .bootstrap import Estimate, bootstrap_interval

BATCH_SIZES = (1, 8)
# Quality is called equal up to so much more of a distance, as a share, and so many dB less.
EQUAL_SHARE = 0.05
EQUAL_DB = 0.5
ORDER_OF_MAGNITUDE = 10
CODEC_DISTANCES = {"mel_distance": "mel distance", "stft_distance": "STFT distance"}


@dataclass
class Figures:
    """
    What was measured of a system.

    Args:
        name (`str`): the system's.
        is_next_token (`bool`): whether its generator predicts token by token, not scale by scale.
        tokens_per_second (`float`): of audio.
        forward_passes (`int`): of the generator, for one window.
        codec (`dict[str, torch.Tensor]`): `mel_distance`, `stft_distance` and `si_sdr_db` of each held-out sound,
            `(num_sounds,)`; the same sounds in every system.
        clips (`torch.LongTensor` of shape `(num_sounds,)`): which clip each of them is of.
        frechet (`dict[str, Estimate]`): distance of the generated to the held-out sounds by each embedding.
        named_rightly (`dict[str, Estimate]`): share by `generated` and `reconstruction`.
        seconds (`dict[int, list[float]]`): per generated clip, of each round, by the batch size.
    """

    name: str
    is_next_token: bool
    tokens_per_second: float
    forward_passes: int
    codec: dict[str, torch.Tensor]
    clips: torch.LongTensor
    frechet: dict[str, Estimate]
    named_rightly: dict[str, Estimate]
    seconds: dict[int, list[float]] = field(default_factory=dict)

    def estimate(self, measure: str) -> Estimate:
        """Mean over the held-out sounds of one of the codec's measures."""
        return bootstrap_interval(self.codec[measure], clips=self.clips)

    def speed_ratio(self, other: "Figures", batch_size: int) -> float:
        """How many times as fast as the other one: median over the rounds, in each of which both had their turn."""
        pairs = zip(other.seconds[batch_size], self.seconds[batch_size])
        return statistics.median(theirs / own for theirs, own in pairs)


@dataclass(frozen=True)
class Verdict:
    """
    Args:
        claim (`str`): what the paper says.
        holds (`bool`): whether the figures show it.
        figures (`str`): these figures, and what counts as holding.
    """

    claim: str
    holds: bool
    figures: str

    def __str__(self) -> str:
        return f"{self.claim}: this {'holds' if self.holds else 'does NOT hold'} in miniature. {self.figures}"


def all_verdicts(figures: Sequence[Figures]) -> list[Verdict]:
    """Of the first next-scale system beside the next-token one."""
    next_scale = next(each for each in figures if not each.is_next_token)
    next_token = next(each for each in figures if each.is_next_token)
    return [judge(next_scale, next_token) for judge in (fewer_tokens, faster, closer_to_real_sounds)]


def fewer_tokens(next_scale: Figures, next_token: Figures) -> Verdict:
    """The multi-scale codec has fewer tokens, and no measure shows it to be worse by more than a margin."""
    changes = {name: relative_change(next_scale, next_token, name) for name in CODEC_DISTANCES}
    gains_db = next_scale.codec["si_sdr_db"] - next_token.codec["si_sdr_db"]
    gain_db = bootstrap_interval(gains_db, clips=next_scale.clips)
    is_equal = all(change.high <= EQUAL_SHARE for change in changes.values()) and gain_db.low >= -EQUAL_DB
    parts = [
        f"{words} {changes[name].value:+.1%} ({changes[name].low:+.1%} to {changes[name].high:+.1%})"
        for name, words in CODEC_DISTANCES.items()
    ]
    parts.append(f"SI-SDR {gain_db.value:+.2f} dB ({gain_db.low:+.2f} to {gain_db.high:+.2f})")
    return Verdict(
        "Fewer tokens at equal quality",
        is_equal and next_scale.tokens_per_second < next_token.tokens_per_second,
        f"{next_scale.name} has {next_scale.tokens_per_second:g} tokens per second and {next_token.name} "
        f"{next_token.tokens_per_second:g}; compared with that, on the same sounds: {', '.join(parts)}. Quality "
        f"counts as equal when neither distance is more than {EQUAL_SHARE:.0%} larger and SI-SDR not more than "
        f"{EQUAL_DB} dB lower, to the ends of the intervals.",
    )


def relative_change(ours: Figures, theirs: Figures, measure: str) -> Estimate:
    """How much larger ours is than theirs on the same sounds, as a share of theirs, paired."""
    base = theirs.codec[measure].double().mean()
    changes = (ours.codec[measure].double() - theirs.codec[measure].double()) / base
    return bootstrap_interval(changes, clips=ours.clips)


def faster(next_scale: Figures, next_token: Figures) -> Verdict:
    """Ten times as fast at each batch size."""
    ratios = {size: next_scale.speed_ratio(next_token, size) for size in BATCH_SIZES}
    seconds = [
        f"at batch {size} {ratio:.1f} times as fast ({statistics.median(next_scale.seconds[size]):.3g} s and "
        f"{statistics.median(next_token.seconds[size]):.3g} s per clip)"
        for size, ratio in ratios.items()
    ]
    return Verdict(
        "Next-scale generation is an order of magnitude faster than next-token generation",
        all(ratio >= ORDER_OF_MAGNITUDE for ratio in ratios.values()),
        f"{next_scale.name} takes {next_scale.forward_passes} forward passes and {next_token.name} "
        f"{next_token.forward_passes}; it is {' and '.join(seconds)}. An order of magnitude counts as "
        f"{ORDER_OF_MAGNITUDE} times, at every batch size.",
    )


def closer_to_real_sounds(next_scale: Figures, next_token: Figures) -> Verdict:
    """A smaller Fréchet distance by every embedding, with intervals that have nothing in common."""
    pairs = {name: (next_scale.frechet[name], next_token.frechet[name]) for name in next_scale.frechet}
    smaller = [name for name, (ours, theirs) in pairs.items() if ours.value < theirs.value]
    overlapping = [
        name for name, (ours, theirs) in pairs.items() if ours.low <= theirs.high and theirs.low <= ours.high
    ]
    parts = [
        f"by {name} {ours.value:.4g} ({ours.low:.4g} to {ours.high:.4g}) against {theirs.value:.4g} "
        f"({theirs.low:.4g} to {theirs.high:.4g})"
        for name, (ours, theirs) in pairs.items()
    ]
    undecided = f" The intervals overlap by {' and '.join(overlapping)}." if overlapping else ""
    return Verdict(
        "Next-scale generation comes closer to real sounds, by the Fréchet distance, than next-token generation",
        len(smaller) == len(pairs) and not overlapping,
        f"{next_scale.name} against {next_token.name}: {'; '.join(parts)}.{undecided} It must be smaller by every "
        "embedding, with intervals that don't overlap.",
    )
