"""What a calibrated strength is worth: the same change along every direction, and images that stay valid.

    python -m bench.calibration                    teacher and student

The nouns are split in two halves by a seed (bench/portraits.py). On the first half, and only there, the strengths in
token norms are chosen that make the same mean change as calibrated ones. The figures are of the second half, for seeds
that no calibration saw:

* calibration_cv_ratio: the coefficient of variation of the change over directions, signs and nouns at one calibrated
  strength, divided by that at one strength in token norms; the mean over the strengths `LEVELS`. The change is measured
  as the calibration does, by pixels.
* calibration_cv_ratio_by_factors: the same with the change of the factors that the world reads in the images.
* calibration_valid: the share of images at ± `LEVELS` that the world calls valid.

Each is the less favourable of teacher and student; both are beside it. Collections and images' measures are kept in
bench/results/collections, and a second run goes on where the first stopped. Figures go to
bench/results/calibration.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.evaluate import SETTINGS
from demo.portraits.world import CATEGORICAL, CONTINUOUS

from . import portraits
from .portraits import NODES, RESULTS, SIZE, demo_of, halves, measures

from comfyui_elrond.elrond_core.decompose.pca import fit_pca  # isort: skip
from comfyui_elrond.elrond_core.directions import Directions  # isort: skip
from comfyui_elrond.elrond_core.measure.diversity import points_of_pixels  # isort: skip
from comfyui_elrond.elrond_core.steering.calibration import strength_at  # isort: skip
from comfyui_elrond.elrond_core.storage import format as files  # isort: skip
from comfyui_elrond.nodes import host as adapter  # isort: skip

REALIZATIONS, GRADIENTS, TARGETS = 64, 512, 8
DIRECTIONS = 4
# Calibrated strengths, either way. Images nearer to 0 change less and stay valid more often.
LEVELS = (0.5, 1.0)
# Strengths in token norms between which those of the same mean change are found.
TOKEN_NORMS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
# Seeds of the figures, and the images of each point. Calibrations have seed 0.
SEED, IMAGES = 1, 8
BATCH = 64


def factors(images: torch.Tensor) -> torch.Tensor:
    """Positions of images (N, H, W, 3) in the space of factors, (N, F), each factor within [0, 1].

    Two values of a category lie as far apart as the ends of a continuous factor.
    """
    seen = measures().measure(images.movedim(-1, 1))
    columns = [seen[name].float().clamp(0, 1)[:, None] for name in CONTINUOUS]
    columns += [
        torch.nn.functional.one_hot(seen[name].long(), len(kinds)).float() / 2**0.5
        for name, kinds in CATEGORICAL.items()
    ]
    return torch.cat(columns, 1)


class Bench:
    """One model, its directions and what they do."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        demo = demo_of(name)
        self.model, self.clip, self.vae = demo.model, demo.clip, demo.vae
        self.sampling = (demo.settings.steps, demo.settings.cfg, demo.settings.sampler, demo.settings.scheduler)
        self._kept = folder / f"{name} points.jsonl"
        lines = self._kept.read_text().splitlines() if self._kept.is_file() else []
        self._points: dict[str, Any] = dict(map(json.loads, lines))

    def prompt(self, noun: str) -> Any:
        """A marked conditioning."""
        return NODES["ElrondEncodeConcept"].execute(self.clip, f"a [{noun}]", "", 1).args[0]

    def realizations(self, noun: str) -> Any:
        """A noun's images, as latents."""
        settings = (SIZE, SIZE, REALIZATIONS, BATCH, 0, *self.sampling)
        return NODES["ElrondSampleRealizations"].execute(self.model, self.prompt(noun), *settings).args[0]

    def directions(self, noun: str) -> Directions:
        """A noun's leading principal components."""
        settings = (GRADIENTS, 1.0, BATCH, 0, False)
        collect = NODES["ElrondCollectGradients"].execute
        gradients = collect(
            self.model, self.prompt(noun), self.realizations(noun), *settings, targets_per_realization=TARGETS
        ).args[0]
        return fit_pca(gradients, significance=0, limit=DIRECTIONS)[0]

    def calibrated(self, noun: str, teacher: Bench) -> Directions:
        """The teacher's directions, calibrated by the node's defaults; for the student, with the teacher's images."""
        path = self.folder / f"{self.name} {noun}.safetensors"
        if not path.is_file():
            given = {} if self is teacher else {"realizations": teacher.realizations(noun)}
            steps, cfg, sampler, scheduler = self.sampling
            found = NODES["ElrondCalibrateDirections"].execute(
                model=self.model,
                positive=self.prompt(noun),
                directions=teacher.directions(noun),
                vae=self.vae,
                **_defaults(),
                width=SIZE,
                height=SIZE,
                seed=0,
                steps=steps,
                cfg=cfg,
                sampler_name=sampler,
                scheduler=scheduler,
                batch_size=BATCH,
                **given,
            )
            print(found.args[2], flush=True)
            files.save_directions(found.args[0], path)
        return files.load_directions(path)

    def point(self, noun: str, directions: Directions, index: int, strength: float) -> dict[str, float]:
        """The mean change by a strength in token norms, by pixels and by factors, and the share of valid images."""
        key = f"{noun} {directions.digest(index)} {strength!r}"
        if key not in self._points:
            before = self._images(noun, directions, index, 0.0)
            after = before if strength == 0 else self._images(noun, directions, index, strength)
            self._points[key] = {
                "change": _distance(points_of_pixels(before), points_of_pixels(after)),
                "factors": _distance(factors(before), factors(after)),
                "valid": float(measures().valid(after.movedim(-1, 1)).float().mean()),
            }
            with self._kept.open("a") as file:
                file.write(json.dumps([key, self._points[key]]) + "\n")
        return self._points[key]

    def _images(self, noun: str, directions: Directions, index: int, strength: float) -> torch.Tensor:
        apply = NODES["ElrondApplyDirection"].execute
        steered = apply(self.prompt(noun), directions, index, strength, "token norms", 0.0, 1.0, "").args[0]
        size = adapter.empty_latent(self.model, SIZE, SIZE, IMAGES)
        latents = adapter.sample(self.model, steered, None, size, 0, SEED, *self.sampling)
        return adapter.decode(self.vae, latents).cpu()


def _defaults() -> dict[str, Any]:
    """The node's own defaults, of all but how images are sampled."""
    inputs = NODES["ElrondCalibrateDirections"].define_schema().inputs
    names = ("which", "seeds", "samples", "references", "furthest", "cell", "concept")
    return {entry.id: entry.default for entry in inputs if entry.id in names}


def _distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.double() - second.double()).norm(dim=1).mean())


def variation(values: list[float]) -> float:
    """Coefficient of variation."""
    return float(np.std(values, ddof=1) / np.mean(values))


def measured(bench: Bench, teacher: Bench, nouns: tuple[list[str], list[str]]) -> dict[str, Any]:
    """The figures of one model."""
    sets = {noun: bench.calibrated(noun, teacher) for half in nouns for noun in half}

    def over(half: list[str], strength: Callable[[Directions, int, int], float]) -> list[dict[str, float]]:
        """The points of all directions and signs of some nouns, at a strength that depends on all three."""
        return [
            bench.point(noun, sets[noun], index, strength(sets[noun], index, sign))
            for noun in half
            for index in range(len(sets[noun]))
            for sign in (-1, 1)
        ]

    first, second = nouns
    grid = [np.mean([p["change"] for p in over(first, lambda _, __, sign, s=s: sign * s)]) for s in TOKEN_NORMS]
    rows = []
    for level in LEVELS:

        def strength(directions: Directions, index: int, sign: int, level: float = level) -> float:
            return strength_at(directions.stops[index], sign * level)

        wanted = np.mean([p["change"] for p in over(first, strength)])
        same = float(np.interp(wanted, np.maximum.accumulate(grid), TOKEN_NORMS))
        ours, theirs = over(second, strength), over(second, lambda _, __, sign, same=same: sign * same)
        row: dict[str, Any] = {"calibrated": level, "token_norms": same}
        for key in ("change", "factors"):
            spread = [variation([p[key] for p in points]) for points in (ours, theirs)]
            means = [float(np.mean([p[key] for p in points])) for points in (ours, theirs)]
            row |= {f"{key}_means": means, f"{key}_variations": spread, f"{key}_ratio": spread[0] / spread[1]}
        row["valid"], row["valid_token_norms"] = (float(np.mean([p["valid"] for p in pts])) for pts in (ours, theirs))
        rows.append(row)
        print(bench.name, json.dumps(row), flush=True)
    unsteered = over(second, lambda *_: 0.0)
    return {
        "cv_ratio": float(np.mean([row["change_ratio"] for row in rows])),
        "cv_ratio_by_factors": float(np.mean([row["factors_ratio"] for row in rows])),
        "valid": float(np.mean([row["valid"] for row in rows])),
        "valid_unsteered": float(np.mean([p["valid"] for p in unsteered])),
        "levels": rows,
        "intervals": {noun: sets[noun].intervals for noun in second},
    }


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nouns", type=int, default=0, help="so many of each half only, to see that it runs")
    arguments = parser.parse_args()
    folder = portraits.folder() / "calibration"
    folder.mkdir(exist_ok=True)
    first, second = (half[: arguments.nouns or None] for half in halves())
    with torch.inference_mode():
        benches = {name: Bench(name, folder) for name in SETTINGS}
        of = {name: measured(bench, benches["teacher"], (first, second)) for name, bench in benches.items()}
    figures = {
        "calibration_cv_ratio": max(one["cv_ratio"] for one in of.values()),
        "calibration_cv_ratio_by_factors": max(one["cv_ratio_by_factors"] for one in of.values()),
        "calibration_valid": min(one["valid"] for one in of.values()),
        "weights": portraits.digest(),
        "split": portraits.SPLIT,
        "chosen_on": first,
        "measured_on": second,
        "chosen": "the strengths in token norms that make the same mean change as calibrated ones",
        "images_a_point": IMAGES,
        "models": of,
    }
    print(json.dumps({key: value for key, value in figures.items() if key != "models"}, indent=1))
    if not arguments.nouns:
        (RESULTS / "calibration.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
