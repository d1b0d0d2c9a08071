"""Count the eigenvalues of a sample covariance that noise alone could not have produced.

Eigenvalues of sampled noise spread even if all its variances are equal (Marchenko and Pastur, 1967), and further if
they are not. The noise model has three parameters: a distribution of variances (Gamma or uniform, whichever fits
better), its mean (the level) and its relative standard deviation (the spread). Level and spread are read off the lower
part of the spectrum (Ke, Ma and Lin, 2023, "Estimation of the number of spiked eigenvalues in a covariance matrix by
bulk eigenvalue matching analysis"; they use the Gamma distribution, whose tail is too long where variances are
bounded). The largest eigenvalue of such noise follows from El Karoui (2007, "Tracy-Widom limit for the largest
eigenvalue of a large class of complex sample covariance matrices").

Level and spread are uncertain. Fits of simulated noise measure by how much, and so the upper edge of the noise is a set
of draws rather than one number. There is signal if an eigenvalue exceeds nearly all draws. The number of signals is
then the one with the most weight over the draws (`_likeliest_signal`).

Only eigenvalues enter, so that `Moments` serve as well as gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .noise import (
    TRACY_WIDOM,
    WIDEST_UNIFORM,
    edge_of_noise,
    midpoints,
    quantile_variances,
    random_variances,
    sample_eigenvalues,
)


@dataclass(frozen=True)
class NoiseFloorOptions:
    """Constants of the estimate.

    Attributes:
        detection_rate: probability with which noise alone may exceed the level that shows that there is signal at all.
            Lower than `counting_rate`, because the comparison is made several times.
        counting_rate: probability with which noise alone may exceed the level above which eigenvalues are counted once
            there is signal.
        discard_rate: probability below which a number of signals is not tried; only saves time.
        draws: draws of the noise's level and spread.
        edges_per_draw: draws of the largest eigenvalue for each draw of level and spread.
        refits: simulated noises that the fit is repeated on, to see its error.
        refit_size: most values of each simulated noise. Errors are scaled to the true size, which keeps refits fast.
        signal_neighbours: weakest clear signals from which the density of signal eigenvalues is taken.
        noise_neighbours: gaps between the strongest noise eigenvalues from which the density of noise is taken.
        bulk_share: lower share of the noise's eigenvalues that is fitted first. Undetected signal sits above it.
        bulk_quantiles: number of quantiles of that share that are compared.
        squared_spreads: squares of the spreads (relative standard deviations) that simulated spectra are made for.
        simulated_size: most dimensions, and samples, of a simulated spectrum; larger ones have the same shape.
        flat_spread: largest spread that still counts as a noise floor.
        least_noise: least number of eigenvalues that must be left as noise.
    """

    detection_rate: float = 0.01
    counting_rate: float = 0.05
    discard_rate: float = 0.001
    draws: int = 400
    edges_per_draw: int = 5
    refits: int = 100
    refit_size: int = 100
    signal_neighbours: int = 4
    noise_neighbours: int = 8
    bulk_share: float = 0.6
    bulk_quantiles: int = 40
    squared_spreads: tuple[float, ...] = (0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)
    simulated_size: int = 400
    flat_spread: float = 0.5
    least_noise: int = 10


@dataclass(frozen=True)
class NoiseFloor:
    """Signal and noise in the eigenvalues of a sample.

    Attributes:
        signal: number of eigenvalues that are signal.
        interval: 90 % interval of that number (parametric bootstrap); its upper end is None where more signal may be
            hidden in the noise.
        flat: whether the spectrum ends in a noise floor at all.
        detectable: whether the signal ends above the noise.
        clearance: variance of the weakest signal above the noise's mean, as a multiple of the least that can be seen.
        threshold: halfway between the weakest signal and the strongest noise; without signal, the level that noise
            exceeds with probability `detection_rate`.
        visible: smallest variance of a direction, noise included, that shows in a sample this large.
        noise: mean variance of the noise.
        spread: relative standard deviation of the noise's variances.
        null: float64 (P,): the eigenvalues that the noise alone would have had, descending.
    """

    signal: int
    interval: tuple[int, int | None]
    flat: bool
    detectable: bool
    clearance: float
    threshold: float
    visible: float
    noise: float
    spread: float
    null: np.ndarray


@dataclass(frozen=True)
class _Sample:
    """What is given: eigenvalues (P,), descending, of a covariance of `samples` + 1 vectors of `size` values."""

    eigenvalues: np.ndarray
    samples: int
    size: int
    seed: int
    options: NoiseFloorOptions

    @property
    def rounding(self) -> float:
        """A variance below this is a rounding error."""
        return 1e-12 * float(self.eigenvalues[0])

    def bulk(self, signal: int) -> tuple[np.ndarray, int, int]:
        """Eigenvalues below the signal, as those of a smaller sample: with its size and number of samples."""
        size, samples = self.size - signal, self.samples - signal
        return self.eigenvalues[signal:] * (self.samples / samples), size, samples


@dataclass(frozen=True)
class _Noise:
    """A fitted noise.

    Attributes:
        level: mean variance.
        spread: relative standard deviation of the variances.
        gamma: whether variances follow the Gamma distribution rather than the uniform one.
        variances: float64, (size,): variances at evenly spaced quantiles.
        edges: float64, (draws,): draws of the largest eigenvalue.
        detection_edge: exceeded by noise alone with probability `detection_rate`.
        counting_edge: exceeded by noise alone with probability `counting_rate`.
        visible: smallest variance of a direction that shows above this noise (Baik, Ben Arous and Péché).
    """

    level: float
    spread: float
    gamma: bool
    variances: np.ndarray
    edges: np.ndarray
    detection_edge: float
    counting_edge: float
    visible: float


# Level and spread of eigenvalues, given the size and the number of samples.
_LevelAndSpread = Callable[[np.ndarray, int, int], tuple[float, float]]


def fit_noise_floor(
    eigenvalues: np.ndarray, samples: int, size: int, seed: int = 0, options: NoiseFloorOptions | None = None
) -> NoiseFloor:
    """Separate signal from noise.

    Args:
        eigenvalues: float64, (P,), P = min(samples, size): variances of the principal components, descending.
        samples: degrees of freedom of the covariance: number of vectors less one.
        size: values of each vector.
        seed: fixes the simulated noise.
        options: constants of the method.
    """
    sample = _Sample(eigenvalues, samples, size, seed, options or NoiseFloorOptions())
    signal, noise, flat = _fit(sample)
    flat = flat and noise.spread <= sample.options.flat_spread
    detectable = flat and signal > 0 and _ends(sample, noise, signal, sample.options.counting_rate)
    return NoiseFloor(
        signal=signal,
        interval=_interval(sample, noise, signal, detectable),
        flat=flat,
        detectable=detectable,
        clearance=_clearance(sample, noise, signal),
        threshold=float(eigenvalues[signal - 1 : signal + 1].mean()) if signal else noise.detection_edge,
        visible=noise.visible,
        noise=noise.level,
        spread=noise.spread,
        null=_null(sample, noise),
    )


def _fit(sample: _Sample) -> tuple[int, _Noise, bool]:
    """Number of signals, noise, and whether enough eigenvalues were left to be noise throughout."""
    signal, flat = 0, True
    # First the noise is read off the lower bulk, which hidden signal hardly touches.
    while True:
        noise = _match_quantiles(sample, signal)
        count, enough = _above(sample, noise.counting_edge if signal else noise.detection_edge)
        flat = flat and enough
        if count <= signal:
            break
        signal = count
    if not signal:
        return signal, noise, flat
    # Then the likeliest signal is removed, and the noise is read off all that is left, which is more exact. Further
    # rounds would count noise as signal: with each eigenvalue that is removed the rest looks narrower.
    signal, enough = _likeliest_signal(sample, noise)
    noise, flat = _match_quantiles(sample, signal), flat and enough
    signal, enough = _likeliest_signal(sample, noise)
    noise, flat = _match_moments(sample, signal, noise.gamma), flat and enough
    signal, enough = _likeliest_signal(sample, noise)
    while fewer := _fewer(sample, noise, signal):
        signal, noise = fewer, _match_moments(sample, fewer, noise.gamma)
    return signal, noise, flat and enough


def _above(sample: _Sample, level: float) -> tuple[int, bool]:
    """How many eigenvalues exceed a level; see `_leave_noise`."""
    return _leave_noise(sample, int((sample.eigenvalues > level).sum()))


def _leave_noise(sample: _Sample, signal: int) -> tuple[int, bool]:
    """A number of signals that leaves enough eigenvalues as noise, and whether it did already."""
    most = len(sample.eigenvalues) - sample.options.least_noise
    return min(signal, most), signal <= most


def _match_quantiles(sample: _Sample, signal: int) -> _Noise:
    """Noise whose simulated spectrum has the lower quantiles of the eigenvalues below the signal."""
    options = sample.options
    bulk, size, samples = sample.bulk(signal)
    observed = _lower_quantiles(bulk, options)
    all_spreads = np.sqrt(list(options.squared_spreads))
    fits = []
    for is_gamma in (True, False):
        spreads = all_spreads if is_gamma else all_spreads[all_spreads < WIDEST_UNIFORM]
        curves = np.stack(
            [_lower_quantiles(_simulate(sample, spread, is_gamma, size, samples), options) for spread in spreads]
        )
        fits.append((_best_spread(observed, curves, spreads), is_gamma, curves, spreads))
    (_, level, spread), is_gamma, curves, spreads = min(fits, key=lambda fit: fit[:2])

    def fit(values: np.ndarray, *_: int) -> tuple[float, float]:
        return _best_spread(_lower_quantiles(values, options), curves, spreads)[1:]

    return _with_edges(sample, (level, spread), is_gamma, size, samples, fit)


def _match_moments(sample: _Sample, signal: int, is_gamma: bool) -> _Noise:
    """Noise whose spectrum has the mean and the mean square of the eigenvalues below the signal."""
    bulk, size, samples = sample.bulk(signal)

    def fit(values: np.ndarray, size: int, samples: int) -> tuple[float, float]:
        mean, square = values.sum() / size, (values**2).sum() / size
        # A sample of equal variances has a mean square of mean² (1 + size/samples).
        excess = square / mean**2 - 1 - size / samples if mean > sample.rounding else 0.0
        return float(mean), math.sqrt(max(0.0, excess))

    return _with_edges(sample, fit(bulk, size, samples), is_gamma, size, samples, fit)


def _with_edges(
    sample: _Sample,
    level_and_spread: tuple[float, float],
    is_gamma: bool,
    size: int,
    samples: int,
    fit: _LevelAndSpread,
) -> _Noise:
    """Noise of a level and spread, with draws of its largest eigenvalue that are as uncertain as both are.

    The error of `fit` is measured on simulated noise: by as much as it misses the simulated level and spread, it may
    have missed the true ones in the opposite direction.
    """
    options = sample.options
    level, spread = max(level_and_spread[0], sample.rounding), level_and_spread[1]
    shrink = min(1.0, options.refit_size / min(size, samples))
    small = max(2, round(size * shrink)), max(2, round(samples * shrink))
    rng = np.random.default_rng(sample.seed)
    variances = random_variances(np.full((options.refits, 1), spread), is_gamma, small[0], rng)
    refitted = np.array([fit(sample_eigenvalues(row, small[1], rng), *small) for row in variances])
    pick = rng.integers(0, options.refits, options.draws)
    levels = refitted[pick, 0] ** -math.sqrt(shrink)
    spreads = np.clip(spread + math.sqrt(shrink) * (spread - refitted[pick, 1:]), 0.0, 1.0)

    root, centre, scale = edge_of_noise(random_variances(spreads, is_gamma, size, rng), samples)
    unit = (level * levels * samples / sample.samples)[:, None]
    drawn = TRACY_WIDOM.rvs((options.draws, options.edges_per_draw), random_state=rng)
    edges = (unit * (centre[:, None] + scale[:, None] * drawn)).ravel()
    return _Noise(
        level=level,
        spread=spread,
        gamma=is_gamma,
        variances=quantile_variances(spread, is_gamma, size) * level,
        edges=edges,
        detection_edge=float(np.quantile(edges, 1 - options.detection_rate)),
        counting_edge=float(np.quantile(edges, 1 - options.counting_rate)),
        visible=float(np.median(1 / root)) * level,
    )


def _likeliest_signal(sample: _Sample, noise: _Noise) -> tuple[int, bool]:
    """The most likely number of signals; see `_leave_noise`.

    Each draw of the noise's largest eigenvalue is a candidate for the edge between signal and noise. Its weight is the
    likelihood of the eigenvalues on either side, as Poisson points: above it, of the density of the weakest signals
    that exceed `counting_edge`; below it, of half the density that noise has below all likely edges, because noise
    thins out towards its own edge. An edge then lies in a gap between eigenvalues, neither above the gap, where noise
    would be missing, nor amid eigenvalues that are as dense as noise.
    """
    eigenvalues, edges, options = sample.eigenvalues, noise.edges, sample.options
    clear = eigenvalues[eigenvalues > noise.counting_edge][-options.signal_neighbours :]
    if not len(clear):
        return _above(sample, noise.detection_edge)
    signal_density = len(clear) / (clear[0] - np.median(edges))
    lowest_edge = float(np.quantile(edges, 0.05))
    below = eigenvalues[eigenvalues < lowest_edge][: options.noise_neighbours + 1]
    if len(below) < 2 or below[0] == below[-1]:
        return _above(sample, noise.counting_edge)
    noise_density = (len(below) - 1) / (below[0] - below[-1]) / 2
    counts = (eigenvalues[:, None] > edges).sum(0)
    weights = counts * math.log(signal_density / noise_density) - noise_density * (edges - lowest_edge)
    return _leave_noise(sample, int(np.bincount(counts, np.exp(weights - weights.max())).argmax()))


def _fewer(sample: _Sample, noise: _Noise, signal: int) -> int:
    """The least smaller number of signals that end well above a noise fitted to all the rest; 0 if there is none.

    Noise that was counted as signal is missing where the noise is fitted; the next noise eigenvalue then looks like
    signal too, and so on. Where the signal as it is ends above the noise, only its last eigenvalue may be such noise.
    """
    if signal < 2:
        return 0
    options = sample.options
    for fewer in range(signal - 1 if _ends(sample, noise, signal, options.counting_rate) else 1, signal):
        # Most numbers fail even with the noise as it is, which is quicker to see than with noise fitted anew.
        if fewer == signal - 1 or _ends(sample, noise, fewer, options.discard_rate):
            refitted = _match_moments(sample, fewer, noise.gamma)
            rest_is_noise = (
                refitted.spread <= options.flat_spread and sample.eigenvalues[fewer] <= refitted.detection_edge
            )
            if rest_is_noise and _ends(sample, refitted, fewer, options.detection_rate):
                return fewer
    return 0


def _ends(sample: _Sample, noise: _Noise, signal: int, doubt: float) -> bool:
    """Whether the signal ends above the noise rather than in it.

    The variances of the signal's weaker half are continued by the power law that they follow, or by 1/i if that is
    flatter. The signal has ended if the next variance would have stood out, of the noise and of the eigenvalues that
    are there, in all but a share `doubt` of draws.
    """
    excess = _signal_variances(sample, noise, signal)[0] - noise.level
    ranks = np.arange(1, signal + 1)
    weaker = slice(signal // 2, None)
    slope = np.polyfit(np.log(ranks[weaker]), np.log(excess[weaker]), 1)[0] if signal > 2 else -1.0
    following = noise.level + excess[-1] * (1 + 1 / signal) ** np.clip(slope, -2.0, -1.0)
    if following <= max(noise.visible, noise.variances.max()):
        return False
    eigenvalue, error = _sampled(sample, noise, following[None])
    drawn = eigenvalue + error * np.random.default_rng(sample.seed + 3).standard_normal(len(noise.edges))
    hidden = drawn <= np.maximum(noise.edges, sample.eigenvalues[signal])
    return bool(hidden.mean() <= doubt)


def _sampled(sample: _Sample, noise: _Noise, variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues that directions of such variances have in a sample, and their sampling errors.

    A sample overstates a direction of variance a as a (1 + Σ t/(a - t)/n), the sum over the noise's variances t.
    """
    ratio = noise.variances / (variances[:, None] - noise.variances)
    remaining = 1 - (ratio**2).sum(1) / sample.samples
    overstated = variances * (1 + ratio.sum(1) / sample.samples)
    return overstated, variances * np.sqrt(2 / sample.samples * remaining.clip(0, 1))


def _signal_variances(sample: _Sample, noise: _Noise, signal: int) -> tuple[np.ndarray, np.ndarray]:
    """Variances (signal,) of the directions that are signal, and the sampling errors of their eigenvalues."""
    observed = sample.eigenvalues[:signal]
    low = np.full_like(observed, max(noise.visible, noise.variances.max() * (1 + 1e-9)))
    high = observed.copy()
    for _ in range(60):
        middle = (low + high) / 2
        above = _sampled(sample, noise, middle)[0] > observed
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return low, _sampled(sample, noise, low)[1]


def _clearance(sample: _Sample, noise: _Noise, signal: int) -> float:
    if not signal:
        return 0.0
    return float((_signal_variances(sample, noise, signal)[0][-1] - noise.level) / (noise.visible - noise.level))


def _interval(sample: _Sample, noise: _Noise, signal: int, detectable: bool) -> tuple[int, int | None]:
    """5 % and 95 % quantiles of the number of signals over redrawn signal and noise; see `NoiseFloor.interval`."""
    eigenvalues = sample.eigenvalues
    rng = np.random.default_rng(sample.seed + 2)
    errors = _signal_variances(sample, noise, signal)[1] if signal else np.zeros(0)
    edges = noise.edges
    if signal and eigenvalues[signal - 1] <= noise.detection_edge:
        # The last signal may be noise: then it belongs to what noise is fitted to.
        edges = _match_moments(sample, signal - 1, noise.gamma).edges
    redrawn = eigenvalues[:signal] + errors * rng.standard_normal((len(edges), signal))
    bottom = int(np.quantile((redrawn > edges[:, None]).sum(1), 0.05))
    if not detectable:
        return bottom, None
    # An eigenvalue below the threshold may be signal in as many draws as the noise's edge lies below it.
    top = signal + (eigenvalues[signal:] > noise.edges[:, None]).sum(1)
    return bottom, int(np.quantile(top, 0.95, method="higher"))


def _null(sample: _Sample, noise: _Noise) -> np.ndarray:
    """Eigenvalues that the noise alone would have, as many as the sample has."""
    curve = _simulate(sample, noise.spread, noise.gamma, sample.size, sample.samples)[::-1] * noise.level
    count = len(sample.eigenvalues)
    return np.interp(midpoints(count), midpoints(len(curve)), curve)[::-1].copy()


def _simulate(sample: _Sample, spread: float, is_gamma: bool, size: int, samples: int) -> np.ndarray:
    """Mean eigenvalues, descending, of samples of noise of level 1, reduced to at most `simulated_size`."""
    shrink = min(1.0, sample.options.simulated_size / min(size, samples))
    size, samples = max(2, round(size * shrink)), max(2, round(samples * shrink))
    rng = np.random.default_rng(sample.seed + 1)
    variances = quantile_variances(spread, is_gamma, size)
    # Small spectra vary more from one sample to another.
    return np.mean([sample_eigenvalues(variances, samples, rng) for _ in range(1 if shrink < 1 else 3)], axis=0)


def _best_spread(observed: np.ndarray, curves: np.ndarray, spreads: np.ndarray) -> tuple[float, float, float]:
    """Misfit, level and spread of the curve (one a spread) that comes closest to what is observed, times a level."""
    levels = (curves @ observed) / (curves**2).sum(1)
    misfit = ((levels[:, None] * curves - observed) ** 2).sum(1)
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


def _lower_quantiles(descending: np.ndarray, options: NoiseFloorOptions) -> np.ndarray:
    """Evenly spaced quantiles of the lower `bulk_share` of descending eigenvalues."""
    places = midpoints(options.bulk_quantiles) * options.bulk_share
    return np.interp(places, midpoints(len(descending)), descending[::-1])
