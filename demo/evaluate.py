"""Measure the demo's models: `python -m demo.evaluate` writes `demo/figures.json`.

Pictures are sampled through the host, as the stock nodes do, and read back with `demo.portraits.measure`.
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
import comfy.model_patcher
import comfy.sample
import comfy.sd
import torch

from .host_model import LATENT_CHANNELS, MODELS, WEIGHTS, file_of, load, load_vae
from .measures import aligned, alignment, diversity, marginal_error, open_of
from .portraits import measure
from .portraits.captions import NOUNS, Captions
from .portraits.world import FACTORS
from .training.progress import digest_of_file, generator_of
from .training.vae import pictures, psnr

FIGURES = Path(__file__).parent / "figures.json"
_BATCH = 64


@dataclass(frozen=True)
class Settings:
    """How a model is sampled: the host's sampler and scheduler, number of steps, guidance."""

    steps: int
    sampler: str = "euler"
    scheduler: str = "simple"
    cfg: float = 1.0


SETTINGS = {"teacher": Settings(20), "student": Settings(4)}


@dataclass
class Demo:
    """A demo model, loaded, with the settings it is sampled with."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE
    settings: Settings

    @classmethod
    def load(cls, name: str, folder: Path = WEIGHTS) -> Demo:
        """The teacher or the student in a folder of weights."""
        return cls(*load(name, folder), SETTINGS[name])

    def encode(self, prompt: str) -> torch.Tensor:
        """Conditioning rows of a prompt, (1, 48, 128)."""
        return self.clip.encode(prompt)

    def latents(self, rows: torch.Tensor, seed: int, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Latents (N, 16, 8, 8) for (N, 48, 128) conditionings, from noise of that shape or of a seed."""
        if noise is None:
            shape = (len(rows), LATENT_CHANNELS, 8, 8)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        negative = [[self.encode(""), {"pooled_output": None}]]
        made = []
        for start in range(0, len(rows), _BATCH):
            part = slice(start, start + _BATCH)
            with torch.inference_mode():
                latents = comfy.sample.sample(
                    self.model,
                    noise[part],
                    self.settings.steps,
                    self.settings.cfg,
                    self.settings.sampler,
                    self.settings.scheduler,
                    [[rows[part], {"pooled_output": None}]],
                    negative,
                    torch.zeros_like(noise[part]),
                    disable_pbar=True,
                    seed=seed + start,
                )
            made.append(latents.float().cpu())
        # Clones made outside inference mode may be written to, as the measurements do.
        return torch.cat(made).clone()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (N, 3, 64, 64) in [0, 1], on the CPU."""
        with torch.inference_mode():
            images = [self.vae.decode(part).movedim(-1, 1).float().cpu() for part in latents.split(_BATCH)]
        return torch.cat(images).clone()

    def sample(self, rows: torch.Tensor, seed: int, noise: torch.Tensor | None = None) -> torch.Tensor:
        """A picture for each of (N, 48, 128) conditionings: float32 (N, 3, 64, 64) in [0, 1], on the CPU."""
        return self.decode(self.latents(rows, seed, noise))


def evaluate(demo: Demo, measures: measure.Measures, images: int, seed: int = 1) -> dict[str, Any]:
    """Alignment, marginals, validity and diversity of a model.

    Args:
        demo: what to measure.
        measures: reads the pictures.
        images: pictures for the alignment, and pictures of each bare noun.
        seed: fixes captions and noise.

    Returns:
        `alignment` over all that is named and `alignment_of` each factor; `valid`, a share; `marginals`, the largest
        error of any noun's open factor, by factor, and `marginals_mean`, their means over nouns; `diversity` over
        open factors, a share of the world's, and `diversity_of` each noun.
    """
    began = time.monotonic()
    texts, _ = Captions(seed).batch(images, share=0.5)
    pixels = demo.sample(torch.cat([demo.encode(text) for text in texts]), seed)
    read = measures.measure(pixels)
    valid = [measures.valid(pixels)]
    named = {"alignment": aligned(texts, read), "alignment_of": alignment(texts, read)}
    errors: dict[str, list[float]] = {name: [] for name in FACTORS}
    spreads = {}
    for place, noun in enumerate(NOUNS):
        text = f"a {noun}"
        pixels = demo.sample(demo.encode(text).repeat(images, 1, 1), seed + 1 + place)
        read = measures.measure(pixels)
        valid.append(measures.valid(pixels))
        for factor, allowed in open_of(text).items():
            errors[factor].append(marginal_error(allowed, read[factor]))
        spreads[noun] = diversity(text, read)
    return {
        "images": images,
        "settings": vars(demo.settings),
        **named,
        "valid": float(torch.cat(valid).float().mean()),
        "marginals": {name: max(values) for name, values in errors.items() if values},
        "marginals_mean": {name: sum(values) / len(values) for name, values in errors.items() if values},
        "diversity": sum(spreads.values()) / len(spreads),
        "diversity_of": spreads,
        "seconds": time.monotonic() - began,
    }


def evaluate_vae(path: Path, measures: measure.Measures, images: int) -> dict[str, Any]:
    """The autoencoder's error on fresh pictures, and what is still read right after it.

    Returns:
        `psnr`, the mean over pictures in decibels; `right`, by factor the share of pictures whose factor is read as
        before the autoencoder.
    """
    vae = load_vae(path)
    pixels = pictures(images, generator_of("evaluation", 0), "cpu")
    decoded = torch.cat([vae.decode(vae.encode(part)) for part in pixels.split(_BATCH)]).contiguous()
    before = measures.measure((pixels / 2 + 0.5).contiguous())
    right = measure.right(before, measures.measure((decoded / 2 + 0.5).clamp(0, 1)))
    return {
        "psnr": float(psnr(decoded, pixels).mean()),
        "right": {name: float(values.float().mean()) for name, values in right.items()},
    }


def main() -> None:
    """Measure what a folder of weights holds, and write the figures with the digests of the weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=WEIGHTS, help="where the weights are")
    parser.add_argument("--models", nargs="+", choices=["vae", *MODELS], default=["vae", *MODELS])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--out", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    out: Path = arguments.out
    figures = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    network = arguments.folder / measure.WEIGHTS.name
    measures = measure.load(network if network.is_file() else measure.WEIGHTS)
    for name in arguments.models:
        if name == "vae":
            figures[name] = evaluate_vae(file_of("vae", arguments.folder), measures, arguments.images)
        else:
            figures[name] = evaluate(Demo.load(name, arguments.folder), measures, arguments.images)
        figures[name]["sha256"] = digest_of_file(file_of(name, arguments.folder))
        print(name, json.dumps(figures[name], indent=1), flush=True)
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
