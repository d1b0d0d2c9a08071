"""Random steering steps for the images of a batch: equation 7 of ELROND (arXiv 2602.10216)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..directions import Directions
from ..errors import ElrondError
from ..seeding import generator

RANDOM, SPREAD, NATURAL = METHODS = ("random", "spread", "natural")
EQUAL, SCORE, DENSITY = WEIGHTINGS = ("equal", "score", "density")


@dataclass(frozen=True)
class Draw:
    """The steering step of one image.

    Attributes:
        indices: directions in the mix.
        weights: one weight for each of them; the mix is then brought to unit norm.
        strength: signed length of the step.
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
    method: str = RANDOM,
    weighting: str = EQUAL,
    total: float = 0.0,
) -> list[Draw]:
    """Draw one steering step for each image.

    Args:
        directions: the directions to draw from.
        count: number of images.
        seed: fixes the draws. Draw i depends on (seed, i) only.
        lowest: lower end of the range of strengths, which are uniform in it.
        highest: upper end of that range.
        mix: with `RANDOM`, the number of directions of each image.
        leading: draw from this many leading directions; 0 draws from all.
        both_signs: flip the sign of each draw with probability one half.
        method: one of `METHODS`.
            `RANDOM`: independent draws, as in the paper: one direction, or a random mix of several.
            `SPREAD`: mixes of all directions, evenly apart: points of a scrambled Sobol sequence over the sphere of
            mixes and the range of strengths. It has fewer gaps and clusters than independent draws.
            `NATURAL`: Sobol points too, but normally distributed along each direction with its `natural_std`. A
            strength of 1 reproduces the variation of the model's own images, and steps are in units of the embedding.
        weighting: one of `WEIGHTINGS`. With `SCORE` or `DENSITY`, the probability of a direction is proportional to its
            score or firing density, and its part in a mix to the square root. (The root of an explained variance is a
            standard deviation.)
        total: the length of every step, in the place of a strength from the range; 0 leaves the range. The length is
            the Euclidean norm of the whole change over the concept's rows, that of the sum of its directions and not
            the root of their squared strengths: directions need not be orthogonal.

    Raises:
        ElrondError: if a number is out of range, every direction has weight zero, or the directions lack the
            `natural_std` or the densities that are asked for.
    """
    if method not in METHODS:
        raise ElrondError(f"Steps are drawn by one of the methods {', '.join(METHODS)}, not {method!r}.")
    if weighting not in WEIGHTINGS:
        raise ElrondError(f"Directions are weighted by one of {', '.join(WEIGHTINGS)}, not {weighting!r}.")
    if count < 1:
        raise ElrondError(f"The number of images must be at least 1, got {count}.")
    check_strengths(lowest, highest)
    check_strengths(total, total)
    pool = min(leading, len(directions)) if leading else len(directions)
    if method == NATURAL and not directions.natural_std:
        raise ElrondError(
            "It is not known how far the model varies along these directions: take some that were fitted to the "
            "model's response, or draw them in another way."
        )
    weights = _weights(directions, weighting)[:pool]
    usable = int((weights > 0).sum())
    if not usable:
        quantity = "firing density" if weighting == DENSITY else "score"
        raise ElrondError(f"No direction of this set has a positive {quantity} to weigh it by; weigh them equally.")
    if method == RANDOM:
        if not 1 <= mix <= usable:
            raise ElrondError(f"Each image can mix 1 to {usable} of these directions, not {mix}.")
        draws = [_random_draw(weights, seed, i, lowest, highest, mix, both_signs, weighting) for i in range(count)]
        return _at_length(draws, total)

    natural = method == NATURAL
    scales = torch.tensor(directions.natural_std[:pool], dtype=torch.float64) if natural else weights.sqrt()
    shares, parts = _sobol_points(scales, count, seed, both_signs)
    strengths = lowest + (highest - lowest) * shares
    if natural:
        # The strength of a draw is the length of its step. Directions need not be orthogonal.
        strengths = strengths * (parts @ directions.vectors[:pool].flatten(1).double()).norm(dim=1)
    parts = parts / parts.norm(dim=1, keepdim=True).clamp_min(1e-12)
    indices = tuple(range(pool))
    draws = [Draw(indices, tuple(part), s) for part, s in zip(parts.tolist(), strengths.tolist(), strict=True)]
    return _at_length(draws, total)


def _at_length(draws: list[Draw], total: float) -> list[Draw]:
    """Draws whose steps have a given length and keep their direction and sign; the same draws if it is 0."""
    return [replace(draw, strength=math.copysign(total, draw.strength)) for draw in draws] if total else draws


def _random_draw(
    weights: torch.Tensor,
    seed: int,
    index: int,
    lowest: float,
    highest: float,
    mix: int,
    both_signs: bool,
    weighting: str,
) -> Draw:
    """The independent draw of image `index`."""
    g = generator(seed, "diversify", index)
    if weighting == EQUAL:
        indices = torch.randperm(len(weights), generator=g)[:mix].tolist()
    else:
        indices = torch.multinomial(weights, mix, generator=g).tolist()
    parts = torch.ones(mix) if mix == 1 else torch.randn(mix, generator=g) * weights[indices].sqrt().float()
    strength = lowest + (highest - lowest) * float(torch.rand(1, generator=g))
    flip = both_signs and bool(torch.rand(1, generator=g) < 0.5)
    return Draw(tuple(indices), tuple(parts.tolist()), -strength if flip else strength)


def check_strengths(lowest: float, highest: float) -> None:
    """Refuse an impossible range of strengths.

    Raises:
        ElrondError: if an end is negative or not finite, or the lowest is above the highest.
    """
    if not (math.isfinite(lowest) and math.isfinite(highest) and lowest >= 0):
        raise ElrondError(f"Strengths must be finite and at least 0, not from {lowest} to {highest}.")
    if lowest > highest:
        raise ElrondError(f"The lowest strength {lowest} is above the highest {highest}.")


def check_share(start: float, end: float) -> None:
    """Refuse an impossible part of the sampling.

    Raises:
        ElrondError: if it does not start before it ends, or is not within [0, 1].
    """
    if not 0 <= start < end <= 1:
        raise ElrondError(f"Steering must start before it ends, between 0 and 1, not from {start} to {end}.")


def _weights(directions: Directions, weighting: str) -> torch.Tensor:
    """The weight of each direction, float64 (K,), at least 0."""
    if weighting == EQUAL:
        return torch.ones(len(directions), dtype=torch.float64)
    if weighting == SCORE:
        return directions.scores.double().clamp_min(0)
    if not directions.densities:
        raise ElrondError(
            "These directions have no firing densities to weigh them by: take those of a sparse autoencoder, or "
            "weigh them in another way."
        )
    return torch.tensor(directions.densities, dtype=torch.float64)


def _sobol_points(scales: torch.Tensor, count: int, seed: int, both_signs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scrambled Sobol points of one dimension more than there are scales.

    Returns:
        float64 (count,): the first dimension, in [0, 1]; and (count, K): the others as normal quantiles, times the
        scales (K,).
    """
    scramble = int(torch.randint(2**31, (1,), generator=generator(seed, "spread")))
    engine = torch.quasirandom.SobolEngine(len(scales) + 1, scramble=True, seed=scramble)
    points = engine.draw(count, dtype=torch.float64)
    # Quantiles of 0 and 1 are infinite.
    parts = torch.special.ndtri(points[:, 1:].clamp(1e-9, 1 - 1e-9)) * scales
    return points[:, 0], parts if both_signs else parts.abs()


def change_of(directions: Directions, draw: Draw) -> torch.Tensor:
    """The change (R, d) of the rows by a draw: its strength times the unit mix of its directions.

    Raises:
        ElrondError: if the mix cancels to zero.
    """
    mixed, norm = _mix(directions, draw)
    return draw.strength * mixed / norm


def parts_of(directions: Directions, draw: Draw) -> dict[int, float]:
    """The strength of each direction in a draw. Directions times strengths add up to `change_of`.

    Raises:
        ElrondError: if the mix cancels to zero.
    """
    norm = float(_mix(directions, draw)[1])
    return {k: draw.strength * weight / norm for k, weight in zip(draw.indices, draw.weights, strict=True)}


def _mix(directions: Directions, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    mixed = torch.einsum("k,krd->rd", torch.tensor(draw.weights), directions.vectors[list(draw.indices)])
    norm = mixed.norm()
    if not math.isfinite(float(norm)) or norm == 0:
        raise ElrondError("The mix of directions cancels to nothing; use another seed or mix fewer.")
    return mixed, norm
