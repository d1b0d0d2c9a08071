"""Where in an image a concept is, and how much of a change falls elsewhere.

The region is found as in DiffEdit (Couairon et al., arXiv 2210.11427). Images are noised to a level in the middle of
the schedule. The region is where the clean estimate differs between two conditionings, on the mean of ten noises. Here
one conditioning is the prompt; in the other the concept's rows take a random step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..collect.differentiate import Denoiser
from ..errors import ElrondError
from ..seeding import normal


def sensitivity_maps(
    denoiser: Denoiser,
    latents: torch.Tensor,
    sigma: float,
    seed: int,
    concepts: Sequence[Sequence[int]],
    draws: int,
    batch_size: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Change of the clean estimate, cell by cell, under random steps of each concept's rows.

    A step has a random direction and the length of the concept's rows.

    Args:
        denoiser: the model.
        latents: images, (N, C, …, H, W), in the model's own scale.
        sigma: noise level.
        seed: fixes noises and steps. Map i depends on (seed, i) only.
        concepts: for each concept, its places among the denoiser's rows.
        draws: number of noises and steps that a map averages.
        batch_size: images a forward pass.
        on_batch: called with the number of finished images; may raise to stop.

    Returns:
        float32 (concepts, N, H, W): root mean square change of a cell over draws and channels.

    Raises:
        ElrondError: if the estimate of an image does not change, or is not finite.
    """
    energy = torch.zeros(len(concepts), len(latents), *latents.shape[-2:])
    for indices in torch.arange(len(latents)).split(max(1, batch_size)):
        for draw in range(draws):
            noise = normal(tuple(latents.shape[1:]), seed, f"region noise {draw}", indices.tolist())
            noisy = denoiser.noised(latents[indices], noise, sigma)
            encoded = denoiser.rows_at(sigma)
            rows = encoded.expand(len(indices), *encoded.shape)
            before = denoiser.denoised(noisy, sigma, rows)
            for k, places in enumerate(concepts):
                concept_rows = encoded[list(places)]
                step = normal(tuple(concept_rows.shape), seed, f"region step {draw}", indices.tolist())
                step = step * concept_rows.norm() / step.flatten(1).norm(dim=1)[:, None, None]
                after = denoiser.denoised(noisy, sigma, rows.index_add(1, torch.tensor(places), step))
                change = (after - before).float().square()
                energy[k, indices] += change.flatten(1, -3).mean(1).cpu() / draws
        if on_batch:
            on_batch(int(indices[-1]) + 1)
    if not torch.isfinite(energy).all() or (energy.amax((2, 3)) == 0).any():
        raise ElrondError("The model does not answer to movements of the concept's rows in finite numbers.")
    return energy.sqrt()


def region(maps: torch.Tensor, threshold: float = 0.0, grow: int = 0) -> torch.Tensor:
    """The cells of the first concept.

    A cell belongs to the concept whose map, divided by its mean over the image, is the largest there.

    Args:
        maps: (concepts, N, H, W), see `sensitivity_maps`.
        threshold: share of an image's largest value above which a cell belongs to the concept; 0 takes Otsu's, of the
            values' logarithms.
        grow: cells to add on every side.

    Returns:
        bool (N, H, W).
    """
    first = maps[0]
    if threshold:
        cut = threshold * first.amax((1, 2))
    else:
        # What answers most, a face, answers many times as much as the rest of the concept: in logarithms both are on
        # one side of the division. An answer that is rounded to zero counts as the least of the others.
        least = torch.where(first > 0, first, torch.inf).amin((1, 2), keepdim=True)
        logs = first.maximum(least).double().log()
        cut = torch.stack([otsu(image) for image in logs]).exp().to(first)
    relative = maps / maps.mean((2, 3), keepdim=True)
    inside = (first > cut[:, None, None]) & (relative[0] >= relative.amax(0))
    if grow:
        dilated = torch.nn.functional.max_pool2d(inside[:, None].float(), 2 * grow + 1, stride=1, padding=grow)
        inside = dilated[:, 0] > 0
    return inside


def otsu(values: torch.Tensor) -> torch.Tensor:
    """The threshold of largest variance between the values below and above it (Otsu, 1979).

    It is half way between the two values next to it.

    Args:
        values: float, any shape, at least two.

    Returns:
        A number (), of the values' type.
    """
    # On the CPU: values are few, and not every device has doubles.
    ordered = values.flatten().cpu().double().sort().values
    count = torch.arange(1, len(ordered))
    below = ordered.cumsum(0)[:-1]
    difference = (ordered.sum() - below) / (len(ordered) - count) - below / count
    place = int((count * (len(ordered) - count) * difference.square()).argmax())
    return ((ordered[place] + ordered[place + 1]) / 2).to(values)


@dataclass(frozen=True)
class Leak:
    """How much of a change of images is inside and outside of a region.

    Attributes:
        inside: float32 (N,): mean squared change within the region.
        outside: float32 (N,): mean squared change in the rest.
        leak: float32 (N,): mean squared change outside over that of the whole image: 0 if all change is inside, 1 if it
            is spread evenly, above 1 if there is more outside; NaN where nothing changes.
    """

    inside: torch.Tensor
    outside: torch.Tensor
    leak: torch.Tensor

    @property
    def mean(self) -> float:
        """The leak, averaged over the images that change."""
        return float(self.leak.nanmean())

    def lines(self) -> list[str]:
        """A report: the mean, and a line an image."""
        lines = [f"mean leak {self.mean:.3f}"]
        for i, (inside, outside, leak) in enumerate(zip(self.inside, self.outside, self.leak, strict=True)):
            roots = f"{float(inside.sqrt()):.4f} inside, {float(outside.sqrt()):.4f} outside"
            ratio = "no change" if leak.isnan() else f"leak {float(leak):.3f}"
            lines.append(f"image {i}: {ratio} (root mean square change {roots})")
        return lines


def measure_leak(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> Leak:
    """Measure how much of the change between images, or latents, of the same seeds is outside of a region.

    Args:
        before: float (N, …, H, W), without steering.
        after: the same with steering.
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
