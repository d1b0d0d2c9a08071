"""Phrasings: a phrase such as "dark" or "in red clothes" put into a concept's prompt in several ways.

One sentence says more than its words mean: it also has a rhythm, a length and a grammar. What a phrase does to a
concept's rows in several sentences, averaged, is nearer to its meaning (Ekin and Gandelsman, arXiv 2603.17998).

Text encoders that read from left to right, such as CLIP, see in a row only what stands before it. So three of the
phrasings put the phrase before the concept.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..prompt import Span

# First words of phrases that stand after a noun: "a dog in the snow", "a man made of wood".
_AFTER_NOUNS = re.compile(
    r"[a-z]+ing +\S|(above|against|among|at|behind|below|between|by|during|for|from|full of|in|inside|like|made|near|"
    r"of|on|outside|over|seen|that|through|under|who|with|without)\b",
    re.IGNORECASE,
)


class Phrasing(NamedTuple):
    """A prompt with a phrase in it.

    Attributes:
        text: the prompt.
        span: the place of the concept in it.
    """

    text: str
    span: Span


def phrasings(prompt: str, span: Span, phrase: str) -> dict[str, Phrasing]:
    """A concept's prompt with a phrase, in each of five ways.

    Args:
        prompt: the prompt.
        span: the concept's place in it.
        phrase: an adjective such as "very old", or words that stand after a noun, such as "with long hair".

    Returns:
        by name: `noun`, the phrase beside the concept as grammar has it; `first` and `last`, at either end of the
        prompt; `mention`, a mention of the concept with the phrase before the prompt; `clause`, a clause after the
        concept.
    """
    concept = span.of(prompt)
    after = bool(_AFTER_NOUNS.match(phrase))
    mention = f"{concept} {phrase}" if after else f"{phrase} {concept}"
    clause = f"{concept}, {phrase}," if after else f"{concept} that is {phrase}"
    return {
        "noun": _replaced(prompt, span, mention, 0 if after else len(phrase) + 1),
        "first": _preceded(prompt, span, f"{phrase}, "),
        "mention": _preceded(prompt, span, f"{mention}, "),
        "clause": _replaced(prompt, span, clause, 0),
        "last": Phrasing(f"{prompt}, {phrase}", span),
    }


def _replaced(prompt: str, span: Span, text: str, offset: int) -> Phrasing:
    """The concept replaced by a text that has it at an offset."""
    start = span.start + offset
    return Phrasing(prompt[: span.start] + text + prompt[span.stop :], Span(start, start + span.stop - span.start))


def _preceded(prompt: str, span: Span, text: str) -> Phrasing:
    return Phrasing(text + prompt, Span(span.start + len(text), span.stop + len(text)))
