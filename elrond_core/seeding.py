"""Random numbers that depend on a seed, a purpose and an index, and on nothing else.

Item i of a batch draws from its own generator, so that results do not depend on the batch size, on the order of
work, or on what ran before a resume.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator for item `index` of one purpose (any string) under a seed."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(shape: tuple[int, ...], seed: int, purpose: str, indices: list[int]) -> torch.Tensor:
    """Standard normal float32 noise of shape (len(indices), *shape), one generator an item."""
    return torch.stack([torch.randn(shape, generator=generator(seed, purpose, i)) for i in indices])
