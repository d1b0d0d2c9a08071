"""Steering: a change is added to the concept's rows of a conditioning."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ..errors import ElrondError


def steer(conditioning: torch.Tensor, rows: tuple[int, ...], change: torch.Tensor) -> torch.Tensor:
    """Add a change to a concept's rows.

    Args:
        conditioning: (B, T, d), any float dtype; not modified.
        rows: the concept's R rows.
        change: (R, d) for all entries, or (N, R, d), one an entry; B must then be 1 or N. R may also be 1: then all
            rows take the same step.

    Returns:
        A new tensor (max(B, N), T, d) of the conditioning's dtype. Rows whose change is zero are the same bit by bit.

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
        raise ElrondError(
            f"The prompt already has steps for {len(conditioning)} images, and these are for {len(change)}: make as "
            "many, or steer the prompt as it was before."
        )
    out = conditioning.expand(count, -1, -1).clone()
    change = change.to(out.device).expand(count, len(rows), -1)
    moved = change.abs().amax(2) > 0
    index = torch.tensor(rows, device=out.device)
    steered = (out[:, index].float() + change.float()).to(out.dtype)
    out[:, index] = torch.where(moved[..., None], steered, out[:, index])
    return out


def acting_together(windows: Sequence[tuple[float, float]]) -> list[tuple[float, float, tuple[int, ...]]]:
    """The parts of the sampling in which the same steps act.

    Args:
        windows: start and end of each step, as shares of the sampling in [0, 1].

    Returns:
        Start and end of each part, in order of time, and the numbers of the steps that act in it. Parts in which no
        step acts are left out.
    """
    cuts = sorted({cut for window in windows for cut in window})
    parts = []
    for start, end in itertools.pairwise(cuts):
        acting = tuple(i for i, (first, last) in enumerate(windows) if first <= start and end <= last)
        if acting:
            parts.append((start, end, acting))
    return parts
