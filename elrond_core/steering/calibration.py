"""Calibration: the strengths at which a direction changes images smoothly, and stops at equal perceived change.

After the elastic band of Ekin and Gandelsman (arXiv 2603.17998), which spaces the strengths of a slider evenly by the
perceived distance of their images, up to a largest distance. Here, that distance and what counts as valid follow from
the distances between unsteered images of the concept. Images are points whose Euclidean distance is the perceived one.
A direction is sampled at few strengths, each from the noise of the same seeds.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..directions import Directions
from ..errors import ElrondError

# Share of unsteered images that count as valid themselves: the usual level of a test.
_TYPICAL = 0.95
# Unsteered images from which that share of their distances can be told at all.
LEAST_REFERENCES = 8
# An end is known to this share of its strength: about the width of the handle of a slider.
_RESOLUTION = 1 / 16
# Between two strengths nearer than `_RESOLUTION`, a change of more than so many steps between stops is sudden: at least
# one stop should lie in it, and none can.
_SUDDEN = 2
# Where the change grows at less than this share of its mean rate up to there, it counts as over: the last stop would
# take more than half of the slider's strengths (with four stops a side).
_LEAST_RATE = 0.2
# A stop is known when the change of a sample differs from the stop's by at most this share of the step to the next.
_ACCURACY = 0.1
# The first strength is so small a share of the furthest; strengths are doubled from there.
_FIRST = 1 / 8

REACHED = "beyond, other seeds' images are as near"
FURTHEST = "the furthest strength that was tried"
INVALID = "beyond, images are not like the concept's own"
JUMP = "beyond, images change suddenly"
PLATEAU = "beyond, images change no further"

# Points (S, F) of the images of a direction at a strength in token norms, one a seed.
Look = Callable[[int, float], torch.Tensor]


@dataclass(frozen=True)
class CalibrationPlan:
    """How to calibrate.

    Attributes:
        furthest: the largest strength to try, in token norms.
        samples: the most strengths to sample for one direction, both ways together.
        stops: stops on each side of the unsteered image.

    Raises:
        ElrondError: if a number is out of range.
    """

    furthest: float = 2.0
    samples: int = 32
    stops: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.furthest <= 1000:
            raise ElrondError(f"The furthest strength must lie above 0 and be at most 1000, not {self.furthest}.")
        if not 1 <= self.stops <= 100:
            raise ElrondError(f"A side has 1 to 100 stops, not {self.stops}.")
        if self.samples < 4 * self.stops:
            raise ElrondError(f"{self.stops} stops a side need at least {4 * self.stops} samples, not {self.samples}.")


@dataclass(frozen=True)
class Calibration:
    """The usable strengths of one direction.

    Attributes:
        interval: lowest (at most 0) and highest (at least 0) usable strength, in token norms.
        stops: 2 · N + 1 strengths in ascending order, in token norms, for the calibrated strengths -1 to 1 at equal
            distances; the middle one is 0.
        changes: the largest perceived change below and above: the mean distance from the unsteered images.
        ends: why the interval ends below and above.
        samples: how many strengths were sampled.
        settled: whether these were enough to know the end and every stop.
    """

    interval: tuple[float, float]
    stops: tuple[float, ...]
    changes: tuple[float, float]
    ends: tuple[str, str]
    samples: int
    settled: bool = True


class Unsteered:
    """Unsteered images of a concept, and what follows from them.

    Args:
        own: (S, F) points of the seeds that are steered.
        others: (N, F) points of other seeds.

    Attributes:
        own: as given.
        reach: half of the median distance between two seeds. By the triangle inequality, an image that changed by less
            is nearer to that of its own seed than to most others: it is still the same picture.
        limit: the distance from the nearest unsteered image below which `_TYPICAL` of the unsteered images lie.

    Raises:
        ElrondError: if there are fewer than `LEAST_REFERENCES` others, points are not finite, or all are the same.
    """

    def __init__(self, own: torch.Tensor, others: torch.Tensor) -> None:
        if len(others) < LEAST_REFERENCES:
            raise ElrondError(
                f"What is valid is told from at least {LEAST_REFERENCES} unsteered images, not from {len(others)}."
            )
        self.own = own
        self._all = torch.cat([own, others])
        if not torch.isfinite(self._all).all():
            raise ElrondError("An unsteered image holds numbers that are not finite: look at the model's images first.")
        between = distances(self._all, self._all)
        first, second = torch.triu_indices(len(between), len(between), 1)
        self.reach = float(between[first, second].median()) / 2
        if not self.reach > 0:
            raise ElrondError(
                "The model draws the same image for every seed: there is nothing to compare changes with."
            )
        self.limit = float(torch.quantile(between.fill_diagonal_(math.inf).amin(1), _TYPICAL))

    def like(self, points: torch.Tensor) -> bool:
        """Whether all of (M, F) points are as near to an unsteered image as those are to each other."""
        return bool((distances(points, self._all).amin(1) <= self.limit).all())

    def change(self, points: torch.Tensor) -> float:
        """Mean distance of points (S, F) from the unsteered ones of their seeds."""
        return mean_distance(self.own, points)


def distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Euclidean distances (N, M) between points (N, F) and (M, F), in float64; between equal points it is 0."""
    return torch.cdist(first.double(), second.double(), compute_mode="donot_use_mm_for_euclid_dist")


def mean_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean distance between the points (S, F) of the same seeds."""
    return float((first.double() - second.double()).norm(dim=1).mean())


def calibrate(look: Look, index: int, unsteered: Unsteered, plan: CalibrationPlan) -> Calibration:
    """Calibrate one direction.

    Args:
        look: gives the points of a direction at a strength. The strengths that are asked for depend on earlier points
            only, so that the same points give the same calibration.
        index: the direction.
        unsteered: the unsteered images.
        plan: how.
    """
    sides = {}
    for sign in (-1, 1):
        side = sides[sign] = _Side(plan, unsteered)
        while len(side) < plan.samples // 2 and (strength := side.next_strength()) is not None:
            side.add(strength, look(index, sign * strength))
    below, above = sides[-1], sides[1]
    stops = (*(0.0 - strength for strength in reversed(below.stops())), 0.0, *above.stops())
    return Calibration(
        interval=(stops[0], stops[-1]),
        stops=stops,
        changes=(below.top, above.top),
        ends=(below.end()[1], above.end()[1]),
        samples=len(below) + len(above),
        settled=all(side.next_strength() is None for side in sides.values()),
    )


@dataclass
class _Side:
    """The samples of a direction towards one sign. Lists are in the order of the strengths, which begin with 0."""

    plan: CalibrationPlan
    unsteered: Unsteered
    strengths: list[float] = field(default_factory=lambda: [0.0])
    points: list[torch.Tensor] = field(default_factory=list)
    changes: list[float] = field(default_factory=lambda: [0.0])
    like: list[bool] = field(default_factory=lambda: [True])

    def __post_init__(self) -> None:
        self.points.append(self.unsteered.own)

    def __len__(self) -> int:
        """How many strengths were sampled."""
        return len(self.strengths) - 1

    @property
    def top(self) -> float:
        """The change of the last stop."""
        return min(self.unsteered.reach, self.changes[self.end()[0]])

    def add(self, strength: float, points: torch.Tensor) -> None:
        """Take the points (S, F) of a strength above 0. Those that are not finite are of no valid image."""
        place = bisect_right(self.strengths, strength)
        self.strengths.insert(place, strength)
        self.points.insert(place, points)
        good = bool(torch.isfinite(points).all()) and self.unsteered.like(points)
        self.changes.insert(place, self.unsteered.change(points) if good else math.inf)
        self.like.insert(place, good)

    def end(self) -> tuple[int, str]:
        """Index of the last usable sample and what ends the range there; its change may lie above the reach."""
        last, reason = len(self), FURTHEST
        for i in range(1, len(self) + 1):
            most = max(self.changes[:i])
            if not self.like[i]:
                last, reason = i - 1, INVALID
            elif self.changes[i] >= self.unsteered.reach:
                last, reason = i, REACHED
            elif self.changes[i] < most - most / self.plan.stops:
                last, reason = i - 1, PLATEAU
            else:
                continue
            break
        while True:
            rising = self._before_plateau(last)
            reason = reason if rising == last else PLATEAU
            sudden = _SUDDEN * self._step(rising)
            jump = next((i for i in range(rising) if self._is_narrow(i) and self._gap(i) > sudden), None)
            if jump is None:
                return rising, reason
            last, reason = jump, JUMP

    def _before_plateau(self, last: int) -> int:
        """The last sample up to `last` to which the change rises."""
        while last > 0:
            width = self.strengths[last] - self.strengths[last - 1]
            rate = (self.changes[last] - self.changes[last - 1]) / width
            if rate > 0 and rate >= _LEAST_RATE * self.changes[last] / self.strengths[last]:
                break
            last -= 1
        return last

    def _step(self, last: int) -> float:
        """The change from one stop to the next, if the range ends at this sample."""
        return min(self.unsteered.reach, self.changes[last]) / self.plan.stops

    def _is_narrow(self, index: int) -> bool:
        """Whether a sample and the next are as close as ends are told apart at this strength."""
        width = self.strengths[index + 1] - self.strengths[index]
        return width <= max(_RESOLUTION * self.strengths[index], _RESOLUTION**3 * self.plan.furthest) * (1 + 1e-9)

    def _gap(self, index: int) -> float:
        return mean_distance(self.points[index], self.points[index + 1])

    def next_strength(self) -> float | None:
        """The strength whose sample tells most, or None if the stops are known."""
        furthest = self.strengths[-1]
        within = all(self.like) and max(self.changes) < self.unsteered.reach
        if within and furthest < self.plan.furthest:
            return min(self.plan.furthest, max(_FIRST * self.plan.furthest, 2 * furthest))
        if max(self.changes) == 0:
            return None
        last, reason = self.end()
        step = self._step(last)
        for index in self._around_end(last, reason, step):
            if not self._is_narrow(index):
                return self._middle(index)
        for number, strength in enumerate(self.stops(), 1):
            index = bisect_left(self.strengths, strength) - 1
            known = min(abs(step * number - change) for change in self.changes[: last + 1]) <= _ACCURACY * step
            if not known and strength not in self.strengths and not self._is_narrow(index):
                return strength
        widest = max((i for i in range(last) if not self._is_narrow(i)), key=self._gap, default=None)
        if widest is not None and self._gap(widest) > _SUDDEN * step:
            return self._middle(widest)
        return None

    def _around_end(self, last: int, reason: str, step: float) -> list[int]:
        """Indices of the samples after which the end may lie."""
        if reason in (INVALID, JUMP):
            return [last]
        if reason == PLATEAU and self.changes[last + 1] - self.changes[last] > _ACCURACY * step:
            return [last]
        # The change may have ended before this sample.
        return [last - 1] if reason == PLATEAU and last else []

    def _middle(self, index: int) -> float:
        return (self.strengths[index] + self.strengths[index + 1]) / 2

    def stops(self) -> list[float]:
        """The strengths at which the change reaches equal steps up to the last, linear between samples."""
        last, _ = self.end()
        return [self._strength_of(self._step(last) * number, last) for number in range(1, self.plan.stops + 1)]

    def _strength_of(self, change: float, last: int) -> float:
        for i in range(1, last + 1):
            if self.changes[i] >= change:
                # The first sample that reaches the change decides; later ones may fall back.
                below = self.changes[i - 1]
                share = min(1.0, (change - below) / (self.changes[i] - below)) if self.changes[i] > below else 1.0
                return self.strengths[i - 1] + share * (self.strengths[i] - self.strengths[i - 1])
        return self.strengths[last]


def calibrated(directions: Directions, calibrations: dict[int, Calibration], how: str) -> Directions:
    """Directions with the calibrations of some of them; the others keep what they have.

    Args:
        directions: the directions.
        calibrations: by index.
        how: what they were measured with, for the file.
    """
    intervals = list(directions.intervals or ((0.0, 0.0),) * len(directions))
    stops = list(directions.stops or ((),) * len(directions))
    for index, calibration in calibrations.items():
        intervals[index], stops[index] = calibration.interval, calibration.stops
    others = any(stops[index] for index in range(len(stops)) if index not in calibrations)
    if others and directions.method.get("calibration", how) != how:
        how = f"{directions.method['calibration']}; {', '.join(map(str, calibrations))}: {how}"
    return replace(
        directions,
        method={**directions.method, "calibration": how},
        intervals=tuple(intervals),
        stops=tuple(stops),
    )


def calibration_lines(directions: Directions, calibrations: dict[int, Calibration], reach: float) -> list[str]:
    """A report: of each direction its interval, and what ends it; how large a change its ends are."""
    lines = []
    for index, one in calibrations.items():
        name = f"{index} {directions.names[index]}".rstrip()
        lines.append(f"{name}: {one.interval[0]:.3g} to {one.interval[1]:.3g} token norms, {one.samples} strengths")
        for side, strength, change, why in zip(("-1", "+1"), one.interval, one.changes, one.ends, strict=True):
            lines.append(f"  {side}: {strength:.3g}, {change / reach:.0%} of the largest change ({why})")
        if not one.settled:
            lines.append("  more samples would place its stops more exactly")
    return lines


def strength_at(stops: Sequence[float], calibrated: float) -> float:
    """The strength that a calibrated one stands for: linear between the stops, and in proportion beyond them.

    Args:
        stops: 2 · N + 1 strengths of the calibrated strengths -1 to 1, the middle one 0.
        calibrated: any number; -1 to 1 is the usable range.
    """
    if abs(calibrated) >= 1:
        return abs(calibrated) * (stops[-1] if calibrated > 0 else stops[0])
    half = len(stops) // 2
    place = calibrated * half + half
    index = min(int(place), len(stops) - 2)
    return stops[index] + (place - index) * (stops[index + 1] - stops[index])


def in_token_norms(directions: Directions, strengths: dict[int, float], known_only: bool = False) -> dict[int, float]:
    """Calibrated strengths by direction, in token norms.

    Args:
        directions: the directions.
        strengths: calibrated strengths by index.
        known_only: strengths of directions that are not calibrated are in token norms already, and stay as they are.

    Raises:
        ElrondError: if one of the directions does not exist, or is not calibrated and has to be.
    """
    result = {}
    for index, strength in strengths.items():
        directions.pick(index)
        stops = directions.stops[index] if directions.stops else ()
        if not stops and not known_only:
            raise ElrondError(
                f"Direction {index} is not calibrated: use Calibrate Directions, or strengths in token norms."
            )
        result[index] = strength_at(stops, strength) if stops else strength
    return result
