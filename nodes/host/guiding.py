"""Guidance of a model's estimates while it samples (`elrond_core.steering.guidance`)."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import torch

from ...elrond_core.errors import ElrondError
from ...elrond_core.steering.apply import steer
from ...elrond_core.steering.guidance import change_of_estimate, shortened
from . import at_sampling
from .conditioning import MARK, MarkedPrompt, PerImage, plain
from .parts import GAP


@dataclass(frozen=True)
class Guide:
    """One direction along which estimates are guided.

    Attributes:
        change: from a marked prompt, the rows of its concept, the change (R, d) of the whole step, and the concept's
            token norm.
        start: share of the sampling at which it starts, 0 to 1.
        end: share at which it ends.
    """

    change: Callable[[MarkedPrompt], tuple[tuple[int, ...], torch.Tensor, float]]
    start: float
    end: float


def with_guides(model: Any, guides: Sequence[Guide], local: bool) -> Any:
    """A MODEL whose estimates are guided whenever it samples a prompt with a marked concept.

    A guide takes one more evaluation of the prompt at each step of its part of the sampling. The change is multiplied
    by the cfg, so that a short step makes the same images as Apply Direction does.

    Args:
        model: MODEL; not modified.
        guides: the directions.
        local: see `change_of_estimate`.
    """
    at_sampling.install()
    guided = model.clone()
    mine = _Guidance(tuple(guides), local)
    guided.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, mine.key, mine.prepare)
    # Models are cloned with deep copies of their options. A bound method would be copied with its object; a function is
    # not.
    guided.set_model_sampler_post_cfg_function(lambda args: mine.guide(args))
    return guided


class _Guidance:
    """The guides of one node."""

    def __init__(self, guides: tuple[Guide, ...], local: bool) -> None:
        self.key = f"elrond {uuid.uuid4().hex}"
        self._guides, self._local = guides, local
        # The host's guiders of the samplings that run, the innermost last, with the factors of the guides.
        self._running: list[tuple[Any, list[float]]] = []

    def prepare(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper of the host's `outer_sample`: hand it the prompts after a short step beside the others.

        The host then encodes them with all that belongs to the prompt: control, masks, parts of the sampling.

        Raises:
            ElrondError: if the prompt has no marked concept, or directions do not fit it.
        """
        guider = executor.class_obj
        positive = guider.conds.get("positive", [])
        if not any(MARK in entry for entry in positive):
            raise ElrondError(
                "The model is to be guided along directions, but the prompt that it samples has no marked concept: "
                "connect one from Encode Concept or Mark Concept to the sampler."
            )
        factors = []
        for number, guide in enumerate(self._guides):
            factor, entries = _after_short_step(positive, guide)
            factors.append(factor)
            guider.conds[self._name(number)] = entries
        self._running.append((guider, factors))
        try:
            return executor(*args, **kwargs)
        finally:
            self._running.pop()

    def guide(self, args: dict[str, Any]) -> torch.Tensor:
        """The estimate after guidance, for the host's list of functions to call after cfg."""
        estimate: torch.Tensor = args["denoised"]
        if not self._running:
            return estimate
        guider, factors = self._running[-1]
        model, sigma, given, options = args["model"], args["sigma"], args["input"], args["model_options"]
        total = torch.zeros_like(estimate, dtype=torch.float32)
        for number, (guide, factor) in enumerate(zip(self._guides, factors, strict=True)):
            if not _acts(guide, model.model_sampling, float(sigma.max())):
                continue
            # One by one: patches of attention take the second prompt of a call for the negative one.
            (after,) = comfy.samplers.calc_cond_batch(model, [guider.conds[self._name(number)]], given, sigma, options)
            total += change_of_estimate(args["cond_denoised"], after, factor * args["cond_scale"], self._local)
        return estimate + total.to(estimate.dtype)

    def _name(self, number: int) -> str:
        return f"{self.key} {number}"


def _acts(guide: Guide, sampling: Any, sigma: float) -> bool:
    """Whether a guide acts at a noise level: as an entry of the host with its start and end, see `parts`."""
    start = guide.start + GAP if guide.start else 0.0
    return float(sampling.percent_to_sigma(guide.end)) <= sigma <= float(sampling.percent_to_sigma(start))


def _after_short_step(positive: list[dict[str, Any]], guide: Guide) -> tuple[float, list[dict[str, Any]]]:
    """The factor of a guide (see `shortened`), and a prompt's entries whose concept has taken the short step."""
    found = {number: guide.change(entry[MARK]) for number, entry in enumerate(positive) if MARK in entry}
    factor = max(shortened(float(change.norm()) / norm) for _, change, norm in found.values())
    entries = []
    for number, entry in enumerate(positive):
        new = {**entry, "uuid": uuid.uuid4()}
        if number in found:
            rows, change, _ = found[number]
            tensor = entry["cross_attn"]
            steered = steer(plain(tensor), rows, change / factor)
            new["cross_attn"] = steered.as_subclass(PerImage) if isinstance(tensor, PerImage) else steered
        entries.append(new)
    return factor, entries
