"""Sets of directions made out of others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from elrond_core.directions import Directions
from elrond_core.errors import ElrondError
from elrond_core.provenance import Provenance
from elrond_core.steering.compose import (
    merge,
    orthogonalised,
    renamed,
    subset,
    weighted_sum,
)
from elrond_core.storage.format import load_directions, save_directions


def directions(count: int = 4, rows: int = 2, width: int = 8, family: str = "Demo") -> Directions:
    flat = torch.randn(count, rows * width, generator=torch.Generator().manual_seed(0))
    vectors = torch.nn.functional.normalize(flat, dim=1).reshape(count, rows, width)
    names = ("colour", *[""] * (count - 1))
    return Directions(vectors, torch.arange(count, 0, -1).float(), {"name": "pca"}, Provenance(family), names)


def numbered(count: int) -> Directions:
    numbers = tuple(i / 8 for i in range(count))
    return replace(directions(count), natural_std=numbers, densities=numbers[::-1])


def test_a_subset_keeps_what_belongs_together() -> None:
    whole = directions()
    some = subset(whole, [2, 0])
    assert torch.equal(some.vectors, whole.vectors[[2, 0]])
    assert (some.scores.tolist(), some.names) == ([2.0, 4.0], ("", "colour"))
    assert some.digest(1) == whole.digest(0)


def test_reach_and_densities_stay_with_their_directions() -> None:
    some = subset(numbered(4), [2, 0])
    assert (some.natural_std, some.densities) == ((0.25, 0.0), (0.125, 0.375))
    both = merge(numbered(2), numbered(1))
    assert (both.natural_std, both.densities) == ((0.0, 0.125, 0.0), (0.125, 0.0, 0.0))
    assert renamed(both, ["a"]).densities == both.densities
    # What is not known of all is known of none, and what makes other directions leaves nothing.
    for lost in (
        merge(numbered(2), directions(1)),
        merge(directions(1), numbered(2)),
        subset(directions(), [1]),
        orthogonalised(numbered(2)),
        weighted_sum(numbered(2), [1.0, 2.0]),
    ):
        assert lost.natural_std == lost.densities == ()


@pytest.mark.parametrize("name", ["natural_std", "densities"])
def test_numbers_are_one_a_direction_or_none(name: str) -> None:
    with pytest.raises(ElrondError, match=f"4 directions need as many entries of {name}, or none"):
        replace(directions(), **{name: (0.5,)})


def test_a_weighted_sum_is_a_unit_mix(tmp_path) -> None:
    whole = directions(2)
    mixed = weighted_sum(whole, [3.0, -1.0])
    expected = 3 * whole.vectors[0] - whole.vectors[1]
    torch.testing.assert_close(mixed.vectors[0], expected / expected.norm())
    # Mean of the scores 2 and 1, weighted by 9 and 1.
    assert mixed.scores.tolist() == pytest.approx([1.9])
    assert mixed.names == ("+3 colour -1 1",)
    save_directions(mixed, tmp_path / "mixed.safetensors")
    assert load_directions(tmp_path / "mixed.safetensors").names == mixed.names


def test_sums_that_cannot_be() -> None:
    whole = directions(2)
    twice = merge(whole, whole)
    for set_, weights, sentence in (
        (whole, [1.0], "as many weights, not 1"),
        (whole, [0.0, 0.0], "cancel"),
        (twice, [1.0, 0.0, -1.0, 0.0], "cancel"),
        (whole, [float("inf"), 1.0], "not finite"),
    ):
        with pytest.raises(ElrondError, match=sentence):
            weighted_sum(set_, weights)


def test_orthogonalised_directions_span_the_same() -> None:
    whole = directions()
    straight = orthogonalised(whole)
    flat = straight.vectors.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(straight.vectors[0], whole.vectors[0])
    # Each old direction lies in the span of the new ones up to its own place.
    upper = whole.vectors.flatten(1) @ flat.T
    torch.testing.assert_close(upper, upper.tril(), rtol=0, atol=1e-5)
    torch.testing.assert_close(upper.norm(dim=1), torch.ones(4))
    assert (upper.diagonal() > 0).all()
    with pytest.raises(ElrondError, match="Direction 5 is a mix of those before it"):
        orthogonalised(merge(whole, subset(orthogonalised(directions(6)), [5, 1])))
    few = directions(2, rows=1, width=2)
    with pytest.raises(ElrondError, match="Direction 2 is a mix of those before it"):
        orthogonalised(merge(orthogonalised(few), few))


def test_names_and_merging() -> None:
    whole = merge(directions(2), directions(1))
    assert renamed(whole, ["", " round "]).names == ("colour", "round", "colour")
    with pytest.raises(ElrondError, match="4 names for 3"):
        renamed(whole, ["a", "b", "c", "d"])
    for other in (directions(family="SDXL"), directions(rows=1), directions(width=4)):
        with pytest.raises(ElrondError, match="do not fit together"):
            merge(whole, other)
