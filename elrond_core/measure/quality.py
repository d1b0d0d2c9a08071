"""Reliability of the significant directions of a sample of gradients, estimated from the sample itself.

The estimate is split-half reliability. Both halves of the sample are decomposed. A principal cosine r between their
spans is the agreement of the halves. The Spearman-Brown formula, 2r/(1 + r), gives the agreement of the whole sample
with the truth: the sampling error of the whole has half the variance of that of a half, and the truth has none.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..decompose.pca import fit_pca
from ..errors import ElrondError
from ..gradients import Gradients
from ..seeding import generator
from .subspace import orthonormal

# Random halvings whose agreement is averaged.
_HALVINGS = 2
# Number of gradients at the first estimate of a growing collection. An estimate from fewer is mostly chance.
FIRST = 64
# Factor by which a collection grows between estimates. At most this many times the gradients needed are collected.
GROWTH = 1.25


class StopAtQuality:
    """Stops a growing collection as soon as it has a quality.

    Args:
        target: the quality, above 0 and below 1.
        max_count: number of gradients of the collection if it is not stopped.

    Attributes:
        estimate: the latest `split_half_quality`; None before the first.
        count: number of gradients of that estimate.

    Raises:
        ElrondError: if `target` or `max_count` is out of range.
    """

    def __init__(self, target: float, max_count: int) -> None:
        if not 0 < target < 1:
            raise ElrondError(f"The quality to reach must be above 0 and below 1, got {target}.")
        if max_count < FIRST:
            raise ElrondError(
                f"A quality can be told of at least {FIRST} gradients: raise the count, which is {max_count}."
            )
        self.target = target
        self.estimate: float | None = None
        self.count = 0

    def line(self) -> str:
        """The result, for a report."""
        estimate = "not known" if self.estimate is None else f"{self.estimate:.4f}"
        reached = self.estimate is not None and self.estimate >= self.target
        advice = "" if reached else "; collect more gradients, or of more realizations"
        return f"quality of the significant directions: {estimate}, {self.target:g} was asked for{advice}"

    def __call__(self, gradients: Gradients, last: bool = False) -> bool:
        """Whether to stop. The quality is estimated when the collection has grown by `GROWTH`, and at its end."""
        if len(gradients) < max(FIRST, GROWTH * self.count) and not last:
            return False
        self.estimate, self.count = split_half_quality(gradients), len(gradients)
        return self.estimate >= self.target


def split_half_quality(gradients: Gradients, *, significance: float = 2.5, seed: int = 0) -> float:
    """Estimated share, 0 to 1, of the span of the significant principal components that is right.

    The truth is the span of as many leading components of infinitely many gradients. The share is the `reconstruction`
    of `elrond_core.measure.subspace`, and also 1 - `hallucination`, because both spans have the same dimension. The
    number of significant directions is that of `fit_pca`; its error is not estimated.

    Gradients of one source or one target are correlated. If both halves had gradients of the same realizations, they
    would share the error due to few realizations. So the gradients are divided into halves that share no target, and
    into halves that share no source. The lower of the two qualities is returned.

    Args:
        gradients: at least four, of at least two sources and two targets.
        significance: C of `elrond_core.decompose.pca.fit_pca`, which decides the number of directions.
        seed: fixes the halvings.

    Raises:
        ElrondError: if there are too few gradients, sources or targets to halve, or as `fit_pca`.
    """
    if len(gradients) < 4 or min(len(gradients.sources.unique()), len(gradients.targets.unique())) < 2:
        raise ElrondError(
            "How right a sample is can only be told of at least 4 gradients, of at least two sources and two targets."
        )
    count = len(fit_pca(gradients, significance=significance, limit=max(1, len(gradients) // 2 - 1))[0])
    qualities = []
    for realizations in (gradients.targets, gradients.sources):
        agreements = [_agreement(gradients, half, count) for half in _halvings(realizations, seed)]
        qualities.append(sum(agreements) / len(agreements))
    return min(qualities)


def _halvings(realizations: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Masks (N,) of about half of the gradients, which have all gradients of a realization or none."""
    distinct, places = realizations.unique(return_inverse=True)
    for index in range(_HALVINGS):
        rank = torch.randperm(len(distinct), generator=generator(seed, "halving", index))[places]
        sizes = torch.bincount(rank).cumsum(0)
        yield rank <= (sizes - len(realizations) / 2).abs().argmin()


def _agreement(gradients: Gradients, half: torch.Tensor, count: int) -> float:
    """Mean corrected cosine between the leading spans of a half and of the rest."""
    one, other = (
        orthonormal(fit_pca(gradients.select(part), significance=0, limit=count)[0].vectors) for part in (half, ~half)
    )
    cosines = torch.linalg.svdvals(one @ other.T).clamp(max=1)
    return float((2 * cosines / (1 + cosines)).sum()) / count
