"""What a calibrated strength is worth: the same change along every direction, and images that stay valid.

    python -m bench.calibration                    on the portraits, teacher and student
    python -m bench.calibration --world shapes     on the shapes; prints its figures and keeps none

The nouns are split in two halves by `SPLIT`. On the first half, and only there, the strengths in token norms are
chosen that make the same mean change as calibrated ones. The figures are of the second half, for seeds that no
calibration saw:

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
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo import host

# isort: split
import torch

from demo import host_model
from demo.evaluate import CFG, STEPS

PACK = host.pack()
from comfyui_elrond.elrond_core.decompose.pca import fit_pca  # noqa: E402
from comfyui_elrond.elrond_core.directions import Directions  # noqa: E402
from comfyui_elrond.elrond_core.measure.diversity import points_of_pixels  # noqa: E402
from comfyui_elrond.elrond_core.steering.calibration import strength_at  # noqa: E402
from comfyui_elrond.elrond_core.storage import format as files  # noqa: E402
from comfyui_elrond.nodes import host as adapter  # noqa: E402

NODES = {node.define_schema().node_id: node for node in PACK.NODES}
RESULTS = Path(__file__).parent / "results"
# Written down before the first run.
SPLIT = 20
SIZE = 64
REALIZATIONS, GRADIENTS, TARGETS = 64, 512, 8
DIRECTIONS = 4
# Calibrated strengths, either way. Images nearer to 0 change less and stay valid more often.
LEVELS = (0.5, 1.0)
# Strengths in token norms between which those of the same mean change are found.
TOKEN_NORMS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
# Seeds of the figures, and the images of each point. Calibrations have seed 0.
SEED, IMAGES = 1, 8
BATCH = 64


@dataclass(frozen=True)
class World:
    """What the bench asks of a demo's world.

    Attributes:
        nouns: its nouns.
        factors: positions of images (N, H, W, 3) in the space of factors, (N, F), each factor within [0, 1].
        valid: whether each image is of the world, bool (N).
        load: MODEL, CLIP and VAE of its teacher or student.
        weights: the files of their weights.
        sampling: steps, guidance, sampler and scheduler of each.
    """

    nouns: list[str]
    factors: Callable[[torch.Tensor], torch.Tensor]
    valid: Callable[[torch.Tensor], torch.Tensor]
    load: Callable[[str], Any]
    weights: list[Path]
    sampling: dict[str, tuple[int, float, str, str]]


def portraits() -> World:
    """The portraits.

    Raises:
        SystemExit: if their models are not trained yet.
    """
    from demo.host_model import portraits as models
    from demo.portraits import captions, measure, world
    from demo.training.evaluate import SETTINGS

    weights = [models.file_of(name) for name in ("vae", *models.PORTRAIT_MODELS)]
    if not all(path.is_file() for path in weights):
        raise SystemExit("The portraits' models are not trained yet: `python -m demo.train`, or try --world shapes.")
    measures = measure.load()

    def factors(images: torch.Tensor) -> torch.Tensor:
        seen = measures.measure(images.movedim(-1, 1))
        return _positions(seen, world.CONTINUOUS, {name: len(kinds) for name, kinds in world.CATEGORICAL.items()})

    sampling = {name: (s.steps, s.cfg, s.sampler, s.scheduler) for name, s in SETTINGS.items()}
    nouns = list(captions.NOUNS)
    valid = lambda images: measures.valid(images.movedim(-1, 1))  # noqa: E731
    return World(nouns, factors, valid, models.load_portraits, weights, sampling)


def shapes() -> World:
    """The shapes."""
    from demo import captions, world

    def factors(images: torch.Tensor) -> torch.Tensor:
        return _positions(world.measure(images).factors, world.CONTINUOUS, {"shape": len(world.SHAPES)})

    weights = [host_model.WEIGHTS / f"{name}.safetensors" for name in host_model.MODELS]
    sampling = {name: (STEPS[name], CFG[name], "euler", "simple") for name in host_model.MODELS}
    valid = lambda images: world.measure(images).valid  # noqa: E731
    return World(list(captions.NOUNS), factors, valid, host_model.load, weights, sampling)


WORLDS = {"portraits": portraits, "shapes": shapes}


def _positions(seen: dict[str, torch.Tensor], continuous: tuple[str, ...], kinds: dict[str, int]) -> torch.Tensor:
    """Factors as coordinates: two values of a category lie as far apart as the ends of a continuous factor."""
    columns = [seen[name].float().clamp(0, 1)[:, None] for name in continuous]
    columns += [torch.nn.functional.one_hot(seen[name].long(), count).float() / 2**0.5 for name, count in kinds.items()]
    return torch.cat(columns, 1)


def halves(nouns: list[str]) -> tuple[list[str], list[str]]:
    """The half on which choices are made, and the one that figures are of."""
    shuffled = random.Random(SPLIT).sample(sorted(nouns), len(nouns))
    return sorted(shuffled[: len(nouns) // 2]), sorted(shuffled[len(nouns) // 2 :])


class Bench:
    """One model of a world, its directions and what they do."""

    def __init__(self, world: World, name: str, folder: Path) -> None:
        self.world, self.name, self.folder = world, name, folder
        self.model, self.clip, self.vae = world.load(name)
        self.sampling = world.sampling[name]
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
                "factors": _distance(self.world.factors(before), self.world.factors(after)),
                "valid": float(self.world.valid(after).float().mean()),
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
    parser.add_argument("--world", choices=list(WORLDS), default="portraits")
    parser.add_argument("--nouns", type=int, default=0, help="so many of each half only, to see that it runs")
    arguments = parser.parse_args()
    world = WORLDS[arguments.world]()
    weights = hashlib.blake2b(digest_size=6)
    for path in world.weights:
        weights.update(path.read_bytes())
    folder = RESULTS / "collections" / weights.hexdigest() / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    first, second = halves(world.nouns)
    some = slice(arguments.nouns or None)
    with torch.inference_mode():
        benches = {name: Bench(world, name, folder) for name in world.sampling}
        of = {name: measured(bench, benches["teacher"], (first[some], second[some])) for name, bench in benches.items()}
    figures = {
        "calibration_cv_ratio": max(one["cv_ratio"] for one in of.values()),
        "calibration_cv_ratio_by_factors": max(one["cv_ratio_by_factors"] for one in of.values()),
        "calibration_valid": min(one["valid"] for one in of.values()),
        "weights": weights.hexdigest(),
        "split": SPLIT,
        "chosen_on": first[some],
        "measured_on": second[some],
        "chosen": "the strengths in token norms that make the same mean change as calibrated ones",
        "images_a_point": IMAGES,
        "models": of,
    }
    print(json.dumps({key: value for key, value in figures.items() if key != "models"}, indent=1))
    if arguments.world == "portraits" and not arguments.nouns:
        (RESULTS / "calibration.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
