"""Directions of a concept's rows: what every decomposition returns and every steering node takes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch

from .errors import ElrondError, NotFoundError
from .provenance import Provenance


@dataclass(frozen=True)
class Directions:
    """Unit directions of a concept, best first.

    Attributes:
        vectors: float32, (K, R, d): K directions over the R rows of the concept, each of unit norm over R·d.
        scores: float32, (K,): what the method ranks by (explained variance ratio, share of gradient energy, …).
        method: the method's name and settings, such as {"name": "pca", "significance": "2.5"}.
        provenance: where they come from.
        names: one name a direction; empty where nobody gave one.
        score_name: what `scores` is, in words, for reports and axes.
        stars: one mark a direction.
        natural_std: how far the model's own images lie along each direction: the standard deviation of the steps that
            would turn the mean image into them, in the embedding's units; empty where it is not known.
        densities: the share of the gradients that activate each direction, if it is a latent of a sparse autoencoder
            (its firing density, 0 to 1); empty if not.
        intervals: the usable strengths of each direction, lowest and highest, in token norms; (0, 0) for a direction
            that was not calibrated, and empty if none was.
        stops: of each calibrated direction 2·N + 1 strengths in token norms, ascending and with 0 in the middle, which
            the calibrated strengths -1 to 1 stand for at equal distances; () for a direction that was not calibrated,
            and empty if none was.
    """

    vectors: torch.Tensor
    scores: torch.Tensor
    method: dict[str, str]
    provenance: Provenance
    names: tuple[str, ...] = ()
    score_name: str = "score"
    stars: tuple[bool, ...] = field(default=())
    natural_std: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()
    intervals: tuple[tuple[float, float], ...] = ()
    stops: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.vectors.ndim != 3 or self.scores.shape != self.vectors.shape[:1]:
            raise ElrondError(
                f"Directions must be (K, rows, d) with K scores, got {tuple(self.vectors.shape)} "
                f"and {tuple(self.scores.shape)}."
            )
        for name, default in (("names", ""), ("stars", False)):
            if not getattr(self, name):
                object.__setattr__(self, name, (default,) * len(self.vectors))
            elif len(getattr(self, name)) != len(self.vectors):
                raise ElrondError(f"{len(self.vectors)} directions need as many {name}.")
        for name in ("natural_std", "densities", "intervals", "stops"):
            if len(getattr(self, name)) not in (0, len(self.vectors)):
                raise ElrondError(f"{len(self.vectors)} directions need as many entries of {name}, or none.")
        if len(self.intervals) != len(self.stops):
            raise ElrondError("Directions that are calibrated have both intervals and stops.")

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def width(self) -> int:
        """d, the width of one conditioning row."""
        return self.vectors.shape[2]

    def pick(self, index: int) -> torch.Tensor:
        """Direction `index`, (R, d).

        Raises:
            NotFoundError: if there is no such direction.
        """
        if not 0 <= index < len(self):
            raise NotFoundError(f"There is no direction {index}: this set holds 0 to {len(self) - 1}.")
        return self.vectors[index]

    def digest(self, index: int) -> str:
        """A name for one direction that depends on its numbers only, whatever set it is in and however it is called."""
        return hashlib.blake2b(self.pick(index).float().contiguous().numpy().tobytes(), digest_size=12).hexdigest()

    def lines(self) -> list[str]:
        """A line a direction: its name and score."""
        return [
            f"{i}: {name or '(no name)'}  {self.score_name} {score:.4g}"
            for i, (name, score) in enumerate(zip(self.names, self.scores.tolist(), strict=True))
        ]


def fix_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Flip directions (K, …) so that the entry of largest magnitude of each is positive."""
    flat = vectors.flatten(1)
    largest = flat.gather(1, flat.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)
    return (flat * sign).reshape(vectors.shape)
