"""Steering: a change is added to the concept's rows of a conditioning."""

from __future__ import annotations

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
