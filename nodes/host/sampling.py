"""Sampling, noise levels, progress and latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_execution.graph import ExecutionBlocker
from node_helpers import conditioning_set_values

from ...elrond_core.errors import ElrondError
from ...elrond_core.seeding import generator, normal
from .conditioning import IMAGES, Conditioning


def sigma_of(model: Any, noise_level: float) -> float:
    """A noise level in the model's units: 1 is the highest of its schedule, 0 is none."""
    sampling = model.get_model_object("model_sampling")
    if noise_level >= 1:
        return float(sampling.sigma_max)
    return float(sampling.percent_to_sigma(1 - noise_level))


def progress(total: int, model: Any = None) -> Callable[..., None]:
    """A progress bar of ComfyUI.

    Args:
        total: its length.
        model: a MODEL, for previews.

    Returns:
        A function of the length that is done and, with a model, of latents whose preview to show. It raises the host's
        exception if the user has cancelled.
    """
    bar = comfy.utils.ProgressBar(total)
    # `latent_preview.prepare_callback` would start a progress bar of its own for each batch. The functions of
    # `comfy_api` refuse to run outside of the executor, and take a thread for each call.
    previewer = (
        latent_preview.get_previewer(model.load_device, model.model.latent_format) if model is not None else None
    )

    def update(done: float, latents: torch.Tensor | None = None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None
        if previewer and latents is not None:
            preview = previewer.decode_latent_to_preview_image("JPEG", latents)
        bar.update_absolute(done, total, preview)

    return update


def absent(sentence: str) -> ExecutionBlocker:
    """A missing output: nodes that are wired to it do not run, and the user reads the sentence."""
    return ExecutionBlocker(sentence)


def stop_if_cancelled() -> None:
    """Raise the host's exception if the user has cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def sampler_names() -> list[str]:
    """The host's samplers."""
    return list(comfy.samplers.KSampler.SAMPLERS)


def scheduler_names() -> list[str]:
    """The host's schedulers."""
    return list(comfy.samplers.KSampler.SCHEDULERS)


# Pixels a side of a latent cell, of formats that are not 8 and have no `spacial_downscale_ratio`.
_CELLS = {"Flux2": 16, "HunyuanImage21": 32, "ChromaRadiance": 1}


def empty_latent(model: Any, width: int, height: int, count: int) -> torch.Tensor:
    """Empty latents of the model's own shape."""
    form = model.get_model_object("latent_format")
    cell = getattr(form, "spacial_downscale_ratio", None) or _CELLS.get(type(form).__name__, 8)
    shape = torch.zeros(count, 4, height // cell, width // cell, device=comfy.model_management.intermediate_device())
    return comfy.sample.fix_empty_latent_channels(model, shape)


def own_latents(model: Any, latents: torch.Tensor) -> torch.Tensor:
    """A copy of latents in the shape of the model's.

    Raises:
        ElrondError: if they have another number of channels, so that another family made them.
    """
    latents = comfy.sample.fix_empty_latent_channels(model, latents.clone())
    channels = model.get_model_object("latent_format").latent_channels
    if latents.shape[1] != channels:
        raise ElrondError(
            f"These latents have {latents.shape[1]} channels and this model's have {channels}: sample them with a "
            "model of this family."
        )
    return latents


def sample(
    model: Any,
    positive: Conditioning,
    negative: Conditioning | None,
    latents: torch.Tensor,
    first: int,
    seed: int,
    steps: int,
    cfg: float,
    sampler: str,
    scheduler: str,
    same_noise: bool = False,
    on_step: Callable[[float, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Sample a batch of realizations from pure noise. Realization `first + i` depends on (seed, first + i) only.

    Args:
        model: MODEL.
        positive: the prompt.
        negative: the negative prompt, or None.
        latents: empty latents, (B, …).
        first: number of the first realization.
        seed: fixes the noise.
        steps: sampling steps.
        cfg: guidance.
        sampler: name of a sampler.
        scheduler: name of a scheduler.
        same_noise: all images start from the noise of realization `first`. Conditionings that differ between images
            then count them from 0.
        on_step: called after each step with the progress, in images of the batch, and the clean estimates.

    Returns:
        Latents (B, …).
    """
    indices = [first] * len(latents) if same_noise else list(range(first, first + len(latents)))
    noise = normal(tuple(latents.shape[1:]), seed, "realization", indices)
    numbers = {IMAGES: tuple(range(len(latents)) if same_noise else indices)}
    settings = comfy.samplers.KSampler(model, steps, model.load_device, sampler, scheduler, 1.0)
    sigmas = settings.sigmas
    sampler_object = comfy.samplers.sampler_object(sampler)
    _per_sample_noise(sampler_object, noise, sigmas, seed, indices, model.load_device)

    def callback(step: int, estimate: torch.Tensor, noisy: torch.Tensor, steps: int) -> None:
        if on_step is not None:
            on_step(len(latents) * min(1.0, (step + 1) / steps), estimate)

    return comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        sampler_object,
        sigmas,
        conditioning_set_values(positive, numbers),
        conditioning_set_values(negative if negative is not None else positive, numbers),
        latents,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )


def _per_sample_noise(
    sampler: Any, noise: torch.Tensor, sigmas: torch.Tensor, seed: int, indices: list[int], device: Any
) -> None:
    """Give a stochastic sampler one noise stream for each realization, instead of one for the batch."""
    function = getattr(sampler, "sampler_function", None)
    if function is None or "noise_sampler" not in inspect.signature(function).parameters:
        return
    streams = [generator(seed, "sampler", i) for i in indices]

    def draw(sigma: Any, sigma_next: Any) -> torch.Tensor:
        return torch.stack([torch.randn(noise.shape[1:], generator=g) for g in streams]).to(device)

    # Not in place: all samplers of the host share one default dictionary.
    sampler.extra_options = {**sampler.extra_options, "noise_sampler": draw}


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images (N, H, W, 3) in [0, 1] of latents, the same as of the stock VAEDecode node."""
    images = vae.decode(latents)
    # Video models give (N, frames, H, W, 3).
    return images.flatten(0, 1) if images.ndim == 5 else images
