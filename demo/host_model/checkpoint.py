"""The demo's checkpoint files, and the MODEL, CLIP and VAE that they make.

A checkpoint is one safetensors file with the prefixes `unet.`, `text.` and `vae.` and nothing else. The token
table has a row for every entry of the CLIP vocabulary; rows that no caption of the demo world uses keep their
seeded initial values, so the file stores the trained rows only.
"""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import safetensors.torch
import torch

from .text import TOKEN_TABLE, DemoTextEncoder, DemoTokenizer, token_table
from .unet import new_unet
from .vae import LATENT_CHANNELS, PatchVAE

MODELS = ("teacher", "student")
WEIGHTS = Path(__file__).parents[1] / "weights"


def pack(
    unet: dict[str, torch.Tensor], text: dict[str, torch.Tensor], vae: PatchVAE, tokens: list[int]
) -> dict[str, torch.Tensor]:
    """What a checkpoint file holds, in half precision (token ids int64)."""
    out = {f"unet.{k}": v for k, v in unet.items()}
    out |= {f"text.{k}": v for k, v in text.items()}
    out |= {f"vae.{k}": v for k, v in vae.state_dict().items()}
    table = out.pop(f"text.{TOKEN_TABLE}")
    half = {k: v.detach().to(torch.float16).contiguous() for k, v in out.items() if v.is_floating_point()}
    half["text.token_ids"] = torch.tensor(tokens)
    half["text.token_rows"] = table[tokens].detach().to(torch.float16).contiguous()
    return half


def unpack(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The float32 state dicts of a checkpoint file: UNet, text transformer, VAE.

    Raises:
        FileNotFoundError: if the file is missing, with what to do about it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The demo weights {path.name} are missing; restore demo/weights from the repository.")
    packed = safetensors.torch.load_file(path)
    table = token_table()
    table[packed.pop("text.token_ids")] = packed.pop("text.token_rows").float()
    packed[f"text.{TOKEN_TABLE}"] = table

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k[len(prefix) :]: v.float() for k, v in packed.items() if k.startswith(prefix)}

    return part("unet."), part("text."), part("vae.")


def load(name: str) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of the demo's teacher or student, as a checkpoint loader would return them.

    Raises:
        ValueError: if `name` is not one of `MODELS`.
        FileNotFoundError: if the weights are missing.
    """
    if name not in MODELS:
        raise ValueError(f"The demo has the models {', '.join(MODELS)}; {name!r} is not one of them.")
    return load_file(WEIGHTS / f"{name}.safetensors")


def load_file(path: Path) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """As `load`, from any checkpoint of the demo's layout."""
    unet, text, patches = unpack(path)
    vae = _vae(patches)
    return _model(unet, vae.first_stage_model), _clip(text), vae


def _model(weights: dict[str, torch.Tensor], vae: PatchVAE) -> comfy.model_patcher.ModelPatcher:
    model = new_unet()
    model.diffusion_model.load_state_dict(weights)
    factors, bias = vae.rgb_factors()
    model.latent_format.latent_rgb_factors = factors
    model.latent_format.latent_rgb_factors_bias = bias
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def _clip(weights: dict[str, torch.Tensor]) -> comfy.sd.CLIP:
    target = comfy.supported_models_base.ClipTarget(DemoTokenizer, DemoTextEncoder)
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    clip.cond_stage_model.clip_l.transformer.load_state_dict(weights)
    return clip


def _vae(weights: dict[str, torch.Tensor]) -> comfy.sd.VAE:
    # The host builds a VAE object only from weights it recognises; its pixel-space VAE is the one without any.
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.ones(1)}, dtype=torch.float32)
    module = PatchVAE()
    module.load_state_dict(weights)
    vae.first_stage_model = module.eval().to(vae.vae_dtype)
    vae.latent_channels = LATENT_CHANNELS
    vae.upscale_ratio = vae.downscale_ratio = 8
    vae.memory_used_encode = lambda shape, dtype: 64 * shape[-1] * shape[-2] * 4
    vae.memory_used_decode = lambda shape, dtype: 4096 * shape[-1] * shape[-2] * 4
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    return vae
