"""Making sets of directions out of sets of directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..directions import Directions
from ..errors import ElrondError

# What is left of a direction that the ones before it span is rounding.
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
    )


def subset(directions: Directions, indices: Sequence[int]) -> Directions:
    """Some directions, in the order asked for."""
    chosen = list(indices)
    return replace(
        directions,
        vectors=directions.vectors[chosen],
        scores=directions.scores[chosen],
        names=tuple(directions.names[i] for i in chosen),
        stars=tuple(directions.stars[i] for i in chosen),
        natural_std=tuple(directions.natural_std[i] for i in chosen) if directions.natural_std else (),
        densities=tuple(directions.densities[i] for i in chosen) if directions.densities else (),
    )


def weighted_sum(directions: Directions, weights: Sequence[float]) -> Directions:
    """One direction: the sum of all, each times its weight, brought to unit norm.

    Its score is that of uncorrelated directions: the mean of their scores weighted by the squared weights.

    Raises:
        ElrondError: if the weights are not one each, not finite, or cancel.
    """
    if len(weights) != len(directions):
        raise ElrondError(f"The sum of {len(directions)} directions needs as many weights, not {len(weights)}.")
    weight = torch.tensor(weights, dtype=torch.float64)
    vector = torch.einsum("k,krd->rd", weight, directions.vectors.double())
    norm = float(vector.norm())
    if not torch.isfinite(weight).all() or norm <= _SPANNED * float(weight.abs().max()):
        raise ElrondError("These weights are not finite, or their directions cancel to nothing.")
    words = [f"{w:+g} {name or i}" for i, (w, name) in enumerate(zip(weights, directions.names, strict=True)) if w]
    return Directions(
        (vector / norm).float()[None],
        ((weight**2 * directions.scores.double()).sum() / (weight**2).sum()).float()[None],
        {"name": "weighted sum", "of": _name(directions), "weights": ", ".join(f"{w:g}" for w in weights)},
        directions.provenance,
        names=(" ".join(words)[:200],),
        score_name=directions.score_name,
    )


def orthogonalised(directions: Directions) -> Directions:
    """Each direction without what those before it already do (Gram and Schmidt), at unit norm, with its old score.

    Raises:
        ElrondError: if a direction is spanned by those before it.
    """
    flat = directions.vectors.flatten(1).double()
    basis: list[torch.Tensor] = []
    for i, vector in enumerate(flat):
        left = vector
        # Twice, since one pass in finite precision leaves directions of a large set slightly aslant.
        for _ in range(2):
            for done in basis:
                left = left - (left @ done) * done
        if left.norm() < _SPANNED:
            raise ElrondError(f"Direction {i} is a mix of those before it; leave it out.")
        basis.append(left / left.norm())
    return replace(
        directions,
        vectors=torch.stack(basis).float().reshape(directions.vectors.shape),
        method={**directions.method, "orthogonalised": "yes"},
        # What is left of a direction reaches elsewhere, and is no latent.
        natural_std=(),
        densities=(),
    )


def renamed(directions: Directions, names: Sequence[str]) -> Directions:
    """Directions with new names, in order; an empty one keeps the name there is, and missing ones are empty.

    Raises:
        ElrondError: if there are more names than directions.
    """
    if len(names) > len(directions):
        raise ElrondError(f"There are {len(names)} names for {len(directions)} directions.")
    given = [name.strip() for name in names] + [""] * (len(directions) - len(names))
    return replace(directions, names=tuple(new or old for new, old in zip(given, directions.names, strict=True)))


def _name(directions: Directions) -> str:
    return directions.method.get("name", "?")
