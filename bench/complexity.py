"""The estimated dimension of each concept beside the number of its open factors, on teacher and student.

    python -m bench.complexity                      all nouns, teacher and student, three seeds
    python -m bench.complexity --seeds 1 --few 2    two nouns of each half and one seed, to see that it runs

Of every noun's images eight are noised and compared with all others, by the nodes themselves. The figures are of the
half of the nouns on which nothing is chosen (bench/portraits.py), means over seeds:

* lid_within_one: the share of nouns whose estimate is within 1 of the number of open factors;
* lid_spearman: the rank correlation of the two.

Beside them what others estimate: the published estimates from the same gradients; the maximum likelihood of
scikit-dimension on the images' latents, with as many neighbours; and FLIPD (arXiv 2406.03537) of the model at each
image, at the noise level that ranks the first half best (the lowest of several). The last two are of the first seed
only. Collections are kept in bench/results/collections, and a second run goes on where the first stopped. Figures go
to bench/results/complexity.json.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import skdim
import torch
from scipy.stats import spearmanr

from demo.evaluate import SETTINGS
from demo.portraits.captions import OPEN

from . import portraits
from .portraits import RESULTS, collection, demo_of, halves, prompt_of, realizations

from comfyui_elrond.elrond_core.dimension.neighbours import NeighbourOptions  # isort: skip
from comfyui_elrond.elrond_core.dimension.report import estimate_lid  # isort: skip
from comfyui_elrond.elrond_core.seeding import normal  # isort: skip

FIGURES = RESULTS / "complexity.json"
IMAGES, NOISED = 128, 8
# Noise levels of FLIPD, and the random directions that estimate its trace, one an image.
LEVELS = (0.05, 0.1, 0.2, 0.4)
STEP = 1e-2


def flipd(model: str, noun: str, latents: torch.Tensor, level: float) -> float:
    """Mean over images (N, 16, 8, 8) of D + σ² (tr ∇s + ‖s‖²) at (1 - σ) x, s being the model's score there."""
    demo = demo_of(model)
    rows = demo.encode(f"a {noun}").expand(len(latents), -1, -1)
    levels = torch.full((len(latents),), level)

    def score(noisy: torch.Tensor) -> torch.Tensor:
        velocity = demo.model.model.diffusion_model(noisy, 1000 * levels, context=rows)
        return -(noisy + (1 - level) * velocity) / level

    with torch.inference_mode():
        places = (1 - level) * demo.model.model.process_latent_in(latents)
        probe = normal(tuple(places.shape[1:]), 0, "flipd", list(range(len(places)))).sign()
        # Central differences along a random direction of ones: Hutchinson's estimate of the trace.
        change = (score(places + STEP * level * probe) - score(places - STEP * level * probe)) / (2 * STEP * level)
        each = (probe * change + score(places).square()).flatten(1).sum(1)
    return float(latents[0].numel() + level**2 * each.mean())


def estimates(model: str, nouns: list[str], seed: int) -> dict[str, dict[str, Any]]:
    """What is estimated of each noun: the dimension and its interval, the published estimates, and others'."""
    out = {}
    for noun in nouns:
        others = IMAGES - 1
        report = estimate_lid(collection(model, prompt_of(noun), IMAGES, NOISED * others, others, NOISED, seed))
        out[noun] = {
            "true": len(OPEN[noun]),
            "estimate": report.dimension,
            "interval": report.neighbour_interval,
            "noise_floor": report.estimate,
            "share": report.ratio,
            "gap": report.gap,
            "95": report.variance95,
        }
        if not seed:
            images = realizations(model, prompt_of(noun), IMAGES, seed)["samples"]
            neighbours = NeighbourOptions().neighbours
            found = skdim.id.MLE().fit(images.flatten(1).double().numpy(), n_neighbors=neighbours)
            out[noun]["latents by skdim"] = float(found.dimension_)
            out[noun] |= {f"flipd {level}": flipd(model, noun, images, level) for level in LEVELS}
        print(model, seed, noun, json.dumps(out[noun]), flush=True)
    return out


def figures_of(tables: list[dict[str, dict[str, Any]]], nouns: list[str]) -> dict[str, Any]:
    """Share within one and rank correlation over some nouns, means over the seeds that have an estimate."""
    rows = [[table[noun] for noun in nouns] for table in tables]
    within = [np.mean([abs(row["estimate"] - row["true"]) <= 1 for row in some]) for some in rows]
    holds = [np.mean([row["interval"][0] <= row["true"] <= row["interval"][1] for row in some]) for some in rows]
    found: dict[str, Any] = {"lid_within_one": float(np.mean(within)), "interval_holds": float(np.mean(holds))}
    for key in [key for key in rows[0][0] if key not in ("true", "interval")]:
        ranks = [
            spearmanr([r["true"] for r in some], [r[key] for r in some]).statistic for some in rows if key in some[0]
        ]
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
        of = {"second_half": figures_of(tables, second), "first_half": figures_of(tables, first)}
        level = max(LEVELS, key=lambda one: of["first_half"][f"spearman of flipd {one}"])
        for half in of.values():
            half["spearman of flipd"] = half[f"spearman of flipd {level}"]
        models[model] = {**of, "flipd_level": level, "seeds": tables}
    figures = {
        "lid_within_one": {model: found["second_half"]["lid_within_one"] for model, found in models.items()},
        "lid_spearman": {model: found["second_half"]["spearman of estimate"] for model, found in models.items()},
        "weights": portraits.digest(),
        "split": portraits.SPLIT,
        "chosen_on": first,
        "measured_on": second,
        "chosen": "distances of images and not of equal variances; FLIPD's noise level",
        "models": models,
    }
    for model, found in models.items():
        print(model, json.dumps({half: found[half] for half in ("first_half", "second_half")}, indent=1))
    if not arguments.few:
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
