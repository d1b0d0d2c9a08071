"""Plots: pictures of the right kind, that change with what they show, and leave no figure behind."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from elrond_core.directions import Directions
from elrond_core.lid import LIDReport
from elrond_core.pca import Spectrum
from elrond_core.plots import lid_plot, sae_report, scree, subspace_heatmap
from elrond_core.provenance import Provenance
from elrond_core.sae import SAEReport
from elrond_core.subspace import compare

VALUES = 1.5 ** -torch.arange(40, dtype=torch.float64)
SPECTRUM = Spectrum(VALUES, 0.1, 6, 500, 40)
SAE = SAEReport(
    fvu=0.2,
    dead=0.25,
    log_densities=torch.tensor([-1.0, -2.0, -0.5, -torch.inf]),
    kept=torch.tensor([2, 0, 1]),
    density_range=(-5.0, 0.0),
    losses=torch.linspace(1, 0.2, 200),
    latents=4,
    k=2,
    stopped=True,
)
LID = LIDReport(
    estimate=6,
    interval=(5, 7),
    detectable=True,
    verdict="",
    variance95=9,
    gap=1,
    ratio=4,
    correlation=None,
    correlation_interval=None,
    eigenvalues=VALUES,
    null=torch.full((40,), 0.1, dtype=torch.float64),
    threshold=0.12,
    visible=0.11,
    noise=0.1,
    spread=0.0,
    count=500,
    size=40,
)


def comparison(count: int):
    axes = torch.eye(12)[:, None]
    one, two = (
        Directions(axes[part], torch.ones(len(axes[part])), {}, Provenance("SDXL"))
        for part in (slice(0, 4), slice(2, 2 + count))
    )
    return compare(one, two)


CASES: dict[str, tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]] = {
    "scree": (lambda: scree(SPECTRUM), lambda: scree(replace(SPECTRUM, kept=3))),
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


def test_zeros_in_a_spectrum_are_left_out_of_a_logarithm() -> None:
    values = torch.cat([VALUES, torch.zeros(9, dtype=torch.float64)])
    assert np.isfinite(scree(Spectrum(values, 0.0, 49, 50, 60))).all()


def test_no_global_figures() -> None:
    import matplotlib.pyplot as plt

    scree(SPECTRUM)
    assert not plt.get_fignums()
