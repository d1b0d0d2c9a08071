"""Regions and leaks against what they must be in closed form."""

from __future__ import annotations

import pytest
import torch

from elrond_core.errors import ElrondError
from elrond_core.steering.locality import measure_leak, otsu, region, sensitivity_maps

WIDTH, CELLS = 6, (4, 5)


class Linear:
    """Its estimate answers to each row with a weight of that row's own in every cell: |change| = weight · |step|."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights
        self.rows = torch.randn(len(weights), WIDTH, generator=torch.Generator().manual_seed(0))

    def rows_at(self, sigma: float) -> torch.Tensor:
        return self.rows

    def reduce_memory(self) -> bool:
        return False

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        return (1 - sigma) * latents + sigma * noise

    def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        # One channel for each number of a row, so that a step's length survives.
        return noisy + torch.einsum("brc,rhw->bchw", rows, self.weights)


@pytest.fixture
def model() -> Linear:
    weights = torch.zeros(3, *CELLS)
    weights[0, :2, :2] = 3
    weights[0, 2:, 2:] = 0.5
    weights[2, 2:, 2:] = 1
    return Linear(weights)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_maps_in_closed_form(model: Linear, batch_size: int) -> None:
    latents = torch.randn(3, WIDTH, *CELLS, generator=torch.Generator().manual_seed(1))
    done: list[int] = []
    maps = sensitivity_maps(model, latents, 0.5, 7, [[0], [2]], 4, batch_size, done.append)
    assert maps.shape == (2, 3, *CELLS) and done[-1] == 3 and len(done) == 3 // batch_size
    for k, row in enumerate((0, 2)):
        # Steps are as long as the row is, whatever their direction, so every image has the same map.
        expected = model.weights[row] * model.rows[row].norm() / WIDTH**0.5
        torch.testing.assert_close(maps[k], expected.expand(3, -1, -1), rtol=1e-4, atol=1e-6)


def test_maps_of_several_rows_and_of_frames(model: Linear) -> None:
    class Frames(Linear):
        def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
            return noisy + super().denoised(torch.zeros(1), sigma, rows)[:, :, None]

    latents = torch.zeros(1, WIDTH, 2, *CELLS)
    maps = sensitivity_maps(Frames(model.weights), latents, 0.5, 7, [[0, 2]], 500)
    # Each of the two rows gets half the energy on average.
    both = model.rows[[0, 2]].square().sum() / 2 / WIDTH
    expected = (model.weights.square().sum(0) * both).sqrt()
    torch.testing.assert_close(maps[0, 0], expected, rtol=0.05, atol=1e-6)


def test_a_model_that_does_not_answer(model: Linear) -> None:
    with pytest.raises(ElrondError, match="does not answer to movements"):
        sensitivity_maps(model, torch.zeros(1, WIDTH, *CELLS), 0.5, 7, [[1]], 2)
    with pytest.raises(ElrondError, match="finite"):
        sensitivity_maps(Linear(model.weights * torch.inf), torch.zeros(1, WIDTH, *CELLS), 0.5, 7, [[0]], 2)


def test_regions(model: Linear) -> None:
    weights = model.weights[[0, 2]][:, None]
    corner = weights[0] == 3
    # Nowhere does a model not answer at all.
    assert torch.equal(region(weights[:1] + 0.3), corner)
    # A cell that answers ten times less than another still belongs to the concept if the rest answers less by far.
    assert torch.equal(region(weights[:1] + 0.001), weights[0] > 0)
    # A cell whose answer is rounded to zero is no division of its own.
    rounded = weights[:1] + 0.3
    rounded[..., 0, -1] = 0
    assert torch.equal(region(rounded), corner) and torch.equal(region(weights[:1]), corner)
    assert torch.equal(region(weights[:1], threshold=0.1), weights[0] > 0)
    # With both concepts, cells that answer more to the other are the other's.
    assert torch.equal(region(weights, threshold=0.1), corner)
    assert torch.equal(region(weights.flip(0), threshold=0.1), weights[1] > 0)
    grown = torch.zeros(1, *CELLS, dtype=torch.bool)
    grown[:, :3, :3] = True
    assert torch.equal(region(weights[:1] + 0.3, grow=1), grown)


def test_otsu_divides_two_groups() -> None:
    g = torch.Generator().manual_seed(0)
    low, high = torch.rand(40, generator=g), 3 + torch.rand(9, generator=g)
    assert float(otsu(torch.cat([high, low]))) == pytest.approx(float(low.max() + high.min()) / 2, rel=1e-6)
    values = torch.rand(60, generator=g)
    cut = otsu(values)

    def within(at: float) -> float:
        """Otsu's own criterion, the other way round: the variance that remains within the groups."""
        return sum(float((part - part.mean()).square().sum()) for part in (values[values > at], values[values <= at]))

    assert within(float(cut)) <= min(within(at) for at in values.sort().values[:-1].tolist()) + 1e-6


def test_leaks_in_closed_form() -> None:
    before = torch.zeros(4, 3, 8, 8)
    mask = torch.zeros(1, 8, 8)
    mask[:, :4, :4] = 1
    after = before.clone()
    after[0, :, :4, :4] = 0.5  # all inside
    after[1] = -0.2  # even
    after[2, :, 4:] = 1  # all in the half that is outside
    found = measure_leak(before, after, mask)
    assert found.leak[:3].tolist() == pytest.approx([0, 1, 4 / 3]) and found.leak[3].isnan()
    assert found.inside.tolist() == pytest.approx([0.25, 0.04, 0, 0])
    assert found.outside.tolist() == pytest.approx([0, 0.04, 2 / 3, 0])
    assert found.mean == pytest.approx(7 / 9)
    # A soft mask belongs to either side by its value: half everywhere sees no difference between them.
    soft = measure_leak(before, after, torch.full((4, 8, 8), 0.5))
    assert soft.leak[:3].tolist() == pytest.approx([1, 1, 1])


def test_leaks_that_cannot_be_measured() -> None:
    images, mask = torch.zeros(2, 3, 8, 8), torch.zeros(1, 8, 8)
    mask[:, 0] = 1
    for after, region_, sentence in (
        (images[:1], mask, r"as many and of one size, not \(2, 3, 8, 8\) and \(1, 3, 8, 8\)"),
        (images + 1, mask[:, :4], r"mask of \(1, 4, 8\) does not fit"),
        (images + 1, mask.expand(3, -1, -1), r"mask of \(3, 8, 8\) does not fit"),
        (images + 1, mask * 0, "nothing or everything"),
        (images + 1, mask * 0 + 1, "nothing or everything"),
        (images, mask, "no change to locate"),
    ):
        with pytest.raises(ElrondError, match=sentence):
            measure_leak(images, after, region_)
