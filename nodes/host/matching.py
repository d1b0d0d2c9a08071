"""Marking a conditioning that another node encoded: texts are encoded again, and their rows looked for in it."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ...elrond_core.errors import ElrondError
from ...elrond_core.prompt import Concept, Span
from .conditioning import mark, plain
from .text import Block, EncodedPrompt, family_of, unread

# How far a row may be from the encoded one, of the encoded row's distance from the mean of all rows. The same tokens
# encoded again differ by rounding only; another token changes its row by tens of per cent.
_TOLERANCE = 0.02
# Of the row's norm: rounding of half precision, where all rows are alike.
_ROUNDING = 1e-3


class Text(NamedTuple):
    """A text that may have been encoded.

    Attributes:
        prompt: the text.
        spans: the places of its concepts; none if it has no concept.
    """

    prompt: str
    spans: tuple[Span, ...] = ()


class _Match(NamedTuple):
    """A text's rows for one encoder, and where they are in a conditioning."""

    text: Text
    block: Block
    offset: int

    @property
    def stop(self) -> int:
        return self.offset + self.block.stop - self.block.start

    @property
    def shift(self) -> int:
        """What to add to a row of the text."""
        return self.offset - self.block.start


class _Marks(NamedTuple):
    prompt: str
    concepts: tuple[Concept, ...]
    words: tuple[int, ...]


class RowFinder:
    """Finds the rows of texts in conditionings.

    Args:
        clip: the CLIP that encoded them.

    Attributes:
        family: the model family, as the text encoder names it.
    """

    def __init__(self, clip: Any) -> None:
        self._clip = clip
        self.family = family_of(clip)
        self._encoded: dict[str, EncodedPrompt] = {}
        # What each text may look like in a conditioning: (T, d), as encoded and without its weights.
        self._tensors: dict[str, list[torch.Tensor]] = {}
        # Those with a concept whose rows were there.
        self._found: list[Text] = []

    def mark(self, entry: list[Any], texts: Sequence[Text], row: int = 0) -> list[Any]:
        """An entry of a conditioning, marked.

        Args:
            entry: its tensor (N, T, d) may have a prompt for each image; all need the concepts at the same rows.
            texts: those that may have been encoded. The first one is tried by itself before the others.
            row: which of a concept's rows to mark by itself; 1 is the first, 0 marks all.

        Raises:
            ElrondError: if the rows of no text with a concept are in it, or the concept has no such row.
        """
        tensor, options = entry
        images = plain(tensor).float().cpu()
        marks = [self._marks(images[0], texts)]
        for i, image in enumerate(images[1:], 1):
            marks.append(marks[-1] if torch.equal(image, images[i - 1]) else self._marks(image, texts))
        places = {tuple(concept.rows for concept in each.concepts) for each in marks}
        if len(places) > 1:
            raise ElrondError(
                f"The {len(images)} prompts of one batch have the concept at different rows: let the words before it "
                "be as many in each, or encode each prompt by itself."
            )
        prompt, concepts, words = marks[0]
        chosen = [concept.only(row - 1) if row else concept for concept in concepts]
        return mark([[tensor, options]], self.family, prompt, chosen, words)[0]

    def doubts(self) -> list[str]:
        """Warnings about the rows of the texts that were found, see `EncodedPrompt.doubt`."""
        out: list[str] = []
        for prompt, spans in dict.fromkeys(self._found):
            encoded = self._encode(prompt)
            rows = [row for span in spans for each in encoded.rows_of(span).values() for row in each]
            out.append(encoded.doubt([Concept(prompt, tuple(rows), ())]))
        return list(dict.fromkeys(filter(None, out)))

    def _encode(self, prompt: str) -> EncodedPrompt:
        if prompt not in self._encoded:
            encoded = EncodedPrompt(self._clip, prompt)
            # Hooks make several entries of a text.
            entries = [*encoded.conditioning, *encoded.unweighted()]
            self._tensors[prompt] = [tensor[0].float().cpu() for tensor, _ in entries]
            self._encoded[prompt] = encoded
        return self._encoded[prompt]

    def _marks(self, rows: torch.Tensor, texts: Sequence[Text]) -> _Marks:
        """What rows (T, d) are marked with."""
        texts = [text for each in texts for text in self._spelled(each)]
        places: list[dict[str, _Match]] = []
        # An encoder beside the one that reads the concept may have read nothing.
        for candidates in (texts[:1], [*texts, Text("")]):
            places, halves = self._places(rows, candidates)
            if places:
                return self._marks_of(places)
        if halves:
            raise self._half(*halves)
        raise self._differs(rows, texts)

    def _spelled(self, text: Text) -> Iterator[Text]:
        """The text as it is, and as the host's nodes for its family write it."""
        yield text
        if self.family == "Lumina":
            node = importlib.import_module("comfy_extras.nodes_lumina2").CLIPTextEncodeLumina2
            for instruction in node.SYSTEM_PROMPT.values():
                before = f"{instruction} <Prompt Start> "
                spans = (Span(span.start + len(before), span.stop + len(before)) for span in text.spans)
                yield Text(before + text.prompt, tuple(spans))

    def _places(
        self, rows: torch.Tensor, texts: Sequence[Text]
    ) -> tuple[list[dict[str, _Match]], tuple[_Match, str] | None]:
        """Where texts with concepts are, as one match for each encoder that makes these rows.

        Returns:
            the places, and a match and the name of an encoder that makes other numbers of the rows, or other rows, and
            read none of the texts, if there is one.
        """
        matches: dict[tuple[int, int], dict[str, list[_Match]]] = {}
        for text in texts:
            for block in self._encode(text.prompt).blocks:
                for offset in self._offsets(rows, text.prompt, block):
                    place = matches.setdefault((block.group, offset), {})
                    place.setdefault(block.name, []).append(_Match(text, block, offset))
        names: dict[int, list[str]] = {}
        for block in self._encode(texts[0].prompt).blocks:
            names.setdefault(block.group, []).append(block.name)
        places: list[dict[str, _Match]] = []
        half = None
        for (group, _), candidates in sorted(matches.items()):
            # Of a text and another that goes on from it, the longer one.
            best = {name: max(each, key=lambda m: (bool(m.text.spans), m.stop)) for name, each in candidates.items()}
            with_concept = [match for match in best.values() if match.text.spans]
            if not with_concept:
                continue
            missing = [name for name in names[group] if name not in best]
            if missing:
                half = (with_concept[0], missing[0])
                continue
            places.append({name: best[name] for name in names[group]})
        # Rows of another encoder that read none of the texts, unless there are no other rows.
        silent = names.keys() - {group for group, _ in matches}
        if places and silent and sum(_length(place) for place in places) < len(rows):
            first = next(match for match in places[0].values() if match.text.spans)
            return [], (first, names[min(silent)][0])
        return places, half

    def _offsets(self, rows: torch.Tensor, prompt: str, block: Block) -> list[int]:
        """Where in rows (T, d) a text's rows for an encoder are, up to a factor for each row."""
        out: set[int] = set()
        for tensor in self._tensors[prompt]:
            wanted = tensor[block.start : block.stop, block.columns]
            if tensor.shape[1] == rows.shape[1]:
                out.update(k for k in _starts(rows[:, block.columns], wanted) if _agree(rows, wanted, block, k).all())
        return sorted(out)

    def _marks_of(self, places: list[dict[str, _Match]]) -> _Marks:
        rows: dict[tuple[str, int], list[int]] = {}
        spelling: dict[tuple[str, int], str] = {}
        tokens: dict[int, str] = {}
        counts: dict[int, Counter[str]] = {}
        for place in places:
            matches = list(place.values())
            group = matches[0].block.group
            for match in matches:
                for token in self._encode(match.text.prompt).tokens:
                    if match.block.start <= token.row < match.block.stop:
                        tokens.setdefault(token.row + match.shift, token.text)
            self._found += [match.text for match in matches if match.text.spans]
            for word, span_of in _by_word([match.text for match in matches]).items():
                # A word's second place in one group of rows is that of its second place in another.
                number = counts.setdefault(group, Counter())[word]
                counts[group][word] += 1
                word_rows: set[int] = set()
                readers = [match for match in matches if match.text.prompt in span_of]
                for match in readers:
                    changed = self._encode(match.text.prompt).rows_of(span_of[match.text.prompt])
                    word_rows.update(row + match.shift for row in changed[match.block.name])
                text = readers[0].text.prompt
                word_there = span_of[text].of(text)
                if not word_rows:
                    raise unread([match.block.name for match in readers], word_there)
                rows.setdefault((word, number), []).extend(sorted(word_rows))
                spelling.setdefault((word, number), word_there)
        concepts = tuple(
            Concept(spelling[key], tuple(word_rows), tuple(tokens.get(row, "") for row in word_rows))
            for key, word_rows in rows.items()
        )
        first = next(match.text for match in places[0].values() if match.text.spans)
        return _Marks(first.prompt, concepts, tuple(sorted(tokens)))

    def _half(self, match: _Match, other: str) -> ElrondError:
        return ElrondError(
            f"The text encoder {match.block.name} read {match.text.prompt!r}, and {other} read another text: give both "
            "texts, each on a line of its own."
        )

    def _differs(self, rows: torch.Tensor, texts: Sequence[Text]) -> ElrondError:
        """Why no text's rows are in rows (T, d): up to where the best text agrees."""
        wanted = self._encode(texts[0].prompt).conditioning[0][0]
        if wanted.shape[2] != rows.shape[1]:
            return ElrondError(
                f"The conditioning's rows have {rows.shape[1]} numbers and those of this CLIP, {self.family}, have "
                f"{wanted.shape[2]}: connect the CLIP that encoded it."
            )
        best, prompt, at = 0, next(text.prompt for text in texts if text.spans), 0
        for text in texts:
            for block in self._encode(text.prompt).blocks if text.spans else ():
                for tensor in self._tensors[text.prompt]:
                    part = tensor[block.start : block.stop, block.columns]
                    for offset in _starts(rows[:, block.columns], part, whole=False):
                        agree = _agree(rows, part, block, offset)
                        count = len(agree) if agree.all() else int(agree.int().argmin())
                        if count > best:
                            best, prompt, at = count, text.prompt, block.start + count
        token = next((f" ({token.text!r})" for token in self._encode(prompt).tokens if token.row == at), "")
        where = f"the first {best} agree, and the next{token} does not" if best else "none agrees"
        return ElrondError(
            f"The conditioning does not have the rows of {prompt!r} ({where}): give the text as it was encoded, and "
            "each of several on a line of its own, connect the CLIP that encoded it, with its LoRAs, and put Mark "
            "Concept before nodes that change rows, such as Conditioning (Average)."
        )


def _length(place: dict[str, _Match]) -> int:
    """How many rows a place has."""
    return max(match.stop - match.offset for match in place.values())


def _by_word(texts: Sequence[Text]) -> dict[str, dict[str, Span]]:
    """For each concept of some texts its place in each that has it; the second of equal words is another concept."""
    out: dict[str, dict[str, Span]] = {}
    for prompt, spans in dict.fromkeys(texts):
        count: Counter[str] = Counter()
        for span in spans:
            word = span.of(prompt).casefold()
            count[word] += 1
            out.setdefault(f"{word} #{count[word]}", {})[prompt] = span
    return out


def _starts(rows: torch.Tensor, wanted: torch.Tensor, whole: bool = True) -> list[int]:
    """Where rows (T, d) may have others (L, d): where the first one is."""
    count = len(rows) - len(wanted) + 1 if whole else len(rows)
    if count < 1 or not len(wanted):
        return []
    same = _same(rows[:count], wanted[:1], _tolerance(wanted)[:1])
    return [int(place) for place in same.nonzero()[:, 0]]


def _agree(rows: torch.Tensor, wanted: torch.Tensor, block: Block, offset: int) -> torch.Tensor:
    """Which of the rows (T, d) from an offset on are the wanted ones (L, d'): bool (L,)."""
    there = rows[offset : offset + len(wanted), block.columns]
    return _same(there, wanted[: len(there)], _tolerance(wanted)[: len(there)])


def _same(rows: torch.Tensor, wanted: torch.Tensor, tolerance: torch.Tensor) -> torch.Tensor:
    """Which rows are the wanted ones times a positive factor, as other packs weight them: bool (L,)."""
    squares = (wanted * wanted).sum(1)
    factor = (rows * wanted).sum(1) / squares.clamp_min(1e-30)
    zero = squares == 0
    distance = (rows - factor[:, None] * wanted).norm(dim=1)
    close = distance <= tolerance * factor.clamp_min(0)
    return torch.where(zero, rows.abs().amax(1) == 0, close & (factor > 0))


def _tolerance(wanted: torch.Tensor) -> torch.Tensor:
    """How far from each of some rows (L, d) another one may be and still count as the same: (L,)."""
    apart = (wanted - wanted.mean(0)).norm(dim=1)
    return _TOLERANCE * apart + _ROUNDING * wanted.norm(dim=1)
