"""Random pairs of realizations."""

from __future__ import annotations

import torch

from ..errors import ElrondError
from ..seeding import generator


def check_targets(realizations: int, targets: int) -> None:
    """Whether each of so many realizations can be compared with `targets` others.

    Raises:
        ElrondError: if there are fewer than two realizations, or not one for every target.
    """
    if realizations < 2:
        raise ElrondError(f"Gradients need at least two realizations to compare, and there is {realizations}.")
    if not 1 <= targets < realizations:
        raise ElrondError(
            f"Of {realizations} realizations each can be compared with 1 to {realizations - 1} others, not {targets}."
        )


def draw_pairs(count: int, realizations: int, seed: int, targets: int = 1) -> torch.Tensor:
    """`count` random pairs of distinct realizations, (count, 2) int64; pair i depends on the seed and i only.

    Each source is drawn for `targets` pairs in a row, whose targets differ.

    Raises:
        ElrondError: as `check_targets`.
    """
    check_targets(realizations, targets)
    pairs = torch.empty(count, 2, dtype=torch.int64)
    for i in range(0, count, targets):
        g = generator(seed, "pair", i // targets)
        source = torch.randint(realizations, (1,), generator=g)
        # Counting up from the source by 1 … n-1 keeps the two distinct and every pair equally likely.
        steps: dict[int, None] = {}
        while len(steps) < targets:
            steps[int(torch.randint(1, realizations, (1,), generator=g))] = None
        pairs[i : i + targets, 0] = source
        pairs[i : i + targets, 1] = (source + torch.tensor(list(steps))[: count - i]) % realizations
    return pairs
