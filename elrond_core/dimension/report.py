"""How many directions a concept has: the intrinsic dimension of its gradients.

The three published estimates put the cut where the sample happens to lie, and drift with its size. Ours asks which
eigenvalues noise alone could not have made. The eigenvalues of a sample of noise spread even if its variances are all
equal (Marchenko and Pastur, 1967), and further where they are not; so the noise's variances are taken to be Gamma or
uniformly distributed, whichever fits better, with a level and a spread read off the lower part of the spectrum (Ke, Ma
and Lin, 2023, "Estimation of the number of spiked eigenvalues in a covariance matrix by bulk eigenvalue matching
analysis", who take the Gamma distribution; its tail lies too high where variances end), and the largest eigenvalue of
such noise follows (El Karoui, 2007, "Tracy-Widom limit for the largest eigenvalue of a large class of
complex sample covariance matrices"). How far off level and spread may be is seen by fitting simulated noise; so the
edge of the noise is not one number but many draws. There is no signal unless an eigenvalue exceeds what noise hardly
ever reaches; if one does, each draw is weighed by how likely it makes the eigenvalues on either side of it, and the
number of signals is that with the most weight. Only eigenvalues are needed, not the gradients, so that moments will do.

That counts all that the gradients hold, and it counts linearly: an image whose one factor is a position runs along a
curve that bends through many dimensions. How many ways there are to vary is a property of that curve, not of the space
it bends through. The gradients towards one target, averaged over what was noised, place that realization among the
others, as the concept's rows see them; in the coordinates of `elrond_core.decompose.response`, where a movement of the
rows counts by the change it causes, the variance of the places along a component is that of the images along this
change, in latent values. Components count along which the places vary by a standard deviation of more than three
quarters of a latent value, and by more than what scatter among the gradients could make of Gaussian places (Johnstone,
2008, for two covariances); each counts alike, however loud. A latent value itself varies by about one; at that, too few
components of concepts of many ways count. If every realization is noised by itself, the places scatter with all that
differs between one noised realization and another, most of all in distilled models, whose estimates look like images
from the first step on. So compare a few noised realizations with all the others: what they answer is then the same for
all places.

The places have a correlation dimension (Grassberger and Procaccia, 1983, "Measuring the strangeness of strange
attractors"): how fast the number of neighbours grows with the radius. Points in a box with sides fall short of its
dimension, the more the higher it is; so the dimension is that of the box, every way varying evenly and by itself, whose
points do the same. It assumes that distances at which 5 to 20 % of all pairs are neighbours lie above the noise of the
places and below the bends of the curve, and that ways vary independently.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import gammaincinv
from scipy.stats import gamma

from ..decompose.moments import Moments, filled
from ..decompose.pca import descending, fit_pca
from ..decompose.response import components
from ..errors import ElrondError
from ..gradients import Gradients
from ..seeding import generator

# How often noise alone exceeds what tells that there is signal at all (it is looked at more than once), and what the
# signal's density is taken from; and how seldom what is looked for at any number of signals may come by chance.
_RARE, _SELDOM, _HARDLY = 0.01, 0.05, 0.001
# Draws of the noise's variances, and of the largest eigenvalue from each; how often its fit is repeated on simulated
# noise of at most so many values, to see how far off it may be.
_DRAWS, _EACH = 400, 5
_REPEATS, _SMALL = 100, 100
# Eigenvalues by which the density of signal and of noise is told where one turns into the other.
_WEAKEST, _STRONGEST = 4, 8
# The Tracy-Widom law as a shifted Gamma (Chiani, 2014).
_TRACY_WIDOM = gamma(46.446, loc=-9.84801, scale=0.186054)
# Quantiles of the lower 60 % of the bulk: signal that was not found yet sits at the top.
_LEVELS = (np.arange(40) + 0.5) / 40 * 0.6
_SPREADS = np.sqrt([0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0])
# The widest uniform distribution of variances.
_EVEN = 0.57
_CAP = 400
_FLAT = 0.5
# Shares of the pairs of realizations between whose distances the correlation dimension is taken; the fewest
# realizations and gradients a target for it, the most that are compared, and how often half of them is drawn.
_NEAR, _FAR = 0.05, 0.2
_LEAST_TARGETS, _LEAST_REPEATS, _MOST_TARGETS, _HALVES = 30, 2, 2000, 50
# Standard deviation of the places, in latent values, along a component that counts; how many others a noised
# realization is compared with where the mean of its gradients is taken away; and gradients at a time.
_VARIES, _SHARED, _BLOCK = 0.75, 8, 512
# Points in the cubes that a slope is compared with, and their highest dimension.
_POINTS, _MOST = 500, 40


@dataclass(frozen=True)
class LIDReport:
    """Estimates of the intrinsic dimension, side by side.

    Attributes:
        estimate: the likeliest number of eigenvalues that are signal; 0 if noise alone could have made them all.
        interval: 90 % interval (parametric bootstrap: signal and noise redrawn from what was fitted); its upper end is
            None where the signal is not detectable to its end.
        detectable: whether the signal ends above the noise: had it gone on as it falls, more of it would have been
            seen; if not, `estimate` is a lower bound.
        verdict: the same in a sentence.
        variance95: components to reach 95 % of the variance.
        gap: place of the largest gap between singular values (Stanczuk et al., arXiv 2212.12611).
        ratio: eigenvalues whose share is above C/(R·d) (ELROND, step 5).
        correlation: correlation dimension of the realizations as the concept's rows see them, 0 where they do not
            differ by more than chance; None where there are too few of them (30), too few gradients towards each (2),
            no response, or moments only.
        correlation_interval: its 90 % interval (half-samples of the realizations), or None.
        eigenvalues: float64, (P,): variances of the principal components, descending.
        null: float64, (P,): what the fitted noise alone would have had in their place.
        threshold: halfway between the weakest signal and the strongest noise; where there is no signal, what noise
            exceeds once in a hundred times.
        visible: the smallest variance of a direction, noise included, that this many gradients can show (the
            transition of Baik, Ben Arous and Péché).
        noise: mean variance of the noise along a dimension.
        spread: relative standard deviation of the noise's variances.
        count: N, number of gradients.
        size: R·d.
    """

    estimate: int
    interval: tuple[int, int | None]
    detectable: bool
    verdict: str
    variance95: int
    gap: int
    ratio: int
    correlation: float | None
    correlation_interval: tuple[float, float] | None
    eigenvalues: torch.Tensor
    null: torch.Tensor
    threshold: float
    visible: float
    noise: float
    spread: float
    count: int
    size: int

    @property
    def dimension(self) -> float:
        """What a user is shown: the correlation dimension where it is known, else the count above the noise floor."""
        return float(self.estimate) if self.correlation is None else self.correlation

    def lines(self) -> list[str]:
        """The report as text, one fact a line."""
        low, high = self.interval
        interval = f"90 % interval {low} to {high}" if high is not None else f"{low} or more"
        correlation = (
            "not known: it takes gradients with their response, towards 30 realizations or more, several to each"
        )
        if self.correlation is not None and self.correlation_interval is not None:
            bottom, top = self.correlation_interval
            correlation = f"{self.correlation:.1f} (90 % interval {bottom:.1f} to {top:.1f})"
            if self.correlation == 0:
                correlation = "0: to the word they differ by no more than chance, or by less than 3/4 of a latent value"
            elif self.correlation >= _MOST:
                correlation = f"{_MOST} or more"
        return [
            f"correlation dimension of the images as the word sees them: {correlation}",
            f"above the noise floor: {self.estimate} ({interval})",
            self.verdict,
            f"published: {self.ratio} by share of variance, {self.gap} by the largest gap, "
            f"{self.variance95} to reach 95 % of the variance",
            f"from {self.count} gradients of {self.size} values",
        ]


def estimate_lid(source: Gradients | Moments, *, significance: float = 2.5, seed: int = 0) -> LIDReport:
    """Estimate the intrinsic dimension of a concept.

    Args:
        source: gradients, or their moments.
        significance: C of the published rule.
        seed: fixes the simulated noise.

    Raises:
        ElrondError: if there are fewer than 20 gradients or values in each, one is not finite, or all are the same.
    """
    _, spectrum = fit_pca(source, significance=significance, limit=1)
    count, size = spectrum.count, spectrum.size
    if count < 20 or size < 20:
        raise ElrondError(
            f"The intrinsic dimension needs at least 20 gradients of 20 values, got {count} gradients of {size}."
        )
    eigenvalues = spectrum.eigenvalues.numpy()[: min(count - 1, size)]
    found = correlation_dimension(source, seed) if isinstance(source, Gradients) else None
    correlation, correlation_interval = found if found else (None, None)

    fit = _Fit(eigenvalues, count - 1, size, seed)
    return LIDReport(
        estimate=fit.signal,
        interval=fit.interval(),
        detectable=fit.detectable,
        verdict=_verdict(fit, count),
        variance95=int(np.searchsorted(eigenvalues.cumsum(), 0.95 * eigenvalues.sum())) + 1,
        gap=int(np.argmax(-np.diff(np.sqrt(eigenvalues)))) + 1,
        ratio=spectrum.significant,
        correlation=correlation,
        correlation_interval=correlation_interval,
        eigenvalues=torch.from_numpy(eigenvalues),
        null=torch.from_numpy(fit.null()),
        threshold=fit.threshold,
        visible=fit.visible,
        noise=fit.noise,
        spread=fit.spread,
        count=count,
        size=size,
    )


def correlation_dimension(gradients: Gradients, seed: int = 0) -> tuple[float, tuple[float, float]] | None:
    """Correlation dimension of the realizations as the concept's rows see them, and its 90 % interval.

    The dimension of the cube whose evenly drawn points have the same `correlation_slope`. A realization's place is the
    mean of the gradients towards it, at the highest noise level collected, along the components that count (see above),
    which are sought among the leading ones of `response.components`, four gradients to each. Where noised realizations
    are compared with eight others or more on average, the mean of each one's gradients is taken from them first: it
    tells of that one only. The interval comes from half-samples without replacement (a bootstrap would repeat places,
    at no distance); it does not hold what the choice of components may be off by.

    Returns:
        The dimension, 0 if the places differ along no component, and its interval; or None without the response, or
        where fewer than 30 realizations are the target of at least 2 gradients.

    Raises:
        ElrondError: if a gradient or response is not finite, or all are the same.
    """
    found = _places(gradients)
    if found is None:
        return None
    if not found.shape[1]:
        return 0.0, (0.0, 0.0)
    draw = generator(seed, "correlation dimension")
    means = found / found.std(0)
    means = means[torch.randperm(len(means), generator=draw)[:_MOST_TARGETS]]
    distances = torch.cdist(means, means)
    value = box_dimension(distances)
    halves = []
    for _ in range(_HALVES):
        half = torch.randperm(len(means), generator=draw)[: len(means) // 2]
        halves.append(box_dimension(distances[half][:, half]))
    # The spread of half-samples about the whole is that of whole samples about the truth.
    spread = 1.645 * float(torch.tensor(halves).sub(value).square().mean().sqrt())
    return value, (max(0.0, value - spread), value + spread)


def _places(gradients: Gradients) -> torch.Tensor | None:
    """Places, float64 (G, V), of the G realizations compared often enough along the V components that count.

    None where `correlation_dimension` is.
    """
    if len(gradients.levels) > 1:
        gradients = gradients.at_levels(gradients.levels[:1])
    compared = _Compared(gradients)
    if not len(gradients.response) or int(compared.enough.sum()) < _LEAST_TARGETS or compared.freedom < 1:
        return None
    moves = components(gradients).moves[:, : max(1, compared.freedom // 4)]
    compared.take_common()
    variance, chance = _varied(compared, moves)
    varied, axes = descending(variance)
    likely = (chance @ axes).mul_(axes).sum(0)
    edge = _edge_by_chance(len(axes), int(compared.enough.sum()), compared.freedom) - 1
    kept = (varied > _VARIES**2) & (varied > edge * likely)
    along = moves @ axes[:, kept]
    places = torch.empty(int(compared.enough.sum()), along.shape[1], dtype=torch.float64)
    return filled(places, (means[compared.enough[some]] @ along for some, means, _ in compared.means()))


def _varied(compared: _Compared, moves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Covariance (K, K) of places along moves (D, K), less what of it is chance; and that."""
    scatter = torch.zeros(len(moves), len(moves), dtype=torch.float64)
    places = Moments.empty(1, moves.shape[1], compared.gradients.provenance)
    for some, means, rows in compared.means():
        for few in rows.split(_BLOCK):
            apart = compared.own(few).sub_(means[compared.place[few] - some[0]])
            scatter.addmm_(apart.T, apart)
        places.add(means[compared.enough[some]] @ moves)
    chance = moves.T @ scatter @ moves
    chance *= (1 / compared.repeats[compared.enough]).mean() / compared.freedom
    return places.covariance().sub_(chance), chance


class _Compared:
    """Gradients of one noise level by the realization that they lead to.

    Every (D, D) in float64 counts at the sizes of real models, and so vectors are looked at a block at a time.

    Attributes:
        gradients: N of them.
        place: int64, (N,): number of the realization that each leads to, among all that are led to.
        repeats: int64, (T,): how many lead to each of these.
        enough: bool, (T,): whether these are enough to tell its place.
        freedom: degrees of freedom of the scatter about the places.
    """

    def __init__(self, gradients: Gradients) -> None:
        self.gradients = gradients
        some, self.place, self.repeats = gradients.targets.unique(return_inverse=True, return_counts=True)
        self.enough = self.repeats >= _LEAST_REPEATS
        self._noised = torch.cat([gradients.sources.new_zeros(1), gradients.sources.diff().ne(0).cumsum(0)])
        self._noisings = self._noised.bincount()
        self._shared = len(gradients) >= _SHARED * len(self._noisings)
        self._common: torch.Tensor | None = None
        self.freedom = len(gradients) - len(some) - (len(self._noisings) - 1 if self._shared else 0)

    def take_common(self) -> None:
        """Leave out of all vectors from now on what is common to those of a noised realization, if that is known."""
        if self._shared:
            self._common = self._means(torch.arange(len(self._noised)), self._noised, self._noisings)

    def own(self, rows: torch.Tensor) -> torch.Tensor:
        """The vectors of these numbers, float64 (len(rows), D), new in memory."""
        vectors = self.gradients.flat[rows].double()
        return vectors if self._common is None else vectors.sub_(self._common[self._noised[rows]])

    def means(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Numbers of some realizations at a time, the means of their vectors, and the numbers of these."""
        blocks = torch.arange(len(self.repeats)).split(_BLOCK)
        order = self.place.argsort(stable=True).split([int(self.repeats[some].sum()) for some in blocks])
        for some, rows in zip(blocks, order, strict=True):
            yield some, self._means(rows, self.place[rows] - some[0], self.repeats[some]), rows

    def _means(self, rows: torch.Tensor, group: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(len(counts), self.gradients.flat.shape[1], dtype=torch.float64)
        for few, groups in zip(rows.split(_BLOCK), group.split(_BLOCK), strict=True):
            sums.index_add_(0, groups, self.own(few))
        return sums.div_(counts[:, None])


def _edge_by_chance(size: int, places: int, freedom: int) -> float:
    """How many times its expectation the variance of Gaussian places of no signal seldom is along any direction.

    The largest root of two Wishart matrices of `size` values, one of so many places, the other of so many degrees of
    freedom (Johnstone, 2008, "Multivariate analysis and Jacobi ensembles: largest eigenvalue, Tracy-Widom limits and
    rates of convergence").
    """
    both = places - 1 + freedom - 1
    fewer, more = (2 * math.asin(math.sqrt((of - 0.5) / both)) for of in (min(size, places - 1), max(size, places - 1)))
    middle = 2 * math.log(math.tan((fewer + more) / 2))
    width = (16 / both**2 / (math.sin(fewer + more) ** 2 * math.sin(fewer) * math.sin(more))) ** (1 / 3)
    return math.exp(middle + width * float(_TRACY_WIDOM.ppf(1 - _RARE))) * freedom / (places - 1)


def correlation_slope(distances: torch.Tensor) -> float:
    """How many times the logarithm of the number of neighbours grows as fast as that of the distance.

    ln(0.2/0.05) / ln(r(0.2)/r(0.05)), r(q) being the distance below which a share q of the pairs lies.

    Args:
        distances: (n, n) between points, symmetric.

    Returns:
        The slope; 0 where the distances do not tell one.
    """
    upper = torch.ones_like(distances, dtype=torch.bool).triu(1)
    pairs = distances[upper].sort().values
    near, far = (float(pairs[round(share * (len(pairs) - 1))]) for share in (_NEAR, _FAR))
    return math.log(_FAR / _NEAR) / math.log(far / near) if far > near > 0 else 0.0


def box_dimension(distances: torch.Tensor) -> float:
    """The dimension of the cube whose evenly drawn points have the same `correlation_slope`.

    Args:
        distances: (n, n) between points, symmetric.
    """
    slopes = _slopes_of_cubes()
    return float(np.interp(correlation_slope(distances), slopes, np.arange(len(slopes))))


@functools.cache
def _slopes_of_cubes() -> np.ndarray:
    """Slopes of evenly drawn points in cubes of 0 to `_MOST` dimensions; how many points there are hardly matters."""
    slopes = [0.0]
    for size in range(1, _MOST + 1):
        points = torch.rand(_POINTS, size, generator=generator(0, "cube", size), dtype=torch.float64)
        slopes.append(correlation_slope(torch.cdist(points, points)))
    return np.maximum.accumulate(slopes)


class _Fit:
    """Noise fitted to the eigenvalues below the signal, and the signal above the noise."""

    def __init__(self, eigenvalues: np.ndarray, samples: int, size: int, seed: int) -> None:
        self.eigenvalues, self.samples, self.size, self.seed = eigenvalues, samples, size, seed
        self.signal = 0
        self.flat = True
        self.tailed = True
        # Noise below rounding errors is none.
        self.least = 1e-12 * float(eigenvalues[0])
        # The lower bulk, which hidden signal hardly touches, tells noise from what it seldom reaches; then the
        # likeliest signal is taken off, and again from the whole bulk, which is more exact. More often would take noise
        # for signal: the less is left of it, the narrower it looks.
        while True:
            self._match_quantiles()
            found = self._above(self.seldom if self.signal else self.rare)
            if found <= self.signal:
                break
            self.signal = found
        if self.signal:
            for match in (self._match_quantiles, self._match_moments):
                self.signal = self._likeliest()
                match()
            self.signal = self._likeliest()
            while fewer := self._fewer():
                self.signal = fewer
                self._match_moments()
        cut = self.eigenvalues[self.signal - 1 : self.signal + 1]
        self.threshold = float(cut.mean()) if self.signal else self.rare
        self.flat = self.flat and self.spread <= _FLAT
        self.detectable = self.flat and self.signal > 0 and self._ends()

    def _above(self, level: float) -> int:
        """How many eigenvalues are above a level."""
        return self._leave_noise(int((self.eigenvalues > level).sum()))

    def _leave_noise(self, found: int) -> int:
        """A number of signals; where too few eigenvalues are left to be noise, it is not flat."""
        most = len(self.eigenvalues) - 10
        self.flat = self.flat and found <= most
        return min(found, most)

    @property
    def _bulk(self) -> tuple[np.ndarray, int, int]:
        """Eigenvalues below the signal, as those of a smaller sample of fewer dimensions."""
        size, samples = self.size - self.signal, self.samples - self.signal
        return self.eigenvalues[self.signal :] * (self.samples / samples), size, samples

    def _match_quantiles(self) -> None:
        bulk, size, samples = self._bulk
        seen = _interpolate(bulk[::-1])
        fits = []
        for tailed in (True, False):
            spreads = _SPREADS if tailed else _SPREADS[_SPREADS < _EVEN]
            curves = [_interpolate(self._simulate(spread, tailed, size, samples)[::-1]) for spread in spreads]
            fits.append((_best_spread(seen, np.stack(curves), spreads), tailed, np.stack(curves), spreads))
        (_, noise, spread), self.tailed, found, spreads = min(fits, key=lambda fit: fit[:2])

        def fit(values: np.ndarray, *_: int) -> tuple[float, float]:
            return _best_spread(_interpolate(values[::-1]), found, spreads)[1:]

        self._set(noise, spread, size, samples, fit)

    def _match_moments(self) -> None:
        bulk, size, samples = self._bulk

        def fit(values: np.ndarray, size: int, samples: int) -> tuple[float, float]:
            mean, square = values.sum() / size, (values**2).sum() / size
            # A sample of equal variances has a mean square of mean² (1 + size/samples).
            excess = square / mean**2 - 1 - size / samples if mean > self.least else 0.0
            return float(mean), math.sqrt(max(0.0, excess))

        self._set(*fit(bulk, size, samples), size, samples, fit)

    def _set(
        self,
        noise: float,
        spread: float,
        size: int,
        samples: int,
        fit: Callable[[np.ndarray, int, int], tuple[float, float]],
    ) -> None:
        """Draw largest eigenvalues of noise of such a level and spread, as uncertain as `fit` leaves both.

        That is seen on simulated noise: as far as it misses theirs, it may have missed the true ones the other way.
        """
        self.noise, self.spread = max(noise, self.least), spread
        shrink = min(1.0, _SMALL / min(size, samples))
        small = max(2, round(size * shrink)), max(2, round(samples * shrink))
        rng = np.random.default_rng(self.seed)
        variances = _variances(np.full((_REPEATS, 1), spread), self.tailed, small[0], rng)
        refitted = np.array([fit(_eigenvalues(some, small[1], rng), *small) for some in variances])
        pick = rng.integers(0, _REPEATS, _DRAWS)
        levels = refitted[pick, 0] ** -math.sqrt(shrink)
        spreads = np.clip(spread + math.sqrt(shrink) * (spread - refitted[pick, 1:]), 0.0, 1.0)

        place, centre, scale = edge_of_noise(_variances(spreads, self.tailed, size, rng), samples)
        unit = (self.noise * levels * samples / self.samples)[:, None]
        drawn = _TRACY_WIDOM.rvs((_DRAWS, _EACH), random_state=rng)
        self.largest = (unit * (centre[:, None] + scale[:, None] * drawn)).ravel()
        self.seldom, self.rare = (float(np.quantile(self.largest, 1 - often)) for often in (_SELDOM, _RARE))
        self.visible = float(np.median(1 / place)) * self.noise
        self._variances = _quantiles(spread, self.tailed, size) * self.noise

    def _likeliest(self) -> int:
        """How many eigenvalues are signal, most likely.

        Each draw of the noise's largest eigenvalue may be the edge between signal and noise. It weighs as likely as it
        makes what lies on either side, as points that fall at random: those above it in the density of the weakest
        signal that noise seldom reaches, those below it in half the density that noise has just below all likely
        edges, since it thins out towards its own. So an edge lies in a gap rather than above it, where noise is
        missing, or in the midst of what is as dense as noise.
        """
        clear = self.eigenvalues[self.eigenvalues > self.seldom][-_WEAKEST:]
        if not len(clear):
            return self._above(self.rare)
        signal = len(clear) / (clear[0] - np.median(self.largest))
        start = float(np.quantile(self.largest, 0.05))
        below = self.eigenvalues[self.eigenvalues < start][: _STRONGEST + 1]
        if len(below) < 2 or below[0] == below[-1]:
            return self._above(self.seldom)
        noise = (len(below) - 1) / (below[0] - below[-1]) / 2
        counts = (self.eigenvalues[:, None] > self.largest).sum(0)
        weights = counts * math.log(signal / noise) - noise * (self.largest - start)
        return self._leave_noise(int(np.bincount(counts, np.exp(weights - weights.max())).argmax()))

    def _of(self, signal: int) -> _Fit:
        """The same with another number of signals, and the noise as it is."""
        other = copy.copy(self)
        other.signal = signal
        return other

    def _fewer(self) -> int:
        """The least number of signals that end well above what noise may reach, where all else is such; 0 if none is.

        Noise that is taken for signal is missing where noise is fitted; the next of it then looks like signal, too. If
        the signal ends as it is, no more than its last may be such.
        """
        if self.signal < 2:
            return 0
        for signal in range(self.signal - 1 if self._ends() else 1, self.signal):
            other = self._of(signal)
            # Most do not end even above the noise as it is, which is sooner seen than noise is fitted.
            if signal == self.signal - 1 or other._ends(_HARDLY):
                other._match_moments()
                noise = other.spread <= _FLAT and self.eigenvalues[signal] <= other.rare
                if noise and other._ends(_RARE):
                    return signal
        return 0

    def _simulate(self, spread: float, tailed: bool, size: int, samples: int) -> np.ndarray:
        """Mean eigenvalues, descending, of samples of noise of mean variance 1, at a smaller size of equal shape."""
        shrink = min(1.0, _CAP / min(size, samples))
        size, samples = max(2, round(size * shrink)), max(2, round(samples * shrink))
        rng = np.random.default_rng(self.seed + 1)
        variances = _quantiles(spread, tailed, size)
        found = [_eigenvalues(variances, samples, rng) for _ in range(1 if shrink < 1 else 3)]
        return np.mean(found, axis=0)

    def null(self) -> np.ndarray:
        """Eigenvalues the fitted noise would have, in the place of all."""
        curve = self._simulate(self.spread, self.tailed, self.size, self.samples)[::-1] * self.noise
        places = (np.arange(len(self.eigenvalues)) + 0.5) / len(self.eigenvalues)
        return np.interp(places, (np.arange(len(curve)) + 0.5) / len(curve), curve)[::-1].copy()

    def clearance(self) -> float:
        """Variance of the weakest signal above the noise's mean, as a multiple of the least that can be seen."""
        if not self.signal:
            return 0.0
        return float((self._population()[0][-1] - self.noise) / (self.visible - self.noise))

    def _ends(self, doubt: float = _SELDOM) -> bool:
        """Whether the signal ends above the noise rather than in it.

        The variances of the signal's weaker half are continued as the power law they follow, or as 1/i if that is
        flatter. The signal has ended if the next would have stood out, of both the noise and what is there, in all but
        a share `doubt` of draws.
        """
        excess = self._population()[0] - self.noise
        ranks = np.arange(1, self.signal + 1)
        weaker = slice(self.signal // 2, None)
        slope = np.polyfit(np.log(ranks[weaker]), np.log(excess[weaker]), 1)[0] if self.signal > 2 else -1.0
        more = self.noise + excess[-1] * (1 + 1 / self.signal) ** np.clip(slope, -2.0, -1.0)
        if more <= max(self.visible, self._variances.max()):
            return False
        eigenvalue, error = self._sampled(more[None])
        drawn = eigenvalue + error * np.random.default_rng(self.seed + 3).standard_normal(len(self.largest))
        hidden = drawn <= np.maximum(self.largest, self.eigenvalues[self.signal])
        return bool(hidden.mean() <= doubt)

    def _sampled(self, variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues that directions of such variances have in a sample, and their sampling errors.

        A sample overstates a direction of variance a as a (1 + Σ t/(a - t)/n), t running over the noise's variances.
        """
        pull = self._variances / (variances[:, None] - self._variances)
        certain = 1 - (pull**2).sum(1) / self.samples
        return variances * (1 + pull.sum(1) / self.samples), variances * np.sqrt(2 / self.samples * certain.clip(0, 1))

    def _population(self) -> tuple[np.ndarray, np.ndarray]:
        """Variances of the signal's directions, and the sampling errors of their eigenvalues."""
        seen = self.eigenvalues[: self.signal]
        low, high = np.full_like(seen, max(self.visible, self._variances.max() * (1 + 1e-9))), seen.copy()
        for _ in range(60):
            middle = (low + high) / 2
            above = self._sampled(middle)[0] > seen
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return low, self._sampled(low)[1]

    def interval(self) -> tuple[int, int | None]:
        """5 % and 95 % of the counts over redrawn signal and noise; open above if more may be hidden."""
        rng = np.random.default_rng(self.seed + 2)
        errors = self._population()[1] if self.signal else np.zeros(0)
        doubtful = self.signal > 0 and self.eigenvalues[self.signal - 1] <= self.rare
        other = self
        if doubtful:
            other = self._of(self.signal - 1)
            other._match_moments()
        again = self.eigenvalues[: self.signal] + errors * rng.standard_normal((len(other.largest), self.signal))
        bottom = int(np.quantile((again > other.largest[:, None]).sum(1), 0.05))
        if not self.detectable:
            return bottom, None
        # Below the threshold, an eigenvalue may still be signal as often as noise alone stays under it.
        high = self.signal + (self.eigenvalues[self.signal :] > self.largest[:, None]).sum(1)
        return bottom, int(np.quantile(high, 0.95, method="higher"))


def _verdict(fit: _Fit, count: int) -> str:
    if not fit.signal:
        return f"Nothing rises above the noise floor of {count} gradients; collect more."
    if not fit.flat:
        return "The spectrum falls all the way without a flat noise floor, so that no number of directions stands out."
    if not fit.detectable:
        return f"The signal runs into the noise floor of {count} gradients: at least this many, and more may be hidden."
    return f"The weakest is {fit.clearance():.1f} times what {count} gradients can just show."


def _best_spread(seen: np.ndarray, curves: np.ndarray, spreads: np.ndarray) -> tuple[float, float, float]:
    """Misfit, level and spread of the curve, times a level, that comes nearest to what is seen."""
    levels = (curves @ seen) / (curves**2).sum(1)
    misfit = ((levels[:, None] * curves - seen) ** 2).sum(1)
    best = int(misfit.argmin())
    if 0 < best < len(spreads) - 1:
        # The vertex of the parabola through the best and its neighbours.
        near = slice(best - 1, best + 2)
        square, line, constant = np.polyfit(spreads[near], misfit[near], 2)
        if square > 0:
            spread = float(np.clip(-line / (2 * square), spreads[best - 1], spreads[best + 1]))
            least = max(0.0, float(constant + line * spread + square * spread**2))
            return least, float(np.interp(spread, spreads, levels)), spread
    return float(misfit[best]), float(levels[best]), float(spreads[best])


def _quantiles(spread: float, tailed: bool, size: int) -> np.ndarray:
    """Variances of mean 1 at evenly spaced quantiles, with a relative standard deviation: Gamma, or else uniform."""
    if spread <= 0.01:
        return np.ones(size)
    places = (np.arange(size) + 0.5) / size
    values = gammaincinv(spread**-2, places) if tailed else 1 + math.sqrt(3) * min(spread, _EVEN) * (2 * places - 1)
    return values / values.mean()


def _variances(spreads: np.ndarray, tailed: bool, size: int, rng: np.random.Generator) -> np.ndarray:
    """Random variances of mean 1, (draws, size), of relative standard deviations (draws, 1)."""
    if tailed:
        squares = np.maximum(spreads, 1e-3) ** 2
        return rng.standard_gamma(1 / squares, (len(spreads), size)) * squares
    return 1 + math.sqrt(3) * spreads.clip(0, _EVEN) * rng.uniform(-1, 1, (len(spreads), size))


def _eigenvalues(variances: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Eigenvalues, descending, of a sample of noise of such variances (size,)."""
    size = len(variances)
    if samples >= size:
        # Bartlett: a triangle has the law of the whole sample, however many there are.
        factor = np.tril(rng.standard_normal((size, size)), -1)
        factor[np.diag_indices(size)] = np.sqrt(rng.chisquare(samples - np.arange(size)))
        sample = np.sqrt(variances)[:, None] * factor
    else:
        sample = rng.standard_normal((samples, size)) * np.sqrt(variances)
    return np.linalg.svd(sample, compute_uv=False) ** 2 / samples


def _interpolate(ascending: np.ndarray) -> np.ndarray:
    return np.interp(_LEVELS, (np.arange(len(ascending)) + 0.5) / len(ascending), ascending)


def edge_of_noise(variances: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the largest eigenvalue of samples of noise lies, for each row of variances (draws, size).

    Returns:
        c, the root of Σ (t c / (1 - t c))² = n in (0, 1/max t); 1/c is the variance from which on a direction shows.
        The largest eigenvalue is centre + scale · Tracy-Widom.
    """
    low, high = np.zeros(len(variances)), 1 / variances.max(1)
    for _ in range(50):
        place = (low + high) / 2
        product = variances * place[:, None]
        over = ((product / (1 - product)) ** 2).sum(1) > samples
        low, high = np.where(over, low, place), np.where(over, place, high)
    product = variances * low[:, None]
    ratio = product / (1 - product)
    centre = (1 + ratio.sum(1) / samples) / low
    scale = np.cbrt(1 + (ratio**3).sum(1) / samples) / low * samples ** (-2 / 3)
    return low, centre, scale
