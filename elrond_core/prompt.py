"""A concept's place in a prompt, and which of a text encoder's tokens stand for it."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from .errors import ElrondError

# Scripts written without spaces between words, or with endings that stick to them: Thai to Burmese, Khmer, Chinese,
# Japanese, Korean. A word's neighbours may be letters there.
_UNSPACED = re.compile(
    r"[\u0e00-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
_EMBEDDING = re.compile(r"embedding:[^\s():,]+", re.IGNORECASE)
_WEIGHT = re.compile(r":\s*[-+\d.]+\s*(?=\))")
# How other programs use brackets: [word:0.5], [from:to:0.5], [one|other].
_OTHER_SYNTAX = re.compile(r":\s*[-+\d.]+\s*$|\|")
_MEANING = (
    "brackets name the concept, as in a [dog], and weights are written (dog:0.5); to keep brackets in the prompt, name "
    "the concept in the concept field."
)


class Span(NamedTuple):
    """A place in a text: the index of its first character, and the index after its last."""

    start: int
    stop: int

    def of(self, text: str) -> str:
        """What stands there."""
        return text[self.start : self.stop]


@dataclass(frozen=True)
class Token:
    """One token of the prompt.

    Attributes:
        text: the characters that it stands for, to be read by people. Empty for a token that only completes the one
            before it, such as the further bytes of a letter.
        row: its row in the conditioning.
    """

    text: str
    row: int


@dataclass(frozen=True)
class Concept:
    """A concept's place in a conditioning.

    Attributes:
        word: the concept as the prompt has it.
        rows: its rows, in order. They are differentiated and decomposed jointly, as one long vector, because a word of
            several tokens has no row that stands for it alone.
        tokens: the text of each.
    """

    word: str
    rows: tuple[int, ...]
    tokens: tuple[str, ...]

    def only(self, row: int) -> Concept:
        """One of its rows by itself; 0 is the first.

        Raises:
            ElrondError: if there is no such row.
        """
        if not 0 <= row < len(self.rows):
            raise ElrondError(f"The concept {self.word!r} has {len(self.rows)} rows, and no row {row + 1}.")
        return replace(self, rows=self.rows[row : row + 1], tokens=self.tokens[row : row + 1])


def bracketed(prompt: str) -> tuple[str, list[Span]]:
    """Take concepts in [brackets] out of a prompt.

    Returns:
        the prompt without brackets, and the place of each bracketed concept in it: without the white space and the
        weight around it, and with an ending that follows the bracket, such as the plural of [dog]s.

    Raises:
        ElrondError: if brackets are empty, do not match, or mean something else.
    """
    plain, inner, end = "", [], 0
    for match in re.finditer(r"\[([^\[\]]*)\]", prompt):
        if not match[1].strip():
            raise ElrondError("The prompt has empty brackets; put the concept word inside them, as in a [dog].")
        if _OTHER_SYNTAX.search(match[1]):
            raise ElrondError(f"{match[0]!r} in the prompt is no concept: {_MEANING}")
        plain += prompt[end : match.start()]
        inner.append(Span(len(plain), len(plain) + len(match[1])))
        plain += match[1]
        end = match.end()
    plain += prompt[end:]
    if "[" in plain or "]" in plain:
        raise ElrondError(f"The brackets in the prompt {prompt!r} are nested or do not match: {_MEANING}")
    return plain, [_with_ending(plain, _without_weight(plain, span)) for span in inner]


def _without_weight(text: str, span: Span) -> Span:
    """The dog of ((dog):1.2), without white space."""
    inside = span.of(text)
    start, inside = span.start + len(inside) - len(inside.lstrip()), inside.strip()
    content = re.sub(r":\s*[-+\d.]+\s*$", "", inside[1:-1])
    if inside[0] + inside[-1] == "()" and _balanced(content) and content.strip():
        return _without_weight(text, Span(start + 1, start + 1 + len(content)))
    return Span(start, start + len(inside))


def _balanced(text: str) -> bool:
    """Whether every parenthesis has its other one, and none is escaped."""
    depths = list(itertools.accumulate((char == "(") - (char == ")") for char in text))
    return "\\" not in text and min(depths, default=0) == 0 and depths[-1:] in ([], [0])


def _with_ending(text: str, span: Span) -> Span:
    """The dogs of [dog]s."""
    stop = span.stop
    if text[stop - 1].isalpha() and not _UNSPACED.match(text[stop - 1]):
        while stop < len(text) and unicodedata.category(text[stop])[0] in "LM" and not _UNSPACED.match(text[stop]):
            stop += 1
    return Span(span.start, stop)


def find_word(prompt: str, word: str, occurrence: int = 0) -> Span:
    """Where a word, or several that stand together, is in a prompt.

    Args:
        prompt: the prompt as written.
        word: case, the amount of white space and the way accents are coded do not matter.
        occurrence: which of `occurrences`; 0 is the first.

    Raises:
        ElrondError: if it is not there.
    """
    places = occurrences(prompt, word)
    if not places:
        raise ElrondError(f"The concept {word!r} is not in the prompt {prompt!r}.")
    if not 0 <= occurrence < len(places):
        raise ElrondError(f"The prompt has {word!r} {len(places)} times, so occurrence {occurrence + 1} is not there.")
    return places[occurrence]


def occurrences(prompt: str, word: str, inside: bool = False) -> list[Span]:
    """Every place of a word, or of several that stand together.

    Words that stand free come first, in their order in the prompt, and then those that a digit, a hyphen or an
    underscore joins to another: the girl of 1girl, the hair of long_hair. A name of an embedding and the number of a
    weight hold no words.

    Args:
        prompt: the prompt as written.
        word: see `find_word`.
        inside: also places inside another word, last.

    Raises:
        ElrondError: if the word is empty.
    """
    wanted = word.split()
    if not wanted:
        raise ElrondError("Name the concept: a word of the prompt, or put one in [brackets].")
    folded, origin = _folded(prompt)
    # A match may start within another one.
    pattern = "(?=(" + r"\s+".join(re.escape(_folded(each)[0]) for each in wanted) + "))"
    names = [Span(*match.span()) for match in _EMBEDDING.finditer(prompt)]
    weights = [Span(*match.span()) for match in _WEIGHT.finditer(prompt)]
    places: list[list[Span]] = [[], [], []]
    for match in re.finditer(pattern, folded):
        first, last = match.span(1)
        span = Span(origin[first], origin[last - 1] + 1)
        # Part of a letter: the e of é, the f of the ligature in a fish.
        if (first and origin[first - 1] == span.start) or (last < len(folded) and origin[last] < span.stop):
            continue
        if span.stop < len(prompt) and unicodedata.category(prompt[span.stop])[0] == "M":
            continue
        covered = all(span.start <= name.start and name.stop <= span.stop for name in names if _overlap(span, name))
        if covered and not any(_overlap(span, weight) for weight in weights):
            before, after = prompt[: span.start][::-1], prompt[span.stop :]
            places[max(_joined(prompt[span.start], before), _joined(prompt[span.stop - 1], after))].append(span)
    return [span for level in places[: 3 if inside else 2] for span in level]


def _overlap(one: Span, other: Span) -> bool:
    return one.start < other.stop and other.start < one.stop


def _folded(text: str) -> tuple[str, list[int]]:
    """A text without differences of case and coding, and for each of its characters the index of the original's."""
    pairs = [(c, i) for i, char in enumerate(text) for c in unicodedata.normalize("NFKD", char).casefold()]
    return "".join(c for c, _ in pairs), [i for _, i in pairs]


def _joined(edge: str, beyond: str) -> int:
    """Whether a word's last character stands free of what comes after (0), is joined to it (1), or is inside it (2)."""
    if not beyond or _UNSPACED.match(edge) or _UNSPACED.match(beyond[0]):
        return 0
    if beyond[0] in "-_" or (beyond[0] in ".," and edge.isdigit()):
        return int(beyond[1:2].isalnum())
    if not (edge.isalnum() and unicodedata.category(beyond[0])[0] in "LMN"):
        return 0
    return 2 if edge.isdigit() == beyond[0].isdigit() else 1


# Three letters each and frequent, so that nearly every text encoder has a token of its own for them.
_SHORT = ("cat", "sun", "old", "big")
# Of other kinds: what joins the word's neighbours in place of one joins them in place of another no longer.
_UNLIKE = ("zebra", "quip", "7", "\u9f98")


def replacements(word: str) -> list[str]:
    """Other words to put in a word's place, that start and end with other bytes.

    The first few are phrases of one token more each, as far as a word of this length may have tokens.
    """
    edges = [_folded(word)[0].encode()[place] for place in (0, -1)]
    other, *_ = [w for w in _SHORT if w.encode()[0] != edges[0] and w.encode()[-1] != edges[1]]
    phrases = [" ".join([other] * (count + 1)) for count in range(min(len(word.encode()), 12))]
    return phrases + [w for w in _UNLIKE if w.encode()[0] != edges[0] and w.encode()[-1] != edges[1]]


def changed_tokens(tokens: Sequence[Hashable], replaced: Iterable[Sequence[Hashable]]) -> range:
    """The tokens of a word: those that change whichever other word is put in its place.

    Where the other word starts and ends with other bytes, no token that holds part of the word is among those that two
    texts have in common at their start and at their end. A token that holds none of it may change too, where the other
    word joins its neighbours, but not with every word.

    Args:
        tokens: of the prompt.
        replaced: of the prompt with each of `replacements` in the word's place.

    Returns:
        indices of `tokens`; empty if no token stands for the word alone or with its neighbours.
    """
    start, stop = 0, len(tokens)
    for other in replaced:
        start = max(start, common(tokens, other))
        stop = min(stop, len(tokens) - common(tokens[::-1], other[::-1]))
    return range(start, max(start, stop))


def common(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """How many elements two sequences have in common at their start."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
