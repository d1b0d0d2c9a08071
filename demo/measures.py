"""Free functions over the factors that `demo.portraits.measure` reads: alignment, diversity, distance to the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.stats import kstest

from .portraits.captions import EVERYTHING, Allowed, Meaning, allows, is_open, named
from .portraits.measure import TOLERANCE
from .portraits.world import FACTORS, Factors


def alignment(texts: Sequence[str], read: Factors) -> dict[str, float]:
    """The share of pictures that show what their text names, for each factor that is named; text i is picture i's.

    A noun names what it narrows. A continuous factor is right within `TOLERANCE` of what is allowed.
    """
    right: dict[str, list[bool]] = {name: [] for name in FACTORS}
    for i, text in enumerate(texts):
        for factor, allowed in named(text).items():
            shown = allows(allowed, read[factor][i : i + 1], TOLERANCE)
            right[factor].append(bool(shown))
    return {name: sum(values) / len(values) for name, values in right.items() if values}


def aligned(texts: Sequence[str], read: Factors) -> float:
    """The share of everything that texts name which their pictures show."""
    shares = alignment(texts, read)
    counts = {factor: sum(factor in named(text) for text in texts) for factor in shares}
    return sum(shares[factor] * counts[factor] for factor in shares) / max(sum(counts.values()), 1)


def open_of(text: str) -> Meaning:
    """The factors that a text leaves open, with what it allows of each."""
    said = named(text)
    whole = {factor: said.get(factor, EVERYTHING[factor]) for factor in FACTORS}
    return {factor: allowed for factor, allowed in whole.items() if is_open(allowed)}


def placed(allowed: Allowed, values: torch.Tensor) -> torch.Tensor:
    """Values (N,) of a factor relative to what is allowed of it.

    Continuous ones become shares of the interval, categorical ones places among the allowed values, -1 for others.
    """
    if isinstance(allowed, frozenset):
        places = torch.full((max(int(values.max()), *allowed) + 1,), -1)
        places[sorted(allowed)] = torch.arange(len(allowed))
        return places[values]
    return ((values - allowed[0]) / (allowed[1] - allowed[0])).clamp(0, 1)


def marginal_error(allowed: Allowed, values: torch.Tensor) -> float:
    """How far values (N,) are from uniform over what is allowed.

    Kolmogorov–Smirnov distance for a continuous factor, largest error of a value's share for a categorical one.
    """
    where = placed(allowed, values)
    if isinstance(allowed, frozenset):
        shares = torch.bincount(where[where >= 0], minlength=len(allowed)) / len(where)
        return float((shares - 1 / len(allowed)).abs().max())
    return float(kstest(where.double().numpy(), "uniform").statistic)


def spread(allowed: Allowed, values: torch.Tensor) -> float:
    """Mean difference of two pictures' values (N,), as a share of what uniform values over all that is allowed have.

    The absolute difference for a continuous factor, the chance to differ for a categorical one.
    """
    where, count = placed(allowed, values), len(values)
    if isinstance(allowed, frozenset):
        counts = torch.bincount(where + 1).double()
        same = float((counts * (counts - 1)).sum()) / (count * (count - 1))
        return (1 - same) / (1 - 1 / len(allowed))
    apart = float((where[:, None] - where[None, :]).abs().sum()) / (count * (count - 1))
    return apart * 3


def diversity(text: str, read: Factors) -> float:
    """The mean `spread` of pictures of one text over the factors that it leaves open: 1 is the world's own."""
    shares = [spread(allowed, read[factor]) for factor, allowed in open_of(text).items()]
    return sum(shares) / len(shares)
