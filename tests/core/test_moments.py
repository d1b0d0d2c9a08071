"""Moments: streaming, merging and saving give what one pass over everything gives."""

import pytest
import torch

from elrond_core.errors import ElrondError
from elrond_core.moments import Moments
from elrond_core.provenance import Provenance

HERE = Provenance(family="SDXL")


def _sample(count: int = 501, rows: int = 2, width: int = 9) -> torch.Tensor:
    # A mean far from zero is what naive sums of squares get wrong.
    return torch.randn(count, rows, width, generator=torch.Generator().manual_seed(0)) + 1000.0


def _moments(*batches: torch.Tensor) -> Moments:
    moments = Moments.empty(2, 9, HERE)
    for batch in batches:
        moments.add(batch)
    return moments


@pytest.mark.parametrize("step", [1, 7, 250, 501])
def test_batches_give_the_whole(step: int) -> None:
    sample = _sample()
    moments = _moments(*sample.split(step))
    flat = sample.flatten(1).double()
    assert moments.count == moments.provenance.count == 501
    assert torch.allclose(moments.mean, flat.mean(0), rtol=1e-12)
    assert torch.allclose(moments.covariance(), flat.T.cov(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("first", [0, 1, 200, 501])
def test_two_halves_give_the_whole(first: int) -> None:
    sample = _sample()
    whole, left, right = _moments(sample), _moments(sample[:first]), _moments(sample[first:])
    left.merge(right)
    assert left.count == whole.count
    assert torch.allclose(left.mean, whole.mean, rtol=1e-13)
    assert torch.allclose(left.scatter, whole.scatter, rtol=1e-9, atol=1e-9)


def test_merging_leaves_the_other_alone() -> None:
    sample = _sample()
    left, right = _moments(sample[:3]), _moments(sample[3:])
    before = right.scatter.clone()
    left.merge(right)
    left.add(sample)
    assert torch.equal(right.scatter, before) and right.count == 498


def test_tensors_round_trip() -> None:
    moments = _moments(_sample())
    again = Moments.from_tensors(moments.tensors(), HERE)
    assert (again.count, again.rows, again.width) == (501, 2, 9)
    assert torch.equal(again.scatter, moments.scatter) and torch.equal(again.mean, moments.mean)


def test_a_bad_row_is_named_by_its_place_among_all() -> None:
    moments = _moments(_sample(10))
    bad = _sample(5)
    bad[3, 1, 2] = torch.nan
    with pytest.raises(ElrondError, match="Gradient 13 is not finite"):
        moments.add(bad)
    assert moments.count == 10


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda m: m.add(torch.zeros(3, 4)), "vectors of 18 values, and the batch has 4"),
        (lambda m: m.merge(Moments.empty(1, 9, HERE)), "2 x 9 values cannot be merged with 1 x 9"),
        (lambda m: m.merge(Moments.empty(2, 9, Provenance("Flux"))), "SDXL cannot be merged with moments of Flux"),
        (lambda m: m.covariance(), "at least 2 gradients, got 0"),
        (lambda m: Moments.from_tensors({}, HERE), "Moments need the tensors"),
        (lambda m: Moments.from_tensors({**m.tensors(), "mean": torch.zeros(3)}, HERE), "do not fit a mean of"),
    ],
)
def test_what_is_refused(act, sentence: str) -> None:
    with pytest.raises(ElrondError, match=sentence):
        act(_moments())
