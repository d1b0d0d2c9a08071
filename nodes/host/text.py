"""Prompts and text encoders: which rows of a conditioning belong to which words."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import comfy.text_encoders.sd3_clip
import torch
import transformers

from ...elrond_core.errors import ElrondError
from ...elrond_core.prompt import Concept, Span, Token, changed_tokens, common, replacements
from .conditioning import Conditioning
from .image_clip import ImageClip, counted_images


def family_of(clip: Any) -> str:
    """The model family as its text encoder names it: "SDXL", "Flux", "Demo"."""
    kind = type(clip.cond_stage_model)
    # This one is derived from Qwen-Image's within a function, and has its name.
    if kind.__module__.endswith(".hunyuan_image"):
        return "HunyuanImage"
    name = kind.__name__.rstrip("_")
    for suffix in ("ClipModel", "TEModel", "TextEncoder", "Model", "TE"):
        if name.endswith(suffix) and name != suffix:
            return name.removesuffix(suffix)
    return name


def encode(clip: Any, prompt: str) -> Conditioning:
    """What the stock CLIPTextEncode node returns."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def text_features(clip: Any, text: str) -> torch.Tensor:
    """The pooled output of a CLIP's text encoder, float32 (F,).

    Raises:
        ElrondError: if the encoder has none.
    """
    pooled = encode(clip, text)[0][1].get("pooled_output")
    if pooled is None:
        raise ElrondError("This text encoder says nothing of a text as a whole: connect a CLIP's, or clear the text.")
    return pooled[0].float().cpu()


# If several encoders read the prompt, the first of these makes the rows. Output of the others is pooled, or is another
# conditioning.
_ROWS = ("t5xxl", "hydit_clip", "llama", "qwen25_7b", "g", "l")
# Two prompts of one token. What their tokens have in common is the chat template.
_PROBES = ("dog", "cat")
# A change of a row below this share of the largest change is rounding.
_ROUNDING = 1e-3


class _Place(NamedTuple):
    """A token that a tokenizer made of the prompt.

    Attributes:
        token: its number, a vector of a textual inversion, or the host's description of an image.
        chunk: which of the tokenizer's chunks it is in.
        position: its index in the chunk.
        row: its row in what the encoder returns; None if the encoder leaves it out.
    """

    token: Any
    chunk: int
    position: int
    row: int | None

    @property
    def key(self) -> Hashable:
        """A value that is equal for equal tokens only; of images there is always the same one at a place."""
        if isinstance(self.token, dict):
            return "image"
        return int(self.token) if isinstance(self.token, numbers.Integral) else tuple(self.token.flatten().tolist())


class _Template(NamedTuple):
    """The chat template that a tokenizer puts around every prompt.

    Attributes:
        before: number of tokens before the prompt.
        after: number of tokens after it.
        row: the row at which the prompt starts; None if it is not known.
        tokens: the tokens of the two `_PROBES`.
    """

    before: int
    after: int
    row: int | None
    tokens: tuple[Any, Any]


class Block(NamedTuple):
    """Where one encoder's rows are in a prompt's conditioning.

    Attributes:
        name: the encoder, as the tokens name it.
        group: the number of its group of rows. Encoders of one group are side by side in the same rows.
        start: the first row.
        stop: the row after the last.
        columns: which numbers of these rows are its.
    """

    name: str
    group: int
    start: int
    stop: int
    columns: slice


class EncodedPrompt:
    """A prompt's conditioning, and which of its rows stand for which words.

    A word's tokens are those that change when other words are put in its place: no other way leads through weights,
    textual inversions, chat templates and what tokenizers do to letters.

    Args:
        clip: CLIP.
        prompt: the prompt.
        conditioning: the prompt's conditioning, if it was encoded before.

    Attributes:
        conditioning: what the stock CLIPTextEncode node returns, or the node that an `ImageClip` is of.
        tokens: the prompt's tokens, without those of a chat template.

    Raises:
        ElrondError: if the encoder makes no rows, or cuts text in an unknown way.
    """

    def __init__(self, clip: Any, prompt: str, conditioning: Conditioning | None = None) -> None:
        encoder = clip.cond_stage_model
        if next(encoder.parameters(), None) is None:
            raise ElrondError(
                f"ELROND does not work with {family_of(clip)}, which reads the prompt inside its diffusion model and "
                "has no rows to take gradients of; use another model."
            )
        self._clip, self._prompt = clip, prompt
        with counted_images(encoder) as self._images:
            self.conditioning = encode(clip, prompt) if conditioning is None else conditioning
        streams = clip.tokenize(prompt, return_word_ids=True)
        # Names of encoders. The rows of a group follow those of the group before; those within one are side by side.
        self._groups = _groups(encoder, streams)
        self._widths = {name: _width(encoder, name) for names in self._groups for name in names}
        self._places = self._tokenize(prompt)
        probes = [self._tokenize(probe) for probe in _PROBES]
        self._templates = {name: _template(self._places[name], *(p[name] for p in probes)) for name in self._widths}

        lengths = [min(_length(streams[name], self._images) for name in names) for names in self._groups]
        rows, first = self.conditioning[0][0].shape[1], self._templates[self._groups[0][0]].row
        # An encoder that drops a chat template returns fewer rows than tokens. What it drops beyond those before the
        # prompt comes after it. Rows that an encoder appends move none of the others.
        dropped = max(0, sum(lengths) - rows)
        if self._images and isinstance(clip, ImageClip):
            # Of the rows before the prompt, those of its images stay. A text alone tells what is dropped after it.
            before = max(0, dropped - EncodedPrompt(clip.plain, _PROBES[0])._dropped_after)
        else:
            before = dropped if first is None else min(dropped, first)
        self._dropped_after: int = dropped - before
        self._starts = [sum(lengths[:group]) - before for group in range(len(lengths))]
        self._stops = [min(rows, start + length) for start, length in zip(self._starts, lengths, strict=True)]
        self.tokens = [token for group in range(len(lengths)) for token in self._read(group)]

    def concept(self, span: Span) -> Concept:
        """The rows of what stands at a place in the prompt, in every group of rows.

        Raises:
            ElrondError: if an encoder does not read it.
        """
        word, changed = span.of(self._prompt), self.rows_of(span)
        rows: list[int] = []
        for names in self._groups:
            of_group = sorted({row for name in names for row in changed[name]})
            if not of_group:
                raise unread(names, word)
            rows += of_group
        texts = {token.row: token.text for token in self.tokens}
        return Concept(word, tuple(rows), tuple(texts.get(row, "") for row in rows))

    def rows_of(self, span: Span) -> dict[str, list[int]]:
        """The rows of what stands at a place in the prompt, for each encoder; none if the encoder does not read it."""
        replaced = [
            self._tokenize(self._prompt[: span.start] + other + self._prompt[span.stop :])
            for other in replacements(span.of(self._prompt))
        ]
        out: dict[str, list[int]] = {}
        for group, names in enumerate(self._groups):
            for name in names:
                places = self._places[name]
                indices = changed_tokens(_keys(places), [_keys(other[name]) for other in replaced])
                out[name] = self._rows(group, (places[index] for index in indices))
        return out

    @property
    def blocks(self) -> list[Block]:
        """Where each encoder's rows are."""
        out: list[Block] = []
        stops = [*self._stops[:-1], self.conditioning[0][0].shape[1]]
        for group, names in enumerate(self._groups):
            column = 0
            # The host puts CLIP L's columns before CLIP G's.
            for name in reversed(names):
                width = self._widths[name] if len(names) > 1 else None
                columns = slice(column, None if width is None else column + width)
                column = columns.stop or column
                out.append(Block(name, group, max(0, self._starts[group]), stops[group], columns))
        return out

    def unweighted(self) -> Conditioning:
        """The prompt encoded without its weights, as packs do that weight the rows themselves; empty if it has none."""
        streams = self._clip.tokenize(self._prompt)
        weighted = False
        for name in self._widths:
            for chunk in streams[name]:
                weighted = weighted or any(weight != 1 for _, weight, *_ in chunk)
                chunk[:] = [(token, 1.0, *rest) for token, _, *rest in chunk]
        return self._clip.encode_from_tokens_scheduled(streams) if weighted else []

    def doubt(self, concepts: Sequence[Concept]) -> str:
        """Encode the prompt once more with other tokens at the concepts' rows, and compare.

        The first row that changes must be a concept's, as where rows depend on no later token, or else the one that
        changes most for its length.

        Returns:
            a warning if that is not so, else nothing.
        """
        rows = {row for concept in concepts for row in concept.rows}
        streams = self._clip.tokenize(self._prompt)
        for group, names in enumerate(self._groups):
            for name in names:
                one, other = self._templates[name].tokens
                for place in self._places[name]:
                    if rows.intersection(self._rows(group, [place])):
                        chunk = streams[name][place.chunk]
                        entry = chunk[place.position]
                        chunk[place.position] = (other if place.key == one else one, *entry[1:])
        before = self.conditioning[0][0][0].float()
        after = self._clip.encode_from_tokens_scheduled(streams)[0][0][0].to(before)
        change = (after - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-9)
        for start, stop in zip(self._starts, self._stops, strict=True):
            start = max(0, start)
            mine = [row - start for row in sorted(rows) if start <= row < stop]
            if mine and not _change_most(change[start:stop], mine):
                return (
                    "warning: other rows change when the concept's tokens are replaced. The rows may be another "
                    "word's, or the concept may have no weight: do not trust directions found for it."
                )
        return ""

    def _tokenize(self, prompt: str) -> dict[str, list[_Place]]:
        streams = self._clip.tokenize(prompt, return_word_ids=True)
        return {name: list(_places(streams[name], width, self._images)) for name, width in self._widths.items()}

    def _rows(self, group: int, places: Iterable[_Place]) -> list[int]:
        """The rows in the conditioning of those tokens that have one."""
        rows = [self._starts[group] + place.row for place in places if place.row is not None]
        return [row for row in rows if 0 <= row < self._stops[group]]

    def _read(self, group: int) -> list[Token]:
        """The tokens of a group of rows, in their order."""
        tokens: dict[int, Token] = {}
        for name in self._groups[group]:
            places, template = self._places[name], self._templates[name]
            texts = _texts(decoder_of(self._clip.tokenizer, name), [place.token for place in places])
            for index in range(template.before, len(places) - template.after):
                for row in self._rows(group, [places[index]]):
                    tokens.setdefault(row, Token(texts[index], row))
        return [tokens[row] for row in sorted(tokens)]


def unread(names: Sequence[str], word: str) -> ElrondError:
    """What is wrong where encoders have no rows for a word."""
    return ElrondError(
        f"The text encoder {'/'.join(names)} does not read {word!r} in the prompt: it has no token for it, leaves it "
        "out, or stops before it."
    )


def _groups(encoder: Any, streams: dict[str, Any]) -> list[list[str]]:
    """The names of the encoders that make rows."""
    there = [name for name in streams if _part(encoder, name) is not None] or list(streams)
    clip: list[str] = [name for name in ("g", "l") if name in there]
    if isinstance(encoder, comfy.text_encoders.sd3_clip.SD3ClipModel):
        return [names for names in (clip, [name for name in there if name == "t5xxl"]) if names]
    first = next((name for name in _ROWS if name in there), there[0])
    return [clip if first == "g" else [first]]


def _part(encoder: Any, name: str) -> Any:
    """The encoder that reads a stream of tokens, if there is one."""
    return getattr(encoder, f"clip_{name}", None) or getattr(encoder, name, None)


def _width(encoder: Any, name: str) -> int | None:
    """The width of an encoder's token embeddings; None if that is not known."""
    embeddings = getattr(getattr(_part(encoder, name), "transformer", None), "get_input_embeddings", None)
    return embeddings().weight.shape[-1] if embeddings else None


def _length(chunks: Any, images: Sequence[int]) -> int:
    """How many rows tokens have of which some are images with a number of rows each."""
    tokens = [token for chunk in chunks for token, *_ in chunk]
    count = sum(isinstance(token, dict) for token in tokens)
    return len(tokens) - count + sum(images[:count])


def _places(chunks: Any, width: int | None, images: Sequence[int]) -> Iterator[_Place]:
    """All tokens but the start, end and padding ones."""
    start, counts = 0, iter(images)
    for number, chunk in enumerate(chunks):
        more = left_out = 0
        # Some tokenizers leave out the words' numbers.
        for index, (token, _, *word) in enumerate(chunk):
            picture = isinstance(token, dict)
            vector = not picture and not isinstance(token, numbers.Integral)
            # The host leaves out vectors of textual inversions made for encoders of another width, and pads the chunk.
            wide = vector and width not in (None, token.shape[-1])
            if word != [0]:
                yield _Place(token, number, index, None if wide else start + index + more - left_out)
            more += next(counts, 1) - 1 if picture else 0
            left_out += wide
        start += len(chunk) + more


def _keys(places: Sequence[_Place]) -> list[Hashable]:
    return [place.key for place in places]


def _template(prompt: Sequence[_Place], one: Sequence[_Place], other: Sequence[_Place]) -> _Template:
    """What is around a prompt: what two different prompts have in common."""
    before = common(_keys(one), _keys(other))
    after = common(_keys(one)[::-1], _keys(other)[::-1])
    tokens = (one[before].token, other[before].token)
    # A prompt that brings a template of its own is taken as it is.
    known = _keys(prompt)[:before] == _keys(one)[:before]
    return _Template(before, after, one[before].row, tokens) if known else _Template(0, 0, None, tokens)


def _change_most(change: torch.Tensor, rows: list[int]) -> bool:
    """Whether some rows are those that changed: all of them, and the first of all or the one that changed most."""
    moved = change > _ROUNDING * change.max()
    if not moved[rows].all():
        return False
    first = int(moved.nonzero()[0])
    return first == rows[0] or int(change.argmax()) in rows


def _texts(decode: Callable[[list[int]], str], tokens: Sequence[Any]) -> list[str]:
    """The text of each token; that of a letter of several tokens is the first one's."""
    texts = [""] * len(tokens)
    ids: list[int] = []
    text, first = "", None
    for index, token in enumerate(tokens):
        if not isinstance(token, numbers.Integral):
            texts[index] = "(embedding)"
            continue
        ids.append(int(token))
        first = index if first is None else first
        # Tokens are decoded together with those before them: bytes of a letter make no sense alone.
        longer = decode(ids)
        if not longer.endswith("\ufffd"):
            texts[first] = longer[len(text) :].strip()
            text, first = longer, None
    return texts


def decoder_of(wrapper: Any, name: str) -> Callable[[list[int]], str]:
    """The function that turns token ids of a text encoder back into text.

    Raises:
        ElrondError: if the host's tokenizer has none that is known.
    """
    for candidate in (f"clip_{name}", name, getattr(wrapper, "clip", "")):
        tokenizer: Any = getattr(getattr(wrapper, candidate, None), "tokenizer", None) if candidate else None
        # The host has some of its own: a wrapper of a SentencePiece model, and plain ones.
        foreign = isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
        inner: Any = tokenizer if foreign else getattr(tokenizer, "tokenizer", tokenizer)
        if hasattr(inner, "decode"):
            return functools.partial(inner.decode, **{"clean_up_tokenization_spaces": False} if foreign else {})
    raise ElrondError(f"ELROND does not know how this CLIP cuts text ({type(wrapper).__name__}).")
