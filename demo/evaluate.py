"""Measure the demo's models: `python -m demo.evaluate` writes `demo/figures.json`.

Images are sampled through the host, as the stock nodes do, and read back with `demo.world.measure`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import host  # noqa: F401

# isort: split
import comfy.sample
import torch

from . import host_model as demo_model
from .captions import NOUNS, WORDS, Caption, compose, draw_caption, open_factors, word_of
from .measures import alignment, distance_to_uniform, diversity
from .world import CONTINUOUS, SHAPES, measure

STEPS = {"teacher": 20, "student": 4}
CFG = {"teacher": 1.0, "student": 1.0}
BATCH = 64


@dataclass
class Demo:
    """A demo model, loaded, with the settings it is sampled with."""

    model: Any
    clip: Any
    vae: Any
    steps: int
    cfg: float

    @classmethod
    def load(cls, name: str, path: Path | None = None) -> Demo:
        """The shipped model of a name, or a checkpoint file with that model's settings."""
        parts = demo_model.load_file(path) if path else demo_model.load(name)
        return cls(*parts, STEPS[name], CFG[name])

    def encode(self, prompt: str) -> torch.Tensor:
        """Conditioning rows of a prompt, (1, 16, 128)."""
        return self.clip.encode(prompt)

    def sample(self, rows: torch.Tensor, seed: int, noise: torch.Tensor | None = None) -> torch.Tensor:
        """One image for each of (N, 16, 128) conditionings: float32 (N, 64, 64, 3) in [0, 1]."""
        shape = (len(rows), demo_model.LATENT_CHANNELS, 8, 8)
        if noise is None:
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        empty = self.encode("")
        images = []
        for start in range(0, len(rows), BATCH):
            part = slice(start, start + BATCH)
            positive = [[rows[part], {"pooled_output": None}]]
            negative = [[empty, {"pooled_output": None}]]
            with torch.inference_mode():
                latents = comfy.sample.sample(
                    self.model,
                    noise[part],
                    self.steps,
                    self.cfg,
                    "euler",
                    "simple",
                    positive,
                    negative,
                    torch.zeros_like(noise[part]),
                    disable_pbar=True,
                    seed=seed,
                )
                images.append(self.vae.decode(latents))
        return torch.cat(images)


def evaluate(demo: Demo, images: int, seed: int = 1) -> dict[str, object]:
    """Alignment, marginals, validity and diversity of a model.

    Args:
        demo: what to measure.
        images: images for the alignment, and images of each concept's bare caption.
        seed: fixes captions and noise.
    """
    began = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    captions: list[Caption] = []
    while len(captions) < images:
        caption = draw_caption(generator)
        if caption.named:
            captions.append(caption)
    seen = measure(demo.sample(torch.cat([demo.encode(c.text) for c in captions]), seed))
    named: dict[str, float] = {}
    for factor in WORDS:
        chosen = [i for i, c in enumerate(captions) if factor in c.named]
        words = word_of(factor, seen.factors[factor])
        named[factor] = sum(words[i] == captions[i].named[factor] for i in chosen) / max(len(chosen), 1)
    out: dict[str, object] = {
        "images": images,
        "alignment": alignment(captions, seen),
        "alignment_of": named,
        "valid": float(seen.valid.float().mean()),
    }
    pooled: dict[str, list[torch.Tensor]] = {name: [] for name in CONTINUOUS}
    worst, spread, shapes = {}, {}, []
    for noun in NOUNS:
        seen = measure(demo.sample(demo.encode(compose(noun, []).text).repeat(images, 1, 1), seed))
        spread[noun] = diversity(seen, open_factors(noun))
        for name in open_factors(noun):
            if name == "shape":
                counts = torch.bincount(seen.factors["shape"], minlength=len(SHAPES)) / images
                shapes.append(float((counts - 1 / len(SHAPES)).abs().max()))
            else:
                pooled[name].append(seen.factors[name])
                worst[f"{noun} {name}"] = distance_to_uniform(seen.factors[name])
    out["ks"] = {name: distance_to_uniform(torch.cat(values)) for name, values in pooled.items()}
    out["ks_by_concept"] = worst
    out["shape_share_error"] = max(shapes)
    out["diversity"] = sum(spread.values()) / len(spread)
    out["diversity_by_concept"] = spread
    out["seconds"] = time.monotonic() - began
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--models", nargs="+", default=list(demo_model.MODELS))
    parser.add_argument("--file", type=Path, help="a checkpoint to measure instead, as the one model named")
    parser.add_argument("--out", type=Path, default=demo_model.WEIGHTS.parent / "figures.json")
    arguments = parser.parse_args()
    figures = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for name in arguments.models:
        figures[name] = {**figures.get(name, {}), **evaluate(Demo.load(name, arguments.file), arguments.images)}
        print(json.dumps(figures[name], indent=1))
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
