"""Socket types of the pack, and inputs, checks and conversions that several nodes share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.latest import io

from ..elrond_core.errors import ElrondError

GradientsIO = io.Custom("ELROND_GRADIENTS")
DirectionsIO = io.Custom("ELROND_DIRECTIONS")

SEED_LIMIT = 0xFFFFFFFFFFFFFFFF
RELATIVE, ABSOLUTE = "token norms", "absolute"
UNIT_INPUT = io.Combo.Input(
    "unit",
    options=[RELATIVE, ABSOLUTE],
    default=RELATIVE,
    tooltip="What a strength of 1 is: the length of the concept's own embedding (about the same for every model), "
    "or one embedding unit (the paper's strengths, 30 to 60 on SDXL).",
)
CONCEPT_INPUT = io.String.Input(
    "concept",
    default="",
    tooltip="Which concept of the prompt to steer; dog #2 is the second marked dog. Empty: the one the directions were "
    "made for, or the first.",
)


def first_error(*checks: tuple[Any, ...]) -> bool | str:
    """The answer of `validate_inputs`: True if all checks pass, else the message of the first that fails.

    Args:
        checks: each a function that raises ElrondError, followed by its arguments. A check with an argument that is
            None is skipped: the value of a wired input is not known yet.
    """
    try:
        for check, *values in checks:
            if not any(value is None for value in values):
                check(*values)
    except ElrondError as error:
        return str(error)
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
