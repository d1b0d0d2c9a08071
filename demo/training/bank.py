"""Captioned pictures as latents, made once: encoding a picture costs a third of a training step on it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .. import host  # noqa: F401

# isort: split
import torch

from ..host_model.vae import Autoencoder
from ..portraits.captions import Captions
from ..portraits.world import Factors, compose
from .progress import number_of
from .text import Tokens

# Captioned pictures that are drawn from one seed, and kept in one file.
PART = 4096
# Pictures encoded at a time.
_BATCH = {"cpu": 64, "cuda": 1024}


@dataclass
class Bank:
    """Captioned pictures.

    Attributes:
        latents: float16 (N, 16, 8, 8).
        tokens: int32 (N, 48).
    """

    latents: torch.Tensor
    tokens: torch.Tensor

    def __len__(self) -> int:
        return len(self.latents)


def captioned(part: int, count: int) -> tuple[torch.Tensor, Factors]:
    """Token ids (count, 48) and factors of a part's captions."""
    texts, factors = Captions(number_of("captions", part)).batch(count)
    return Tokens().encode(texts).int(), factors


@torch.no_grad()
def encoded(vae: Autoencoder, factors: Factors, device: str) -> torch.Tensor:
    """The latents of the pictures of factors, float16 (N, 16, 8, 8) on the CPU."""
    latents = []
    for start in range(0, len(factors["skin"]), _BATCH[device]):
        batch = {name: values[start : start + _BATCH[device]] for name, values in factors.items()}
        pixels = compose(batch, device) * 2 - 1
        latents.append(vae.encode(pixels.contiguous(memory_format=torch.channels_last)).half().cpu().contiguous())
    return torch.cat(latents)


def make_bank(vae: Autoencoder, count: int, folder: Path, device: str = "cpu") -> Bank:
    """Draw and encode captioned pictures, a file a part; parts that are there already are read.

    Args:
        vae: the trained autoencoder, on `device`.
        count: number of pictures.
        folder: where the parts are kept.
        device: "cpu" or "cuda".
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [min(PART, count - start) for start in range(0, count, PART)]
    files = [folder / f"{part:04d}_{size}.pt" for part, size in enumerate(sizes)]
    missing = [part for part, file in enumerate(files) if not file.is_file()]
    # Captions are plain Python: on a card, drawing them on one core would take longer than all else.
    workers = 1 if device == "cpu" else max(1, (os.cpu_count() or 2) - 1)
    drawn: Iterable[tuple[torch.Tensor, Factors]] = map(captioned, missing, [sizes[part] for part in missing])
    pool = None
    if workers > 1 and len(missing) > 1:
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        drawn = pool.map(captioned, missing, [sizes[part] for part in missing])
    for part, (tokens, factors) in zip(missing, drawn, strict=True):
        fresh = files[part].with_suffix(".tmp")
        torch.save({"latents": encoded(vae, factors, device), "tokens": tokens}, fresh)
        fresh.replace(files[part])
    if pool is not None:
        pool.shutdown()
    parts = [torch.load(file, weights_only=True) for file in files]
    return Bank(torch.cat([part["latents"] for part in parts]), torch.cat([part["tokens"] for part in parts]))
