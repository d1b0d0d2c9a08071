"""Free functions over measured factors: alignment, diversity, distance to the data."""

from __future__ import annotations

import torch
from scipy.stats import kstest

from .captions import WORDS, Caption, word_of
from .world import SHAPES, Measurement


def alignment(captions: list[Caption], seen: Measurement) -> float:
    """The share of named attributes that the images show; caption i belongs to image i."""
    read = {factor: word_of(factor, seen.factors[factor]) for factor in WORDS}
    right, total = 0, 0
    for i, caption in enumerate(captions):
        for factor, word in caption.named.items():
            right += read[factor][i] == word
            total += 1
    return right / max(total, 1)


def distance_to_uniform(values: torch.Tensor) -> float:
    """Kolmogorov–Smirnov distance of a sample to the uniform distribution on [0, 1]."""
    return float(kstest(values.clamp(0, 1).double().numpy(), "uniform").statistic)


def diversity(seen: Measurement, factors: list[str] | tuple[str, ...]) -> float:
    """Mean pairwise distance over some factors, as a share of what the world itself has.

    Each continuous factor contributes the mean absolute difference of two images over that of two uniform numbers
    (1/3); shape contributes the probability that two images differ over that of three equally likely shapes (2/3).
    Factors count alike. Values outside the world's range, as broken images have them, count as its ends.
    """
    shares = []
    for name in factors:
        values = seen.factors[name]
        count = len(values)
        if name == "shape":
            counts = torch.bincount(values, minlength=len(SHAPES)).double()
            same = (counts * (counts - 1)).sum() / (count * (count - 1))
            shares.append(float((1 - same) / (2 / 3)))
        else:
            values = values.clamp(0, 1)
            apart = (values[:, None] - values[None, :]).abs().sum() / (count * (count - 1))
            shares.append(float(apart / (1 / 3)))
    return sum(shares) / len(shares)
