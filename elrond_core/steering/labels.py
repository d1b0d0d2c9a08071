"""Names for directions, from the text encoder alone: which adjective moves the concept's rows the same way?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..decompose.words import word_moves
from ..directions import Directions
from ..prompt import Span


@dataclass(frozen=True)
class Label:
    """What words say about one direction.

    Attributes:
        along: (word, score) of the words closest to the direction, best first; scores are cosines, all positive.
        against: the same of the words closest to its opposite, with positive scores too.
    """

    along: tuple[tuple[str, float], ...]
    against: tuple[tuple[str, float], ...]

    @property
    def best(self) -> tuple[str, float]:
        """The closest word at either end and its signed score; ("", 0) if no word is closer than none."""
        ends = [(word, sign * score) for sign, side in ((1, self.along), (-1, self.against)) for word, score in side]
        return max(ends, key=lambda end: abs(end[1]), default=("", 0.0))

    @property
    def name(self) -> str:
        """A name: the word at the end that the negative strengths reach, an arrow, and the one at the other end."""
        ends = [side[0][0] for side in (self.against, self.along) if side]
        if len(ends) == 2:
            return f"{ends[0]} → {ends[1]}"
        return ("→ " if self.along else "← ") + ends[0] if ends else ""

    def line(self) -> str:
        """The words with their scores."""
        sides = [", ".join(f"{word} {score:.2f}" for word, score in side) or "-" for side in (self.along, self.against)]
        return f"+ {sides[0]}   − {sides[1]}"


def put_before(prompt: str, span: Span, word: str) -> tuple[str, Span]:
    """The prompt with a word put before a place in it, and that place then."""
    before = f"{word} "
    text = prompt[: span.start] + before + prompt[span.start :]
    return text, Span(span.start + len(before), span.stop + len(before))


def label(
    directions: Directions, words: Sequence[str], bare: torch.Tensor, moved: torch.Tensor, top: int = 3
) -> list[Label]:
    """Compare directions with what words do to the concept.

    What all words have in common (that there is one more word, and where) is subtracted, so a word's move is what it
    does unlike the others.

    Args:
        directions: K directions over (R, d).
        words: W words.
        bare: (R, d) the concept's rows without any of them.
        moved: (W, R, d) the concept's rows with each put before it.
        top: how many words to give an end at most.

    Returns:
        one label a direction.

    Raises:
        ElrondError: if the shapes do not fit, or no word changes the rows.
    """
    moves = word_moves(directions.vectors.shape[1], directions.width, bare, moved)
    norms = moves.norm(dim=1, keepdim=True)
    cosines = directions.vectors.double().flatten(1) @ (moves / norms.clamp_min(1e-9)).T
    labels = []
    for row in cosines:
        sides = []
        for signed in (row, -row):
            best = signed.argsort(descending=True)[:top].tolist()
            sides.append(tuple((words[i], float(signed[i])) for i in best if signed[i] > 0))
        labels.append(Label(*sides))
    return labels


def labelled(directions: Directions, labels: Sequence[Label], least: float, replace_old: bool) -> Directions:
    """Directions named by their labels.

    Args:
        directions: K directions.
        labels: one each.
        least: a direction whose best score is lower gets no name, and neither does an end of one.
        replace_old: also rename directions that have a name.
    """
    names = []
    for old, found in zip(directions.names, labels, strict=True):
        clear = Label(*(tuple(end for end in side if end[1] >= least) for side in (found.along, found.against)))
        names.append(old if old and not replace_old else clear.name or old)
    return replace(directions, names=tuple(names))
