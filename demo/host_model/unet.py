"""The portraits' denoiser: a small UNet of the host's, as a rectified flow."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.supported_models_base
import torch

from .text import TEXT_WIDTH
from .vae import LATENT_CHANNELS

_CONFIG: dict[str, Any] = {
    "image_size": 8,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "model_channels": 64,
    "num_res_blocks": [2, 1],
    "dropout": 0,
    "channel_mult": (1, 2),
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1, 1],
    "transformer_depth_output": [1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": TEXT_WIDTH,
    "use_checkpoint": False,
    "legacy": False,
}
# The host's schedule: time t becomes the noise level shift·t / (1 + (shift − 1)·t), and the UNet sees 1000 times that.
SAMPLING = {"shift": 2.0, "multiplier": 1000}


class DemoLatent(comfy.latent_formats.LatentFormat):
    """16 channels of 8 × 8 pixels a cell; the encoder normalises, so the host need not."""

    latent_channels = LATENT_CHANNELS
    scale_factor = 1.0


class DemoConfig(comfy.supported_models_base.BASE):
    """What the host wants to know of a model: UNet, rectified flow, latent format."""

    unet_config = _CONFIG
    unet_extra_config: dict[str, Any] = {}
    sampling_settings = SAMPLING
    latent_format = DemoLatent
    memory_usage_factor = 0.5

    def model_type(self, state_dict: dict[str, torch.Tensor], prefix: str = "") -> Any:
        """Rectified flow, as SD3 and AuraFlow."""
        return comfy.model_base.ModelType.FLOW

    def inpaint_model(self) -> bool:
        """The host takes any UNet of more than four channels for an inpainting model."""
        return False


def new_unet() -> comfy.model_base.BaseModel:
    """The host's model object around a UNet whose weights are not set yet."""
    config = DemoConfig(_CONFIG)
    config.set_inference_dtype(torch.float32, None)
    return config.get_model({}, device=torch.device("cpu")).eval()
