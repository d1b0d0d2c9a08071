"""What the benches on the portraits share: the concepts in two halves, collections that are kept, how factors move.

Whatever a bench chooses, it chooses on the first half of the concepts; its figures are of the second. Collections are
kept in bench/results/collections (not in the repository) under the digest of the weights they were made with.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo import host

# isort: split
import comfy.sample
import torch

from demo.evaluate import Demo
from demo.host_model import LATENT_CHANNELS, WEIGHTS, file_of
from demo.portraits import measure
from demo.portraits.captions import OPEN
from demo.portraits.world import CATEGORICAL, CONTINUOUS, FACTORS, Factors

PACK = host.pack()
from comfyui_elrond.elrond_core.gradients import Gradients  # noqa: E402
from comfyui_elrond.elrond_core.seeding import normal  # noqa: E402
from comfyui_elrond.elrond_core.storage import format as files  # noqa: E402

NODES = {node.define_schema().node_id: node for node in PACK.NODES}
RESULTS = Path(__file__).parent / "results"
COLLECTIONS = RESULTS / "collections"
# The seed of the halves, written down before anything was measured.
SPLIT = 20
SIZE, BATCH = 64, 64
# Nouns that mean the same as another are left out: they would put one concept into both halves.
SYNONYMS = ("human", "guy", "lady")
CONCEPTS = tuple(noun for noun in OPEN if noun not in SYNONYMS)
# Steps of realizations and of steered images, fewer than the teacher's twenty. bench/diversity.py samples its points as
# the demo does.
STEPS = {"teacher": 10, "student": 4}


def halves(concepts: Sequence[str] = CONCEPTS) -> tuple[list[str], list[str]]:
    """The half on which choices are made, and the one that figures are of; a concept is always in the same half."""
    shuffled = random.Random(SPLIT).sample(sorted(CONCEPTS), len(CONCEPTS))
    first = set(shuffled[: len(CONCEPTS) // 2])
    return [noun for noun in concepts if noun in first], [noun for noun in concepts if noun not in first]


def digest() -> str:
    """A digest of the weights of teacher, student and autoencoder."""
    weights = hashlib.blake2b(digest_size=6)
    for name in ("vae", "teacher", "student"):
        weights.update(file_of(name, WEIGHTS).read_bytes())
    return weights.hexdigest()


@functools.cache
def folder() -> Path:
    """Where what belongs to the shipped weights is kept."""
    path = COLLECTIONS / digest()
    path.mkdir(parents=True, exist_ok=True)
    return path


@functools.cache
def measures() -> measure.Measures:
    """Reads factors from pictures."""
    return measure.load()


@functools.cache
def demo_of(name: str) -> Demo:
    """The teacher or the student, loaded."""
    return Demo.load(name)


def prompt_of(noun: str) -> str:
    """The bare prompt of a noun, with brackets."""
    return f"a [{noun}]"


def encoded(demo: Demo, prompt: str) -> Any:
    """A marked conditioning, by the node."""
    with torch.inference_mode():
        return NODES["ElrondEncodeConcept"].execute(demo.clip, prompt, "", 1).args[0]


def realizations(model: str, prompt: str, count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Images of a prompt with brackets, as latents, by the node."""
    demo = demo_of(model)
    settings = (SIZE, SIZE, count, BATCH, seed, STEPS[model], demo.settings.cfg)
    with torch.inference_mode():
        sample = NODES["ElrondSampleRealizations"].execute
        return sample(
            demo.model, encoded(demo, prompt), *settings, demo.settings.sampler, demo.settings.scheduler
        ).args[0]


def collection(
    model: str,
    prompt: str,
    images: int,
    gradients: int,
    targets: int = 1,
    batch: int = BATCH,
    seed: int = 0,
    levels: str = "",
) -> Gradients:
    """Gradients of a prompt with brackets, with their response, by the nodes; kept once made."""
    name = f"{model} {prompt.translate(str.maketrans('', '', '[]'))} {images} {gradients} {targets} {seed} {levels}"
    path = folder() / f"{name.strip()}.safetensors"
    if not path.is_file():
        demo = demo_of(model)
        latents = realizations(model, prompt, images, seed)
        with torch.inference_mode():
            made = NODES["ElrondCollectGradients"].execute(
                demo.model,
                encoded(demo, prompt),
                latents,
                gradients,
                1.0,
                batch,
                seed,
                True,
                targets_per_realization=targets,
                more_levels=levels,
            )
        files.save_gradients(made.args[0], path)
    return files.load_gradients(path)


def place_of(demo: Demo, prompt: str) -> int:
    """The row of a prompt's concept."""
    text = prompt.split("[")[0].split()
    return 1 + sum(len(demo.clip.tokenizer.clip_l.tokenizer(word)["input_ids"]) - 2 for word in text)


def stepped(rows: torch.Tensor, at: int, vectors: torch.Tensor, strengths: Sequence[float]) -> torch.Tensor:
    """Conditionings of rows (48, d) whose row `at` is moved along (K, d) directions × strengths, in token norms."""
    unit = torch.nn.functional.normalize(vectors, dim=1)
    out = rows.repeat(len(vectors), len(strengths), 1, 1)
    out[..., at, :] += rows[at].norm() * unit[:, None] * torch.tensor(list(strengths)).float()[None, :, None]
    return out.flatten(0, 1)


def sampled(model: str, conditionings: torch.Tensor, seeds: int, seed: int) -> torch.Tensor:
    """Latents of (K, 48, d) conditionings × seeds, in this order; the same noise for each conditioning."""
    demo = demo_of(model)
    noise = normal((LATENT_CHANNELS, 8, 8), seed, "noise", list(range(seeds)))
    rows = conditionings.repeat_interleave(seeds, 0)
    before = demo.settings
    try:
        demo.settings = type(before)(STEPS[model], before.sampler, before.scheduler, before.cfg)
        return demo.latents(rows, seed, noise.repeat(len(conditionings), 1, 1, 1))
    finally:
        demo.settings = before


def guided(model: str, patched: Any, positive: Any, seeds: int, seed: int) -> torch.Tensor:
    """Latents of a conditioning by a patched MODEL, from the noise of `sampled`."""
    demo = demo_of(model)
    noise = normal((LATENT_CHANNELS, 8, 8), seed, "noise", list(range(seeds)))
    settings = demo.settings
    how = (STEPS[model], settings.cfg, settings.sampler, settings.scheduler)
    with torch.inference_mode():
        latents = comfy.sample.sample(
            patched, noise, *how, positive, positive, torch.zeros_like(noise), disable_pbar=True, seed=seed
        )
    return latents.float().cpu().clone()


def moved(low: Factors, high: Factors) -> dict[str, float]:
    """How far each factor moves between the pictures of two conditionings and the same seeds, between 0 and 1.

    Continuous factors: the distance that the mean moves, in the factor's range. Categorical ones: the probability that
    moves from some values to others (total variation). Squares are without what would move by chance. The roots of
    those that come out negative are 0, so that what does not move keeps a little.
    """
    out = {name: _moved(high[name] - low[name]) for name in CONTINUOUS}
    for name, kinds in CATEGORICAL.items():
        shares = [_moved((high[name] == kind).float() - (low[name] == kind).float()) for kind in range(len(kinds))]
        out[name] = sum(shares) / 2
    return out


def _moved(differences: torch.Tensor) -> float:
    """Size of the mean of differences (N,), each of one seed: the root of an unbiased estimate of its square."""
    return float((differences.mean() ** 2 - differences.var() / len(differences)).clamp_min(0).sqrt())


def split_factors(factors: Factors, parts: int) -> list[Factors]:
    """Factors of several conditionings' pictures, one after another, by conditioning."""
    return [{name: factors[name].chunk(parts)[i] for name in FACTORS} for i in range(parts)]
