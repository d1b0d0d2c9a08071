"""How purely directions move the factors of portraits, by the method that finds them and the node that steers.

    python -m bench.directions              all concepts with several open factors, about an hour on one core
    python -m bench.directions --few 1      one concept of each half, to see that it runs
    python -m bench.directions --part 1/2   every second concept only; two of these may run side by side

For every concept with `SEVERAL` open factors or more the leading `LEADING` directions of each method are found on the
teacher and applied to images whose noise no direction was found on, either way at growing strengths. What moves little
looks pure, so all are compared where they have moved as much: where the first factor has moved by `MOVED`, between two
strengths by linear interpolation. Of the directions that get there:

* purity: the share of the movement that goes to this factor;
* coverage: the share of the concept's open factors that a direction moves first;
* valid: the share of images that are portraits of the world;
* arrived: the share of directions that get there.

Directions of `GUIDED` are also applied by Guide Along Directions. The first strength changes the image, by the model's
response at the first step, half as much as the median principal component at `STRENGTH` token norms. Strengths double
up to `FURTHEST` token norms.

Each direction is named by Label Directions from opposites that it is told. A label is right if its opposites are values
of the factor that the direction moves first, and the images move from the one to the other. `contrast_labels_right` is
the share of right labels among the directions that arrive, labelled or not.

Nothing is chosen on these figures. `purity` and `purity_vs_pca` are of the second half of the concepts; those of the
first are beside them. Figures go to bench/results/directions.json, and a second run goes on where the first stopped.
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

from demo.portraits.captions import OPEN, Allowed, named
from demo.portraits.world import CATEGORICAL, Factors

from . import portraits
from .portraits import NODES, RESULTS, collection, demo_of, halves, measures, moved, prompt_of, split_factors, stepped

from comfyui_elrond.elrond_core.decompose.pca import fit_pca  # isort: skip
from comfyui_elrond.elrond_core.decompose.response import fit_response  # isort: skip
from comfyui_elrond.elrond_core.decompose.sae_training import train_sae  # isort: skip
from comfyui_elrond.elrond_core.directions import Directions  # isort: skip
from comfyui_elrond.elrond_core.gradients import Gradients  # isort: skip

FIGURES = RESULTS / "directions.json"
MODEL = "teacher"
IMAGES, GRADIENTS = 128, 1024
# Noise levels that are pooled, as shares of the sampling, with as many gradients in all as at the one level.
MORE_LEVELS = "0.85, 0.7"
LEADING, STRENGTH, FURTHEST, SEEDS, SEED = 6, 0.8, 4.0, 16, 7001
GUIDED = ("pca", "ica", "response", "words")
# So many open factors make a concept whose directions are compared.
SEVERAL = 4
# Directions are compared where a factor has moved by this share of the most that it could.
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
    """How much the image changes at the first step along unit vectors of (K, d) directions: (K,)."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return (unit @ gradients.probes.flatten(1).double().T).square().mean(1).sqrt()


def directions_of(gradients: Gradients, vectors: torch.Tensor) -> Directions:
    """(K, d) directions for the nodes."""
    unit = torch.nn.functional.normalize(vectors, dim=1)[:, None]
    return Directions(unit, torch.ones(len(unit)), {"name": "any"}, gradients.provenance)


Ends = Callable[[dict[int, float]], torch.Tensor]


def ends_applied(noun: str, vectors: torch.Tensor) -> Ends:
    """Latents at both ends of some of (K, d) directions, from their strengths, one direction after another."""
    demo, prompt = demo_of(MODEL), prompt_of(noun)
    rows, at = demo.encode(f"a {noun}")[0], portraits.place_of(demo, prompt)

    def ends(strengths: dict[int, float]) -> torch.Tensor:
        steps = [stepped(rows, at, vectors[k : k + 1], (-s, s)) for k, s in strengths.items()]
        return portraits.sampled(MODEL, torch.cat(steps), SEEDS, SEED)

    return ends


def ends_guided(noun: str, directions: Directions) -> Ends:
    """The same by Guide Along Directions."""
    prompt = portraits.encoded(demo_of(MODEL), prompt_of(noun))

    def one(k: int, strength: float) -> torch.Tensor:
        settings = ("token norms", True, 0.0, 1.0, "")
        model = NODES["ElrondGuideDirections"].execute(demo_of(MODEL).model, directions, k, strength, *settings).args[0]
        return portraits.guided(MODEL, model, prompt, SEEDS, SEED)

    return lambda strengths: torch.cat([one(k, sign * s) for k, s in strengths.items() for sign in (-1, 1)])


def measure(ends: Ends, first: list[float], furthest: float) -> list[dict[str, Any] | None]:
    """Each direction where it has moved a factor by `MOVED`; None for one that does not get there.

    Args:
        ends: makes the images.
        first: the first strength of each direction, in token norms.
        furthest: the largest.
    """
    found: list[dict[str, Any] | None] = [None] * len(first)
    before: dict[int, dict[str, Any]] = {
        k: {"strength": 0.0, "moved": {}, "shifts": {}, "valid": None} for k in range(len(first))
    }
    strengths = {k: min(s, furthest) for k, s in enumerate(first)}
    while strengths:
        for k, row in zip(strengths, _rows(ends(strengths), list(strengths.values())), strict=True):
            if max(row["moved"].values()) >= MOVED:
                found[k] = between(before[k], row)
            before[k] = row
        strengths = {k: min(2 * s, furthest) for k, s in strengths.items() if found[k] is None and s < furthest}
    return found


def between(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Figures of a direction where its first factor has moved by `MOVED`, between two strengths."""
    main = max(after["moved"], key=after["moved"].get)
    start = before["moved"].get(main, 0.0)
    share = (MOVED - start) / (after["moved"][main] - start)

    def at(low: float, high: float) -> float:
        return low + share * (high - low)

    return {
        "main": main,
        "strength": at(before["strength"], after["strength"]),
        "moved": {name: at(before["moved"].get(name, 0.0), value) for name, value in after["moved"].items()},
        "shifts": after["shifts"],
        "valid": after["valid"] if before["valid"] is None else at(before["valid"], after["valid"]),
    }


def _rows(latents: torch.Tensor, strengths: list[float]) -> list[dict[str, Any]]:
    """Figures of each direction from the latents at its two ends."""
    images = demo_of(MODEL).decode(latents)
    parts = split_factors(measures().measure(images), 2 * len(strengths))
    valid = measures().valid(images).float().chunk(len(strengths))
    return [
        {
            "strength": s,
            "moved": moved(parts[2 * k], parts[2 * k + 1]),
            "shifts": shifts(parts[2 * k], parts[2 * k + 1]),
            "valid": float(valid[k].mean()),
        }
        for k, s in enumerate(strengths)
    ]


def shifts(low: Factors, high: Factors) -> dict[str, list[float]]:
    """The change of each continuous factor's mean, and of the share of each value of a categorical one."""
    out = {}
    for name in low:
        if name in CATEGORICAL:
            kinds = range(len(CATEGORICAL[name]))
            out[name] = [float((high[name] == k).float().mean() - (low[name] == k).float().mean()) for k in kinds]
        else:
            out[name] = [float((high[name] - low[name]).mean())]
    return out


def labels_of(gradients: Gradients, vectors: torch.Tensor) -> list[str]:
    """Names of (K, d) directions by Label Directions, "" without one."""
    label = NODES["ElrondLabelDirections"].execute
    found = label(
        demo_of(MODEL).clip,
        directions_of(gradients, vectors),
        words=OPPOSITES,
        least=0.0,
        replace=True,
        names="",
        pairs="told",
        gradients=gradients,
    ).args[0]
    return list(found.names)


def right(row: dict[str, Any]) -> bool:
    """Whether the label of a direction names the factor that it moves first, and says which way."""
    if not row["label"]:
        return False
    before, after = (named(f"{phrase} person") for phrase in row["label"].split(" → "))
    main = row["main"]
    if main not in before or main not in after or before[main] == after[main]:
        return False
    return _towards(after[main], row["shifts"][main]) > _towards(before[main], row["shifts"][main])


def _towards(values: Allowed, shift: list[float]) -> float:
    """How much a shift of a factor goes towards some of its values, up to a constant."""
    if isinstance(values, frozenset):
        return sum(shift[k] for k in values)
    return shift[0] * (values[0] + values[1]) / 2


def purity(row: dict[str, Any]) -> float:
    """The share of a direction's movement that goes to its main factor."""
    return row["moved"][row["main"]] / sum(row["moved"].values())


def summary(tables: dict[str, dict[str, list[Any]]], concepts: list[str]) -> dict[str, dict[str, float]]:
    """Means over concepts, by method."""
    out: dict[str, dict[str, float]] = {}
    for method in tables[concepts[0]]:
        found = {noun: [row for row in tables[noun][method] if row] for noun in concepts}
        rows = [row for table in found.values() for row in table]

        def mean(value: Callable[[dict[str, Any]], float], found: Any = found) -> float:
            return float(np.mean([np.mean([value(row) for row in table]) for table in found.values() if table]))

        out[method] = {
            "purity": mean(purity),
            "coverage": float(
                np.mean([len({r["main"] for r in t} & {*OPEN[n]}) / len(OPEN[n]) for n, t in found.items()])
            ),
            "valid": mean(lambda row: row["valid"]),
            "arrived": float(np.mean([len(found[noun]) / len(tables[noun][method]) for noun in concepts])),
            "strength": mean(lambda row: row["strength"]),
            "labels_right": sum(map(right, rows)) / max(len(rows), 1),
            "labelled": sum(bool(row["label"]) for row in rows) / max(len(rows), 1),
        }
    return out


def tables_of(noun: str) -> dict[str, list[Any]]:
    """The figures of a concept's directions, by method; kept once made."""
    kept = portraits.folder() / "directions"
    kept.mkdir(exist_ok=True)
    path = kept / f"{noun}.json"
    tables: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    gradients = collection(MODEL, prompt_of(noun), IMAGES, GRADIENTS)
    wanted = STRENGTH / 2 * float(changes(gradients, METHODS["pca"](noun, gradients)).median())
    for method, fit in METHODS.items():
        names = [method, *([f"{method} guided"] if method in GUIDED else [])]
        if all(name in tables for name in names):
            continue
        vectors = fit(noun, gradients)[:LEADING]
        labels = labels_of(gradients, vectors)
        first = (wanted / changes(gradients, vectors)).tolist()
        guided = ends_guided(noun, directions_of(gradients, vectors))
        for name in names:
            ends, times = (ends_applied(noun, vectors), 1) if name == method else (guided, 2)
            rows = measure(ends, [times * strength for strength in first], times * FURTHEST)
            tables[name] = [row and {**row, "label": label} for row, label in zip(rows, labels, strict=True)]
            path.write_text(json.dumps(tables))
    return tables


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--few", type=int, default=0, help="so many concepts of each half only")
    parser.add_argument("--part", default="1/1", help="as in 2/3: the second of every three concepts, and no figures")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    several = [noun for noun in portraits.CONCEPTS if len(OPEN[noun]) >= SEVERAL]
    first, second = (half[: arguments.few or None] for half in halves(several))
    tables = {}
    for noun in [*first, *second][part - 1 :: parts]:
        tables[noun] = tables_of(noun)
        print(noun, {m: round(row["purity"], 2) for m, row in summary(tables, [noun]).items()}, flush=True)
    if parts > 1:
        return
    of_second = summary(tables, second)
    figures: dict[str, Any] = {
        "purity": {method: row["purity"] for method, row in of_second.items()},
        "purity_vs_pca": {method: row["purity"] / of_second["pca"]["purity"] for method, row in of_second.items()},
        "contrast_labels_right": {method: of_second[method]["labels_right"] for method in METHODS},
        "weights": portraits.digest(),
        "split": portraits.SPLIT,
        "chosen": "nothing",
        "measured_on": second,
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
