"""What classifiers say of sounds, against NumPy and closed forms."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from transformers_aar.evaluation.classification import clap_score, inception_score, kl_divergence


def logits_of(count, num_classes, seed=0):
    return 4 * torch.randn(count, num_classes, generator=torch.Generator().manual_seed(seed))


def test_kl_divergence_as_scipy_has_it():
    predictions, references = logits_of(7, 527), logits_of(7, 527, seed=1)
    p, q = (scipy.special.softmax(logits.double().numpy(), axis=1) for logits in (references, predictions))
    np.testing.assert_allclose(kl_divergence(predictions, references), scipy.stats.entropy(p, q, axis=1), rtol=1e-10)
    assert kl_divergence(references, references).abs().max() == 0


def test_kl_divergence_of_certain_classifiers_stays_finite():
    # sure of other classes by 1000 nats each: probabilities underflow, their logarithms don't
    predictions, references = torch.tensor([[0.0, 1000.0]]), torch.tensor([[1000.0, 0.0]])
    assert kl_divergence(predictions, references).tolist() == [1000.0]


def test_inception_score_by_the_formula():
    logits = logits_of(23, 6)
    probabilities = scipy.special.softmax(logits.double().numpy(), axis=1)
    expected = np.exp(scipy.stats.entropy(probabilities, probabilities.mean(0)[None], axis=1).mean())
    assert inception_score(logits, num_splits=1).tolist() == [pytest.approx(expected, rel=1e-10)]
    assert inception_score(logits, num_splits=5, seed=0).tolist() != inception_score(logits, 5, seed=1).tolist()


def test_inception_score_of_sure_and_unsure_classifiers():
    even = 1000 * torch.eye(4).repeat(6, 1)
    assert inception_score(even, num_splits=1).tolist() == [pytest.approx(4)]
    assert inception_score(torch.zeros(20, 4)).tolist() == pytest.approx([1.0] * 10)
    always_the_same = torch.tensor([[1000.0, 0, 0]]).repeat(20, 1)
    assert inception_score(always_the_same, num_splits=2).tolist() == pytest.approx([1.0, 1.0])


def test_clap_score_is_the_cosine():
    sounds = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    texts = torch.tensor([[3.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    assert clap_score(sounds, texts).tolist() == pytest.approx([1.0, -1.0, math.sqrt(0.5)])


def test_refuses_what_does_not_pair():
    for figure in (kl_divergence, clap_score):
        with pytest.raises(ValueError, match=r"one row for each sound .* \(3, 4\) and \(2, 4\)"):
            figure(torch.zeros(3, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="10 parts takes as many sounds, got 9"):
        inception_score(torch.zeros(9, 4))
