"""Subspaces: angles against SciPy, the published measures, and what is shared."""

import numpy as np
import pytest
import scipy.linalg
import torch

from elrond_core.directions import Directions
from elrond_core.errors import ElrondError
from elrond_core.gradients import Gradients
from elrond_core.moments import Moments
from elrond_core.provenance import Provenance
from elrond_core.subspace import compare, hallucination, orthonormal, principal_angles, reconstruction, variance_shares


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


def test_variance_shares() -> None:
    vectors = torch.cat([3 * AXES[:1], -3 * AXES[:1], AXES[1:2], -AXES[1:2]])
    zeros = torch.zeros(4, dtype=torch.int64)
    source = Gradients(vectors, torch.ones(4), zeros, zeros, Provenance("SDXL"), torch.empty(0, 2, 10))
    shares = variance_shares(directions(AXES[:3]), Moments.of(source))
    assert shares.tolist() == pytest.approx([0.9, 0.1, 0])
    with pytest.raises(ElrondError, match="Directions of 20 values do not fit moments of 4"):
        variance_shares(directions(AXES[:3]), Moments.empty(1, 4, Provenance("SDXL")))


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
