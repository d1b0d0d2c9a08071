"""Guidance of a model's estimates while it samples (`elrond_core.steering.guidance`)."""

from __future__ import annotations

import contextlib
import inspect
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch

from ...elrond_core.errors import ElrondError
from ...elrond_core.steering.apply import steer
from ...elrond_core.steering.guidance import change_of_estimate, shortened
from . import at_sampling
from .conditioning import MARK, MarkedPrompt, PerImage, plain
from .gradient_patches import replaced_attribute
from .parts import Part
from .patch_state import is_cache
from .schedule import acts_at

_OUTER = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
_KEY, _BEFORE = "elrond guidance", "before"


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
    # The same in every run of a graph, so that work with this model that was interrupted goes on.
    earlier = [key for key in guided.wrappers.get(_OUTER, {}) if str(key).startswith(_KEY)]
    mine = _Guidance(f"{_KEY} {len(earlier)}", tuple(guides), local)
    guided.add_wrapper_with_key(_OUTER, mine.key, mine.prepare)

    # Models are cloned with deep copies of their options. A bound method would be copied with its object; a function is
    # not.
    def guide(args: dict[str, Any]) -> torch.Tensor:
        return mine.guide(args)

    guide.elrond_guidance = True  # type: ignore[attr-defined]
    guided.set_model_sampler_post_cfg_function(guide)
    return guided


@contextlib.contextmanager
def without_guides(model: Any) -> Iterator[None]:
    """Within the context, a MODEL is not guided: an estimate that is differentiated is the prompt's own."""
    wrappers = model.wrappers.get(_OUTER, {})
    kept = {key: functions for key, functions in wrappers.items() if not str(key).startswith(_KEY)}
    if len(kept) == len(wrappers):
        yield
        return
    logging.warning("ELROND: guidance along directions is off while gradients or masks are computed.")
    after = model.model_options.get("sampler_post_cfg_function", [])
    after = [function for function in after if not hasattr(function, "elrond_guidance")]
    options = {**model.model_options, "sampler_post_cfg_function": after}
    with (
        replaced_attribute(model, "wrappers", {**model.wrappers, _OUTER: kept}),
        replaced_attribute(model, "model_options", options),
    ):
        yield


@dataclass(frozen=True)
class _Run:
    """One sampling.

    Attributes:
        guider: the host's guider.
        factors: of each guide, see `shortened`.
        among: bool (N, 1, …), the places that are sampled at all, if some are not.
    """

    guider: Any
    factors: list[float]
    among: torch.Tensor | None


class _Guidance:
    """The guides of one node."""

    def __init__(self, key: str, guides: tuple[Guide, ...], local: bool) -> None:
        self.key = key
        self._guides, self._local = guides, local
        # The samplings that run, the innermost last.
        self._running: list[_Run] = []

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
        guider.conds[self._name(_BEFORE)] = [{**entry, "uuid": uuid.uuid4()} for entry in positive]
        call = inspect.signature(comfy.samplers.CFGGuider.outer_sample).bind(guider, *args, **kwargs).arguments
        self._running.append(_Run(guider, factors, _inpainted(call.get("denoise_mask"), call["noise"], guider)))
        try:
            return executor(*args, **kwargs)
        finally:
            self._running.pop()

    def guide(self, args: dict[str, Any]) -> torch.Tensor:
        """The estimate after guidance, for the host's list of functions to call after cfg."""
        estimate: torch.Tensor = args["denoised"]
        if not self._running:
            return estimate
        run = self._running[-1]
        model, sigma, given, options = args["model"], args["sigma"], args["input"], args["model_options"]

        def estimated(name: str) -> torch.Tensor:
            # One by one: patches of attention take the second prompt of a call for the negative one.
            (found,) = comfy.samplers.calc_cond_batch(model, [run.guider.conds[name]], given, sigma, options)
            return found

        acting = [
            number
            for number, guide in enumerate(self._guides)
            # As an entry of the host does that is steered in this part only.
            if acts_at(model.model_sampling, Part(guide.start, guide.end).limited({}), float(sigma.flatten()[0]))
        ]
        if not acting:
            return estimate
        if args["cond"] is run.guider.conds["positive"] and not _altered(options):
            before, cfg = args["cond_denoised"], args["cond_scale"]
        else:
            # The host's guider of two prompts hands on the other one, and multiplies this one by its `cfg1`.
            before, cfg = estimated(self._name(_BEFORE)), getattr(run.guider, "cfg1", args["cond_scale"])
        total = torch.zeros_like(estimate, dtype=torch.float32)
        for number in acting:
            after = estimated(self._name(number))
            total += change_of_estimate(before, after, run.factors[number] * cfg, self._local, run.among)
        return estimate + total.to(estimate.dtype)

    def _name(self, number: int | str) -> str:
        return f"{self.key} {number}"


def _altered(options: dict[str, Any]) -> bool:
    """Whether patches may have changed the host's estimate of the prompt, or put an old one in its place."""
    if options.get("sampler_pre_cfg_function") or "sampler_calc_cond_batch_function" in options:
        return True
    of_model = options.get("transformer_options", {})
    keys = [*of_model, *(key for kind in of_model.get("wrappers", {}).values() for key in kind)]
    around = options.get("model_function_wrapper")
    return any(is_cache(key) for key in [*keys, getattr(around, "__qualname__", type(around).__qualname__)])


def _inpainted(mask: torch.Tensor | None, noise: torch.Tensor, guider: Any) -> torch.Tensor | None:
    """Bool (N, 1, …), where a mask of the host lets an image be sampled; None if there is no mask."""
    if mask is None:
        return None
    prepared = comfy.sampler_helpers.prepare_mask(mask, noise.shape, guider.model_patcher.load_device)
    return prepared.amax(1, keepdim=True) > 0


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
