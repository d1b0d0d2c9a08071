"""Finding a concept's rows among the pieces a text encoder cut a prompt into."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .errors import ElrondError


@dataclass(frozen=True)
class Piece:
    """One token of the prompt.

    Attributes:
        text: the characters it stands for, spaces included, as they follow one another in the prompt.
        row: its row in the conditioning.
    """

    text: str
    row: int


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
        concepts.append((word, len(_occurrences(plain, word))))
        plain += match[1]
        end = match.end()
    plain += prompt[end:]
    if "[" in plain or "]" in plain:
        raise ElrondError(f"The brackets in the prompt do not match: {prompt!r}.")
    return plain, concepts


def find_concept(pieces: list[Piece], word: str, occurrence: int = 0) -> Concept:
    """The rows of a concept's words.

    Args:
        pieces: the prompt's tokens in order.
        word: one word or several; case and the amount of white space do not matter.
        occurrence: which one, where the prompt repeats it; 0 is the first.

    Raises:
        ElrondError: if it is not there; the message lists the prompt's words as the encoder cut them.
    """
    text = "".join(piece.text for piece in pieces)
    found = _occurrences(text, word)
    if not found:
        cut = " | ".join(piece.text.strip() for piece in pieces if piece.text.strip())
        raise ElrondError(f"The concept {word!r} is not in the prompt, which the encoder cut as: {cut}.")
    if not 0 <= occurrence < len(found):
        raise ElrondError(f"The prompt has {word!r} {len(found)} times, so occurrence {occurrence + 1} is not there.")
    start, stop = found[occurrence]
    chosen, at = [], 0
    for piece in pieces:
        core = len(piece.text) - len(piece.text.lstrip())
        if at + core < stop and at + len(piece.text.rstrip()) > start and piece.text.strip():
            chosen.append(piece)
        at += len(piece.text)
    return Concept(word, tuple(p.row for p in chosen), tuple(p.text.strip() for p in chosen))


def _occurrences(text: str, word: str) -> list[tuple[int, int]]:
    words = word.split()
    if not words:
        raise ElrondError("Name the concept: a word of the prompt, or put one in [brackets].")
    pattern = r"(?<!\w)" + r"\s+".join(re.escape(w) for w in words) + r"(?!\w)"
    return [match.span() for match in re.finditer(pattern, text, flags=re.IGNORECASE)]
