"""Names for directions: the words that, put before the concept, change its rows in the same direction.

Only the text encoder is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..decompose.words import word_steps
from ..directions import Directions
from ..prompt import Span


@dataclass(frozen=True)
class Label:
    """The words closest to one direction.

    Attributes:
        along: (word, cosine) of the words closest to the direction, best first. All cosines are positive.
        against: the same for the opposite of the direction.
    """

    along: tuple[tuple[str, float], ...]
    against: tuple[tuple[str, float], ...]

    @property
    def best(self) -> tuple[str, float]:
        """The closest word of both ends and its signed cosine; ("", 0) if there are no words."""
        ends = [(word, sign * score) for sign, side in ((1, self.along), (-1, self.against)) for word, score in side]
        return max(ends, key=lambda end: abs(end[1]), default=("", 0.0))

    @property
    def name(self) -> str:
        """The closest words as "word → word", from negative to positive strengths."""
        ends = [side[0][0] for side in (self.against, self.along) if side]
        if len(ends) == 2:
            return f"{ends[0]} → {ends[1]}"
        return ("→ " if self.along else "← ") + ends[0] if ends else ""

    def line(self) -> str:
        """All words with their cosines."""
        sides = [", ".join(f"{word} {score:.2f}" for word, score in side) or "-" for side in (self.along, self.against)]
        return f"+ {sides[0]}   − {sides[1]}"


def put_before(prompt: str, span: Span, word: str) -> tuple[str, Span]:
    """Insert a word before a place in the prompt; returns the new prompt, and the place in it."""
    prefix = f"{word} "
    text = prompt[: span.start] + prefix + prompt[span.start :]
    return text, Span(span.start + len(prefix), span.stop + len(prefix))


def label(
    directions: Directions, words: Sequence[str], bare_rows: torch.Tensor, word_rows: torch.Tensor, top: int = 3
) -> list[Label]:
    """Compare directions with the steps of the rows that words cause (`elrond_core.decompose.words.word_steps`).

    Args:
        directions: K directions over (R, d).
        words: W words.
        bare_rows: (R, d) the concept's rows in the prompt without any of the words.
        word_rows: (W, R, d) its rows with each word before it.
        top: number of words for each end, at most.

    Returns:
        One label a direction.

    Raises:
        ElrondError: if the shapes do not fit, or no word changes the rows.
    """
    steps = word_steps(directions.vectors.shape[1], directions.width, bare_rows, word_rows)
    norms = steps.norm(dim=1, keepdim=True)
    cosines = directions.vectors.double().flatten(1) @ (steps / norms.clamp_min(1e-9)).T
    labels = []
    for row in cosines:
        sides = []
        for signed in (row, -row):
            best = signed.argsort(descending=True)[:top].tolist()
            sides.append(tuple((words[i], float(signed[i])) for i in best if signed[i] > 0))
        labels.append(Label(*sides))
    return labels


def labelled(directions: Directions, labels: Sequence[Label], min_score: float, replace_old: bool) -> Directions:
    """Directions named by their labels.

    Args:
        directions: K directions.
        labels: one label each.
        min_score: words of a lower cosine are no part of a name.
        replace_old: also rename directions that have a name.
    """
    names = []
    for old, entry in zip(directions.names, labels, strict=True):
        clear = Label(*(tuple(end for end in side if end[1] >= min_score) for side in (entry.along, entry.against)))
        names.append(old if old and not replace_old else clear.name or old)
    return replace(directions, names=tuple(names))


def label_lines(directions: Directions, labels: Sequence[Label]) -> list[str]:
    """A line a direction: its name, and the closest words with their cosines."""
    return [
        f"{i}: {name or '(no name)'}   {entry.line()}"
        for i, (name, entry) in enumerate(zip(directions.names, labels, strict=True))
    ]
