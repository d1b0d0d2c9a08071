"""Socket types of the pack, and inputs, checks and conversions that several nodes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io

from ..elrond_core.directions import Directions
from ..elrond_core.errors import ElrondError
from ..elrond_core.steering.calibration import in_token_norms

GradientsIO = io.Custom("ELROND_GRADIENTS")
DirectionsIO = io.Custom("ELROND_DIRECTIONS")

SEED_LIMIT = 0xFFFFFFFFFFFFFFFF
RELATIVE, ABSOLUTE, CALIBRATED, AUTO = UNITS = ("token norms", "absolute", "calibrated", "auto")
UNIT_INPUT = io.Combo.Input(
    "unit",
    options=list(UNITS),
    default=AUTO,
    tooltip="What a strength of 1 is. token norms: the length of the concept's own embedding. absolute: one unit of "
    "the embedding, as in the paper (30 to 60 on SDXL). calibrated: the end of what Calibrate Directions found usable. "
    "auto: calibrated where a direction is, else token norms.",
)
CONCEPT_INPUT = io.String.Input(
    "concept",
    default="",
    tooltip="Which concept of the prompt to steer; dog #2 is the second marked dog. Empty: the one the directions were "
    "made for, or the first.",
)


def in_unit(directions: Directions, strengths: dict[int, float], unit: str) -> dict[int, float]:
    """Strengths by direction, in embedding units if `unit` is `ABSOLUTE`, else in token norms.

    Raises:
        ElrondError: if a direction does not exist, or `unit` is `CALIBRATED` and one is not.
    """
    if unit in (RELATIVE, ABSOLUTE):
        return strengths
    return in_token_norms(directions, strengths, known_only=unit == AUTO)


def first_error(*checks: tuple[Any, ...]) -> bool | str:
    """The answer of `validate_inputs`: True if all checks pass, else the message of the first that fails.

    Args:
        checks: each a function that raises ElrondError, followed by its arguments. A check with an argument that is
            None is skipped: the value of a wired input is not known yet. Values of another type, as programs may send
            them, are named instead of the error that they cause.
    """
    for check, *values in checks:
        if any(value is None for value in values):
            continue
        try:
            check(*values)
        except ElrondError as error:
            return str(error)
        except (TypeError, AttributeError):
            sent = ", ".join(repr(value)[:80] for value in values if not isinstance(value, Path))
            return f"A value here has another type than its input: {sent}."
    return True


def check_guidance(cfg: float, has_negative: bool) -> None:
    """Refuse guidance that cannot be.

    Raises:
        ElrondError: if it is out of range, or other than none and there is no negative prompt.
    """
    if not 0 <= cfg <= 100:
        raise ElrondError(f"The cfg must lie between 0 and 100, not at {cfg}.")
    if not has_negative and cfg not in (0.0, 1.0):
        raise ElrondError(f"A cfg of {cfg} needs a negative prompt: connect one, or set cfg to 1.")


def image(picture: np.ndarray) -> torch.Tensor:
    """A float (H, W, 3) picture as an IMAGE."""
    return torch.from_numpy(np.ascontiguousarray(picture, dtype=np.float32))[None]


def seed_input(tooltip: str) -> io.Int.Input:
    """A seed that stays as it is unless the user asks for a new one, so that results can be repeated."""
    return io.Int.Input("seed", default=0, min=0, max=SEED_LIMIT, control_after_generate=False, tooltip=tooltip)
