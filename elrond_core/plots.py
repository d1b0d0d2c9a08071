"""Reports as pictures: float32 arrays (H, W, 3) in [0, 1], which the host shows as images.

Every picture is drawn as a matplotlib figure first, by the function of the same name that ends in `_figure`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .decompose.pca import Spectrum
from .decompose.sae_report import SAEReport
from .dimension.report import LIDReport
from .measure.subspace import Comparison

# Okabe and Ito's palette, which colour-blind readers can distinguish.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
# Leading eigenvalues in a plot.
_MAX_RANK = 128


def scree(spectrum: Spectrum) -> np.ndarray:
    """Eigenvalues in descending order, the threshold, and which components were kept."""
    return _render(scree_figure(spectrum))


def scree_figure(spectrum: Spectrum) -> Figure:
    """`scree` before it is rendered."""
    figure, (axes,) = _figure(1)
    ranks, values = _leading(spectrum.eigenvalues)
    selected = ranks <= spectrum.n_components
    axes.plot(ranks[selected], values[selected], "o", color=_BLUE, markersize=5, label=f"kept: {spectrum.n_components}")
    axes.plot(ranks[~selected], values[~selected], "o", color=_GREY, markersize=3, alpha=0.6, label="left out")
    if spectrum.threshold > 0:
        axes.axhline(spectrum.threshold, color=_ORANGE, linestyle="--", label=f"threshold: {spectrum.threshold:.3g}")
    axes.set_yscale("log")
    axes.set(xlabel="component", ylabel=spectrum.name)
    axes.set_title(f"{spectrum.significant} components above the threshold, {spectrum.count} gradients")
    axes.legend()
    return figure


def sae_report(report: SAEReport) -> np.ndarray:
    """The loss curve and the histogram of firing densities of an autoencoder."""
    return _render(sae_report_figure(report))


def sae_report_figure(report: SAEReport) -> Figure:
    """`sae_report` before it is rendered."""
    figure, (left, right) = _figure(2)
    losses = report.losses.numpy()
    steps = np.arange(1, len(losses) + 1)
    left.plot(steps, losses, color=_BLUE, alpha=0.3, linewidth=1, label="each step")
    width = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(width) / width, "valid")
    left.plot(steps[width - 1 :], smooth, color=_BLUE, linewidth=2, label="running mean")
    left.set_yscale("log")
    left.set(xlabel="step", ylabel="unexplained variance (FVU)", title=f"FVU {report.fvu:.3f} over all gradients")
    left.legend()

    densities = report.log_densities[torch.isfinite(report.log_densities)].numpy()
    low, high = report.density_range
    right.hist(densities, bins=40, color=_GREEN)
    right.axvspan(max(low, min(densities.min(initial=0.0), -1.0)), high, color=_BLUE, alpha=0.1, label="kept range")
    right.set(xlabel="log10 of the share of gradients", ylabel="latents")
    right.set_title(f"{len(report.selected)} of {report.latents} latents kept, {report.dead:.0%} dead")
    right.legend()
    return figure


def lid_plot(report: LIDReport) -> np.ndarray:
    """The spectrum, that of noise alone, the threshold, the interval of the estimate, and all estimates as text."""
    return _render(lid_plot_figure(report))


def lid_plot_figure(report: LIDReport) -> Figure:
    """`lid_plot` before it is rendered."""
    figure, (axes,) = _figure(1)
    ranks, values = _leading(report.eigenvalues)
    low, high = report.interval
    end, label = (high, f"90 % interval: {low} to {high}") if high is not None else (len(values), f"{low} or more")
    axes.axvspan(low + 0.5, end + 0.5, color=_BLUE, alpha=0.15, label=label)
    axes.plot(ranks, values, "o", color=_BLUE, markersize=4, label="gradients")
    axes.plot(ranks, _leading(report.null)[1], color=_GREY, label="noise alone")
    axes.axhline(report.threshold, color=_ORANGE, linestyle="--", label="cut")
    published = f"published: {report.ratio} by share, {report.gap} by gap, {report.variance95} to 95 %"
    axes.plot([], [], " ", label=published)
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set(xlabel="component", ylabel="variance")
    floor = f"above the noise floor: {'' if report.detectable else 'at least '}{report.estimate}"
    dimension = "" if report.neighbour is None else f"dimension: {report.dimension:.1f}, "
    axes.set_title(f"{dimension}{floor}, from {report.count} gradients".capitalize())
    axes.legend()
    return figure


def subspace_heatmap(comparison: Comparison, names: tuple[str, str] = ("A", "B")) -> np.ndarray:
    """Cosines between the directions of two sets, and the principal angles between their spans."""
    return _render(subspace_heatmap_figure(comparison, names))


def subspace_heatmap_figure(comparison: Comparison, names: tuple[str, str] = ("A", "B")) -> Figure:
    """`subspace_heatmap` before it is rendered."""
    figure, (left, right) = _figure(2)
    picture = left.imshow(comparison.cosines.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(picture, ax=left, label="|cosine|")
    left.set(xlabel=f"direction of {names[1]}", ylabel=f"direction of {names[0]}")
    left.set_title("single directions")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))

    angles = comparison.angles.numpy()
    right.bar(np.arange(1, len(angles) + 1), angles, color=_GREEN)
    right.set(xlabel="principal pair", ylabel="angle in degrees", ylim=(0, 90))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_title(f"reconstruction {comparison.reconstruction:.2f}, hallucination {comparison.hallucination:.2f}")
    return figure


def _leading(values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Ranks and values of the leading eigenvalues; NaN for those that are zero up to rounding."""
    leading = values[:_MAX_RANK].numpy()
    return np.arange(1, len(leading) + 1), np.where(leading > 1e-9 * leading.max(initial=0), leading, np.nan)


def _figure(columns: int) -> tuple[Figure, Sequence[Axes]]:
    # pyplot keeps every figure in a global list, and the host runs nodes in threads.
    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for part in axes:
        part.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _render(figure: Figure) -> np.ndarray:
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(np.float32) / 255
