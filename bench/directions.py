"""How purely directions move the factors of portraits, by the method that finds them and the node that steers.

    python -m bench.directions              all concepts with several open factors, about an hour on one core
    python -m bench.directions --few 1      one concept only, to see that it runs
    python -m bench.directions --part 1/2   every second concept only; two of these may run side by side

For every concept with `SEVERAL` open factors or more the leading `LEADING` directions of each method are found on the
teacher, and applied either way to images whose noise no direction was found on. Of each direction at each strength:

* purity: the share of its movement that goes to the factor that it moves most;
* moved: how far it moves this factor, between 0 and 1;
* others: how far it moves all other factors together;
* coverage: the share of the concept's open factors that some direction moves by `MOVED` or more;
* valid: the share of images that are portraits of the world.

What moves little looks pure, so methods are compared where they move their factors as far. Each is measured at several
strengths. The means over all directions and concepts are interpolated linearly at the movement that the principal
components make at the second of their strengths. There a component changes the image, by the model's response at the
first step, as much as the median one at `STRENGTH` token norms, and so does any other direction. Directions of `GUIDED`
are also applied by Guide Along Directions, at `TIMES` the strengths.

Each direction is named by Label Directions from opposites that it is told. A label is right if its opposites are values
of the factor that the direction moves most, and the images move away from the one and to the other.
`contrast_labels_right` is the share of right labels among the directions that move a factor by `MOVED`, labelled or
not, at the second strength.

Figures are of the second half of the concepts (bench/portraits.py); how Guide Along Directions works was chosen on the
first. But methods were compared in two other ways before this one, with figures of two nouns of the second half, and
that `others` is given was decided when most of them were known. Figures go to bench/results/directions.json, and a
second run goes on where the first stopped.
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

from demo.portraits.captions import OPEN, named
from demo.portraits.world import CATEGORICAL, Factors

from . import portraits
from .portraits import NODES, RESULTS, collection, demo_of, halves, measures, moved, prompt_of, split_factors, stepped

from comfyui_elrond.elrond_core.decompose.pca import fit_pca  # isort: skip
from comfyui_elrond.elrond_core.decompose.response import fit_response  # isort: skip
from comfyui_elrond.elrond_core.decompose.sae_training import train_sae  # isort: skip
from comfyui_elrond.elrond_core.directions import Directions  # isort: skip
from comfyui_elrond.elrond_core.gradients import Gradients  # isort: skip
from comfyui_elrond.elrond_core.steering.guidance import LONGEST  # isort: skip

FIGURES = RESULTS / "directions.json"
MODEL = "teacher"
IMAGES, GRADIENTS = 128, 1024
# Noise levels that are pooled, as shares of the sampling, with as many gradients in all as at the one level.
MORE_LEVELS = "0.85, 0.7"
LEADING = 6
GUIDED = ("pca", "ica", "response", "words")
# Strengths of each direction, as shares of that at which all change the image alike; the largest, in token norms.
LEVELS, TIMES, STRENGTH, FURTHEST = (0.5, 1.0), 2, 0.8, 4.0
SEEDS, SEED = 24, 7001
CHOSEN = (
    "how Guide Along Directions works, on the first half; how methods are compared and `others`, after figures of both "
    "halves had been seen"
)
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


def directions_of(gradients: Gradients, vectors: torch.Tensor) -> Directions:
    """(K, d) directions for the nodes."""
    unit = torch.nn.functional.normalize(vectors, dim=1)[:, None]
    return Directions(unit, torch.ones(len(unit)), {"name": "any"}, gradients.provenance)


def changes(gradients: Gradients, vectors: torch.Tensor) -> torch.Tensor:
    """How much the image changes at the first step along unit vectors of (K, d) directions: (K,)."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return (unit @ gradients.probes.flatten(1).double().T).square().mean(1).sqrt()


def applied(noun: str, vectors: torch.Tensor, strengths: list[float]) -> torch.Tensor:
    """Latents at both ends of (K, d) directions, one direction after another."""
    demo, prompt = demo_of(MODEL), prompt_of(noun)
    rows, at = demo.encode(f"a {noun}")[0], portraits.place_of(demo, prompt)
    ends = [stepped(rows, at, vectors[k : k + 1], (-s, s)) for k, s in enumerate(strengths)]
    return portraits.sampled(MODEL, torch.cat(ends), SEEDS, SEED)


def guided(noun: str, directions: Directions, strengths: list[float]) -> torch.Tensor:
    """The same by Guide Along Directions."""
    prompt, guide = portraits.encoded(demo_of(MODEL), prompt_of(noun)), NODES["ElrondGuideDirections"].execute
    latents = []
    for k, strength in enumerate(strengths):
        for signed in (-strength, strength):
            model = guide(demo_of(MODEL).model, directions, k, signed, "token norms", True, 0.0, 1.0, "").args[0]
            latents.append(portraits.guided(MODEL, model, prompt, SEEDS, SEED))
    return torch.cat(latents)


def rows_of(latents: torch.Tensor, strengths: list[float]) -> list[dict[str, Any]]:
    """Figures of each direction, from the latents at its two ends."""
    images = demo_of(MODEL).decode(latents)
    parts = split_factors(measures().measure(images), 2 * len(strengths))
    valid = measures().valid(images).float().chunk(len(strengths))
    rows = []
    for k, strength in enumerate(strengths):
        low, high = parts[2 * k : 2 * k + 2]
        figures = {"moved": moved(low, high), "shifts": shifts(low, high), "valid": float(valid[k].mean())}
        rows.append({"strength": strength, **figures})
    return rows


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


def main_of(row: dict[str, Any]) -> str:
    """The factor that a direction moves most."""
    return str(max(row["moved"], key=row["moved"].get))


def right(row: dict[str, Any]) -> bool:
    """Whether the label of a direction names the factor that it moves most, and says which way."""
    before, _, after = row["label"].partition(" → ")
    if not before or not after:
        return False
    values, main = [named(f"{phrase} person") for phrase in (before, after)], main_of(row)
    if not all(main in value for value in values) or values[0][main] == values[1][main]:
        return False
    start, end = (value[main] for value in values)
    shift = row["shifts"][main]
    if isinstance(start, frozenset) and isinstance(end, frozenset):
        return sum(shift[k] for k in end - start) > 0 > sum(shift[k] for k in start - end)
    return shift[0] * (sum(end) - sum(start)) > 0


def purity(row: dict[str, Any]) -> float:
    """The share of a direction's movement that goes to its main factor; that of chance if nothing moves."""
    values = list(row["moved"].values())
    return max(values) / sum(values) if any(values) else 1 / len(values)


def coverage(noun: str, table: list[dict[str, Any]]) -> float:
    """The share of a concept's open factors that some direction moves."""
    return float(np.mean([any(row["moved"][factor] >= MOVED for row in table) for factor in OPEN[noun]]))


def point(found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Means over concepts of a method's directions at one strength."""

    def mean(value: Callable[[dict[str, Any]], float]) -> float:
        return float(np.mean([np.mean([value(row) for row in table]) for table in found.values()]))

    return {
        "moved": mean(lambda row: max(row["moved"].values())),
        "others": mean(lambda row: sum(row["moved"].values()) - max(row["moved"].values())),
        "purity": mean(purity),
        "coverage": float(np.mean([coverage(noun, table) for noun, table in found.items()])),
        "valid": mean(lambda row: row["valid"]),
        "strength": mean(lambda row: row["strength"]),
    }


def summary(tables: dict[str, dict[str, Any]], concepts: list[str]) -> dict[str, dict[str, Any]]:
    """By method: its points, what they are at the movement of the principal components, and the labels."""
    names = list(tables[concepts[0]])
    curves = {
        name: [point({noun: tables[noun][name][level] for noun in concepts}) for level in range(len(LEVELS))]
        for name in names
    }
    wanted = curves["pca"][1]["moved"]
    out: dict[str, dict[str, Any]] = {}
    for name, curve in curves.items():
        along = [each["moved"] for each in curve]
        rows = [row for noun in concepts for row in tables[noun][name][1] if max(row["moved"].values()) >= MOVED]
        out[name] = {
            **{key: _line(wanted, along, [each[key] for each in curve]) for key in curve[0]},
            "labels_right": sum(map(right, rows)) / max(len(rows), 1),
            "labelled": sum(bool(row["label"]) for row in rows) / max(len(rows), 1),
            "points": curve,
        }
    return out


def _line(at: float, along: list[float], values: list[float]) -> float:
    """The value on the line through two points."""
    return values[0] + (at - along[0]) / (along[1] - along[0]) * (values[1] - values[0])


def tables_of(noun: str) -> dict[str, list[list[dict[str, Any]]]]:
    """The figures of a concept's directions, by method and strength; kept once made."""
    kept = portraits.folder() / f"directions {LEVELS} {TIMES} {STRENGTH} {SEEDS} {LONGEST}"
    kept.mkdir(exist_ok=True)
    path = kept / f"{noun}.json"
    tables: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    gradients = collection(MODEL, prompt_of(noun), IMAGES, GRADIENTS)
    alike = STRENGTH * float(changes(gradients, METHODS["pca"](noun, gradients)).median())
    for method, fit in METHODS.items():
        names = [method, *([f"{method} guided"] if method in GUIDED else [])]
        if all(name in tables for name in names):
            continue
        vectors = fit(noun, gradients)[:LEADING]
        labels = labels_of(gradients, vectors)
        far = (alike / changes(gradients, vectors)).clamp_max(FURTHEST)
        for name in names:
            tables[name] = []
            for level in LEVELS:
                if name == method:
                    strengths = (level * far).tolist()
                    latents = applied(noun, vectors, strengths)
                else:
                    strengths = (TIMES * level * far).tolist()
                    latents = guided(noun, directions_of(gradients, vectors), strengths)
                rows = rows_of(latents, strengths)
                tables[name].append([{**row, "label": label} for row, label in zip(rows, labels, strict=True)])
        path.write_text(json.dumps(tables))
    return tables


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--few", type=int, default=0, help="so many concepts only")
    parser.add_argument("--part", default="1/1", help="as in 2/3: the second of every three concepts, and no figures")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    several = [noun for noun in portraits.CONCEPTS if len(OPEN[noun]) >= SEVERAL]
    concepts = halves(several)[1][: arguments.few or None]
    tables = {}
    for noun in concepts[part - 1 :: parts]:
        tables[noun] = tables_of(noun)
        found = summary(tables, [noun])
        print(
            noun, {name: [round(row[key], 2) for key in ("purity", "moved")] for name, row in found.items()}, flush=True
        )
    if parts > 1:
        return
    found = summary(tables, concepts)
    figures: dict[str, Any] = {
        "purity": {name: row["purity"] for name, row in found.items()},
        "purity_vs_pca": {name: row["purity"] / found["pca"]["purity"] for name, row in found.items()},
        "contrast_labels_right": {name: row["labels_right"] for name, row in found.items()},
        "weights": portraits.digest(),
        "split": portraits.SPLIT,
        "chosen": CHOSEN,
        "measured_on": concepts,
        "methods": found,
    }
    for name, row in found.items():
        print(f"{name:<18}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items() if key != "points"))
        print("  ", [{key: round(value, 3) for key, value in each.items()} for each in row["points"]])
    if not arguments.few:
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
