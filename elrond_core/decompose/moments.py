"""Streaming mean and covariance of gradients, which are all that PCA and the spectrum of the dimension need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..errors import ElrondError
from ..gradients import Gradients
from ..provenance import Provenance

# Number of vectors that are copied to float64 at a time. It bounds the additional memory.
BLOCK = 2048


@dataclass
class Moments:
    """Count, mean and scatter matrix of gradients (R, d), accumulated in float64.

    Attributes:
        rows: R, the rows of the concept.
        width: d, the width of one row.
        provenance: the gradients' origin; its `count` is kept equal to `count`.
        count: N, number of vectors so far.
        mean: float64, (R·d,).
        scatter: float64, (R·d, R·d): sum of (x - mean)(x - mean)ᵀ.
    """

    rows: int
    width: int
    provenance: Provenance
    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def empty(cls, rows: int, width: int, provenance: Provenance) -> Moments:
        """Moments of zero vectors.

        Raises:
            ElrondError: if `rows` or `width` is below 1.
        """
        _check_size(rows, width)
        size = rows * width
        zeros = torch.zeros(size, dtype=torch.float64)
        return cls(rows, width, provenance.with_(count=0), 0, zeros, torch.zeros(size, size, dtype=torch.float64))

    @classmethod
    def of(cls, gradients: Gradients) -> Moments:
        """Moments of a whole set of gradients.

        Raises:
            ElrondError: if a gradient is not finite, or has no values.
        """
        _, rows, width = gradients.vectors.shape
        moments = cls.empty(rows, width, gradients.provenance)
        moments.add(gradients.vectors)
        return moments

    @property
    def size(self) -> int:
        """R·d, the length of one vector."""
        return self.rows * self.width

    def add(self, batch: torch.Tensor) -> None:
        """Add vectors, float (B, R, d) or (B, R·d).

        Raises:
            ElrondError: if the shape differs, or a vector is not finite. The message names its number among all added.
        """
        if batch.ndim not in (2, 3):
            raise ElrondError(f"A batch must be vectors, (B, rows, d) or (B, rows x d), and has {tuple(batch.shape)}.")
        flat = batch.flatten(1)
        if flat.shape[1] != self.size:
            raise ElrondError(f"These moments are of vectors of {self.size} values, and the batch has {flat.shape[1]}.")
        require_finite(flat, self.count)
        for block in flat.split(BLOCK):
            mean = block.mean(0, dtype=torch.float64)
            centred = block - mean
            self._combine(len(block), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Add the vectors of `other`, which may come from another machine.

        Raises:
            ElrondError: if the two have different shapes, concepts or models (`Provenance.united`).
        """
        if (self.rows, self.width) != (other.rows, other.width):
            raise ElrondError(
                f"Moments of {self.rows} x {self.width} values cannot be merged with {other.rows} x {other.width}."
            )
        united = self.provenance.united(other.provenance)
        if other.count:
            self.provenance = united if self.count else other.provenance
        self._combine(other.count, other.mean, other.scatter)

    def covariance(self) -> torch.Tensor:
        """Unbiased covariance, float64 (R·d, R·d).

        Raises:
            ElrondError: if there are fewer than two vectors, or the moments are not finite.
        """
        if self.count < 2:
            raise ElrondError(f"A covariance needs at least 2 gradients, got {self.count}.")
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.scatter).all()):
            raise ElrondError("These moments are not finite (NaN or infinity); make them again from the gradients.")
        return self.scatter / (self.count - 1)

    def _combine(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        """Add the moments of other vectors (Chan, Golub and LeVeque, 1983)."""
        if count == 0:
            return
        total = self.count + count
        shift = mean - self.mean
        # Not in place: another object may hold the old tensor.
        self.scatter = (self.scatter + scatter).addr_(shift, shift, alpha=self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total
        self.provenance = self.provenance.with_(count=total)


def _check_size(rows: int, width: int) -> None:
    if rows < 1 or width < 1:
        raise ElrondError(f"Vectors have at least 1 x 1 values, and these would have {rows} x {width}.")


def first_not_finite(vectors: torch.Tensor) -> int | None:
    """Index of the first of the vectors (N, …) with a value that is not finite, or None."""
    for start in range(0, len(vectors), BLOCK):
        finite = torch.isfinite(vectors[start : start + BLOCK].flatten(1)).all(1)
        if not finite.all():
            return start + int(finite.long().argmin())
    return None


def filled(whole: torch.Tensor, parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Concatenate parts into a tensor (N, …) that was allocated before they are computed.

    `torch.cat` needs all parts at once. They would lie in the heap among the large blocks that they are computed from,
    and heap fragmentation would keep the memory of the blocks.
    """
    start = 0
    for part in parts:
        whole[start : start + len(part)] = part
        start += len(part)
    return whole


def require_finite(vectors: torch.Tensor, first: int = 0) -> None:
    """Refuse vectors (N, …) that are not finite.

    Raises:
        ElrondError: if one is not; the message names its number, counted from `first`.
    """
    bad = first_not_finite(vectors)
    if bad is not None:
        raise ElrondError(f"Gradient {first + bad} is not finite (NaN or infinity).")
