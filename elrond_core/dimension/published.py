"""The estimates of dimension that were published, for comparison. All three drift with the number of gradients."""

from __future__ import annotations

import numpy as np


def largest_gap(eigenvalues: np.ndarray) -> int:
    """Components before the largest gap between singular values (Stanczuk et al., arXiv 2212.12611).

    Args:
        eigenvalues: float64, (P,), descending.
    """
    return int(np.argmax(-np.diff(np.sqrt(eigenvalues)))) + 1


def components_to_share(eigenvalues: np.ndarray, share: float = 0.95) -> int:
    """Components that together explain a share of the variance.

    Args:
        eigenvalues: float64, (P,), descending.
        share: of their sum, 0 to 1.
    """
    return int(np.searchsorted(eigenvalues.cumsum(), share * eigenvalues.sum())) + 1
