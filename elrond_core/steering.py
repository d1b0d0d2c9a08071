"""Equation 7 of ELROND: adding directions to a concept's rows, and drawing them for diversity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .directions import Directions
from .errors import ElrondError
from .seeding import generator


def steer(conditioning: torch.Tensor, rows: tuple[int, ...], change: torch.Tensor) -> torch.Tensor:
    """Add a change to a concept's rows.

    Args:
        conditioning: (B, T, d), any float dtype; not modified.
        rows: the concept's R rows.
        change: (R, d) for every entry alike, or (N, R, d), one an entry; B must then be 1 or N. A direction over one
            row moves each of several rows alike.

    Returns:
        a new tensor (max(B, N), T, d) of the conditioning's dtype. A change of zero returns the rows bit by bit.

    Raises:
        ElrondError: if the widths or the numbers of rows or entries do not fit.
    """
    change = change if change.ndim == 3 else change[None]
    if change.shape[2] != conditioning.shape[2]:
        raise ElrondError(
            f"The directions are {change.shape[2]} wide and the conditioning is {conditioning.shape[2]} wide: "
            "they belong to another model family."
        )
    if change.shape[1] not in (1, len(rows)):
        raise ElrondError(
            f"The directions move a concept of {change.shape[1]} tokens, but this one has {len(rows)}; "
            "encode the word the directions were made for."
        )
    count = max(len(conditioning), len(change))
    if {len(conditioning), len(change)} - {1, count}:
        raise ElrondError(f"{len(change)} changes do not fit a batch of {len(conditioning)} conditionings.")
    out = conditioning.expand(count, -1, -1).clone()
    change = change.to(out.device).expand(count, len(rows), -1)
    moved = change.abs().amax(2) > 0
    index = torch.tensor(rows, device=out.device)
    steered = (out[:, index].float() + change.float()).to(out.dtype)
    out[:, index] = torch.where(moved[..., None], steered, out[:, index])
    return out


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
) -> list[Draw]:
    """Draw a steering step an image, as the paper's diversity sampling does.

    Args:
        directions: what to draw from.
        count: number of images.
        seed: draw i depends on (seed, i) only.
        lowest: strengths are uniform from here …
        highest: … to here.
        mix: directions per image; more than one gives the normalised sum of random ones.
        leading: draw from so many leading directions only; 0 means all.
        both_signs: flip the sign of each draw with probability one half.

    Raises:
        ElrondError: if a number is out of range.
    """
    pool = min(leading, len(directions)) if leading else len(directions)
    if count < 1:
        raise ElrondError(f"The number of images must be at least 1, got {count}.")
    if lowest > highest:
        raise ElrondError(f"The lowest strength {lowest} is above the highest {highest}.")
    if not 1 <= mix <= pool:
        raise ElrondError(f"Each image can mix 1 to {pool} of these directions, not {mix}.")
    draws = []
    for i in range(count):
        g = generator(seed, "diversify", i)
        chosen = torch.randperm(pool, generator=g)[:mix].tolist()
        weights = torch.ones(mix) if mix == 1 else torch.randn(mix, generator=g)
        strength = lowest + (highest - lowest) * float(torch.rand(1, generator=g))
        flip = both_signs and bool(torch.rand(1, generator=g) < 0.5)
        draws.append(Draw(tuple(chosen), tuple(weights.tolist()), -strength if flip else strength))
    return draws


def change_of(directions: Directions, draw: Draw) -> torch.Tensor:
    """The change (R, d) that a draw stands for: strength times the unit mix of its directions."""
    mixed = torch.einsum("k,krd->rd", torch.tensor(draw.weights), directions.vectors[list(draw.indices)])
    norm = mixed.norm()
    if not math.isfinite(float(norm)) or norm == 0:
        raise ElrondError("The mix of directions cancels to nothing; use another seed or mix fewer.")
    return draw.strength * mixed / norm
