"""Diversity against alignment on the demo's student, as the strength of each method grows.

    python -m bench.diversity               all of it: directions, curves, labels, the picture
    python -m bench.diversity --images 16   the same in little, to see that it runs

Directions are found on each prompt they steer, as published, on the teacher and by the nodes themselves. Every
finished point is kept in bench/results/diversity_points.jsonl, under the digest of both models' weights, and a second
run goes on where the first stopped. Figures go to bench/results/diversity.json, the curves to
docs/pictures/diversity_curves.png.

Every method changes the conditioning of each image at each step and nothing else:

* random: a random direction of the concept's row for each image, of the same lengths as ELROND's.
* uniform: SeedVarianceEnhancer's recipe, uniform noise on a random half of all embedding values, first 20 % of steps.
* cads: noise annealed away over the steps, ĉ = √γ·c + s·√(1 − γ)·n, rescaled to the mean and deviation of c.
* pca, sae: one direction at random for each image, as published.
* natural: response directions, all at once, each in proportion to how far the teacher's images lie along it.
* early: the same on the first two of the four steps only.
* words: as early, along directions between words.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demo import host

# isort: split
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from demo.captions import WORDS, Caption, compose, open_factors
from demo.evaluate import STEPS, Demo
from demo.host_model import WEIGHTS
from demo.measures import alignment, diversity
from demo.world import CONTINUOUS, SHAPES, Measurement, measure

PACK = host.pack()
from comfyui_elrond.elrond_core.decompose.pca import fit_pca  # noqa: E402
from comfyui_elrond.elrond_core.decompose.response import fit_response  # noqa: E402
from comfyui_elrond.elrond_core.decompose.sae_training import train_sae  # noqa: E402
from comfyui_elrond.elrond_core.decompose.words import fit_words  # noqa: E402
from comfyui_elrond.elrond_core.directions import Directions  # noqa: E402
from comfyui_elrond.elrond_core.seeding import generator, normal  # noqa: E402
from comfyui_elrond.elrond_core.steering.draws import change_of, draw_steps  # noqa: E402
from comfyui_elrond.elrond_core.steering.labels import label  # noqa: E402
from comfyui_elrond.elrond_core.storage.format import load_gradients, save_gradients  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "diversity.json"
PICTURE = ROOT / "docs" / "pictures" / "diversity_curves.png"
CONCEPT = "thing"
# The bare prompt, and one for each word.
PROMPTS: list[list[str]] = [[], *([word] for words in WORDS.values() for word in words)]
SEED = 9001
REALIZATIONS, GRADIENTS, TEACHER_STEPS = 128, 1024, 10
BINS = 3
# So many leading directions of each method are labelled.
LABELLED = 7
# Effects of a direction smaller than this share of a factor's range are not called a move.
MOVED = 0.15

Change = Callable[[torch.Tensor, int, float, int], torch.Tensor]
"""From rows (N, 16, 128), the concept's row, the noise level and the index of the first image to changed rows."""


@dataclass
class Method:
    """A way to diversify: its strengths, and the change that one of them makes to a prompt (by number)."""

    strengths: list[float]
    change: Callable[[float, int], Change]


def step_rows(vectors: torch.Tensor, rows: torch.Tensor, at: int) -> torch.Tensor:
    """Rows with (N, d) steps, in token norms, added at the concept."""
    out = rows.clone()
    out[:, at] += vectors * rows[:, at].norm(dim=1, keepdim=True)
    return out


def directed(
    directions: list[Directions], end: float = 0.0, lowest: float = 0.5, **settings: Any
) -> Callable[[float, int], Change]:
    """ELROND: a step for each image along the directions of its prompt, while the noise level is above `end`.

    Strengths are drawn from `lowest` times the given one to the given one.
    """

    def of(strength: float, prompt: int) -> Change:
        found = directions[prompt]

        def change(rows: torch.Tensor, at: int, sigma: float, first: int) -> torch.Tensor:
            if sigma <= end:
                return rows
            draws = draw_steps(found, first + len(rows), SEED, lowest * strength, strength, **settings)[first:]
            steps = torch.stack([change_of(found, draw)[0] for draw in draws])
            if settings.get("method") == "natural":
                # These are in the embedding's units already.
                steps = steps / rows[:, at].norm(dim=1, keepdim=True)
            return step_rows(steps, rows, at)

        return change

    return of


def random_directions(strength: float) -> Change:
    """The control: directions that mean nothing."""

    def change(rows: torch.Tensor, at: int, sigma: float, first: int) -> torch.Tensor:
        indices = list(range(first, first + len(rows)))
        unit = torch.nn.functional.normalize(normal((rows.shape[2],), SEED, "random", indices), dim=1)
        amount = [float(torch.rand(1, generator=generator(SEED, "amount", i))) for i in indices]
        return step_rows(unit * strength * (0.5 + torch.tensor(amount)[:, None] / 2), rows, at)

    return change


def uniform_noise(strength: float) -> Change:
    """SeedVarianceEnhancer: in embedding units, on half of the values, first fifth of the sampling."""

    def change(rows: torch.Tensor, at: int, sigma: float, first: int) -> torch.Tensor:
        if sigma < share_to_sigma(0.2):
            return rows
        shape = rows.shape[1:]
        noise = []
        for i in range(first, first + len(rows)):
            g = generator(SEED, "uniform", i)
            noise.append((2 * torch.rand(shape, generator=g) - 1) * (torch.rand(shape, generator=g) < 0.5))
        return rows + strength * torch.stack(noise)

    return change


def cads(strength: float, low: float = 0.6, high: float = 0.9) -> Change:
    """Condition-annealed noise (2310.17347), at its authors' settings but for the strength."""

    def change(rows: torch.Tensor, at: int, sigma: float, first: int) -> torch.Tensor:
        gamma = min(max((high - sigma) / (high - low), 0.0), 1.0)
        indices = list(range(first, first + len(rows)))
        noise = normal(tuple(rows.shape[1:]), SEED, f"cads {sigma:.4f}", indices)
        mixed = math.sqrt(gamma) * rows + strength * math.sqrt(1 - gamma) * noise
        mean, std = mixed.mean((1, 2), keepdim=True), mixed.std((1, 2), keepdim=True)
        return (mixed - mean) / std * rows.std((1, 2), keepdim=True) + rows.mean((1, 2), keepdim=True)

    return change


def share_to_sigma(share: float, shift: float = 2.0) -> float:
    """The noise level at a share of the demo's sampling, as the host converts a start or end percent."""
    return shift * (1 - share) / (1 + (shift - 1) * (1 - share))


def sample(demo: Demo, words: list[str], count: int, seed: int, change: Change | None) -> torch.Tensor:
    """Images of one prompt, with the conditioning changed at every step."""
    rows = demo.encode(" ".join(["a", *words, CONCEPT])).repeat(count, 1, 1)
    noise = normal((24, 8, 8), seed, "noise", list(range(count)))
    if change is None:
        return demo.sample(rows, seed, noise)
    at = 2 + len(words)
    images = []
    size = 64
    for first in range(0, count, size):

        def wrapper(apply: Any, given: dict[str, Any], first: int = first) -> torch.Tensor:
            context = given["c"]["c_crossattn"]
            # The host splits a batch that memory does not hold, and an image would get another's change.
            assert len(context) == min(size, count - first)
            changed = change(context.float(), at, float(given["timestep"].flatten()[0]), first)
            return apply(given["input"], given["timestep"], **{**given["c"], "c_crossattn": changed.to(context)})

        model = demo.model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        part = slice(first, first + size)
        images.append(replace(demo, model=model).sample(rows[part], seed, noise[part]))
    return torch.cat(images)


def coverage(seen: Measurement, factors: list[str]) -> float:
    """Share of the cells of factor space that valid images fall in, of what as many of the world's own would."""
    cells = np.zeros(int(seen.valid.sum()), dtype=np.int64)
    total = 1
    for name in factors:
        values = seen.factors[name][seen.valid]
        bins = len(SHAPES) if name == "shape" else BINS
        place = values if name == "shape" else (values.clamp(0, 1 - 1e-6) * bins).long()
        cells = cells * bins + place.numpy()
        total *= bins
    return len(np.unique(cells)) / (total * (1 - (1 - 1 / total) ** len(seen.error)))


def point(demo: Demo, images: int, change_of_prompt: Callable[[int], Change] | None) -> dict[str, float]:
    """One point of a curve: all prompts, so many images each, twice as many of the bare one."""
    shares: dict[str, list[float]] = {"diversity": [], "coverage": [], "alignment": [], "validity": []}
    for number, words in enumerate(PROMPTS):
        caption: Caption = compose(CONCEPT, words)
        count = images if words else 2 * images
        change = change_of_prompt(number) if change_of_prompt else None
        seen = measure(sample(demo, words, count, SEED + number, change))
        free = [name for name in open_factors(CONCEPT) if name not in caption.named]
        shares["diversity"].append(diversity(seen, free))
        shares["coverage"].append(coverage(seen, free))
        shares["validity"].append(float(seen.valid.float().mean()))
        if words:
            shares["alignment"].append(alignment([caption] * count, seen))
    return {name: float(np.mean(values)) for name, values in shares.items()}


def discover(teacher: Demo, folder: Path) -> dict[str, list[Directions]]:
    """Directions of the concept in every prompt by each method; gradients are made once and kept in a folder."""
    nodes = {node.define_schema().node_id: node for node in PACK.NODES}
    found: dict[str, list[Directions]] = {"pca": [], "sae": [], "response": [], "words": []}
    tried = [word for some in WORDS.values() for word in some]
    for words in PROMPTS:
        path = folder / f"{' '.join(words) or 'bare'}.safetensors"
        if not path.is_file():
            prompt = " ".join(["a", *words, f"[{CONCEPT}]"])
            with torch.inference_mode():
                positive = nodes["ElrondEncodeConcept"].execute(teacher.clip, prompt, "", 1).args[0]
                drawn = nodes["ElrondSampleRealizations"].execute(
                    teacher.model, positive, 64, 64, REALIZATIONS, 64, 0, TEACHER_STEPS, 1.0, "euler", "simple"
                )
                gradients = nodes["ElrondCollectGradients"].execute(
                    teacher.model, positive, drawn.args[0], GRADIENTS, 1.0, 64, 0, True
                )
            save_gradients(gradients.args[0], path)
        gradients = load_gradients(path)
        found["pca"].append(fit_pca(gradients)[0])
        found["sae"].append(train_sae(gradients).directions)
        found["response"].append(fit_response(gradients)[0])
        at = 2 + len(words)
        moved = [teacher.encode(" ".join(["a", *words, word, CONCEPT]))[0, at + 1 : at + 2] for word in tried]
        bare = teacher.encode(" ".join(["a", *words, CONCEPT]))[0, at : at + 1]
        found["words"].append(fit_words(gradients, tried, bare, torch.stack(moved)))
    return found


def methods(found: dict[str, list[Directions]]) -> dict[str, Method]:
    """All curves."""
    steps = [0.1, 0.2, 0.35, 0.5, 0.75, 1.0]
    parts = [0.1, 0.2, 0.3, 0.45, 0.7, 1.0]
    natural = {"lowest": 1.0, "method": "natural"}
    return {
        "random": Method([*steps[1:], 1.5, 2.0], lambda s, _: random_directions(s)),
        "uniform": Method([0.5, 0.75, 1.0, 1.5, 2.0, 3.0], lambda s, _: uniform_noise(s)),
        "cads": Method([0.025, 0.05, 0.1, 0.15, 0.25, 0.4], lambda s, _: cads(s)),
        "pca": Method(steps, directed(found["pca"])),
        "sae": Method(steps, directed(found["sae"], both_signs=False)),
        "natural": Method(parts, directed(found["response"], **natural)),
        "early": Method([*parts, 1.4], directed(found["response"], end=share_to_sigma(0.3), **natural)),
        "words": Method([*parts, 1.4], directed(found["words"], end=share_to_sigma(0.3), **natural)),
    }


def label_agreement(teacher: Demo, found: dict[str, list[Directions]], images: int) -> dict[str, Any]:
    """How often the word that Label Directions suggests belongs to the factor that the direction moves most.

    Of every method's leading directions of the bare prompt, those that move a factor.
    """
    factor_of = {word: factor for factor, words in WORDS.items() for word in words}
    words = list(factor_of)
    bare = teacher.encode(f"a {CONCEPT}")[0, 2:3]
    moved = torch.stack([teacher.encode(f"a {word} {CONCEPT}")[0, 3:4] for word in words])
    rows = []
    for method, of_prompt in found.items():
        directions = of_prompt[0]
        for index, suggested in enumerate(label(directions, words, bare, moved)[:LABELLED]):
            effect = effects(teacher, directions.vectors[index], images)
            most = max(effect, key=lambda name: effect[name])
            word, score = suggested.best
            rows.append(
                {
                    "method": method,
                    "direction": index,
                    "moves": most if effect[most] >= MOVED else None,
                    "effect": effect,
                    "word": word,
                    "score": score,
                    "factor": factor_of.get(word),
                }
            )
    right = {
        method: [row["moves"] == row["factor"] for row in rows if row["moves"] and row["method"] == method]
        for method in found
    }
    every = [one for some in right.values() for one in some]
    return {
        "agreement": float(np.mean(every)) if every else None,
        "right": {method: [sum(some), len(some)] for method, some in right.items()},
        "directions": rows,
    }


def effects(teacher: Demo, vector: torch.Tensor, images: int) -> dict[str, float]:
    """How far a direction (1, d) moves each factor of the bare prompt's images, from -0.7 to 0.7 token norms."""
    ends = []
    for sign in (-1, 1):
        step = sign * 0.7 * vector

        def change(rows: torch.Tensor, at: int, sigma: float, first: int, step: torch.Tensor = step) -> torch.Tensor:
            return step_rows(step.expand(len(rows), -1), rows, at)

        ends.append(measure(sample(teacher, [], images, SEED, change)))
    effect = {
        name: float((ends[1].factors[name] - ends[0].factors[name]).clamp(-1, 1).mean().abs()) for name in CONTINUOUS
    }
    shares = [torch.bincount(end.factors["shape"], minlength=len(SHAPES)) / images for end in ends]
    effect["shape"] = float((shares[1] - shares[0]).abs().sum() / 2)
    return effect


def summary(curves: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """What the goals are about."""
    student, teacher = curves["student"][0], curves["teacher"][0]
    best = {}
    for name, points in curves.items():
        good = [p["diversity"] for p in points if p["alignment"] >= student["alignment"] - 0.01]
        best[name] = max(good, default=math.nan) / student["diversity"]
    elrond = {name: best[name] for name in ("pca", "sae", "natural", "early", "words")}
    return {
        "best_ratio_at_1pct_loss": max(elrond.values()),
        "best_ratio_at_1pct_loss_of": {k: (v if math.isfinite(v) else None) for k, v in best.items()},
        "teacher_ratio": teacher["diversity"] / student["diversity"],
    }


def draw(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Diversity over alignment; up and to the right is better."""
    figure = Figure(figsize=(10, 5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    colours = ["#777777", "#56B4E9", "#CC79A7", "#E69F00", "#D55E00", "#0072B2", "#009E73", "#000000"]
    for axes, measure_ in zip(figure.subplots(1, 2), ("diversity", "coverage"), strict=True):
        lines = [name for name in curves if name not in ("student", "teacher")]
        for name, colour in zip(lines, colours, strict=True):
            points = [*curves["student"], *curves[name]]
            style = "-o" if name in ("pca", "sae", "natural", "early", "words") else "--o"
            title = {"pca": "ELROND PCA", "sae": "ELROND SAE", "natural": "ELROND natural"}.get(name, name)
            title = {"early": "ELROND natural, first half only", "words": "the same between words"}.get(name, title)
            axes.plot(
                [p["alignment"] for p in points],
                [p[measure_] for p in points],
                style,
                color=colour,
                markersize=3,
                label=title,
            )
        for name, marker in (("student", "s"), ("teacher", "*")):
            spot = curves[name][0]
            axes.plot(spot["alignment"], spot[measure_], marker, color="black", markersize=10, label=name)
        axes.axvline(curves["student"][0]["alignment"] - 0.01, color="black", linewidth=0.5)
        axes.set(xlabel="alignment: share of named attributes right", ylabel=f"{measure_} (1 is the world's own)")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(str(path))


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=48, help="images of each prompt with a word; 2 x of the bare one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    began = time.monotonic()
    weights = hashlib.blake2b(digest_size=6)
    for name in ("teacher", "student"):
        weights.update((WEIGHTS / f"{name}.safetensors").read_bytes())
    version = weights.hexdigest()
    folder = ROOT / "output" / "bench" / version
    folder.mkdir(parents=True, exist_ok=True)
    student, teacher = Demo.load("student"), Demo.load("teacher")
    found = discover(teacher, folder)
    points_file = arguments.out.with_name(arguments.out.stem + "_points.jsonl")
    lines = points_file.read_text().splitlines() if points_file.is_file() else []
    done: dict[str, Any] = dict(map(json.loads, lines))

    def once(key: str, work: Callable[[], Any]) -> Any:
        key = f"{version} {arguments.images} {key}"
        if key not in done:
            done[key] = work()
            with points_file.open("a") as file:
                file.write(json.dumps([key, done[key]]) + "\n")
        return done[key]

    curves: dict[str, list[dict[str, float]]] = {
        "student": [once("student", lambda: point(student, arguments.images, None))],
        "teacher": [once("teacher", lambda: point(teacher, arguments.images, None))],
    }
    for name, method in methods(found).items():
        curves[name] = []
        for strength in method.strengths:
            change = functools.partial(method.change, strength)
            seen = once(f"{name} {strength}", lambda change=change: point(student, arguments.images, change))
            curves[name].append({"strength": strength, **seen})
            print(name, strength, " ".join(f"{k} {v:.3f}" for k, v in seen.items()), flush=True)
    labels = once("labels", lambda: label_agreement(teacher, found, arguments.images))
    figures = {
        "images_a_point": arguments.images * (len(PROMPTS) + 1),
        "prompts": len(PROMPTS),
        "steps": STEPS,
        "weights": version,
        **summary(curves),
        "label_agreement": labels["agreement"],
        "label_agreement_of": labels["right"],
        "labels": labels,
        "methods": curves,
        "seconds": time.monotonic() - began,
    }
    arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    draw(curves, PICTURE if arguments.out == RESULTS else arguments.out.with_suffix(".png"))
    print(json.dumps({k: v for k, v in figures.items() if k not in ("methods", "labels")}, indent=1))


if __name__ == "__main__":
    main()
