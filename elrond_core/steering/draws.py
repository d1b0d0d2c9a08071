"""Equation 7 of ELROND: adding directions to a concept's rows, and drawing them for diversity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..directions import Directions
from ..errors import ElrondError
from ..seeding import generator

RANDOM, SPREAD, NATURAL = WAYS = ("random", "spread", "natural")
EQUAL, SCORE, DENSITY = WEIGHTS = ("equal", "score", "density")


@dataclass(frozen=True)
class Draw:
    """What one image of a diversified batch gets.

    Attributes:
        indices: directions mixed, in order.
        weights: their weights in the mix, which is then brought to unit norm.
        strength: signed strength.
    """

    indices: tuple[int, ...]
    weights: tuple[float, ...]
    strength: float


def draw_steps(
    directions: Directions,
    count: int,
    seed: int,
    lowest: float,
    highest: float,
    mix: int = 1,
    leading: int = 0,
    both_signs: bool = True,
    how: str = RANDOM,
    weigh: str = EQUAL,
) -> list[Draw]:
    """Draw a steering step an image.

    At random, as the paper's diversity sampling does: a direction or a normalised mix of several, and a strength.
    Spread: mixes of all that lie evenly apart, on a scrambled Sobol sequence over the sphere of mixes and the range of
    strengths, which leaves fewer holes and clusters than independent draws. Natural: evenly spread too, but each
    direction as far as the model's own images lie along it, normally distributed, so that a strength of one makes as
    much variety as they have, in their proportions; the strength is then a multiple of that, and the step in the
    embedding's own units.

    Args:
        directions: what to draw from.
        count: number of images.
        seed: draw i depends on (seed, i) only.
        lowest: strengths are uniform from here …
        highest: … to here.
        mix: directions per image, if drawn at random; more than one gives the normalised sum of random ones.
        leading: draw from so many leading directions only; 0 means all.
        both_signs: flip the sign of each draw with probability one half.
        how: one of `WAYS`.
        weigh: one of `WEIGHTS`. By score or firing density, directions are picked in proportion to it, and their
            parts in a mix scaled by its root (for explained variances: by how far the model itself varies them).

    Raises:
        ElrondError: if a number is out of range, no direction weighs anything, or natural_std or the densities of the
            directions are needed and not known.
    """
    if how not in WAYS:
        raise ElrondError(f"Steps are drawn in one of the ways {', '.join(WAYS)}, not {how!r}.")
    if weigh not in WEIGHTS:
        raise ElrondError(f"Directions are weighed in one of the ways {', '.join(WEIGHTS)}, not {weigh!r}.")
    pool = min(leading, len(directions)) if leading else len(directions)
    if count < 1:
        raise ElrondError(f"The number of images must be at least 1, got {count}.")
    check_strengths(lowest, highest)
    if how == NATURAL:
        if not directions.natural_std:
            raise ElrondError(
                "It is not known how far the model varies along these directions: take some that were fitted to the "
                "model's response, or draw them in another way."
            )
        scales = torch.tensor(directions.natural_std[:pool], dtype=torch.float64)
    shares = _shares(directions, weigh)[:pool]
    usable = int((shares > 0).sum())
    if not usable:
        what = "firing density" if weigh == DENSITY else "score"
        raise ElrondError(f"No direction of this set has a positive {what} to weigh it by; weigh them equally.")
    if how != RANDOM:
        place, weights = _spread(scales if how == NATURAL else shares.sqrt(), count, seed, both_signs)
        strengths = lowest + (highest - lowest) * place
        if how == NATURAL:
            # The strength of a draw is the length of its step, and directions need not be at right angles.
            strengths = strengths * (weights @ directions.vectors[:pool].flatten(1).double()).norm(dim=1)
        weights = weights / weights.norm(dim=1, keepdim=True).clamp_min(1e-12)
        indices = tuple(range(pool))
        return [Draw(indices, tuple(w), s) for w, s in zip(weights.tolist(), strengths.tolist(), strict=True)]
    if not 1 <= mix <= usable:
        raise ElrondError(f"Each image can mix 1 to {usable} of these directions, not {mix}.")
    draws = []
    for i in range(count):
        g = generator(seed, "diversify", i)
        if weigh == EQUAL:
            chosen = torch.randperm(pool, generator=g)[:mix].tolist()
        else:
            chosen = torch.multinomial(shares, mix, generator=g).tolist()
        weights = torch.ones(mix) if mix == 1 else torch.randn(mix, generator=g) * shares[chosen].sqrt().float()
        strength = lowest + (highest - lowest) * float(torch.rand(1, generator=g))
        flip = both_signs and bool(torch.rand(1, generator=g) < 0.5)
        draws.append(Draw(tuple(chosen), tuple(weights.tolist()), -strength if flip else strength))
    return draws


def check_strengths(lowest: float, highest: float) -> None:
    """Refuse a range of strengths that holds none.

    Raises:
        ElrondError: if it is not finite, negative or upside down.
    """
    if not (math.isfinite(lowest) and math.isfinite(highest) and lowest >= 0):
        raise ElrondError(f"Strengths must be finite and at least 0, not from {lowest} to {highest}.")
    if lowest > highest:
        raise ElrondError(f"The lowest strength {lowest} is above the highest {highest}.")


def check_share(start: float, end: float) -> None:
    """Refuse a part of the sampling that holds no step.

    Raises:
        ElrondError: if it does not start before it ends, or leaves [0, 1].
    """
    if not 0 <= start < end <= 1:
        raise ElrondError(f"Steering must start before it ends, between 0 and 1, not from {start} to {end}.")


def _shares(directions: Directions, weigh: str) -> torch.Tensor:
    """What the directions weigh, float64 (K,), each at least 0."""
    if weigh == EQUAL:
        return torch.ones(len(directions), dtype=torch.float64)
    if weigh == SCORE:
        return directions.scores.double().clamp_min(0)
    if not directions.densities:
        raise ElrondError(
            "These directions have no firing densities to weigh them by: take those of a sparse autoencoder, or "
            "weigh them in another way."
        )
    return torch.tensor(directions.densities, dtype=torch.float64)


def _spread(scales: torch.Tensor, count: int, seed: int, both_signs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Sobol points: one dimension in [0, 1] (count,), the others as normal quantiles times the scales (count, K)."""
    scramble = int(torch.randint(2**31, (1,), generator=generator(seed, "spread")))
    engine = torch.quasirandom.SobolEngine(len(scales) + 1, scramble=True, seed=scramble)
    points = engine.draw(count, dtype=torch.float64)
    weights = torch.special.ndtri(points[:, 1:].clamp(1e-9, 1 - 1e-9)) * scales
    return points[:, 0], weights if both_signs else weights.abs()


def change_of(directions: Directions, draw: Draw) -> torch.Tensor:
    """The change (R, d) that a draw stands for: strength times the unit mix of its directions.

    Raises:
        ElrondError: if the mix has no length.
    """
    mixed, norm = _mix(directions, draw)
    return draw.strength * mixed / norm


def parts_of(directions: Directions, draw: Draw) -> dict[int, float]:
    """The strength of each direction in a draw; the directions times them add up to `change_of`.

    Raises:
        ElrondError: if the mix has no length.
    """
    norm = float(_mix(directions, draw)[1])
    return {k: draw.strength * weight / norm for k, weight in zip(draw.indices, draw.weights, strict=True)}


def _mix(directions: Directions, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    mixed = torch.einsum("k,krd->rd", torch.tensor(draw.weights), directions.vectors[list(draw.indices)])
    norm = mixed.norm()
    if not math.isfinite(float(norm)) or norm == 0:
        raise ElrondError("The mix of directions cancels to nothing; use another seed or mix fewer.")
    return mixed, norm
