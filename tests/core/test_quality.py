"""The estimate of a sample's quality, on gradients whose true directions are known."""

import builders
import pytest
import torch

from elrond_core.decompose.pca import fit_pca
from elrond_core.errors import ElrondError
from elrond_core.gradients import Gradients
from elrond_core.measure.quality import StopAtQuality, split_half_quality
from elrond_core.measure.subspace import hallucination, reconstruction

SIGNAL, WIDTH = 4, 64
TRUTH = torch.eye(WIDTH, dtype=torch.float64)[:SIGNAL]
# Signal of 16, 12, 8 and 6 times the noise along four of the axes.
SCALES = torch.cat([torch.tensor([16.0, 12.0, 8.0, 6.0]), torch.ones(WIDTH - SIGNAL)]).sqrt()


def gradients(vectors: torch.Tensor, targets: torch.Tensor, sources: torch.Tensor | None = None) -> Gradients:
    return builders.gradients(
        vectors, targets=targets, sources=torch.arange(len(vectors)) if sources is None else sources
    )


def drawn(count: int, realizations: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of which four fifths of the variance come from so many realizations, and whose they are."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(realizations, WIDTH, generator=g) * SCALES
    owners = torch.randint(realizations, (count,), generator=g)
    noise = torch.randn(count, WIDTH, generator=g) * SCALES
    return 0.8**0.5 * images[owners] + 0.2**0.5 * noise, owners


def compare(count: int, realizations: int, of_sources: bool = False) -> tuple[float, float, float]:
    """Means over trials of the estimate, and of the true reconstruction and one less the hallucination."""
    rows = []
    for seed in range(12):
        vectors, owners = drawn(count, realizations, seed)
        places = torch.arange(count)
        sample = gradients(vectors, places, owners) if of_sources else gradients(vectors, owners, places)
        found = fit_pca(sample)[0].vectors.flatten(1).double()
        truth = (reconstruction(TRUTH, found), 1 - hallucination(TRUTH, found))
        rows.append([split_half_quality(sample, seed=seed), *truth])
    estimate, share, right = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    return estimate, share, right


@pytest.mark.parametrize("count", [250, 1000, 4000])
def test_the_estimate_is_the_truth(count: int) -> None:
    estimate, share, right = compare(count, 10 * count)
    # A tenth of the true error: what twelve trials leave of it, and what the formula leaves out.
    assert 1 - estimate == pytest.approx(1 - share, rel=0.1)
    assert 1 - estimate == pytest.approx(1 - right, rel=0.1)


@pytest.mark.parametrize("of_sources", [False, True])
def test_few_realizations_are_seen(of_sources: bool) -> None:
    estimate, share, _ = compare(4000, 200, of_sources)
    assert 1 - share > 5 * (1 - compare(4000, 40_000, of_sources)[1])
    assert 1 - estimate == pytest.approx(1 - share, rel=0.15)


def test_a_sample_of_noise_is_not_trusted() -> None:
    noise = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(0))
    assert split_half_quality(gradients(noise, torch.arange(100))) < 0.5


@pytest.mark.parametrize("wanted", [0.9, 0.97])
def test_a_collection_stops_where_it_is_good_enough(wanted: float) -> None:
    right = []
    for seed in range(8):
        vectors, owners = drawn(8000, 80_000, seed)
        sufficient = StopAtQuality(wanted, 8000)
        count = next(n for n in range(16, 8000, 16) if sufficient(gradients(vectors[:n], owners[:n])))
        assert wanted <= sufficient.estimate and sufficient.count == count
        found = fit_pca(gradients(vectors[:count], owners[:count]))[0].vectors.flatten(1).double()
        right.append(reconstruction(TRUTH, found))
        assert f"{sufficient.estimate:.4f}, {wanted:g} was asked for" in sufficient.line()
    mean = sum(right) / len(right)
    # Never by chance long before, and not much later: the error falls as fast as the number of gradients grows.
    assert min(right) > 1 - 1.3 * (1 - wanted) and (1 - wanted) / 1.6 < 1 - mean < 1.1 * (1 - wanted)


def test_a_collection_that_is_never_good_enough_says_so() -> None:
    vectors, owners = drawn(300, 5, 0)
    sufficient = StopAtQuality(0.99, 300)
    assert not sufficient(gradients(vectors[:63], owners[:63])) and sufficient.estimate is None
    assert not sufficient(gradients(vectors[:64], owners[:64])) and sufficient.count == 64
    assert not sufficient(gradients(vectors[:79], owners[:79])) and sufficient.count == 64
    assert not sufficient(gradients(vectors[:79], owners[:79]), last=True) and sufficient.count == 79
    assert "collect more gradients, or of more realizations" in sufficient.line()


def test_what_is_refused() -> None:
    with pytest.raises(ElrondError, match="of at least two sources and two targets"):
        split_half_quality(gradients(torch.randn(8, WIDTH), torch.zeros(8, dtype=torch.int64)))
    with pytest.raises(ElrondError, match="at least 4 gradients"):
        split_half_quality(gradients(torch.randn(3, WIDTH), torch.arange(3)))
    for wanted in (0.0, 1.0, float("nan")):
        with pytest.raises(ElrondError, match="must be above 0 and below 1"):
            StopAtQuality(wanted, 100)
    with pytest.raises(ElrondError, match="at least 64 gradients: raise the count, which is 63"):
        StopAtQuality(0.9, 63)
