"""Directions between words, on a linear model x̂0 = J c whose factors and words are known."""

from dataclasses import replace

import builders
import pytest
import torch

from elrond_core.decompose.words import fit_words
from elrond_core.errors import ElrondError
from elrond_core.gradients import Gradients
from elrond_core.provenance import Provenance

WIDTH, LATENTS, COUNT = 40, 90, 4000
VARIANCES = torch.tensor([50.0, 9.0, 4.0], dtype=torch.float64)
PAIRS = (("dark", "bright"), ("small", "large"), ("left", "right"))
IDLE = ("shiny", "wooden")


def basis(rows: int, columns: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=g, dtype=torch.float64))[0]


FACTORS = basis(LATENTS, 3, 0)
# How far a word at the end of a factor moves the rows: a loud factor is not the one with the longest move.
MOVES = basis(WIDTH, 8, 1)[:, :3] * torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
# The model answers to the moves by the factors they name, and to nothing else.
JACOBIAN = FACTORS @ torch.linalg.pinv(MOVES)


def gradients(noise: float = 0.0) -> Gradients:
    g = torch.Generator().manual_seed(2)
    images = torch.randn(COUNT, 3, generator=g, dtype=torch.float64) * VARIANCES.sqrt() @ FACTORS.T
    white = torch.randn(COUNT, LATENTS, generator=g, dtype=torch.float64)
    vectors = 2 / LATENTS * (images + noise * torch.randn(images.shape, generator=g, dtype=torch.float64)) @ JACOBIAN
    response = 2 / LATENTS * white @ JACOBIAN
    return builders.gradients(
        vectors.float(),
        sources=torch.arange(COUNT),
        targets=torch.arange(COUNT),
        probes=response.float(),
        provenance=Provenance("linear", latent_values=LATENTS, token_norm=10.0),
    )


def rows(order: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The concept's row without a word, and with each; all words share a move of their own."""
    bare, common = basis(WIDTH, 8, 1)[:, 3] * 10, basis(WIDTH, 8, 1)[:, 4] * 5
    places = {
        word: sign * MOVES[:, k] for k, pair in enumerate(PAIRS) for sign, word in zip((-1, 1), pair, strict=True)
    }
    places |= {word: basis(WIDTH, 8, 1)[:, 5 + k] * 4 for k, word in enumerate(IDLE)}
    moved = torch.stack([bare + common + places[word] for word in order])
    return bare[None], moved[:, None]


ORDER = ["left", "bright", "shiny", "large", "dark", "wooden", "right", "small"]


def test_opposites_are_paired_and_ranked_by_how_much_the_images_vary() -> None:
    found = fit_words(gradients(), ORDER, *rows(ORDER), ridge=1e-4)
    assert found.names == ("bright → dark", "large → small", "left → right")
    # A pair changes the image by two units, whose square is four.
    assert found.scores.tolist() == pytest.approx((VARIANCES * 4 / 4.1).tolist(), rel=0.1)
    expected = torch.nn.functional.normalize(MOVES * torch.tensor([-1.0, -1.0, 1.0]), dim=0).T
    torch.testing.assert_close(found.vectors[:, 0].double(), expected, atol=1e-6, rtol=0)


def test_reach_is_the_step_that_varies_the_image_as_the_images_vary() -> None:
    found = fit_words(gradients(), ORDER, *rows(ORDER), ridge=1e-6)
    change = (JACOBIAN @ found.vectors[:, 0].double().T).norm(dim=0)
    made = torch.tensor(found.natural_std, dtype=torch.float64) * change
    torch.testing.assert_close(made, (VARIANCES * 4 / 4.1).sqrt(), rtol=0.1, atol=0)
    unknown = gradients()
    unknown = replace(unknown, provenance=unknown.provenance.with_(latent_values=0))
    assert fit_words(unknown, ORDER, *rows(ORDER)).natural_std == ()


def test_a_pair_that_also_moves_a_louder_factor_comes_late() -> None:
    """ "left → right" and "west → east" move x as far, the latter with some brightness, which is explained already."""
    order = [*ORDER, "west", "east"]
    bare, moved = rows(order[:-2])
    shift = moved[ORDER.index("right")] - moved[ORDER.index("left")]
    light = 0.5 * (moved[ORDER.index("bright")] - moved[ORDER.index("dark")])
    middle = moved[ORDER.index("left")] + shift / 2
    moved = torch.cat([moved, (middle - (shift + light) / 2)[None], (middle + (shift + light) / 2)[None]])
    names = fit_words(gradients(), order, bare, moved, ridge=1e-4, significance=0.0).names
    assert names[:3] == ("bright → dark", "large → small", "left → right")


def test_words_that_say_different_things_are_no_pair() -> None:
    """The images vary more from "small" to "right" than from "small" to "large", but these two are opposites."""
    bare, moved = rows(ORDER)
    common = moved.mean(0)
    size = 0.1 * (moved - common)
    places = {"small": size[ORDER.index("small")], "large": size[ORDER.index("large")]}
    places["right"] = moved[ORDER.index("right")] - common
    order = [*places, *(f"idle {k}" for k in range(60))]
    several = common + torch.stack([*places.values(), *[torch.zeros_like(common)] * 60])
    found = fit_words(gradients(), order, bare, several, ridge=1e-4, significance=0.2)
    assert "small → large" in found.names


def test_the_same_gradients_give_the_same_pairs_with_noise() -> None:
    assert fit_words(gradients(0.5), ORDER, *rows(ORDER), ridge=1e-3, limit=3).names == (
        "bright → dark",
        "large → small",
        "left → right",
    )


def test_limit_and_significance_cut() -> None:
    assert len(fit_words(gradients(), ORDER, *rows(ORDER), ridge=1e-4, limit=2)) == 2
    assert len(fit_words(gradients(), ORDER, *rows(ORDER), ridge=1e-4, significance=20)) == 1
    assert len(fit_words(gradients(), ORDER, *rows(ORDER), ridge=1e-4, significance=1e5)) == 1


def test_what_is_refused() -> None:
    bare, moved = rows(ORDER)
    with pytest.raises(ElrondError, match="use the text encoder they were made with"):
        fit_words(gradients(), ORDER, bare[:, :8], moved[:, :, :8])
    with pytest.raises(ElrondError, match="No word put before the concept changes its rows"):
        fit_words(gradients(), ORDER, bare, bare.expand(len(ORDER), -1, -1))
    with pytest.raises(ElrondError, match="came without the model's response"):
        fit_words(replace(gradients(), probes=torch.empty(0, 1, WIDTH)), ORDER, bare, moved)
    with pytest.raises(ElrondError, match="do not vary along the move from any of these words"):
        fit_words(gradients(), IDLE, bare, moved[[ORDER.index(word) for word in IDLE]])
