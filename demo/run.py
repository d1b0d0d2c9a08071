"""The demo: starts ComfyUI, runs the shipped workflows on the shipped model, measures and draws what they do.

Run by `python dev.py demo`. Everything goes through the server, as a person's graphs do; the world's own `measure`
reads the factors of what comes back. Figures go to `output/demo/summary.json`, pictures beside it.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr

from elrond_core.storage.format import load_directions

from .measures import aligned, diversity
from .pictures import complexity_chart, sheet
from .portraits import measure
from .portraits.captions import OPEN
from .portraits.world import CATEGORICAL, CONTINUOUS, FACTORS, Factors
from .server import Server, ServerError, progress_bar

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "output" / "demo"
CONCEPT = "person"
# As far as directions normalised by the response need on average for a change as large as PCA's at 0.8.
STRENGTHS = [-2.0, -1.0, 0.0, 1.0, 2.0]
# The leading directions that are swept: as many as Direction Sweep shows.
LEADING = 8
SEEDS = 16
SEED = 7001
# Directions that the workflow `discover` saves: normalised by the response, and labelled.
FILE = "demo person"
STEPS = {"teacher": 20, "student": 4}
# One prompt with nothing named, and others that name one thing each.
PROMPTS = [
    "a [person]",
    "a smiling [person]",
    "a bearded [person]",
    "a [person] with long hair",
    "a [person] with glasses",
    "a [person] in a red shirt",
    "a [person] on a dark blue wall",
]
IMAGES = 64
# One noun for each number of open factors, the first of its kind in the list of nouns.
CONCEPTS = {len(factors): noun for noun, factors in reversed(OPEN.items())}


class Demo:
    """The running server, and the few graphs that the measurements vary."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.show = progress_bar(sys.stdout)

    def run(self, graph: dict[str, Any]) -> dict[str, Any]:
        """Run a graph with a progress bar."""
        return self.server.run(graph, self.show)

    def images(self, outputs: dict[str, Any], node: str) -> torch.Tensor:
        """The images a node saved, float32 (N, H, W, 3)."""
        files = [self.server.view(image) for image in outputs[node]["images"]]
        pictures = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float32) / 255 for data in files]
        return torch.from_numpy(np.stack(pictures))

    def sample(self, model: str, prompts: Sequence[tuple[str, dict[str, Any] | None]], count: int, seed: int) -> list:
        """Images of several prompts, each with a steering node's inputs or None, in one graph."""
        graph: dict[str, Any] = {
            "model": _node("ElrondLoadDemoModel", name=model),
            "empty": _node("CLIPTextEncode", clip=["model", 1], text=""),
            "latent": _node("EmptyLatentImage", width=64, height=64, batch_size=count),
        }
        for i, (prompt, steering) in enumerate(prompts):
            graph[f"encode{i}"] = _node(
                "ElrondEncodeConcept", clip=["model", 1], prompt=prompt, concept="", occurrence=1
            )
            positive = [f"encode{i}", 0]
            if steering:
                inputs = {**steering, "conditioning": positive, "directions": [f"load{i}", 0]}
                graph[f"load{i}"] = _node("ElrondLoadDirections", name=inputs.pop("file"))
                graph[f"steer{i}"] = {"class_type": inputs.pop("class_type"), "inputs": inputs}
                positive = [f"steer{i}", 0]
            graph[f"sample{i}"] = _node(
                "KSampler",
                model=["model", 0],
                positive=positive,
                negative=["empty", 0],
                latent_image=["latent", 0],
                seed=seed,
                steps=STEPS[model],
                cfg=1.0,
                sampler_name="euler",
                scheduler="simple",
                denoise=1.0,
            )
            graph[f"decode{i}"] = _node("VAEDecode", samples=[f"sample{i}", 0], vae=["model", 2])
            graph[f"save{i}"] = _node("PreviewImage", images=[f"decode{i}", 0])
        outputs = self.run(graph)
        return [self.images(outputs, f"save{i}") for i in range(len(prompts))]


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def workflow(name: str) -> dict[str, Any]:
    """A shipped workflow in the API format."""
    return json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))


def only(graph: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The inputs of a graph's nodes of one class."""
    return [node["inputs"] for node in graph.values() if node["class_type"] == kind]


def _apply(index: int, strength: float) -> dict[str, Any]:
    return {
        "class_type": "ElrondApplyDirection",
        "file": FILE,
        "index": index,
        "strength": strength,
        "strengths": "",
        "unit": "token norms",
        "start": 0.0,
        "end": 1.0,
        "concept": "",
    }


def read(measures: measure.Measures, images: torch.Tensor) -> Factors:
    """The factors of images (N, H, W, 3)."""
    return measures.measure(images.movedim(-1, 1))


def valid(measures: measure.Measures, images: torch.Tensor) -> float:
    """The share of images (N, H, W, 3) that are portraits of the world."""
    return float(measures.valid(images.movedim(-1, 1)).float().mean())


def effects(factors: Factors) -> dict[str, float]:
    """How far each factor moves from the first to the last strength, within a seed, between 0 and 1.

    Args:
        factors: by name (strengths, seeds).

    Returns:
        for a continuous factor the mean distance, in its own range; for a categorical one the share of seeds in which
        its value changes.
    """
    moved = {name: float((factors[name][-1] - factors[name][0]).abs().mean()) for name in CONTINUOUS}
    return moved | {name: float((factors[name][-1] != factors[name][0]).float().mean()) for name in CATEGORICAL}


def common(factor: str, values: torch.Tensor) -> str:
    """The name of a categorical factor's most frequent value."""
    return CATEGORICAL[factor][int(values.mode().values)]


def sweep(
    demo: Demo, measures: measure.Measures, names: Sequence[str]
) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """What each of some named directions moves on the teacher.

    Returns:
        for each direction `moved` as `effects`; `rho`, the rank correlation of strength and continuous factor within
        each seed, averaged over seeds; `ends`, the most frequent value of each categorical factor at both ends; the
        share of `valid` images. And the first seed's images along each direction.
    """
    table, strips = [], []
    for index, title in enumerate(names):
        prompts = [(f"a [{CONCEPT}]", _apply(index, strength)) for strength in STRENGTHS]
        images = torch.stack(demo.sample("teacher", prompts, SEEDS, SEED))
        strips.append(images[:, 0])
        seen = read(measures, images.flatten(0, 1))
        along = {name: seen[name].reshape(len(STRENGTHS), SEEDS) for name in FACTORS}
        ranks = {
            name: [float(np.nan_to_num(spearmanr(STRENGTHS, along[name][:, i]).statistic)) for i in range(SEEDS)]
            for name in CONTINUOUS
        }
        table.append(
            {
                "direction": index,
                "name": title,
                "moved": effects(along),
                "rho": {name: float(np.mean(values)) for name, values in ranks.items()},
                "ends": {name: [common(name, along[name][0]), common(name, along[name][-1])] for name in CATEGORICAL},
                "valid": valid(measures, images.flatten(0, 1)),
            }
        )
    return table, strips


def main_factors(row: dict[str, Any], count: int = 2) -> list[str]:
    """What a direction moves most, in words: "mouth 94 % (frown → smile)", "skin 0.41"."""
    largest = sorted(row["moved"], key=lambda name: -row["moved"][name])[:count]
    said = []
    for name in largest:
        if name in CONTINUOUS:
            said.append(f"{name} {row['moved'][name]:.2f}")
        else:
            first, last = row["ends"][name]
            ends = f" ({first} → {last})" if first != last else ""
            said.append(f"{name} {100 * row['moved'][name]:.0f} %{ends}")
    return said


def compare_diversity(
    demo: Demo, measures: measure.Measures, steering: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Diversity over what nobody named, alignment with what a prompt names, and valid images of three ways to sample.

    Args:
        demo: the server.
        measures: reads the images.
        steering: inputs of Diversify, with the `file` of its directions.
    """
    texts = [prompt.translate(str.maketrans("", "", "[]")) for prompt in PROMPTS]
    none: list[dict[str, Any] | None] = [None] * len(PROMPTS)
    steered: list[dict[str, Any] | None] = [{**steering, "count": IMAGES, "seed": i} for i in range(len(PROMPTS))]
    ways = {"teacher": ("teacher", none), "student": ("student", none), "student_steered": ("student", steered)}
    figures: dict[str, Any] = {}
    bare = {}
    for name, (model, given) in ways.items():
        batches = demo.sample(model, list(zip(PROMPTS, given, strict=True)), IMAGES, SEED)
        seen = [read(measures, images) for images in batches]
        figures[name] = {
            "diversity": float(np.mean([diversity(text, s) for text, s in zip(texts, seen, strict=True)])),
            "alignment": float(np.mean([aligned([t] * IMAGES, s) for t, s in zip(texts[1:], seen[1:], strict=True)])),
            "valid": float(np.mean([valid(measures, images) for images in batches])),
        }
        bare[name] = batches[0]
    return figures, bare


def complexity(demo: Demo) -> list[dict[str, Any]]:
    """Estimated dimensions of `CONCEPTS` beside the true number of their open factors."""
    graph = workflow("complexity")
    pairs = [node for node, part in graph.items() if part["class_type"] == "ElrondEncodeConcept"]
    rows = []
    nouns = [CONCEPTS[count] for count in sorted(CONCEPTS)]
    for start in range(0, len(nouns), len(pairs)):
        some = nouns[start : start + len(pairs)]
        wanted = copy.deepcopy(graph)
        for node, noun in zip(pairs, some + some[:1] * (len(pairs) - len(some)), strict=True):
            wanted[node]["inputs"]["prompt"] = f"a [{noun}]"
        outputs = demo.run(wanted)
        for node, noun in zip(pairs, some, strict=False):
            rows.append({"concept": noun, "true": len(OPEN[noun]), "estimate": _dimension(wanted, outputs, node)})
    return rows


def _dimension(graph: dict[str, Any], outputs: dict[str, Any], encode: str) -> float:
    """The number that the PreviewAny after a concept's EstimateLID shows."""

    def after(source: str, kind: str) -> str:
        return next(
            node
            for node, part in graph.items()
            if part["class_type"] == kind and any(value == [source, 0] for value in part["inputs"].values())
        )

    realizations = after(encode, "ElrondSampleRealizations")
    gradients = after(realizations, "ElrondCollectGradients")
    return float(outputs[after(after(gradients, "ElrondEstimateLID"), "PreviewAny")]["text"][0])


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where pictures and the summary go")
    arguments = parser.parse_args()
    began = time.monotonic()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    measures = measure.load()
    with Server(output) as server:
        demo = Demo(server)
        print("1/4 discover: realizations, gradients, directions")
        graph = workflow("discover")
        outputs = demo.run(graph)
        saved = next(node for node, part in graph.items() if part["class_type"] == "SaveImage")
        realizations = demo.images(outputs, saved)
        sheet(output / "realizations.png", [("a [person]\nteacher", realizations[:8]), ("", realizations[8:16])])

        print("2/4 steer: what each direction moves")
        demo.run(workflow("steer"))
        found = load_directions(output / "elrond" / "directions" / f"{FILE}.safetensors")
        names = [name or f"direction {k}" for k, name in enumerate(found.names[:LEADING])]
        table, strips = sweep(demo, measures, names)
        rows = [("\n".join([row["name"], *main_factors(row)]), strip) for row, strip in zip(table, strips, strict=True)]
        sheet(output / "directions.png", rows, [f"{s:+g}" for s in STRENGTHS], "strength, in token norms")

        print("3/4 diversify: the distilled student")
        graph = workflow("diversify")
        demo.run(graph)
        (steering,) = ({**node, "class_type": "ElrondDiversify"} for node in only(graph, "ElrondDiversify"))
        (loaded,) = only(graph, "ElrondLoadDirections")
        spread, bare = compare_diversity(demo, measures, {**steering, "file": loaded["name"]})
        titles = {"teacher": "teacher", "student": "student", "student_steered": "student,\ndiversified"}
        rows = []
        for name, title in titles.items():
            rows += [(title, bare[name][:8]), ("", bare[name][8:16])]
        sheet(output / "diversity.png", rows)

        print("4/4 dimension: in how many ways each concept can vary")
        dimensions = complexity(demo)
        complexity_chart(output / "complexity.png", dimensions)
        memory = server.peak_memory()

    summary = {
        "seconds": time.monotonic() - began,
        "server_memory_gib": memory / 2**30,
        "moved_factors": best_directions(table),
        "directions": table,
        "diversity": spread,
        "validity": {name: row["valid"] for name, row in spread.items()},
        "complexity": dimensions,
        "complexity_spearman": float(
            spearmanr([d["true"] for d in dimensions], [d["estimate"] for d in dimensions]).statistic
        ),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    report(summary, output)


def best_directions(table: list[dict[str, Any]]) -> dict[str, Any]:
    """The direction that moves each factor most, how far, and a continuous factor's rank correlation along it."""
    best = {}
    for name in FACTORS:
        row = max(table, key=lambda row: row["moved"][name])
        best[name] = {"direction": row["direction"], "name": row["name"], "moved": row["moved"][name]}
        if name in CONTINUOUS:
            best[name]["rho"] = row["rho"][name]
    return best


def report(summary: dict[str, Any], output: Path) -> None:
    """Print the figures."""
    width = max(len(row["name"]) for row in summary["directions"])
    print(
        f"\nWhat {STRENGTHS[0]:g} to {STRENGTHS[-1]:g} token norms along each direction move: categories, the share of "
        "images that change; others, the distance as a share of the range:"
    )
    for row in summary["directions"]:
        print(f"  {row['name']:<{width}}  {', '.join(main_factors(row, 3))}; {100 * row['valid']:.0f} % valid")
    print("Diversity over open factors (1 is the world's own), named attributes right, valid images:")
    for name in ("teacher", "student", "student_steered"):
        row = summary["diversity"][name]
        print(f"  {name:<16} {row['diversity']:.3f}  {row['alignment']:.3f}  {row['valid']:.3f}")
    print(f"Dimension (Spearman {summary['complexity_spearman']:.2f}):")
    for row in summary["complexity"]:
        print(f"  {row['concept']:<12} open factors {row['true']:>2}  estimate {row['estimate']:.1f}")
    print(f"{summary['seconds']:.0f} s, server memory {summary['server_memory_gib']:.1f} GiB; pictures in {output}")


if __name__ == "__main__":
    try:
        main()
    except (ServerError, FileNotFoundError) as error:
        sys.exit(f"The demo stopped: {error}")
