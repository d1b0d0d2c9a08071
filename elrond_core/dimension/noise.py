"""Sampled noise: its variances, its eigenvalues, and where the largest of these lies.

The variances of the noise have mean 1. They follow the Gamma distribution or the
uniform distribution; the parameter of both is the relative standard deviation, called the spread.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import gammaincinv
from scipy.stats import gamma

# The Tracy-Widom law of real matrices, approximated by a shifted Gamma distribution (Chiani, 2014).
TRACY_WIDOM = gamma(46.446, loc=-9.84801, scale=0.186054)
# Largest relative standard deviation of a uniform distribution of positive variances; 1/√3 would reach down to zero.
WIDEST_UNIFORM = 0.57


def quantile_variances(spread: float, is_gamma: bool, size: int) -> np.ndarray:
    """Variances (size,) of mean 1 at evenly spaced quantiles of their distribution."""
    if spread <= 0.01:
        return np.ones(size)
    places = midpoints(size)
    if is_gamma:
        values = gammaincinv(spread**-2, places)
    else:
        values = 1 + math.sqrt(3) * min(spread, WIDEST_UNIFORM) * (2 * places - 1)
    return values / values.mean()


def random_variances(spreads: np.ndarray, is_gamma: bool, size: int, rng: np.random.Generator) -> np.ndarray:
    """Random variances (draws, size) of mean 1 and of the relative standard deviations `spreads` (draws, 1)."""
    if is_gamma:
        squares = np.maximum(spreads, 1e-3) ** 2
        return rng.standard_gamma(1 / squares, (len(spreads), size)) * squares
    return 1 + math.sqrt(3) * spreads.clip(0, WIDEST_UNIFORM) * rng.uniform(-1, 1, (len(spreads), size))


def sample_eigenvalues(variances: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Eigenvalues, descending, of a sample of noise of such variances (size,)."""
    size = len(variances)
    if samples >= size:
        # Bartlett's decomposition: a triangular matrix has the law of the whole sample, whatever its length.
        factor = np.tril(rng.standard_normal((size, size)), -1)
        factor[np.diag_indices(size)] = np.sqrt(rng.chisquare(samples - np.arange(size)))
        sample = np.sqrt(variances)[:, None] * factor
    else:
        sample = rng.standard_normal((samples, size)) * np.sqrt(variances)
    return np.linalg.svd(sample, compute_uv=False) ** 2 / samples


def midpoints(count: int) -> np.ndarray:
    """The middles of `count` equal parts of [0, 1]."""
    return (np.arange(count) + 0.5) / count


def edge_of_noise(variances: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the largest eigenvalue of samples of noise lies, for each row of variances (draws, size).

    Returns:
        c, the root of Σ (t c / (1 - t c))² = n in (0, 1/max t); a direction shows from the variance 1/c on.
        The largest eigenvalue is centre + scale · Tracy-Widom.
    """
    low, high = np.zeros(len(variances)), 1 / variances.max(1)
    for _ in range(50):
        middle = (low + high) / 2
        product = variances * middle[:, None]
        over = ((product / (1 - product)) ** 2).sum(1) > samples
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    product = variances * low[:, None]
    ratio = product / (1 - product)
    centre = (1 + ratio.sum(1) / samples) / low
    scale = np.cbrt(1 + (ratio**3).sum(1) / samples) / low * samples ** (-2 / 3)
    return low, centre, scale
