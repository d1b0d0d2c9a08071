"""Response-normalised directions on a linear model x̂0 = J c, where everything has a closed form."""

from dataclasses import replace

import pytest
import torch

from elrond_core.collect.collection import CollectionPlan, collect
from elrond_core.decompose.pca import fit_pca
from elrond_core.decompose.response import choose_ridge, components, fit_response, halved_metric
from elrond_core.errors import ElrondError
from elrond_core.gradients import Gradients
from elrond_core.measure.subspace import orthonormal, principal_angles
from elrond_core.provenance import Provenance

WIDTH, LATENTS = 8, 60
VARIANCES = torch.tensor([16.0, 6.0, 2.0, 0.5])


def basis(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))[0]


class Linear:
    """x̂0 = J c, whatever the noise; J answers to its eight input directions with 1 … 1/16."""

    def __init__(self) -> None:
        self.rows = torch.zeros(2, WIDTH // 2)
        self.axes = basis(LATENTS, WIDTH, 0)
        self.jacobian = self.axes @ torch.diag(2 ** -torch.linspace(0, 4, WIDTH)) @ basis(WIDTH, WIDTH, 1)
        # Factors are oblique to what the model answers to most, so that PCA of gradients mixes them.
        self.factors = self.axes @ basis(WIDTH, WIDTH, 2)[:, : len(VARIANCES)]

    def rows_at(self, sigma: float) -> torch.Tensor:
        return self.rows

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        return latents + sigma * noise

    def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        return rows.flatten(1) @ self.jacobian.T

    def realizations(self, count: int) -> torch.Tensor:
        values = torch.randn(count, len(VARIANCES), generator=torch.Generator().manual_seed(3))
        return (values * VARIANCES.sqrt()) @ self.factors.T


def plan(count: int) -> CollectionPlan:
    return CollectionPlan(count=count, sigma=(1.0,), seed=0, batch_size=500, probes=True)


@pytest.fixture(scope="module")
def gradients() -> Gradients:
    model = Linear()
    return collect(model, model.realizations(1000), Provenance("linear"), plan(2000))


def movement(vectors: torch.Tensor) -> torch.Tensor:
    """Cosine between the image change of each direction and each factor, (K, factors), absolute."""
    model = Linear()
    change = vectors.flatten(1) @ model.jacobian.T
    return (change @ model.factors / change.norm(dim=1, keepdim=True)).abs()


def test_each_direction_moves_one_factor(gradients: Gradients) -> None:
    directions, spectrum = fit_response(gradients, significance=0.25)
    assert len(directions) == len(VARIANCES)
    assert (movement(directions.vectors).diagonal() > 0.99).all()
    assert spectrum.ridge < 1e-2
    assert torch.allclose(directions.vectors.flatten(1).norm(dim=1), torch.ones(4), atol=1e-6)


@pytest.mark.parametrize("rotate", [False, True])
def test_reach_is_that_of_the_steps_which_make_the_images(gradients: Gradients, rotate: bool) -> None:
    """Parts of that reach along the directions have the covariance of J⁺(images)."""
    directions, _ = fit_response(gradients, significance=0.25, ridge=1e-6, rotate=rotate)
    parts = directions.vectors.flatten(1) * torch.tensor(directions.natural_std)[:, None]
    model = Linear()
    steps = model.realizations(1000) @ torch.linalg.pinv(model.jacobian).T
    torch.testing.assert_close(parts.T @ parts, steps.T.cov(), atol=0.15 * float(steps.var(0).max()), rtol=0)
    unknown = replace(gradients, provenance=gradients.provenance.with_(latent_values=0))
    assert fit_response(unknown, ridge=1e-6)[0].natural_std == ()


def test_scores_are_latent_variances(gradients: Gradients) -> None:
    directions, spectrum = fit_response(gradients, significance=1)
    assert directions.scores.tolist() == pytest.approx(VARIANCES[:3].tolist(), rel=0.1)
    assert spectrum.significant == spectrum.n_components == 3 and spectrum.threshold == 1
    assert float(spectrum.eigenvalues[4:].max()) < 0.05


def test_the_vector_steers_and_its_dual_does_not(gradients: Gradients) -> None:
    directions, _ = fit_response(gradients, significance=0.25)
    dual = directions.vectors.flatten(1) @ Linear().jacobian.T @ Linear().jacobian
    assert movement(dual).diagonal().min() < 0.9
    assert movement(fit_pca(gradients, significance=0, limit=4)[0].vectors).diagonal().min() < 0.9


@pytest.fixture(scope="module")
def equals() -> Gradients:
    """Gradients of four factors that vary equally much, each uniformly and by itself."""
    model = Linear()
    values = torch.rand(3000, 4, generator=torch.Generator().manual_seed(5)) - 0.5
    realizations = values * 48**0.5 @ model.factors.T
    return collect(model, realizations, Provenance("linear"), plan(4000))


def test_a_rotation_tells_factors_of_equal_variance_apart(equals: Gradients) -> None:
    mixed = movement(fit_response(equals, limit=4)[0].vectors)
    directions, _ = fit_response(equals, limit=4, rotate=True)
    apart = movement(directions.vectors)
    assert mixed.amax(1).min() < 0.95
    assert apart.amax(1).min() > 0.99 and sorted(apart.argmax(1).tolist()) == [0, 1, 2, 3]
    assert directions.scores.tolist() == pytest.approx([4.0] * 4, rel=0.1)


def test_a_rotation_spans_the_same_and_repeats(equals: Gradients) -> None:
    first, again = (fit_response(equals, limit=4, rotate=True, seed=7)[0] for _ in range(2))
    plain = fit_response(equals, limit=4)[0]
    assert torch.equal(first.vectors, again.vectors)
    assert principal_angles(orthonormal(first.vectors), orthonormal(plain.vectors)).max() < 0.01
    assert first.scores.sum() == pytest.approx(float(plain.scores.sum()), rel=1e-5)


def test_what_a_token_norm_does_not_change_is_left_out(equals: Gradients) -> None:
    """The ridge is the response of a movement that changes the image by one latent value's variation in all."""
    for norm in (0.5, 4.0):
        provenance = equals.provenance.with_(token_norm=norm)
        ridge = components(replace(equals, provenance=provenance)).ridge
        mean = float(Linear().jacobian.square().sum()) / WIDTH
        assert ridge == pytest.approx(1 / norm**2 / mean, rel=0.1)
    unknown = replace(equals, provenance=equals.provenance.with_(latent_values=0))
    assert components(unknown).ridge == choose_ridge(*halved_metric(equals.probes))


def test_a_large_ridge_is_pca(gradients: Gradients) -> None:
    ours = fit_response(gradients, significance=0, limit=3, ridge=1e6)[0].vectors
    theirs = fit_pca(gradients, significance=0, limit=3)[0].vectors
    assert principal_angles(orthonormal(ours), orthonormal(theirs)).max() < 0.1


def test_fewer_responses_than_dimensions(gradients: Gradients) -> None:
    few = Gradients(
        gradients.vectors[:6],
        gradients.sigma[:6],
        gradients.sources[:6],
        gradients.targets[:6],
        gradients.provenance,
        gradients.probes[:5],
    )
    directions, spectrum = fit_response(few)
    assert torch.isfinite(directions.vectors).all() and 1 <= len(directions) <= 6
    assert spectrum.ridge > fit_response(gradients)[1].ridge


def test_the_ridge_falls_with_the_sample() -> None:
    scale = 2.0 ** -torch.linspace(0, 5, 30)
    sample = torch.randn(3000, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
    ridges = [choose_ridge(*halved_metric(sample[:count])) for count in (20, 100, 3000)]
    assert ridges[0] > ridges[1] > ridges[2]


def changed(gradients: Gradients, **changes: torch.Tensor) -> Gradients:
    return Gradients(**{**vars(gradients), **changes})


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({"probes": torch.empty(0, 2, 4)}, {}, "came without the model's response"),
        ({"probes": torch.ones(1, 2, 4)}, {}, "at least 2 samples, got 1"),
        ({"probes": torch.full((3, 2, 4), torch.nan)}, {}, "The response is not finite"),
        ({"vectors": torch.full((2000, 2, 4), torch.inf)}, {}, "Gradient 0 is not finite"),
        ({"vectors": torch.zeros(2000, 2, 4)}, {}, "nothing to decompose"),
        ({"probes": torch.zeros(3, 2, 4)}, {}, "nothing to decompose"),
        ({}, {"ridge": 0.0}, "ridge must be above zero"),
        ({}, {"limit": 0}, "limit on directions must be at least 1"),
        ({}, {"significance": -1}, "significance must be zero or more"),
    ],
)
def test_what_is_refused(gradients: Gradients, changes: dict, options: dict, sentence: str) -> None:
    with pytest.raises(ElrondError, match=sentence):
        fit_response(changed(gradients, **changes), **options)
