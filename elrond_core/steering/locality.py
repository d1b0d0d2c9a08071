"""Keeping a direction local: where in an image a concept is, and how much of a change falls elsewhere.

The region is found as DiffEdit does (Couairon et al., arXiv 2210.11427): images are noised half way, and it is where
the clean estimate differs between two conditionings, on the mean of ten noises. Here the two are the prompt and the
prompt with the concept's rows moved at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..collect.differentiate import Denoiser
from ..errors import ElrondError
from ..seeding import normal


def answer_maps(
    denoiser: Denoiser,
    latents: torch.Tensor,
    sigma: float,
    seed: int,
    concepts: Sequence[Sequence[int]],
    draws: int,
    batch_size: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """How strongly the clean estimate answers, cell by cell, to random movements of each concept's rows.

    A movement is as long as the concept's own rows are, in a random direction.

    Args:
        denoiser: the model.
        latents: images, (N, C, …, H, W), in the model's own scale.
        sigma: noise level.
        seed: fixes noise and movements; map i depends on (seed, i) only.
        concepts: for each concept, its places among the denoiser's rows.
        draws: noises and movements that a map is the mean of.
        batch_size: images a forward pass.
        on_batch: called with the number of images so far; may raise to stop.

    Returns:
        float32 (concepts, N, H, W): the root mean square change of a cell over draws and channels.

    Raises:
        ElrondError: if an image shows no change at all, or one that is not finite.
    """
    energy = torch.zeros(len(concepts), len(latents), *latents.shape[-2:])
    for some in torch.arange(len(latents)).split(max(1, batch_size)):
        for draw in range(draws):
            noise = normal(tuple(latents.shape[1:]), seed, f"region noise {draw}", some.tolist())
            noisy = denoiser.noised(latents[some], noise, sigma)
            encoded = denoiser.rows_at(sigma)
            rows = encoded.expand(len(some), *encoded.shape)
            still = denoiser.denoised(noisy, sigma, rows)
            for k, places in enumerate(concepts):
                own = encoded[list(places)]
                step = normal(tuple(own.shape), seed, f"region step {draw}", some.tolist())
                step = step * own.norm() / step.flatten(1).norm(dim=1)[:, None, None]
                moved = rows.index_add(1, torch.tensor(places), step)
                change = (denoiser.denoised(noisy, sigma, moved) - still).float().square()
                energy[k, some] += change.flatten(1, -3).mean(1).cpu() / draws
        if on_batch:
            on_batch(int(some[-1]) + 1)
    if not torch.isfinite(energy).all() or (energy.amax((2, 3)) == 0).any():
        raise ElrondError("The model does not answer to movements of the concept's rows in finite numbers.")
    return energy.sqrt()


def region(maps: torch.Tensor, threshold: float = 0.0, grow: int = 0) -> torch.Tensor:
    """The cells of the first concept.

    Args:
        maps: (concepts, N, H, W), see `answer_maps`. A cell belongs to the concept that answers most there, in
            proportion to its mean answer.
        threshold: share of an image's strongest answer above which a cell belongs to the concept; 0 for Otsu's.
        grow: cells to add on every side.

    Returns:
        bool (N, H, W).
    """
    own = maps[0]
    cut = threshold * own.amax((1, 2)) if threshold else torch.stack([otsu(one) for one in own])
    shares = maps / maps.mean((2, 3), keepdim=True)
    inside = (own > cut[:, None, None]) & (shares[0] >= shares.amax(0))
    if grow:
        wide = torch.nn.functional.max_pool2d(inside[:, None].float(), 2 * grow + 1, stride=1, padding=grow)
        inside = wide[:, 0] > 0
    return inside


def otsu(values: torch.Tensor) -> torch.Tensor:
    """The threshold that sets two groups of values furthest apart (Otsu 1979), between the two next to it.

    Args:
        values: float, any shape, at least two.

    Returns:
        a number (), float32.
    """
    ordered = values.flatten().double().sort().values
    count = torch.arange(1, len(ordered))
    below = ordered.cumsum(0)[:-1]
    apart = (ordered.sum() - below) / (len(ordered) - count) - below / count
    place = int((count * (len(ordered) - count) * apart.square()).argmax())
    return ((ordered[place] + ordered[place + 1]) / 2).float()


@dataclass(frozen=True)
class Leak:
    """How a change is spread over images.

    Attributes:
        inside: float32 (N,): mean squared change within the region.
        outside: float32 (N,): mean squared change in the rest.
        leak: float32 (N,): the share of the change that falls outside over the share of the area that lies there: 0
            if all is inside, 1 if it is spread evenly, above 1 if there is more outside; NaN where nothing changes.
    """

    inside: torch.Tensor
    outside: torch.Tensor
    leak: torch.Tensor

    @property
    def mean(self) -> float:
        """The leak, averaged over the images that change."""
        return float(self.leak.nanmean())


def measure_leak(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> Leak:
    """Compare images, or latents, of the same seeds without and with steering.

    Args:
        before: float (N, …, H, W), without.
        after: the same, with.
        mask: float in [0, 1], (N, H, W) or (1, H, W): the concept's region.

    Raises:
        ElrondError: if the shapes differ, a region is empty or everything, or no image changes.
    """
    if before.shape != after.shape:
        raise ElrondError(
            f"Images before and after must be as many and of one size, not {tuple(before.shape)} and "
            f"{tuple(after.shape)}."
        )
    if len(mask) not in (1, len(before)) or mask.shape[1:] != before.shape[-2:]:
        raise ElrondError(f"A mask of {tuple(mask.shape)} does not fit images of {tuple(before.shape)}.")
    share = mask.double().mean((1, 2))
    if not ((share > 0) & (share < 1)).all():
        raise ElrondError("The mask covers nothing or everything: there is no inside and outside to compare.")
    change = (after.double() - before.double()).square().flatten(1, -3).mean(1)
    inside = (change * mask).mean((1, 2)) / share
    outside = (change * (1 - mask)).mean((1, 2)) / (1 - share)
    leak = outside / change.mean((1, 2))
    if leak.isnan().all():
        raise ElrondError("The images before and after are the same: there is no change to locate.")
    return Leak(inside.float(), outside.float(), leak.float())
