"""Diversity of images against what it must be in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from elrond_core.errors import ElrondError
from elrond_core.measure.diversity import alignment, of_features, of_pixels, vendi_score


@pytest.mark.parametrize("groups", [[1, 1, 1, 1], [4], [2, 2], [3, 1], [5, 2, 1]])
def test_the_vendi_score_of_groups_is_the_entropy_of_their_sizes(groups: list[int]) -> None:
    """Images alike within a group and unlike across have the eigenvalues n_g / N."""
    similarity = torch.block_diag(*[torch.ones(n, n) for n in groups])
    total = sum(groups)
    entropy = -sum(n / total * math.log(n / total) for n in groups)
    assert vendi_score(similarity) == pytest.approx(math.exp(entropy), rel=1e-9)


@pytest.mark.parametrize("cosine", [0.0, 0.3, 0.9, 1.0])
def test_two_images_in_closed_form(cosine: float) -> None:
    """A 2 x 2 kernel has the eigenvalues (1 ± c) / 2."""
    found = of_features(torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]]) * 7)
    shares = [(1 + cosine) / 2, (1 - cosine) / 2]
    assert found.vendi == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares if p > 0)), abs=1e-6)
    assert found.distance == pytest.approx(1 - cosine, abs=1e-6)


def test_equally_similar_images_in_closed_form() -> None:
    """N images of pairwise similarity c: one eigenvalue (1 + (N − 1) c) / N and N − 1 of (1 − c) / N."""
    count, c = 9, 0.4
    similarity = torch.full((count, count), c).fill_diagonal_(1)
    values = [(1 + (count - 1) * c) / count] + [(1 - c) / count] * (count - 1)
    assert vendi_score(similarity) == pytest.approx(math.exp(-sum(v * math.log(v) for v in values)), rel=1e-6)


def test_pixels_tell_alike_from_different() -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.rand(1, 48, 40, 3, generator=g)
    alike = (base + 0.01 * torch.randn(6, 48, 40, 3, generator=g)).clamp(0, 1)
    flat = torch.linspace(0, 1, 6)[:, None, None, None].expand(6, 48, 40, 3)
    same, near, far = (of_pixels(x) for x in (base.expand(6, -1, -1, -1), alike, flat))
    assert (same.distance, same.vendi) == pytest.approx((0, 1), abs=1e-6)
    assert near.vendi < 1.1 < 3 < far.vendi <= 6
    # Plain greys 0.2 apart: distances are the differences of the greys, whatever the size of the images.
    assert far.distance == pytest.approx(0.2 * sum(i * (6 - i) for i in range(1, 6)) / 15, rel=1e-5)
    assert far.nearest_distance == pytest.approx(0.2, rel=1e-5)


def test_the_nearest_pair_is_found() -> None:
    images = torch.rand(7, 33, 33, 3, generator=torch.Generator().manual_seed(1))
    images[5] = images[2] + 0.001
    found = of_pixels(images)
    assert found.nearest == (2, 5)
    assert "images 2 and 5" in "\n".join(found.lines())


def test_alignment_is_the_cosine_with_the_text() -> None:
    found = alignment(torch.tensor([[2.0, 0.0], [3.0, 3.0], [0.0, -1.0]]), torch.tensor([5.0, 0.0]))
    torch.testing.assert_close(found.cosines, torch.tensor([1, 0.5**0.5, 0], dtype=torch.float64))
    assert found.mean == pytest.approx((1 + 0.5**0.5) / 3)
    assert found.lines()[1] == "least aligned: image 2, 0.0000"


@pytest.mark.parametrize(
    ("features", "text", "sentence"),
    [
        (torch.ones(2, 3), torch.ones(4), "makes 3 numbers and the text encoder 4: use the two halves of one CLIP"),
        (torch.ones(2, 3), torch.zeros(3), "The text has no features"),
        (torch.ones(2, 3), torch.full((3,), float("inf")), "not finite"),
        (torch.tensor([[1.0], [0.0]]), torch.ones(1), "Image 1 has no features"),
    ],
)
def test_what_cannot_be_aligned(features: torch.Tensor, text: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ElrondError, match=sentence):
        alignment(features, text)


def test_what_cannot_be_measured() -> None:
    with pytest.raises(ElrondError, match="at least two images, got 1"):
        of_pixels(torch.zeros(1, 8, 8, 3))
    with pytest.raises(ElrondError, match="Image 1 holds numbers that are not finite"):
        of_features(torch.tensor([[1.0], [float("nan")]]))
    with pytest.raises(ElrondError, match="Image 1 has no features"):
        of_features(torch.tensor([[1.0], [0.0]]))
