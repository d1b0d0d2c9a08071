"""LabelDirections and FitWords: what words, through the text encoder, say about a concept's directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io

from ..elrond_core.decompose.response import check_probes
from ..elrond_core.decompose.words import fit_words
from ..elrond_core.directions import Directions
from ..elrond_core.errors import ElrondError
from ..elrond_core.gradients import Gradients
from ..elrond_core.prompt import Span, find_word, occurrences
from ..elrond_core.provenance import Provenance
from ..elrond_core.steering import labels
from ..elrond_core.steering.compose import renamed
from . import host
from .types import DirectionsIO, GradientsIO, first_error
from .widget_text import WORDS, words_of

_WORDS = io.String.Input(
    "words",
    default=WORDS,
    multiline=True,
    tooltip="Words or phrases to try, separated by commas. Give many, of all kinds: what they have in "
    "common is left out.",
)


def _rows(clip: Any, prompt: str, span: Span) -> torch.Tensor:
    """(R, d) the rows of a concept at a place in a prompt."""
    encoded = host.EncodedPrompt(clip, prompt)
    return encoded.conditioning[0][0][0, list(encoded.concept(span).rows)].float().cpu()


def _place(clip: Any, origin: Provenance) -> Span:
    """Where in its prompt the concept is that something was made for; the first such word if that is unclear."""
    encoded = host.EncodedPrompt(clip, origin.prompt)
    places = occurrences(origin.prompt, origin.concept, inside=True)
    for span in places:
        # They may be for a single one of its rows.
        if set(origin.rows) <= set(encoded.concept(span).rows):
            return span
    return find_word(origin.prompt, origin.concept)


def _moved(clip: Any, origin: Provenance, words: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows (R, d) of the concept that something was made for, and (W, R, d) with each word put before it."""
    if clip is None:
        raise ElrondError("The CLIP input is empty: this checkpoint has no text encoder; load one separately.")
    family = host.family_of(clip)
    if origin.family and origin.family != family:
        raise ElrondError(f"These directions were made for {origin.family}, but this text encoder is {family}'s.")
    if not origin.prompt or not origin.concept:
        raise ElrondError("These directions do not say which concept of which prompt they were made for.")
    span = _place(clip, origin)
    bare = _rows(clip, origin.prompt, span)
    update = host.progress(len(words))
    moved = []
    for word in words:
        moved.append(_rows(clip, *labels.put_before(origin.prompt, span, word)))
        update(len(moved))
    return bare, torch.stack(moved)


class FitWords(io.ComfyNode):
    """Gradients and CLIP to directions between words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondFitWords",
            display_name="Fit Word Directions (ELROND)",
            category="ELROND",
            description="Finds the pairs of opposite words between which the images vary most, as directions with "
            "names: dark → bright. Needs gradients with a response.",
            inputs=[
                GradientsIO.Input("gradients", tooltip="From Collect Gradients with response on."),
                io.Clip.Input("clip", tooltip="The text encoder that the prompt was encoded with."),
                _WORDS,
                io.Float.Input(
                    "significance",
                    default=1.0,
                    min=0.0,
                    max=1e6,
                    step=0.1,
                    tooltip="Keep pairs whose change of the image varies naturally by more than this, in units of the "
                    "variance of one latent value.",
                ),
                io.Int.Input("most", default=16, min=1, max=4096, tooltip="Keep no more directions than this."),
            ],
            outputs=[
                DirectionsIO.Output(display_name="directions", tooltip="Named unit directions, the strongest first."),
                io.String.Output(display_name="report", tooltip="The pairs, with how much the images vary along each."),
            ],
        )

    @classmethod
    def validate_inputs(cls, words: str | None = None) -> bool | str:
        """Refuse what can be seen to be wrong before anything is computed."""
        return first_error((words_of, words))

    @classmethod
    def execute(cls, gradients: Gradients, clip: Any, words: str, significance: float, most: int) -> io.NodeOutput:
        """Encode the concept with each word before it, and pair the words."""
        tried = words_of(words)
        # Before the words are encoded, which takes its time.
        check_probes(gradients)
        found = fit_words(
            gradients, tried, *_moved(clip, gradients.provenance, tried), significance=significance, limit=most
        )
        return io.NodeOutput(found, "\n".join(found.lines()))


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
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that the directions were made with."),
                DirectionsIO.Input("directions", tooltip="From a fit or Load Directions."),
                _WORDS,
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
        given = names.rstrip().splitlines()
        if len(given) > len(directions):
            raise ElrondError(f"There are {len(given)} names for {len(directions)} directions.")
        tried = words_of(words)
        found = labels.label(directions, tried, *_moved(clip, directions.provenance, tried))
        named = renamed(labels.labelled(directions, found, least, replace), given)
        return io.NodeOutput(named, "\n".join(labels.label_lines(named, found)))


NODES = [FitWords, LabelDirections]
