"""Gradients of what a CLIP_VISION sees instead of latents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import torch

from ...elrond_core.errors import ElrondError
from .denoiser import HostDenoiser
from .gradient_patches import frozen, normal_copies
from .sampling import progress


class FeatureDenoiser:
    """`elrond_core.collect.differentiate.Denoiser` whose output is what a CLIP_VISION sees in the decoded estimate.

    Features are the image embedding divided by its length, (B, F, 1, …) of as many dimensions as latents, so that
    their mean squared difference is 2/F·(1 - cosine).
    """

    def __init__(self, denoiser: HostDenoiser, vae: Any, encoder: Any) -> None:
        if getattr(encoder, "model_type", "") == "siglip2_vision_model":
            raise ElrondError(
                "This image encoder takes pictures in patches of its own: take a CLIP, SigLIP or DINO one."
            )
        self._denoiser = denoiser
        self._vae = vae
        self._encoder = encoder
        self.rows_at = denoiser.rows_at
        self.noised = denoiser.noised
        self.reduce_memory = denoiser.reduce_memory

    def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        """Features of the clean estimate."""
        return self._denoiser.denoised(noisy, sigma, rows)

    def features(self, latents: torch.Tensor) -> torch.Tensor:
        """Features of latents in the model's own scale, as the host decodes and encodes them, differentiably."""
        vae, encoder = self._vae, self._encoder
        raw = self._denoiser.process_out(latents)
        if raw.ndim == 5 and getattr(vae, "latent_dim", 2) == 2:
            raw = raw[:, :, 0]
        decoded = vae.first_stage_model.decode(raw.to(vae.device, vae.vae_dtype)).float()
        images = vae.process_output(decoded).to(encoder.load_device)
        # Video models give (N, colours, frames, H, W), here of one frame.
        images = images[:, :, 0] if images.ndim == 5 else images
        pixels = _preprocessed(images[:, :3], encoder.image_size, encoder.image_mean, encoder.image_std)
        layers: Any = "all" if getattr(encoder, "return_all_hidden_states", False) else -2
        embedding = encoder.model(pixel_values=pixels, intermediate_output=layers)[2].flatten(1).float()
        embedding = torch.nn.functional.normalize(embedding).to(latents.device)
        return embedding.reshape(len(embedding), -1, *[1] * (latents.ndim - 2))


def _preprocessed(images: torch.Tensor, size: int, mean: list[float], std: list[float]) -> torch.Tensor:
    """The host's `clip_preprocess` of (N, 3, H, W), without its rounding to 8 bits, which has no derivative."""
    height, width = images.shape[2:]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        shape = (round(scale * height), round(scale * width))
        images = torch.nn.functional.interpolate(images, size=shape, mode="bicubic", antialias=True)
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        images = images[:, :, top : top + size, left : left + size]
    centre, spread = (torch.tensor(each).to(images)[:, None, None] for each in (mean, std))
    return (images.clamp(0, 1) - centre) / spread


@contextlib.contextmanager
def through_features(
    denoiser: HostDenoiser, vae: Any, encoder: Any, latents: torch.Tensor, batch_size: int
) -> Iterator[tuple[FeatureDenoiser, torch.Tensor]]:
    """For the time being, a denoiser of image features, and the features of the realizations, (n, F, 1, …)."""
    memory = vae.memory_used_decode((min(batch_size, len(latents)), *latents.shape[1:]), vae.vae_dtype)
    comfy.model_management.load_models_gpu([*denoiser.patchers, vae.patcher, encoder.patcher], memory_required=memory)
    for module in (denoiser.module, vae.first_stage_model, encoder.model):
        normal_copies(module)
    with frozen(vae.first_stage_model), frozen(encoder.model):
        seen = FeatureDenoiser(denoiser, vae, encoder)
        features = []
        for batch in latents.split(batch_size):
            comfy.model_management.throw_exception_if_processing_interrupted()
            features.append(seen.features(batch.to(denoiser.device)).cpu())
        with denoiser.through(seen.features, vae.first_stage_model, encoder.model):
            yield seen, torch.cat(features)


def image_features(
    encoder: Any, images: torch.Tensor, batch_size: int = 32, update: Callable[[int], None] | None = None
) -> torch.Tensor:
    """Float32 (N, F) features of images (N, H, W, 3) by a CLIP_VISION: CLIP, SigLIP (their mean) or DINOv2.

    Args:
        encoder: the CLIP_VISION.
        images: any number of them.
        batch_size: images at once.
        update: told how many images are done; without it, a progress bar is.
    """
    update = update or progress(len(images))
    batches = []
    for first in range(0, len(images), batch_size):
        features = encoder.encode_image(images[first : first + batch_size])["image_embeds"].float().cpu()
        # SigLIP gives a row a patch.
        batches.append(features.mean(1) if features.ndim == 3 else features)
        update(min(first + batch_size, len(images)))
    return torch.cat(batches)
