"""The estimated dimension of each concept beside the number of its open factors, on teacher and student.

    python -m bench.complexity                  all nouns, teacher and student, three seeds
    python -m bench.complexity --seeds 1 --few 2    two nouns of each half and one seed, to see that it runs

Of every noun's images eight are noised and compared with all others, by the nodes themselves. The figures are of the
half of the nouns on which nothing is chosen (bench/portraits.py), means over seeds:

* lid_within_one: the share of nouns whose estimate is within 1 of the number of open factors;
* lid_spearman: the rank correlation of the two.

Beside them the published estimates' rank correlations. Collections are kept in bench/results/collections, and a second run goes on where the first stopped. Figures go to
bench/results/complexity.json.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from demo.evaluate import SETTINGS
from demo.portraits.captions import OPEN

from . import portraits
from .portraits import RESULTS, collection, halves, prompt_of

from comfyui_elrond.elrond_core.dimension.report import estimate_lid  # isort: skip

FIGURES = RESULTS / "complexity.json"
IMAGES, NOISED = 128, 8


def estimates(model: str, nouns: list[str], seed: int) -> dict[str, dict[str, Any]]:
    """What is estimated of each noun: the dimension and its interval, and the published estimates."""
    out = {}
    for noun in nouns:
        others = IMAGES - 1
        report = estimate_lid(collection(model, prompt_of(noun), IMAGES, NOISED * others, others, NOISED, seed))
        out[noun] = {
            "true": len(OPEN[noun]),
            "estimate": report.dimension,
            "interval": report.correlation_interval,
            "noise_floor": report.estimate,
            "share": report.ratio,
            "gap": report.gap,
            "95": report.variance95,
        }
        print(model, seed, noun, json.dumps(out[noun]), flush=True)
    return out


def figures_of(tables: list[dict[str, dict[str, Any]]], nouns: list[str]) -> dict[str, Any]:
    """Share within one and rank correlation over some nouns, means over seeds."""
    rows = [[table[noun] for noun in nouns] for table in tables]
    within = [np.mean([abs(row["estimate"] - row["true"]) <= 1 for row in some]) for some in rows]
    found: dict[str, Any] = {"lid_within_one": float(np.mean(within))}
    for key in ("estimate", "noise_floor", "share", "gap", "95"):
        ranks = [spearmanr([row["true"] for row in some], [row[key] for row in some]).statistic for some in rows]
        # A constant has no rank correlation.
        found[f"spearman of {key}"] = float(np.mean(np.nan_to_num(ranks)))
    return found


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--few", type=int, default=0, help="so many nouns of each half only")
    arguments = parser.parse_args()
    first, second = (half[: arguments.few or None] for half in halves())
    models: dict[str, Any] = {}
    for model in SETTINGS:
        tables = [estimates(model, [*second, *first], seed) for seed in range(arguments.seeds)]
        models[model] = {
            "second_half": figures_of(tables, second),
            "first_half": figures_of(tables, first),
            "seeds": tables,
        }
    figures = {
        "lid_within_one": {model: found["second_half"]["lid_within_one"] for model, found in models.items()},
        "lid_spearman": {model: found["second_half"]["spearman of estimate"] for model, found in models.items()},
        "weights": portraits.digest(),
        "split": portraits.SPLIT,
        "chosen_on": first,
        "measured_on": second,
        "chosen": "nothing",
        "models": models,
    }
    for model, found in models.items():
        print(model, json.dumps({half: found[half] for half in ("first_half", "second_half")}, indent=1))
    if not arguments.few:
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
