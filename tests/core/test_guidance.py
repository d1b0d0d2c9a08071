"""Guidance: a short step, what it changes, and where."""

from __future__ import annotations

import pytest
import torch

from elrond_core.steering.guidance import LONGEST, change_of_estimate, shortened


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strength", [0.0, 0.3 * LONGEST, LONGEST, 1.0, 7.5])
def test_the_short_step_times_its_factor_is_the_whole_step(strength: float) -> None:
    factor = shortened(strength)
    assert factor >= 1
    assert strength / factor <= LONGEST * (1 + 1e-9)
    # A step that is short already is not made shorter.
    assert (factor == 1) == (strength <= LONGEST)


def test_of_a_linear_model_guidance_everywhere_is_the_whole_step() -> None:
    """x̂0(rows) = A rows: then the change of a short step is in proportion."""
    model, rows, direction = random(4 * 6 * 6, 12), random(12, seed=1), random(12, seed=2)

    def estimate(step: float) -> torch.Tensor:
        return (model @ (rows + step * direction)).reshape(1, 4, 6, 6)

    for strength in (0.1, 1.0, 5.0):
        factor = shortened(strength)
        found = change_of_estimate(estimate(0.0), estimate(strength / factor), factor, local=False)
        torch.testing.assert_close(found, estimate(strength) - estimate(0.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (3, 4, 2, 8, 8), (3, 4, 20)])
def test_local_change_is_that_of_the_places_which_change_most(shape: tuple[int, ...]) -> None:
    """Two of the images change in one part a hundred times as much as elsewhere; a third one in another part."""
    before, change = random(*shape), 0.01 * random(*shape, seed=1)
    inside = torch.zeros(shape[0], 1, *shape[2:], dtype=torch.bool)
    inside[:2, ..., : shape[-1] // 4] = True
    inside[2, ..., shape[-1] // 2 :] = True
    change = torch.where(inside, change.sign(), change)
    found = change_of_estimate(before, before + change, 3.0, local=True)
    torch.testing.assert_close(found, 3 * change * inside, rtol=1e-3, atol=1e-4)


def test_images_do_not_know_of_each_other_and_types_do_not_matter() -> None:
    before, after = random(3, 4, 8, 8), random(3, 4, 8, 8, seed=1)
    together = change_of_estimate(before, after, 2.0, local=True)
    alone = torch.cat([change_of_estimate(before[i : i + 1], after[i : i + 1], 2.0, local=True) for i in range(3)])
    assert torch.equal(together, alone)
    half = change_of_estimate(before.bfloat16(), after.bfloat16(), 2.0, local=False)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, 2 * (after - before), rtol=0, atol=0.1)


def test_only_some_places_are_compared() -> None:
    """Where an image is not sampled, a large change hides none elsewhere."""
    before, change = torch.zeros(2, 4, 8, 8), 0.01 * random(2, 4, 8, 8, seed=1)
    change[..., :2] = 50.0
    change[..., 6:] = 1.0
    among = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    among[..., :2] = False
    found = change_of_estimate(before, change, 1.0, True, among)
    expected = change.clone()
    expected[..., :6] = 0
    assert torch.equal(found, expected)
    assert not change_of_estimate(before, change, 1.0, True, torch.zeros_like(among)).any()


def test_an_image_that_does_not_change_stays_as_it_is_beside_one_that_does() -> None:
    before, change = random(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    change[1, :, :3] = 1.0
    found = change_of_estimate(before, before + change, 5.0, local=True)
    assert torch.isfinite(found).all() and not found[0].any()
    torch.testing.assert_close(found[1], 5 * change[1])
