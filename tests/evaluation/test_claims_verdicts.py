"""Verdicts on the claims follow from the figures, in either direction."""

import pytest
import torch

from transformers_aar.evaluation.bootstrap import Estimate
from transformers_aar.evaluation.claims_verdicts import (
    Figures,
    all_verdicts,
    closer_to_real_sounds,
    faster,
    fewer_tokens,
)


def noise(seed: int, spread: float = 0.1) -> torch.Tensor:
    return spread * torch.randn(200, generator=torch.Generator().manual_seed(seed))


# what is hard for one codec is hard for the other
DIFFICULTY = torch.linspace(-3, 3, 200)


def figures(is_next_token: bool, **changed) -> Figures:
    values = {
        "name": "plain" if is_next_token else "quadratic",
        "is_next_token": is_next_token,
        "tokens_per_second": 750.0 if is_next_token else 455.0,
        "forward_passes": 750 if is_next_token else 16,
        "frechet": {
            name: Estimate(value, value - 1, value + 1) for name, value in (("log_mel", 50), ("classifier", 9))
        },
        "named_rightly": {},
        "clips": torch.arange(200),
        "seconds": {1: [4.0, 4.0, 4.0], 8: [1.0, 1.0, 1.0]},
    }
    measures = {"mel_distance": 10.0, "stft_distance": 2.0, "si_sdr_db": 5.0} | changed.pop("codec", {})
    spreads = {"mel_distance": 1.0, "stft_distance": 0.2, "si_sdr_db": 2.0}
    codec = {
        name: mean + spreads[name] * DIFFICULTY + noise(number + 10 * is_next_token, 0.1 * spreads[name])
        for number, (name, mean) in enumerate(measures.items())
    }
    return Figures(**values | {"codec": codec} | changed)


@pytest.fixture
def plain() -> Figures:
    return figures(is_next_token=True)


def says(verdict, holds: bool) -> bool:
    words = ": this holds in miniature." if holds else ": this does NOT hold in miniature."
    return verdict.holds == holds and words in str(verdict)


@pytest.mark.parametrize(
    "changed, holds",
    [
        ({}, True),
        ({"codec": {"mel_distance": 9.0, "stft_distance": 1.5, "si_sdr_db": 9.0}}, True),
        ({"codec": {"mel_distance": 10.2}}, True),  # 2 % more counts as equal
        ({"codec": {"mel_distance": 10.8}}, False),
        ({"codec": {"stft_distance": 2.2}}, False),
        ({"codec": {"si_sdr_db": 4.0}}, False),
        # to the ends of the intervals: just below the margin isn't enough
        ({"codec": {"mel_distance": 10.495}}, False),
        ({"tokens_per_second": 750.0}, False),
    ],
)
def test_fewer_tokens_at_equal_quality(plain, changed, holds):
    verdict = fewer_tokens(figures(is_next_token=False, **changed), plain)
    assert says(verdict, holds)
    tokens = changed.get("tokens_per_second", 455)
    assert f"quadratic has {tokens:g} tokens per second and plain 750" in verdict.figures


def test_codecs_are_compared_sound_by_sound(plain):
    """Over the sounds the distance varies by far more than between the codecs."""
    text = fewer_tokens(figures(is_next_token=False, codec={"mel_distance": 10.2}), plain).figures
    low, high = text.split("mel distance ")[1].split("(")[1].split(")")[0].split(" to ")
    assert 0.015 < float(low.rstrip("%")) / 100 < 0.02 < float(high.rstrip("%")) / 100 < 0.025


def test_crops_of_few_clips_are_little_evidence(plain):
    """What is alike in a hundred crops is so in one."""
    changed = {"codec": {"mel_distance": 10.45}}
    assert fewer_tokens(figures(is_next_token=False, **changed), plain).holds
    half = 0.3 * (torch.arange(200) % 2 - 0.5)
    ours = figures(is_next_token=False, clips=torch.arange(200) % 2, **changed)
    ours.codec["mel_distance"] += half
    assert not fewer_tokens(ours, plain).holds
    assert ours.estimate("mel_distance").high > ours.codec["mel_distance"].mean() + 0.1


@pytest.mark.parametrize(
    "seconds, holds",
    [
        ({1: [0.2, 0.2, 0.2], 8: [0.05, 0.05, 0.05]}, True),
        ({1: [0.2, 0.2, 0.2], 8: [0.11, 0.11, 0.11]}, False),
        ({1: [0.5, 0.5, 0.5], 8: [0.05, 0.05, 0.05]}, False),
        ({1: [8.0, 8.0, 8.0], 8: [2.0, 2.0, 2.0]}, False),
        ({1: [0.2, 5.0, 0.2], 8: [0.05, 0.05, 0.05]}, True),  # one round was disturbed
    ],
)
def test_an_order_of_magnitude_faster(plain, seconds, holds):
    verdict = faster(figures(is_next_token=False, seconds=seconds), plain)
    assert says(verdict, holds)
    assert "takes 16 forward passes and plain 750" in verdict.figures


def test_ratios_are_of_the_same_round():
    """A machine that gets slower slows both."""
    ours = figures(is_next_token=False, seconds={1: [1.0, 3.0, 2.0], 8: [1.0] * 3})
    theirs = figures(is_next_token=True, seconds={1: [12.0, 36.0, 24.0], 8: [1.0] * 3})
    assert ours.speed_ratio(theirs, 1) == 12.0 and theirs.speed_ratio(theirs, 1) == 1.0


@pytest.mark.parametrize(
    "log_mel, classifier, holds, overlaps",
    [
        (Estimate(40, 38, 42), Estimate(5, 4, 6), True, False),
        (Estimate(60, 58, 62), Estimate(15, 14, 16), False, False),
        (Estimate(40, 38, 42), Estimate(15, 14, 16), False, False),
        (Estimate(40, 38, 42), Estimate(8, 5, 11), False, True),  # smaller, which may be chance
    ],
)
def test_closer_to_real_sounds(plain, log_mel, classifier, holds, overlaps):
    ours = figures(is_next_token=False, frechet={"log_mel": log_mel, "classifier": classifier})
    verdict = closer_to_real_sounds(ours, plain)
    assert says(verdict, holds)
    assert ("The intervals overlap by classifier." in verdict.figures) == overlaps
    assert f"by log_mel {log_mel.value:g} ({log_mel.low:g} to {log_mel.high:g}) against 50 (49 to 51)" in str(verdict)


def test_claims_are_about_the_first_next_scale_system(plain):
    systems = [plain, figures(is_next_token=False, name="first"), figures(is_next_token=False, name="another")]
    verdicts = all_verdicts(systems)
    assert len(verdicts) == 3
    assert all("first" in str(verdict) and "another" not in str(verdict) for verdict in verdicts)
