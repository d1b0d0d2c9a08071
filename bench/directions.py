"""How purely directions move the factors of portraits, by the method that finds them.

    python -m bench.directions            all concepts with several open factors, about half an hour on two cores
    python -m bench.directions --few 1    one concept of each half, to see that it runs

For every concept with `SEVERAL` open factors or more the leading `LEADING` directions of each method are found on the
teacher and applied to images whose noise no direction was found on. Of each direction:

* purity: the share of its movement that goes to the factor that it moves most;
* coverage: the share of the concept's open factors that some direction moves by `MOVED` or more;
* valid: the share of images at both ends that are portraits of the world.

A direction that moves little looks pure, so all are compared at the same change: of each such a strength is taken, and
its negative, that the image changes, by the model's response at the first step, as much as along the median principal
component at `STRENGTH` token norms; `FURTHEST` at most. The response has the ridge of Fit Response Directions, which
shortens steps along which the model hardly answers. `purity` and `purity_vs_pca` are of the half on which nothing is
chosen. Figures go to bench/results/directions.json, and a second run goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import FactorAnalysis, FastICA
from sklearn.exceptions import ConvergenceWarning

from demo.portraits.captions import OPEN

from . import portraits
from .portraits import NODES, RESULTS, collection, demo_of, halves, measures, moved, prompt_of, split_factors, stepped

from comfyui_elrond.elrond_core.decompose.pca import fit_pca  # isort: skip
from comfyui_elrond.elrond_core.decompose.response import components, fit_response  # isort: skip
from comfyui_elrond.elrond_core.decompose.sae_training import train_sae  # isort: skip
from comfyui_elrond.elrond_core.gradients import Gradients  # isort: skip

FIGURES = RESULTS / "directions.json"
MODEL = "teacher"
IMAGES, GRADIENTS = 128, 1024
# Noise levels that are pooled, as shares of the sampling, with as many gradients in all as at the one level.
MORE_LEVELS = "0.85, 0.7"
LEADING, STRENGTH, FURTHEST, SEEDS, SEED = 6, 0.8, 3.0, 16, 7001
# So many open factors make a concept whose directions are compared.
SEVERAL = 4
# A direction moves a factor if it moves it by this share of the most that it could.
MOVED = 0.25
# The opposites that a person would list who knows what portraits are of; the captions' own words.
OPPOSITES = (
    "pale - dark skinned, bald - with long hair, gray haired - pink haired, smiling - frowning, shaven - bearded, "
    "with open eyes - with sunglasses, in a red shirt - in a blue shirt, in a suit - in a dress, "
    "on a green wall - on a purple wall, on the left - on the right"
)

Fit = Callable[[str, Gradients], torch.Tensor]


def _factor_analysis(_: str, gradients: Gradients) -> torch.Tensor:
    """Components of a factor analysis, rotated by varimax."""
    model = FactorAnalysis(LEADING, rotation="varimax", random_state=0).fit(gradients.flat.double().numpy())
    return torch.from_numpy(model.components_).float()


def _ica(_: str, gradients: Gradients) -> torch.Tensor:
    """What moves each independent component of the leading principal ones."""
    model = FastICA(LEADING, whiten="unit-variance", random_state=0, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(gradients.flat.double().numpy())
    return torch.from_numpy(model.mixing_.T).float()


def _words(noun: str, gradients: Gradients) -> torch.Tensor:
    """Directions between told opposites, by the node."""
    found = NODES["ElrondFitWords"].execute(
        gradients, demo_of(MODEL).clip, words=OPPOSITES, significance=0.0, most=LEADING, pairs="told"
    )
    return found.args[0].vectors.flatten(1)


def _pooled(noun: str, _: Gradients) -> torch.Tensor:
    """PCA over several noise levels."""
    count = GRADIENTS // (1 + len(MORE_LEVELS.split(",")))
    several = collection(MODEL, prompt_of(noun), IMAGES, count, levels=MORE_LEVELS)
    return fit_pca(several.normalised(), significance=0, limit=LEADING)[0].vectors.flatten(1)


def _random(_: str, gradients: Gradients) -> torch.Tensor:
    return torch.randn(LEADING, gradients.flat.shape[1], generator=torch.Generator().manual_seed(0))


METHODS: dict[str, Fit] = {
    "pca": lambda _, g: fit_pca(g, significance=0, limit=LEADING)[0].vectors.flatten(1),
    "response": lambda _, g: fit_response(g, significance=0, limit=LEADING)[0].vectors.flatten(1),
    "response_rotated": lambda _, g: fit_response(g, significance=0, limit=LEADING, rotate=True)[0].vectors.flatten(1),
    "varimax": _factor_analysis,
    "ica": _ica,
    "sae": lambda _, g: train_sae(g).directions.vectors.flatten(1),
    "pca_pooled": _pooled,
    "words": _words,
    "random": _random,
}


def changes(gradients: Gradients, vectors: torch.Tensor) -> torch.Tensor:
    """How much the image changes at the first step along unit vectors of (K, d) directions, with the ridge: (K,)."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return (unit @ components(gradients).cholesky).norm(dim=1)


def measure(noun: str, vectors: torch.Tensor, strengths: list[float]) -> list[dict[str, Any]]:
    """What each of (K, d) directions moves in a concept's images at ± its strength, and how many stay valid there."""
    demo, prompt = demo_of(MODEL), prompt_of(noun)
    rows, at = demo.encode(f"a {noun}")[0], portraits.place_of(demo, prompt)
    ends = torch.cat([stepped(rows, at, vectors[k : k + 1], (-s, s)) for k, s in enumerate(strengths)])
    images = demo.decode(portraits.sampled(MODEL, ends, SEEDS, SEED))
    parts = split_factors(measures().measure(images), 2 * len(vectors))
    valid = measures().valid(images).float().chunk(len(vectors))
    return [
        {"strength": s, "moved": moved(parts[2 * k], parts[2 * k + 1]), "valid": float(valid[k].mean())}
        for k, s in enumerate(strengths)
    ]


def purity(row: dict[str, Any]) -> float:
    """The share of a direction's movement that goes to its main factor."""
    values = list(row["moved"].values())
    return max(values) / max(sum(values), 1e-9)


def coverage(noun: str, table: list[dict[str, Any]]) -> float:
    """The share of a concept's open factors that some direction moves."""
    return float(np.mean([any(row["moved"][factor] >= MOVED for row in table) for factor in OPEN[noun]]))


def summary(tables: dict[str, dict[str, list[dict[str, Any]]]], concepts: list[str]) -> dict[str, dict[str, float]]:
    """Means over concepts, by method."""
    out: dict[str, dict[str, float]] = {}
    for method in METHODS:
        found = {noun: tables[noun][method] for noun in concepts}
        rows = [row for table in found.values() for row in table]
        out[method] = {
            "purity": float(np.mean([np.mean([purity(row) for row in table]) for table in found.values()])),
            "coverage": float(np.mean([coverage(noun, table) for noun, table in found.items()])),
            "moved": float(np.mean([max(row["moved"].values()) for row in rows])),
            "valid": float(np.mean([row["valid"] for row in rows])),
            "strength": float(np.mean([row["strength"] for row in rows])),
        }
    return out


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--few", type=int, default=0, help="so many concepts of each half only")
    arguments = parser.parse_args()
    several = [noun for noun in portraits.CONCEPTS if len(OPEN[noun]) >= SEVERAL]
    first, second = (half[: arguments.few or None] for half in halves(several))
    kept = portraits.folder() / "directions.json"
    tables: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    for noun in [*second, *first]:
        gradients = collection(MODEL, prompt_of(noun), IMAGES, GRADIENTS)
        wanted = STRENGTH * float(changes(gradients, METHODS["pca"](noun, gradients)).median())
        for method, fit in METHODS.items():
            if method not in tables.setdefault(noun, {}):
                vectors = fit(noun, gradients)[:LEADING]
                strengths = (wanted / changes(gradients, vectors)).clamp_max(FURTHEST).tolist()
                tables[noun][method] = measure(noun, vectors, strengths)
                kept.write_text(json.dumps(tables))
        print(noun, {m: round(float(np.mean([purity(r) for r in t])), 2) for m, t in tables[noun].items()}, flush=True)
    of_second = summary(tables, second)
    figures = {
        "purity": {method: row["purity"] for method, row in of_second.items()},
        "purity_vs_pca": {method: row["purity"] / of_second["pca"]["purity"] for method, row in of_second.items()},
        "weights": portraits.digest(),
        "split": portraits.SPLIT,
        "chosen_on": first,
        "measured_on": second,
        "chosen": "nothing",
        "second_half": of_second,
        "first_half": summary(tables, first),
        "tables": {noun: tables[noun] for noun in [*first, *second]},
    }
    for half in ("first_half", "second_half"):
        print(half)
        for method, row in figures[half].items():
            print(f"  {method:<18}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    if not arguments.few:
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
