"""MarkConcept: a conditioning of another encoder, with its concept's rows marked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io

from ..elrond_core.errors import ElrondError
from ..elrond_core.prompt import Span, bracketed, find_word, occurrences
from . import host
from .types import first_error


class MarkConcept(io.ComfyNode):
    """A conditioning and the text it was encoded from to the same conditioning with marked rows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondMarkConcept",
            display_name="Mark Concept (ELROND)",
            category="ELROND",
            description="Marks a concept in a conditioning that another node encoded. It encodes the text again, and "
            "looks for its rows.",
            **host.search_aliases("concept token", "mark word", "diversity", "variation"),
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="From CLIP Text Encode or another encoder, also through nodes between."
                ),
                io.Clip.Input("clip", tooltip="The CLIP that encoded it, with the same LoRAs."),
                io.String.Input(
                    "concept",
                    default="",
                    tooltip="The concept word, or several words that stand together. Commas separate several concepts. "
                    "Empty: what is in [brackets] in the text below.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip="The text that was encoded; several are each on a line of their own. Empty: the texts of "
                    "the nodes before this one.",
                ),
                io.Int.Input(
                    "occurrence",
                    default=1,
                    min=1,
                    max=100,
                    tooltip="Which one, if a text has the concept word more than once. Brackets say it themselves.",
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
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="The same conditioning, with the concept marked."
                ),
                io.String.Output(
                    display_name="report", tooltip="Which rows are the concept's, and what could not be marked."
                ),
            ],
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
            enable_expand=True,
        )

    @classmethod
    def validate_inputs(
        cls, concept: str | None = None, text: str | None = None, occurrence: int | None = None
    ) -> bool | str:
        """Refuse what can be seen to be wrong before anything is computed."""
        return first_error((_check, concept, text, occurrence))

    @classmethod
    def execute(
        cls,
        conditioning: Any,
        clip: object,
        concept: str,
        text: str,
        occurrence: int,
        row: int = 0,
        **images: torch.Tensor,
    ) -> io.NodeOutput:
        """Mark the entries whose rows are the text's.

        Rows of a prompt that was encoded together with images depend on these. If the graph shows such a node and text
        alone does not explain all rows, this node puts one of its own kind in its place, with the images connected.
        They have no sockets: the host hands a node every link that the graph has.
        """
        if clip is None:
            raise ElrondError("The CLIP input is empty: connect the CLIP that encoded the conditioning.")
        _check(concept, text, occurrence)
        texts = _listed(text, concept, occurrence) if text.strip() else []
        if not texts:
            remembered = [[options[host.MARK].prompt] for _, options in conditioning if host.MARK in options]
            texts = _known([*remembered, *host.texts_before(cls.hidden, "conditioning")], concept, occurrence)
        encoders = host.image_nodes_before(cls.hidden, "conditioning")
        known = [node for node in encoders if images or not node.images]
        clips = [host.ImageClip(clip, node, _images_of(node, images)) for node in known]
        finders = [host.RowFinder(each) for each in (*clips, clip)]
        out: list[Any] = []
        lines: list[str] = []
        reasons: list[ElrondError] = []
        for number, entry in enumerate(conditioning, 1):
            try:
                out.append(_marked(entry, finders, texts, row))
            except ElrondError as error:
                reasons.append(_cause(error, entry, finders, texts, text))
                out.append(entry)
                lines.append(f"entry {number} is not marked. {reasons[-1]}")
            else:
                mark = out[-1][1][host.MARK]
                lines.append(f"entry {number}: {mark.prompt}")
                lines += [
                    f"concept {c.word!r}: tokens {' '.join(c.tokens)}, rows {list(c.rows)}" for c in mark.concepts
                ]
        if reasons and len(known) < len(encoders):
            return _with_images(cls.hidden, encoders)
        if len(reasons) == len(out):
            raise reasons[0] if reasons else ElrondError("The conditioning has no entries: connect a prompt.")
        return io.NodeOutput(out, "\n".join([*lines, *(doubt for finder in finders for doubt in finder.doubts())]))


def _marked(entry: list[Any], finders: Sequence[host.RowFinder], texts: list[host.Text], row: int) -> list[Any]:
    """An entry, marked by the first finder that finds its rows.

    Raises:
        ElrondError: if none does, with the reason of the first.
    """
    reasons: list[ElrondError] = []
    for finder in finders:
        try:
            return finder.mark(entry, texts, row)
        except ElrondError as error:
            reasons.append(error)
    raise reasons[0]


def _cause(
    error: ElrondError, entry: list[Any], finders: Sequence[host.RowFinder], texts: Sequence[host.Text], text: str
) -> ElrondError:
    """Why an entry is not marked: its text was encoded with brackets, or else an error."""
    written = [each.strip() for each in (text, *text.splitlines()) if "[" in each]
    candidates = dict.fromkeys([*written, *(_in_brackets(each) for each in texts if each.spans)])
    inside = r"(?<=\[)[^\[\]]+(?=\])"
    spans = {each: tuple(Span(*match.span()) for match in re.finditer(inside, each)) for each in candidates}
    try:
        prompt = _marked(entry, finders, [host.Text(each, spans[each]) for each in candidates], 0)[1][host.MARK].prompt
    except ElrondError:
        return error
    return ElrondError(
        f"The text was encoded with its brackets, as {prompt!r}: take the brackets out of the text that is encoded. "
        "They belong in the text of Mark Concept only."
    )


def _in_brackets(text: host.Text) -> str:
    """A text with brackets around its concepts."""
    out = text.prompt
    for span in sorted(text.spans, reverse=True):
        out = f"{out[: span.start]}[{span.of(out)}]{out[span.stop :]}"
    return out


def _with_images(hidden: Any, encoders: Sequence[host.ImageNode]) -> io.NodeOutput:
    """This node once more, with the images of other nodes connected."""
    links = {_socket(node, name): link for node in encoders for name, link in node.images.items()}
    again, graph = host.with_links(hidden, links)
    return io.NodeOutput(again.out(0), again.out(1), expand=graph)


def _images_of(node: host.ImageNode, images: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: images.get(_socket(node, name)) for name in node.images}


def _socket(node: host.ImageNode, name: str) -> str:
    """What an image is called that a node's input has."""
    return f"{node.id}: {name}"


def _check(concept: str, text: str, occurrence: int) -> None:
    """Refuse a concept that is not named, or not in the text.

    Raises:
        ElrondError: if it is so, or a value has another type.
    """
    for name, value in (("concept", concept), ("text", text)):
        if not isinstance(value, str):
            raise ElrondError(f"The {name} must be a text, not {value!r}.")
    if not isinstance(occurrence, int) or occurrence < 1:
        raise ElrondError(f"The occurrence must be a whole number from 1 on, not {occurrence!r}.")
    if text.strip():
        _listed(text, concept, occurrence)
    elif not _words(concept):
        raise ElrondError("Name the concept: in the concept field, or in [brackets] in the text of this node.")


def _words(concept: str) -> list[str]:
    return [word.strip() for word in concept.split(",") if word.strip()]


def _listed(text: str, concept: str, occurrence: int) -> list[host.Text]:
    """The text, and each of its lines, with their concepts.

    Raises:
        ElrondError: if it has none.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    candidates = [text, *(lines if len(lines) > 1 else [])]
    words = _words(concept)
    if not words:
        parsed = [bracketed(candidate) for candidate in candidates]
        if not parsed[0][1]:
            raise ElrondError("Name the concept: put its word in [brackets] in the text, or in the concept field.")
        return [host.Text(plain, tuple(spans)) for plain, spans in parsed]
    texts = [host.Text(candidate, _places(candidate, words, occurrence)) for candidate in candidates]
    for word in words:
        # It says why, if no text has the word, or none as often.
        if not any(len(occurrences(each, word)) >= occurrence for each in candidates):
            find_word(text, word, occurrence - 1)
    return texts


def _known(nodes: list[list[str]], concept: str, occurrence: int) -> list[host.Text]:
    """The texts of nodes that have the concept, with other texts of the same nodes.

    Raises:
        ElrondError: if there is none.
    """
    words = _words(concept)
    texts = [[host.Text(each, _places(each, words, occurrence)) for each in node] for node in nodes]
    texts = [node for node in texts if any(text.spans for text in node)]
    if not texts:
        raise ElrondError(
            f"No node before Mark Concept holds a text with the concept {concept!r}: write or connect the text that "
            "was encoded."
        )
    # The first is tried by itself.
    return sorted(dict.fromkeys(text for node in texts for text in node), key=lambda text: not text.spans)


def _places(text: str, words: list[str], occurrence: int) -> tuple[Span, ...]:
    """The places of those concepts that are in the text."""
    there = [word for word in words if len(occurrences(text, word)) >= occurrence]
    return tuple(find_word(text, word, occurrence - 1) for word in there)


NODES = [MarkConcept]
