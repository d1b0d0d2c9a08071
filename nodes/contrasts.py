"""Lists of opposites: those that people type, and those that come with the pack."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io

from ..elrond_core.decompose.contrasts import Contrast, displacements
from ..elrond_core.errors import ElrondError
from ..elrond_core.provenance import Provenance
from . import host
from .widget_text import WORDS, words_of

TOLD, GUESSED = "told", "guessed"
WHEN_EMPTY, ALL = "when empty", "all"
# By what they describe. Opposites that most models know, without judgements of people.
BUILT_IN = {
    "people": (
        "young - old, smiling - serious, awake - asleep, calm - excited, clean-shaven - bearded, "
        "bald - with long hair, dark-haired - blond, straight-haired - curly-haired, bareheaded - wearing a hat, "
        "without glasses - wearing glasses, casually dressed - formally dressed, masculine - feminine, "
        "slender - stocky, sitting - standing, looking at the camera - looking away"
    ),
    "things": (
        "small - large, short - long, narrow - wide, thin - thick, round - angular, straight - curved, "
        "smooth - rough, matte - shiny, soft - hard, plain - patterned, simple - ornate, new - old, clean - dirty, "
        "intact - broken, wooden - metallic, closed - open, empty - full"
    ),
    "places": (
        "indoors - outdoors, empty - crowded, at night - by day, rainy - sunny, in winter - in summer, foggy - clear, "
        "dry - wet, rural - urban, ancient - modern, tidy - cluttered, barren - overgrown, flat - mountainous, "
        "cramped - spacious"
    ),
    "pictures": (
        "dark - bright, black and white - colorful, red - blue, yellow - purple, green - pink, cold - warm, "
        "blurred - sharp, on the left - on the right, at the bottom - at the top, seen from afar - seen up close, "
        "seen from below - seen from above, seen from behind - seen from the front, drawn - photographed, "
        "realistic - cartoonish, minimal - detailed, on a plain background - on a busy background"
    ),
}
# Between two sides: an arrow, or a dash with a space or nothing on one side. A dash within letters joins two words.
_BETWEEN = re.compile(r"\s*(?:->|\u2192)\s*|(?:\s+|^)[-\u2010-\u2015\u2212]+\s*|[-\u2010-\u2015\u2212]+(?:\s+|$)")
_HOW = "write opposites as in dark - bright"
PAIRS_INPUT = io.Combo.Input(
    "pairs",
    options=[TOLD, GUESSED],
    default=TOLD,
    optional=True,
    tooltip="told: opposites are those of the list, as in dark - bright. guessed: the list is of single words, and the "
    "gradients or the embedding say which are opposites, as in version 0.1.0.",
)
BUILT_IN_INPUT = io.Combo.Input(
    "built_in",
    options=[WHEN_EMPTY, *BUILT_IN, ALL],
    default=WHEN_EMPTY,
    optional=True,
    tooltip="Add the pack's own opposites for people, things, places or pictures to the list, or all of them. when "
    "empty: all of them if the list is empty, and none if not.",
)


def opposites_input(use: str) -> Any:
    """The text input `words` of a node that takes opposites; `use` says what for."""
    return io.String.Input(
        "words",
        default="",
        multiline=True,
        placeholder="dark - bright, narrow - wide, furry",
        tooltip=f"Opposites {use}, separated by commas: dark - bright, narrow - wide. A word alone is the opposite of "
        "saying nothing. Empty: the pack's own list.",
    )


def contrasts_of(text: str, built_in: str = WHEN_EMPTY) -> list[Contrast]:
    """Contrasts between commas or line ends, and those of the pack that are asked for, without repetitions.

    Raises:
        ElrondError: if a line cannot be read, its sides are equal, or two lines contradict each other.
    """
    parts = [part for part in re.split(r"[,;\n]", text) if part.strip()]
    contrasts = [_contrast(part) for part in parts]
    if built_in == ALL or (built_in == WHEN_EMPTY and not contrasts):
        contrasts += reference()
    elif built_in in BUILT_IN:
        contrasts += [_contrast(part) for part in BUILT_IN[built_in].split(",")]
    found: dict[frozenset[str], Contrast] = {}
    for contrast in contrasts:
        first = found.setdefault(frozenset(phrase.casefold() for phrase in contrast.phrases), contrast)
        if first.positive.casefold() != contrast.positive.casefold():
            raise ElrondError(
                f"The list has {first.negative} - {first.positive} and {contrast.negative} - {contrast.positive}, "
                "which is the same the other way round: keep one."
            )
    return list(found.values())


def reference() -> list[Contrast]:
    """All contrasts that come with the pack."""
    return [_contrast(part) for group in BUILT_IN.values() for part in group.split(",")]


def _contrast(part: str) -> Contrast:
    shown = " ".join(part.split())
    sides = [" ".join(side.split()) for side in _BETWEEN.split(part.strip())]
    if any(unicodedata.category(character) in ("Cc", "Cs") for side in sides for character in side):
        raise ElrondError(f"{shown!r} has a character that is no text; {_HOW}.")
    if len(sides) > 2:
        raise ElrondError(f"{shown!r} has more than two sides; {_HOW}, one pair between two commas.")
    if not all(any(character.isalnum() for character in side) for side in sides):
        raise ElrondError(f"{shown!r} has a side without a word; {_HOW}, or a word alone.")
    if len(sides) == 2 and sides[0].casefold() == sides[1].casefold():
        raise ElrondError(f"{shown!r} has the same words on both sides; {_HOW}.")
    return Contrast(sides[-1], sides[0] if len(sides) == 2 else "")


def guessable(text: str) -> list[str]:
    """The words of a list for guessing opposites; those of version 0.1.0 if it is empty.

    Raises:
        ElrondError: if there are fewer than two.
    """
    return words_of(_BETWEEN.sub(",", text) if text.strip() else WORDS)


def check_opposites(text: str, pairs: str, built_in: str) -> None:
    """Refuse a list that cannot be read.

    Raises:
        ElrondError: as `contrasts_of` and `guessable`.
    """
    if pairs == GUESSED:
        guessable(text)
    else:
        contrasts_of(text, built_in)


def displaced(clip: Any, origin: Provenance, contrasts: Sequence[Contrast], shape: Sequence[int]) -> torch.Tensor:
    """How the rows of a concept move from one side of each contrast to the other (`displacements`).

    Args:
        clip: CLIP.
        origin: says the prompt and the concept.
        contrasts: W contrasts.
        shape: (rows, d) of the directions or gradients.

    Returns:
        float64 (W, rows · d).

    Raises:
        ElrondError: as `host.rows_with_phrases` and `displacements`.
    """
    # What any phrase does has to be known where a phrase stands alone.
    pairs = () if all(contrast.negative for contrast in contrasts) else reference()
    phrases = [phrase for contrast in [*contrasts, *pairs] for phrase in contrast.phrases]
    rows = host.rows_with_phrases(clip, origin, phrases)
    return displacements(rows, contrasts, (shape[0], shape[1]), pairs)
