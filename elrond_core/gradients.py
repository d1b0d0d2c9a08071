"""Gradients of one concept, and how they are selected and scaled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .errors import ElrondError
from .provenance import Provenance


@dataclass(frozen=True)
class Gradients:
    """Gradients of one concept.

    Attributes:
        vectors: float32, (N, R, d): gradient i with respect to the concept's R rows.
        sigma: float32, (N,): noise level of each.
        sources: int64, (N,): realization that was noised (A).
        targets: int64, (N,): realization the estimate was compared with (B).
        provenance: where they come from.
        response: float32, (M, R, d): back-propagated white noise at the same points, scaled like the gradients, so
            that its second moment estimates the response JᵀJ; M is 0 where it was not collected.
        response_sigma: float32, (M,): noise level of each response, where there are several levels; else None.
    """

    vectors: torch.Tensor
    sigma: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    provenance: Provenance
    response: torch.Tensor
    response_sigma: torch.Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.vectors)
        if self.vectors.ndim != 3 or self.response.ndim != 3 or self.response.shape[1:] != self.vectors.shape[1:]:
            raise ElrondError(
                f"Gradients must be (N, rows, d), got {tuple(self.vectors.shape)} with a response of "
                f"{tuple(self.response.shape)}."
            )
        if not len(self.sigma) == len(self.sources) == len(self.targets) == count:
            raise ElrondError(f"{count} gradients need as many noise levels, sources and targets.")
        if self.response_sigma is not None and len(self.response_sigma) != len(self.response):
            raise ElrondError(f"{len(self.response)} responses need as many noise levels.")

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def flat(self) -> torch.Tensor:
        """(N, R·d): the rows of a concept as one long vector, which is how they are decomposed."""
        return self.vectors.flatten(1)

    @property
    def levels(self) -> list[float]:
        """The noise levels, in the model's units, highest first."""
        return sorted(self.sigma.unique().tolist(), reverse=True)

    def at_levels(self, levels: Sequence[float]) -> Gradients:
        """Only the gradients, and responses, of these noise levels.

        Raises:
            ElrondError: if there are none.
        """
        some = torch.tensor(list(levels), dtype=torch.float32)
        kept, heard = torch.isin(self.sigma, some), torch.isin(self.response_levels(), some)
        if not kept.any():
            raise ElrondError(f"There are no gradients of that noise level, only of {listed(self.levels)}.")
        return Gradients(
            vectors=self.vectors[kept],
            sigma=self.sigma[kept],
            sources=self.sources[kept],
            targets=self.targets[kept],
            provenance=replace(self.provenance, sigma=tuple(self.sigma[kept].unique().tolist()), count=int(kept.sum())),
            response=self.response[heard],
            response_sigma=None if self.response_sigma is None else self.response_sigma[heard],
        )

    def of_row(self, row: int) -> Gradients:
        """Only the gradients, and responses, of one of the concept's rows, (N, 1, d); 0 is the first.

        Raises:
            ElrondError: if there is no such row.
        """
        count = self.vectors.shape[1]
        if not 0 <= row < count:
            raise ElrondError(f"The concept has {count} rows, and no row {row + 1}.")
        here = slice(row, row + 1)
        return replace(
            self,
            vectors=self.vectors[:, here],
            response=self.response[:, here],
            provenance=self.provenance.with_(rows=self.provenance.rows[here], tokens=self.provenance.tokens[here]),
        )

    def of_rows_alike(self) -> Gradients:
        """Gradients, and responses, of moving all rows of the concept alike, (N, 1, d).

        They are the sums over the rows, and so point where the means do; a direction over one row moves several alike.
        """
        return replace(self, vectors=self.vectors.sum(1, keepdim=True), response=self.response.sum(1, keepdim=True))

    def normalised(self) -> Gradients:
        """Gradients, and responses, divided by the root mean square length of their noise level's gradients.

        Every level then has the same say in pooled directions; both are divided by the same length, so that a level's
        response directions do not change.
        """
        scale, heard = torch.ones(len(self)), torch.ones(len(self.response))
        for level in self.levels:
            here = self.sigma == level
            length = self.flat[here].double().square().sum(1).mean().sqrt().float()
            if length > 0:
                scale[here], heard[self.response_levels() == level] = 1 / length, 1 / length
        return replace(self, vectors=self.vectors * scale[:, None, None], response=self.response * heard[:, None, None])

    def response_levels(self) -> torch.Tensor:
        """Noise level of each response, float32, (M,).

        Raises:
            ElrondError: if there are several levels and the gradients do not say.
        """
        if self.response_sigma is not None:
            return self.response_sigma
        if len(self.levels) > 1 and len(self.response):
            raise ElrondError("These gradients do not say which noise level their responses are of.")
        return self.sigma[:1].expand(len(self.response))


def listed(numbers: Sequence[float]) -> str:
    """Numbers for a message, four digits each."""
    return ", ".join(f"{number:.4g}" for number in numbers)
