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

from .captions import NOUNS, Caption, compose, open_factors
from .measures import alignment, diversity
from .pictures import complexity_chart, sheet
from .server import Server, ServerError, progress_bar
from .world import CONTINUOUS, SHAPES, measure

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "output" / "demo"
CONCEPT = "thing"
STRENGTHS = [-1.0, -0.67, -0.33, 0.0, 0.33, 0.67, 1.0]
HELD_OUT_SEEDS = 8
SWEEP_SEED = 7001
DIRECTIONS, SWEPT = "demo thing words", 8
STEPS = {"teacher": 20, "student": 4}
# One prompt with nothing named, and one naming a value of each factor.
PROMPTS = [[], ["red"], ["square"], ["large"], ["left"], ["bottom"], ["dark"]]
IMAGES = 64


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
        """Images of several prompts of the concept, each with a steering node's inputs or None, in one graph."""
        graph: dict[str, Any] = {
            "model": _node("ElrondLoadDemoModel", name=model),
            "directions": _node("ElrondLoadDirections", name=DIRECTIONS),
            "empty": _node("CLIPTextEncode", clip=["model", 1], text=""),
            "latent": _node("EmptyLatentImage", width=64, height=64, batch_size=count),
        }
        for i, (prompt, steering) in enumerate(prompts):
            graph[f"encode{i}"] = _node(
                "ElrondEncodeConcept", clip=["model", 1], prompt=prompt, concept="", occurrence=1
            )
            positive = [f"encode{i}", 0]
            if steering:
                inputs = {**steering, "conditioning": positive, "directions": ["directions", 0]}
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
        "index": index,
        "strength": strength,
        "strengths": "",
        "unit": "token norms",
        "start": 0.0,
        "end": 1.0,
        "concept": "",
    }


def _diversify(seed: int, lowest: float, highest: float) -> dict[str, Any]:
    return {
        "class_type": "ElrondDiversify",
        "count": IMAGES,
        "seed": seed,
        "lowest": lowest,
        "highest": highest,
        "unit": "token norms",
        "mix": 1,
        "leading": 0,
        "both_signs": True,
        "how": "natural",
        "weights": "equal",
        "start": 0.0,
        "end": 0.3,
        "concept": "",
    }


def sweep(demo: Demo, names: Sequence[str]) -> tuple[list[dict[str, Any]], dict[int, torch.Tensor]]:
    """What each of the leading directions, of these names, moves on the teacher.

    Returns:
        for each direction and factor ρ (rank correlation of strength and factor within each held-out seed, averaged
        over seeds) and the distance moved (mean absolute difference of the two ends, in the factor's own range);
        and the first seed's images along each direction.
    """
    table, strips = [], {}
    for index, title in enumerate(names):
        prompts = [(f"a [{CONCEPT}]", _apply(index, strength)) for strength in STRENGTHS]
        images = torch.stack(demo.sample("teacher", prompts, HELD_OUT_SEEDS, SWEEP_SEED))
        strips[index] = images[:, 0]
        seen = measure(images.flatten(0, 1))
        row: dict[str, Any] = {"direction": index, "name": title, "rho": {}, "moved": {}}
        for name in CONTINUOUS:
            values = seen.factors[name].reshape(len(STRENGTHS), HELD_OUT_SEEDS)
            ranks = [float(np.nan_to_num(spearmanr(STRENGTHS, values[:, i]).statistic)) for i in range(HELD_OUT_SEEDS)]
            row["rho"][name] = float(np.mean(ranks))
            row["moved"][name] = float((values[-1] - values[0]).abs().mean())
        shapes = seen.factors["shape"].reshape(len(STRENGTHS), HELD_OUT_SEEDS)
        row["shape"] = {end: SHAPES[int(shapes[at].mode().values)] for end, at in (("negative", 0), ("positive", -1))}
        table.append(row)
    return table, strips


def compare_diversity(demo: Demo, lowest: float, highest: float) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Diversity over the factors nobody named, and alignment on those somebody did, of the three ways to sample."""
    captions: list[Caption] = [compose(CONCEPT, words) for words in PROMPTS]
    texts = [" ".join(["a", *words, f"[{CONCEPT}]"]) for words in PROMPTS]
    ways: dict[str, tuple[str, list[dict[str, Any] | None]]] = {
        "teacher": ("teacher", [None] * len(texts)),
        "student": ("student", [None] * len(texts)),
        "student_steered": ("student", [_diversify(i, lowest, highest) for i in range(len(texts))]),
    }
    figures: dict[str, Any] = {}
    bare = {}
    for name, (model, steering) in ways.items():
        batches = demo.sample(model, list(zip(texts, steering, strict=True)), IMAGES, SWEEP_SEED)
        seen = [measure(images) for images in batches]
        free = [[f for f in open_factors(CONCEPT) if f not in caption.named] for caption in captions]
        figures[name] = {
            "diversity": float(np.mean([diversity(s, f) for s, f in zip(seen, free, strict=True)])),
            "alignment": float(
                np.mean([alignment([c] * IMAGES, s) for c, s in zip(captions, seen, strict=True) if c.named])
            ),
            "valid": float(np.mean([s.valid.float().mean() for s in seen])),
        }
        bare[name] = batches[0]
    figures["strength"] = [lowest, highest]
    return figures, bare


def complexity(demo: Demo) -> list[dict[str, Any]]:
    """Every concept's estimated dimension beside the true number of its open factors."""
    graph = workflow("complexity")
    pairs = [node for node, part in graph.items() if part["class_type"] == "ElrondEncodeConcept"]
    rows = []
    nouns = list(NOUNS)
    for start in range(0, len(nouns), len(pairs)):
        some = nouns[start : start + len(pairs)]
        wanted = copy.deepcopy(graph)
        for node, noun in zip(pairs, some + some[:1] * (len(pairs) - len(some)), strict=True):
            wanted[node]["inputs"]["prompt"] = f"a [{noun}]"
        outputs = demo.run(wanted)
        for node, noun in zip(pairs, some, strict=False):
            rows.append(
                {"concept": noun, "true": len(open_factors(noun)), "estimate": _dimension(wanted, outputs, node)}
            )
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
    parser.add_argument("--lowest", type=float, default=0.3, help="least strength of the diversified batch")
    parser.add_argument("--highest", type=float, default=0.3, help="greatest strength of the diversified batch")
    arguments = parser.parse_args()
    began = time.monotonic()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    with Server(output) as server:
        demo = Demo(server)
        print("1/4 discover: realizations, gradients, directions")
        graph = workflow("discover")
        outputs = demo.run(graph)
        saved = next(node for node, part in graph.items() if part["class_type"] == "SaveImage")
        realizations = demo.images(outputs, saved)
        sheet(output / "realizations.png", [("a [thing]\nteacher", realizations[:8]), ("", realizations[8:16])])

        print("2/4 steer: what each direction moves")
        demo.run(workflow("steer"))
        found = load_directions(output / "elrond" / "directions" / f"{DIRECTIONS}.safetensors")
        table, strips = sweep(demo, found.names[:SWEPT])
        moved = {
            name: max(((row["rho"][name], row["direction"]) for row in table), key=lambda pair: abs(pair[0]))
            for name in CONTINUOUS
        }
        rows = []
        for row in table:
            best = max(CONTINUOUS, key=lambda name: abs(row["rho"][name]))
            moves = f"{best} {row['rho'][best]:+.2f}"
            if abs(row["rho"][best]) < 0.8 and len(set(row["shape"].values())) > 1:
                moves = "{negative} → {positive}".format(**row["shape"])
            rows.append((f"{row['name']}\n{moves}", strips[row["direction"]]))
        sheet(output / "directions.png", rows, [f"{s:+g}" for s in STRENGTHS], "strength, in token norms")

        print("3/4 diversify: the distilled student")
        demo.run(workflow("diversify"))
        spread, bare = compare_diversity(demo, arguments.lowest, arguments.highest)
        titles = {"teacher": "teacher", "student": "student", "student_steered": "student,\ndiversified"}
        sheet(output / "diversity.png", [(titles[name], bare[name][:10]) for name in titles])

        print("4/4 dimension: in how many ways each concept can vary")
        dimensions = complexity(demo)
        complexity_chart(output / "complexity.png", dimensions)
        memory = server.peak_memory()

    summary = {
        "seconds": time.monotonic() - began,
        "server_memory_gib": memory / 2**30,
        "moved_factors": {name: {"rho": rho, "direction": index} for name, (rho, index) in moved.items()},
        "directions": table,
        "diversity": spread,
        "complexity": dimensions,
        "complexity_spearman": float(
            spearmanr([d["true"] for d in dimensions], [d["estimate"] for d in dimensions]).statistic
        ),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    report(summary, output)


def report(summary: dict[str, Any], output: Path) -> None:
    """Print the figures."""
    print("\nWhat the teacher's leading directions move (rank correlation, distance as a share of the factor's range):")
    for row in summary["directions"]:
        cells = "  ".join(f"{n} {row['rho'][n]:+.2f} ({row['moved'][n]:.2f})" for n in CONTINUOUS)
        print(
            f"  {row['direction']} {row['name']}: {cells}  "
            f"shape {row['shape']['negative']} .. {row['shape']['positive']}"
        )
    print("Best direction of each factor: ", end="")
    print(", ".join(f"{n} {v['rho']:+.2f} (#{v['direction']})" for n, v in summary["moved_factors"].items()))
    print("Diversity over open factors (1 is the world's own), alignment, valid images:")
    for name in ("teacher", "student", "student_steered"):
        row = summary["diversity"][name]
        print(f"  {name:<16} {row['diversity']:.3f}  {row['alignment']:.3f}  {row['valid']:.3f}")
    print(f"Dimension (Spearman {summary['complexity_spearman']:.2f}):")
    for row in summary["complexity"]:
        print(f"  {row['concept']:<6} open factors {row['true']}  estimate {row['estimate']:.1f}")
    print(f"{summary['seconds']:.0f} s, server memory {summary['server_memory_gib']:.1f} GiB; pictures in {output}")


if __name__ == "__main__":
    try:
        main()
    except (ServerError, FileNotFoundError) as error:
        sys.exit(f"The demo stopped: {error}")
