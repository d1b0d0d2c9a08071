"""Conditionings that remember their concept, and how they are steered."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch

from ...elrond_core.errors import ElrondError
from ...elrond_core.prompt import Concept
from ...elrond_core.steering.apply import steer

# The key under which an entry holds its `MarkedPrompt`. The host passes unknown keys through.
MARK = "elrond"
Conditioning = list[list[Any]]


@dataclass(frozen=True)
class MarkedPrompt:
    """What a conditioning entry remembers about its prompt.

    Attributes:
        family: the model family, as the text encoder names it.
        prompt: the encoded text.
        concepts: the marked concepts, in order; at least one.
        norms: for each concept the mean norm of its rows before any steering. Relative strengths are multiples of it,
            whatever the order of steps.
        words: the rows of all the prompt's words, those of the concepts included.
    """

    family: str
    prompt: str
    concepts: tuple[Concept, ...]
    norms: tuple[float, ...]
    words: tuple[int, ...] = ()

    def index_of(self, name: str, default: str = "") -> int:
        """The number of the concept with this name; without a name, of the default one, or else of the first.

        The second of two equal words is named "word #2".

        Raises:
            ElrondError: if the prompt has no concept of this name.
        """
        name = name.strip()
        names: list[str] = []
        for concept in self.concepts:
            word = concept.word.lower()
            names += [word, f"{word} #{names.count(word) + 1}"]
        if (name or default).lower() in names:
            return names.index((name or default).lower()) // 2
        if name:
            marked = ", ".join(repr(c.word) for c in self.concepts)
            raise ElrondError(f"The prompt has no marked concept {name!r}; it has {marked}.")
        return 0


def mark(
    conditioning: Conditioning, family: str, prompt: str, concepts: list[Concept], words: tuple[int, ...] = ()
) -> Conditioning:
    """A conditioning that remembers which rows are its concepts', and which are the prompt's words'."""
    rows = conditioning[0][0][0].float()
    norms = tuple(float(rows[list(c.rows)].norm(dim=-1).mean()) for c in concepts)
    prompt_mark = MarkedPrompt(family, prompt, tuple(concepts), norms, words)
    return [[tensor, {**options, MARK: prompt_mark}] for tensor, options in conditioning]


def marked(conditioning: Conditioning) -> tuple[torch.Tensor, MarkedPrompt]:
    """The first entry that remembers a concept: its tensor (1, T, d) and its marked prompt.

    Raises:
        ElrondError: if none does.
    """
    for tensor, options in conditioning:
        if MARK in options:
            return tensor, options[MARK]
    raise ElrondError("This conditioning does not know its concept; make it with the ELROND Encode Concept node.")


def steer_conditioning(
    conditioning: Conditioning,
    change: Callable[[MarkedPrompt], tuple[tuple[int, ...], torch.Tensor]],
    start: float,
    end: float,
    mask: torch.Tensor | None = None,
) -> Conditioning:
    """Steer every marked entry between two points of the sampling, and leave it as it was outside.

    Args:
        conditioning: entries, of which those without a mark pass through.
        change: from an entry's marked prompt, the rows and the change (see `elrond_core.steering.steer`).
        start: share of the sampling at which steering starts, 0 to 1.
        end: share at which it ends.
        mask: MASK in [0, 1], of any size, where in the image to steer; None is everywhere.

    Raises:
        ElrondError: if no entry is marked, steering ends before it starts, or an entry cannot be masked.
    """
    marked(conditioning)
    if not 0 <= start < end <= 1:
        raise ElrondError(f"Steering must start before it ends, between 0 and 1, not from {start} to {end}.")
    out: Conditioning = []
    for tensor, options in conditioning:
        if MARK not in options:
            out.append([tensor, options])
            continue
        rows, delta = change(options[MARK])
        steered = steer(tensor, rows, delta)
        batched = tensor.expand(len(steered), -1, -1) if len(steered) > len(tensor) else tensor
        first, last = options.get("start_percent", 0.0), options.get("end_percent", 1.0)
        for low, high, parts in (
            (first, min(start, last), [(batched, options)]),
            (max(first, start), min(end, last), _divided(options, mask, batched, steered)),
            (max(first, end), last, [(batched, options)]),
        ):
            if low >= high:
                continue
            limits: dict[str, float] = {}
            if low > 0:
                # Two entries that meet at a step would both act there and be averaged, so the later one starts late.
                limits["start_percent"] = low + (1e-5 if low > first else 0.0)
            if high < 1:
                limits["end_percent"] = high
            for rows_, kept in parts:
                rest = {k: v for k, v in kept.items() if k not in ("start_percent", "end_percent")}
                out.append([rows_, {**rest, **limits}])
    return out


def _divided(
    options: dict[str, Any], mask: torch.Tensor | None, outside: torch.Tensor, inside: torch.Tensor
) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """The rows and options of entries that act outside and inside a mask; together they weigh what the entry did."""
    if mask is None or torch.equal(inside, outside):
        return [(inside, options)]
    if options.get("default"):
        raise ElrondError(
            "A default conditioning acts where the others leave room and cannot be masked itself: steer before it is "
            "made the default, without a mask."
        )
    own = options.get("mask", torch.ones(1, 1, 1))
    own, share = _alike(own if own.ndim > 2 else own[None], (mask if mask.ndim > 2 else mask[None]).clamp(0, 1))
    # The host may crop an entry to where its mask is not zero; a division must not change what the model is shown.
    least = torch.finfo(own.dtype).eps if options.get("set_area_to_bounds") else 0.0
    parts = [
        (rows, {**options, "mask": own * part.clamp_min(least)})
        for rows, part in ((outside, 1 - share), (inside, share))
        if (own * part).any()
    ]
    return parts if len(parts) > 1 else [(rows, options) for rows, _ in parts] or [(inside, options)]


def _alike(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two masks (N, …, H, W) brought to the larger size and to as many images as repeat both."""
    height, width = max(a.shape[-2], b.shape[-2]), max(a.shape[-1], b.shape[-1])
    count = math.lcm(len(a), len(b))
    b = b.to(a).reshape(len(b), *[1] * (a.ndim - b.ndim), *b.shape[1:])
    a, b = (resized(each, height, width).repeat(count // len(each), *[1] * (a.ndim - 1)) for each in (a, b))
    return a, b


def resized(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A mask (N, …, H, W) at another size, cells staying whole: the host resizes it smoothly when it samples."""
    if mask.shape[-2:] == (height, width):
        return mask
    flat = mask.reshape(-1, 1, *mask.shape[-2:])
    return comfy.utils.common_upscale(flat, width, height, "nearest-exact", "none").reshape(
        *mask.shape[:-2], height, width
    )
