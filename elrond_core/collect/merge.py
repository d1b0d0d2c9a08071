"""Merge gradients of one concept from several collections: of several seeds, or from several machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch

from ..errors import ElrondError
from ..gradients import Gradients

# Ratio of the lengths of two collections' gradients at one noise level, above which one of them was normalised.
_SCALE = 10.0
# Difference between a level's share of the gradients and its share of the probes that is reported. Rounding to whole
# batches makes differences below it.
_SHARE = 0.02


def merge_gradients(collections: Sequence[Gradients]) -> Gradients:
    """All gradients and responses of several collections, in order.

    Which realizations two collections have in common is not known, so each keeps its own: the `sources` and `targets`
    of the second are counted on from those of the first, and so on.

    Args:
        collections: one or more.

    Raises:
        ElrondError: if they are not of one concept of one model (`Provenance.united`), have other shapes or scales, or
            hold the same gradients.
    """
    whole = collections[0]
    for other in collections[1:]:
        whole = _both(whole, other)
    return whole


def merge_lines(collections: Sequence[Gradients], merged: Gradients) -> list[str]:
    """Report of what each collection contributes, and of what to know before using the result; one fact a line."""
    lines = []
    for place, one in enumerate(collections, 1):
        levels = ", ".join(f"{level:.4g} (root mean square length {one.rms_length(level):.3g})" for level in one.levels)
        counts = f"{len(one)} gradients and {len(one.probes)} responses of seed {_listed(one.provenance.all_seeds)}"
        lines.append(f"{place}: {counts}, noise level {levels}")
    for (i, one), (j, other) in combinations(enumerate(collections, 1), 2):
        seeds = [seed for seed in one.provenance.all_seeds if seed in other.provenance.all_seeds]
        if seeds and set(one.levels) & set(other.levels):
            lines.append(
                f"{i} and {j} both have gradients of seed {_listed(seeds)}: if their realizations are the same too, "
                "they count the same gradients twice."
            )
    return lines + _unequal(merged)


def _both(first: Gradients, second: Gradients) -> Gradients:
    if first.vectors.shape[1:] != second.vectors.shape[1:]:
        sizes = ["{} x {}".format(*each.vectors.shape[1:]) for each in (first, second)]
        raise ElrondError(f"These cannot be merged: gradients of one have {sizes[0]} values, of the other {sizes[1]}.")
    provenance = first.provenance.united(second.provenance)
    known = _contents(first)
    repeated = sum(content in known for content in _contents(second))
    if repeated:
        raise ElrondError(
            f"Of {len(second)} gradients of seed {_listed(second.provenance.all_seeds)}, {repeated} are already among "
            f"those of seed {_listed(first.provenance.all_seeds)}: leave one of the two out."
        )
    for level in set(first.levels) & set(second.levels):
        lengths = first.rms_length(level), second.rms_length(level)
        if max(lengths) > _SCALE * min(lengths) > 0:
            raise ElrondError(
                f"These cannot be merged: at noise level {level:.4g} gradients of one have a root mean square "
                f"length of {lengths[0]:.3g}, of the other {lengths[1]:.3g}; merge them before they are normalised."
            )
    offset = 1 + max(int(first.sources.max()), int(first.targets.max())) if len(first) else 0
    merged = replace(
        first,
        vectors=torch.cat([first.vectors, second.vectors]),
        sigma=torch.cat([first.sigma, second.sigma]),
        sources=torch.cat([first.sources, second.sources + offset]),
        targets=torch.cat([first.targets, second.targets + offset]),
        provenance=provenance.with_(count=len(first) + len(second)),
        probes=torch.cat([first.probes, second.probes]),
        probe_sigma=None,
    )
    if len(merged.levels) == 1 or not len(merged.probes):
        return merged
    return replace(merged, probe_sigma=torch.cat([first.probe_levels(), second.probe_levels()]))


def _contents(gradients: Gradients) -> set[int]:
    """A hash of each gradient that is not zero."""
    return {hash(row.tobytes()) for row in gradients.flat.float().numpy() if row.any()}


def _unequal(merged: Gradients) -> list[str]:
    """A line if noise levels have other shares of the probes than of the gradients."""
    if merged.probe_sigma is None:
        return []
    shares = [
        [float((sigma == level).float().mean()) for level in merged.levels]
        for sigma in (merged.sigma, merged.probe_sigma)
    ]
    if max(abs(a - b) for a, b in zip(*shares, strict=True)) <= _SHARE:
        return []
    return [
        "The noise levels have other shares of the responses than of the gradients: for response directions, and "
        "directions between words, select one level at a time."
    ]


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
