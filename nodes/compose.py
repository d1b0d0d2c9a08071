"""ComposeDirections: sets of directions out of sets of directions."""

from __future__ import annotations

from comfy_api.latest import io

from ..elrond_core.directions import Directions
from ..elrond_core.errors import ElrondError
from ..elrond_core.steering import compose
from .types import DirectionsIO, first_error
from .widget_text import ANY_COUNT, indices_of, numbers_of

_SUBSET, _SUM, _ORTHOGONAL = "subset", "weighted sum", "orthogonalise"


class ComposeDirections(io.ComfyNode):
    """Choose, mix, straighten or rename directions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondComposeDirections",
            display_name="Compose Directions (ELROND)",
            category="ELROND",
            description="Makes a new set of directions: some of them, one mix, or all without their overlap.",
            inputs=[
                DirectionsIO.Input("directions", tooltip="From a fit or Load Directions."),
                io.Combo.Input(
                    "operation",
                    options=[_SUBSET, _SUM, _ORTHOGONAL],
                    default=_SUBSET,
                    tooltip="subset: those listed, in that order. weighted sum: one direction out of those listed. "
                    "orthogonalise: each without what those listed before it already do.",
                ),
                io.String.Input(
                    "which", default="", tooltip="Directions to use, in order, as in 0, 2, 5-7. Empty: all of them."
                ),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="For the weighted sum: a number for each, as in 1, -0.5. Empty: all 1.",
                ),
                io.String.Input(
                    "names",
                    default="",
                    multiline=True,
                    tooltip="New names for the result, one a line, in order. An empty line keeps the name there is.",
                ),
                DirectionsIO.Input(
                    "more",
                    optional=True,
                    tooltip="A second set of the same model family; its indices follow the first's.",
                ),
            ],
            outputs=[
                DirectionsIO.Output(display_name="directions", tooltip="The new set."),
                io.String.Output(display_name="report", tooltip="What is in it."),
            ],
        )

    @classmethod
    def validate_inputs(cls, which: str | None = None, weights: str | None = None) -> bool | str:
        """Refuse what can be seen to be wrong before anything is computed."""
        return first_error((indices_of, which, ANY_COUNT), (numbers_of, weights))

    @classmethod
    def execute(
        cls,
        directions: Directions,
        operation: str,
        which: str,
        weights: str,
        names: str,
        more: Directions | None = None,
    ) -> io.NodeOutput:
        """Compose."""
        whole = compose.merge(directions, more) if more is not None else directions
        found = compose.subset(whole, indices_of(which, len(whole)))
        if operation == _SUM:
            found = compose.weighted_sum(found, numbers_of(weights) or [1.0] * len(found))
        elif weights.strip():
            raise ElrondError(f"Weights belong to a weighted sum, not to {operation}: clear them, or change it.")
        elif operation == _ORTHOGONAL:
            found = compose.orthogonalised(found)
        found = compose.renamed(found, names.rstrip().splitlines())
        return io.NodeOutput(found, "\n".join(found.lines()))


NODES = [ComposeDirections]
