"""Muon: momentum whose matrices are orthogonalised, and AdamW for all other parameters.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale of the steps follows
Liu et al., arXiv 2502.16982, so that one learning rate serves matrices and other parameters. Torch's own Muon is newer
than the oldest torch that the pack runs on, and takes no convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

# Coefficients of the Newton–Schulz iteration that the source gives, and how often it is applied.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
# The root mean square of AdamW's steps, in units of the learning rate.
_RMS = 0.2


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (N, rows, columns) with all singular values near 1, by Newton–Schulz iterations."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for hidden matrices and convolutions, AdamW for the rest.

    Args:
        matrices: parameters of two or more dimensions; all dimensions but the first are taken together.
        others: embeddings, first and last layers, gains and biases.
        rate: learning rate; set `rate` in every group to change it.
        share: the others' learning rate as a share of `rate`.
        momentum: share of the last momentum that is kept, for matrices.
        betas: AdamW's, for the others.
        decay: decoupled weight decay of matrices.
    """

    def __init__(
        self,
        matrices: Iterable[torch.Tensor],
        others: Iterable[torch.Tensor],
        rate: float,
        share: float = 0.5,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        decay: float = 0.0,
    ) -> None:
        groups = [
            {"params": list(matrices), "matrices": True, "share": 1.0},
            {"params": list(others), "matrices": False, "share": share},
        ]
        super().__init__(groups, {"rate": rate, "momentum": momentum, "betas": betas, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step along the gradients; parameters without one stay."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["matrices"]:
                self._step_matrices(group, parameters)
            else:
                self._step_others(group, parameters)

    def _step_matrices(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        # Matrices of one shape are orthogonalised together.
        shapes: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            if gradient is None:
                continue
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            update = torch.lerp(gradient, state["momentum"], group["momentum"]).flatten(1)
            shapes.setdefault(update.shape, []).append((parameter, update))
        for shape, pairs in shapes.items():
            steps = orthogonalise(torch.stack([update for _, update in pairs]))
            for (parameter, _), step in zip(pairs, steps, strict=True):
                parameter.mul_(1 - group["rate"] * group["decay"])
                parameter.add_(step.view(parameter.shape), alpha=-group["rate"] * _RMS * max(shape) ** 0.5)

    def _step_others(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        if not parameters:
            return
        first, second = group["betas"]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state.update(mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter), steps=0)
            state["steps"] += 1
        states = [self.state[p] for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        means, squares = [s["mean"] for s in states], [s["square"] for s in states]
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        # All have seen the same number of steps, unless some had no gradient: the state's own count decides.
        roots = torch._foreach_sqrt(torch._foreach_div(squares, [1 - second ** s["steps"] for s in states]))
        torch._foreach_add_(roots, 1e-8)
        rate = group["rate"] * group["share"]
        for parameter, mean, root, state in zip(parameters, means, roots, states, strict=True):
            parameter.addcdiv_(mean, root, value=-rate / (1 - first ** state["steps"]))
