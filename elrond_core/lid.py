"""How many directions a concept has: the intrinsic dimension of its gradients.

The three published estimates put the cut where the sample happens to lie, and drift with its size. Ours asks which
eigenvalues noise alone could not have made. The eigenvalues of a sample of noise spread even if its variances are all
equal (Marchenko and Pastur, 1967), and further where they are not; so the noise's variances are taken to be Gamma
distributed, with a level and a spread read off the lower part of the spectrum (Ke, Ma and Lin, 2023, "Estimation of
the number of spiked eigenvalues in a covariance matrix by bulk eigenvalue matching analysis"), and the largest
eigenvalue of such noise follows (El Karoui, 2007, "Tracy-Widom limit for the largest eigenvalue of a large class of
complex sample covariance matrices"). Only eigenvalues are needed, not the gradients, so that moments will do.

That counts all that the gradients hold, and a model whose spectrum falls without a floor gives no such number. Where
the model's response was collected there is an absolute scale: components of the response-normalised gradients
(`elrond_core.response`) have the variance λ of the realizations along the change that a movement of the word makes,
in units of the variance of one latent value, what a token norm cannot reach left out. The number of components that
such a unit of noise would leave standing, Σ λ/(1 + λ), is the effective dimension (the degrees of freedom of a ridge
regression). It assumes that latents are scaled to a variance of about one, as hosts hand them on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import gammaincinv

from .errors import ElrondError
from .gradients import Gradients
from .moments import Moments
from .pca import fit_pca
from .response import components, generalised

_LEVEL = 0.05
_DRAWS = 200
# Quantiles of the lower 60 % of the bulk: signal that was not found yet sits at the top.
_LEVELS = (np.arange(40) + 0.5) / 40 * 0.6
_SPREADS = np.sqrt([0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0])
_CAP = 160
_FLAT = 0.5
_CLEAR = 2.5
# Components of the response that the bootstrap redraws, and how often.
_MOST_REDRAWN, _REDRAWN = 256, 50


@dataclass(frozen=True)
class LIDReport:
    """Estimates of the intrinsic dimension, side by side.

    Attributes:
        estimate: eigenvalues that noise alone could not have made.
        interval: 90 % interval (parametric bootstrap: signal and noise redrawn from what was fitted); its upper end is
            None where the signal is not detectable to its end.
        detectable: whether the weakest signal found is clearly stronger than what this many gradients can show, so
            that there was room to see a weaker one; if not, `estimate` is a lower bound.
        verdict: the same in a sentence.
        variance95: components to reach 95 % of the variance.
        gap: place of the largest gap between singular values (Stanczuk et al., arXiv 2212.12611).
        ratio: eigenvalues whose share is above C/(R·d) (ELROND, step 5).
        response: effective dimension of the response-normalised spectrum; None where the response was not collected.
        response_interval: its 90 % interval (bootstrap over gradients and responses), or None.
        eigenvalues: float64, (P,): variances of the principal components, descending.
        null: float64, (P,): what the fitted noise alone would have had in their place.
        threshold: the eigenvalue above which noise is ruled out.
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
    response: float | None
    response_interval: tuple[float, float] | None
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
        """What a user is shown: the effective dimension where the response was collected, else the noise floor's.

        Neither is proven to follow a concept's complexity: on the demo's concepts the first has a rank correlation of
        0.11 with the number of open factors.
        """
        return float(self.estimate) if self.response is None else self.response

    def lines(self) -> list[str]:
        """The report as text, one fact a line."""
        low, high = self.interval
        interval = f"90 % interval {low} to {high}" if high is not None else f"{low} or more"
        effective = "not known, since the response was not collected"
        if self.response is not None and self.response_interval is not None:
            bottom, top = self.response_interval
            effective = f"{self.response:.1f} (90 % interval {bottom:.1f} to {top:.1f})"
        return [
            f"effective dimension within a token norm: {effective}",
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
    response, response_interval = None, None
    if isinstance(source, Gradients) and len(source.response) > 1:
        response, response_interval = effective_dimension(source, seed)

    fit = _Fit(eigenvalues, count - 1, size, seed)
    return LIDReport(
        estimate=fit.signal,
        interval=fit.interval(),
        detectable=fit.detectable,
        verdict=_verdict(fit, count),
        variance95=int(np.searchsorted(eigenvalues.cumsum(), 0.95 * eigenvalues.sum())) + 1,
        gap=int(np.argmax(-np.diff(np.sqrt(eigenvalues)))) + 1,
        ratio=spectrum.significant,
        response=response,
        response_interval=response_interval,
        eigenvalues=torch.from_numpy(eigenvalues),
        null=torch.from_numpy(fit.null()),
        threshold=fit.threshold,
        visible=fit.visible,
        noise=fit.noise,
        spread=fit.spread,
        count=count,
        size=size,
    )


def effective_dimension(gradients: Gradients, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Σ λ/(1 + λ) of the response-normalised spectrum, and its 90 % interval.

    Eigenvalues of a sample spread further than the truth's. A bootstrap over gradients and responses, within the
    leading components, shows by how much: it spreads them once more, and the same is taken off the estimate.

    Raises:
        ElrondError: as `elrond_core.response.fit_response`.
    """
    solved = components(gradients)
    value = _degrees(solved.eigenvalues)
    moves = solved.moves[:, :_MOST_REDRAWN]
    along, answers = gradients.flat.double() @ moves, gradients.response.flatten(1).double() @ moves
    ridge = solved.added * moves.T @ moves
    before = _degrees(_redrawn(along, answers, ridge))
    generator = torch.Generator().manual_seed(seed)
    shifts = []
    for _ in range(_REDRAWN):
        some = torch.randint(len(along), (len(along),), generator=generator)
        heard = torch.randint(len(answers), (len(answers),), generator=generator)
        shifts.append(_degrees(_redrawn(along[some], answers[heard], ridge)) - before)
    shift = torch.tensor(shifts, dtype=torch.float64)
    low, middle, high = shift.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    value = max(0.0, value - middle)
    return value, (max(0.0, value + low - middle), value + high - middle)


def _redrawn(along: torch.Tensor, answers: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    covariance = torch.cov(along.T).reshape(ridge.shape)
    return generalised(covariance, answers.T @ answers / len(answers) + ridge)[0].clamp_min(0)


def _degrees(eigenvalues: torch.Tensor) -> float:
    return float((eigenvalues / (1 + eigenvalues)).sum())


class _Fit:
    """Noise fitted to the eigenvalues below the signal, and the signal above the noise, until both agree."""

    def __init__(self, eigenvalues: np.ndarray, samples: int, size: int, seed: int) -> None:
        self.eigenvalues, self.samples, self.size, self.seed = eigenvalues, samples, size, seed
        self.signal = 0
        self.flat = True
        # Noise below rounding errors is none.
        self.least = 1e-12 * float(eigenvalues[0])
        # The lower bulk first, which hidden signal hardly touches; then all of it, which is more exact.
        for match in (self._match_quantiles, self._match_moments):
            while True:
                match()
                found = int((eigenvalues > self.threshold).sum())
                if found > len(eigenvalues) - 10:
                    self.flat = False
                    break
                if found <= self.signal:
                    break
                self.signal = found
        self.flat = self.flat and self.spread <= _FLAT

    @property
    def _bulk(self) -> tuple[np.ndarray, int, int]:
        """Eigenvalues below the signal, as those of a smaller sample of fewer dimensions."""
        size, samples = self.size - self.signal, self.samples - self.signal
        return self.eigenvalues[self.signal :] * (self.samples / samples), size, samples

    def _match_quantiles(self) -> None:
        bulk, size, samples = self._bulk
        seen = _interpolate(bulk[::-1])
        curves = np.stack([_interpolate(self._simulate(spread, size, samples)[::-1]) for spread in _SPREADS])
        levels = (curves @ seen) / (curves**2).sum(1)
        misfit = ((levels[:, None] * curves - seen) ** 2).sum(1)
        best = int(misfit.argmin())
        spread, noise = float(_SPREADS[best]), float(levels[best])
        if 0 < best < len(_SPREADS) - 1:
            # The vertex of the parabola through the best and its neighbours.
            near = slice(best - 1, best + 2)
            square, line, _ = np.polyfit(_SPREADS[near], misfit[near], 2)
            if square > 0:
                spread = float(np.clip(-line / (2 * square), _SPREADS[best - 1], _SPREADS[best + 1]))
                noise = float(np.interp(spread, _SPREADS, levels))
        self._set(noise, spread, size, samples)

    def _match_moments(self) -> None:
        bulk, size, samples = self._bulk
        mean, square = bulk.sum() / size, (bulk**2).sum() / size
        # A sample of equal variances has a mean square of mean² (1 + size/samples).
        excess = square / mean**2 - 1 - size / samples if mean > self.least else 0.0
        self._set(float(mean), float(np.sqrt(max(0.0, excess))), size, samples)

    def _set(self, noise: float, spread: float, size: int, samples: int) -> None:
        """Draw largest eigenvalues of such noise, and the threshold from them."""
        self.noise, self.spread = max(noise, self.least), spread
        rng = np.random.default_rng(self.seed)
        variances = np.ones((_DRAWS, size))
        if spread > 0.01:
            variances = rng.standard_gamma(spread**-2, (_DRAWS, size)) * spread**2
        place, centre, scale = _edge(variances, samples)
        # The Tracy-Widom law as a shifted Gamma (Chiani, 2014).
        wiggle = rng.standard_gamma(46.446, _DRAWS) * 0.186054 - 9.84801
        self.largest = (centre + scale * wiggle) * self.noise * samples / self.samples
        self.threshold = float(np.quantile(self.largest, 1 - _LEVEL))
        self.visible = float(np.median(1 / place)) * self.noise
        self._variances = _quantiles(spread, size) * self.noise

    def _simulate(self, spread: float, size: int, samples: int) -> np.ndarray:
        """Mean eigenvalues, descending, of samples of noise of mean variance 1, at a smaller size of equal shape."""
        shrink = min(1.0, _CAP / min(size, samples))
        size, samples = max(2, round(size * shrink)), max(2, round(samples * shrink))
        rng = np.random.default_rng(self.seed + 1)
        scale = np.sqrt(_quantiles(spread, size))
        found = []
        for _ in range(3):
            if samples >= size:
                # Bartlett: a triangle has the law of the whole sample, however many there are.
                factor = np.tril(rng.standard_normal((size, size)), -1)
                factor[np.diag_indices(size)] = np.sqrt(rng.chisquare(samples - np.arange(size)))
                sample = scale[:, None] * factor
            else:
                sample = rng.standard_normal((samples, size)) * scale
            found.append(np.linalg.svd(sample, compute_uv=False) ** 2 / samples)
        return np.mean(found, axis=0)

    def null(self) -> np.ndarray:
        """Eigenvalues the fitted noise would have, in the place of all."""
        curve = self._simulate(self.spread, self.size, self.samples)[::-1] * self.noise
        places = (np.arange(len(self.eigenvalues)) + 0.5) / len(self.eigenvalues)
        return np.interp(places, (np.arange(len(curve)) + 0.5) / len(curve), curve)[::-1].copy()

    def clearance(self) -> float:
        """Variance of the weakest signal above the noise's mean, as a multiple of the least that can be seen."""
        if not self.signal:
            return 0.0
        return float((self._population()[0][-1] - self.noise) / (self.visible - self.noise))

    @property
    def detectable(self) -> bool:
        """Whether the noise is flat, and the weakest signal clear of what can just be seen."""
        return self.flat and self.clearance() >= _CLEAR

    def _population(self) -> tuple[np.ndarray, np.ndarray]:
        """Variances of the signal's directions, and the sampling errors of their eigenvalues.

        A sample overstates a direction of variance a as a (1 + Σ t/(a - t)/n), t running over the noise's variances.
        """
        seen = self.eigenvalues[: self.signal, None]
        noise = self._variances
        low, high = np.full_like(seen, max(self.visible, noise.max() * (1 + 1e-9))), seen.copy()
        for _ in range(60):
            middle = (low + high) / 2
            above = middle * (1 + (noise / (middle - noise)).sum(1, keepdims=True) / self.samples) > seen
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        slope = 1 - ((noise / (low - noise)) ** 2).sum(1) / self.samples
        return low[:, 0], low[:, 0] * np.sqrt(2 / self.samples * slope.clip(0, 1))

    def interval(self) -> tuple[int, int | None]:
        """5 % and 95 % of the counts over redrawn signal and noise; open above if more may be hidden."""
        rng = np.random.default_rng(self.seed + 2)
        errors = self._population()[1] if self.signal else np.zeros(0)
        again = self.eigenvalues[: self.signal] + errors * rng.standard_normal((_DRAWS, self.signal))
        low = (again > self.threshold).sum(1)
        if not self.detectable:
            return int(np.quantile(low, 0.05)), None
        # Below the threshold, an eigenvalue may still be signal as often as noise alone stays under it.
        high = self.signal + (self.eigenvalues[self.signal :] > self.largest[:, None]).sum(1)
        return int(np.quantile(low, 0.05)), int(np.quantile(high, 0.95, method="higher"))


def _verdict(fit: _Fit, count: int) -> str:
    if not fit.signal:
        return f"Nothing rises above the noise floor of {count} gradients; collect more."
    if not fit.flat:
        return "The spectrum falls all the way without a flat noise floor, so that no number of directions stands out."
    if fit.clearance() < _CLEAR:
        return f"The signal runs into the noise floor of {count} gradients: at least this many, and more may be hidden."
    return f"The weakest is {fit.clearance():.1f} times what {count} gradients can just show."


def _quantiles(spread: float, size: int) -> np.ndarray:
    """Variances of mean 1, Gamma distributed with a relative standard deviation, at evenly spaced quantiles."""
    if spread <= 0.01:
        return np.ones(size)
    values = gammaincinv(spread**-2, (np.arange(size) + 0.5) / size)
    return values / values.mean()


def _interpolate(ascending: np.ndarray) -> np.ndarray:
    return np.interp(_LEVELS, (np.arange(len(ascending)) + 0.5) / len(ascending), ascending)


def _edge(variances: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
