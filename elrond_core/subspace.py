"""Comparing what two sets of directions span, such as two concepts, two methods or two sample sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .directions import Directions, fix_signs
from .errors import ElrondError
from .moments import Moments


@dataclass(frozen=True)
class Comparison:
    """How the span of B compares with that of A, the reference.

    Attributes:
        cosines: float32, (K_A, K_B): absolute cosines between single directions.
        angles: float32, (min(k_A, k_B),): principal angles between the spans in degrees, ascending.
        reconstruction: share of A's span that lies in B's, 0 to 1.
        hallucination: share of B's span that lies outside of A's, 0 to 1.
        shared: directions that both span to within the limit, the most alike first; None if there is none.
        only_a: directions of A's span that B's lacks, the most foreign to B first; None if there is none.
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
    _, values, basis = torch.linalg.svd(vectors.flatten(1).double(), full_matrices=False)
    return basis[values > 1e-6 * values[0]]


def reconstruction(reference: torch.Tensor, sample: torch.Tensor) -> float:
    """‖R Sᵀ‖²_F / k_R of two orthonormal bases (k, D): share of the reference that the sample spans."""
    return float((reference @ sample.T).square().sum() / len(reference))


def hallucination(reference: torch.Tensor, sample: torch.Tensor) -> float:
    """1 - ‖R Sᵀ‖²_F / k_S of two orthonormal bases (k, D): share of the sample that the reference does not span."""
    return 1.0 - float((reference @ sample.T).square().sum() / len(sample))


def principal_angles(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Principal angles of two orthonormal bases (k, D) in degrees, float64 (min(k_A, k_B),), ascending.

    From sines as well as cosines, since a cosine near 1 cannot tell small angles apart (Björck and Golub, 1973).
    """
    if len(b) > len(a):
        a, b = b, a
    left, cosines, _ = torch.linalg.svd(b @ a.T)
    along = left.T @ b
    sines = (along - along @ a.T @ a).norm(dim=1)
    return torch.rad2deg(torch.atan2(sines, cosines))


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
    angles = principal_angles(span_a, span_b)
    left, cosines, right = torch.linalg.svd(span_a @ span_b.T)
    principal_a, principal_b = left.T @ span_a, right @ span_b
    pairs = int((angles <= limit).sum())
    # Principal vectors beyond the smaller span have no partner: they are as foreign as can be.
    padded = torch.zeros(max(len(span_a), len(span_b)), dtype=torch.float64)
    padded[: len(cosines)] = cosines
    return Comparison(
        cosines=(a.vectors.flatten(1) @ b.vectors.flatten(1).T).abs().float(),
        angles=angles.float(),
        reconstruction=reconstruction(span_a, span_b),
        hallucination=hallucination(span_a, span_b),
        shared=_directions(principal_a[:pairs] + principal_b[:pairs], cosines[:pairs], a, "shared", "cosine"),
        only_a=_directions(*_foreign(principal_a, padded, pairs), a, "only in A", "sine"),
        only_b=_directions(*_foreign(principal_b, padded, pairs), b, "only in B", "sine"),
    )


def variance_shares(directions: Directions, moments: Moments) -> torch.Tensor:
    """Share of another concept's gradient variance along each direction, float64 (K,); 1/(R·d) is what chance gives.

    Raises:
        ElrondError: if the sizes differ or the moments hold fewer than two gradients.
    """
    flat = directions.vectors.flatten(1).double()
    if flat.shape[1] != moments.size:
        raise ElrondError(f"Directions of {flat.shape[1]} values do not fit moments of {moments.size}.")
    covariance = moments.covariance()
    return ((flat @ covariance) * flat).sum(1) / covariance.trace()


def _foreign(principal: torch.Tensor, cosines: torch.Tensor, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    rest = principal[pairs:]
    return rest.flip(0), (1 - cosines[pairs : len(principal)].square()).clamp_min(0).sqrt().flip(0)


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
