"""How a trained sparse autoencoder uses its latents, over all gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .sae import TopKSAE, top_activations
from .sae_data import Check, ScaledGradients

# Bounds on what is encoded between two calls of `check`, so that a cancel is noticed within a second: gradients, and
# multiplications of gradients with the dictionary.
MOST_ENCODED, MOST_PRODUCTS = 4096, 2**32


@dataclass(frozen=True)
class SAEReport:
    """Result of a training.

    Attributes:
        fvu: fraction of the gradients' variance that the reconstruction leaves unexplained, over the whole set.
        dead: share of latents that no gradient activates.
        log_densities: float32, (latents,): log10 of the share of gradients that activate each; -inf for dead ones.
        selected: int64, (K,): the latents that became directions, in their order.
        density_range: the open range of log10 densities that was selected.
        losses: float32, (steps,): FVU of each training batch.
        latents: number of latents.
        k: latents active at once.
        stopped: whether the training was cut short because FVU had stalled.
    """

    fvu: float
    dead: float
    log_densities: torch.Tensor
    selected: torch.Tensor
    density_range: tuple[float, float]
    losses: torch.Tensor
    latents: int
    k: int
    stopped: bool

    def lines(self) -> list[str]:
        """The report as text, one fact a line."""
        low, high = self.density_range
        return [
            f"{self.latents} latents, {self.k} active at once",
            f"unexplained variance (FVU): {self.fvu:.3f}",
            f"dead latents: {self.dead:.1%}",
            f"directions: {len(self.selected)} of log10 density in ({low:g}, {high:g})",
            f"{len(self.losses)} steps" + (", stopped early because FVU had stalled" if self.stopped else ""),
        ]


@dataclass(frozen=True)
class Usage:
    """Sums over gradients, in units of the model's scale.

    Attributes:
        fired: float64, (latents,): gradients that activate each latent.
        energy: float64, (latents,): sum of each latent's squared activations.
        unexplained: squared length of the residuals.
        total: squared length of the gradients less the decoder's bias.
    """

    fired: torch.Tensor
    energy: torch.Tensor
    unexplained: float
    total: float


@torch.no_grad()
def usage_of(model: TopKSAE, data: torch.Tensor | ScaledGradients, check: Check) -> Usage:
    """Encode all gradients (N, R·d), which are divided by the model's scale; `check` is called before each piece."""
    fired, energy = torch.zeros(2, model.latents, dtype=torch.float64)
    unexplained = total = 0.0
    for batch in data.split(min(MOST_ENCODED, max(1, MOST_PRODUCTS // model.W_dec.numel()))):
        check()
        top_acts, top_indices = top_activations(model.pre_activations(batch), model.k)
        centred = batch - model.b_dec
        residual = centred - model.weighted_atoms(top_acts, top_indices)
        unexplained += float(residual.double().square().sum())
        total += float(centred.double().square().sum())
        top_acts, top_indices = top_acts.flatten().cpu(), top_indices.flatten().cpu()
        fired += top_indices[top_acts > 0].bincount(minlength=model.latents)
        energy += top_indices.bincount(top_acts.double().square(), minlength=model.latents)
    return Usage(fired, energy, unexplained, total)
