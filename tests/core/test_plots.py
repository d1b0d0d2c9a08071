"""Plots: figures that show what their report says, as pictures of the right kind, and no figure is left behind."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from elrond_core.decompose.pca import Spectrum
from elrond_core.decompose.sae_report import SAEReport
from elrond_core.dimension.report import LIDReport
from elrond_core.directions import Directions
from elrond_core.measure.subspace import compare
from elrond_core.plots import (
    lid_plot,
    lid_plot_figure,
    sae_report,
    sae_report_figure,
    scree,
    scree_figure,
    subspace_heatmap,
    subspace_heatmap_figure,
)
from elrond_core.provenance import Provenance

VALUES = 1.5 ** -torch.arange(40, dtype=torch.float64)
SPECTRUM = Spectrum(VALUES, 0.1, 6, 500, 40)
SAE = SAEReport(
    fvu=0.2,
    dead=0.25,
    log_densities=torch.tensor([-1.0, -2.0, -0.5, -torch.inf]),
    selected=torch.tensor([2, 0, 1]),
    density_range=(-5.0, 0.0),
    losses=torch.linspace(1, 0.2, 200) + torch.tensor([0.05, -0.05]).repeat(100),
    latents=4,
    k=2,
    stopped=True,
)
NULL = torch.linspace(0.15, 0.05, 40, dtype=torch.float64)
LID = LIDReport(
    estimate=6,
    interval=(5, 7),
    detectable=True,
    conclusion="",
    variance95=9,
    gap=1,
    ratio=4,
    neighbour=None,
    neighbour_interval=None,
    eigenvalues=VALUES,
    null=NULL,
    threshold=0.12,
    visible=0.11,
    noise=0.1,
    spread=0.0,
    count=500,
    size=40,
)


def comparison(count: int):
    """Four axes as A; as B the last two of them and others, the first of B turned by 30 degrees out of A."""
    axes = torch.eye(12)
    others = axes[2 : 2 + count].clone()
    others[0] = axes[2] * np.cos(np.pi / 6) + axes[11] * np.sin(np.pi / 6)
    one, two = (Directions(part[:, None], torch.ones(len(part)), {}, Provenance("SDXL")) for part in (axes[:4], others))
    return compare(one, two)


def line(axes: Axes, label: str) -> Line2D:
    """The only line whose label starts so, and that the legend names."""
    (found,) = (one for one in axes.get_lines() if str(one.get_label()).startswith(label))
    assert found.get_label() in legend(axes) and found.get_visible()
    return found


def legend(axes: Axes) -> list[str]:
    found = axes.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


def points(one: Line2D) -> tuple[list[float], np.ndarray]:
    return list(one.get_xdata()), np.asarray(one.get_ydata(), dtype=float)


def sides(patch: Patch) -> tuple[float, float]:
    """Where a patch begins and ends along the horizontal axis."""
    corners = patch.get_patch_transform().transform_path(patch.get_path()).get_extents()
    return corners.x0, corners.x1


def span(axes: Axes, label: str) -> tuple[float, float]:
    (found,) = (patch for patch in axes.patches if patch.get_label() == label)
    assert label in legend(axes)
    return sides(found)


def test_scree_shows_the_spectrum_what_is_kept_and_the_threshold() -> None:
    (axes,) = scree_figure(replace(SPECTRUM, n_components=3)).axes
    ranks, values = points(line(axes, "kept: 3"))
    assert ranks == [1, 2, 3] and np.allclose(values, VALUES[:3])
    ranks, values = points(line(axes, "left out"))
    assert ranks == list(range(4, 41)) and np.allclose(values, VALUES[3:])
    assert points(line(axes, "threshold: 0.1"))[1].tolist() == [0.1, 0.1]
    assert axes.get_title() == "6 components above the threshold, 500 gradients"
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "component" and axes.get_ylabel() == SPECTRUM.name


def test_scree_without_a_threshold() -> None:
    (axes,) = scree_figure(replace(SPECTRUM, threshold=0.0)).axes
    assert [text.split(":")[0] for text in legend(axes)] == ["kept", "left out"]


def test_zeros_in_a_spectrum_are_left_out_of_a_logarithm() -> None:
    values = torch.cat([VALUES, torch.zeros(9, dtype=torch.float64)])
    (axes,) = scree_figure(Spectrum(values, 0.0, 49, 50, 60)).axes
    shown = points(line(axes, "kept"))[1]
    assert np.allclose(shown[:40], VALUES) and np.isnan(shown[40:]).all()


def test_sae_report_shows_every_loss_and_its_mean() -> None:
    axes, _ = sae_report_figure(SAE).axes
    steps, losses = points(line(axes, "each step"))
    assert steps == list(range(1, 201)) and np.allclose(losses, SAE.losses)
    steps, losses = points(line(axes, "running mean"))
    assert steps == list(range(4, 201)) and np.allclose(losses, SAE.losses.unfold(0, 4, 1).mean(1), atol=1e-6)
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "step"
    assert axes.get_ylabel() == "unexplained variance (FVU)" and axes.get_title() == "FVU 0.200 over all gradients"


def test_sae_report_shows_the_densities_and_the_range_kept() -> None:
    _, axes = sae_report_figure(SAE).axes
    bars = [(sides(patch), patch.get_height()) for patch in axes.patches if patch.get_label() != "kept range"]
    assert len(bars) == 40
    # One latent each at -2, -1 and -0.5; the dead one has no logarithm.
    filled = [ends for ends, height in bars if height == 1]
    assert len(filled) == 3 and sum(height for _, height in bars) == 3
    assert all(low - 1e-6 <= value <= high + 1e-6 for (low, high), value in zip(filled, (-2, -1, -0.5), strict=True))
    assert span(axes, "kept range") == (-2, 0)
    assert axes.get_title() == "3 of 4 latents kept, 25% dead"
    assert axes.get_xlabel() == "log10 of the share of gradients" and axes.get_ylabel() == "latents"


def test_lid_plot_shows_the_spectrum_the_null_the_cut_and_the_interval() -> None:
    (axes,) = lid_plot_figure(LID).axes
    for label, expected in (("gradients", VALUES), ("noise alone", NULL)):
        ranks, values = points(line(axes, label))
        assert ranks == list(range(1, 41)) and np.allclose(values, expected)
    assert points(line(axes, "cut"))[1].tolist() == [0.12, 0.12]
    assert span(axes, "90 % interval: 5 to 7") == (5.5, 7.5)
    assert line(axes, "published: 4 by share, 1 by gap, 9 to 95 %")
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_xlabel() == "component" and axes.get_ylabel() == "variance"
    # It is not drawn outside of what is seen.
    (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert low < 1 and high > 40 and bottom < VALUES.min() and top > VALUES.max()


def test_lid_plot_with_an_interval_open_above() -> None:
    (axes,) = lid_plot_figure(replace(LID, interval=(5, None), detectable=False)).axes
    assert span(axes, "5 or more") == (5.5, 40.5)
    assert axes.get_title() == "Above the noise floor: at least 6, from 500 gradients"


def test_lid_plot_is_headed_by_the_answer() -> None:
    (axes,) = lid_plot_figure(LID).axes
    assert axes.get_title() == "Above the noise floor: 6, from 500 gradients"
    known = replace(LID, neighbour=3.14, neighbour_interval=(2.5, 3.8))
    (axes,) = lid_plot_figure(known).axes
    assert known.dimension == 3.14
    assert axes.get_title() == "Dimension: 3.1, above the noise floor: 6, from 500 gradients"


def test_heatmap_shows_the_cosines_and_the_angles() -> None:
    found = comparison(5)
    left, right, bar = subspace_heatmap_figure(found, ("cats", "dogs")).axes
    (picture,) = left.images
    expected = torch.zeros(4, 5)
    expected[2, 0], expected[3, 1] = np.cos(np.pi / 6), 1
    assert np.allclose(picture.get_array(), expected, atol=1e-6) and picture.get_clim() == (0, 1)
    assert left.get_ylabel() == "direction of cats" and left.get_xlabel() == "direction of dogs"
    assert bar.get_ylabel() == "|cosine|" and left.get_title() == "single directions"

    assert np.allclose([patch.get_height() for patch in right.patches], [0, 30, 90, 90], atol=1e-4)
    assert np.allclose([np.mean(sides(patch)) for patch in right.patches], [1, 2, 3, 4])
    assert right.get_ylim() == (0, 90)
    assert right.get_xlabel() == "principal pair" and right.get_ylabel() == "angle in degrees"
    # They have 1 + cos² 30° directions in common, of four and of five.
    assert right.get_title() == "reconstruction 0.44, hallucination 0.65"


CASES: dict[str, tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]] = {
    "scree": (lambda: scree(SPECTRUM), lambda: scree(replace(SPECTRUM, n_components=3))),
    "sae": (lambda: sae_report(SAE), lambda: sae_report(replace(SAE, losses=SAE.losses[:1]))),
    "lid": (lambda: lid_plot(LID), lambda: lid_plot(replace(LID, interval=(5, None), detectable=False))),
    "subspace": (lambda: subspace_heatmap(comparison(5)), lambda: subspace_heatmap(comparison(1))),
}


@pytest.mark.parametrize("name", CASES)
def test_pictures(name: str) -> None:
    first, second = (make() for make in CASES[name])
    for picture in (first, second):
        assert picture.shape == (500, 900, 3) and picture.dtype == np.float32
        assert picture.min() >= 0 and picture.max() == 1
        # Something is drawn, on a white ground.
        assert 0.005 < (picture < 0.9).any(-1).mean() < 0.6
    assert not np.array_equal(first, second)


def test_no_global_figures() -> None:
    import matplotlib.pyplot as plt

    scree(SPECTRUM)
    assert not plt.get_fignums()
