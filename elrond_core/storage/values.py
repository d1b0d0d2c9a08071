"""What values of a file's metadata may be, once they are read from JSON."""

from __future__ import annotations

import sys
from typing import Any

# The largest strength, as the nodes' own fields have it. Far larger ones overflow half precision.
STRENGTH_LIMIT = 1000.0
# Stops of one direction: far more than a slider shows.
_MAX_STOPS = 201


def is_text(value: str) -> bool:
    """Whether every program can show it: it has no NUL and no half of a surrogate pair."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def list_of(value: Any, kind: type, count: int | None = None) -> bool:
    """Whether this is a list of values of one type, and `count` of them if that is given."""
    return isinstance(value, list) and all(type(x) is kind for x in value) and count in (None, len(value))


def numbers(value: Any, most: float = sys.float_info.max) -> bool:
    """Whether this is a list of numbers from 0 to `most`; JavaScript writes 1.0 as 1."""
    return isinstance(value, list) and all(type(x) in (int, float) and 0 <= x <= most for x in value)


def is_calibration(interval: Any, stops: Any, count: int) -> bool:
    """Whether these are the intervals and stops of `count` directions, or of none; see `Directions`."""
    if not (isinstance(interval, list) and isinstance(stops, list) and len(interval) == len(stops)):
        return False
    return len(stops) in (0, count) and all(map(_is_stops, interval, stops))


def _is_stops(ends: Any, stops: Any) -> bool:
    """Whether these are the ends and the stops of one direction, which may have none."""
    if not (isinstance(ends, list) and isinstance(stops, list) and len(ends) == 2):
        return False
    if not all(type(x) in (int, float) and abs(x) <= STRENGTH_LIMIT for x in (*ends, *stops)):
        return False
    if not stops:
        return ends == [0, 0]
    middle = len(stops) // 2
    good = 3 <= len(stops) <= _MAX_STOPS and len(stops) % 2 == 1 and stops[middle] == 0 and stops == sorted(stops)
    return good and ends[0] <= stops[0] and stops[-1] <= ends[1]
