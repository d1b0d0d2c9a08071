"""Preparation of steered entries when they are sampled, after all nodes between steering and the sampler.

No node of the pack runs at that time. So the host's `process_conds`, which prepares the entries of every sampling, is
wrapped. Entries of other nodes pass through unchanged.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import torch

from ...elrond_core.errors import ElrondError
from .conditioning import IMAGES, PART, PerImage, end_before, plain

# Smallest number of images among whose noises a noise is looked for. "Latent From Batch" takes images of a batch of at
# most this many.
_MIN_SEARCHED = 64


def install() -> None:
    """Wrap the host's `process_conds`, once."""
    original = comfy.samplers.process_conds
    if not hasattr(original, "prepares_steered_entries"):
        wrapped = functools.wraps(original)(functools.partial(_process_conds, original))
        wrapped.prepares_steered_entries = True  # type: ignore[attr-defined]
        comfy.samplers.process_conds = wrapped


def _process_conds(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    call = inspect.signature(original).bind(*args, **kwargs)
    noise, seed = call.arguments["noise"], call.arguments.get("seed")
    call.arguments["conds"] = {
        kind: _prepared(entries, noise, seed) for kind, entries in call.arguments["conds"].items()
    }
    processed = original(*call.args, **call.kwargs)
    sampling = call.arguments["model"].model_sampling
    for entries in processed.values():
        for entry in entries:
            share = end_before(entry)
            # A schedule of text encoder hooks may start later.
            if share is not None and entry["timestep_start"] == sampling.percent_to_sigma(entry["start_percent"]):
                entry["timestep_start"] = start_after(sampling, share)
    return processed


def start_after(sampling: Any, share: float) -> float:
    """The highest noise level below the one at a share of the sampling, in the precision in which the host compares.

    An entry that ends at this share acts down to its level. One that starts with the next level follows at once.
    """
    end = torch.tensor(float(sampling.percent_to_sigma(share)), dtype=torch.float32)
    return float(torch.nextafter(end, torch.tensor(-torch.inf)))


def _prepared(entries: list[dict[str, Any]], noise: torch.Tensor, seed: int | None) -> list[dict[str, Any]]:
    """Entries limited to their parts, with the rows and masks of the sampled images.

    Args:
        entries: of one kind, positive or negative.
        noise: (B, C, …, H, W), the noise that the images start from.
        seed: seed of the noise, if known.
    """
    out: list[dict[str, Any]] = []
    for entry in entries:
        part: Any = entry.get(PART)
        limited = part.limited(entry, tuple(noise.shape[2:])) if part is not None else entry
        if part is not None and part.share is not None and not limited["mask"].any():
            # An entry that acts nowhere would take as much time as the others.
            continue
        limited = {key: value for key, value in limited.items() if key not in (PART, IMAGES)}
        counts = [len(limited["cross_attn"])] if isinstance(limited.get("cross_attn"), PerImage) else []
        count = max([*counts, part.masks] if part is not None else counts, default=1)
        if count > 1:
            _select_images(limited, list(entry.get(IMAGES, ())) or _image_numbers(noise, seed, count))
        out.append(limited)
    # The host needs at least one entry.
    return out or entries[:1]


def _select_images(entry: dict[str, Any], images: list[int]) -> None:
    """Replace an entry's rows and masks by those of these images; they repeat for further images."""
    rows, mask = entry["cross_attn"], entry.get("mask")
    if isinstance(rows, PerImage):
        entry["cross_attn"] = plain(rows)[[i % len(rows) for i in images]]
    if mask is not None and mask.ndim > 2 and len(mask) > 1:
        entry["mask"] = mask[[i % len(mask) for i in images]]


def _image_numbers(noise: torch.Tensor, seed: int | None, count: int) -> list[int]:
    """The numbers, within the whole batch, of the images that are sampled together.

    The host draws the noise of image i as the i-th of its seed, also where a LATENT is a part of a batch
    ("batch_index"), but passes no image numbers to the sampler. So the noise is drawn again and compared.

    Args:
        noise: float (B, C, …), the noise that the host starts from.
        seed: its seed.
        count: number of images that there are steps or masks for.

    Raises:
        ElrondError: if it is not the host's noise, and there are not as many images as steps.
    """
    given = noise.detach().float().cpu()
    if seed is not None and given.any():
        generator = torch.Generator().manual_seed(seed)
        if _same(given, comfy.sample.prepare_noise_inner(torch.empty(given.shape), generator)):
            return list(range(len(given)))
        generator.manual_seed(seed)
        numbers: dict[int, int] = {}
        for i in range(max(count, _MIN_SEARCHED)):
            drawn = comfy.sample.prepare_noise_inner(torch.empty(1, *given.shape[1:]), generator)[0]
            numbers |= {j: i for j in range(len(given)) if j not in numbers and _same(given[j], drawn)}
            if len(numbers) == len(given):
                return [numbers[j] for j in range(len(given))]
    if len(given) != count:
        raise ElrondError(
            f"There are steps or masks for {count} images, and which of them these {len(given)} are cannot be told "
            f"from their noise: make steps for {len(given)} images, or sample all {count} together."
        )
    return list(range(count))


def _same(noise: torch.Tensor, drawn: torch.Tensor) -> bool:
    """Whether two noises are equal up to rounding to half precision."""
    return torch.allclose(noise, drawn, rtol=1e-2, atol=1e-2)
