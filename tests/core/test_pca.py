"""PCA against scikit-learn, and the rules and errors around it."""

import numpy as np
import pytest
import torch
from builders import HERE, gradients
from sklearn.decomposition import PCA

from elrond_core.decompose.moments import Moments
from elrond_core.decompose.pca import fit_pca
from elrond_core.errors import ElrondError


def sample(count: int, rows: int = 2, width: int = 20, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    size = rows * width
    scale = torch.arange(1, size + 1) ** -1.0
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=g))
    return ((torch.randn(count, size, generator=g) * scale) @ basis.T + 0.3).reshape(count, rows, width) * 1e-3


def repeated() -> torch.Tensor:
    return sample(7).repeat(9, 1, 1)


def constant(count: int) -> torch.Tensor:
    """Gradients some of whose values are always the same, zero or not."""
    vectors = sample(count).flatten(1)
    vectors[:, 3], vectors[:, 10:15], vectors[:, -1] = 0.0, 5e-3, -1.0
    return vectors.reshape(count, 2, 20)


CASES = {
    "N<d": sample(15),
    "N=d": sample(40),
    "N>d": sample(300),
    "rep": repeated(),
    "constant, N<d": constant(15),
    "constant, N=d": constant(40),
    "constant, N>d": constant(300),
}


@pytest.mark.parametrize("vectors", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("streamed", [False, True])
def test_agrees_with_scikit_learn(vectors: torch.Tensor, streamed: bool) -> None:
    source = Moments.of(gradients(vectors)) if streamed else gradients(vectors)
    directions, spectrum = fit_pca(source, significance=0.5)
    reference = PCA(svd_solver="full").fit(vectors.flatten(1).double().numpy())
    rank = len(directions)
    assert rank >= 3
    assert spectrum.eigenvalues.shape == reference.explained_variance_ratio_.shape
    np.testing.assert_allclose(spectrum.ratios, reference.explained_variance_ratio_, atol=1e-5)
    np.testing.assert_allclose(directions.scores, reference.explained_variance_ratio_[:rank], atol=1e-5)
    ours = directions.vectors.flatten(1).double().numpy()
    theirs = reference.components_[:rank]
    # Distance of the subspaces, and of each component up to its sign.
    np.testing.assert_allclose(ours.T @ ours, theirs.T @ theirs, atol=1e-5)
    np.testing.assert_allclose(np.abs((ours * theirs).sum(1)), 1.0, atol=1e-5)


@pytest.mark.parametrize("count", [15, 40, 300])
def test_directions_leave_what_is_constant_alone(count: int) -> None:
    vectors = fit_pca(gradients(constant(count)), significance=0)[0].vectors.flatten(1)
    assert len(vectors) == min(count - 1, 33)
    assert vectors[:, [3, *range(10, 15), -1]].abs().max() < 1e-6


def test_signs_and_norms() -> None:
    vectors = fit_pca(gradients(sample(30)), significance=0.1)[0].vectors.flatten(1)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-6)
    assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()


def test_the_order_of_the_gradients_does_not_matter() -> None:
    vectors = sample(30)
    one, two = fit_pca(gradients(vectors))[0], fit_pca(gradients(vectors.flip(0)))[0]
    assert torch.allclose(one.vectors, two.vectors, atol=1e-5)


def test_rules() -> None:
    source = gradients(sample(10))
    wide, narrow = fit_pca(source)[1], fit_pca(source, rule="samples")[1]
    total = float(wide.eigenvalues.sum())
    assert wide.threshold == pytest.approx(2.5 / 40 * total)
    assert narrow.threshold == pytest.approx(2.5 / 10 * total)
    assert wide.n_components == wide.significant == int((wide.ratios > 2.5 / 40).sum())
    assert narrow.n_components < wide.n_components


def test_isotropic_gradients_keep_one_and_say_so() -> None:
    vectors = torch.cat([torch.eye(40), -torch.eye(40)]).reshape(80, 2, 20)
    directions, spectrum = fit_pca(gradients(vectors))
    assert len(directions) == spectrum.n_components == 1 and spectrum.significant == 0
    assert spectrum.note == "No component is above the threshold; the leading one was kept."


def test_limit() -> None:
    directions, spectrum = fit_pca(gradients(sample(300)), significance=0, limit=3)
    assert len(directions) == 3
    assert spectrum.note == "40 components are above the threshold; the leading 3 were kept."


def test_no_direction_without_variance() -> None:
    assert len(fit_pca(gradients(sample(7)), significance=0)[0]) == 6


def test_provenance_and_method_travel() -> None:
    directions, _ = fit_pca(gradients(sample(12), provenance=HERE.with_(concept="monster")), significance=2)
    assert directions.provenance.concept == "monster"
    assert directions.method == {"name": "pca", "significance": "2", "rule": "width", "limit": "64"}


def nan_at_3() -> torch.Tensor:
    vectors = sample(12)
    vectors[3, 0, 0] = torch.inf
    return vectors


@pytest.mark.parametrize(
    ("vectors", "options", "sentence"),
    [
        (sample(1), {}, "needs at least 2 gradients, got 1"),
        (nan_at_3(), {}, "Gradient 3 is not finite"),
        (nan_at_3().repeat(9, 1, 1), {}, "Gradient 3 is not finite"),
        (sample(1).repeat(5, 1, 1), {}, "All gradients are the same"),
        (sample(1).repeat(50, 1, 1), {}, "All gradients are the same"),
        (torch.zeros(5, 2, 20), {}, "All gradients are the same"),
        (sample(5), {"significance": -1.0}, "significance must be zero or more, got -1"),
        (sample(5), {"significance": float("nan")}, "significance must be zero or more, got nan"),
        (sample(5), {"limit": 0}, "limit on directions must be at least 1, got 0"),
        (sample(5), {"rule": "kaiser"}, 'must be "width" or "samples", got "kaiser"'),
    ],
)
def test_what_is_refused(vectors: torch.Tensor, options: dict, sentence: str) -> None:
    with pytest.raises(ElrondError, match=sentence):
        fit_pca(gradients(vectors), **options)
