"""Gradients as the sparse autoencoder is trained on them: divided by their median norm, a piece at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import torch

from ..errors import ElrondError
from .moments import require_finite

Check = Callable[[], None]

# Values that are read between two calls of `check`, so that a cancel is noticed within a second.
PIECE_VALUES = 2**22
ALL_SAME = "All gradients are the same, so there is nothing to learn."


class ScaledGradients:
    """Gradients divided by their median norm, (N, D), on a device; scaled when read, so that there is no second copy.

    Gradients of length zero (of a realization compared with its copy) do not count for the median.
    """

    def __init__(self, vectors: torch.Tensor, device: torch.device | str, check: Check) -> None:
        norms, first = [], 0
        for piece in pieces(vectors, check):
            require_finite(piece, first)
            first += len(piece)
            norms.append(piece.double().norm(dim=1))
        typical = torch.cat(norms)
        typical = typical[typical > 0]
        if not len(typical):
            raise ElrondError(ALL_SAME)
        self.vectors = vectors.to(device)
        self.shape, self.dtype, self.device = vectors.shape, vectors.dtype, self.vectors.device
        # First a power of two, which rounds nothing and keeps squares from overflowing. It is applied in two parts,
        # because the whole need not be a float32.
        power = math.frexp(float(typical.median()))[1]
        self._powers = 2.0 ** -(power // 2), 2.0 ** -(power - power // 2)
        self._length = 1.0
        lengths = torch.cat([piece.norm(dim=1) for piece in pieces(self, check)])
        self._length = float(lengths[lengths > 0].median())
        self.scale = self._length / self._powers[0] / self._powers[1]

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._scaled(self.vectors[rows])

    def split(self, rows: int) -> Iterator[torch.Tensor]:
        """All gradients, `rows` at a time."""
        return (self._scaled(piece) for piece in self.vectors.split(rows))

    def _scaled(self, rows: torch.Tensor) -> torch.Tensor:
        first, second = self._powers
        return (rows * first).mul_(second).div_(self._length)


def geometric_median(
    points: torch.Tensor | ScaledGradients, iterations: int = 50, check: Check = lambda: None
) -> torch.Tensor:
    """The point of least summed distance to `points` (N, D), by Weiszfeld's algorithm; (D,).

    `check` is called between pieces of the work and may raise to cancel.
    """
    median = mean_of(points, check)
    for _ in range(iterations):
        weighted, weights = torch.zeros_like(median), torch.zeros_like(median[0])
        for piece in pieces(points, check):
            weight = 1 / (piece - median).norm(dim=1).clamp_min(1e-6)
            weighted += weight @ piece
            weights += weight.sum()
        previous, median = median, weighted / weights
        if (median - previous).norm() <= 1e-5 * median.norm():
            break
    return median


def mean_of(points: torch.Tensor | ScaledGradients, check: Check) -> torch.Tensor:
    """Mean (D,) of points (N, D)."""
    return torch.stack([piece.sum(0) for piece in pieces(points, check)]).sum(0) / len(points)


def pieces(vectors: torch.Tensor | ScaledGradients, check: Check) -> Iterator[torch.Tensor]:
    """All rows of (N, D), a bounded number of values at once, with a check before each piece."""
    for piece in vectors.split(max(1, PIECE_VALUES // vectors.shape[1])):
        check()
        yield piece


def digest(vectors: torch.Tensor, check: Check) -> str:
    """BLAKE2b of the values of (N, D)."""
    summed = hashlib.blake2b(digest_size=32)
    for piece in pieces(vectors, check):
        summed.update(piece.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return summed.hexdigest()
