"""Steering of a conditioning in a part of the sampling, or of the image.

The host has entries that act between two points of the sampling, or under a mask. Steering a part therefore divides an
entry: one new entry acts where it is steered, others act where it is not. Later nodes of the host write the same keys
(`start_percent`, `end_percent`, `mask`) and mean the undivided entry. So each entry carries its `Part`, and
`at_sampling` combines it with these keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import comfy.utils
import torch

from ...elrond_core.errors import ElrondError
from ...elrond_core.steering.apply import steer
from ...elrond_core.steering.draws import check_share
from . import at_sampling
from .conditioning import AFTER, GAP, MARK, PART, Conditioning, MarkedPrompt, PerImage, end_before, marked, plain

# Start and end as shares of the sampling, and the change of the rows between them.
Change = tuple[float, float, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Part:
    """The part of an undivided entry that a new entry is.

    Attributes:
        start: share of the sampling at which it starts, 0 to 1.
        end: share at which it ends.
        share: MASK (N, H, W) in [0, 1], its share of each cell; None is all.
        whole: the mask of the undivided entry, if any.
        mask: the product of the two, which the new entry has. A mask by a later node replaces that of the undivided
            entry.
    """

    start: float = 0.0
    end: float = 1.0
    share: torch.Tensor | None = None
    whole: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @property
    def masks(self) -> int:
        """Number of images that have a share each; 1 if all have the same."""
        return 1 if self.share is None else len(self.share)

    def whole_mask(self, options: dict[str, Any]) -> torch.Tensor | None:
        """The mask of the undivided entry, which a later node may have set."""
        mask = options.get("mask")
        if self.mask is None or mask is None:
            return mask
        unchanged = mask is self.mask or (mask.shape == self.mask.shape and torch.equal(mask, self.mask.to(mask)))
        return self.whole if unchanged else mask

    def limited(self, options: dict[str, Any], size: tuple[int, ...] | None = None) -> dict[str, Any]:
        """The options of the undivided entry, limited to this part. They carry it.

        Args:
            options: options of the entry, which may be limited to this part already.
            size: (…, H, W) of the latents, if it is known yet.

        Raises:
            ElrondError: if the entry is a default one and the part is a region.
        """
        limited = {k: v for k, v in options.items() if k not in ("start_percent", "end_percent", AFTER, PART)}
        first, last = options.get("start_percent", 0.0), options.get("end_percent", 1.0)
        limited.update(self._window(first, last, end_before(options)))
        if self.share is None:
            return {**limited, PART: self}
        if options.get("default"):
            raise ElrondError(
                "A default conditioning acts where the others leave room and cannot be masked itself: steer without a "
                "mask what becomes the default."
            )
        whole = self.whole_mask(options)
        weights = whole
        if whole is None and "area" in options and size is not None:
            weights = _area_weights(options["area"], size)
        # The host may crop an entry to the region where its mask is not zero. Division must not change that region.
        least = torch.finfo(self.share.dtype).eps if options.get("set_area_to_bounds") else 0.0
        weights, share = _matched(torch.ones(1, 1, 1) if weights is None else weights, self.share)
        mask = weights * share.clamp_min(least)
        return {**limited, "mask": mask, PART: Part(self.start, self.end, self.share, whole, mask)}

    def _window(self, first: float, last: float, after: float | None) -> dict[str, float]:
        """The keys of the window of an entry from `first`, or right after a share, to `last`, limited to this part."""
        low, high = max(first, self.start), min(last, self.end)
        if low >= high:
            # An entry that ends before it starts never acts. A later node may widen it.
            return {"start_percent": high + GAP, "end_percent": high}
        window: dict[str, float] = {}
        if low > first:
            window |= {"start_percent": low + GAP, AFTER: low}
        elif low > 0:
            window |= {"start_percent": low} | ({} if after is None else {AFTER: after})
        if high < 1:
            window["end_percent"] = high
        return window

    def within(self, other: Part, options: dict[str, Any]) -> Part | None:
        """The intersection of this part with another; None if it is empty."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        share = self.share if other.share is None else other.share
        if self.share is not None and other.share is not None:
            mine, theirs = _matched(self.share, other.share)
            share = mine * theirs
        if start >= end or (share is not None and not share.any()):
            return None
        return Part(start, end, share, self.whole_mask(options), options.get("mask"))


def steer_conditioning(
    conditioning: Conditioning,
    change: Callable[[MarkedPrompt], tuple[tuple[int, ...], torch.Tensor]],
    start: float,
    end: float,
    mask: torch.Tensor | None = None,
) -> Conditioning:
    """Steer every marked entry between two points of the sampling. Outside it stays as it was.

    Args:
        conditioning: entries; those without a mark pass through.
        change: from an entry's marked prompt, the rows and the change (see `elrond_core.steering.apply.steer`).
        start: share of the sampling at which steering starts, 0 to 1.
        end: share at which it ends.
        mask: MASK in [0, 1], of any size: the region of the image to steer; None is all.

    Raises:
        ElrondError: if no entry is marked, steering ends before it starts, or an entry cannot be masked.
    """

    def throughout(prompt: MarkedPrompt) -> tuple[tuple[int, ...], list[Change]]:
        rows, delta = change(prompt)
        return rows, [(start, end, delta)]

    return steer_over_time(conditioning, throughout, mask)


def steer_over_time(
    conditioning: Conditioning,
    changes: Callable[[MarkedPrompt], tuple[tuple[int, ...], list[Change]]],
    mask: torch.Tensor | None = None,
) -> Conditioning:
    """Steer every marked entry by a change of its own in each of several parts of the sampling.

    Args:
        conditioning: entries; those without a mark pass through.
        changes: from an entry's marked prompt, the rows and the changes with their starts and ends, in order of time.
            Between them the entry stays as it was.
        mask: as for `steer_conditioning`.

    Raises:
        ElrondError: as `steer_conditioning`.
    """
    marked(conditioning)
    at_sampling.install()
    out: Conditioning = []
    for tensor, options in conditioning:
        if MARK not in options:
            out.append([tensor, options])
            continue
        rows, parts = changes(options[MARK])
        for start, end, _ in parts:
            check_share(start, end)
        steered = [steer(plain(tensor), rows, delta) for _, _, delta in parts]
        count = max(map(len, [tensor, *steered]))
        # A batch of several items that another node made stays an ordinary tensor.
        per_image = isinstance(tensor, PerImage) or count > len(tensor)
        before, *after = (
            expanded.as_subclass(PerImage) if per_image else expanded
            for expanded in (each.expand(count, -1, -1) for each in (tensor, *steered))
        )
        old = options.get(PART, Part())
        for rows_, part in _in_order(parts, before, after, options, mask):
            new = old.within(part, options) if part.start < part.end else None
            if new is not None:
                divided = new.share is not None or (new.start, new.end) != (0.0, 1.0)
                out.append([rows_, new.limited(options) if divided else options])
    return out


def _in_order(
    parts: list[Change],
    before: torch.Tensor,
    after: list[torch.Tensor],
    options: dict[str, Any],
    mask: torch.Tensor | None,
) -> Iterator[tuple[torch.Tensor, Part]]:
    """What acts in each part of the sampling, and of the image: the entry as it was, or steered."""
    last = 0.0
    for (start, end, _), steered in zip(parts, after, strict=True):
        yield before, Part(last, start)
        for rows, share in _divided(options, mask, before, steered):
            yield rows, Part(start, end, share)
        last = end
    yield before, Part(last, 1.0)


def _divided(
    options: dict[str, Any], mask: torch.Tensor | None, outside: torch.Tensor, inside: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Tensors of the entries that act outside and inside of a mask, each with its share; None is all."""
    if mask is None or torch.equal(plain(inside), plain(outside)):
        return [(inside, None)]
    share = (mask if mask.ndim > 2 else mask[None]).clamp(0, 1)
    if not (share < 1).any():
        return [(inside, None)]
    if not share.any():
        return [(outside, None)]
    return [(outside, 1 - share), (inside, share)]


def _matched(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two masks (N, …, H, W) at the larger of their sizes, repeated for the same number of images."""
    height, width = max(a.shape[-2], b.shape[-2]), max(a.shape[-1], b.shape[-1])
    a = a if a.ndim > 2 else a[None]
    count = math.lcm(len(a), len(b))
    b = b.to(a).reshape(len(b), *[1] * (a.ndim - b.ndim), *b.shape[1:])
    a, b = (resized(mask, height, width).repeat(count // len(mask), *[1] * (a.ndim - 1)) for mask in (a, b))
    return a, b


def resized(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A mask (N, …, H, W) at another size, by nearest neighbours. The host interpolates it when it samples."""
    if mask.shape[-2:] == (height, width):
        return mask
    flat = mask.reshape(-1, 1, *mask.shape[-2:])
    return comfy.utils.common_upscale(flat, width, height, "nearest-exact", "none").reshape(
        *mask.shape[:-2], height, width
    )


def _area_weights(area: Any, size: tuple[int, ...]) -> torch.Tensor:
    """The host's weights (1, …, H, W) of an entry with an area and no mask, which fade at the edges."""
    entry = {"area": area, "model_conds": {}, "uuid": None}
    entries = [entry]
    comfy.samplers.resolve_areas_and_cond_masks_multidim(entries, size, "cpu")
    weights = torch.zeros(1, 1, *size)
    part = comfy.samplers.get_area_and_mult(entries[0], weights, torch.zeros(1))
    place = weights
    for i, (length, offset) in enumerate(zip(part.area[: len(size)], part.area[len(size) :], strict=True)):
        place = place.narrow(i + 2, offset, length)
    place.copy_(part.mult)
    return weights[0]
