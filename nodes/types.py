"""Socket types of the pack, and the inputs and conversions that several nodes share."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io

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
    tooltip="Which concept of the prompt to steer. Empty: the one the directions were made for, or the first.",
)


def image(picture: np.ndarray) -> torch.Tensor:
    """A float (H, W, 3) picture as an IMAGE."""
    return torch.from_numpy(np.ascontiguousarray(picture, dtype=np.float32))[None]


def seed_input(tooltip: str) -> io.Int.Input:
    """A seed that stays as it is unless the user asks for a new one, so that results can be repeated."""
    return io.Int.Input("seed", default=0, min=0, max=SEED_LIMIT, control_after_generate=False, tooltip=tooltip)
