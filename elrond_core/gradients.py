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
        probes: float32, (M, R, d): Jacobian probes: white noise back-propagated at the same points and scaled like
            the gradients, so that its second moment estimates the pullback metric JᵀJ; M is 0 without them.
        probe_sigma: float32, (M,): noise level of each probe, where there are several levels; else None.
    """

    vectors: torch.Tensor
    sigma: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    provenance: Provenance
    probes: torch.Tensor
    probe_sigma: torch.Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.vectors)
        if self.vectors.ndim != 3 or self.probes.ndim != 3 or self.probes.shape[1:] != self.vectors.shape[1:]:
            raise ElrondError(
                f"Gradients must be (N, rows, d), got {tuple(self.vectors.shape)} with a response of "
                f"{tuple(self.probes.shape)}."
            )
        if not len(self.sigma) == len(self.sources) == len(self.targets) == count:
            raise ElrondError(f"{count} gradients need as many noise levels, sources and targets.")
        if self.probe_sigma is not None and len(self.probe_sigma) != len(self.probes):
            raise ElrondError(f"{len(self.probes)} responses need as many noise levels.")

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

    def select(self, mask: torch.Tensor, probe_mask: torch.Tensor | None = None) -> Gradients:
        """The gradients where a mask holds, in order.

        Args:
            mask: bool, (N,).
            probe_mask: bool, (M,), of the Jacobian probes; None keeps all.
        """
        probes, sigma = self.probes, self.probe_sigma
        if probe_mask is not None:
            probes = probes[probe_mask]
            sigma = None if sigma is None else sigma[probe_mask]
        levels = self.sigma[mask]
        return Gradients(
            vectors=self.vectors[mask],
            sigma=levels,
            sources=self.sources[mask],
            targets=self.targets[mask],
            provenance=self.provenance.with_(sigma=tuple(levels.unique().tolist()), count=len(levels)),
            probes=probes,
            probe_sigma=sigma,
        )

    def at_levels(self, levels: Sequence[float]) -> Gradients:
        """Only the gradients, and Jacobian probes, of these noise levels.

        Raises:
            ElrondError: if there are none.
        """
        wanted = torch.tensor(list(levels), dtype=torch.float32)
        mask = torch.isin(self.sigma, wanted)
        if not mask.any():
            raise ElrondError(f"There are no gradients of that noise level, only of {listed(self.levels)}.")
        return self.select(mask, torch.isin(self.probe_levels(), wanted))

    def of_row(self, row: int) -> Gradients:
        """Only the gradients, and Jacobian probes, of one of the concept's rows, (N, 1, d); 0 is the first.

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
            probes=self.probes[:, here],
            provenance=self.provenance.with_(rows=self.provenance.rows[here], tokens=self.provenance.tokens[here]),
        )

    def summed_over_rows(self) -> Gradients:
        """Gradients, and Jacobian probes, with respect to one step that all rows of the concept take, (N, 1, d).

        By the chain rule they are sums over the rows. A direction over one row moves each of several rows by itself.
        """
        return replace(self, vectors=self.vectors.sum(1, keepdim=True), probes=self.probes.sum(1, keepdim=True))

    def rms_length(self, level: float) -> float:
        """Root mean square length of the gradients of a noise level."""
        return float(self.flat[self.sigma == level].double().square().sum(1).mean().sqrt())

    def level_lines(self) -> list[str]:
        """A report: a line a noise level, highest first, with the number of its gradients and their length."""
        return [
            f"{place}: {int((self.sigma == level).sum())} gradients at noise level {level:.4g} "
            f"of root mean square length {self.rms_length(level):.3g}"
            for place, level in enumerate(self.levels, 1)
        ]

    def normalised(self) -> Gradients:
        """Gradients, and Jacobian probes, divided by the root mean square length of their noise level's gradients.

        Every level then has the same weight in pooled directions. Probes are divided by the same length as gradients,
        so that the response directions of a level do not change.
        """
        scale, probe_scale = torch.ones(len(self)), torch.ones(len(self.probes))
        for level in self.levels:
            length = torch.tensor(self.rms_length(level))
            if length > 0:
                scale[self.sigma == level] = 1 / length
                probe_scale[self.probe_levels() == level] = 1 / length
        vectors, probes = self.vectors * scale[:, None, None], self.probes * probe_scale[:, None, None]
        return replace(self, vectors=vectors, probes=probes)

    def probe_levels(self) -> torch.Tensor:
        """Noise level of each Jacobian probe, float32, (M,).

        Raises:
            ElrondError: if there are several levels and the gradients do not say.
        """
        if self.probe_sigma is not None:
            return self.probe_sigma
        if len(self.levels) > 1 and len(self.probes):
            raise ElrondError("These gradients do not say which noise level their responses are of.")
        return self.sigma[:1].expand(len(self.probes))


def listed(numbers: Sequence[float]) -> str:
    """Numbers for a message, four digits each."""
    return ", ".join(f"{number:.4g}" for number in numbers)
