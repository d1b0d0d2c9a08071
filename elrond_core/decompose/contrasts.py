"""Directions between opposites that somebody names, such as dark → bright: which of them the images vary along.

Images alone do not determine which rotation of a set of components has axes that people have words for (Locatello et
al., 2019, "Challenging common assumptions in the unsupervised learning of disentangled representations"). Words do.
What a phrase does to the concept's rows is averaged over several phrasings, as Ekin and Gandelsman do
(arXiv 2603.17998). The gradients say how far the images vary along each contrast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import gamma

from ..directions import Directions
from ..errors import ElrondError
from ..gradients import Gradients
from .pca import check_options
from .response import components

# A phrasing moves the concept's rows if it moves them by this share of what another phrasing of the same contrast does.
# Encoders that read from left to right do not see what follows the concept.
_UNREACHED = 0.01
# Chance of a false find among all contrasts together.
LEVEL = 0.05
# Shares below this are rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Contrast:
    """Two phrases that say opposite things of a concept.

    Attributes:
        positive: the phrase at positive strengths.
        negative: the phrase at negative strengths; empty for the concept without a phrase.
    """

    positive: str
    negative: str = ""

    @property
    def name(self) -> str:
        """As directions are named, from negative to positive strengths: "dark → bright", "→ furry"."""
        return f"{self.negative} → {self.positive}".strip()

    @property
    def reversed_name(self) -> str:
        """The name of a direction that leads the other way: "bright → dark", "← furry"."""
        return f"{self.positive} → {self.negative}" if self.negative else f"← {self.positive}"

    @property
    def phrases(self) -> tuple[str, ...]:
        """Its one or two phrases."""
        return (self.negative, self.positive) if self.negative else (self.positive,)


@dataclass(frozen=True)
class PhraseRows:
    """The rows of a concept without and with phrases in its prompt.

    Attributes:
        bare: float32 (R, d), without a phrase.
        phrased: by phrase and name of the phrasing (`elrond_core.decompose.phrasings`), float32 (R, d) each. Phrasings
            may be missing.
    """

    bare: torch.Tensor
    phrased: Mapping[str, Mapping[str, torch.Tensor]]


def displacements(
    rows: PhraseRows, contrasts: Sequence[Contrast], size: tuple[int, int], reference: Sequence[Contrast] = ()
) -> torch.Tensor:
    """How the concept's rows move from one side of each contrast to the other, averaged over phrasings.

    Both sides are read in the same phrasings, so that what any phrase does there cancels. A phrase alone is compared
    with the concept without a phrase. What any phrase does there is then the mean over both sides of all pairs: their
    meanings cancel, and it is subtracted.

    Args:
        rows: the rows with each phrase of the contrasts.
        contrasts: W contrasts.
        size: (rows, d) of the directions. 1 row takes the mean over the concept's R.
        reference: more pairs for what any phrase does.

    Returns:
        float64 (W, rows · d).

    Raises:
        ElrondError: if the sizes do not fit, two sides have no phrasing in common, or no contrast moves the rows.
    """
    count, width = size
    if rows.bare.shape[1] != width or count not in (1, len(rows.bare)):
        raise ElrondError(
            f"The directions are {count} rows of {width}, and this text encoder gives the concept "
            f"{rows.bare.shape[0]} of {rows.bare.shape[1]}: use the text encoder they were made with."
        )
    pairs = [pair for pair in dict.fromkeys([*contrasts, *reference]) if pair.negative]
    common = _common(rows, pairs)
    out = []
    for contrast in contrasts:
        steps = []
        there = rows.phrased[contrast.positive]
        for name, positive in there.items():
            if not contrast.negative:
                steps.append(positive.double() - rows.bare - common.get(name, 0.0))
            elif name in rows.phrased[contrast.negative]:
                steps.append(positive.double() - rows.phrased[contrast.negative][name])
        if not steps:
            raise ElrondError(f"No phrasing holds both sides of {contrast.name!r}: take it out of the list.")
        stacked = torch.stack(steps)
        if count == 1:
            stacked = stacked.mean(1, keepdim=True)
        flat = stacked.flatten(1)
        lengths = flat.norm(dim=1)
        out.append(flat[lengths >= _UNREACHED * lengths.max()].mean(0))
    found = torch.stack(out)
    if not (found.norm(dim=1) > 1e-9).any():
        raise ElrondError("No phrase changes the concept's rows: this text encoder cannot name directions.")
    return found


def _common(rows: PhraseRows, pairs: Sequence[Contrast]) -> dict[str, torch.Tensor]:
    """What any phrase does to the rows in each phrasing: the mean over both sides of all pairs, float64 (R, d)."""
    moved: dict[str, list[torch.Tensor]] = {}
    for pair in pairs:
        sides = [rows.phrased[phrase] for phrase in pair.phrases if phrase in rows.phrased]
        if len(sides) == 2:
            for name in sides[0].keys() & sides[1].keys():
                moved.setdefault(name, []).extend(side[name].double() - rows.bare for side in sides)
    return {name: torch.stack(steps).mean(0) for name, steps in moved.items()}


def level_of_one(contrasts: int) -> float:
    """The level of each of several tests at which all of them together have `LEVEL` (Šidák, 1967)."""
    return 1 - (1 - LEVEL) ** (1 / contrasts)


def fit_contrasts(
    gradients: Gradients,
    contrasts: Sequence[Contrast],
    steps: torch.Tensor,
    *,
    significance: float = 1.0,
    limit: int = 64,
    ridge: float | None = None,
) -> tuple[Directions, list[str]]:
    """Directions along the contrasts that the images vary along.

    For the step δ from one side of a contrast to the other, λ = δᵀCδ / δᵀ(M + ridge)δ is the variance of the images
    along the change that δ causes (`elrond_core.decompose.response`). The contrast of the largest λ is chosen first.
    Then the change that it causes is removed, and the largest λ of what is left is next.

    Every change shares something with what else varies. So the images vary along a contrast if its λ is larger than
    that of a random change. Along a unit vector u that is uniform on the sphere of the changes that are left (under
    M + ridge), λ has known mean and variance: tr W / D and 2 (D tr W² - (tr W)²) / (D² (D + 2)), with W the covariance
    C in these coordinates. A gamma distribution of these two moments (Satterthwaite, 1946) gives the λ that random
    changes exceed at a level of `LEVEL` for all contrasts together. Noise of the estimate is in W, and so in the test.
    The first contrast that is not above that ends the choice.

    Args:
        gradients: gradients with Jacobian probes.
        contrasts: W contrasts, W ≥ 1.
        steps: float64 (W, R · d), how the rows move from one side to the other (`displacements`).
        significance: λ must be above so many times the test's.
        limit: keep at most this many.
        ridge: as a share of the mean of diag M; chosen by `affordable_ridge` if None.

    Returns:
        Directions (K, R, d) of unit norm, K ≥ 1, from the negative side to the positive one, with λ of what was left as
        scores, largest first. `natural_std` is set where the gradients say n. And a report: a line a direction, and a
        sentence for each contrast that was left out.

    Raises:
        ElrondError: as `fit_response`, or if the images vary along none of the contrasts.
    """
    check_options(significance, limit)
    parts = components(gradients, ridge)
    # Inner products of `changes` are those of the steps under M + ridge. W is diagonal for `coordinates` of changes.
    changes = steps @ parts.cholesky
    coordinates = changes @ (parts.cholesky.T @ parts.eigenvectors)
    chosen, left_out = _choose(contrasts, changes, coordinates, parts.eigenvalues, significance, limit)
    if not chosen:
        raise ElrondError(
            f"The images vary along none of these {len(contrasts)} contrasts more than along random changes: try words "
            "for what differs between the images, collect more gradients, or lower the significance."
        )
    order = sorted(chosen, key=lambda k: -chosen[k])
    lengths, change_lengths = steps[order].norm(dim=1), changes[order].norm(dim=1)
    variances = (coordinates[order].square() * parts.eigenvalues).sum(1) / change_lengths.square()
    values = gradients.provenance.latent_values
    # As in `fit_response`: of the whole contrast, since a step goes along all of it.
    natural_std = lengths / change_lengths * variances.sqrt() * 2 / values if values else torch.empty(0)
    directions = Directions(
        vectors=(steps[order] / lengths[:, None]).reshape(-1, *gradients.vectors.shape[1:]).float(),
        scores=torch.tensor([chosen[k] for k in order]),
        method={
            "name": "contrasts",
            "significance": f"{significance:g}",
            "ridge": f"{parts.ridge:.3g}",
            "limit": str(limit),
            "contrasts": str(len(contrasts)),
        },
        provenance=gradients.provenance,
        names=tuple(contrasts[k].name for k in order),
        score_name="latent variance per unit of change",
        natural_std=tuple(natural_std.tolist()),
    )
    report = directions.lines()
    for place, length in enumerate(directions.natural_std):
        report[place] += f"; a natural step is {length / gradients.provenance.token_norm:.2f} token norms"
    return directions, report + left_out


def _choose(
    contrasts: Sequence[Contrast],
    changes: torch.Tensor,
    coordinates: torch.Tensor,
    eigenvalues: torch.Tensor,
    significance: float,
    limit: int,
) -> tuple[dict[int, float], list[str]]:
    """The contrasts that the images vary along, by index with their λ; and why the others were left out."""
    level, size = level_of_one(len(contrasts)), changes.shape[1]
    lengths = changes.square().sum(1)
    rest, rest_coordinates, basis = changes.clone(), coordinates.clone(), coordinates[:0]
    chosen: dict[int, float] = {}
    while True:
        squared = rest.square().sum(1)
        clear = squared > _ROUNDING * lengths.max()
        found = torch.where(clear, (rest_coordinates.square() * eigenvalues).sum(1) / squared, 0.0)
        found[list(chosen)] = 0.0
        threshold = significance * _variance_by_chance(eigenvalues, basis, size - len(basis), level)
        best = int(found.argmax())
        if found[best] <= threshold or len(chosen) == limit:
            break
        chosen[best] = float(found[best])
        unit, unit_coordinates = rest[best] / squared[best].sqrt(), rest_coordinates[best] / squared[best].sqrt()
        basis = torch.cat([basis, unit_coordinates[None]])
        shares = rest @ unit
        rest = rest - torch.outer(shares, unit)
        rest_coordinates = rest_coordinates - torch.outer(shares, unit_coordinates)
    left_out = []
    for k, contrast in enumerate(contrasts):
        if k in chosen:
            continue
        if found[k] > threshold:
            reason = f"there are {limit} directions already"
        elif squared[k] < lengths[k] / 2:
            nearest = max(chosen, key=lambda j: abs(float(changes[j] @ changes[k])) / float(lengths[j]) ** 0.5)
            reason = f"it changes the images mostly as {contrasts[nearest].name} does, or several together"
        else:
            reason = (
                f"the images vary along it by {float(found[k]):.3g}, and along random changes by up to {threshold:.3g}"
            )
        left_out.append(f"left out: {contrast.name}: {reason}")
    return chosen, left_out


def _variance_by_chance(eigenvalues: torch.Tensor, basis: torch.Tensor, size: int, level: float) -> float:
    """The λ that a random change exceeds at a level (see `fit_contrasts`).

    Args:
        eigenvalues: float64 (P,) of W, which may have more of zero.
        basis: float64 (B, P), coordinates of an orthonormal basis of the changes that were removed.
        size: D, the dimensions that are left.
        level: the share of random changes above it.
    """
    within = (basis * eigenvalues) @ basis.T
    trace = float(eigenvalues.sum() - within.trace())
    squares = float(eigenvalues.square().sum() - 2 * (basis * eigenvalues).square().sum() + within.square().sum())
    if size < 1 or trace <= 0:
        return 0.0
    mean = trace / size
    variance = max(2 * (size * squares - trace**2) / (size**2 * (size + 2)), 1e-12 * mean**2)
    return float(gamma.isf(level, mean**2 / variance, scale=variance / mean))
