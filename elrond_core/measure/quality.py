"""How right the significant directions of a sample of gradients are, estimated from the sample itself.

Split-half reliability: two halves of the sample are decomposed apart. A principal cosine r between their spans says how
far they agree, and the Spearman-Brown formula, 2r/(1 + r), how far the whole sample agrees with the truth: it has half
the variance of either half, and the truth has none.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..decompose.pca import fit_pca
from ..errors import ElrondError
from ..gradients import Gradients
from ..seeding import generator
from .subspace import orthonormal

# Halvings of a kind; their mean is less at the mercy of one draw.
_HALVINGS = 2
# The first estimate of a growing collection, for which one of fewer gradients would be mostly chance, and by how much
# it grows between estimates: one collects at most so much more than were needed.
FIRST, GROWTH = 64, 1.25


class Sufficient:
    """Tells a growing collection whether it is good enough.

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
        """What came of it, for a report."""
        found = "not known" if self.estimate is None else f"{self.estimate:.4f}"
        reached = self.estimate is not None and self.estimate >= self.wanted
        advice = "" if reached else "; collect more gradients, or of more realizations"
        return f"quality of the significant directions: {found}, {self.wanted:g} was asked for{advice}"

    def __call__(self, gradients: Gradients, last: bool = False) -> bool:
        """Whether these are enough; estimated now and then, and in any case if they are the last."""
        if len(gradients) < max(FIRST, GROWTH * self.count) and not last:
            return False
        self.estimate, self.count = split_half_quality(gradients), len(gradients)
        return self.estimate >= self.wanted


def split_half_quality(gradients: Gradients, *, significance: float = 2.5, seed: int = 0) -> float:
    """Estimated share, 0 to 1, of the span of the significant principal components that is right.

    Right is what lies in the span of as many leading components of infinitely many gradients: the reconstruction and,
    at equal numbers, one less the hallucination of `elrond_core.subspace`. Whether one more or less is significant is
    another question, which the threshold decides.

    Gradients towards one target, or of one source, have something in common, which halves must not share: what too few
    realizations leave unsure would not be seen. Halves that share no target are compared, then halves that share no
    source, and the lower quality holds.

    Args:
        gradients: at least four, of at least two sources and two targets.
        significance: C of `elrond_core.decompose.pca.fit_pca`, which decides how many directions are meant.
        seed: fixes the halvings.

    Raises:
        ElrondError: if there are too few gradients, sources or targets to halve, or as `fit_pca`.
    """
    if len(gradients) < 4 or min(len(gradients.sources.unique()), len(gradients.targets.unique())) < 2:
        raise ElrondError(
            "How right a sample is can only be told of at least 4 gradients, of at least two sources and two targets."
        )
    kept = len(fit_pca(gradients, significance=significance, limit=max(1, len(gradients) // 2 - 1))[0])
    found = []
    for owners in (gradients.targets, gradients.sources):
        agreements = [_agreement(gradients, half, kept) for half in _halvings(owners, seed)]
        found.append(sum(agreements) / len(agreements))
    return min(found)


def _halvings(owners: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Masks (N,) of about half the gradients, all or none of each owner's."""
    names, places = owners.unique(return_inverse=True)
    for index in range(_HALVINGS):
        rank = torch.randperm(len(names), generator=generator(seed, "halving", index))[places]
        sizes = torch.bincount(rank).cumsum(0)
        yield rank <= (sizes - len(owners) / 2).abs().argmin()


def _agreement(gradients: Gradients, half: torch.Tensor, kept: int) -> float:
    """Mean corrected cosine between the leading spans of a half and of the rest."""
    one, other = (
        orthonormal(fit_pca(gradients.select(part), significance=0, limit=kept)[0].vectors) for part in (half, ~half)
    )
    cosines = torch.linalg.svdvals(one @ other.T).clamp(max=1)
    return float((2 * cosines / (1 + cosines)).sum()) / kept
