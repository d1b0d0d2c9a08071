"""How right the estimators are on data whose truth is known: the sparse autoencoder and the intrinsic dimension.

    python -m bench.estimators sae            a known dictionary: atoms recovered, FVU, time
    python -m bench.estimators sae --peers    and the same of public implementations, if they are installed
    python -m bench.estimators lid            gradients of known rank: within 10 %, coverage, and what the others do
    python -m bench.estimators memory         peak of a process that works on 30,000 gradients of 2,048 values
    python -m bench.estimators drift          ratios of the estimates to the rank over the number of gradients
    python -m bench.estimators summary        the figures of bench/results/estimators.json as text

Every finished trial is kept in bench/results/estimators_trials.jsonl, and a second run goes on where the first stopped.
`drift` only reads them; its tables go to docs/estimators.md, its picture to docs/pictures/drift.png.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.cm
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from elrond_core.decompose.moments import Moments
from elrond_core.decompose.pca import fit_pca
from elrond_core.decompose.response import fit_response
from elrond_core.decompose.sae_training import TrainConfig, train_sae
from elrond_core.dimension.noise import edge_of_noise
from elrond_core.dimension.report import estimate_lid
from elrond_core.gradients import Gradients
from elrond_core.provenance import Provenance

RESULTS = Path(__file__).parent / "results" / "estimators.json"
TRIALS = RESULTS.with_name("estimators_trials.jsonl")
PAGE = Path(__file__).parents[1] / "docs" / "estimators.md"
PICTURE = PAGE.parent / "pictures" / "drift.png"
BEGIN, END = "<!-- tables: bench/estimators.py writes what follows -->", "<!-- end of tables -->"
HERE = Provenance(family="synthetic")

ATOMS, WIDTH, ACTIVE, SAMPLES, NOISE = 256, 128, 5, 20_000, 0.02
LATENTS, STEPS, BATCH, RATE, TURNS = 512, 3000, 512, 1e-3, 5

SIZES, COUNTS, RANKS = (64, 768, 2048), (250, 1000, 4000, 30_000), (0, 4, 16, 64)
NOISES = ("isotropic", "anisotropic")
# The weakest signal's variance as a multiple of the least that so many gradients can show.
MARGINS = (0.5, 1.5, 2.0, 3.0)
# Where a trial, as `lid_trials` gives it, keeps its estimates.
ESTIMATES = {"ours": 5, "C/d": 9, "largest gap": 10, "95 %": 11}


def load() -> dict[str, Any]:
    """Trials that were finished, by name."""
    lines = TRIALS.read_text().splitlines() if TRIALS.is_file() else []
    return dict(json.loads(line) for line in lines)


def keep(key: str, value: object) -> None:
    """Add a finished trial."""
    TRIALS.parent.mkdir(exist_ok=True)
    with TRIALS.open("a") as file:
        file.write(json.dumps([key, value]) + "\n")


def as_gradients(vectors: torch.Tensor) -> Gradients:
    """Vectors (N, d) as gradients of one row."""
    places = torch.zeros(len(vectors), dtype=torch.int64)
    return Gradients(
        vectors[:, None].float(), torch.ones(len(vectors)), places, places, HERE, torch.empty(0, 1, vectors.shape[1])
    )


def sparse_data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A dictionary of unit atoms (256, 128) and samples (20,000, 128) of five atoms each, with 2 % noise."""
    g = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(ATOMS, WIDTH, generator=g), dim=1)
    places = torch.rand(SAMPLES, ATOMS, generator=g).topk(ACTIVE, dim=1).indices
    values = torch.zeros(SAMPLES, ATOMS).scatter(1, places, 0.5 + torch.rand(SAMPLES, ACTIVE, generator=g))
    clean = values @ dictionary
    noise = torch.randn(SAMPLES, WIDTH, generator=g) * clean.norm(dim=1).mean() / math.sqrt(WIDTH)
    return dictionary, clean + NOISE * noise


def recovered(dictionary: torch.Tensor, found: torch.Tensor) -> float:
    """Share of atoms to which some found unit vector has a cosine of at least 0.95."""
    return float(((dictionary @ found.T).amax(1) >= 0.95).float().mean())


def ours(samples: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Our atoms and FVU."""
    epochs = round(STEPS / math.ceil(SAMPLES / BATCH))
    config = TrainConfig(latents=LATENTS, k=ACTIVE, epochs=epochs, learning_rate=RATE, batch_size=BATCH)
    directions, report, _ = train_sae(as_gradients(samples), config)
    return directions.vectors[:, 0], report.fvu


def overcomplete(samples: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The TopK autoencoder of PyPI's `overcomplete`, trained as its documentation shows, on the same budget."""
    # Its plots ask for a function that matplotlib no longer has.
    vars(matplotlib.cm).setdefault("get_cmap", matplotlib.colormaps.get_cmap)
    sae = importlib.import_module("overcomplete.sae")
    torch.manual_seed(0)
    model = sae.TopKSAE(WIDTH, nb_concepts=LATENTS, top_k=ACTIVE, device="cpu")
    adam = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, STEPS)
    for batch in _batches(samples):
        adam.zero_grad()
        _, _, reconstruction = model(batch)
        torch.nn.functional.mse_loss(reconstruction, batch).backward()
        adam.step()
        schedule.step()
    with torch.no_grad():
        rest = (samples - model.eval()(samples)[2]).square().sum()
        return model.get_dictionary().detach(), float(rest / (samples - samples.mean(0)).square().sum())


def dictionary_learning(samples: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The TopK autoencoder and trainer (with AuxK) of PyPI's `dictionary-learning`, on the same budget."""
    top_k = importlib.import_module("dictionary_learning.trainers.top_k")
    trainer = top_k.TopKTrainer(
        steps=STEPS,
        activation_dim=WIDTH,
        dict_size=LATENTS,
        k=ACTIVE,
        layer=0,
        lm_name="",
        lr=RATE,
        warmup_steps=round(0.03 * STEPS),
        decay_start=round(0.6 * STEPS),
        seed=0,
        device="cpu",
    )
    for step, batch in enumerate(_batches(samples)):
        trainer.update(step, batch)
    with torch.no_grad():
        rest = (samples - trainer.ae(samples)).square().sum()
        atoms = torch.nn.functional.normalize(trainer.ae.decoder.weight.T, dim=1)
        return atoms, float(rest / (samples - samples.mean(0)).square().sum())


def _batches(samples: torch.Tensor) -> Iterator[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        place = step * BATCH % SAMPLES
        if place < BATCH:
            order = torch.randperm(SAMPLES, generator=g)
        yield samples[order[place : place + BATCH]]


PEERS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, float]]] = {
    "overcomplete": overcomplete,
    "dictionary_learning": dictionary_learning,
}


def run_sae(peers: bool) -> None:
    """Train every implementation and keep atoms recovered and FVU of each, and the median of its seconds in turn."""
    dictionary, samples = sparse_data()
    seconds: dict[str, list[float]] = {}
    for turn in range(TURNS):
        for name, train in {"ours": ours, **(PEERS if peers else {})}.items():
            start = time.process_time()
            found, fvu = train(samples)
            seconds.setdefault(name, []).append(time.process_time() - start)
            median = float(np.median(seconds[name]))
            result = {"recovered": recovered(dictionary, found), "fvu": fvu, "seconds": median}
            print(turn + 1, name, result, flush=True)
            if turn == TURNS - 1:
                keep(f"sae/{name}", result)


def noise_variances(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Variances of the noise, of mean 1: all equal, or uniform between 0.7 and 1.3."""
    variances = np.ones(size) if kind == "isotropic" else rng.uniform(0.7, 1.3, size)
    return variances / variances.mean()


def least_visible(variances: np.ndarray, samples: int) -> float:
    """The variance, noise included, from which on a direction stands out of the noise (Baik, Ben Arous, Péché)."""
    low, high = variances.max(), variances.max() * (2 + math.sqrt(len(variances) / samples)) + 1
    for _ in range(80):
        middle = (low + high) / 2
        below = ((variances / (middle - variances)) ** 2).sum() > samples
        low, high = (middle, high) if below else (low, middle)
    return high


def known_rank(
    size: int, count: int, rank: int, noise: str, margin: float, seed: int
) -> tuple[Gradients | Moments, np.ndarray]:
    """Gradients of known rank with power-law variances of the signal; as moments where there are more than values.

    Eigenvalues do not depend on the basis, so signal and noise lie along the axes. A scatter of many Gaussian
    gradients is drawn by its own law (Bartlett's decomposition). The second value is the noise's variances, (size -
    rank,).
    """
    rng = np.random.default_rng([size, count, rank, NOISES.index(noise), seed])
    variances = noise_variances(noise, size, rng)
    least = least_visible(variances, count - 1)
    variances[:rank] = 1 + margin * (least - 1) * rank / np.arange(1, rank + 1)
    below = variances[rank:]
    scale = np.sqrt(variances)
    if count <= size:
        return as_gradients(torch.from_numpy(rng.standard_normal((count, size)) * scale)), below
    factor = np.tril(rng.standard_normal((size, size)), -1)
    factor[np.diag_indices(size)] = np.sqrt(rng.chisquare(count - 1 - np.arange(size)))
    root = torch.from_numpy(scale[:, None] * factor)
    zero = torch.zeros(size, dtype=torch.float64)
    return Moments(1, size, HERE.with_(count=count), count, zero, root @ root.T), below


def oracle(eigenvalues: np.ndarray, noise: np.ndarray, samples: int, rank: int) -> tuple[float, float]:
    """Levels from the first to below the second, at which a cut finds the rank to within 10 %.

    Whoever knows the noise's variances would set the cut so: relative to the edge of the noise, in units of the
    fluctuation of its largest eigenvalue.
    """
    _, centre, scale = edge_of_noise(noise[None], samples - rank)
    levels = (eigenvalues * samples / (samples - rank) - centre) / scale
    slack = rank // 10
    return float(levels[rank + slack]), float(levels[rank - slack - 1])


def run_lid(sizes: list[int], counts: list[int], trials: int) -> None:
    """Every cell of the grid, `trials` times; a rank of half the width and more leaves no noise to measure.

    At rank 0 there is noise only.
    """
    done = load()
    cells = [
        (size, count, rank, noise, margin, seed)
        for size in sizes
        for seed in range(trials)
        for count in counts
        for rank in RANKS
        for noise in NOISES
        for margin in (MARGINS if rank else (1.0,))
        if rank < size / 2 and rank < count / 2
    ]
    for number, cell in enumerate(cells):
        key = "lid/" + "/".join(str(part) for part in cell)
        if key in done:
            continue
        source, below = known_rank(*cell)
        report = estimate_lid(source)
        _, count, rank = cell[:3]
        best = oracle(report.eigenvalues.numpy(), below, count - 1, rank) if rank else (0.0, 0.0)
        published = [report.ratio, report.gap, report.variance95]
        result = [report.estimate, *report.interval, report.detectable, *published, *best]
        print(f"{number + 1}/{len(cells)} {key} {result}", flush=True)
        keep(key, result)


def lid_trials(results: dict[str, Any]) -> list[tuple]:
    """The trials of known rank.

    Returns:
        size, number of gradients, rank, noise, margin; then what `run_lid` keeps: our estimate, its interval, whether
        it is detectable, the published estimates by share, by gap and to 95 %, and the oracle's two levels.
    """
    return [
        (int(parts[1]), int(parts[2]), int(parts[3]), parts[4], float(parts[5]), *value)
        for key, value in results.items()
        if (parts := key.split("/"))[0] == "lid"
    ]


def ratios(trials: list[tuple]) -> dict[tuple[int, int, int], dict[str, float]]:
    """Mean ratio of each estimate to the rank, by size, rank and number of gradients."""
    groups: dict[tuple[int, int, int], list[tuple]] = {}
    for trial in trials:
        groups.setdefault((trial[0], trial[2], trial[1]), []).append(trial)
    return {
        cell: {name: sum(t[place] for t in some) / len(some) / cell[1] for name, place in ESTIMATES.items()}
        for cell, some in sorted(groups.items())
    }


def table(found: dict[tuple[int, int, int], dict[str, float]]) -> list[str]:
    """Ratios as lines of Markdown, one for each size and rank; those of growing numbers of gradients in one cell."""
    lines = [f"| d | r | {' | '.join(ESTIMATES)} |", "| --- | --- |" + " --- |" * len(ESTIMATES)]
    for size, rank in sorted({cell[:2] for cell in found}):
        some = [means for cell, means in found.items() if cell[:2] == (size, rank)]
        cells = (
            " → ".join(f"{means[name]:.{1 if means[name] >= 9.95 else 2}f}" for means in some) for name in ESTIMATES
        )
        lines.append(f"| {size} | {rank} | {' | '.join(cells)} |")
    return lines


def drift(trials: list[tuple]) -> str:
    """Ratios of the estimates to the rank where the signal can be seen, as a page shows them."""
    counts = " → ".join(f"{count:,}" for count in sorted({trial[1] for trial in trials}))
    lines = [f"With {counts} gradients, {len(trials)} trials:", "", *table(ratios(trials))]
    # What can be seen of even noise falls with the root of the number of gradients, so that twice the margin is the
    # same signal at four times as many.
    for few, many in ((250, 1000), (1000, 4000)):
        same = [t for t in trials if t[3] == "isotropic" and (t[1], t[4]) in ((few, 1.5), (many, 3.0))]
        lines += ["", f"The same signal in even noise with {few:,} → {many:,} gradients, {len(same)} trials:", ""]
        lines += table(ratios(same))
    return "\n".join([*lines, "", "![ratio of the estimates to the rank](pictures/drift.png)"])


def draw(found: dict[tuple[int, int, int], dict[str, float]], path: Path) -> None:
    """Ratios over the number of gradients, both logarithmic, one panel for each estimate."""
    figure = Figure(figsize=(11, 4.5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(ESTIMATES), sharey=True)
    colours = dict(zip(SIZES, ("#0072B2", "#D55E00", "#009E73"), strict=True))
    markers = dict(zip(RANKS[1:], ("-o", "--s", ":^"), strict=True))
    for axes, name in zip(panels, ESTIMATES, strict=True):
        axes.axhspan(0.9, 1.1, color="#777777", alpha=0.3, label="within 10 % of r")
        for size, rank in sorted({cell[:2] for cell in found}):
            points = {cell[2]: means[name] for cell, means in found.items() if cell[:2] == (size, rank)}
            label = f"d = {size}, r = {rank}"
            axes.loglog(
                *zip(*points.items(), strict=True), markers[rank], color=colours[size], markersize=4, label=label
            )
        axes.set(xlabel="gradients", title=name)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mean of estimate / r")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(str(path))


def run_drift() -> None:
    """Write the tables and the picture of docs/estimators.md from the trials so far."""
    trials = [trial for trial in lid_trials(load()) if trial[2] and trial[4] >= 1]
    before, _, after = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    text = drift(trials)
    print(text)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after.partition(END)[2]}", encoding="utf-8")
    draw(ratios(trials), PICTURE)


def summarise() -> dict[str, Any]:
    """The figures that the results so far come to."""
    results = load()
    figures: dict[str, Any] = {}
    if "sae/ours" in results:
        mine = results["sae/ours"]
        figures["sae_atoms_recovered"] = mine["recovered"]
        peers = [results[f"sae/{name}"] for name in PEERS if f"sae/{name}" in results]
        if peers:
            best = min(peers, key=lambda peer: peer["fvu"])
            figures["sae_fvu_vs_best_peer"] = mine["fvu"] / best["fvu"]
            figures["sae_time_vs_best_peer"] = mine["seconds"] / best["seconds"]
    trials = lid_trials(results)
    nothing = [t for t in trials if not t[2]]
    above = [t for t in trials if t[2] and t[4] >= 1]
    below = [t for t in trials if t[2] and t[4] < 1]
    if above:
        figures["lid_trials"] = len(trials)
        figures["lid_within_10pct"] = share(above, within)
        figures["lid_coverage"] = share(above, covered)
        # An interval that is open above holds any larger rank: coverage means something for the closed ones only.
        closed = [t for t in above if t[7] is not None]
        figures["lid_closed_intervals"] = len(closed) / len(above)
        figures["lid_coverage_closed"] = share(closed, covered)
        figures["lid_says_so_below"] = share(below, lambda t: not t[8])
        figures["lid_zero_on_noise"] = share(nothing, lambda t: t[5] == 0)
        # One cut for each margin, set in hindsight.
        best = [oracle_share([t for t in above if t[4] == margin]) for margin in MARGINS[1:]]
        figures["lid_within_10pct_oracle"] = sum(best) / len(best)
        for margin in MARGINS[1:]:
            some = [t for t in above if t[4] == margin]
            figures[f"lid_within_10pct_at_{margin:g}"] = share(some, within)
            figures[f"lid_within_10pct_oracle_at_{margin:g}"] = oracle_share(some)
            figures[f"lid_coverage_at_{margin:g}"] = share(some, covered)
            figures[f"lid_detectable_at_{margin:g}"] = share(some, lambda t: t[8])
        for name, kind in (("share", "C/d"), ("gap", "largest gap"), ("95", "95 %")):
            place = ESTIMATES[kind]
            right = [abs(t[place] - t[2]) <= 0.1 * t[2] for t in above]
            figures[f"lid_within_10pct_published_{name}"] = sum(right) / len(right)
    return figures


def share(trials: list[tuple], holds: Callable[[tuple], bool]) -> float | None:
    """Share of trials of which something holds."""
    return sum(map(bool, map(holds, trials))) / len(trials) if trials else None


def oracle_share(trials: list[tuple]) -> float:
    """Largest share of trials that one level of the cut gets right, the noise's variances known."""
    return max(
        (sum(t[12] <= level < t[13] for t in trials) / len(trials) for level in {t[12] for t in trials}), default=0.0
    )


# What is done to the gradients, and with how many responses.
CASES: dict[str, tuple[Callable[[Gradients], object], int]] = {
    "lid": (estimate_lid, 0),
    "lid, 30,000 responses": (estimate_lid, 30_000),
    "response directions, 30,000 responses": (fit_response, 30_000),
    "pca": (fit_pca, 0),
    "sae, one epoch": (lambda gradients: train_sae(gradients, TrainConfig(epochs=1)), 0),
}


def run_memory() -> None:
    """Peak resident memory of a process of its own for each case, in 10⁹ bytes, Python and the libraries included."""
    figures = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    figures["memory_gb"] = {}
    for name in CASES:
        call = f"from bench import estimators; estimators.print_peak({name!r})"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", call], env=environment, capture_output=True, text=True, check=True)
        figures["memory_gb"][name] = float(done.stdout)
        print(f"{name}: {figures['memory_gb'][name]:.2f} GB", flush=True)
    RESULTS.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")


def print_peak(name: str) -> None:
    """Do the work of a case and print how much memory this process had at most, in 10⁹ bytes."""
    import resource  # Not on every system.

    work, responses = CASES[name]
    count, width = 30_000, 2048
    vectors, response = torch.empty(count, 1, width), torch.empty(responses, 1, width)
    for seed, whole in enumerate((vectors, response)):
        generator = torch.Generator().manual_seed(seed)
        for block in whole.split(1000):
            block.normal_(generator=generator).mul_(torch.linspace(2, 0.1, width))
    draw = torch.Generator().manual_seed(2)
    sources, targets = (torch.randint(0, 1000, (count,), generator=draw) for _ in range(2))
    provenance = HERE.with_(latent_values=65536, token_norm=1.0)
    work(Gradients(vectors, torch.ones(count), sources, targets, provenance, response))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9)


def within(trial: tuple) -> bool:
    """Our estimate is within 10 % of the rank."""
    return abs(trial[5] - trial[2]) <= 0.1 * trial[2]


def covered(trial: tuple) -> bool:
    """Our interval holds the rank."""
    return trial[6] <= trial[2] and (trial[7] is None or trial[2] <= trial[7])


def main() -> None:
    """Run a part, then print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("sae", "lid", "memory", "drift", "summary"))
    parser.add_argument("--peers", action="store_true", help="train the public implementations as well")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="widths of the grid to run")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of gradients of the grid to run")
    parser.add_argument("--trials", type=int, default=3, help="trials of every cell")
    options = parser.parse_args()
    if options.part == "drift":
        run_drift()
        return
    if options.part == "memory":
        run_memory()
        return
    if options.part == "sae":
        run_sae(options.peers)
    elif options.part == "lid":
        run_lid(options.sizes, options.counts, options.trials)
    # Others keep figures in the same file.
    figures = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name, value in summarise().items():
        print(name, value)
        figures[name] = value
    RESULTS.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
