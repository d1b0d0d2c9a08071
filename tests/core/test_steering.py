"""Drawing steps for diversity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from elrond_core.directions import Directions
from elrond_core.errors import ElrondError
from elrond_core.provenance import Provenance
from elrond_core.steering.apply import acting_together
from elrond_core.steering.draws import Draw, change_of, check_share, draw_steps, parts_of


def directions(scores: list[float]) -> Directions:
    vectors = torch.eye(len(scores))[:, None]
    return Directions(vectors, torch.tensor(scores), {"name": "test"}, Provenance("Demo"))


def drawn(set_: Directions, count: int, seed: int = 1, **settings) -> torch.Tensor:
    draws = draw_steps(set_, count, seed, settings.pop("lowest", 1.0), settings.pop("highest", 1.0), **settings)
    return torch.stack([change_of(set_, draw)[0] for draw in draws])


@pytest.mark.parametrize("settings", [{}, {"mix": 3}, {"method": "spread"}, {"weighting": "score", "mix": 2}])
def test_a_step_depends_on_seed_and_index_only(settings: dict) -> None:
    set_ = directions([4.0, 3.0, 2.0, 1.0])
    many, few = drawn(set_, 20, **settings), drawn(set_, 7, **settings)
    assert torch.equal(many[:7], few)
    assert not torch.equal(drawn(set_, 7, seed=2, **settings), few)
    torch.testing.assert_close(many.norm(dim=1), torch.ones(20))


@pytest.mark.parametrize("method", ["random", "spread"])
def test_strengths_fill_their_range(method: str) -> None:
    norms = drawn(directions([1.0] * 3), 256, lowest=0.2, highest=0.6, method=method).norm(dim=1)
    assert 0.2 <= norms.min() < 0.21 and 0.59 < norms.max() <= 0.6 + 1e-6


def test_a_spread_has_fewer_holes_than_chance() -> None:
    """The largest angle from any point of the circle to the nearest of 32 steps."""
    set_ = directions([1.0, 1.0])
    circle = torch.linspace(0, 2 * torch.pi, 720)
    points = torch.stack([circle.cos(), circle.sin()], 1)

    def hole(method: str, seed: int) -> float:
        return float((points @ drawn(set_, 32, seed, method=method, mix=2).T).amax(1).min().acos())

    assert max(hole("spread", seed) for seed in range(10)) < sum(hole("random", seed) for seed in range(10)) / 10


def test_scores_weigh() -> None:
    set_ = directions([0.9, 0.1, 0.0])
    picked = drawn(set_, 400, weighting="score").abs().argmax(1)
    counts = torch.bincount(picked, minlength=3) / 400
    assert abs(float(counts[0]) - 0.9) < 0.05 and counts[2] == 0
    parts = drawn(set_, 400, weighting="score", method="spread").square().mean(0)
    assert parts[0] > 3 * parts[1] and parts[2] == 0


@pytest.mark.parametrize("settings", [{}, {"mix": 2}, {"method": "spread"}, {"leading": 2}])
def test_firing_densities_weigh_as_scores_do(settings: dict) -> None:
    dense = replace(directions([0.2, 0.3, 0.5]), densities=(0.09, 0.01, 0.0))
    as_scores = drawn(directions([0.9, 0.1, 0.0]), 50, weighting="score", **settings)
    torch.testing.assert_close(drawn(dense, 50, weighting="density", **settings).abs(), as_scores.abs())


def test_one_sign() -> None:
    for method in ("random", "spread"):
        assert (drawn(directions([1.0, 1.0]), 50, both_signs=False, method=method) >= 0).all()


def test_natural_steps_have_the_variety_of_the_model() -> None:
    """Directions aslant of each other: the steps' covariance is that of independent parts of the given reach."""
    slanted = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.5, 2.0]]), dim=1)
    set_ = replace(directions([1.0] * 3), vectors=slanted[:, None], natural_std=(3.0, 1.0, 0.5))
    wanted = slanted.T @ torch.diag(torch.tensor(set_.natural_std) ** 2) @ slanted
    torch.testing.assert_close(drawn(set_, 1024, method="natural").T.cov(), wanted, atol=0.1, rtol=0.02)
    half = drawn(set_, 64, method="natural", lowest=0.5, highest=0.5)
    torch.testing.assert_close(half, 0.5 * drawn(set_, 64, method="natural"))
    only = drawn(set_, 64, method="natural", leading=1)
    assert (only[:, 1:] == 0).all() and only[:, 0].std() == pytest.approx(3, rel=0.1)


def test_the_parts_of_a_draw_add_up_to_it() -> None:
    slanted = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), dim=1)
    set_ = replace(directions([1.0, 1.0]), vectors=slanted[:, None])
    draw = Draw((1, 0), (2.0, -0.5), -0.7)
    parts = parts_of(set_, draw)
    assert list(parts) == [1, 0] and parts[1] < 0 < parts[0]
    torch.testing.assert_close(parts[1] * set_.vectors[1] + parts[0] * set_.vectors[0], change_of(set_, draw))
    assert parts_of(set_, Draw((1,), (1.0,), 0.4)) == pytest.approx({1: 0.4})
    with pytest.raises(ElrondError, match="cancels to nothing"):
        parts_of(set_, Draw((0,), (0.0,), 0.4))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lowest": 1.0, "highest": 0.5}, "lowest strength 1.0 is above the highest 0.5"),
        ({"lowest": -1.0}, "at least 0"),
        ({"method": "natural"}, "take some that were fitted to the model's response"),
        ({"method": "even"}, "random, spread, natural, not 'even'"),
        ({"highest": float("nan")}, "finite"),
        ({"mix": 3, "leading": 2}, "mix 1 to 2 of these directions, not 3"),
        ({"mix": 3, "weighting": "score"}, "mix 1 to 2 of these directions, not 3"),
        ({"weighting": "density"}, "no firing densities to weigh them by: take those of a sparse autoencoder"),
        ({"weighting": "by name"}, "equal, score, density, not 'by name'"),
    ],
)
def test_steps_that_cannot_be_drawn(settings: dict, sentence: str) -> None:
    with pytest.raises(ElrondError, match=sentence):
        drawn(directions([2.0, 1.0, 0.0]), 3, **settings)
    with pytest.raises(ElrondError, match="No direction of this set has a positive score"):
        drawn(directions([0.0, -1.0]), 3, weighting="score")
    with pytest.raises(ElrondError, match="No direction of this set has a positive firing density"):
        drawn(replace(directions([1.0, 1.0]), densities=(0.0, 0.0)), 3, weighting="density")


@pytest.mark.parametrize("settings", [{"mix": 2}, {"method": "spread"}, {"method": "natural"}, {"weighting": "score"}])
def test_steps_of_one_length(settings: dict) -> None:
    """The length is that of the sum, whatever the angles between the directions; directions and signs stay."""
    slanted = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.5, 2.0]]), dim=1)
    set_ = replace(directions([3.0, 2.0, 1.0]), vectors=slanted[:, None], natural_std=(3.0, 1.0, 0.5))
    free = drawn(set_, 40, lowest=0.2, highest=0.9, **settings)
    fixed = drawn(set_, 40, lowest=0.2, highest=0.9, total=0.6, **settings)
    assert free.norm(dim=1).std() > 0.05
    torch.testing.assert_close(fixed, 0.6 * torch.nn.functional.normalize(free, dim=1))
    for bad in (-0.5, float("inf")):
        with pytest.raises(ElrondError, match="finite and at least 0"):
            drawn(set_, 2, total=bad, **settings)


def test_parts_of_the_sampling_in_which_the_same_steps_act() -> None:
    assert acting_together([(0.2, 0.8)]) == [(0.2, 0.8, (0,))]
    assert acting_together([(0.5, 1.0), (0.0, 1.0)]) == [(0.0, 0.5, (1,)), (0.5, 1.0, (0, 1))]
    assert acting_together([(0.0, 0.2), (0.8, 1.0)]) == [(0.0, 0.2, (0,)), (0.8, 1.0, (1,))]
    assert acting_together([]) == []


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.7, 0.2), (-0.1, 1.0), (0.0, 1.1)])
def test_parts_of_the_sampling_that_cannot_be(start: float, end: float) -> None:
    with pytest.raises(ElrondError, match="start before it ends"):
        check_share(start, end)
