"""Subsets, sums and orthogonalised versions of sets of directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..directions import Directions
from ..errors import ElrondError

# Length below which what remains of a unit direction is rounding.
_SPANNED = 1e-4


def merge(first: Directions, second: Directions) -> Directions:
    """The directions of two sets, those of the second after those of the first.

    Raises:
        ElrondError: if they do not belong to the same model family and the same number of rows.
    """
    families = first.provenance.family, second.provenance.family
    if families[0] != families[1] or first.vectors.shape[1:] != second.vectors.shape[1:]:
        kinds = [f"{s.provenance.family} ({s.vectors.shape[1]} rows of {s.width})" for s in (first, second)]
        raise ElrondError(f"The two sets do not fit together: one is for {kinds[0]}, the other for {kinds[1]}.")
    return replace(
        first,
        vectors=torch.cat([first.vectors, second.vectors]),
        scores=torch.cat([first.scores, second.scores]),
        method={"name": "merge", "of": _name(first), "and": _name(second)},
        names=first.names + second.names,
        stars=first.stars + second.stars,
        natural_std=first.natural_std + second.natural_std if first.natural_std and second.natural_std else (),
        densities=first.densities + second.densities if first.densities and second.densities else (),
        **_joined_calibrations(first, second),
    )


def subset(directions: Directions, indices: Sequence[int]) -> Directions:
    """The directions with these indices, in this order."""
    order = list(indices)
    return replace(
        directions,
        vectors=directions.vectors[order],
        scores=directions.scores[order],
        names=tuple(directions.names[i] for i in order),
        stars=tuple(directions.stars[i] for i in order),
        natural_std=tuple(directions.natural_std[i] for i in order) if directions.natural_std else (),
        densities=tuple(directions.densities[i] for i in order) if directions.densities else (),
        intervals=tuple(directions.intervals[i] for i in order) if directions.intervals else (),
        stops=tuple(directions.stops[i] for i in order) if directions.stops else (),
    )


def weighted_sum(directions: Directions, weights: Sequence[float]) -> Directions:
    """The weighted sum of all directions, as one direction of unit norm.

    Its score is the mean of their scores, weighted by the squared weights: the variance of a sum of uncorrelated
    directions.

    Raises:
        ElrondError: if there is not one weight a direction, one is not finite, or the directions cancel.
    """
    if len(weights) != len(directions):
        raise ElrondError(f"The sum of {len(directions)} directions needs as many weights, not {len(weights)}.")
    weight = torch.tensor(weights, dtype=torch.float64)
    vector = torch.einsum("k,krd->rd", weight, directions.vectors.double())
    norm = float(vector.norm())
    if not torch.isfinite(weight).all() or norm <= _SPANNED * float(weight.abs().max()):
        raise ElrondError("These weights are not finite, or their directions cancel to nothing.")
    terms = [f"{w:+g} {name or i}" for i, (w, name) in enumerate(zip(weights, directions.names, strict=True)) if w]
    return Directions(
        (vector / norm).float()[None],
        ((weight**2 * directions.scores.double()).sum() / (weight**2).sum()).float()[None],
        {"name": "weighted sum", "of": _name(directions), "weights": ", ".join(f"{w:g}" for w in weights)},
        directions.provenance,
        names=(" ".join(terms)[:200],),
        score_name=directions.score_name,
    )


def orthogonalised(directions: Directions) -> Directions:
    """Each direction without its part in the span of those before it (Gram and Schmidt), at unit norm.

    Scores stay as they were.

    Raises:
        ElrondError: if a direction is in the span of those before it.
    """
    basis, triangle = torch.linalg.qr(directions.vectors.flatten(1).double().T)
    # On the diagonal: the length, up to sign, of what is outside of the span of the directions before. There are no
    # entries for more directions than dimensions.
    diagonal = torch.zeros(len(directions), dtype=torch.float64)
    diagonal[: len(triangle)] = triangle.diagonal()
    spanned = diagonal.abs() < _SPANNED
    if spanned.any():
        raise ElrondError(f"Direction {int(spanned.long().argmax())} is a mix of those before it; leave it out.")
    method = {key: value for key, value in directions.method.items() if key != "calibration"}
    return replace(
        directions,
        vectors=(basis * diagonal.sign()).T.float().reshape(directions.vectors.shape),
        method={**method, "orthogonalised": "yes"},
        # An orthogonalised direction has another natural variation and other usable strengths, and is no latent.
        natural_std=(),
        densities=(),
        intervals=(),
        stops=(),
    )


def renamed(directions: Directions, names: Sequence[str]) -> Directions:
    """Directions with new names, in order. A direction whose name is empty or missing keeps its old one.

    Raises:
        ElrondError: if there are more names than directions.
    """
    if len(names) > len(directions):
        raise ElrondError(f"There are {len(names)} names for {len(directions)} directions.")
    new_names = [name.strip() for name in names] + [""] * (len(directions) - len(names))
    return replace(directions, names=tuple(new or old for new, old in zip(new_names, directions.names, strict=True)))


def _joined_calibrations(first: Directions, second: Directions) -> dict[str, Any]:
    """Intervals and stops of two sets, where one of them may have none."""
    if not (first.stops or second.stops):
        return {}
    both = (first, second)
    return {
        "intervals": sum((s.intervals or ((0.0, 0.0),) * len(s) for s in both), ()),
        "stops": sum((s.stops or ((),) * len(s) for s in both), ()),
    }


def _name(directions: Directions) -> str:
    return directions.method.get("name", "?")
