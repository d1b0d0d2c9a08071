"""Sampling as the stock KSampler node does, without its progress bar."""

from __future__ import annotations

from typing import Any

from demo import host  # noqa: F401  (puts ComfyUI on the path)

# isort: split
import comfy.sample
import torch


def sample(
    model: Any,
    positive: Any,
    noise: torch.Tensor,
    steps: int,
    start: int | None = None,
    end: int | None = None,
    latents: torch.Tensor | None = None,
    cfg: float = 1.0,
    negative: Any = None,
) -> torch.Tensor:
    """Latents from pure noise, by Euler steps, in inference mode as the executor does.

    With `start` and `end` only these of the steps, from the noisy `latents` that an earlier part left.
    """
    latents = torch.zeros_like(noise) if latents is None else latents
    noise = noise if not start else torch.zeros_like(noise)
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            "euler",
            "simple",
            positive,
            positive if negative is None else negative,
            latents,
            start_step=start,
            last_step=end,
            disable_pbar=True,
            seed=0,
        )
