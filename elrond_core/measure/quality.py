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
# Gradients of the first estimate of a growing collection; an estimate from fewer would be mostly chance.
FIRST = 64
# Factor by which the collection grows between estimates: at most so many times the gradients needed are collected.
GROWTH = 1.25


class Sufficient:
    """Stops a growing collection once its quality is reached.

    Args:
        wanted: quality to reach, above 0 and below 1.
        most: gradients that there will be if it is never reached.

    Attributes:
        estimate: the latest estimate of `split_half_quality`; None before the first.
        count: number of gradients it is of.

    Raises:
        ElrondError: if `wanted` or `most` is out of range.
    """

    def __init__(self, wanted: float, most: int) -> None:
        if not 0 < wanted < 1:
            raise ElrondError(f"The quality to reach must be above 0 and below 1, got {wanted}.")
        if most < FIRST:
            raise ElrondError(f"A quality can be told of at least {FIRST} gradients: raise the count, which is {most}.")
        self.wanted = wanted
        self.estimate: float | None = None
        self.count = 0

    def line(self) -> str:
        """The result, for a report."""
        estimate = "not known" if self.estimate is None else f"{self.estimate:.4f}"
        reached = self.estimate is not None and self.estimate >= self.wanted
        advice = "" if reached else "; collect more gradients, or of more realizations"
        return f"quality of the significant directions: {estimate}, {self.wanted:g} was asked for{advice}"

    def __call__(self, gradients: Gradients, last: bool = False) -> bool:
        """Whether these are enough; estimated each time the collection has grown by `GROWTH`, and at its end."""
        if len(gradients) < max(FIRST, GROWTH * self.count) and not last:
            return False
        self.estimate, self.count = split_half_quality(gradients), len(gradients)
        return self.estimate >= self.wanted


def split_half_quality(gradients: Gradients, *, significance: float = 2.5, seed: int = 0) -> float:
    """Estimated share, 0 to 1, of the span of the significant principal components that is right.

    The truth is the span of as many leading components of infinitely many gradients. The share is the reconstruction
    of `elrond_core.measure.subspace` and, at equal numbers of directions, one less the hallucination. How many
    directions are significant is decided by the threshold and not questioned here.

    Gradients towards one target, or of one source, are correlated. If both halves had gradients of one realization, the
    error due to few realizations would cancel and not be seen. So halves that share no target are compared, then
    halves that share no source, and the lower quality is returned.

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
    for owners in (gradients.targets, gradients.sources):
        agreements = [_agreement(gradients, half, count) for half in _halvings(owners, seed)]
        qualities.append(sum(agreements) / len(agreements))
    return min(qualities)


def _halvings(owners: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Masks (N,) of about half the gradients: for each owner all of its gradients or none."""
    names, places = owners.unique(return_inverse=True)
    for index in range(_HALVINGS):
        rank = torch.randperm(len(names), generator=generator(seed, "halving", index))[places]
        sizes = torch.bincount(rank).cumsum(0)
        yield rank <= (sizes - len(owners) / 2).abs().argmin()


def _agreement(gradients: Gradients, half: torch.Tensor, count: int) -> float:
    """Mean corrected cosine between the leading spans of a half and of the rest."""
    one, other = (
        orthonormal(fit_pca(gradients.select(part), significance=0, limit=count)[0].vectors) for part in (half, ~half)
    )
    cosines = torch.linalg.svdvals(one @ other.T).clamp(max=1)
    return float((2 * cosines / (1 + cosines)).sum()) / count
