"""One batch of gradients: equations 1 to 4 of ELROND (arXiv 2602.10216)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import torch

from ..errors import ElrondError


class Denoiser(Protocol):
    """The model as the core sees it: one conditioning, whose concept rows can be replaced."""

    def rows_at(self, sigma: float) -> torch.Tensor:
        """The rows to differentiate at noise level `sigma`, as encoded, float32, (R, d).

        First the concept's, then others of the prompt if any. A prompt may have other rows at other levels.
        """

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """Equation 1: latents at noise level `sigma`, all (B, …)."""

    def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        """Equation 2: the clean estimate (B, …), differentiable in `rows` (B, R, d), sample by sample."""

    def reduce_memory(self) -> bool:
        """Need less memory from now on, at the cost of time; False if there is no way left to."""


def gradient(
    denoiser: Denoiser,
    source: torch.Tensor,
    target: torch.Tensor,
    noise: torch.Tensor,
    sigma: float,
    probe: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of a batch of pairs, and Jacobian probes if asked for, from one forward pass.

    Args:
        denoiser: the model.
        source: latents A, (B, …).
        target: latents B, as they are, (B, …); or (T, B, …) for T targets of each source.
        noise: standard normal, (B, …).
        sigma: noise level.
        probe: standard normal white noise to back-propagate as well, (B, …), or (P, B, …) for P of each source; or
            None.

    Returns:
        float32 on the CPU: the gradient of mean((x̂0 - B)²) for each sample, whatever the batch, (B, R, d), or
        (T, B, R, d) for T targets; and 2/n·Jᵀ·probe (B, R, d), or (P, B, R, d), n the number of latent values, on the
        same scale.
    """
    encoded = denoiser.rows_at(sigma)
    rows = encoded.expand(len(source), *encoded.shape).clone().requires_grad_(True)
    noisy = denoiser.noised(source, noise, sigma)
    with torch.enable_grad():
        estimate = denoiser.denoised(noisy, sigma, rows)
    if not estimate.requires_grad:
        raise ElrondError("The model's output does not depend on the concept's rows in a differentiable way.")
    # Summed over the batch, averaged within a sample: gradient length must not depend on the batch size.
    scale = 2.0 / estimate[0].numel()
    many_targets = target.ndim > source.ndim
    many_probes = probe is not None and probe.ndim > source.ndim
    targets = target if many_targets else target[None]
    probes: Sequence[torch.Tensor] = [] if probe is None else list(probe) if many_probes else [probe]
    left = len(targets) + len(probes)

    # All share one Jacobian; only the vector that is back-propagated differs.
    def back_propagate(cotangent: torch.Tensor) -> torch.Tensor:
        nonlocal left
        left -= 1
        (vectors,) = torch.autograd.grad(estimate, rows, scale * cotangent, retain_graph=left > 0)
        return vectors.float().cpu()

    gradients = torch.stack([back_propagate(estimate.detach() - one.to(estimate)) for one in targets])
    if not torch.isfinite(gradients).all():
        raise ElrondError(
            "The model returned gradients that are not finite; load it in bfloat16 or float32 rather than float16."
        )
    gradients = gradients if many_targets else gradients[0]
    if not probes:
        return gradients, None
    probed = torch.stack([back_propagate(one.to(estimate)) for one in probes])
    return gradients, probed if many_probes else probed[0]


class Differentiator:
    """`gradient` of one denoiser, for batches of any size: one that does not fit into memory is halved.

    Later batches are run in parts of the size that did fit. When a single sample does not, the denoiser is asked to
    reduce its memory.

    Raises:
        ElrondError: if a single sample does not fit, however far memory is reduced.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._limit: int | None = None

    def __call__(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        noise: torch.Tensor,
        sigma: float,
        probe: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `gradient`."""
        results: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        start, size = 0, self._limit or len(source)
        while start < len(source):
            part = slice(start, start + size)
            try:
                results.append(
                    gradient(
                        self._denoiser,
                        source[part],
                        target[:, part] if target.ndim > source.ndim else target[part],
                        noise[part],
                        sigma,
                        None if probe is None else probe[:, part] if probe.ndim > source.ndim else probe[part],
                    )
                )
                start += size
                continue
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
            # Only here has the failed attempt, which the error refers to, let go of its tensors.
            if size > 1:
                size = self._limit = min(size, len(source) - start) // 2 or 1
            elif not self._denoiser.reduce_memory():
                raise ElrondError(
                    "There is too little memory for a single gradient of images this large: sample smaller "
                    "realizations, or close other programs that use the same device."
                )
        vectors, probes = zip(*results, strict=True)
        joined = None if probe is None else torch.cat(probes, dim=probe.ndim - source.ndim)
        return torch.cat(vectors, dim=target.ndim - source.ndim), joined


def _out_of_memory(error: RuntimeError) -> bool:
    # Not every device has a class of its own for this.
    return isinstance(error, torch.cuda.OutOfMemoryError) or bool(
        re.search(r"out of memory|can't allocate memory|not enough memory", str(error))
    )
