"""ComposeDirections and LabelDirections: sets of directions to other sets, with other names."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..elrond_core.directions import Directions
from ..elrond_core.errors import ElrondError
from ..elrond_core.gradients import Gradients
from ..elrond_core.steering import compose, labels
from . import host
from .contrasts import (
    BUILT_IN_INPUT,
    GUESSED,
    PAIRS_INPUT,
    WHEN_EMPTY,
    check_opposites,
    contrasts_of,
    displaced,
    guessable,
    opposites_input,
)
from .types import DirectionsIO, GradientsIO, first_error
from .widget_text import ANY_COUNT, indices_of, numbers_of

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
            description="Suggests names: which opposites change the concept as the direction does?",
            **host.search_aliases("name sliders", "rename directions"),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that the directions were made with."),
                DirectionsIO.Input("directions", tooltip="From a fit or Load Directions."),
                opposites_input("that could name the directions"),
                io.Float.Input(
                    "least",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="A name needs at least this score (a cosine), beside being better than chance.",
                ),
                io.Boolean.Input("replace", default=False, tooltip="Also rename directions that have a name already."),
                io.String.Input(
                    "names",
                    default="",
                    multiline=True,
                    tooltip="Your own names, one a line, in order; they win. An empty line keeps the suggestion.",
                ),
                PAIRS_INPUT,
                BUILT_IN_INPUT,
                GradientsIO.Input(
                    "gradients",
                    optional=True,
                    tooltip="The gradients that the directions are of, best with a response: steps are then compared "
                    "by the change of the image that they cause.",
                ),
            ],
            outputs=[
                DirectionsIO.Output(display_name="directions", tooltip="The same directions with names."),
                io.String.Output(display_name="report", tooltip="The closest words of each direction, with scores."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, words: str | None = None, pairs: str | None = GUESSED, built_in: str | None = WHEN_EMPTY
    ) -> bool | str:
        """Refuse what can be seen to be wrong before anything is computed."""
        return first_error((check_opposites, words, pairs, built_in))

    @classmethod
    def execute(
        cls,
        clip: Any,
        directions: Directions,
        words: str,
        least: float,
        replace: bool,
        names: str,
        # Graphs that were exported before these inputs were there hold a list of single words.
        pairs: str = GUESSED,
        built_in: str = WHEN_EMPTY,
        gradients: Gradients | None = None,
    ) -> io.NodeOutput:
        """Encode the concept with the phrases, and compare."""
        check_opposites(words, pairs, built_in)
        new_names = names.rstrip().splitlines()
        if len(new_names) > len(directions):
            raise ElrondError(f"There are {len(new_names)} names for {len(directions)} directions.")
        if pairs == GUESSED:
            listed = guessable(words)
            suggestions = labels.label(directions, listed, *host.rows_with_words(clip, directions.provenance, listed))
        else:
            samples = labels.metric_samples(directions, gradients) if gradients is not None else None
            contrasts = contrasts_of(words, built_in)
            steps = displaced(clip, directions.provenance, contrasts, directions.vectors.shape[1:])
            suggestions = labels.label_by_contrasts(directions, contrasts, steps, samples)
        named = compose.renamed(labels.labelled(directions, suggestions, least, replace), new_names)
        return io.NodeOutput(named, "\n".join(labels.label_lines(named, suggestions)))


NODES = [ComposeDirections, LabelDirections]
