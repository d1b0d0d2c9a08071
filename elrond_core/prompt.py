"""Finding a concept's rows among the pieces a text encoder cut a prompt into."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .errors import ElrondError

# Written without spaces between words, so that a word's neighbours may be letters too.
_UNSPACED = re.compile(r"[\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff]")


@dataclass(frozen=True)
class Piece:
    """One token of the prompt.

    Attributes:
        text: the characters it stands for, spaces included, as they follow one another in the prompt. Empty for a
            token that only completes the one before it: the further bytes of a letter, the further vectors of a
            textual inversion.
        row: its row in the conditioning.
        stream: which text encoder's token it is, where several make rows of their own, one after another.
    """

    text: str
    row: int
    stream: int = 0


@dataclass(frozen=True)
class Concept:
    """A concept's place in a conditioning.

    Attributes:
        word: the concept as asked for.
        rows: its rows, in order.
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

    def shifted(self, by: int) -> Concept:
        """The same concept where the conditioning has `by` rows more before it."""
        return replace(self, rows=tuple(row + by for row in self.rows))


def bracketed(prompt: str) -> tuple[str, list[tuple[str, int]]]:
    """Take concepts in [brackets] out of a prompt.

    Returns:
        the prompt without brackets, and for each bracketed concept its words and which occurrence of them it is
        (0 is the first).

    Raises:
        ElrondError: if brackets are empty or do not match.
    """
    plain, concepts, end = "", [], 0
    for match in re.finditer(r"\[([^\[\]]*)\]", prompt):
        word = match[1].strip()
        if not word:
            raise ElrondError("The prompt has empty brackets; put the concept word inside them, as in a [dog].")
        plain += prompt[end : match.start()]
        concepts.append((word, len(occurrences(plain, word))))
        plain += match[1]
        end = match.end()
    plain += prompt[end:]
    if "[" in plain or "]" in plain:
        raise ElrondError(f"The brackets in the prompt do not match: {prompt!r}.")
    return plain, concepts


def find_concept(pieces: list[Piece], word: str, occurrence: int = 0) -> Concept:
    """The rows of a concept's words.

    All rows of the concept are one place to the gradient: unless told otherwise they are differentiated and decomposed
    jointly, as one long vector, because a word of several pieces has no row that stands for it alone.

    Args:
        pieces: the prompt's tokens in order; a concept has rows in every stream of them.
        word: one word or several; case and the amount of white space do not matter.
        occurrence: which one, where the prompt repeats it; 0 is the first.

    Raises:
        ElrondError: if it is not there; the message lists the prompt's words as the encoder cut them.
    """
    chosen: list[Piece] = []
    for stream in sorted({piece.stream for piece in pieces}) or [0]:
        chosen += _find([piece for piece in pieces if piece.stream == stream], word, occurrence)
    return Concept(word, tuple(p.row for p in chosen), tuple(p.text.strip() for p in chosen))


def _find(pieces: list[Piece], word: str, occurrence: int) -> list[Piece]:
    text = "".join(piece.text for piece in pieces)
    found = occurrences(text, word)
    if not found:
        cut = " | ".join(piece.text.strip() for piece in pieces if piece.text.strip())
        raise ElrondError(f"The concept {word!r} is not in the prompt, which the encoder cut as: {cut}.")
    if not 0 <= occurrence < len(found):
        raise ElrondError(f"The prompt has {word!r} {len(found)} times, so occurrence {occurrence + 1} is not there.")
    start, stop = found[occurrence]
    chosen: list[Piece] = []
    at, inside = 0, False
    for piece in pieces:
        core = len(piece.text) - len(piece.text.lstrip())
        if piece.text:
            inside = at + core < stop and at + len(piece.text.rstrip()) > start and not piece.text.isspace()
        if inside:
            chosen.append(piece)
        at += len(piece.text)
    return chosen


def occurrences(text: str, word: str) -> list[tuple[int, int]]:
    """Start and end of every place where a word, or several that stand together, is in a text.

    Raises:
        ElrondError: if the word is empty.
    """
    words = word.split()
    if not words:
        raise ElrondError("Name the concept: a word of the prompt, or put one in [brackets].")
    # Encoders set the parts of "t-shirt" and of "1984" apart with spaces.
    parts = ([re.escape(part) for part in re.findall(r"\d|[^\W\d]+|[^\w\s]", w)] for w in words)
    pattern = r"\s+".join(r"\s*".join(p) for p in parts)
    before = "" if _UNSPACED.match(words[0][0]) else r"(?<!\w)"
    after = "" if _UNSPACED.match(words[-1][-1]) else r"(?!\w)"
    return [match.span() for match in re.finditer(before + pattern + after, text, flags=re.IGNORECASE)]
