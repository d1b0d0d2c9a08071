"""Subspaces: angles against SciPy, the published measures, and what is shared."""

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from elrond_core.directions import Directions
from elrond_core.errors import ElrondError
from elrond_core.measure.subspace import compare, hallucination, orthonormal, principal_angles, reconstruction
from elrond_core.provenance import Provenance


def random(count: int, seed: int, rows: int = 2, width: int = 10) -> torch.Tensor:
    return torch.randn(count, rows, width, generator=torch.Generator().manual_seed(seed))


def directions(vectors: torch.Tensor, family: str = "SDXL") -> Directions:
    units = vectors / vectors.flatten(1).norm(dim=1)[:, None, None]
    return Directions(units, torch.ones(len(units)), {"name": "pca"}, Provenance(family))


AXES = torch.eye(20).reshape(20, 2, 10)


@pytest.mark.parametrize(("k_a", "k_b"), [(3, 3), (5, 2), (2, 7), (20, 4)])
def test_angles_agree_with_scipy(k_a: int, k_b: int) -> None:
    a, b = random(k_a, 1), random(k_b, 2)
    ours = principal_angles(orthonormal(a), orthonormal(b))
    theirs = scipy.linalg.subspace_angles(a.flatten(1).numpy().T, b.flatten(1).numpy().T)
    np.testing.assert_allclose(ours, np.rad2deg(theirs)[::-1], atol=1e-3)


def test_small_angles_are_told_apart() -> None:
    a = AXES[:2].double()
    b = a + 1e-9 * AXES[5:7]
    assert principal_angles(orthonormal(a), orthonormal(b)).numpy() == pytest.approx([5.7296e-8] * 2, rel=1e-3)


def test_reconstruction_and_hallucination() -> None:
    reference, sample = orthonormal(AXES[:4]), orthonormal(AXES[3:5])
    assert reconstruction(reference, sample) == pytest.approx(1 / 4)
    assert hallucination(reference, sample) == pytest.approx(1 / 2)
    assert reconstruction(reference, reference) == pytest.approx(1)
    assert hallucination(reference, reference) == pytest.approx(0)


def test_dependent_directions_span_what_they_span() -> None:
    assert len(orthonormal(torch.cat([AXES[:3], AXES[:3] * 2]))) == 3


def test_shared_and_exclusive() -> None:
    tilted = AXES[2] * np.cos(np.deg2rad(30)) + AXES[9] * np.sin(np.deg2rad(30))
    result = compare(directions(AXES[:4]), directions(torch.stack([AXES[1], tilted, AXES[7]])))
    assert result.angles.tolist() == pytest.approx([0, 30, 90], abs=1e-3)
    assert result.shared is not None and result.only_a is not None and result.only_b is not None
    assert torch.allclose(result.shared.vectors[0], AXES[1], atol=1e-6)
    assert result.shared.scores.tolist() == pytest.approx([1, np.cos(np.deg2rad(30))])
    # What only A spans: axes 0 and 3, in whatever basis; what only B spans: axis 7.
    only_a = result.only_a.vectors.flatten(1)
    assert torch.allclose((only_a[:, [0, 3]]).norm(dim=1), torch.ones(2), atol=1e-6)
    assert torch.allclose(result.only_b.vectors, AXES[7:8], atol=1e-6)
    assert result.only_a.scores.tolist() == pytest.approx([1, 1])
    assert result.cosines.shape == (4, 3)
    assert result.lines()[0] == "shared directions: 2, only in A: 2, only in B: 1"
    assert result.lines()[-1] == "principal angles: 0°, 30°, 90°"


def test_the_same_directions_share_everything() -> None:
    one = directions(random(4, 3))
    result = compare(one, one)
    assert result.only_a is None and result.only_b is None
    assert result.shared is not None and len(result.shared) == 4
    assert result.reconstruction == pytest.approx(1) and result.hallucination == pytest.approx(0, abs=1e-9)


def test_exclusive_directions_come_with_the_most_foreign_first() -> None:
    def tilted(axis: int, other: int, degrees: float) -> torch.Tensor:
        return AXES[axis] * np.cos(np.deg2rad(degrees)) + AXES[other] * np.sin(np.deg2rad(degrees))

    # A spans axes 0 to 3; of B one direction is in it, two are 50 and 70 degrees out of it, and one has no partner.
    a = directions(AXES[:4])
    b = directions(torch.stack([tilted(1, 11, 50), AXES[0], tilted(2, 12, 70), AXES[13], AXES[14]]))
    found = compare(a, b, limit=45)
    assert found.angles.tolist() == pytest.approx([0, 50, 70, 90], abs=1e-3)
    assert found.only_a is not None and found.only_b is not None
    sine = np.sin(np.deg2rad([50, 70]))
    assert found.only_a.scores.tolist() == pytest.approx([1, sine[1], sine[0]])
    assert found.only_b.scores.tolist() == pytest.approx([1, 1, sine[1], sine[0]])
    for ours, expected in ((found.only_a, AXES[[3, 2, 1]]), (found.only_b, b.vectors[[2, 0]])):
        overlaps = (ours.vectors.flatten(1)[-len(expected) :] @ expected.flatten(1).T).abs()
        assert torch.allclose(overlaps, torch.eye(len(expected)), atol=1e-5)
    # Two without a partner have no order between them, but they are axes 13 and 14.
    assert torch.allclose(found.only_b.vectors.flatten(1)[:2, [13, 14]].norm(dim=1), torch.ones(2), atol=1e-5)
    assert [part.method["name"] for part in (found.shared, found.only_a, found.only_b)] == [
        "pca, shared",
        "pca, only in A",
        "pca, only in B",
    ]
    swapped = compare(b, a, limit=45)
    assert swapped.only_a.scores.tolist() == pytest.approx(found.only_b.scores.tolist())
    assert swapped.only_b.scores.tolist() == pytest.approx(found.only_a.scores.tolist())
    everything = torch.cat([found.shared.vectors, found.only_a.vectors, found.only_b.vectors])
    assert len(orthonormal(everything)) == 8


@pytest.mark.parametrize("seed", range(5))
def test_rounding_makes_nothing_exclusive_and_no_share_negative(seed: int) -> None:
    one = directions(random(3, seed))
    turned = directions(torch.einsum("ij,jrd->ird", random(3, seed + 100, 1, 3)[:, 0], one.vectors))
    for other in (one, turned):
        found = compare(one, other, limit=0)
        assert found.only_a is None and found.only_b is None and len(found.shared) == 3
        assert 0 <= found.hallucination < 1e-6 and 1 - 1e-6 < found.reconstruction <= 1
        assert found.lines() == [
            "shared directions: 3, only in A: 0, only in B: 0",
            "reconstruction (of A by B): 1.00",
            "hallucination (of B beside A): 0.00",
            "principal angles: 0°, 0°, 0°",
        ]


def test_shares_stay_within_their_bounds() -> None:
    basis = orthonormal(random(7, 0)) * (1 + 1e-15)
    assert hallucination(basis, basis) == 0 and reconstruction(basis, basis) == 1


def test_large_sets_are_compared_without_their_whole_singular_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    decompose = torch.linalg.svd

    def counted(matrix: torch.Tensor, **options: bool) -> Any:
        shapes.append((*matrix.shape, options["full_matrices"]))
        return decompose(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    found = compare(directions(random(8, 0, 2, 40)), directions(random(60, 1, 2, 40)))
    assert shapes == [(8, 60, False)]
    assert len(found.only_b or ()) + len(found.shared or ()) == 60


@pytest.mark.parametrize(
    ("other", "limit", "sentence"),
    [
        (directions(AXES[:2], "Flux"), 45, "Directions of SDXL cannot be compared with directions of Flux"),
        (directions(AXES[:2].reshape(2, 1, 20)), 45, r"these have \(2, 10\) and \(1, 20\)"),
        (directions(AXES[:2]), 91, "between 0 and 90 degrees, got 91"),
    ],
)
def test_what_is_refused(other: Directions, limit: float, sentence: str) -> None:
    with pytest.raises(ElrondError, match=sentence):
        compare(directions(AXES[:3]), other, limit=limit)
