"""Nearest-neighbour dimension of a concept's images, as the concept's rows see them.

PCA overcounts curved manifolds: the images of one moving object lie on a curve that bends through many dimensions.
What grows with the number of ways to move along the manifold is how fast neighbours become more with the distance. It
is estimated from the nearest neighbours of each point by maximum likelihood (Levina and Bickel, 2004, "Maximum
likelihood estimation of intrinsic dimension"; averaged over points as MacKay and Ghahramani, 2005, correct it). It
looks at neighbours only: that the kinds of a concept lie far apart does not make it one of few ways.

Each realization is a point: the mean of the gradients towards it, over the realizations that were noised. Points are
compared in the eigenvectors of `elrond_core.decompose.response`, where a step of the rows is measured by the change of
the image that it causes: distances are those of images, in latent values, so far as the rows can make them. A component
counts if the points' variance along it exceeds what the scatter of the gradients would give Gaussian points by chance
(Johnstone, 2008, for two covariances).

If every gradient has its own noised realization, the points scatter with all that differs between noised realizations,
most of all in distilled models, whose estimates are images from the first step on. To near neighbours, that noise looks
like many dimensions. Its variance follows from the same scatter. What of it is across the manifold is taken from the
squared distances, and neighbours that are nearer than two copies of one point would be are left out: the likelihood is
that of distances beyond.

A few noised realizations should therefore be compared with all others. A gradient is linear in the image that it points
to (it is the Jacobian's product with a difference), so the mean over the same noised realizations is a linear picture
of the images, without any noise; what the points scatter with is the variance of a mean over a sample of these, with
the usual correction for a sample that is a large part of all.

Points near the boundary of a set have neighbours on one side only, which lowers the estimate, the more the higher the
dimension. The result is therefore the dimension of the cube whose evenly drawn points, as many, have the observed
value.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import brentq

from ..decompose.moments import Moments, filled
from ..decompose.pca import descending
from ..decompose.response import components
from ..gradients import Gradients
from ..seeding import generator
from .noise import TRACY_WIDOM


@dataclass(frozen=True)
class NeighbourOptions:
    """Constants of the estimate. None depends on a model.

    Attributes:
        neighbours: of each point; the fewest that Levina and Bickel use. With more, the neighbours of a point of a rare
            kind would be of other kinds.
        chance_rate: probability with which points without signal may exceed the level of chance.
        least_targets: fewest realizations that give a dimension.
        least_repeats: fewest gradients towards a realization that is used.
        most_targets: realizations that are compared at most; the time grows with their square.
        half_samples: half-samples for the interval.
        gradients_per_component: gradients above the groups' means for each component that is looked at; with fewer, a
            component would be fitted to noise.
        pairs_per_source: gradients of each noised realization, on average, from which on their mean is subtracted.
        highest: highest dimension of a cube, and so of the result.
    """

    neighbours: int = 10
    chance_rate: float = 0.01
    least_targets: int = 30
    least_repeats: int = 2
    most_targets: int = 1000
    half_samples: int = 50
    gradients_per_component: int = 4
    pairs_per_source: int = 8
    highest: int = 40


_DEFAULTS = NeighbourOptions()
# Gradients, or realizations, of which float64 copies are made at a time.
_BLOCK = 512
# Points that are drawn in all for one value of a cube, in as many sets as that makes.
_CUBE_POINTS = 1000
# To so many parts of one is the share of distances rounded that a cube's points are cut at.
_SHARES = 50


@dataclass(frozen=True)
class NeighbourDimension:
    """A nearest-neighbour dimension and its uncertainty.

    Attributes:
        value: the dimension; 0 if no component counts.
        interval: its 90 % interval. It does not include errors in the choice of components.
    """

    value: float
    interval: tuple[float, float]


def neighbour_dimension(
    gradients: Gradients, seed: int = 0, options: NeighbourOptions = _DEFAULTS
) -> NeighbourDimension | None:
    """Nearest-neighbour dimension of the realizations, from the gradients of the highest noise level.

    The interval comes from half-samples without replacement; a bootstrap would repeat points, at distance zero.

    Args:
        gradients: gradients with Jacobian probes.
        seed: fixes the half-samples.
        options: constants of the method.

    Returns:
        The dimension; None without probes, if too few realizations are the target of enough gradients, or if too few
        of them differ by more than their noise.

    Raises:
        ElrondError: if a gradient or probe is not finite, or all are the same.
    """
    found = _points(gradients, options)
    if found is None:
        return None
    points, noise = found
    if not points.shape[1]:
        return NeighbourDimension(0.0, (0.0, 0.0))
    rng = generator(seed, "neighbour dimension")
    points = points[torch.randperm(len(points), generator=rng)[: options.most_targets]]
    # Products of matrices would lose the small distances to rounding.
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    if noise:
        # Noise along the manifold only blurs where its points are; what is across it looks like more dimensions.
        noise *= max(0.0, 1 - box_dimension(distances, 0.0, options) / points.shape[1])
    # The root of the mean square distance between two copies of a point, across the manifold.
    least = math.sqrt(2 * noise)
    distances.square_().sub_(2 * noise).clamp_min_(0).sqrt_().fill_diagonal_(0)
    found_value = box_dimension(distances, least, options)
    halves = []
    for _ in range(options.half_samples):
        half = torch.randperm(len(points), generator=rng)[: len(points) // 2]
        halves.append(box_dimension(distances[half][:, half], least, options))
    if math.isnan(found_value) or any(map(math.isnan, halves)):
        return None
    # Noise along one component makes no second one.
    most = min(points.shape[1], options.highest)
    value = min(float(most), found_value)
    # The spread of half-samples is that of whole samples about the truth.
    spread = 1.645 * float(torch.tensor(halves, dtype=torch.float64).std())
    return NeighbourDimension(value, (max(0.0, value - spread), min(float(most), value + spread)))


def _points(gradients: Gradients, options: NeighbourOptions) -> tuple[torch.Tensor, float] | None:
    """Coordinates, float64 (G, V), of the G realizations with enough gradients along the V components that count.

    And the variance of their noise, summed over these components. None where `neighbour_dimension` is.
    """
    if len(gradients.levels) > 1:
        gradients = gradients.at_levels(gradients.levels[:1])
    groups = _grouped(gradients, options)
    count = int(groups.enough.sum())
    if not len(gradients.probes) or min(count, groups.freedom) < options.least_targets:
        return None
    most = max(1, groups.freedom // options.gradients_per_component)
    eigenvectors = components(gradients).eigenvectors[:, :most]
    groups = groups.without_source_means()
    variance, chance = _variances(groups, eigenvectors)
    eigenvalues, axes = descending(variance)
    expected = (chance @ axes).mul_(axes).sum(0)
    edge = chance_edge(len(axes), count, groups.freedom, options.chance_rate) - 1
    counts = eigenvalues > edge * expected
    basis = eigenvectors @ axes[:, counts]
    points = torch.empty(count, basis.shape[1], dtype=torch.float64)
    filled(points, (means[groups.enough[numbers]] @ basis for numbers, means, _ in groups.means()))
    # Each mean is over a sample of the noised realizations; where these are the same for all, it has no noise.
    of_all = 1 / (float((1 / groups.sizes[groups.enough]).mean()) * len(groups.source_sizes)) if groups.shared else 0.0
    return points, float(expected[counts].sum()) * max(0.0, 1 - of_all)


def _variances(groups: _Groups, eigenvectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Covariance (K, K) of the points along eigenvectors (D, K), less its expectation by chance; and the latter."""
    scatter = torch.zeros(len(eigenvectors), len(eigenvectors), dtype=torch.float64)
    points = Moments.empty(1, eigenvectors.shape[1], groups.gradients.provenance)
    for numbers, means, rows in groups.means():
        for block in rows.split(_BLOCK):
            deviations = groups.vectors(block).sub_(means[groups.target[block] - numbers[0]])
            scatter.addmm_(deviations.T, deviations)
        points.add(means[groups.enough[numbers]] @ eigenvectors)
    chance = eigenvectors.T @ scatter @ eigenvectors
    chance *= (1 / groups.sizes[groups.enough]).mean() / groups.freedom
    return points.covariance().sub_(chance), chance


@dataclass(frozen=True)
class _Groups:
    """Gradients of one noise level, grouped by target.

    A (D, D) matrix in float64 is large for real models, and so are all gradients in float64: they are read in blocks.

    Attributes:
        gradients: N of them.
        target: int64, (N,): number of each gradient's target, among the T targets.
        sizes: int64, (T,): gradients of each target.
        enough: bool, (T,): whether a target has enough gradients.
        source: int64, (N,): number of each gradient's noised realization; neighbours of one source are one noising.
        source_sizes: int64, (S,): gradients of each noised realization.
        source_means: float64, (S, D): what is subtracted from the gradients of each noised realization, or None.
        shared: whether noised realizations have enough gradients for their means to be subtracted.
        freedom: degrees of freedom of the scatter about the means of the targets.
    """

    gradients: Gradients
    target: torch.Tensor
    sizes: torch.Tensor
    enough: torch.Tensor
    source: torch.Tensor
    source_sizes: torch.Tensor
    shared: bool
    freedom: int
    source_means: torch.Tensor | None = None

    def without_source_means(self) -> _Groups:
        """The same gradients, from which the mean of their noised realization is subtracted if it is known."""
        if not self.shared:
            return self
        rows = torch.arange(len(self.source))
        return replace(self, source_means=self._group_means(rows, self.source, self.source_sizes))

    def vectors(self, rows: torch.Tensor) -> torch.Tensor:
        """These gradients, float64 (len(rows), D), in memory of their own."""
        vectors = self.gradients.flat[rows].double()
        return vectors if self.source_means is None else vectors.sub_(self.source_means[self.source[rows]])

    def means(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """In blocks of targets: their numbers, the means of their gradients, and the numbers of these gradients."""
        blocks = torch.arange(len(self.sizes)).split(_BLOCK)
        rows_of_blocks = self.target.argsort(stable=True).split([int(self.sizes[numbers].sum()) for numbers in blocks])
        for numbers, rows in zip(blocks, rows_of_blocks, strict=True):
            yield numbers, self._group_means(rows, self.target[rows] - numbers[0], self.sizes[numbers]), rows

    def _group_means(self, rows: torch.Tensor, group: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(len(sizes), self.gradients.flat.shape[1], dtype=torch.float64)
        for block, groups in zip(rows.split(_BLOCK), group.split(_BLOCK), strict=True):
            sums.index_add_(0, groups, self.vectors(block))
        return sums.div_(sizes[:, None])


def _grouped(gradients: Gradients, options: NeighbourOptions) -> _Groups:
    targets, target, sizes = gradients.targets.unique(return_inverse=True, return_counts=True)
    source = torch.cat([gradients.sources.new_zeros(1), gradients.sources.diff().ne(0).cumsum(0)])
    source_sizes = source.bincount()
    shared = len(gradients) >= options.pairs_per_source * len(source_sizes)
    return _Groups(
        gradients=gradients,
        target=target,
        sizes=sizes,
        enough=sizes >= options.least_repeats,
        source=source,
        source_sizes=source_sizes,
        shared=shared,
        freedom=len(gradients) - len(targets) - (len(source_sizes) - 1 if shared else 0),
    )


def chance_edge(size: int, points: int, freedom: int, rate: float = _DEFAULTS.chance_rate) -> float:
    """How many times its expectation the variance of Gaussian points without signal may be along any direction.

    The largest root of two Wishart matrices (Johnstone, 2008, "Multivariate analysis and Jacobi ensembles: largest
    eigenvalue, Tracy-Widom limits and rates of convergence").

    Args:
        size: dimensions of the points.
        points: their number.
        freedom: degrees of freedom of the scatter that their expected variance is known from.
        rate: probability of exceeding the result.
    """
    total = points - 1 + freedom - 1
    sizes = min(size, points - 1), max(size, points - 1)
    low, high = (2 * math.asin(math.sqrt((dimensions - 0.5) / total)) for dimensions in sizes)
    centre = 2 * math.log(math.tan((low + high) / 2))
    scale = (16 / total**2 / (math.sin(low + high) ** 2 * math.sin(low) * math.sin(high))) ** (1 / 3)
    return math.exp(centre + scale * float(TRACY_WIDOM.ppf(1 - rate))) * freedom / (points - 1)


def local_dimension(distances: torch.Tensor, neighbours: int = _DEFAULTS.neighbours, least: float = 0.0) -> float:
    """The most likely dimension of points whose density is even about each of them.

    Beyond `least`, the logarithms of the distances r of a point's neighbours below that of its last one, R, are
    exponential with the dimension as their rate, cut off at ln(R/least).

    Args:
        distances: float64 (n, n) between points, symmetric.
        neighbours: number of nearest neighbours of each point that are used, beyond `least`.
        least: distances up to this are left out.

    Returns:
        The dimension; NaN where no point has so many neighbours, or they are spread like those of no dimension.
    """
    beyond = distances.clone().fill_diagonal_(0)
    beyond[beyond <= least] = math.inf
    if len(beyond) < neighbours:
        return math.nan
    near = beyond.topk(neighbours, dim=1, largest=False).values
    near = near[torch.isfinite(near[:, -1])]
    logs = (near[:, -1:] / near[:, :-1]).log().numpy()
    if not logs.size or not logs.sum() > 0:
        return math.nan
    mean = float(logs.mean())
    if not least:
        return 1 / mean
    ends = (near[:, -1] / least).log().numpy()

    def excess(rate: float) -> float:
        """The expected mean less the observed one."""
        return float(1 / rate - np.mean(ends / np.expm1(np.minimum(rate * ends, 700)))) - mean

    # Without the cut the rate would be higher: 1 / mean, which rounding may make the root itself. Where the least
    # expects less already, no rate is positive.
    lowest, highest = 1e-6, 1 / mean
    if excess(lowest) <= 0:
        return math.nan
    return highest if excess(highest) >= 0 else float(brentq(excess, lowest, highest))


def box_dimension(distances: torch.Tensor, least: float = 0.0, options: NeighbourOptions = _DEFAULTS) -> float:
    """Dimension of the cube whose evenly drawn points have the same `local_dimension`; NaN where that is.

    Args:
        distances: float64 (n, n) between points, symmetric.
        least: distances up to this are left out. Of the cube's, as large a share is.
        options: constants of the method.
    """
    value = local_dimension(distances, options.neighbours, least)
    if math.isnan(value):
        return value
    count = len(distances)
    within = int((distances <= least).sum()) - count if least else 0
    share = round(_SHARES * within / (count * (count - 1))) / _SHARES
    sizes, values = _values_of_cubes(count, options.neighbours, share, options.highest)
    return float(np.interp(value, values, sizes))


@functools.cache
def _values_of_cubes(count: int, neighbours: int, share: float, highest: int) -> tuple[np.ndarray, np.ndarray]:
    """Dimensions from 0 to `highest`, and the mean `local_dimension` of points in cubes of these, ascending."""
    sizes = sorted({*range(1, 13), *np.geomspace(12, max(highest, 13), 8).round().astype(int).tolist()})
    sizes = [size for size in sizes if size <= highest]
    values = []
    for size in sizes:
        found = []
        for number in range(max(1, _CUBE_POINTS // count)):
            rng = generator(0, f"cube {size}", number)
            points = torch.rand(count, size, generator=rng, dtype=torch.float64)
            distances = torch.cdist(points, points)
            least = float(distances[~torch.eye(count, dtype=torch.bool)].quantile(share)) if share else 0.0
            found.append(local_dimension(distances, neighbours, least))
        values.append(0.0 if np.isnan(found).all() else float(np.nanmean(found)))
    return np.array([0, *sizes]), np.maximum.accumulate([0.0, *values])
