"""Fréchet audio distance (arXiv 1812.08466): how far two sets of sounds lie apart as Gaussians of their embeddings."""

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch

from .bootstrap import Estimate, bootstrap_interval
from .embeddings import EmbeddingInfo


class FrechetStatistics:
    """
    Mean and covariance of any number of embeddings, in float64 and in the memory of one matrix of width × width.

    Args:
        embedding ([`EmbeddingInfo`]): what made the embeddings; statistics of different ones don't compare.

    Attributes:
        count (`int`): embeddings so far.
        mean (`torch.DoubleTensor` of shape `(width,)`): their mean.
        scatter (`torch.DoubleTensor` of shape `(width, width)`): sum of the outer products of their deviations from
            the mean.
    """

    def __init__(self, embedding: EmbeddingInfo):
        self.embedding = embedding
        self.count = 0
        self.mean = torch.zeros(embedding.width, dtype=torch.float64)
        self.scatter = torch.zeros(embedding.width, embedding.width, dtype=torch.float64)

    def update(self, embeddings: torch.Tensor) -> None:
        """
        Adds embeddings `(batch_size, width)`.

        Raises:
            ValueError: for another width, and for NaN or infinite numbers.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding.width:
            raise ValueError(
                f"The embeddings must have the shape (batch_size, {self.embedding.width}) for {self.embedding}, "
                f"got {tuple(embeddings.shape)}."
            )
        if not embeddings.isfinite().all():
            raise ValueError("The embeddings hold NaN or infinite numbers: look at the sounds they were made of.")
        if len(embeddings) == 0:
            return
        deviations = embeddings.detach().to("cpu", torch.float64, copy=True)
        mean, total = deviations.mean(0), self.count + len(embeddings)
        deviations -= mean
        # Chan, Golub and LeVeque (1979), Equation 2.1: no difference of large sums, so nothing cancels
        shift = mean - self.mean
        self.scatter += deviations.T @ deviations
        self.scatter.addr_(shift, shift, alpha=self.count * len(embeddings) / total)
        self.mean += shift * (len(embeddings) / total)
        self.count = total

    @property
    def covariance(self) -> torch.Tensor:
        """
        Unbiased covariance, float64 `(width, width)`.

        Raises:
            ValueError: for fewer than two embeddings.
        """
        if self.count < 2:
            raise ValueError(f"A covariance takes at least 2 sounds, got {self.count}.")
        return self.scatter / (self.count - 1)


def frechet_distance(predictions: FrechetStatistics, references: FrechetStatistics) -> float:
    """
    |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr √(Σ₁Σ₂), the squared 2-Wasserstein distance of two Gaussians.

    Warns when a set has fewer sounds than the embedding is wide: its covariance has no full rank then, and the
    distance comes out larger than that of more sounds.

    Args:
        predictions ([`FrechetStatistics`]): of one set.
        references ([`FrechetStatistics`]): of the other one; the distance is symmetric.

    Raises:
        ValueError: for different embeddings, and for sets of fewer than two sounds.
    """
    _check_same_embedding(predictions, references)
    _warn_of_few(predictions.count, references)
    return _distance_to(references)(predictions)


def frechet_interval(
    embeddings: torch.Tensor,
    references: FrechetStatistics,
    clips: torch.LongTensor | None = None,
    num_resamples: int = 200,
) -> Estimate:
    """
    Fréchet distance of embeddings `(num_sounds, width)` to a fixed reference set, with the interval that
    [`bootstrap_interval`] gives for these `clips`, of which nothing lies below 0. Warns as `frechet_distance` does.

    Raises:
        ValueError: as `FrechetStatistics.update` and `frechet_distance`.
    """
    _warn_of_few(len(embeddings), references)
    distance = _distance_to(references)

    def distance_of(resample: torch.Tensor) -> float:
        statistics = FrechetStatistics(references.embedding)
        statistics.update(resample)
        return distance(statistics)

    estimate = bootstrap_interval(embeddings, distance_of, clips, num_resamples)
    return replace(estimate, low=max(0.0, estimate.low))


def _check_same_embedding(first: FrechetStatistics, second: FrechetStatistics) -> None:
    if first.embedding != second.embedding:
        raise ValueError(
            f"Statistics of different embeddings don't compare: {first.embedding} and {second.embedding}. "
            "Embed both sets in the same way."
        )


def _warn_of_few(count: int, references: FrechetStatistics) -> None:
    fewer, width = min(count, references.count), references.embedding.width
    if fewer < width:
        warnings.warn(
            f"A set has {fewer} sounds, fewer than the embedding's {width} numbers: the Fréchet distance is biased "
            "upwards. Compare it only with that of as many sounds, or take more.",
            stacklevel=3,
        )


def _distance_to(references: FrechetStatistics) -> Callable[[FrechetStatistics], float]:
    """The distance to one set, whose covariance is factored once."""
    reference_covariance = references.covariance
    reference_factor = _factor(reference_covariance)

    def distance(predictions: FrechetStatistics) -> float:
        covariance = predictions.covariance
        # For Σ = F Fᵀ the eigenvalues of Σ₁Σ₂ are the squared singular values of F₁ᵀ F₂: real, never negative, and
        # exact to the rounding of the largest, where the root of a rounded eigenvalue has only half of the digits.
        root_trace = torch.linalg.svdvals(_factor(covariance).T @ reference_factor).sum()
        spread = covariance.trace() + reference_covariance.trace() - 2 * root_trace
        squared = (predictions.mean - references.mean).square().sum() + spread
        return max(0.0, float(squared))

    return distance


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """F of shape `(width, rank)` with F Fᵀ = Σ; eigenvalues that are nothing but rounding are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    threshold = values[-1] * len(values) * torch.finfo(values.dtype).eps
    kept = values > threshold
    return vectors[:, kept] * values[kept].sqrt()
