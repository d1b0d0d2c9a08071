"""Parsers of lists in text widgets: indices, numbers, strengths and words."""

from __future__ import annotations

import math
import re
from collections import Counter

from ..elrond_core.errors import ElrondError
from ..elrond_core.steering.draws import check_share
from ..elrond_core.storage.values import STRENGTH_LIMIT

# Default list of words for names of directions.
WORDS = (
    "red, orange, yellow, green, blue, purple, pink, brown, black, white, gray, colorful, dark, bright, large, small, "
    "tall, short, long, round, square, pointed, flat, wide, narrow, thin, fat, left, right, central, top, middle, "
    "bottom, old, young, new, ancient, modern, male, female, happy, sad, angry, calm, beautiful, ugly, clean, dirty, "
    "smooth, rough, furry, shiny, metallic, wooden, stone, glass, soft, hard, wet, dry, hot, cold, sunny, rainy, "
    "snowy, foggy, empty, crowded, simple, complex, realistic, cartoon, painted, photographed, scary, cute, strong, "
    "weak, rich, poor, fast, slow, near, distant"
)
# Above every index: indices have at most six digits.
ANY_COUNT = 10**6
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
# A direction, its strength, and the part of the sampling in which it acts if it has one of its own.
_STRENGTH = re.compile(
    rf"\s*(\d{{1,6}})\s*[:=]\s*([-+]?{_NUMBER}(?:[eE][-+]?\d+)?)\s*(?:@\s*({_NUMBER})\s*-\s*({_NUMBER})\s*)?"
)


def indices_of(text: str, count: int) -> list[int]:
    """Indices in a list such as "0, 2, 5-7". An empty list means all.

    Args:
        text: the list.
        count: number of directions; `ANY_COUNT` if it is not known yet.

    Raises:
        ElrondError: if the text cannot be read, or an index is repeated or not in 0 to `count` - 1.
    """
    indices: list[int] = []
    for part in filter(None, re.split(r"[,;\s]+", re.sub(r"\s*-\s*", "-", text.strip()))):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        if not match:
            raise ElrondError(f"{part!r} is not a direction; list them as in 0, 2, 5-7.")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise ElrondError(f"{part} runs backwards; write {last}-{first}.")
        if last >= count:
            raise ElrondError(f"There are no directions {part}: this set holds 0 to {count - 1}.")
        indices += range(first, last + 1)
    repeated = [i for i, times in Counter(indices).items() if times > 1]
    if repeated:
        raise ElrondError(f"Direction {min(repeated)} is listed twice.")
    return indices if text.strip() else list(range(count))


def numbers_of(text: str) -> list[float]:
    """Numbers in a list such as "1, -0.5".

    Raises:
        ElrondError: if one is not a finite number.
    """
    numbers = []
    for part in filter(None, re.split(r"[,;\s]+", text.strip())):
        try:
            numbers.append(float(part))
            if not math.isfinite(numbers[-1]):
                raise ValueError(part)
        except ValueError:
            raise ElrondError(f"{part!r} is not a number; list them as in 1, -0.5.") from None
    return numbers


def strengths_of(text: str) -> dict[int, float]:
    """Strengths by direction, in a list such as "0: 0.5, 3: -0.2".

    Raises:
        ElrondError: if the text cannot be read, a direction is repeated, a strength is beyond `STRENGTH_LIMIT`, or a
            part of the sampling is impossible.
    """
    return {index: strength for index, (strength, _) in _steps_of(text).items()}


def windows_of(text: str) -> dict[int, tuple[float, float]]:
    """Start and end by direction, as shares of the sampling, in a list such as "0: 0.5 @ 0-0.4, 3: -0.2".

    Directions without a part of their own are left out.

    Raises:
        ElrondError: as `strengths_of`.
    """
    return {index: window for index, (_, window) in _steps_of(text).items() if window}


def _steps_of(text: str) -> dict[int, tuple[float, tuple[float, float] | None]]:
    steps: dict[int, tuple[float, tuple[float, float] | None]] = {}
    for part in filter(str.strip, re.split(r"[,;\n]", text)):
        match = _STRENGTH.fullmatch(part)
        if not match:
            raise ElrondError(f"{part.strip()!r} is not a direction and its strength; list them as in 0: 0.5, 3: -0.2.")
        index, strength = int(match[1]), float(match[2])
        if index in steps:
            raise ElrondError(f"Direction {index} is listed twice.")
        if abs(strength) > STRENGTH_LIMIT:
            raise ElrondError(f"A strength lies between -1000 and 1000, not at {match[2][:20]}.")
        window = (float(match[3]), float(match[4])) if match[3] else None
        if window:
            check_share(*window)
        steps[index] = strength, window
    return steps


def words_of(text: str) -> list[str]:
    """Words or phrases between commas or line ends, without repetitions.

    Raises:
        ElrondError: if there are fewer than two.
    """
    words = list(dict.fromkeys(" ".join(part.split()) for part in text.replace("\n", ",").split(",") if part.strip()))
    if len(words) < 2:
        raise ElrondError("Give at least two words, separated by commas: what they have in common is left out.")
    return words
