"""Codebook usage, against distributions whose entropy is known in closed form."""

import math

import pytest
import torch

from transformers_aar.evaluation.codebook_usage import CodebookUsage


def usage_of(scales, codebook_size, windows):
    usage = CodebookUsage(scales, codebook_size)
    usage.update(torch.tensor(windows))
    return usage


def test_even_use_has_the_codebook_size_as_perplexity():
    usage = usage_of([1, 2], 4, [[0, 0, 1], [1, 2, 3], [2, 0, 1], [3, 2, 3]])
    assert usage.used.tolist() == [1.0, 1.0]
    torch.testing.assert_close(usage.perplexity, torch.tensor([4.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(usage.entropy_per_token, torch.tensor(math.log(4), dtype=torch.float64))


def test_scales_are_counted_apart():
    # scale 0 always says 3; scale 1 says 0 in one half of its tokens, and 1 and 2 in a quarter each
    usage = usage_of([1, 4], 8, [[3, 0, 0, 1, 2], [3, 0, 1, 0, 2]])
    assert usage.counts[0].tolist() == [0, 0, 0, 2, 0, 0, 0, 0]
    assert usage.counts[1].tolist() == [4, 2, 2, 0, 0, 0, 0, 0]
    assert usage.used.tolist() == [1 / 8, 3 / 8]
    expected = 1.5 * math.log(2)
    torch.testing.assert_close(usage.entropy, torch.tensor([0.0, expected], dtype=torch.float64))
    assert float(usage.entropy_per_token) == pytest.approx(expected * 4 / 5)


def test_counts_of_several_parts_add_up():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (6, 3, 13), generator=generator)
    whole, first, second = (CodebookUsage([1, 2, 4, 6], 16) for _ in range(3))
    whole.update(codes)
    first.update(codes[:2])
    first.update(codes[2, 0].to(torch.uint16))
    second.update(codes[2, 1:])
    second.update(codes[3:])
    first.counts = first.counts + second.counts
    assert torch.equal(first.counts, whole.counts)
    assert torch.equal(first.perplexity, whole.perplexity)


def test_nothing_counted_yet():
    usage = CodebookUsage([1, 2], 4)
    assert usage.used.tolist() == [0.0, 0.0]
    assert usage.entropy.tolist() == [0.0, 0.0]
