"""Calibration on paths of images whose jumps, plateaus and edges are known in closed form."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from elrond_core.directions import Directions
from elrond_core.errors import ElrondError
from elrond_core.provenance import Provenance
from elrond_core.steering import calibration as calibrating
from elrond_core.steering.calibration import CalibrationPlan, Unsteered, calibrate, in_token_norms, strength_at
from elrond_core.steering.compose import merge, orthogonalised, subset

PLAN = CalibrationPlan(furthest=2.0, samples=24, stops=4)
# The share of a strength within which ends and jumps are known.
NARROW = 1 / 16
SEEDS = 3


def world(spread: float = 1.0, width: int = 6) -> Unsteered:
    """Unsteered images spread evenly over a ball, so that half of the median distance is near `spread` / 2."""
    g = torch.Generator().manual_seed(0)
    points = torch.randn(SEEDS + 24, width, generator=g)
    points = spread * points / points.norm(dim=1, keepdim=True) / 2**0.5
    return Unsteered(points[:SEEDS], points[SEEDS:])


class Path:
    """Images that move by f(strength) from the unsteered ones, along an axis of the world or a new one."""

    def __init__(self, unsteered: Unsteered, f: Callable[[float], float], off: bool = False) -> None:
        self.unsteered, self.f, self.asked = unsteered, f, []
        self.way = torch.zeros(unsteered.own.shape[1])
        self.way[-1] = 1.0

    def __call__(self, index: int, strength: float) -> torch.Tensor:
        self.asked.append(strength)
        return self.unsteered.own + self.f(strength) * self.way


def found(f: Callable[[float], float], plan: CalibrationPlan = PLAN, unsteered: Unsteered | None = None):
    path = Path(unsteered or world(), f)
    result = calibrate(path, 0, path.unsteered, plan)
    assert result.samples == len(path.asked) <= plan.samples and 0.0 not in path.asked
    assert len(set(path.asked)) == len(path.asked)
    return result, path


def check_stops(result, f: Callable[[float], float], share: float = 0.1) -> None:
    """Both sides: the change at stop n is n times the same step, within a share of the step."""
    middle = len(result.stops) // 2
    assert result.stops[middle] == 0 and list(result.stops) == sorted(result.stops)
    for side, top in zip((result.stops[middle::-1], result.stops[middle:]), result.changes, strict=True):
        step = top / middle
        assert [abs(f(s)) for s in side] == pytest.approx([step * n for n in range(middle + 1)], abs=share * step)


@pytest.mark.parametrize(
    "f",
    [
        lambda s: 0.7 * s,
        lambda s: math.copysign(abs(s) ** 2, s),
        lambda s: math.copysign(abs(s) ** 0.5, s),
        lambda s: 40 * s,
        lambda s: math.sinh(3 * s),
        lambda s: math.copysign(max(0.0, abs(s) - 0.6), s),
        lambda s: 2 * s if s > 0 else 0.4 * s,
    ],
    ids=["linear", "square", "root", "steep", "sinh", "late", "aslant"],
)
def test_stops_are_at_equal_changes_up_to_half_of_the_distance_between_seeds(f: Callable[[float], float]) -> None:
    result, path = found(f)
    check_stops(result, f)
    assert result.changes == pytest.approx((path.unsteered.reach,) * 2)
    assert result.ends == (calibrating.REACHED,) * 2
    assert result.interval == (result.stops[0], result.stops[-1])


def test_the_reach_is_half_of_the_median_distance() -> None:
    points = torch.tensor([[0.0], [1.0], *[[float(i)] for i in range(2, 10)]])
    assert Unsteered(points[:2], points[2:]).reach == 1.5


def test_a_range_ends_before_a_jump() -> None:
    f = lambda s: 0.3 * s + (0.35 if s > 0.37 else 0.0)  # noqa: E731
    result, _ = found(f)
    end = result.interval[1]
    assert 0.37 * (1 - NARROW) <= end <= 0.37 and result.ends[1] == calibrating.JUMP
    assert result.changes[1] == pytest.approx(0.3 * end)
    check_stops(result, f)
    # On the other side nothing jumps.
    assert result.ends[0] == calibrating.REACHED


def test_a_jump_that_comes_back_is_a_jump() -> None:
    """The distance from the unsteered images alone would not show it: images swing to the other side."""
    unsteered = world()
    path = Path(unsteered, lambda s: 0.2 * s if s < 0.8 else -0.2 * s)
    result = calibrate(path, 0, unsteered, PLAN)
    assert 0.8 * (1 - NARROW) <= result.interval[1] <= 0.8 and result.ends[1] == calibrating.JUMP


def test_small_steps_are_no_jumps() -> None:
    f = lambda s: 0.2 * s + 0.01 * math.floor(8 * abs(s)) * (1 if s > 0 else -1)  # noqa: E731
    result, _ = found(f)
    assert result.ends == (calibrating.REACHED,) * 2


@pytest.mark.parametrize(
    "f", [lambda s: 0.4 * max(-0.6, min(s, 0.6)), lambda s: 0.24 * math.sin(s / 0.6 * math.pi / 2)]
)
def test_a_range_ends_where_the_change_ends(f: Callable[[float], float]) -> None:
    result, _ = found(f)
    assert result.ends == (calibrating.PLATEAU,) * 2
    assert abs(f(result.interval[1])) == pytest.approx(0.24, rel=0.08) and 0.45 < result.interval[1] <= 0.64
    check_stops(result, f)


def test_a_range_ends_at_the_furthest_strength() -> None:
    result, path = found(lambda s: 0.1 * s)
    assert result.interval == (-2, 2) and result.ends == (calibrating.FURTHEST,) * 2
    assert max(map(abs, path.asked)) == 2
    check_stops(result, lambda s: 0.1 * s)


def test_a_range_ends_before_images_are_not_like_the_concepts_own() -> None:
    """One of three seeds leaves the images at a strength of 0.7, by more than they lie apart."""
    unsteered = world()
    far = 1.01 * unsteered.limit

    def look(index: int, strength: float) -> torch.Tensor:
        points = unsteered.own.clone()
        points[:, -1] += 0.05 * strength
        points[0, -1] += 5 * far if strength >= 0.7 else 0.0
        return points

    result = calibrate(look, 0, unsteered, PLAN)
    assert 0.7 * (1 - NARROW) <= result.interval[1] < 0.7 and result.ends[1] == calibrating.INVALID
    assert result.interval[0] == -2


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_images_that_are_not_finite_are_not_valid(broken: float) -> None:
    result, _ = found(lambda s: broken if s > 0.5 else 0.1 * s)
    assert 0.5 * (1 - NARROW) <= result.interval[1] <= 0.5 and result.ends[1] == calibrating.INVALID


def test_a_direction_that_does_nothing_and_one_that_breaks_at_once() -> None:
    nothing, path = found(lambda s: 0.0)
    assert nothing.stops == (0.0,) * 9 and nothing.changes == (0, 0) and len(path.asked) <= 10
    broken, path = found(lambda s: math.nan)
    assert broken.stops == (0.0,) * 9 and broken.ends == (calibrating.INVALID,) * 2
    assert len(path.asked) <= PLAN.samples


def test_few_samples_are_enough() -> None:
    """A direction that is linear, and an end that bisection has to find, both ways."""
    assert found(lambda s: 0.7 * s)[0].samples <= 16
    assert found(lambda s: 40 * s)[0].samples <= 18
    assert found(lambda s: 0.1 * s)[0].samples <= 10
    few = replace(PLAN, samples=16)
    assert found(lambda s: math.sinh(3 * s), few)[0].settled


def test_the_report_says_where_samples_were_too_few() -> None:
    """A change that grows sixteenfold near its end needs more than four strengths between."""
    f = lambda s: 0.03 * s + 0.6 * s**9  # noqa: E731
    few, many = (found(f, replace(PLAN, samples=count))[0] for count in (16, 40))
    assert not few.settled and many.settled
    assert "more samples" in calibrating.calibration_lines(directions(), {0: few}, 1.0)[-1]
    check_stops(many, f)


def test_the_same_points_ask_for_the_same_strengths() -> None:
    one, other = (found(lambda s: math.sinh(3 * s))[1].asked for _ in range(2))
    assert one == other


def test_the_same_calibrated_strength_makes_the_same_change() -> None:
    """Directions of any strength: the coefficient of variation of the change falls from that of token norms to 2 %."""
    slopes = [0.3, 0.5, 0.9, 1.7, 4.0, 11.0]
    for share in (0.25, 0.6, 1.0):
        changes = torch.tensor([k * strength_at(found(lambda s, k=k: k * s)[0].stops, share) for k in slopes])
        assert changes.std() / changes.mean() < 0.02
    assert torch.tensor(slopes).std() / torch.tensor(slopes).mean() > 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"furthest": 0.0}, "furthest strength must lie above 0"),
        ({"furthest": math.nan}, "furthest strength must lie above 0"),
        ({"stops": 0}, "1 to 100 stops, not 0"),
        ({"samples": 15}, "4 stops a side need at least 16 samples, not 15"),
    ],
)
def test_plans_that_cannot_be(settings: dict, sentence: str) -> None:
    with pytest.raises(ElrondError, match=sentence):
        replace(PLAN, **settings)


def test_unsteered_images_that_tell_nothing() -> None:
    points = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ElrondError, match="at least 8 unsteered images, not from 7"):
        Unsteered(points[:4], points[4:11])
    with pytest.raises(ElrondError, match="the same image for every seed"):
        Unsteered(points[:1].repeat(4, 1), points[:1].repeat(9, 1))
    points[3, 0] = math.nan
    with pytest.raises(ElrondError, match="not finite"):
        Unsteered(points[:4], points[4:])


STOPS = (-0.8, -0.5, -0.3, -0.1, 0.0, 0.2, 0.3, 0.9, 1.4)


def test_a_calibrated_strength_is_linear_between_stops() -> None:
    assert [strength_at(STOPS, (i - 4) / 4) for i in range(9)] == list(STOPS)
    assert strength_at(STOPS, 0.125) == pytest.approx(0.1) and strength_at(STOPS, -0.875) == pytest.approx(-0.65)
    assert strength_at(STOPS, 2) == 2.8 and strength_at(STOPS, -1.5) == pytest.approx(-1.2)
    along = [strength_at(STOPS, c / 100) for c in range(-150, 151)]
    assert along == sorted(along) and strength_at(STOPS, -0.0) == 0


def directions(count: int = 3) -> Directions:
    return Directions(torch.eye(4)[:count, None], torch.ones(count), {"name": "pca"}, Provenance("SDXL"))


def calibration(scale: float) -> calibrating.Calibration:
    stops = tuple(scale * stop for stop in STOPS)
    return calibrating.Calibration((stops[0], stops[-1]), stops, (0.1, 0.2), (calibrating.JUMP, calibrating.REACHED), 9)


def test_directions_keep_their_calibration() -> None:
    some = calibrating.calibrated(directions(), {0: calibration(1), 2: calibration(0.5)}, "4 seeds")
    assert some.stops[0] == STOPS and some.stops[1] == () and some.intervals == ((-0.8, 1.4), (0, 0), (-0.4, 0.7))
    assert some.method["calibration"] == "4 seeds" and [bool(stops) for stops in some.stops] == [True, False, True]
    every = calibrating.calibrated(some, {1: calibration(2)}, "4 seeds")
    assert all(every.stops) and every.stops[0] == STOPS and every.method["calibration"] == "4 seeds"
    other = calibrating.calibrated(every, {1: calibration(2)}, "8 seeds")
    assert other.method["calibration"] == "4 seeds; 1: 8 seeds"
    assert in_token_norms(every, {1: 1.0, 0: -0.5}) == {1: 2.8, 0: -0.3}
    for case in ({1: 0.5}, {0: 0.1, 1: 0.5}):
        with pytest.raises(ElrondError, match="Direction 1 is not calibrated: use Calibrate Directions"):
            in_token_norms(some, case)
    assert in_token_norms(some, {0: 1.0, 1: 0.5}, known_only=True) == {0: 1.4, 1: 0.5}
    assert in_token_norms(directions(), {1: 0.5}, known_only=True) == {1: 0.5}
    with pytest.raises(ElrondError, match="no direction 3"):
        in_token_norms(every, {3: 0.5})

    turned = subset(every, [2, 0])
    assert turned.stops == (every.stops[2], every.stops[0]) and turned.intervals == ((-0.4, 0.7), (-0.8, 1.4))
    both = merge(directions(2), turned)
    assert both.stops == ((), (), *turned.stops) and both.intervals == ((0, 0), (0, 0), *turned.intervals)
    assert merge(turned, directions(2)).stops == (*turned.stops, (), ())
    assert merge(directions(), directions()).stops == ()
    assert orthogonalised(every).stops == () == orthogonalised(every).intervals


def test_directions_have_intervals_and_stops_or_neither() -> None:
    every = calibrating.calibrated(directions(1), {0: calibration(1)}, "x")
    with pytest.raises(ElrondError, match="both intervals and stops"):
        replace(every, stops=())
    with pytest.raises(ElrondError, match="1 directions need as many entries of stops, or none"):
        replace(every, stops=(STOPS, STOPS))


def test_the_report_says_what_ends_a_range() -> None:
    some = {0: calibration(1)}
    lines = calibrating.calibration_lines(replace(directions(), names=("round", "", "")), some, reach=0.2)
    assert lines == [
        "0 round: -0.8 to 1.4 token norms, 9 strengths",
        "  -1: -0.8, 50% of the largest change (beyond, images change suddenly)",
        "  +1: 1.4, 100% of the largest change (beyond, other seeds' images are as near)",
    ]
