"""Quality of the significant subspace for the denoiser calls it costs, on the demo's teacher.

    python -m bench.efficiency               all of it
    python -m bench.efficiency --scale 100   a hundredth of every count, to see that it runs

Every call counts: a forward pass is one, a backward pass is one, and realizations cost their steps. The published
recipe (10,000 realizations of 20 steps, 30,000 gradients of random pairs) is held against cheaper ones. All are
compared with a reference of other realizations and other noise, by reconstruction and hallucination
(elrond_core.measure.subspace), for two sets of directions:

* significant: those of the published rule, by which each sample decides for itself how many it has;
* all: as many as stand above the reference's noise floor (elrond_core.dimension), the same number for every sample.

Latents and gradients are kept in bench/results/collections, under the digest of the weights, and a second run goes on
where the first stopped. Figures go to bench/results/gradients.json, under `evaluations`, the table to
docs/efficiency.md, the curves to docs/pictures/efficiency.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demo import host as demo_host

# isort: split
import comfy.utils
import safetensors.torch
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.covariance import ledoit_wolf

from demo.evaluate import SETTINGS, Demo
from demo.host_model import LATENT_CHANNELS, WEIGHTS

PACK = demo_host.pack()
from comfyui_elrond.elrond_core.collect.differentiate import gradient  # noqa: E402
from comfyui_elrond.elrond_core.decompose.moments import Moments  # noqa: E402
from comfyui_elrond.elrond_core.decompose.pca import fit_pca  # noqa: E402
from comfyui_elrond.elrond_core.decompose.sae_training import train_sae  # noqa: E402
from comfyui_elrond.elrond_core.dimension.report import estimate_lid  # noqa: E402
from comfyui_elrond.elrond_core.gradients import Gradients  # noqa: E402
from comfyui_elrond.elrond_core.measure.quality import FIRST, split_half_quality  # noqa: E402
from comfyui_elrond.elrond_core.measure.subspace import hallucination, reconstruction  # noqa: E402
from comfyui_elrond.elrond_core.provenance import Provenance  # noqa: E402
from comfyui_elrond.elrond_core.seeding import generator, normal  # noqa: E402
from comfyui_elrond.nodes import host  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "gradients.json"
PICTURE = ROOT / "docs" / "pictures" / "efficiency.png"
PAGE = ROOT / "docs" / "efficiency.md"
BEGIN, END = "<!-- figures: bench/efficiency.py writes what follows -->", "<!-- end of figures -->"
NOUN = "person"
SHAPE = (LATENT_CHANNELS, 8, 8)
# Items a batch: samples without gradients are faster in larger ones.
GRADED, SAMPLED = 64, 256
# Sources or realizations between two savings.
PART = 1024
# The published recipe, and how often it and every other one is repeated.
REALIZATIONS, GRADIENTS, REPEATS, SEEDS = 10_000, 30_000, 2, 3
# The reference: gradients of so many noises, with 4 targets each out of other realizations.
OTHERS, SOURCES, TARGETS = 4_000, 10_000, 4
# What the paper prints of reconstruction and hallucination has two decimals.
TOLERANCE = 0.005
HERE = Provenance(family="Demo", concept=NOUN)


@dataclass
class Samples:
    """Gradients of one recipe, in the order in which it would make them.

    Attributes:
        vectors: float32 (S, T, d), T of each of S sources.
        before: calls that the realizations cost.
        each: calls that a source costs.
        targets: int64 (S, T), the realization each was compared with; empty where there is none.
        own: float32 (S, d); with it `vectors` are the columns of a factor of each source's second moment, and `own`
            is what the mean of its gradients contributes.
    """

    vectors: torch.Tensor
    before: int
    each: int
    targets: torch.Tensor
    own: torch.Tensor | None = None

    def calls(self, sources: int) -> int:
        """All calls for so many sources."""
        return self.before + sources * self.each

    def moments(self, sources: int) -> Moments:
        """Moments of the gradients of the first sources."""
        flat = self.vectors[:sources].flatten(0, 1).double()
        if self.own is None:
            return Moments.of(as_gradients(flat))
        own = Moments.of(as_gradients(self.own[:sources]))
        # As many as there are vectors, of which its rank is; the scale of a covariance changes no direction.
        return replace(own, count=len(flat), scatter=flat.T @ flat + own.scatter)


def as_gradients(
    flat: torch.Tensor, sources: torch.Tensor | None = None, targets: torch.Tensor | None = None
) -> Gradients:
    """Vectors (N, d) as gradients of one row."""
    places = torch.arange(len(flat))
    return Gradients(
        flat[:, None].float(),
        torch.ones(len(flat)),
        places if sources is None else sources,
        places if targets is None else targets,
        HERE,
        torch.empty(0, 1, flat.shape[1]),
    )


class Bench:
    """The teacher, and a store of everything that was computed with it."""

    def __init__(self, scale: int) -> None:
        self.scale = scale
        self.demo = Demo.load("teacher")
        self.positive = (
            next(node for node in PACK.NODES if node.define_schema().node_id == "ElrondEncodeConcept")
            .execute(self.demo.clip, f"a [{NOUN}]", "", 1)
            .args[0]
        )
        self.sigma = host.sigma_of(self.demo.model, 1.0)
        self.weights = hashlib.blake2b((WEIGHTS / "teacher.safetensors").read_bytes(), digest_size=6).hexdigest()
        self.folder = ROOT / "bench" / "results" / "collections" / f"efficiency {self.weights} {scale}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def count(self, full: int) -> int:
        """A count at the scale of this run."""
        return max(2, full // self.scale)

    def kept(
        self, name: str, count: int, make: Callable[[list[int]], torch.Tensor], batch: int = GRADED
    ) -> torch.Tensor:
        """`make` of the indices 0 … count - 1, in parts that are computed once."""
        out = []
        for start in range(0, count, PART):
            indices = list(range(start, min(count, start + PART)))
            path = self.folder / f"{name} {start} {indices[-1]}.safetensors"
            if not path.is_file():
                parts = [make(indices[i : i + batch]) for i in range(0, len(indices), batch)]
                safetensors.torch.save_file({"values": torch.cat(parts).contiguous()}, path)
                print(f"{name}: {indices[-1] + 1} of {count}", flush=True)
            out.append(safetensors.torch.load_file(path)["values"])
        return torch.cat(out)

    def realizations(
        self, seed: int, count: int, steps: int = SETTINGS["teacher"].steps, sampler: str = "euler"
    ) -> torch.Tensor:
        """Latents (count, 16, 8, 8) of the concept; number i depends on the seed and i only."""

        def make(indices: list[int]) -> torch.Tensor:
            empty = torch.zeros(len(indices), *SHAPE)
            with torch.inference_mode():
                made = host.sample(
                    self.demo.model,
                    self.positive,
                    None,
                    empty,
                    indices[0],
                    seed,
                    steps,
                    self.demo.settings.cfg,
                    sampler,
                    "simple",
                )
            return made.float().clone()

        return self.kept(f"realizations {seed} {steps} {sampler}", count, make, SAMPLED)

    def sample(self, model: Any, empty: torch.Tensor, first: int, seed: int, steps: int, sampler: str) -> torch.Tensor:
        """Latents of the concept, as Sample Realizations makes them."""
        return host.sample(
            model, self.positive, None, empty, first, seed, steps, self.demo.settings.cfg, sampler, "simple"
        )

    def calls_of(self, steps: int, sampler: str) -> int:
        """Denoiser calls of one realization, counted."""
        calls = 0

        def wrapper(apply: Any, given: dict[str, Any]) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return apply(given["input"], given["timestep"], **given["c"])

        model = self.demo.model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        with torch.inference_mode():
            self.sample(model, torch.zeros(1, *SHAPE), 0, 0, steps, sampler)
        return calls

    def gradients(
        self,
        name: str,
        count: int,
        noise: Callable[[list[int]], torch.Tensor],
        targets: Callable[[list[int]], torch.Tensor],
    ) -> torch.Tensor:
        """Gradients (count, T, d) at noises (B, …) towards targets (T, B, …), both given by the indices.

        At the teacher's highest noise level nothing is left of the realization that is noised, so zeros stand for it.
        """

        def make(indices: list[int]) -> torch.Tensor:
            def work(denoiser: host.HostDenoiser, latents: torch.Tensor) -> torch.Tensor:
                start = latents[:1].expand(len(indices), *SHAPE)
                found, _ = gradient(denoiser, start, targets(indices), noise(indices), self.sigma)
                return found.transpose(0, 1).flatten(2)

            return host.with_denoiser(
                self.demo.model, self.positive, None, self.demo.settings.cfg, torch.zeros(1, *SHAPE), 0, work
            )

        return self.kept(name, count, make)


def white(seed: int) -> Callable[[list[int]], torch.Tensor]:
    """Independent noise for every index."""
    return lambda indices: normal(SHAPE, seed, "noise", indices)


def antithetic(seed: int) -> Callable[[list[int]], torch.Tensor]:
    """Every odd index has the noise of the one before it, negated."""
    return lambda indices: torch.stack([normal(SHAPE, seed, "noise", [i // 2])[0] * (-1) ** i for i in indices])


def sobol(seed: int) -> Callable[[list[int]], torch.Tensor]:
    """A scrambled Sobol sequence as normal noise."""
    size = math.prod(SHAPE)

    def draw(indices: list[int]) -> torch.Tensor:
        engine = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed)
        engine.fast_forward(indices[0])
        # Away from 0 and 1, which have no quantile.
        even = engine.draw(len(indices)).double().clamp(1e-7, 1 - 1e-7)
        return torch.special.ndtri(even).float().reshape(-1, *SHAPE)

    return draw


def drawn(count: int, targets: int, seed: int) -> Callable[[list[int]], torch.Tensor]:
    """Random realizations (T, B), those of one index distinct."""
    return lambda indices: torch.stack(
        [torch.randperm(count, generator=generator(seed, "target", i))[:targets] for i in indices], dim=1
    )


def mixed(mean: torch.Tensor, factor: torch.Tensor, seed: int) -> Callable[[list[int]], torch.Tensor]:
    """Normal latents (1, B, …) of a mean (n,) and a factor (n, r) of a covariance."""

    def draw(indices: list[int]) -> torch.Tensor:
        weights = normal((factor.shape[1],), seed, "weights", indices)
        return (mean + weights @ factor.T).reshape(1, -1, *SHAPE)

    return draw


def root(covariance: torch.Tensor) -> torch.Tensor:
    """A factor L, LLᵀ = covariance, with columns in order of length."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()).flip(1)


class Recipes:
    """Ways to spend calls; each is one `Samples` a seed."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.pool = bench.realizations(1, bench.count(REALIZATIONS))
        self.steps = bench.calls_of(SETTINGS["teacher"].steps, "euler")

    def reference(self) -> Moments:
        """Moments of the reference, of realizations and noise that no recipe uses."""
        bench = self.bench
        pool = bench.realizations(2, bench.count(OTHERS))
        pick = drawn(len(pool), TARGETS, 2)
        found = bench.gradients("reference", bench.count(SOURCES), white(2), lambda i: pool[pick(i)])
        return Moments.of(as_gradients(found.flatten(0, 1)))

    def published(self) -> list[Samples]:
        """The published recipe, repeated with other targets at the same noises, each counted by itself.

        They share the realizations and the noises, which is a small part of their variance and saves most of the time.
        """
        bench = self.bench
        pick = drawn(len(self.pool), REPEATS, 1)
        found = bench.gradients("published", bench.count(GRADIENTS), white(1), lambda i: self.pool[pick(i)])
        targets = pick(list(range(len(found))))
        return [
            Samples(found[:, t : t + 1], len(self.pool) * self.steps, 2, targets[t][:, None]) for t in range(REPEATS)
        ]

    def some(self, count: int, seed: int) -> torch.Tensor:
        """The realizations of one seed, which no other seed has."""
        return self.pool[seed * count : (seed + 1) * count]

    def pairs(
        self,
        name: str,
        realizations: int,
        count: int,
        noise: Callable[[int], Callable[[list[int]], torch.Tensor]] = white,
        targets: int = 1,
    ) -> list[Samples]:
        """Random pairs of few realizations."""
        out = []
        for seed in range(SEEDS):
            pool = self.some(self.bench.count(realizations), seed)
            pick = drawn(len(pool), targets, 100 + seed)
            found = self.bench.gradients(
                f"{name} {seed}",
                self.bench.count(count),
                noise(100 + seed),
                lambda i, pool=pool, pick=pick: pool[pick(i)],  # type: ignore[misc]
            )
            owners = pick(list(range(len(found)))).T
            out.append(Samples(found, len(pool) * self.steps, 1 + targets, owners))
        return out

    def quick(self, name: str, realizations: int, count: int, steps: int, sampler: str) -> list[Samples]:
        """Random pairs of realizations of fewer steps."""
        out = []
        for seed in range(SEEDS):
            pool = self.bench.realizations(200 + seed, self.bench.count(realizations), steps, sampler)
            pick = drawn(len(pool), 1, 100 + seed)
            found = self.bench.gradients(
                f"{name} {seed}",
                self.bench.count(count),
                white(100 + seed),
                lambda i, pool=pool, pick=pick: pool[pick(i)],  # type: ignore[misc]
            )
            before = len(pool) * self.bench.calls_of(steps, sampler)
            out.append(Samples(found, before, 2, pick(list(range(len(found)))).T))
        return out

    def fitted(
        self, name: str, realizations: int, count: int, fit: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[Samples]:
        """Normal targets of the mean of few realizations and a covariance that `fit` makes of them (m, n)."""
        out = []
        for seed in range(SEEDS):
            pool = self.some(self.bench.count(realizations), seed).flatten(1)
            make = mixed(pool.mean(0), fit(pool.double()).float(), 100 + seed)
            found = self.bench.gradients(f"{name} {seed}", self.bench.count(count), white(100 + seed), make)
            out.append(Samples(found, len(pool) * self.steps, 2, torch.empty(0)))
        return out

    def integrated(self, name: str, realizations: int, count: int, leading: int) -> list[Samples]:
        """Targets integrated: the leading columns of the covariance's factor, and one random mixture of the others.

        Given J, the second moment of a gradient is (4/n²)·Jᵀ(Σ + (x̂0 - μ)(x̂0 - μ)ᵀ)J.
        """
        out = []
        for seed in range(SEEDS):
            pool = self.some(self.bench.count(realizations), seed).flatten(1).double()
            mean, factor = pool.mean(0).float(), root(torch.cov(pool.T)).float()
            rest = mixed(mean, factor[:, leading:], 100 + seed)
            ahead = torch.cat([mean[None], mean + factor[:, :leading].T]).reshape(-1, 1, *SHAPE)
            found = self.bench.gradients(
                f"{name} {seed}",
                self.bench.count(count),
                white(100 + seed),
                lambda i, ahead=ahead, rest=rest: torch.cat(  # type: ignore[misc]
                    [ahead.expand(-1, len(i), *SHAPE), rest(i)]
                ),
            )
            own, columns = found[:, 0], found[:, 1:] - found[:, :1]
            before = len(pool) * self.steps
            out.append(Samples(columns, before, 3 + leading, torch.empty(0), own))
        return out

    def all(self) -> Iterator[tuple[str, list[Samples]]]:
        """Every recipe but the published one."""
        for count, most in ((64, 2048), (256, 4096), (1024, 2560)):
            yield f"{count} realizations", self.pairs(f"few {count}", count, most)
        few, most = 256, 1024
        yield "4 targets a source", self.pairs("targets", few, most // 2, targets=4)
        yield "antithetic noise", self.pairs("antithetic", few, most, antithetic)
        yield "Sobol noise", self.pairs("sobol", few, most, sobol)
        yield "normal targets", self.fitted("normal", few, most, lambda x: root(torch.cov(x.T)))
        yield (
            "normal targets, shrunk covariance",
            self.fitted("shrunk", few, most, lambda x: root(torch.from_numpy(ledoit_wolf(x.numpy())[0]))),
        )
        yield "normal targets, 16 factors", self.fitted("factors", few, most, lambda x: root(torch.cov(x.T))[:, :16])
        for leading in (4, 16):
            name = f"targets integrated, {leading} factors"
            yield name, self.integrated(f"integrated {leading}", few, 2 * most // (3 + leading), leading)
        yield "3072 realizations, targets integrated", self.integrated("integrated 3072", 3072, 512, 8)
        yield "realizations of 8 steps", self.quick("quick euler", few, most, 8, "euler")
        yield "realizations of 5 steps, UniPC", self.quick("quick unipc", few, most, 5, "uni_pc")
        # The largest comes to a tenth of the published recipe's calls.
        yield "1024 realizations of 5 steps, UniPC", self.quick("quick 1024", 1024, 10_240, 5, "uni_pc")


@dataclass
class Truth:
    """Bases that samples are compared with."""

    significant: torch.Tensor
    all: torch.Tensor
    ordered: torch.Tensor

    @classmethod
    def of(cls, moments: Moments) -> Truth:
        """Those of the reference; `ordered` are its components down to no variance."""
        ordered = basis(moments, 0)
        return cls(basis(moments), ordered[: max(1, estimate_lid(moments).estimate)], ordered)

    def compare(self, moments: Moments) -> dict[str, dict[str, float]]:
        """Reconstruction and hallucination of a sample, for both sets."""
        spans = {
            "significant": (self.significant, basis(moments)),
            "all": (self.all, basis(moments, 0)[: len(self.all)]),
        }
        return {
            name: {"reconstruction": reconstruction(r, s), "hallucination": hallucination(r, s)}
            for name, (r, s) in spans.items()
        }


def basis(moments: Moments, significance: float = 2.5) -> torch.Tensor:
    """Principal components, orthonormal (k, d): the significant ones, or with 0 all."""
    found, _ = fit_pca(moments, significance=significance, limit=moments.size)
    return found.vectors.flatten(1).double()


def curve(truth: Truth, samples: list[Samples]) -> list[dict[str, Any]]:
    """Points of a recipe, at sizes that double: calls, and means and standard deviations over the seeds."""
    whole = len(samples[0].vectors)
    sizes = sorted({whole >> step for step in range(whole.bit_length() - 6)} or {whole})
    points = []
    for size in sizes:
        seen = [truth.compare(sample.moments(size)) for sample in samples]
        point: dict[str, Any] = {"sources": size, "calls": samples[0].calls(size)}
        for name in ("significant", "all"):
            for measure in ("reconstruction", "hallucination"):
                values = torch.tensor([one[name][measure] for one in seen], dtype=torch.float64)
                point[f"{name} {measure}"] = float(values.mean())
                point[f"{name} {measure} spread"] = float(values.std())
        points.append(point)
    return points


def reaches(point: dict[str, Any], goal: dict[str, Any], tolerance: float) -> bool:
    """Whether a point has the quality of another for both sets of directions."""
    return all(
        point[f"{name} reconstruction"] >= goal[f"{name} reconstruction"] - tolerance
        and point[f"{name} hallucination"] <= goal[f"{name} hallucination"] + tolerance
        for name in ("significant", "all")
    )


def cheapest(curves: dict[str, list[dict[str, Any]]], goal: dict[str, Any], tolerance: float) -> dict[str, Any] | None:
    """The recipe with the fewest calls that reaches a goal from there on, None if none does."""
    found = []
    for name, points in curves.items():
        ahead = [reaches(point, goal, tolerance) for point in points]
        first = next((i for i in range(len(points)) if all(ahead[i:])), None)
        if first is not None:
            found.append({"recipe": name, **points[first]})
    return min(found, key=lambda point: point["calls"], default=None)


def running(truth: Truth, samples: list[Samples]) -> list[dict[str, float]]:
    """What a collection would estimate of itself as it grows, beside the truth.

    Returns:
        per size `estimate`, of the share of the significant directions' span that is `right`: that lies in as many
        leading ones of the reference.
    """
    rows = []
    for seed, sample in enumerate(samples):
        size = FIRST
        while size * sample.vectors.shape[1] <= sample.vectors[..., 0].numel():
            flat = sample.vectors[:size].flatten(0, 1)
            sources = torch.arange(size).repeat_interleave(sample.vectors.shape[1])
            gradients = as_gradients(flat, sources, sample.targets[:size].flatten())
            found = basis(Moments.of(gradients))
            rows.append(
                {
                    "seed": seed,
                    "gradients": len(flat),
                    "directions": len(found),
                    "estimate": split_half_quality(gradients),
                    "right": reconstruction(truth.ordered[: len(found)], found),
                }
            )
            size *= 2
    return rows


def anatomy(truth: Truth, samples: list[Samples]) -> dict[str, float]:
    """Where the error of the significant directions comes from.

    To first order the error of a component i is Σ_j m_ij² over the others j, m_ij being the mean over the gradients of
    (v_i·g)(v_j·g)/(λ_i - λ_j). Its variance has a part that gradients of one source have in common, through J; one that
    gradients towards one realization have in common; and one of each pair by itself.

    Returns:
        `source`, `target` and `pair`: 1 - reconstruction is source/S + target/m + pair/N, with S sources, m
        realizations and N gradients; `expected` is that for the published recipe.
    """
    vectors = torch.cat([sample.vectors for sample in samples], dim=1)
    sources, repeats, _ = vectors.shape
    flat = (vectors - vectors.mean((0, 1))).flatten(0, 1).double() @ truth.ordered.T
    values = flat.square().mean(0)
    kept = len(truth.significant)
    gaps = values[:kept, None] - values[kept:]
    products = (flat[:, :kept, None] * flat[:, None, kept:] / gaps).flatten(1)
    products -= products.mean(0)
    targets = torch.cat([sample.targets for sample in samples], dim=1).flatten()
    owners = torch.arange(sources).repeat_interleave(repeats)
    each = products.square().sum(1)

    def common(groups: torch.Tensor) -> float:
        """Mean product of two of one group."""
        counts = torch.bincount(groups).double()
        sums = torch.zeros(len(counts), products.shape[1], dtype=torch.float64).index_add_(0, groups, products)
        return float((sums.square().sum() - each.sum()) / (counts * (counts - 1)).sum()) / kept

    source, target = common(owners), common(targets)
    pair = float(each.mean()) / kept - source - target
    realizations = int(targets.max()) + 1
    expected = source / sources + target / realizations + pair / sources
    return {"source": source, "target": target, "pair": pair, "expected": expected}


def autoencoder(vectors: torch.Tensor) -> list[dict[str, float]]:
    """How a sparse autoencoder's atoms settle with more gradients (N, d).

    Returns:
        per number of gradients its `fvu`; the `stability`, mean best cosine of its atoms with those of an autoencoder
        of as many other gradients; and what `chance` makes of that, the same with other gradients for atoms.
    """
    half = 2 * len(vectors) // 5
    parts, rest = (vectors[:half], vectors[half : 2 * half]), vectors[2 * half :]
    rows = []
    for step in reversed(range(5)):
        count = half >> step
        trained = [train_sae(as_gradients(part[:count])) for part in parts]
        one, other = (result.directions.vectors.flatten(1) for result in trained)
        units = torch.nn.functional.normalize(rest[: len(other)], dim=1)
        rows.append(
            {
                "gradients": count,
                "fvu": trained[0].report.fvu,
                "stability": float((one @ other.T).amax(1).mean()),
                "chance": float((one @ units.T).amax(1).mean()),
            }
        )
        print(rows[-1], flush=True)
    return rows


def draw(curves: dict[str, list[dict[str, Any]]], published: list[dict[str, Any]], path: Path) -> None:
    """Errors over calls, both logarithmic."""
    figure = Figure(figsize=(11, 8), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True)
    for row, name in zip(panels, ("significant", "all"), strict=True):
        for axes, measure in zip(row, ("reconstruction", "hallucination"), strict=True):
            for number, (title, points) in enumerate({**curves, "published": published}.items()):
                values = [point[f"{name} {measure}"] for point in points]
                errors = [1 - value if measure == "reconstruction" else value for value in values]
                style = {"color": "black", "linewidth": 2} if title == "published" else {"color": f"C{number % 10}"}
                line = "-o" if number < 10 else "--o"
                calls = [point["calls"] for point in points]
                axes.loglog(calls, errors, line, markersize=3, label=title, **style)
            axes.set(xlabel="denoiser calls", ylabel=f"{'1 - ' if measure == 'reconstruction' else ''}{measure}")
            axes.set_title(f"{name} directions", fontsize=10)
            axes.grid(alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(str(path))


def text(figures: dict[str, Any]) -> str:
    """The figures as a page shows them."""
    found = figures["evaluations"]
    lines = [
        "| recipe | calls | significant: 1 - reconstruction | hallucination | all: the same | the same |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, points in {"published": found["published"], **found["recipes"]}.items():
        last = points[-1]
        cells = [
            f"{1 - last[f'{kind} reconstruction']:.2g} | {last[f'{kind} hallucination']:.2g}"
            for kind in ("significant", "all")
        ]
        lines.append(f"| {name} | {last['calls']:,} | {cells[0]} | {cells[1]} |")
    counts = found["directions"]
    lines += [
        "",
        f"Means over {REPEATS} repetitions of the published recipe and {SEEDS} of every other, at the largest size of "
        f"each; {counts['significant']} directions are significant, {counts['all']} are compared in all.",
        "",
    ]
    whole = found["published"][-1]["calls"]
    for point, how in (
        (found["equal_quality"], f"to within {TOLERANCE} of the published recipe's four figures"),
        (found["equal_quality_without_tolerance"], "to at least the published recipe's four figures"),
    ):
        if point is None:
            lines.append(f"- No cheaper recipe here comes {how}.")
        else:
            ratio = whole / point["calls"]
            lines.append(f"- The cheapest {how}: {point['recipe']}, {point['calls']:,} calls, {ratio:.1f} times fewer.")
    parts = found["anatomy"]
    total = parts["source"] + parts["target"] + parts["pair"]
    shares = ", ".join(f"{parts[name] / total:.0%} {name}" for name in ("source", "target", "pair"))
    lines.append(
        f"- Where the error of one significant gradient comes from: {shares}. With S sources, m realizations and N "
        f"gradients 1 - reconstruction is {parts['source']:.2g}/S + {parts['target']:.2g}/m + {parts['pair']:.2g}/N, "
        f"for the published recipe {parts['expected']:.1g}."
    )
    rows = [row for rows in found["running_estimate"].values() for row in rows]
    errors = torch.tensor([[1 - row["estimate"], 1 - row["right"]] for row in rows])
    low, high = (errors[:, 0] / errors[:, 1]).quantile(torch.tensor([0.1, 0.9])).tolist()
    lines.append(
        f"- The error that `target_quality` would have estimated, of {len(rows)} samples of {FIRST} gradients and "
        f"more, is between {low:.2f} and {high:.2f} times the true one in eight of ten."
    )
    rows = found["sparse_autoencoder"]
    atoms = ", ".join(f"{row['stability']:.2f} ({row['chance']:.2f}) from {row['gradients']:,}" for row in rows)
    lines.append(
        "- Atoms of a sparse autoencoder find their like in those of one trained on other gradients with a mean cosine "
        f"of {atoms} gradients; in brackets what single gradients in the place of atoms come to."
    )
    lines += ["", "![errors over calls](pictures/efficiency.png)"]
    return "\n".join(lines)


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=int, default=1, help="divide every count by this, and keep no figures")
    scale = parser.parse_args().scale
    comfy.utils.PROGRESS_BAR_ENABLED = False
    bench = Bench(scale)
    recipes = Recipes(bench)
    truth = Truth.of(recipes.reference())
    print(f"reference: {len(truth.significant)} significant directions, {len(truth.all)} in all", flush=True)
    samples = dict(recipes.all())
    published = recipes.published()
    curves = {name: curve(truth, found) for name, found in samples.items()}
    whole = curve(truth, published)
    goal = whole[-1]
    equal, strict = cheapest(curves, goal, TOLERANCE), cheapest(curves, goal, 0.0)
    figures: dict[str, Any] = {
        "evaluations_ratio_equal_quality": goal["calls"] / equal["calls"] if equal else None,
        "evaluations": {
            "weights": bench.weights,
            "directions": {"significant": len(truth.significant), "all": len(truth.all)},
            "published": whole,
            "recipes": curves,
            "tolerance": TOLERANCE,
            "equal_quality": equal,
            "equal_quality_without_tolerance": strict,
            "running_estimate": {
                name: running(truth, samples[name])
                for name in ("64 realizations", "256 realizations", "1024 realizations", "4 targets a source")
            },
            "anatomy": anatomy(truth, published),
            "sparse_autoencoder": autoencoder(published[0].vectors[:, 0]),
        },
    }
    for name, points in {**curves, "published": whole}.items():
        last = points[-1]
        print(
            f"{name}: {last['calls']} calls, "
            + ", ".join(f"{k} {v:.6f}" for k, v in last.items() if k not in ("calls", "sources")),
        )
    for name in ("anatomy", "running_estimate"):
        print(name, figures["evaluations"][name])
    print(
        "ratio", figures["evaluations_ratio_equal_quality"], "by", equal and equal["recipe"], equal and equal["calls"]
    )
    print("without tolerance", strict and (strict["recipe"], strict["calls"]))
    if scale == 1:
        others = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        RESULTS.write_text(json.dumps({**others, **figures}, indent=1, sort_keys=True) + "\n")
        before, _, after = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        page = f"{before}{BEGIN}\n{text(figures)}\n{END}{after.partition(END)[2]}"
        PAGE.write_text(page, encoding="utf-8")
        draw(curves, whole, PICTURE)
    else:
        print(text(figures))
        draw(curves, whole, bench.folder / "small.png")


if __name__ == "__main__":
    main()
