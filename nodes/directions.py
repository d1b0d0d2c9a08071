"""ComposeDirections and LabelDirections: sets of directions to other sets, with other names."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..elrond_core.directions import Directions
from ..elrond_core.errors import ElrondError
from ..elrond_core.steering import compose, labels
from . import host
from .types import WORDS_INPUT, DirectionsIO, first_error
from .widget_text import ANY_COUNT, indices_of, numbers_of, words_of

_SUBSET, _SUM, _ORTHOGONAL = "subset", "weighted sum", "orthogonalise"


class ComposeDirections(io.ComfyNode):
    """Select, add, orthogonalise or rename directions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondComposeDirections",
            display_name="Compose Directions (ELROND)",
            category="ELROND",
            description="Makes a new set of directions: some of them, one mix, or all without their overlap.",
            **host.search_aliases("mix sliders", "combine directions"),
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
        both = compose.merge(directions, more) if more is not None else directions
        result = compose.subset(both, indices_of(which, len(both)))
        if operation == _SUM:
            result = compose.weighted_sum(result, numbers_of(weights) or [1.0] * len(result))
        elif weights.strip():
            raise ElrondError(f"Weights belong to a weighted sum, not to {operation}: clear them, or change it.")
        elif operation == _ORTHOGONAL:
            result = compose.orthogonalised(result)
        result = compose.renamed(result, names.rstrip().splitlines())
        return io.NodeOutput(result, "\n".join(result.lines()))


class LabelDirections(io.ComfyNode):
    """CLIP and directions to named directions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondLabelDirections",
            display_name="Label Directions (ELROND)",
            category="ELROND",
            description="Suggests names: which adjective, put before the concept, moves its embedding the same way? "
            "Needs the text encoder only.",
            **host.search_aliases("name sliders", "rename directions"),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that the directions were made with."),
                DirectionsIO.Input("directions", tooltip="From a fit or Load Directions."),
                WORDS_INPUT,
                io.Float.Input(
                    "least",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="A word needs at least this score (a cosine) to become part of a name.",
                ),
                io.Boolean.Input("replace", default=False, tooltip="Also rename directions that have a name already."),
                io.String.Input(
                    "names",
                    default="",
                    multiline=True,
                    tooltip="Your own names, one a line, in order; they win. An empty line keeps the suggestion.",
                ),
            ],
            outputs=[
                DirectionsIO.Output(display_name="directions", tooltip="The same directions with names."),
                io.String.Output(display_name="report", tooltip="The closest words of each direction, with scores."),
            ],
        )

    @classmethod
    def validate_inputs(cls, words: str | None = None) -> bool | str:
        """Refuse what can be seen to be wrong before anything is computed."""
        return first_error((words_of, words))

    @classmethod
    def execute(
        cls, clip: Any, directions: Directions, words: str, least: float, replace: bool, names: str
    ) -> io.NodeOutput:
        """Encode the concept with each word before it, and compare."""
        new_names = names.rstrip().splitlines()
        if len(new_names) > len(directions):
            raise ElrondError(f"There are {len(new_names)} names for {len(directions)} directions.")
        word_list = words_of(words)
        suggestions = labels.label(directions, word_list, *host.rows_with_words(clip, directions.provenance, word_list))
        named = compose.renamed(labels.labelled(directions, suggestions, least, replace), new_names)
        return io.NodeOutput(named, "\n".join(labels.label_lines(named, suggestions)))


NODES = [ComposeDirections, LabelDirections]
