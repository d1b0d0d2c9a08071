"""Principal components of gradients: step 5 of ELROND (arXiv 2602.10216)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..directions import Directions, fix_signs
from ..errors import ElrondError
from ..gradients import Gradients
from .moments import Moments, require_finite

Rule = Literal["width", "samples"]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a decomposition, and how many components were kept.

    Attributes:
        eigenvalues: float64, (P,), descending and not negative.
        threshold: the eigenvalue above which a component is significant.
        n_components: number of components kept.
        count: N, the number of gradients.
        size: R·d, the length of one gradient.
        name: the quantity that an eigenvalue is, for axes and reports.
        ridge: the ridge of the metric, as a share of the mean of its diagonal; 0 for PCA.
    """

    eigenvalues: torch.Tensor
    threshold: float
    n_components: int
    count: int
    size: int
    name: str = "variance"
    ridge: float = 0.0

    @property
    def significant(self) -> int:
        """Number of eigenvalues above the threshold."""
        return int((self.eigenvalues > self.threshold).sum())

    @property
    def ratios(self) -> torch.Tensor:
        """Each eigenvalue's share of their sum, float64 (P,)."""
        return self.eigenvalues / self.eigenvalues.sum()

    @property
    def note(self) -> str:
        """One sentence on how many components were kept."""
        if not self.significant:
            return "No component is above the threshold; the leading one was kept."
        if self.n_components < self.significant:
            return f"{self.significant} components are above the threshold; the leading {self.n_components} were kept."
        return f"{self.n_components} components are above the threshold and were kept."


def fit_pca(
    source: Gradients | Moments, *, significance: float = 2.5, rule: Rule = "width", limit: int = 64
) -> tuple[Directions, Spectrum]:
    """Principal components of significant variance of the centred gradients.

    The solution is exact (LAPACK, float64): of the covariance and the Gram matrix the smaller one is factorised. The R
    rows of a concept are one vector, so the `d` of the published rule is R·d here.

    Args:
        source: gradients, or only their moments.
        significance: C; a component is significant if its share of the variance is above C/(R·d).
        rule: "width" for C/(R·d) as published; "samples" for C/min(N, R·d), stricter when there are few gradients.
        limit: keep at most this many.

    Returns:
        Directions (K, R, d) of unit norm, best first, K ≥ 1, with explained variance ratios as scores. The entry of
        largest magnitude of each is positive. And the whole spectrum of min(N, R·d) variances.

    Raises:
        ElrondError: if there are fewer than two gradients, one is not finite, all are equal, or an option is out of
            range.
    """
    check_options(significance, limit)
    if rule not in ("width", "samples"):
        raise ElrondError(f'The significance rule must be "width" or "samples", got "{rule}".')
    count, size = (source.count, source.size) if isinstance(source, Moments) else (len(source), source.flat.shape[1])
    if count < 2:
        raise ElrondError(f"A decomposition needs at least 2 gradients, got {count}.")

    if isinstance(source, Gradients) and count < size:
        require_finite(source.flat)
        mean = source.flat.mean(0, dtype=torch.float64)
        centred = source.flat - mean
        eigenvalues, left = descending(centred @ centred.T)
        eigenvalues = eigenvalues / (count - 1)
        rows, width = source.vectors.shape[1:]
        provenance = source.provenance
    else:
        moments = source if isinstance(source, Moments) else Moments.of(source)
        mean, centred = moments.mean, None
        eigenvalues, left = descending(moments.covariance())
        eigenvalues = eigenvalues[: min(count, size)]
        rows, width, provenance = moments.rows, moments.width, moments.provenance

    total = float(eigenvalues.sum())
    # The variance of identical gradients is rounding error, relative to their squared length.
    if total <= 1e-20 * float(mean.square().sum()) or total == 0:
        raise ElrondError("All gradients are the same, so there is nothing to decompose.")
    spectrum = cut(
        eigenvalues, significance / (size if rule == "width" else min(count, size)) * total, limit, count, size
    )
    vectors = left[:, : spectrum.n_components]
    if centred is not None:
        vectors = centred.T @ vectors
    vectors = (vectors / vectors.norm(dim=0)).T.reshape(-1, rows, width).float()
    method = {"name": "pca", "significance": f"{significance:g}", "rule": rule, "limit": str(limit)}
    directions = Directions(
        vectors=fix_signs(vectors),
        scores=spectrum.ratios[: spectrum.n_components].float(),
        method=method,
        provenance=provenance,
        score_name="explained variance ratio",
    )
    return directions, spectrum


def descending(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (descending, negative rounding errors set to zero) and eigenvectors as columns."""
    eigenvalues, vectors = torch.linalg.eigh(symmetric)
    return eigenvalues.flip(0).clamp_min(0), vectors.flip(1)


def cut(eigenvalues: torch.Tensor, threshold: float, limit: int, count: int, size: int) -> Spectrum:
    """A spectrum of which components above a threshold are kept, at most `limit`, and always the leading one."""
    significant = int((eigenvalues > threshold).sum())
    # Rounding gives components of zero variance a small one, which a threshold of zero would accept.
    nonzero = int((eigenvalues > 1e-12 * eigenvalues[0]).sum())
    return Spectrum(eigenvalues, threshold, max(1, min(significant, limit, nonzero)), count, size)


def check_options(significance: float, limit: int) -> None:
    """Raise an ElrondError for a significance below zero (or not a number) or a limit below one."""
    if not significance >= 0:
        raise ElrondError(f"The significance must be zero or more, got {significance}.")
    if limit < 1:
        raise ElrondError(f"The limit on directions must be at least 1, got {limit}.")
