"""ApplyDirection and Diversify: directions back onto the prompt."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..elrond_core.directions import Directions
from ..elrond_core.errors import ElrondError
from ..elrond_core.steering import change_of, draw_steps
from ..elrond_core.tokens import Concept
from . import host
from .types import DirectionsIO, seed_input

_RELATIVE = "token norms"
_UNITS = io.Combo.Input(
    "unit",
    options=[_RELATIVE, "absolute"],
    default=_RELATIVE,
    tooltip="What a strength of 1 is: the length of the concept's own embedding (about the same for every model), "
    "or one embedding unit (the paper's strengths, 30 to 60 on SDXL).",
)
_CONCEPT = io.String.Input(
    "concept",
    default="",
    tooltip="Which concept of the prompt to steer. Empty: the one the directions were made for, or the first.",
)
_START = io.Float.Input(
    "start", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="Share of the sampling at which steering starts."
)
_END = io.Float.Input(
    "end", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Share of the sampling at which steering ends."
)


def _concept(memory: dict[str, Any], directions: Directions, wanted: str) -> tuple[Concept, float]:
    """The concept to steer and its token norm, once it is clear that the directions fit the prompt's model family."""
    family = directions.provenance.family
    if family and family != memory["family"]:
        mine = memory["family"]
        raise ElrondError(f"These directions were made for {family}, but the prompt was encoded for {mine}.")
    concepts: tuple[Concept, ...] = memory["concepts"]
    wanted = wanted.strip()
    for place, concept in enumerate(concepts):
        if concept.word.lower() == (wanted or directions.provenance.concept).lower():
            return concept, memory["norms"][place]
    if wanted:
        marked = ", ".join(repr(c.word) for c in concepts)
        raise ElrondError(f"The prompt has no marked concept {wanted!r}; it has {marked}.")
    return concepts[0], memory["norms"][0]


class ApplyDirection(io.ComfyNode):
    """Add one direction to the concept's rows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondApplyDirection",
            display_name="Apply Direction (ELROND)",
            category="ELROND",
            description="Steers the concept along one direction. Chain several to combine them.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="From Encode Concept, or another Apply Direction."),
                DirectionsIO.Input("directions", tooltip="From Fit PCA, Train SAE or Load Directions."),
                io.Int.Input("index", default=0, min=0, max=65535, tooltip="Which direction; 0 is the first."),
                io.Float.Input(
                    "strength",
                    default=0.5,
                    min=-1000.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="How far to go; negative goes the other way, 0 changes nothing.",
                ),
                _UNITS,
                _START,
                _END,
                _CONCEPT,
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="The steered prompt.")],
        )

    @classmethod
    def execute(
        cls,
        conditioning: Any,
        directions: Directions,
        index: int,
        strength: float,
        unit: str,
        start: float,
        end: float,
        concept: str,
    ) -> io.NodeOutput:
        """Steer the marked entries."""
        vector = directions.pick(index)

        def change(memory: dict[str, Any]) -> tuple[tuple[int, ...], torch.Tensor]:
            found, norm = _concept(memory, directions, concept)
            return found.rows, strength * (norm if unit == _RELATIVE else 1.0) * vector

        return io.NodeOutput(host.steer_conditioning(conditioning, change, start, end))


class Diversify(io.ComfyNode):
    """A different random step along the directions for every image of a batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondDiversify",
            display_name="Diversify (ELROND)",
            category="ELROND",
            description="Steers every image of a batch along directions of its own, so that a batch is no longer "
            "variations of one picture. Set the latent's batch size to the same count.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="From Encode Concept."),
                DirectionsIO.Input("directions", tooltip="From Fit PCA, Train SAE or Load Directions."),
                io.Int.Input(
                    "count", default=16, min=1, max=4096, tooltip="Images in the batch: the latent's batch size."
                ),
                seed_input("Fixes what every image gets; image i depends on the seed and i only."),
                io.Float.Input(
                    "lowest", default=0.2, min=0.0, max=1000.0, step=0.05, tooltip="Strengths are uniform from here …"
                ),
                io.Float.Input("highest", default=0.8, min=0.0, max=1000.0, step=0.05, tooltip="… to here."),
                _UNITS,
                io.Int.Input(
                    "mix",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Directions an image: one, as in the paper, or the normalised sum of several at random.",
                ),
                io.Int.Input(
                    "leading", default=0, min=0, max=4096, tooltip="Use so many leading directions only; 0 uses all."
                ),
                io.Boolean.Input("both_signs", default=True, tooltip="Go either way along a direction."),
                _START,
                _END,
                _CONCEPT,
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="One entry an image."),
                io.String.Output(display_name="report", tooltip="What every image got."),
            ],
        )

    @classmethod
    def execute(
        cls,
        conditioning: Any,
        directions: Directions,
        count: int,
        seed: int,
        lowest: float,
        highest: float,
        unit: str,
        mix: int,
        leading: int,
        both_signs: bool,
        start: float,
        end: float,
        concept: str,
    ) -> io.NodeOutput:
        """Draw and steer."""
        draws = draw_steps(directions, count, seed, lowest, highest, mix, leading, both_signs)
        changes = torch.stack([change_of(directions, draw) for draw in draws])

        def change(memory: dict[str, Any]) -> tuple[tuple[int, ...], torch.Tensor]:
            found, norm = _concept(memory, directions, concept)
            return found.rows, (norm if unit == _RELATIVE else 1.0) * changes

        lines = [
            f"image {i}: "
            + " + ".join(f"{w:+.2f} x direction {k}" for k, w in zip(draw.indices, draw.weights, strict=True))
            + f", strength {draw.strength:+.3f} {unit}"
            for i, draw in enumerate(draws)
        ]
        return io.NodeOutput(host.steer_conditioning(conditioning, change, start, end), "\n".join(lines))


NODES = [ApplyDirection, Diversify]
