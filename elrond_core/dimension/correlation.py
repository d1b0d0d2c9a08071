"""Correlation dimension of a concept's images, as the concept's rows see them.

PCA overcounts curved manifolds: the images of one moving object lie on a curve that bends through many dimensions. The
correlation dimension (Grassberger and Procaccia, 1983, "Measuring the strangeness of strange attractors") counts the
ways to move along the manifold instead. It is the rate at which the number of neighbours grows with the radius.

Each realization is a point: the mean of the gradients towards it, over the realizations that were noised. In the
eigenvectors of `elrond_core.decompose.response`, where a step of the rows is measured by the change of the image that
it causes, the variance of these points along a component is that of the images along this change, in units of latent
values. A component counts if the points' standard deviation along it exceeds `CorrelationOptions.least_std`, and if
their variance exceeds what the scatter of the gradients would give Gaussian points by chance (Johnstone, 2008, for two
covariances). Components that count are scaled to equal variance.

If every gradient has its own noised realization, the points also scatter with all that differs between noised
realizations, most of all in distilled models, whose estimates are images from the first step on. A few noised
realizations should therefore be compared with all others: what they contribute is then the same for every point.

Evenly drawn points in a cube have a correlation dimension below that of the cube, because of its boundary, and the
deficit grows with the dimension. The result is therefore the dimension of the cube whose points have the observed
value. This assumes independent ways to vary, and distances (those of the closest 5 to 20 % of all pairs) above the
noise of the points and below the bends of the manifold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..decompose.moments import Moments, filled
from ..decompose.pca import descending
from ..decompose.response import components
from ..gradients import Gradients
from ..seeding import generator
from .noise import TRACY_WIDOM


@dataclass(frozen=True)
class CorrelationOptions:
    """Constants of the estimate.

    Attributes:
        least_std: standard deviation of the points along a component, in latent values, from which on it counts. A
            latent value itself has about 1; at 1, concepts with many ways to vary are underestimated.
        near, far: shares of all pairs; the slope is taken between the distances below which they lie.
        chance_rate: probability with which points without signal may exceed the level of chance.
        least_targets: fewest realizations that give a dimension.
        least_repeats: fewest gradients towards a realization that is used.
        most_targets: realizations that are compared at most; the time grows with their square.
        half_samples: half-samples for the interval.
        gradients_per_component: gradients above the groups' means for each component that is looked at; with fewer, a
            component would be fitted to noise.
        pairs_per_source: gradients of each noised realization, on average, from which on their mean is subtracted.
        cube_points: points in each cube that a slope is compared with. The slope hardly depends on it.
        highest: highest dimension of a cube, and so of the result.
    """

    least_std: float = 0.75
    near: float = 0.05
    far: float = 0.2
    chance_rate: float = 0.01
    least_targets: int = 30
    least_repeats: int = 2
    most_targets: int = 2000
    half_samples: int = 50
    gradients_per_component: int = 4
    pairs_per_source: int = 8
    cube_points: int = 500
    highest: int = 40


_DEFAULTS = CorrelationOptions()
# Gradients, or realizations, of which float64 copies are made at a time.
_BLOCK = 512


@dataclass(frozen=True)
class CorrelationDimension:
    """A correlation dimension and its uncertainty.

    Attributes:
        value: the dimension; 0 if no component counts.
        interval: its 90 % interval. It does not include errors in the choice of components.
    """

    value: float
    interval: tuple[float, float]


def correlation_dimension(
    gradients: Gradients, seed: int = 0, options: CorrelationOptions = _DEFAULTS
) -> CorrelationDimension | None:
    """Correlation dimension of the realizations, from the gradients of the highest noise level.

    The interval comes from half-samples without replacement; a bootstrap would repeat points, at distance zero.

    Args:
        gradients: gradients with Jacobian probes.
        seed: fixes the half-samples.
        options: constants of the method.

    Returns:
        The dimension; None without probes, or if too few realizations are the target of enough gradients.

    Raises:
        ElrondError: if a gradient or probe is not finite, or all are the same.
    """
    points = _points(gradients, options)
    if points is None:
        return None
    if not points.shape[1]:
        return CorrelationDimension(0.0, (0.0, 0.0))
    rng = generator(seed, "correlation dimension")
    points = points / points.std(0)
    points = points[torch.randperm(len(points), generator=rng)[: options.most_targets]]
    distances = torch.cdist(points, points)
    value = box_dimension(distances, options)
    halves = []
    for _ in range(options.half_samples):
        half = torch.randperm(len(points), generator=rng)[: len(points) // 2]
        halves.append(box_dimension(distances[half][:, half], options))
    # The spread of half-samples about the whole is that of whole samples about the truth.
    spread = 1.645 * float(torch.tensor(halves).sub(value).square().mean().sqrt())
    return CorrelationDimension(value, (max(0.0, value - spread), value + spread))


def _points(gradients: Gradients, options: CorrelationOptions) -> torch.Tensor | None:
    """Coordinates, float64 (G, V), of the G realizations with enough gradients along the V components that count.

    None where `correlation_dimension` is.
    """
    if len(gradients.levels) > 1:
        gradients = gradients.at_levels(gradients.levels[:1])
    groups = _grouped(gradients, options)
    count = int(groups.enough.sum())
    if not len(gradients.probes) or count < options.least_targets or groups.freedom < 1:
        return None
    most = max(1, groups.freedom // options.gradients_per_component)
    eigenvectors = components(gradients).eigenvectors[:, :most]
    groups = groups.without_source_means()
    variance, chance = _variances(groups, eigenvectors)
    eigenvalues, axes = descending(variance)
    expected = (chance @ axes).mul_(axes).sum(0)
    edge = chance_edge(len(axes), count, groups.freedom, options.chance_rate) - 1
    counts = (eigenvalues > options.least_std**2) & (eigenvalues > edge * expected)
    basis = eigenvectors @ axes[:, counts]
    points = torch.empty(count, basis.shape[1], dtype=torch.float64)
    return filled(points, (means[groups.enough[numbers]] @ basis for numbers, means, _ in groups.means()))


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


def _grouped(gradients: Gradients, options: CorrelationOptions) -> _Groups:
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


def correlation_slope(distances: torch.Tensor, near: float = _DEFAULTS.near, far: float = _DEFAULTS.far) -> float:
    """Growth of the number of neighbours with the distance, both as logarithms.

    ln(far/near) / ln(r(far)/r(near)), r(q) being the distance below which a share q of all pairs lies.

    Args:
        distances: (n, n) between points, symmetric.
        near: the lower share.
        far: the higher share.

    Returns:
        The slope; 0 where the distances give none.
    """
    upper = torch.ones_like(distances, dtype=torch.bool).triu(1)
    pairs = distances[upper].sort().values
    lower, higher = (float(pairs[round(share * (len(pairs) - 1))]) for share in (near, far))
    return math.log(far / near) / math.log(higher / lower) if higher > lower > 0 else 0.0


def box_dimension(distances: torch.Tensor, options: CorrelationOptions = _DEFAULTS) -> float:
    """Dimension of the cube whose evenly drawn points have the same `correlation_slope`.

    Args:
        distances: (n, n) between points, symmetric.
        options: constants of the method.
    """
    slopes = _slopes_of_cubes(options)
    slope = correlation_slope(distances, options.near, options.far)
    return float(np.interp(slope, slopes, np.arange(len(slopes))))


@functools.cache
def _slopes_of_cubes(options: CorrelationOptions) -> np.ndarray:
    """Slopes of evenly drawn points in cubes of 0 to `highest` dimensions, ascending."""
    slopes = [0.0]
    for size in range(1, options.highest + 1):
        points = torch.rand(options.cube_points, size, generator=generator(0, "cube", size), dtype=torch.float64)
        slopes.append(correlation_slope(torch.cdist(points, points), options.near, options.far))
    return np.maximum.accumulate(slopes)
