"""Collecting gradients: equations 1 to 4 of ELROND (arXiv 2602.10216).

Two realizations A and B of one prompt; A is noised to a level, the denoiser estimates the clean image from it, and
the mean squared difference of that estimate to B is back-propagated to the concept's rows. The gradient says how
the word would have to move to turn A's image into B's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from .errors import ElrondError
from .provenance import Provenance
from .seeding import generator, normal


class Denoiser(Protocol):
    """The model as the core sees it: one conditioning, whose concept rows can be replaced."""

    @property
    def rows(self) -> torch.Tensor:
        """The concept's rows as encoded, float32, (R, d)."""

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """Equation 1: latents at noise level `sigma`, all (B, …)."""

    def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        """Equation 2: the clean estimate (B, …), differentiable in `rows` (B, R, d), sample by sample."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of one concept.

    Attributes:
        vectors: float32, (N, R, d): gradient i with respect to the concept's R rows.
        sigma: float32, (N,): noise level of each.
        sources: int64, (N,): realization that was noised (A).
        targets: int64, (N,): realization the estimate was compared with (B).
        provenance: where they come from.
        response: float32, (M, R, d): back-propagated white noise at the same points, scaled like the gradients, so
            that its second moment estimates the response JᵀJ; M is 0 where it was not collected.
    """

    vectors: torch.Tensor
    sigma: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    provenance: Provenance
    response: torch.Tensor

    def __post_init__(self) -> None:
        count = len(self.vectors)
        if self.vectors.ndim != 3 or self.response.ndim != 3 or self.response.shape[1:] != self.vectors.shape[1:]:
            raise ElrondError(
                f"Gradients must be (N, rows, d), got {tuple(self.vectors.shape)} with a response of "
                f"{tuple(self.response.shape)}."
            )
        if not len(self.sigma) == len(self.sources) == len(self.targets) == count:
            raise ElrondError(f"{count} gradients need as many noise levels, sources and targets.")

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def flat(self) -> torch.Tensor:
        """(N, R·d): the rows of a concept as one long vector, which is how they are decomposed."""
        return self.vectors.flatten(1)


def draw_pairs(count: int, realizations: int, seed: int) -> torch.Tensor:
    """`count` random pairs of distinct realizations, (count, 2) int64; pair i depends on the seed and i only.

    Raises:
        ElrondError: if there are fewer than two realizations.
    """
    if realizations < 2:
        raise ElrondError(f"Gradients need at least two realizations to compare, and there is {realizations}.")
    pairs = torch.empty(count, 2, dtype=torch.int64)
    for i in range(count):
        g = generator(seed, "pair", i)
        source = torch.randint(realizations, (1,), generator=g)
        # Counting up from the source by 1 … n-1 keeps the two distinct and every pair equally likely.
        step = torch.randint(1, realizations, (1,), generator=g)
        pairs[i, 0], pairs[i, 1] = source, (source + step) % realizations
    return pairs


def gradient(
    denoiser: Denoiser,
    source: torch.Tensor,
    target: torch.Tensor,
    noise: torch.Tensor,
    sigma: float,
    probe: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of a batch of pairs, and the response to white noise if asked for.

    Args:
        denoiser: the model.
        source: latents A, (B, …).
        target: latents B, as they are, (B, …).
        noise: standard normal, (B, …).
        sigma: noise level.
        probe: standard normal white noise (B, …) to back-propagate as well, or None.

    Returns:
        float32 (B, R, d) on the CPU: the gradient of mean((x̂0 - B)²) for each sample, whatever the batch; and
        2/n·Jᵀ·probe, n the number of latent values, on the same scale.
    """
    rows = denoiser.rows.expand(len(source), *denoiser.rows.shape).clone().requires_grad_(True)
    noisy = denoiser.noised(source, noise, sigma)
    with torch.enable_grad():
        estimate = denoiser.denoised(noisy, sigma, rows)
        if not estimate.requires_grad:
            raise ElrondError("The model's output does not depend on the concept's rows in a differentiable way.")
        # Summed over the batch, averaged within a sample: gradient length must not depend on the batch size.
        scale = 2.0 / estimate[0].numel()
        cotangent = scale * (estimate.detach() - target.to(estimate))
        (vectors,) = torch.autograd.grad(estimate, rows, cotangent, retain_graph=probe is not None)
        response = None
        if probe is not None:
            (response,) = torch.autograd.grad(estimate, rows, scale * probe.to(estimate))
    if not torch.isfinite(vectors).all():
        raise ElrondError(
            "The model returned gradients that are not finite; load it in bfloat16 or float32 rather than float16."
        )
    return vectors.float().cpu(), None if response is None else response.float().cpu()


def collect(
    denoiser: Denoiser,
    realizations: torch.Tensor,
    provenance: Provenance,
    count: int,
    sigma: float,
    seed: int,
    batch_size: int = 8,
    response: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Gradients:
    """Collect gradients of random pairs of realizations at one noise level.

    Args:
        denoiser: the model.
        realizations: latents of one prompt, float, (n, …), n ≥ 2.
        provenance: family, prompt, concept and rows; the rest is filled in here.
        count: number of gradients.
        sigma: noise level, in the model's units.
        seed: fixes pairs and noise; gradient i depends on (seed, i) only.
        batch_size: pairs a forward pass.
        response: also back-propagate white noise at every point.
        on_batch: called with the number of gradients so far; may raise to stop.

    Raises:
        ElrondError: if count < 1, sigma ≤ 0, or there are fewer than two realizations.
    """
    if count < 1:
        raise ElrondError(f"The number of gradients must be at least 1, got {count}.")
    if sigma <= 0:
        raise ElrondError(f"The noise level must be above zero, got {sigma}.")
    pairs = draw_pairs(count, len(realizations), seed)
    shape = tuple(realizations.shape[1:])
    found, responses = [], []
    for indices in _batches(count, batch_size):
        source, target = pairs[indices].unbind(1)
        probe = normal(shape, seed, "probe", indices) if response else None
        vectors, answered = gradient(
            denoiser,
            realizations[source],
            realizations[target],
            normal(shape, seed, "noise", indices),
            sigma,
            probe,
        )
        found.append(vectors)
        if answered is not None:
            responses.append(answered)
        if on_batch:
            on_batch(indices[-1] + 1)
    rows = denoiser.rows
    return Gradients(
        vectors=torch.cat(found),
        sigma=torch.full((count,), float(sigma)),
        sources=pairs[:, 0],
        targets=pairs[:, 1],
        provenance=provenance.with_(
            token_norm=float(rows.float().norm(dim=-1).mean()),
            sigma=(float(sigma),),
            count=count,
            seed=seed,
            latent_values=realizations[0].numel(),
        ),
        response=torch.cat(responses) if responses else torch.empty(0, *rows.shape),
    )


def _batches(count: int, size: int) -> Iterator[list[int]]:
    for start in range(0, count, max(1, size)):
        yield list(range(start, min(count, start + max(1, size))))
