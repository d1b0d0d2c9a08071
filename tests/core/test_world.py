"""The demo world: what is drawn is what is measured."""

from __future__ import annotations

import pytest
import torch

from demo.captions import NOUNS, WORDS, compose, draw_caption, draw_factors, open_factors, word_of
from demo.measures import alignment, distance_to_uniform, diversity
from demo.world import CONTINUOUS, SHAPES, measure, render


def random_factors(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = torch.randint(len(SHAPES), (count,), generator=g)
    return {"shape": shape, **{name: torch.rand(count, generator=g) for name in CONTINUOUS}}


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.02), (0.03, 0.06)])
def test_measure_reads_what_render_drew(noise: float, tolerance: float) -> None:
    factors = random_factors(1000)
    images = render(factors)
    seen = measure((images + noise * torch.randn(images.shape, generator=torch.manual_seed(1))).clamp(0, 1))
    assert torch.equal(seen.factors["shape"], factors["shape"])
    for name in CONTINUOUS:
        assert (seen.factors[name] - factors[name]).abs().max() < tolerance, name
    assert seen.valid.all()


def test_images_of_no_world_are_not_valid() -> None:
    factors = random_factors(50)
    left = render({**factors, "x": torch.zeros(50)})
    right = render({**factors, "x": torch.ones(50)})
    both = torch.where((left - right).abs().amax(-1, keepdim=True) > 0.02, right, left)
    both[:, :, :16] = left[:, :, :16]
    assert not measure(both).valid.any()
    assert not measure(torch.rand(20, 32, 32, 3)).valid.any()


def test_larger_images_are_averaged_down() -> None:
    images = render(random_factors(20))
    large = images.repeat_interleave(2, 1).repeat_interleave(2, 2)
    for name, value in measure(images).factors.items():
        torch.testing.assert_close(measure(large).factors[name], value)
    with pytest.raises(ValueError, match="32k"):
        measure(torch.zeros(1, 40, 40, 3))


def test_concepts_leave_from_one_to_all_factors_open() -> None:
    counts = [len(open_factors(noun)) for noun in NOUNS]
    assert len(counts) >= 8 and min(counts) == 1 and max(counts) == len(WORDS)
    assert len({open_factors(noun) for noun in NOUNS}) == len(NOUNS)


def test_drawn_factors_keep_a_captions_promise() -> None:
    g = torch.Generator().manual_seed(0)
    captions = [draw_caption(g) for _ in range(500)]
    factors = draw_factors(captions, g)
    for factor in WORDS:
        words = word_of(factor, factors[factor])
        for i, caption in enumerate(captions):
            if factor in caption.named:
                assert words[i] == caption.named[factor]
            elif factor in NOUNS[caption.noun]:
                assert float(factors[factor][i]) == pytest.approx(NOUNS[caption.noun][factor])
    assert alignment(captions, measure(render(factors))) == 1.0


def test_open_factors_are_uniform_and_their_diversity_is_one() -> None:
    seen = measure(render(draw_factors([compose("thing", [])] * 3000, torch.Generator().manual_seed(0))))
    assert max(distance_to_uniform(seen.factors[name]) for name in CONTINUOUS) < 0.04
    assert diversity(seen, open_factors("thing")) == pytest.approx(1.0, abs=0.02)
    one = {name: values[:1].repeat(50) for name, values in seen.factors.items()}
    seen.factors = one
    assert diversity(seen, open_factors("thing")) == pytest.approx(0.0, abs=1e-6)
