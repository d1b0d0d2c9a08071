"""The entries of a conditioning and the keyframes of its hooks that act at a noise level.

The host walks down the noise levels once. Gradients are taken at any level, in any order, so both are set for each.
"""

from __future__ import annotations

from typing import Any

import torch

from ...elrond_core.errors import ElrondError
from .at_sampling import start_after
from .conditioning import MARK, Conditioning, MarkedPrompt, end_before, marked


def acts_at(sampling: Any, options: dict[str, Any], sigma: float) -> bool:
    """Whether the host uses an entry with these options at noise level `sigma`. Both ends of its part are included."""
    first, last = _part(options)
    # The host compares in the precision of its sigmas.
    level = torch.tensor(sigma)
    share = end_before(options)
    start = sampling.percent_to_sigma(first)
    if share is not None and first == options["start_percent"]:
        start = start_after(sampling, share)
    early = first > 0 and bool(level > start)
    late = last < 1 and bool(level < sampling.percent_to_sigma(last))
    return not (early or late)


def _part(options: dict[str, Any]) -> tuple[float, float]:
    """The part of the sampling, from 0 to 1, in which an entry acts; schedules of text encoder hooks narrow it."""
    first = max(options.get("start_percent", 0.0), options.get("clip_start_percent", 0.0))
    return first, min(options.get("end_percent", 1.0), options.get("clip_end_percent", 1.0))


def acting(sampling: Any, entries: list[dict[str, Any]], sigma: float) -> dict[str, Any]:
    """The first of marked entries, given by their options, that acts at noise level `sigma`.

    Raises:
        ElrondError: if no entry does.
    """
    for options in entries:
        if acts_at(sampling, options, sigma):
            return options
    parts = [_part(options) for options in entries]
    there = ", ".join(f"{1 - last:.3g} to {1 - first:.3g}" for first, last in parts)
    raise ElrondError(
        f"The marked prompt does not act at this noise level: its part of the sampling is that of noise "
        f"levels {there}. Choose a noise level in there."
    )


def marked_at(model: Any, conditioning: Conditioning, sigma: float) -> MarkedPrompt:
    """The marked prompt of the entry that is differentiated at noise level `sigma`.

    Raises:
        ElrondError: if no entry is marked, or no marked entry acts at this level.
    """
    marked(conditioning)
    entries = [options for _, options in conditioning if MARK in options]
    prompt: MarkedPrompt = acting(model.get_model_object("model_sampling"), entries, sigma)[MARK]
    return prompt


class Keyframes:
    """Sets the keyframes of the hooks of conditionings to those of a noise level.

    The host itself advances by one keyframe a call, and never goes back.
    """

    def __init__(self, patcher: Any, conds: dict[str, list[dict[str, Any]]]) -> None:
        self._patcher = patcher
        entries = [entry for kind in conds.values() for entry in kind if entry.get("hooks")]
        groups = [hook.hook_keyframe for entry in entries for hook in entry["hooks"].hooks]
        self._groups = list({id(group): group for group in groups}.values())
        self._strengths: list[float] = []

    def hold(self, sigma: float) -> None:
        """Set each hook to the last keyframe that starts before noise level `sigma` is reached."""
        for group in self._groups:
            if group.is_empty():
                continue
            reached = [i for i, keyframe in enumerate(group.keyframes) if i == 0 or keyframe.start_t >= sigma]
            group._current_index = reached[-1]
            group._current_keyframe = group.keyframes[reached[-1]]
            group._current_strength = group.strength
            # The host changes the keyframe only when the level changes.
            group._curr_t = torch.tensor(sigma)
        strengths = [group.strength for group in self._groups]
        if strengths != self._strengths:
            # The cached weights are patched with other strengths.
            self._patcher.clear_cached_hook_weights()
            self._strengths = strengths
