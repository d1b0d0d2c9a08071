"""Comparison of the spans of two sets of directions, such as of two concepts, methods or sample sizes."""

from __future__ import annotations

from dataclasses import dataclass

import scipy.linalg
import torch

from ..directions import Directions, fix_signs
from ..errors import ElrondError

# Angle in degrees by which rounding to float32 may rotate a principal vector. Nearly parallel directions amplify it.
_ROUNDING = 0.01


@dataclass(frozen=True)
class Comparison:
    """How the span of B compares with that of A, the reference.

    Attributes:
        cosines: float32, (K_A, K_B): absolute cosines between single directions.
        angles: float32, (min(k_A, k_B),): principal angles between the spans in degrees, ascending.
        reconstruction: share of A's span that lies in B's, 0 to 1.
        hallucination: share of B's span that lies outside of A's, 0 to 1.
        shared: directions in both spans, to within the limit, smallest angle first; None if there is none.
        only_a: directions of A's span outside of B's, largest angle first; None if there is none.
        only_b: the same for B.
    """

    cosines: torch.Tensor
    angles: torch.Tensor
    reconstruction: float
    hallucination: float
    shared: Directions | None
    only_a: Directions | None
    only_b: Directions | None

    def lines(self) -> list[str]:
        """The comparison as text, one fact a line."""
        count = [0 if part is None else len(part) for part in (self.shared, self.only_a, self.only_b)]
        return [
            f"shared directions: {count[0]}, only in A: {count[1]}, only in B: {count[2]}",
            f"reconstruction (of A by B): {self.reconstruction:.2f}",
            f"hallucination (of B beside A): {self.hallucination:.2f}",
            "principal angles: " + ", ".join(f"{angle:.0f}°" for angle in self.angles.tolist()),
        ]


def orthonormal(vectors: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis, float64 (k, D), of the span of (K, …) vectors; k < K where they depend on each other."""
    # Pivoting shows the rank, in a third of the time of a singular value decomposition.
    columns = vectors.flatten(1).double().numpy().T
    basis, triangle, _ = scipy.linalg.qr(columns, mode="economic", pivoting=True)
    diagonal = torch.from_numpy(triangle).diagonal().abs()
    return torch.from_numpy(basis.T[: int((diagonal > 1e-6 * diagonal[0]).sum())])


def reconstruction(reference: torch.Tensor, sample: torch.Tensor) -> float:
    """‖R Sᵀ‖²_F / k_R of two orthonormal bases (k, D): share of the reference that the sample spans."""
    return _covered(reference, sample) / len(reference)


def hallucination(reference: torch.Tensor, sample: torch.Tensor) -> float:
    """1 - ‖R Sᵀ‖²_F / k_S of two orthonormal bases (k, D): share of the sample that the reference does not span."""
    return 1.0 - _covered(reference, sample) / len(sample)


def principal_angles(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Principal angles of two orthonormal bases (k, D) in degrees, float64 (min(k_A, k_B),), ascending."""
    return _principal(a, b)[2]


def _principal(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Principal vectors of two orthonormal bases in their coordinates, as columns (k_A, k) and (k_B, k), and angles.

    Sines are used as well as cosines, because the cosine of a small angle is 1 up to rounding (Björck and Golub, 1973).
    """
    left, cosines, right = torch.linalg.svd(a @ b.T, full_matrices=False)
    vectors = right @ b
    sines = (vectors - vectors @ a.T @ a).norm(dim=1)
    return left, right.T, torch.rad2deg(torch.atan2(sines, cosines))


def _covered(a: torch.Tensor, b: torch.Tensor) -> float:
    """Number of dimensions that the spans of two orthonormal bases share. Rounding must not make it exceed theirs."""
    return min(float((a @ b.T).square().sum()), len(a), len(b))


def compare(a: Directions, b: Directions, *, limit: float = 45.0) -> Comparison:
    """Compare two sets of directions.

    Args:
        a: the reference.
        b: the sample.
        limit: principal angle in degrees up to which a pair of principal vectors counts as shared.

    Raises:
        ElrondError: if the two are of different families or sizes, or the limit is not between 0 and 90.
    """
    if a.provenance.family != b.provenance.family:
        raise ElrondError(
            f"Directions of {a.provenance.family} cannot be compared with directions of {b.provenance.family}."
        )
    if a.vectors.shape[1:] != b.vectors.shape[1:]:
        raise ElrondError(
            "Only directions of equally many rows of equal width can be compared, and these have "
            f"{tuple(a.vectors.shape[1:])} and {tuple(b.vectors.shape[1:])}."
        )
    if not 0 <= limit <= 90:
        raise ElrondError(f"The limit must be between 0 and 90 degrees, got {limit}.")
    span_a, span_b = orthonormal(a.vectors), orthonormal(b.vectors)
    principal_a, principal_b, angles = _principal(span_a, span_b)
    pairs = int((angles <= limit + _ROUNDING).sum())
    cosines, sines = torch.deg2rad(angles).cos(), torch.deg2rad(angles).sin()
    middle = principal_a[:, :pairs].T @ span_a + principal_b[:, :pairs].T @ span_b
    return Comparison(
        cosines=(a.vectors.flatten(1) @ b.vectors.flatten(1).T).abs().float(),
        angles=angles.float(),
        reconstruction=reconstruction(span_a, span_b),
        hallucination=hallucination(span_a, span_b),
        shared=_directions(middle, cosines[:pairs], a, "shared", "cosine"),
        only_a=_directions(*_outside(span_a, principal_a, sines, pairs), a, "only in A", "sine"),
        only_b=_directions(*_outside(span_b, principal_b, sines, pairs), b, "only in B", "sine"),
    )


def _outside(
    span: torch.Tensor, principal: torch.Tensor, sines: torch.Tensor, pairs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of a span outside of the other, largest angle first, and the sines of their angles.

    Args:
        span: orthonormal basis (k, D).
        principal: its principal vectors in its coordinates, as columns.
        sines: of the principal angles.
        pairs: number of leading principal vectors that are shared.
    """
    # Dimensions beyond those of the smaller span have no partner: they are at right angles to the other span.
    unpaired = torch.linalg.qr(principal, mode="complete")[0][:, principal.shape[1] :]
    coordinates = torch.cat([unpaired, principal[:, pairs:].flip(1)], dim=1)
    return coordinates.T @ span, torch.cat([sines.new_ones(unpaired.shape[1]), sines[pairs:].flip(0)])


def _directions(
    vectors: torch.Tensor, scores: torch.Tensor, source: Directions, part: str, score_name: str
) -> Directions | None:
    if not len(vectors):
        return None
    units = (vectors / vectors.norm(dim=1, keepdim=True)).reshape(-1, *source.vectors.shape[1:]).float()
    method = {**source.method, "name": f"{source.method.get('name', 'directions')}, {part}"}
    return Directions(
        fix_signs(units), scores.float(), method, source.provenance, score_name=f"{score_name} of the angle"
    )
