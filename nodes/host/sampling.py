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
    """ComfyUI's progress bar, one for all of a piece of work; each call also stops it if the user cancelled it.

    With a MODEL, latents of it that are handed on as the second argument are shown as the host shows those it samples.
    """
    bar = comfy.utils.ProgressBar(total)
    # Only its previewer is used: its own progress bar counts from where the work starts.
    shown = latent_preview.get_previewer(model.load_device, model.model.latent_format) if model is not None else None

    def update(done: float, latents: torch.Tensor | None = None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        picture = shown.decode_latent_to_preview_image("JPEG", latents) if shown and latents is not None else None
        bar.update_absolute(done, total, picture)

    return update


def absent(sentence: str) -> ExecutionBlocker:
    """An output that there is none of: a node that is wired to it does not run, and the user reads why."""
    return ExecutionBlocker(sentence)


def stop_if_cancelled() -> None:
    """End the work, as the progress bar does, if the user cancelled it."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def sampler_names() -> list[str]:
    """The host's samplers."""
    return list(comfy.samplers.KSampler.SAMPLERS)


def scheduler_names() -> list[str]:
    """The host's schedulers."""
    return list(comfy.samplers.KSampler.SCHEDULERS)


# Pixels a latent cell, for formats that do not say it themselves; 8 for all others.
_CELLS = {"Flux2": 16, "HunyuanImage21": 32, "ChromaRadiance": 1}


def empty_latent(model: Any, width: int, height: int, count: int) -> torch.Tensor:
    """Empty latents of the model's own shape."""
    form = model.get_model_object("latent_format")
    cell = getattr(form, "spacial_downscale_ratio", None) or _CELLS.get(type(form).__name__, 8)
    shape = torch.zeros(count, 4, height // cell, width // cell, device=comfy.model_management.intermediate_device())
    return comfy.sample.fix_empty_latent_channels(model, shape)


def own_latents(model: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the model takes them.

    Raises:
        ElrondError: if another family made them.
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
    alike: bool = False,
    on_step: Callable[[float, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Sample a batch of realizations from pure noise; realization `first + i` depends on (seed, first + i) only.

    With `alike`, every image of the batch starts from the noise of realization `first`, and has the number of its place
    in the batch where the conditioning differs between images. After each step `on_step` is
    told how many images that makes of the batch, in parts of images, and is shown the clean estimates.
    """
    indices = [first] * len(latents) if alike else list(range(first, first + len(latents)))
    noise = normal(tuple(latents.shape[1:]), seed, "realization", indices)
    images = range(len(latents)) if alike else indices

    def numbered(conditioning: Conditioning) -> Conditioning:
        return [[tensor, {**options, IMAGES: tuple(images)}] for tensor, options in conditioning]

    settings = comfy.samplers.KSampler(model, steps, model.load_device, sampler, scheduler, 1.0)
    sigmas = settings.sigmas
    how = comfy.samplers.sampler_object(sampler)
    _per_sample_noise(how, noise, sigmas, seed, indices, model.load_device)

    def callback(step: int, estimate: torch.Tensor, noisy: torch.Tensor, steps: int) -> None:
        if on_step is not None:
            on_step(len(latents) * min(1.0, (step + 1) / steps), estimate)

    return comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        how,
        sigmas,
        numbered(positive),
        numbered(negative if negative is not None else positive),
        latents,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )


def _per_sample_noise(
    how: Any, noise: torch.Tensor, sigmas: torch.Tensor, seed: int, indices: list[int], device: Any
) -> None:
    """Give a stochastic sampler one noise stream a realization; by default it draws one for the whole batch."""
    function = getattr(how, "sampler_function", None)
    if function is None or "noise_sampler" not in inspect.signature(function).parameters:
        return
    streams = [generator(seed, "sampler", i) for i in indices]

    def draw(sigma: Any, sigma_next: Any) -> torch.Tensor:
        return torch.stack([torch.randn(noise.shape[1:], generator=g) for g in streams]).to(device)

    # Not updated in place: the host shares one default dictionary among all its samplers.
    how.extra_options = {**how.extra_options, "noise_sampler": draw}


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images (N, H, W, 3) in [0, 1] of latents, as the stock VAEDecode node makes them."""
    images = vae.decode(latents)
    # Video models give (N, frames, H, W, 3).
    return images.flatten(0, 1) if images.ndim == 5 else images
