"""Intrinsic dimension: known ranks found whatever the sample, and no guess where there is nothing to see."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import skdim
import torch
from builders import gradients

from elrond_core.decompose.moments import Moments
from elrond_core.dimension.neighbours import NeighbourOptions, box_dimension, chance_edge, local_dimension
from elrond_core.dimension.report import estimate_lid
from elrond_core.errors import ElrondError
from elrond_core.gradients import Gradients


def sample(rank: int, count: int, strength: float, spread: float = 0.0, size: int = 64, seed: int = 0) -> Gradients:
    """Gradients (count, 1, size) of known rank: power-law variances, the least `strength` times what can be seen."""
    g = torch.Generator().manual_seed(seed)
    noise = 1 + spread * math.sqrt(3) * (2 * torch.rand(size, generator=g) - 1)
    variances = strength * math.sqrt(size / count) * rank / torch.arange(1, rank + 1)
    axes = torch.linalg.qr(torch.randn(size, rank, generator=g))[0]
    signal = (torch.randn(count, rank, generator=g) * variances.sqrt()) @ axes.T
    return gradients((signal + torch.randn(count, size, generator=g) * noise.sqrt())[:, None])


@pytest.mark.parametrize(("count", "rank"), [(250, 4), (250, 16), (2000, 4), (2000, 16)])
@pytest.mark.parametrize("spread", [0.0, 0.15])
def test_known_ranks(count: int, rank: int, spread: float) -> None:
    for seed in range(3):
        report = estimate_lid(sample(rank, count, 6.0, spread, seed=seed))
        assert abs(report.estimate - rank) <= 0.1 * rank
        low, high = report.interval
        assert low <= rank and (high is None or rank <= high)
        assert report.noise == pytest.approx(1, abs=0.15)


def test_noise_is_not_taken_for_signal_one_eigenvalue_after_the_other() -> None:
    # With these seeds, the noise that is left when some of it has been taken for signal looks narrower by just as much.
    for count, rank, strength, spread, seed in ((10_000, 4, 3.0, 0.0, 26), (4_000, 12, 5.0, 0.18, 23)):
        report = estimate_lid(Moments.of(sample(rank, count, strength, spread, seed=seed)))
        assert report.estimate == rank and report.detectable
        assert report.interval[0] <= rank


def test_does_not_drift_with_the_sample_where_the_published_do() -> None:
    # Variances that stay the same while the sample grows.
    reports = [estimate_lid(sample(12, count, 4.0 * math.sqrt(count / 300))) for count in (300, 1000, 6000)]
    assert [report.estimate for report in reports] == [12, 12, 12]
    assert reports[1].detectable and reports[2].detectable
    assert len({report.variance95 for report in reports} | {12}) > 1


def test_fewer_gradients_than_dimensions() -> None:
    report = estimate_lid(sample(6, 100, 6.0, size=300))
    assert report.estimate == 6 and len(report.eigenvalues) == 99 == len(report.null)


def test_several_rows_and_moments_give_the_same() -> None:
    source = sample(4, 500, 6.0)
    rows = gradients(source.vectors.reshape(500, 2, 32))
    one, two, three = estimate_lid(source), estimate_lid(rows), estimate_lid(Moments.of(rows))
    assert one.lines() == two.lines() == three.lines()
    assert two.threshold == pytest.approx(one.threshold)


def test_says_so_when_nothing_can_be_seen() -> None:
    for seed in range(4):
        report = estimate_lid(sample(4, 400, 0.1, seed=seed))
        assert report.estimate <= 1 and not report.detectable and report.interval[1] is None
    report = estimate_lid(gradients(sample(4, 400, 0.0).vectors))
    assert report.estimate == 0
    assert report.conclusion == "Nothing rises above the noise floor of 400 gradients; collect more."


@pytest.mark.parametrize("spread", [0.0, 0.15])
def test_noise_alone_holds_nothing(spread: float) -> None:
    found = [estimate_lid(sample(0, count, 1.0, spread, seed=seed)) for count in (250, 2000) for seed in range(10)]
    assert sum(report.estimate == 0 for report in found) >= 18
    assert not any(report.detectable for report in found if report.estimate == 0)


def test_signal_that_comes_down_to_the_noise_is_counted_though_noise_may_reach_as_far() -> None:
    # Sixteen variances, seven of them between 1.5 and 2.4 times the least that can be seen.
    found = [estimate_lid(sample(16, 1000, 1.5, seed=seed)) for seed in range(8)]
    assert sum(abs(report.estimate - 16) <= 2 for report in found) >= 6
    assert all(report.interval[0] <= 16 <= (report.interval[1] or 64) for report in found)


def test_intervals_close_where_the_signal_ends_above_the_noise() -> None:
    found = [estimate_lid(sample(16, 1000, 3.0, seed=seed)) for seed in range(8)]
    assert sum(report.detectable for report in found) >= 6
    for report in found:
        low, high = report.interval
        assert low <= 16 and (high is None or 16 <= high <= 19)


@pytest.mark.parametrize(("count", "size"), [(200, 64), (25, 100)])
@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_signal_far_above_the_noise_is_in_no_doubt(count: int, size: int, noise: float) -> None:
    g = torch.Generator().manual_seed(0)
    clean = torch.randn(count, 3, generator=g) @ torch.randn(3, size, generator=g)
    report = estimate_lid(gradients((clean + noise * torch.randn(count, size, generator=g))[:, None]))
    assert report.detectable and report.estimate == report.interval[0] == 3


@pytest.mark.parametrize(("count", "strength"), [(4000, 6.0), (30_000, 12.0)])
def test_noise_of_few_uneven_variances_is_not_taken_for_signal(count: int, strength: float) -> None:
    # Each of the 48 variances of the noise shows; read off the lower of them, its edge is far from certain.
    for seed in range(8):
        report = estimate_lid(sample(16, count, strength, 0.17, seed=seed))
        assert abs(report.estimate - 16) <= 1 and report.interval[0] <= 16


def test_says_so_when_signal_runs_into_the_noise() -> None:
    for seed in range(4):
        report = estimate_lid(sample(16, 400, 0.4, seed=seed))
        assert not report.detectable and report.estimate < 16 and report.interval[1] is None
        assert "more may be hidden" in report.conclusion
        assert f"{report.interval[0]} or more" in report.lines()[1]


def test_says_so_without_a_noise_floor() -> None:
    scale = 0.8 ** torch.arange(64)
    report = estimate_lid(
        gradients((torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * scale)[:, None])
    )
    assert not report.detectable


def test_published_estimates() -> None:
    # Orthogonal gradients of exactly known variances: 32 % on each of two axes, 18 % on two more, nothing else.
    half = torch.cat([torch.diag(torch.tensor([2.0, 2.0, 1.5, 1.5])) @ torch.eye(4, 40)] * 10)
    report = estimate_lid(gradients(torch.cat([half, -half])[:, None]))
    assert report.variance95 == 4 and report.ratio == 4 and report.gap == 4 == report.estimate
    assert estimate_lid(gradients(torch.cat([half, -half])[:, None]), significance=8).ratio == 2


def curved(ways: int, seed: int, realizations: int = 300, noise: float = 0.2) -> Gradients:
    """Gradients of a linear model whose images run along arcs, one a way, each bent through six dimensions.

    The first way is a hundred times as loud as the others, in what it does to the gradients.
    """
    g = torch.Generator().manual_seed(seed)
    angles = 0.5 * torch.pi * torch.rand(realizations, ways, generator=g)
    bends = [[(k * angles).cos() / k**2, (k * angles).sin() / k**2] for k in (1, 2, 3)]
    images = 10 * torch.stack([wave for pair in bends for wave in pair], 2).flatten(1)
    jacobian = torch.linalg.qr(torch.randn(40, images.shape[1], generator=g))[0].T
    jacobian[:6] *= 100
    targets = torch.arange(8 * realizations) % realizations
    vectors = (images[targets] + noise * torch.randn(len(targets), images.shape[1], generator=g)) @ jacobian
    return placed(vectors, targets, torch.randn(500, images.shape[1], generator=g) @ jacobian)


def placed(vectors: torch.Tensor, targets: torch.Tensor, response: torch.Tensor) -> Gradients:
    """Gradients (N, d) of as many noised realizations, with a response (M, d)."""
    return gradients(vectors, targets=targets, sources=torch.arange(len(targets)), probes=response)


def crossed(noised: int, ways: int, seed: int, unsteady: float, realizations: int = 200) -> Gradients:
    """Gradients of a few noised realizations compared with all others, each answering with a Jacobian of its own."""
    g = torch.Generator().manual_seed(seed)
    # One way is as loud as all the others together, or louder.
    images = (
        torch.tensor([200.0] + [8.0] * (ways - 1)) * torch.rand(realizations, ways, generator=g) @ torch.eye(ways, 30)
    )
    mean = torch.linalg.qr(torch.randn(30, 30, generator=g))[0]
    jacobians = mean + unsteady * torch.randn(noised, 30, 30, generator=g)
    estimates = 300 * torch.randn(noised, 1, 30, generator=g)
    vectors = (estimates - images) @ jacobians
    response = torch.randn(noised, 40, 30, generator=g) @ jacobians
    sources, targets = torch.arange(noised).repeat_interleave(realizations), torch.arange(realizations).repeat(noised)
    others = sources != targets
    found = placed(vectors.flatten(0, 1)[others], targets[others], response.flatten(0, 1))
    return replace(found, sources=sources[others])


@pytest.mark.parametrize("ways", [1, 2, 3])
def test_neighbours_count_ways_to_vary_not_bends(ways: int) -> None:
    reports = [estimate_lid(curved(ways, seed)) for seed in range(3)]
    assert all(report.dimension == report.neighbour for report in reports)
    assert [report.dimension for report in reports] == pytest.approx([ways] * 3, rel=0.25)
    # The linear ones count the bends, or see nothing but the loud way.
    assert all(report.estimate >= 6 * ways - 1 for report in reports)


def test_a_loud_way_does_not_hide_the_others() -> None:
    assert estimate_lid(curved(3, 0)).dimension == pytest.approx(3, rel=0.2)
    # Nor does it matter how strongly the model answers to which movement of the rows.
    found = curved(3, 0)
    g = torch.Generator().manual_seed(3)
    skewed = torch.randn(found.vectors.shape[2], found.vectors.shape[2], generator=g) * torch.logspace(0, 1, 40)
    again = replace(found, vectors=found.vectors @ skewed, probes=found.probes @ skewed)
    assert estimate_lid(again).dimension == pytest.approx(estimate_lid(found).dimension, rel=0.05)


def test_neighbour_dimension_grows_with_the_ways_and_hardly_with_the_sample() -> None:
    values = [estimate_lid(curved(ways, 1)).dimension for ways in (1, 2, 3, 4)]
    assert values == sorted(values)
    few, many = (estimate_lid(curved(2, 1, realizations)).dimension for realizations in (100, 1000))
    assert few == pytest.approx(many, rel=0.15)


def test_interval_of_the_neighbour_dimension_covers_that_of_many_realizations() -> None:
    truth = np.mean([estimate_lid(curved(2, 100 + seed, 1500)).dimension for seed in range(3)])
    intervals = [estimate_lid(curved(2, seed, 200)).neighbour_interval for seed in range(20)]
    assert sum(low <= truth <= high for low, high in intervals) >= 15


def test_local_dimension_agrees_with_an_independent_one() -> None:
    g = torch.Generator().manual_seed(0)
    places = torch.randn(400, 3, generator=g) @ torch.linalg.qr(torch.randn(30, 3, generator=g))[0].T
    other = skdim.id.MLE().fit(places.double().numpy(), n_neighbors=10).dimension_
    assert local_dimension(torch.cdist(places.double(), places.double()), 10) == pytest.approx(other, rel=1e-3)
    targets = torch.arange(800) % 400
    found = placed(4 * places[targets], targets, torch.randn(300, 30, generator=g))
    # A cube's boundary is corrected for; normally distributed points have more of it.
    assert estimate_lid(found).neighbour == pytest.approx(3, rel=0.25)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_neighbours_within_the_noise_are_left_out(size: int) -> None:
    g = torch.Generator().manual_seed(size)
    clean = 10 * torch.rand(300, size, generator=g, dtype=torch.float64)
    points = torch.cat([clean, torch.zeros(300, 40 - size)], 1) + 0.05 * torch.randn(300, 40, generator=g)
    # As `neighbour_dimension` does: copies of a point are so far apart.
    noise = math.sqrt(2 * 40) * 0.05
    distances = torch.cdist(points, points)
    beyond = (distances.square() - noise**2).clamp_min(0).sqrt()
    assert box_dimension(beyond, noise) == pytest.approx(size, rel=0.3)
    if size == 1:
        assert box_dimension(distances) > 3


def test_distances_beyond_a_limit_have_the_dimension_of_all() -> None:
    """Where density is even, the truncated likelihood sees the same dimension at every scale."""
    g = torch.Generator().manual_seed(0)
    # A torus has no boundary.
    angles = 2 * math.pi * torch.rand(3000, 2, generator=g, dtype=torch.float64)
    points = torch.stack([angles.cos(), angles.sin()], 2).flatten(1)
    distances = torch.cdist(points, points)
    for least in (0.0, 0.05, 0.1, 0.2):
        assert local_dimension(distances, 10, least) == pytest.approx(2, rel=0.06)


def kinds(count: int, each: int, size: int, seed: int = 0) -> torch.Tensor:
    """Distances between points of well separated cubes, `each` in each of them."""
    g = torch.Generator().manual_seed(seed)
    cubes = [
        torch.rand(each, size, generator=g, dtype=torch.float64)
        @ torch.linalg.qr(torch.randn(30, size, generator=g, dtype=torch.float64))[0].T
        + 3 * torch.randn(30, generator=g, dtype=torch.float64)
        for _ in range(count)
    ]
    return torch.cdist(torch.cat(cubes), torch.cat(cubes))


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("count", [2, 10])
def test_a_mixture_of_kinds_does_not_read_lower_than_the_kinds(count: int, size: int) -> None:
    """As many images of each kind as were taken of one alone."""
    mixed = np.mean([box_dimension(kinds(count, 100, size, seed)) for seed in range(3)])
    alone = np.mean([box_dimension(kinds(1, 100, size, seed)) for seed in range(3)])
    assert mixed > 0.85 * alone


@pytest.mark.parametrize("ways", [2, 3, 5])
def test_a_concept_that_contains_another_reads_higher(ways: int) -> None:
    for seed in range(3):
        wide, narrow = (crossed(8, count, seed, unsteady=0.03) for count in (ways, ways - 1))
        assert estimate_lid(wide).dimension > estimate_lid(narrow).dimension


@pytest.mark.parametrize("size", [1, 2, 4, 6])
@pytest.mark.parametrize("normal", [False, True])
def test_neighbour_dimension_of_points_of_known_dimension(size: int, normal: bool) -> None:
    g = torch.Generator().manual_seed(size)
    points = torch.randn(200, size, generator=g) if normal else torch.rand(200, size, generator=g)
    places = 20 * points @ torch.linalg.qr(torch.randn(30, size, generator=g))[0].T
    targets = torch.arange(800) % 200
    found = placed(
        places[targets] + 0.1 * torch.randn(800, 30, generator=g), targets, torch.randn(300, 30, generator=g)
    )
    assert estimate_lid(found).neighbour == pytest.approx(size, rel=0.25 if normal else 0.15)
    # Nor does it only look right because no more components count.
    assert box_dimension(torch.cdist(points.double(), points.double())) == pytest.approx(size, rel=0.3)


@pytest.mark.parametrize(("realizations", "repeats", "size"), [(300, 8, 64), (300, 2, 64), (100, 4, 200), (30, 2, 40)])
def test_noise_alone_varies_in_no_way(realizations: int, repeats: int, size: int) -> None:
    targets = torch.arange(realizations * repeats) % realizations
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        noise, response = torch.randn(len(targets), size, generator=g), torch.randn(400, size, generator=g)
        report = estimate_lid(placed(10 * noise, targets, response))
        assert report.dimension == 0 == report.neighbour and report.neighbour_interval == (0, 0)
        assert "no more than chance" in report.lines()[0]
        # Nor does what it is added to vary in more ways than it does.
        noise[:, :1] += 10 * torch.rand(realizations, 1, generator=g)[targets]
        found = estimate_lid(placed(10 * noise, targets, response)).dimension
        assert found == pytest.approx(1, abs=0.25)


def test_chance_reaches_its_edge_as_often_as_it_should() -> None:
    g = torch.Generator().manual_seed(0)
    for size, places, freedom in ((7, 30, 30), (40, 100, 400), (60, 40, 300)):
        over = 0
        for _ in range(200):
            between, within = (
                torch.randn(rows, size, generator=g, dtype=torch.float64).T.cov() for rows in (places, freedom + 1)
            )
            over += scipy.linalg.eigh(between, within, eigvals_only=True)[-1] > chance_edge(size, places, freedom)
        assert over <= 8


@pytest.mark.parametrize("ways", [1, 2, 4])
@pytest.mark.parametrize("noised", [8, 24])
def test_noised_realizations_compared_with_all_others_tell_however_differently_they_answer(
    ways: int, noised: int
) -> None:
    for seed in range(3):
        assert estimate_lid(crossed(noised, ways, seed, unsteady=0.03)).dimension == pytest.approx(ways, rel=0.25)


def test_the_unit_of_the_images_does_not_matter() -> None:
    found = crossed(4, 3, 0, unsteady=0)
    assert estimate_lid(found).dimension == pytest.approx(3, rel=0.25)
    quiet = replace(found, vectors=found.vectors * 1e-3)
    assert estimate_lid(quiet).dimension == pytest.approx(estimate_lid(found).dimension, rel=0.01)
    # How many neighbours are taken is a choice that the caller may make.
    more = estimate_lid(found, neighbours=NeighbourOptions(neighbours=20))
    assert more.dimension != estimate_lid(found).dimension


def test_nothing_is_told_where_neighbours_are_too_few_or_within_the_noise() -> None:
    found = crossed(4, 3, 0, unsteady=0, realizations=32)
    assert estimate_lid(found).neighbour is not None
    # Half of them is 16.
    assert estimate_lid(found, neighbours=NeighbourOptions(neighbours=16)).neighbour is None
    distances = torch.cdist(*2 * [torch.rand(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)])
    assert math.isnan(local_dimension(distances, 40)) and math.isnan(box_dimension(distances, 2.0))
    assert math.isnan(local_dimension(torch.ones(20, 20, dtype=torch.float64), 10))


def test_equal_realizations_do_not_upset_the_estimate() -> None:
    g = torch.Generator().manual_seed(0)
    points = torch.rand(200, 3, generator=g, dtype=torch.float64)
    twice = torch.cat([points, points[:100]])
    distances = torch.cdist(twice, twice, compute_mode="donot_use_mm_for_euclid_dist")
    assert box_dimension(distances) == pytest.approx(box_dimension(torch.cdist(points, points)), rel=0.15)


def test_a_limit_far_below_all_distances_changes_nothing() -> None:
    for seed in range(50):
        points = torch.rand(60, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        distances = torch.cdist(points, points)
        assert local_dimension(distances, 10, 1e-12) == pytest.approx(local_dimension(distances, 10), rel=1e-6)


def test_more_ways_than_can_be_told_apart_are_said_to_be_many() -> None:
    g = torch.Generator().manual_seed(0)
    targets = torch.arange(900) % 300
    found = placed(20 * torch.randn(300, 100, generator=g)[targets], targets, torch.randn(400, 100, generator=g))
    assert "40 or more" in estimate_lid(found).lines()[0]


def test_too_few_gradients_towards_each_realization_leave_the_count_above_the_noise_floor() -> None:
    found = curved(2, 0)
    lonely = replace(found, targets=torch.arange(len(found)))
    few = replace(found, targets=found.targets % 20)
    deaf = replace(found, probes=found.probes[:0])
    for report in (estimate_lid(lonely), estimate_lid(few), estimate_lid(deaf)):
        assert report.neighbour is None and report.dimension == report.estimate
        assert "30 realizations or more" in report.lines()[0]


def test_agrees_with_an_independent_estimator() -> None:
    vectors = sample(5, 2000, 400.0).vectors[:, 0].numpy()
    other = skdim.id.lPCA(ver="maxgap").fit(vectors).dimension_
    assert estimate_lid(gradients(torch.from_numpy(vectors)[:, None])).estimate == int(np.round(other)) == 5


@pytest.mark.parametrize(
    ("vectors", "sentence"),
    [
        (torch.randn(19, 1, 64), "at least 20 gradients of 20 values, got 19 gradients of 64"),
        (torch.randn(50, 1, 8), "at least 20 gradients of 20 values, got 50 gradients of 8"),
        (torch.ones(50, 1, 64), "All gradients are the same"),
        (torch.full((50, 1, 64), torch.nan), "Gradient 0 is not finite"),
    ],
)
def test_what_is_refused(vectors: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ElrondError, match=sentence):
        estimate_lid(gradients(vectors))
