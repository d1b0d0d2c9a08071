"""All estimates of a concept's local intrinsic dimension (LID), side by side.

The nearest-neighbour dimension (`neighbours.py`) is the answer where it is known, the number of eigenvalues above the
noise floor (`noise_floor.py`) elsewhere. The published estimates (`published.py`, and the count of significant
components of `elrond_core.decompose.pca`) are reported beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..decompose.moments import Moments
from ..decompose.pca import fit_pca
from ..errors import ElrondError
from ..gradients import Gradients
from .neighbours import NeighbourOptions, neighbour_dimension
from .noise_floor import NoiseFloor, NoiseFloorOptions, fit_noise_floor
from .published import components_to_share, largest_gap

# Fewest gradients, and values of each, from whose eigenvalues a noise floor can be fitted.
_LEAST = 20


@dataclass(frozen=True)
class LIDReport:
    """Estimates of the intrinsic dimension.

    Attributes:
        estimate: most likely number of eigenvalues that are signal; 0 if noise alone could have produced all.
        interval: its 90 % interval (parametric bootstrap: signal and noise redrawn from the fit); its upper end is None
            where the signal does not end above the noise.
        detectable: whether the signal ends above the noise: more signal of the same decay would have been seen. If
            not, `estimate` is a lower bound.
        conclusion: the same as a sentence.
        variance95: components to reach 95 % of the variance.
        gap: components before the largest gap between singular values (Stanczuk et al., arXiv 2212.12611).
        ratio: eigenvalues whose share is above C/(R·d) (ELROND, step 5).
        neighbour: nearest-neighbour dimension of the realizations as the concept's rows see them; 0 where they differ
            by no more than chance; None with fewer than 30 realizations, fewer than 2 gradients towards each, no
            Jacobian probes, or moments only.
        neighbour_interval: its 90 % interval (half-samples of the realizations), or None.
        eigenvalues: float64, (P,): variances of the principal components, descending.
        null: float64, (P,): the eigenvalues of the fitted noise alone.
        threshold: halfway between the weakest signal and the strongest noise; without signal, what noise exceeds once
            in a hundred times.
        visible: smallest variance of a direction, noise included, that this many gradients can show (the transition of
            Baik, Ben Arous and Péché).
        noise: mean variance of the noise along a dimension.
        spread: relative standard deviation of the noise's variances.
        count: N, number of gradients.
        size: R·d.
        options: constants of the nearest-neighbour dimension.
    """

    estimate: int
    interval: tuple[int, int | None]
    detectable: bool
    conclusion: str
    variance95: int
    gap: int
    ratio: int
    neighbour: float | None
    neighbour_interval: tuple[float, float] | None
    eigenvalues: torch.Tensor
    null: torch.Tensor
    threshold: float
    visible: float
    noise: float
    spread: float
    count: int
    size: int
    options: NeighbourOptions = field(default_factory=NeighbourOptions)

    @property
    def dimension(self) -> float:
        """The answer: the nearest-neighbour dimension where it is known, else the count above the noise floor."""
        return float(self.estimate) if self.neighbour is None else self.neighbour

    def lines(self) -> list[str]:
        """The report as text, one fact a line."""
        low, high = self.interval
        interval = f"90 % interval {low} to {high}" if high is not None else f"{low} or more"
        return [
            f"ways in which the images differ, as the word sees them: {self._neighbour_text()}",
            f"above the noise floor: {self.estimate} ({interval})",
            self.conclusion,
            f"published: {self.ratio} by share of variance, {self.gap} by the largest gap, "
            f"{self.variance95} to reach 95 % of the variance",
            f"from {self.count} gradients of {self.size} values",
        ]

    def _neighbour_text(self) -> str:
        if self.neighbour is None or self.neighbour_interval is None:
            return (
                "not known: it takes gradients with their response, towards 30 realizations or more, so many to each "
                "that the differences stand out of their noise"
            )
        if self.neighbour == 0:
            return "0: to the word they differ by no more than chance"
        if self.neighbour >= self.options.highest:
            return f"{self.options.highest} or more"
        low, high = self.neighbour_interval
        return f"{self.neighbour:.1f} (90 % interval {low:.1f} to {high:.1f})"


def estimate_lid(
    source: Gradients | Moments,
    *,
    significance: float = 2.5,
    seed: int = 0,
    neighbours: NeighbourOptions | None = None,
    noise_floor: NoiseFloorOptions | None = None,
) -> LIDReport:
    """Estimate the intrinsic dimension of a concept.

    Args:
        source: gradients, or their moments.
        significance: C of the published rule.
        seed: fixes the simulated noise and the half-samples.
        neighbours: constants of the nearest-neighbour dimension, such as `NeighbourOptions(neighbours=20)`.
        noise_floor: constants of the count above the noise floor.

    Raises:
        ElrondError: if there are fewer than 20 gradients or values in each, one is not finite, or all are the same.
    """
    _, spectrum = fit_pca(source, significance=significance, limit=1)
    count, size = spectrum.count, spectrum.size
    if count < _LEAST or size < _LEAST:
        raise ElrondError(
            f"The intrinsic dimension needs at least {_LEAST} gradients of {_LEAST} values, got {count} gradients of "
            f"{size}."
        )
    options = neighbours or NeighbourOptions()
    found = neighbour_dimension(source, seed, options) if isinstance(source, Gradients) else None
    eigenvalues = spectrum.eigenvalues.numpy()[: min(count - 1, size)]
    floor = fit_noise_floor(eigenvalues, count - 1, size, seed, noise_floor)
    return LIDReport(
        estimate=floor.signal,
        interval=floor.interval,
        detectable=floor.detectable,
        conclusion=_conclusion(floor, count),
        variance95=components_to_share(eigenvalues, 0.95),
        gap=largest_gap(eigenvalues),
        ratio=spectrum.significant,
        neighbour=found.value if found else None,
        neighbour_interval=found.interval if found else None,
        eigenvalues=torch.from_numpy(eigenvalues),
        null=torch.from_numpy(floor.null),
        threshold=floor.threshold,
        visible=floor.visible,
        noise=floor.noise,
        spread=floor.spread,
        count=count,
        size=size,
        options=options,
    )


def _conclusion(floor: NoiseFloor, count: int) -> str:
    if not floor.signal:
        return f"Nothing rises above the noise floor of {count} gradients; collect more."
    if not floor.flat:
        return "The spectrum falls all the way without a flat noise floor, so that no number of directions stands out."
    if not floor.detectable:
        return f"The signal runs into the noise floor of {count} gradients: at least this many, and more may be hidden."
    return f"The weakest is {floor.clearance:.1f} times what {count} gradients can just show."
