"""GuideDirections: directions to a model that goes along them by itself."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..elrond_core.directions import Directions
from ..elrond_core.steering.draws import check_share
from . import host
from .steering import START, concept_and_norm, end_input, timed_steps
from .types import ABSOLUTE, CONCEPT_INPUT, UNIT_INPUT, DirectionsIO, first_error
from .widget_text import strengths_of, windows_of


class GuideDirections(io.ComfyNode):
    """Guide a model's estimates along directions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondGuideDirections",
            display_name="Guide Along Directions (ELROND)",
            category="ELROND",
            description="Steers a part of the image, for more time than Apply Direction: at each step of the sampling "
            "the model is asked once more for each direction, and its estimate changes only where the direction "
            "changes it most. Connect the result to the sampler, and the same prompt as before.",
            **host.search_aliases("slider", "sliders", "concept slider", "semantic guidance", "SEGA", "precise"),
            inputs=[
                io.Model.Input("model", tooltip="The model that samples."),
                DirectionsIO.Input("directions", tooltip="From Fit PCA, Train SAE or Load Directions."),
                io.Int.Input("index", default=0, min=0, max=65535, tooltip="Which direction; 0 is the first."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-1000.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="How far to go; negative goes the other way, 0 changes nothing. About twice as much as in "
                    "Apply Direction changes about as much.",
                ),
                UNIT_INPUT,
                io.Boolean.Input(
                    "local",
                    default=True,
                    tooltip="Change each image only where the direction changes it most. Off: everywhere.",
                ),
                START,
                end_input(1.0),
                CONCEPT_INPUT,
                io.String.Input(
                    "strengths",
                    default="",
                    optional=True,
                    tooltip="Several directions at once, as in 0: 0.5, 3: -0.2. If there are any, they take the place "
                    "of index and strength. Each changes its own part of the image. The panel's sliders write here.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The guided model, for the sampler.")],
        )

    @classmethod
    def validate_inputs(
        cls, start: float | None = None, end: float | None = None, strengths: str | None = None
    ) -> bool | str:
        """Refuse what can be seen to be wrong before anything is computed."""
        return first_error((strengths_of, strengths), (check_share, start, end))

    @classmethod
    def execute(
        cls,
        model: Any,
        directions: Directions,
        index: int,
        strength: float,
        unit: str,
        local: bool,
        start: float,
        end: float,
        concept: str,
        strengths: str = "",
    ) -> io.NodeOutput:
        """Patch the model."""
        given = strengths_of(strengths) or {index: strength}

        def guide(first: float, last: float, step: torch.Tensor) -> host.Guide:
            def change(prompt: host.MarkedPrompt) -> tuple[tuple[int, ...], torch.Tensor, float]:
                target, norm = concept_and_norm(prompt, directions, concept)
                return target.rows, (1.0 if unit == ABSOLUTE else norm) * step, norm

            return host.Guide(change, first, last)

        timed = timed_steps(directions, given, unit, windows_of(strengths), (start, end))
        guides = [guide(first, last, step) for first, last, step in timed if step.any()]
        return io.NodeOutput(host.with_guides(model, guides, local) if guides else model)


NODES = [GuideDirections]
