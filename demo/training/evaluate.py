"""Measure the portraits' models: `python -m demo.training.evaluate` writes `portraits.json` beside their weights.

Pictures are sampled through the host, as the stock nodes do, and read back with `demo.portraits.measure`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import host  # noqa: F401

# isort: split
import comfy.sample
import torch
from scipy.stats import kstest

from ..host_model.portrait_vae import PORTRAIT_CHANNELS
from ..host_model.portraits import (
    PORTRAIT_MODELS,
    PORTRAIT_WEIGHTS,
    Portraits,
    file_of,
    load_portrait_vae,
    load_portraits,
)
from ..portraits import measure
from ..portraits.captions import EVERYTHING, NOUNS, OPEN, Allowed, Captions, allows, named
from ..portraits.world import FACTORS, Factors
from .progress import digest_of_file, generator_of
from .vae import pictures, psnr

FILE = "portraits.json"
_BATCH = 64


@dataclass(frozen=True)
class Settings:
    """How a model is sampled: the host's sampler and scheduler, number of steps, guidance."""

    steps: int
    sampler: str
    scheduler: str = "simple"
    cfg: float = 1.0


SETTINGS = {"teacher": Settings(20, "euler"), "student": Settings(4, "lcm")}


def sample(model: Portraits, rows: torch.Tensor, settings: Settings, seed: int) -> torch.Tensor:
    """A picture for each of (N, 48, 128) conditionings: float32 (N, 3, 64, 64) in [0, 1], on the CPU."""
    shape = (len(rows), PORTRAIT_CHANNELS, 8, 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    negative = [[model.clip.encode(""), {"pooled_output": None}]]
    images = []
    for start in range(0, len(rows), _BATCH):
        part = slice(start, start + _BATCH)
        with torch.inference_mode():
            latents = comfy.sample.sample(
                model.model,
                noise[part],
                settings.steps,
                settings.cfg,
                settings.sampler,
                settings.scheduler,
                [[rows[part], {"pooled_output": None}]],
                negative,
                torch.zeros_like(noise[part]),
                disable_pbar=True,
                seed=seed + start,
            )
            images.append(model.vae.decode(latents).movedim(-1, 1).float().cpu())
    # Clones made outside inference mode may be written to, as the measurements do.
    return torch.cat(images).clone()


def alignment(texts: list[str], read: Factors) -> dict[str, float]:
    """The share of pictures that show what their text names, for each factor that is named; caption i is picture i's.

    A noun names what it narrows. A continuous factor is right within `measure.TOLERANCE` of what is allowed.
    """
    right: dict[str, list[bool]] = {name: [] for name in FACTORS}
    for i, text in enumerate(texts):
        for factor, allowed in named(text).items():
            shown = allows(allowed, read[factor][i : i + 1], measure.TOLERANCE)
            right[factor].append(bool(shown))
    return {name: sum(values) / len(values) for name, values in right.items() if values}


def placed(allowed: Allowed, values: torch.Tensor) -> torch.Tensor:
    """Values (N,) of a factor relative to what is allowed of it.

    Continuous ones become shares of the interval, categorical ones places among the allowed values, -1 for others.
    """
    if isinstance(allowed, frozenset):
        places = torch.full((max(int(values.max()), *allowed) + 1,), -1)
        places[sorted(allowed)] = torch.arange(len(allowed))
        return places[values]
    return ((values - allowed[0]) / (allowed[1] - allowed[0])).clamp(0, 1)


def marginal_error(allowed: Allowed, values: torch.Tensor) -> float:
    """How far values (N,) are from uniform over what is allowed.

    Kolmogorov–Smirnov distance for a continuous factor, largest error of a value's share for a categorical one.
    """
    where = placed(allowed, values)
    if isinstance(allowed, frozenset):
        shares = torch.bincount(where[where >= 0], minlength=len(allowed)) / len(where)
        return float((shares - 1 / len(allowed)).abs().max())
    return float(kstest(where.double().numpy(), "uniform").statistic)


def spread(allowed: Allowed, values: torch.Tensor) -> float:
    """Mean difference of two pictures' values (N,), as a share of what uniform values over all that is allowed have.

    The absolute difference for a continuous factor, the chance to differ for a categorical one.
    """
    where, count = placed(allowed, values), len(values)
    if isinstance(allowed, frozenset):
        counts = torch.bincount(where + 1).double()
        same = float((counts * (counts - 1)).sum()) / (count * (count - 1))
        return (1 - same) / (1 - 1 / len(allowed))
    apart = float((where[:, None] - where[None, :]).abs().sum()) / (count * (count - 1))
    return apart * 3


def evaluate(model: Portraits, measures: measure.Measures, settings: Settings, images: int, seed: int = 1) -> dict:
    """Alignment, marginals, validity and diversity of a model.

    Args:
        model: what to measure.
        measures: reads the pictures.
        settings: how it is sampled.
        images: pictures for the alignment, and pictures of each bare noun.
        seed: fixes captions and noise.

    Returns:
        `alignment` over all names and `alignment_of` each factor; `valid`, a share; `marginals`, the largest error of
        any noun's open factor, by factor, and `marginals_mean`, their means over nouns; `diversity` over open
        factors, a share of the world's, and `diversity_of` each noun.
    """
    began = time.monotonic()
    texts, _ = Captions(seed).batch(images, share=0.5)
    pixels = sample(model, torch.cat([model.clip.encode(text) for text in texts]), settings, seed)
    aligned = alignment(texts, measures.measure(pixels))
    names = {factor: sum(factor in named(text) for text in texts) for factor in aligned}
    valid = [measures.valid(pixels)]
    errors: dict[str, list[float]] = {name: [] for name in FACTORS}
    diversity = {}
    for place, noun in enumerate(NOUNS):
        rows = model.clip.encode(f"a {noun}").repeat(images, 1, 1)
        pixels = sample(model, rows, settings, seed + 1 + place)
        read = measures.measure(pixels)
        valid.append(measures.valid(pixels))
        shares = []
        for factor in OPEN[noun]:
            allowed = NOUNS[noun].get(factor, EVERYTHING[factor])
            errors[factor].append(marginal_error(allowed, read[factor]))
            shares.append(spread(allowed, read[factor]))
        diversity[noun] = sum(shares) / len(shares)
    return {
        "images": images,
        "settings": vars(settings),
        "alignment": sum(aligned[f] * names[f] for f in aligned) / sum(names.values()),
        "alignment_of": aligned,
        "valid": float(torch.cat(valid).float().mean()),
        "marginals": {name: max(values) for name, values in errors.items() if values},
        "marginals_mean": {name: sum(values) / len(values) for name, values in errors.items() if values},
        "diversity": sum(diversity.values()) / len(diversity),
        "diversity_of": diversity,
        "seconds": time.monotonic() - began,
    }


def evaluate_vae(path: Path, measures: measure.Measures, images: int) -> dict[str, Any]:
    """The autoencoder's error on fresh pictures, and what is still read right after it.

    Returns:
        `psnr`, the mean over pictures in decibels; `right`, by factor the share of pictures whose factor is read as
        before the autoencoder.
    """
    vae = load_portrait_vae(path)
    pixels = pictures(images, generator_of("evaluation", 0), "cpu")
    decoded = torch.cat([vae.decode(vae.encode(part)) for part in pixels.split(_BATCH)]).contiguous()
    before = measures.measure((pixels / 2 + 0.5).contiguous())
    right = measure.right(before, measures.measure((decoded / 2 + 0.5).clamp(0, 1)))
    return {
        "psnr": float(psnr(decoded, pixels).mean()),
        "right": {name: float(values.float().mean()) for name, values in right.items()},
    }


def main(folder: Path, models: list[str], images: int) -> None:
    """Measure what a folder of weights holds, and write the figures there with the digests of the weights."""
    path = folder / FILE
    figures = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    network = folder / measure.WEIGHTS.name
    measures = measure.load(network if network.is_file() else measure.WEIGHTS)
    for name in models:
        if not file_of(name, folder).is_file():
            print(f"{file_of(name, folder).name} is not there yet: `python -m demo.train` makes it.")
            continue
        if name == "vae":
            figures[name] = evaluate_vae(file_of("vae", folder), measures, images)
        else:
            figures[name] = evaluate(load_portraits(name, folder), measures, SETTINGS[name], images)
        figures[name]["sha256"] = digest_of_file(file_of(name, folder))
        print(name, json.dumps(figures[name], indent=1), flush=True)
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=PORTRAIT_WEIGHTS, help="where the weights are")
    parser.add_argument("--models", nargs="+", choices=["vae", *PORTRAIT_MODELS], default=["vae", *PORTRAIT_MODELS])
    parser.add_argument("--images", type=int, default=256)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.models, arguments.images)
