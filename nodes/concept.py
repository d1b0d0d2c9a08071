"""EncodeConcept: a prompt to a conditioning with marked concepts."""

from __future__ import annotations

from comfy_api.latest import io

from ..elrond_core.errors import ElrondError
from ..elrond_core.prompt import Span, bracketed, find_word
from . import host
from .types import first_error


class EncodeConcept(io.ComfyNode):
    """CLIP and a prompt to a conditioning with marked rows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondEncodeConcept",
            display_name="Encode Concept (ELROND)",
            category="ELROND",
            description="Encodes a prompt and remembers where its concept word is. Works as any CONDITIONING.",
            **host.search_aliases("concept token", "bracket prompt", "diversity", "variation"),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model you will sample with."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a [person]",
                    dynamic_prompts=True,
                    tooltip="The prompt. Put the concept in [brackets], or name it in the field below.",
                ),
                io.String.Input(
                    "concept",
                    default="",
                    tooltip="The concept word, several words that stand together, or embedding:name. "
                    "Empty: what is in [brackets].",
                ),
                io.Int.Input(
                    "occurrence",
                    default=1,
                    min=1,
                    max=100,
                    tooltip="Which one, if the prompt has the concept word more than once; free-standing words come "
                    "before parts of others. Brackets say it themselves.",
                ),
                io.Int.Input(
                    "row",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    tooltip="For words that are cut into several tokens: 0 marks all their rows, 1 only the first, 2 "
                    "the second.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="The prompt, with the concept marked."),
                io.String.Output(display_name="report", tooltip="The tokens, and which rows are the concept's."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, prompt: str | None = None, concept: str | None = None, occurrence: int | None = None
    ) -> bool | str:
        """Refuse what can be seen to be wrong before anything is computed."""
        return first_error((_concepts, prompt, concept), (_concepts, prompt, concept, occurrence))

    @classmethod
    def execute(cls, clip: object, prompt: str, concept: str, occurrence: int, row: int = 0) -> io.NodeOutput:
        """Encode and mark."""
        if clip is None:
            raise ElrondError("The CLIP input is empty: this checkpoint has no text encoder; load one separately.")
        plain, spans = _concepts(prompt, concept, occurrence)
        encoded = host.EncodedPrompt(clip, plain)
        concepts = [encoded.concept(span) for span in spans]
        if row:
            concepts = [c.only(row - 1) for c in concepts]
        lines = [f"prompt: {plain}"]
        lines += [f"concept {c.word!r}: tokens {' '.join(c.tokens)}, rows {list(c.rows)}" for c in concepts]
        lines += ["rows: " + " ".join(f"{token.row}={token.text}" for token in encoded.tokens)]
        lines += filter(None, [encoded.doubt(concepts)])
        words = tuple(token.row for token in encoded.tokens)
        marked = host.mark(encoded.conditioning, host.family_of(clip), plain, concepts, words)
        return io.NodeOutput(marked, "\n".join(lines))


def _concepts(prompt: str, concept: str, occurrence: int = 1) -> tuple[str, list[Span]]:
    """The prompt without brackets, and the places of its concepts in it."""
    if concept.strip():
        return prompt, [find_word(prompt, concept, occurrence - 1)]
    plain, spans = bracketed(prompt)
    if not spans:
        raise ElrondError("Name the concept: put its word in [brackets] in the prompt, or in the concept field.")
    return plain, spans


NODES = [EncodeConcept]
