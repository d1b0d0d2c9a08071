"""What the methods make of the demo's concepts, whose factors are known.

    python -m bench.concepts directions       purity and coverage of each method's leading directions, on the teacher
    python -m bench.concepts purity           purity on more concepts, beside that of the words themselves in the prompt
    python -m bench.concepts complexity       every concept's estimated dimension beside its number of open factors, and
                                              beside the dimension of its images by the factors measured in them
    python -m bench.concepts held_out         the same estimate on other images and noise, which nothing was chosen on

Collections are kept in bench/results/collections (not in the repository); figures go to bench/results/estimators.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from demo import host

# isort: split
import torch
from scipy.stats import spearmanr

from demo.captions import NOUNS, WORDS, compose, open_factors
from demo.evaluate import Demo
from demo.host_model import LATENT_CHANNELS, WEIGHTS
from demo.world import CONTINUOUS, FACTORS, SHAPES, Measurement, measure

PACK = host.pack()
from comfyui_elrond.elrond_core.decompose.pca import fit_pca  # noqa: E402
from comfyui_elrond.elrond_core.decompose.response import fit_response  # noqa: E402
from comfyui_elrond.elrond_core.decompose.sae_training import train_sae  # noqa: E402
from comfyui_elrond.elrond_core.decompose.words import fit_words  # noqa: E402
from comfyui_elrond.elrond_core.dimension.correlation import box_dimension  # noqa: E402
from comfyui_elrond.elrond_core.dimension.report import estimate_lid  # noqa: E402
from comfyui_elrond.elrond_core.directions import Directions  # noqa: E402
from comfyui_elrond.elrond_core.gradients import Gradients  # noqa: E402
from comfyui_elrond.elrond_core.steering.labels import label  # noqa: E402
from comfyui_elrond.elrond_core.storage import format as files  # noqa: E402

NODES = {node.define_schema().node_id: node for node in PACK.NODES}
RESULTS = Path(__file__).parent / "results"
COLLECTIONS = RESULTS / "collections"
REALIZATIONS, GRADIENTS = 256, 2048
NOISED = 8
# Seeds of images and noise on which no choice of the dimension's rule was made: those up to 5 were looked at for it.
HELD_OUT = (6, 7, 8)
LEADING = 6
SEEDS = 24
STRENGTHS = np.linspace(-1, 1, 5)
# A factor that a direction leaves alone still differs between the ends, by chance: so many seeds that it counts little.
SEEDS_AT_ENDS = 128
# A factor of less than this share of the world's spread does not vary: it is measured, and drawn, no better than that.
WOBBLE = 0.1
# So many open factors make a concept whose directions are compared.
SEVERAL = 4
# A direction moves a factor if its ends lie so far apart, in the factor's spread.
MOVED = 0.5
# Standard deviation of a uniform number; and how often two of three equally likely shapes differ.
SPREAD, DIFFERENT = 12**-0.5, 2 / 3


def collection(model: str, noun: str, crossed: bool = False, seed: int = 0) -> Gradients:
    """Gradients of "a <noun>" with their response, by the nodes themselves; kept once made.

    Of random pairs; or, if `crossed`, of `NOISED` realizations that are compared with all others.
    """
    path = _folder(model) / f"{model} {noun}{' crossed' if crossed else ''}{f' {seed}' if seed else ''}.safetensors"
    if path.is_file():
        return files.load_gradients(path)
    demo = Demo.load(model)
    positive, latents = realizations(demo, noun, seed)
    with torch.inference_mode():
        collect = NODES["ElrondCollectGradients"].execute
        others = REALIZATIONS - 1 if crossed else 1
        count, batch = (NOISED * others, NOISED) if crossed else (GRADIENTS, 64)
        settings = (count, 1.0, batch, seed, True)
        gradients = collect(demo.model, positive, latents, *settings, targets_per_realization=others).args[0]
    files.save_gradients(gradients, path)
    return gradients


def _folder(model: str) -> Path:
    """Where what belongs to a model's weights is kept: other weights are another model."""
    return COLLECTIONS / hashlib.blake2b((WEIGHTS / f"{model}.safetensors").read_bytes(), digest_size=6).hexdigest()


def realizations(demo: Demo, noun: str, seed: int = 0) -> tuple[Any, dict[str, torch.Tensor]]:
    """The prompt "a <noun>", encoded, and the realizations that its gradients are collected from."""
    with torch.inference_mode():
        positive = NODES["ElrondEncodeConcept"].execute(demo.clip, f"a [{noun}]", "", 1).args[0]
        sample = NODES["ElrondSampleRealizations"].execute
        settings = (64, 64, REALIZATIONS, 64, seed, demo.steps, demo.cfg, "euler", "simple")
        return positive, sample(demo.model, positive, *settings).args[0]


def dimension_of_images(demo: Demo, noun: str) -> float:
    """Correlation dimension of a concept's realizations by the factors measured in them.

    Each factor counts alike, unless its spread is less than `WOBBLE` of the world's; a shape is a corner of a triangle.
    """
    _, latents = realizations(demo, noun)
    with torch.inference_mode():
        factors = measure(demo.vae.decode(latents["samples"])).factors
    columns = []
    for name in FACTORS:
        values = factors[name].double()[:, None]
        if name == "shape":
            values = torch.nn.functional.one_hot(factors[name], len(SHAPES)).double()
        spread = values.var(0).sum().sqrt()
        if spread > WOBBLE * (DIFFERENT**0.5 if name == "shape" else SPREAD):
            columns.append(values / spread)
    places = torch.cat(columns, 1)
    return box_dimension(torch.cdist(places, places))


def movements(demo: Demo, noun: str, vectors: torch.Tensor) -> list[dict[str, Any]]:
    """What each direction (K, d) does to the factors of the concept's images, within one token norm.

    Returns:
        per direction `rho`: rank correlation of strength and factor within each held-out seed, averaged; `moved` as
        `moved_between` its ends; and the share of `valid` images.
    """
    along = _measured(demo, _stepped(demo, noun, vectors, STRENGTHS), SEEDS)
    out = moved_between(demo, _stepped(demo, noun, vectors, STRENGTHS[[0, -1]]))
    for k, row in enumerate(out):
        values = {name: along.factors[name].reshape(len(vectors), len(STRENGTHS), SEEDS)[k].numpy() for name in FACTORS}
        row["rho"] = {
            name: float(np.mean([np.nan_to_num(spearmanr(STRENGTHS, values[name][:, i])[0]) for i in range(SEEDS)]))
            for name in CONTINUOUS
        }
    return out


def moved_between(demo: Demo, ends: torch.Tensor) -> list[dict[str, Any]]:
    """How the factors differ between the images of two conditionings, (2·K, 16, 128), one pair after another.

    Returns:
        per pair `moved`: how far the mean of the seeds moves from one to the other, in units of the factor's spread
        (shape: how far its shares move), without what it would move by chance; and the share of `valid` images.
    """
    count = len(ends) // 2
    seen = _measured(demo, ends, SEEDS_AT_ENDS)
    out = []
    for k in range(count):
        low, high = (
            {name: seen.factors[name].reshape(count, 2, SEEDS_AT_ENDS)[k, end] for name in FACTORS} for end in (0, 1)
        )
        moved = {name: _moved(high[name] - low[name]) / SPREAD for name in CONTINUOUS}
        shares = [
            _moved((high["shape"] == shape).float() - (low["shape"] == shape).float()) for shape in range(len(SHAPES))
        ]
        moved["shape"] = sum(shares) / 2 / DIFFERENT
        out.append({"moved": moved, "valid": float(seen.valid.float().reshape(count, -1)[k].mean())})
    return out


def _moved(differences: torch.Tensor) -> float:
    """Size of the mean of differences (N,), each of one seed: the root of an unbiased estimate of its square."""
    return float((differences.mean() ** 2 - differences.var() / len(differences)).clamp_min(0).sqrt())


def _stepped(demo: Demo, noun: str, vectors: torch.Tensor, strengths: np.ndarray) -> torch.Tensor:
    """Conditionings of the concept moved along (K, d) directions × strengths, in token norms, in this order."""
    text = compose(noun, []).text
    rows = demo.encode(text)[0]
    place = len(text.split())
    conditioning = rows.repeat(len(vectors), len(strengths), 1, 1)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    moves = unit[:, None, :] * torch.tensor(strengths)[None, :, None].float()
    conditioning[..., place, :] += rows[place].norm() * moves
    return conditioning.flatten(0, 1)


def _measured(demo: Demo, conditionings: torch.Tensor, seeds: int) -> Measurement:
    """Images of (K, 16, 128) conditionings × seeds, in this order; the same seeds for each."""
    noise = torch.randn(seeds, LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(7001))
    rows = conditionings.repeat_interleave(seeds, 0)
    return measure(demo.sample(rows, 0, noise.repeat(len(conditionings), 1, 1, 1)))


def purity(row: dict[str, Any]) -> float:
    """The share of a direction's movement that goes to its main factor."""
    moved = list(row["moved"].values())
    return max(moved) / max(sum(moved), 1e-9)


def coverage(table: list[dict[str, Any]]) -> int:
    """How many continuous factors some direction moves with |ρ| of at least 0.8."""
    return sum(any(abs(row["rho"][name]) >= 0.8 for row in table) for name in CONTINUOUS)


def directions() -> dict[str, Any]:
    """Purity and coverage of the leading six directions of each method."""
    demo, gradients = Demo.load("teacher"), collection("teacher", "thing")
    words, bare, moved = moves_of_words(demo, "thing")
    noise = torch.randn(LEADING, 1, gradients.flat.shape[1], generator=torch.Generator().manual_seed(0))
    methods = {
        "pca": lambda: fit_pca(gradients, significance=0, limit=LEADING)[0],
        "response": lambda: fit_response(gradients, significance=0, limit=LEADING)[0],
        "response_rotated": lambda: fit_response(gradients, significance=0, limit=LEADING, rotate=True)[0],
        "words": lambda: fit_words(gradients, words, bare, moved, significance=0, limit=LEADING),
        "sae": lambda: train_sae(gradients).directions,
        "random": lambda: Directions(noise, torch.ones(LEADING), {}, gradients.provenance),
    }
    figures: dict[str, Any] = {"purity": {}, "coverage": {}, "label_agreement": {}, "purity_by_direction": {}}
    for name, fit in methods.items():
        found = fit()
        table = movements(demo, "thing", found.vectors[:LEADING].flatten(1))
        named = []
        for row, suggested in zip(table, label(found, words, bare, moved), strict=False):
            main = max(row["moved"], key=lambda factor: row["moved"][factor])
            row["word"], row["word_score"] = suggested.best
            if row["moved"][main] >= MOVED:
                named.append(row["word"] in WORDS[main])
        figures["purity"][name] = float(np.mean([purity(row) for row in table]))
        figures["coverage"][name] = coverage(table)
        figures["label_agreement"][name] = [sum(named), len(named)]
        figures["purity_by_direction"][name] = table
        print(
            f"{name}: purity {figures['purity'][name]:.2f}, coverage {figures['coverage'][name]} of 5, "
            f"label right {sum(named)} of {len(named)}"
        )
        for row in table:
            rho = "  ".join(f"{key} {value:+.2f} ({row['moved'][key]:.2f})" for key, value in row["rho"].items())
            shape = f"shape ({row['moved']['shape']:.2f})  valid {row['valid']:.2f}"
            print(f"  {rho}  {shape}  {row['word']} {row['word_score']:+.2f}")
    return figures


def moves_of_words(demo: Demo, noun: str) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """The world's words (W), the concept's row without any (1, d), and with each put before it (W, 1, d)."""
    words = [word for some in WORDS.values() for word in some]
    moved = torch.stack([demo.encode(f"a {word} {noun}")[0, 3:4] for word in words])
    return words, demo.encode(f"a {noun}")[0, 2:3], moved


def purities() -> dict[str, Any]:
    """Purity of PCA's and of word directions on every concept of several open factors.

    Beside them `written`: the same pairs of words in the prompt, which is as purely as the model takes these words.
    """
    demo = Demo.load("teacher")
    kept = _folder("teacher") / "purity.partial.json"
    found: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.is_file() else {}
    for noun in [noun for noun in reversed(NOUNS) if len(open_factors(noun)) >= SEVERAL and noun not in found]:
        gradients = collection("teacher", noun)
        pca = fit_pca(gradients, significance=0, limit=LEADING)[0]
        between = fit_words(gradients, *moves_of_words(demo, noun), significance=0, limit=LEADING)
        pairs = [words.split(" → ") for words in between.names]
        ends = {
            "pca": _stepped(demo, noun, pca.vectors.flatten(1), STRENGTHS[[0, -1]]),
            "words": _stepped(demo, noun, between.vectors.flatten(1), STRENGTHS[[0, -1]]),
            "written": torch.cat([demo.encode(compose(noun, [word]).text) for pair in pairs for word in pair]),
        }
        tables = {name: moved_between(demo, two) for name, two in ends.items()}
        found[noun] = {name: float(np.mean([purity(row) for row in table])) for name, table in tables.items()}
        print(noun, {name: round(value, 2) for name, value in found[noun].items()}, flush=True)
        kept.write_text(json.dumps(found))
    kept.unlink()
    methods = ("pca", "words", "written")
    return {
        "purity_by_concept": found,
        "purity_over_concepts": {name: float(np.mean([row[name] for row in found.values()])) for name in methods},
    }


def complexity() -> dict[str, Any]:
    """Rank correlation of every estimate with the true number of open factors, on both models.

    Ours was chosen on these collections, among others; `held_out` has its figures.
    """
    truth = [len(open_factors(noun)) for noun in NOUNS]
    figures: dict[str, Any] = {}
    for model in ("teacher", "student"):
        ours = [estimate_lid(collection(model, noun, crossed=True)).dimension for noun in NOUNS]
        reports = [estimate_lid(collection(model, noun)) for noun in NOUNS]
        of_pairs = [report.dimension for report in reports]
        published = {
            "share": [report.ratio for report in reports],
            "gap": [report.gap for report in reports],
            "95": [report.variance95 for report in reports],
            "noise_floor": [report.estimate for report in reports],
        }
        end = "" if model == "teacher" else "_student"
        figures[f"lid_spearman_demo_in_sample{end}"] = _rank_correlation(truth, ours)
        figures[f"lid_spearman_demo_of_pairs{end}"] = _rank_correlation(truth, of_pairs)
        figures[f"lid_spearman_demo_published{end}"] = {
            name: _rank_correlation(truth, values) for name, values in published.items()
        }
        demo = Demo.load(model)
        images = [dimension_of_images(demo, noun) for noun in NOUNS]
        figures[f"lid_spearman_demo_of_images{end}"] = {
            "estimate": _rank_correlation(images, ours),
            "true": _rank_correlation(images, truth),
        }
        figures[f"lid_demo{end}"] = {
            noun: {"true": true, "estimate": value, "images": by_factors}
            for noun, true, value, by_factors in zip(NOUNS, truth, ours, images, strict=True)
        }
    return figures


def held_out() -> dict[str, Any]:
    """The rank correlation of our estimate on collections of other seeds: of each, and on average."""
    truth = [len(open_factors(noun)) for noun in NOUNS]
    figures: dict[str, Any] = {}
    for model, end in (("teacher", ""), ("student", "_student")):
        seeds = {}
        for seed in HELD_OUT:
            found = [estimate_lid(collection(model, noun, True, seed)).dimension for noun in NOUNS]
            seeds[seed] = float(spearmanr(truth, found)[0])
            print(model, seed, " ".join(f"{noun} {value:.1f}" for noun, value in zip(NOUNS, found, strict=True)))
        figures[f"lid_spearman_demo{end}"] = float(np.mean(list(seeds.values())))
        figures[f"lid_spearman_demo_by_seed{end}"] = seeds
    return figures


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's, or None where one does not vary at all."""
    return float(spearmanr(a, b)[0]) if len(set(b)) > 1 else None


def main() -> None:
    """Run a part and keep its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"directions": directions, "purity": purities, "complexity": complexity, "held_out": held_out}
    parser.add_argument("part", choices=parts)
    found = parts[parser.parse_args().part]()
    path = RESULTS / "estimators.json"
    figures = {**(json.loads(path.read_text()) if path.is_file() else {}), **found}
    path.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "purity_by_direction"}, indent=1))


if __name__ == "__main__":
    main()
