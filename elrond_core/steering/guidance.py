"""Guidance along a direction: what a short step of the rows changes in the clean estimate, made larger and kept local.

A long step of the rows leaves the region in which the model answers in proportion, and moves more than what the
direction stands for. So here the rows take a short step only. The change that it makes in the model's estimate is
multiplied until it is as long as was asked for. And it is made only where it is largest: in each image, and at each
step of the sampling, in those cells of the latent whose change is above the threshold of Otsu (1979). The cells are
found anew at each step, and later steps see the whole image, so that a little changes elsewhere too.

The estimate is guided in this way by Brack et al. (SEGA, arXiv 2301.12247), who take the change between a text and none
and keep a share of its largest values that the user chooses.
"""

from __future__ import annotations

import torch

from .locality import otsu

# The longest step of the rows that is tried, in token norms. Shorter ones are nearer to proportion, but the change that
# they make is lost in the rounding of models that compute in half precision.
LONGEST = 0.5


def shortened(strength: float, longest: float = LONGEST) -> float:
    """The factor by which the change of a short step has to be multiplied; the step is as much shorter.

    Args:
        strength: length of the whole step, in token norms, ≥ 0.
        longest: length of the short one.

    Returns:
        strength / longest; 1 where the whole step is no longer than that.
    """
    return max(1.0, strength / longest)


def change_of_estimate(
    before: torch.Tensor, after: torch.Tensor, factor: float, local: bool, among: torch.Tensor | None = None
) -> torch.Tensor:
    """What guidance adds to the clean estimate.

    Args:
        before: float (N, C, …), the estimate of the prompt as it is.
        after: the same of the prompt after the short step.
        factor: see `shortened`.
        local: change only those places of each image whose change, squared and averaged over channels, is above the
            threshold of Otsu for this image.
        among: bool (N, 1, …), the places that are compared, and may change, if `local`; None is all.

    Returns:
        float32 (N, C, …); with `local` 0 in the other places.
    """
    change = after.float() - before.float()
    if local:
        energy = change.square().mean(1, keepdim=True)
        among = torch.ones_like(energy, dtype=torch.bool) if among is None else among.expand_as(energy)
        change = change * torch.stack([_largest(*image) for image in zip(energy, among, strict=True)])
    return factor * change


def _largest(energy: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Those of some places at which the energy is above Otsu's threshold."""
    values = energy[among]
    return among if len(values) < 2 else among & (energy > otsu(values))
