"""Diversity against alignment on the portraits' student, as the strength of each method grows.

    python -m bench.diversity               all of it, about an hour on two cores
    python -m bench.diversity --images 8    the same in little, to see that it runs

Directions are found for each prompt on the teacher, by the nodes themselves. Of every method and strength:

* diversity: over the factors that a prompt leaves open, as a share of the teacher's;
* eight: the share of a factor's values that eight images show, as a share of what eight true pictures show;
* alignment: the share of what the prompt names that shows;
* validity: the share of images that are portraits of the world.

For each method the strength is chosen on the first half of the concepts: the most diverse one that loses at most
`LOSS` of the student's alignment. The figures are of the second half at that strength. Every finished point is kept in
bench/results/collections under the digest of the weights, and a second run goes on where the first stopped. Figures go
to bench/results/diversity.json, the curves of the second half to docs/pictures/diversity_curves.png.

What each method changes, image by image:

* pca, sae: one direction of the concept at random, as published (ELROND, arXiv 2602.10216).
* natural: response directions, all at once, each in proportion to how far the teacher's images lie along it.
* early: the same on the first two of the four steps only; first: on the first only.
* words: the same along told opposites, as Fit Word Directions finds them.
* random: a random direction of the concept's row, drawn as PCA's.
* uniform: SeedVarianceEnhancer's recipe, uniform noise on a random half of all embedding values, first fifth of steps.
* rows: noise on every row of the prompt, whose norm is kept (the variation node proposed for ComfyUI's core).
* cads: noise annealed away over the steps, rescaled to the mean and deviation of the rows (arXiv 2310.17347).
* stride: pink noise on the features of a middle block, along their leading components (arXiv 2605.11494).
* dave: the mean over places of an early block's features, attenuated (arXiv 2606.06813).
* first_step: the teacher takes the first step (Diversity Distillation, arXiv 2503.10637). It needs the teacher, so it
  bounds what can be had.
* early_group: both early and group.
* group: of several times as many seeds, those whose first estimates lie furthest apart (arXiv 2508.15773).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from demo.evaluate import Demo
from demo.host_model import LATENT_CHANNELS
from demo.measures import aligned, diversity, open_of, placed
from demo.portraits.captions import OPEN
from demo.portraits.world import Factors

from . import portraits
from .directions import OPPOSITES
from .portraits import NODES, RESULTS, collection, demo_of, halves, measures, place_of

from comfyui_elrond.elrond_core.decompose.pca import fit_pca  # isort: skip
from comfyui_elrond.elrond_core.decompose.response import fit_response  # isort: skip
from comfyui_elrond.elrond_core.decompose.sae_training import train_sae  # isort: skip
from comfyui_elrond.elrond_core.directions import Directions  # isort: skip
from comfyui_elrond.elrond_core.errors import ElrondError  # isort: skip
from comfyui_elrond.elrond_core.seeding import generator, normal  # isort: skip
from comfyui_elrond.elrond_core.steering.draws import change_of, draw_steps  # isort: skip

FIGURES = RESULTS / "diversity.json"
PICTURE = RESULTS.parents[1] / "docs" / "pictures" / "diversity_curves.png"
# Concepts of so many open factors, each bare and with one thing named.
SEVERAL = 5
PROMPTS = ("a [{}]", "a [{}] on a dark blue wall", "a [{}] on the left")
SEED, REALIZATIONS, GRADIENTS = 9001, 96, 768
# The loss of alignment at which methods are compared.
LOSS = 0.01
EIGHT, BINS = 8, 4
# The UNet's block whose features STRIDE and DAVE change, by their authors' choice of an early or middle one.
EARLY, MIDDLE = "input_blocks.1", "middle_block"

Change = Callable[[torch.Tensor, int, float, int], torch.Tensor]
"""From rows (N, 48, 128), the concept's row, the noise level and the index of the first image to changed rows."""


@dataclass
class Way:
    """How one strength of a method samples a prompt's images.

    Attributes:
        rows: changes the conditioning at each step, or None.
        features: block and change of its features, at each step, or None.
        first: the model of the first step, where that is another.
        seeds: so many times as many seeds are started, and the most different ones finished.
    """

    rows: Change | None = None
    features: tuple[str, Callable[[torch.Tensor, float, int], torch.Tensor]] | None = None
    first: Demo | None = None
    seeds: int = 1


def step_rows(vectors: torch.Tensor, rows: torch.Tensor, at: int) -> torch.Tensor:
    """Rows with (N, d) steps, in token norms, added at the concept."""
    out = rows.clone()
    out[:, at] += vectors * rows[:, at].norm(dim=1, keepdim=True)
    return out


def directed(found: Directions, strength: float, end: float = 0.0, lowest: float = 0.5, **settings: Any) -> Change:
    """ELROND: a step for each image along directions, while the noise level is above `end`.

    Strengths are drawn from `lowest` times the given one to the given one.
    """

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


def random_directions(strength: float) -> Change:
    """The control: directions that mean nothing."""

    def change(rows: torch.Tensor, at: int, sigma: float, first: int) -> torch.Tensor:
        indices = list(range(first, first + len(rows)))
        unit = torch.nn.functional.normalize(normal((rows.shape[2],), SEED, "random", indices), dim=1)
        amount = [float(torch.rand(1, generator=generator(SEED, "amount", i))) for i in indices]
        return step_rows(unit * strength * (0.5 + torch.tensor(amount)[:, None] / 2), rows, at)

    return change


def uniform_noise(strength: float) -> Change:
    """In embedding units, on half of the values, in the first fifth of the sampling."""

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


def noisy_rows(strength: float) -> Change:
    """Noise on each row, as a share of its norm, which is kept."""

    def change(rows: torch.Tensor, at: int, sigma: float, first: int) -> torch.Tensor:
        noise = normal(tuple(rows.shape[1:]), SEED, "rows", list(range(first, first + len(rows))))
        norms = rows.norm(dim=2, keepdim=True)
        moved = rows + strength * norms * noise / math.sqrt(rows.shape[2])
        return moved * norms / moved.norm(dim=2, keepdim=True).clamp_min(1e-9)

    return change


def cads(strength: float, low: float = 0.6, high: float = 0.9) -> Change:
    """At its authors' settings but for the strength."""

    def change(rows: torch.Tensor, at: int, sigma: float, first: int) -> torch.Tensor:
        gamma = min(max((high - sigma) / (high - low), 0.0), 1.0)
        indices = list(range(first, first + len(rows)))
        noise = normal(tuple(rows.shape[1:]), SEED, f"cads {sigma:.4f}", indices)
        mixed = math.sqrt(gamma) * rows + strength * math.sqrt(1 - gamma) * noise
        mean, std = mixed.mean((1, 2), keepdim=True), mixed.std((1, 2), keepdim=True)
        return (mixed - mean) / std * rows.std((1, 2), keepdim=True) + rows.mean((1, 2), keepdim=True)

    return change


def stride(strength: float) -> Callable[[torch.Tensor, float, int], torch.Tensor]:
    """Pink noise over the places, projected on each image's leading components, in the first step."""

    def change(features: torch.Tensor, sigma: float, first: int) -> torch.Tensor:
        if sigma < share_to_sigma(0.2):
            return features
        count, channels, height, width = features.shape
        noise = normal((channels, height, width), SEED, "stride", list(range(first, first + count)))
        frequency = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width) ** 2).sqrt()
        pink = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency.clamp_min(1 / height), s=(height, width))
        flat = features.flatten(2).transpose(1, 2).float()
        centred = flat - flat.mean(1, keepdim=True)
        basis = torch.linalg.svd(centred, full_matrices=False).Vh[:, : max(1, height * width // 4)]
        along = pink.flatten(2).transpose(1, 2) @ basis.mT @ basis
        along = along * centred.std((1, 2), keepdim=True) / along.std((1, 2), keepdim=True)
        return features + (strength * along).transpose(1, 2).reshape(features.shape).to(features)

    return change


def dave(strength: float) -> Callable[[torch.Tensor, float, int], torch.Tensor]:
    """The mean over places, attenuated in the first step."""

    def change(features: torch.Tensor, sigma: float, first: int) -> torch.Tensor:
        return features if sigma < share_to_sigma(0.2) else features - strength * features.mean((2, 3), keepdim=True)

    return change


def share_to_sigma(share: float, shift: float = 2.0) -> float:
    """The noise level at a share of the demo's sampling, as the host converts a start or end percent."""
    return shift * (1 - share) / (1 + (shift - 1) * (1 - share))


def apart(estimates: torch.Tensor, count: int) -> list[int]:
    """Greedily the images whose first estimates lie furthest from those taken before."""
    flat = estimates.flatten(1)
    distances = torch.cdist(flat, flat)
    taken = [0]
    while len(taken) < count:
        nearest = distances[:, taken].amin(1)
        nearest[taken] = -1
        taken.append(int(nearest.argmax()))
    return taken


def images_of(demo: Demo, prompt: str, count: int, seed: int, way: Way) -> torch.Tensor:
    """Pictures (count, 3, 64, 64) of one prompt."""
    text = prompt.translate(str.maketrans("", "", "[]"))
    noise = normal((LATENT_CHANNELS, 8, 8), seed, "noise", list(range(count * way.seeds)))
    rows, at = demo.encode(text), place_of(demo, prompt)
    if way.seeds > 1:
        sigma = torch.ones(1)
        with torch.inference_mode():
            unet = demo.model.model.diffusion_model
            velocity = torch.cat(
                [
                    unet(part, 1000 * sigma.expand(len(part)), context=rows.expand(len(part), -1, -1))
                    for part in noise.split(64)
                ]
            )
        # In groups, so that a group's images differ from each other.
        estimates = noise - velocity
        size = EIGHT * way.seeds
        noise = torch.cat([n[apart(e, EIGHT)] for n, e in zip(noise.split(size), estimates.split(size), strict=True)])
    made = []
    for first in range(0, count, 64):
        part = noise[first : first + 64]
        made.append(_sampled(demo, rows.repeat(len(part), 1, 1), part, at, first, seed, way))
    return demo.decode(torch.cat(made))


def _sampled(
    demo: Demo, rows: torch.Tensor, noise: torch.Tensor, at: int, first: int, seed: int, way: Way
) -> torch.Tensor:
    model = demo.model.clone()
    level = [0.0]

    def wrapper(apply: Any, given: dict[str, Any]) -> torch.Tensor:
        level[0] = float(given["timestep"].flatten()[0])
        context = given["c"]["c_crossattn"]
        # The host splits a batch that memory does not hold, and an image would get another's change.
        assert len(context) == len(rows)
        if way.rows is not None:
            context = way.rows(context.float(), at, level[0], first).to(context)
        if way.first is not None and level[0] > share_to_sigma(0.2):
            unet = way.first.model.model.diffusion_model
            return given["input"] - level[0] * unet(given["input"], given["timestep"] * 1000, context=context)
        return apply(given["input"], given["timestep"], **{**given["c"], "c_crossattn": context})

    model.set_model_unet_function_wrapper(wrapper)
    hook = None
    if way.features is not None:
        block, change = way.features
        # The host calls a block's layers one by one, and not the block.
        module = demo.model.model.diffusion_model.get_submodule(block)[-1]
        hook = module.register_forward_hook(lambda _, __, out: change(out, level[0], first))
    try:
        return replace(demo, model=model).latents(rows, seed, noise)
    finally:
        if hook is not None:
            hook.remove()


def shown_by_eight(text: str, read: Factors) -> float:
    """The share of an open factor's values (continuous ones in `BINS` parts) that eight images show.

    Divided by what eight true pictures show on average.
    """
    shares = []
    for factor, allowed in open_of(text).items():
        where = placed(allowed, read[factor])
        kinds = len(allowed) if isinstance(allowed, frozenset) else BINS
        cells = where if isinstance(allowed, frozenset) else (where * BINS).long().clamp(0, BINS - 1)
        groups = cells[: len(cells) // EIGHT * EIGHT].reshape(-1, EIGHT)
        shown = [len(set(group.tolist()) - {-1}) for group in groups]
        shares.append(float(np.mean(shown)) / (kinds * (1 - (1 - 1 / kinds) ** EIGHT)))
    return float(np.mean(shares))


def point(name: str, nouns: list[str], images: int, way_of: Callable[[str], Way]) -> dict[str, float]:
    """One point of a curve: all prompts of some nouns, so many images each."""
    found: dict[str, list[float]] = {"diversity": [], "eight": [], "alignment": [], "validity": []}
    for noun in nouns:
        for number, template in enumerate(PROMPTS):
            prompt = template.format(noun)
            text = prompt.translate(str.maketrans("", "", "[]"))
            pixels = images_of(demo_of(name), prompt, images, SEED + number, way_of(prompt))
            read = measures().measure(pixels)
            found["diversity"].append(diversity(text, read))
            found["eight"].append(shown_by_eight(text, read))
            found["alignment"].append(aligned([text] * images, read))
            found["validity"].append(float(measures().valid(pixels).float().mean()))
    return {key: float(np.mean(values)) for key, values in found.items()}


@functools.cache
def directions_of(prompt: str, method: str) -> Directions:
    """A prompt's directions on the teacher."""
    gradients = collection("teacher", prompt, REALIZATIONS, GRADIENTS)
    if method == "sae":
        return train_sae(gradients).directions
    if method == "words":
        fit = NODES["ElrondFitWords"].execute
        return fit(gradients, demo_of("teacher").clip, words=OPPOSITES, significance=1.0, most=16, pairs="told").args[0]
    return fit_pca(gradients)[0] if method == "pca" else fit_response(gradients)[0]


def along_words(strength: float, prompt: str) -> Way:
    """Natural steps between told opposites; none where the prompt's images vary along none of them."""
    try:
        found = directions_of(prompt, "words")
    except ElrondError:
        return Way()
    return Way(directed(found, strength, lowest=1.0, method="natural"))


# For each method its strengths, and how one of them samples a prompt.
_HALF, _FIRST = share_to_sigma(0.3), share_to_sigma(0.05)
METHODS: dict[str, tuple[list[float], Callable[[float, str], Way]]] = {
    "pca": ([0.3, 0.6, 0.9, 1.3], lambda s, p: Way(directed(directions_of(p, "pca"), s))),
    "sae": ([0.4, 0.8, 1.2], lambda s, p: Way(directed(directions_of(p, "sae"), s, both_signs=False))),
    "natural": (
        [0.1, 0.2, 0.35, 0.6, 1.0],
        lambda s, p: Way(directed(directions_of(p, "response"), s, lowest=1.0, method="natural")),
    ),
    "early": (
        [0.1, 0.2, 0.35, 0.45, 0.6, 1.0],
        lambda s, p: Way(directed(directions_of(p, "response"), s, _HALF, lowest=1.0, method="natural")),
    ),
    "first": (
        [0.35, 0.6, 1.0, 1.5],
        lambda s, p: Way(directed(directions_of(p, "response"), s, _FIRST, lowest=1.0, method="natural")),
    ),
    "words": ([0.1, 0.2, 0.35, 0.6, 1.0], along_words),
    "early_group": (
        [0.2, 0.35, 0.45],
        lambda s, p: Way(directed(directions_of(p, "response"), s, _HALF, lowest=1.0, method="natural"), seeds=4),
    ),
    "random": ([0.6, 1.2, 2.0], lambda s, _: Way(random_directions(s))),
    "uniform": ([0.5, 1.0, 2.0], lambda s, _: Way(uniform_noise(s))),
    "rows": ([0.2, 0.4, 0.8], lambda s, _: Way(noisy_rows(s))),
    "cads": ([0.05, 0.1, 0.2, 0.4], lambda s, _: Way(cads(s))),
    "stride": ([0.25, 0.5, 1.0], lambda s, _: Way(features=(MIDDLE, stride(s)))),
    "dave": ([0.25, 0.5, 1.0], lambda s, _: Way(features=(EARLY, dave(s)))),
    "group": ([4], lambda s, _: Way(seeds=int(s))),
    "first_step": ([1.0], lambda s, _: Way(first=demo_of("teacher"))),
}
OURS = ("pca", "sae", "natural", "early", "first", "words", "early_group")


def summary(curves: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Each method at the strength, and ours at the method, that the first half chooses, on the second half."""
    first, second = curves["first"], curves["second"]
    least = first["student"][0]["alignment"] - LOSS
    student, teacher = second["student"][0], second["teacher"][0]
    of: dict[str, Any] = {}
    chosen: dict[str, float] = {}
    for method in METHODS:
        good = [i for i, p in enumerate(first[method]) if p["alignment"] >= least]
        if not good:
            of[method] = None
            continue
        place = max(good, key=lambda i: first[method][i]["diversity"])
        seen = second[method][place]
        of[method] = {
            "strength": seen["strength"],
            "share_of_teacher": seen["diversity"] / teacher["diversity"],
            "eight_of_teacher": seen["eight"] / teacher["eight"],
            "alignment_loss": student["alignment"] - seen["alignment"],
            "validity_loss": student["validity"] - seen["validity"],
        }
        chosen[method] = first[method][place]["diversity"]
    best = max((method for method in OURS if method in chosen), key=chosen.__getitem__, default=None)
    return {
        "best": best,
        "diversity_share_of_teacher_at_1pct": of[best]["share_of_teacher"] if best else None,
        "validity_loss": of[best]["validity_loss"] if best else None,
        "student_share_of_teacher": student["diversity"] / teacher["diversity"],
        "methods": of,
    }


def draw(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Diversity over alignment and over validity; up and to the right is better."""
    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    teacher = curves["teacher"][0]
    for axes, across in zip(figure.subplots(1, 2), ("alignment", "validity"), strict=True):
        for name in METHODS:
            points = [*curves["student"], *curves[name]]
            ours = name in OURS
            axes.plot(
                [p[across] for p in points],
                [p["diversity"] / teacher["diversity"] for p in points],
                "-o" if ours else "--o",
                markersize=3,
                label=f"ELROND {name}" if ours else name,
            )
        for name, marker in (("student", "s"), ("teacher", "*")):
            spot = curves[name][0]
            share = spot["diversity"] / teacher["diversity"]
            axes.plot(spot[across], share, marker, color="black", markersize=10, label=name)
        axes.set(xlabel=across, ylabel="diversity, as a share of the teacher's")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(str(path))


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=24, help="images of each prompt")
    parser.add_argument("--few", type=int, default=0, help="so many concepts of each half only")
    parser.add_argument("--half", choices=("first", "second"), help="points of one half only, for two at once")
    arguments = parser.parse_args()
    began = time.monotonic()
    several = [noun for noun in portraits.CONCEPTS if len(OPEN[noun]) >= SEVERAL]
    parts = [half[: arguments.few or None] for half in halves(several)]
    of_half = dict(zip(("first", "second"), parts, strict=True))
    kept = portraits.folder() / "diversity.jsonl"
    done: dict[str, Any] = dict(map(json.loads, kept.read_text().splitlines())) if kept.is_file() else {}

    def once(half: str, method: str, model: str, way_of: Callable[[str], Way], **more: float) -> dict[str, float]:
        key = f"{arguments.images} {arguments.few} {half} {method} {more}"
        if key not in done:
            done[key] = {**more, **point(model, of_half[half], arguments.images, way_of)}
            with kept.open("a") as file:
                file.write(json.dumps([key, done[key]]) + "\n")
            print(half, method, " ".join(f"{k} {v:.3f}" for k, v in done[key].items()), flush=True)
        return done[key]

    curves: dict[str, dict[str, list[dict[str, float]]]] = {}
    for half in [arguments.half] if arguments.half else of_half:
        curves[half] = {name: [once(half, name, name, lambda _: Way())] for name in ("student", "teacher")}
        for method, (strengths, way) in METHODS.items():
            curves[half][method] = [
                once(half, method, "student", functools.partial(way, s), strength=float(s)) for s in strengths
            ]
    if arguments.half:
        return
    figures = {
        **summary(curves),
        "images_a_prompt": arguments.images,
        "prompts": list(PROMPTS),
        "weights": portraits.digest(),
        "split": portraits.SPLIT,
        "chosen_on": of_half["first"],
        "measured_on": of_half["second"],
        "chosen": f"each method's strength: the most diverse that loses at most {LOSS} of the student's alignment",
        "curves": curves,
        "seconds": time.monotonic() - began,
    }
    print(json.dumps({k: v for k, v in figures.items() if k != "curves"}, indent=1))
    if not arguments.few:
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        draw(curves["second"], PICTURE)


if __name__ == "__main__":
    main()
