"""The portraits' checkpoint files, and the MODEL, CLIP and VAE that they make.

Three safetensors files: `vae` holds the autoencoder, `teacher` the teacher's UNet and the text
encoder, `student` the student's UNet. The token table has a row for every entry of the CLIP vocabulary; rows
that no caption uses keep their seeded initial values, so the file stores the trained rows only.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import safetensors.torch
import torch

from .text import TOKEN_TABLE, DemoTextEncoder, DemoTokenizer, token_table
from .unet import new_unet
from .vae import LATENT_CHANNELS, Autoencoder

MODELS = ("teacher", "student")
WEIGHTS = Path(__file__).parents[1] / "weights"
_UNET, _TEXT = "unet.", "text."


class Portraits(NamedTuple):
    """Genuine objects of the host, as a checkpoint loader returns them."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE


def file_of(name: str, folder: Path = WEIGHTS) -> Path:
    """The file of `vae`, `teacher` or `student` in a folder."""
    return folder / f"{name}.safetensors"


def pack_unet(unet: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A UNet's state dict as a checkpoint file holds it."""
    return {f"{_UNET}{name}": value for name, value in unet.items()}


def pack_text(text: dict[str, torch.Tensor], tokens: list[int]) -> dict[str, torch.Tensor]:
    """A text transformer's state dict as a checkpoint file holds it: of the token table only these tokens' rows."""
    packed = {f"{_TEXT}{name}": value for name, value in text.items() if name != TOKEN_TABLE}
    return {**packed, "text.token_ids": torch.tensor(tokens), "text.token_rows": text[TOKEN_TABLE][tokens]}


def unpack_unet(packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float32 state dict of a file's UNet."""
    return {name[len(_UNET) :]: value.float() for name, value in packed.items() if name.startswith(_UNET)}


def unpack_text(packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float32 state dict of a file's text transformer."""
    stored = ("text.token_ids", "text.token_rows")
    weights = {
        name[len(_TEXT) :]: value.float()
        for name, value in packed.items()
        if name.startswith(_TEXT) and name not in stored
    }
    table = token_table()
    table[packed["text.token_ids"]] = packed["text.token_rows"].float()
    return {**weights, TOKEN_TABLE: table}


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A weights file's tensors.

    Raises:
        FileNotFoundError: if the file is missing, with what to do about it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The demo weights {path.name} are missing; restore demo/weights from the repository.")
    return safetensors.torch.load_file(path)


def load_vae(path: Path | None = None) -> Autoencoder:
    """The autoencoder's module in float32, ready to encode and decode."""
    module = Autoencoder()
    weights = read_weights(path or file_of("vae"))
    module.load_state_dict({name: value.float() for name, value in weights.items()})
    return module.eval().requires_grad_(False)


def load(name: str, folder: Path = WEIGHTS) -> Portraits:
    """MODEL, CLIP and VAE of the portraits' teacher or student.

    Raises:
        ValueError: if `name` is not one of `MODELS`.
        FileNotFoundError: if weights are missing.
    """
    if name not in MODELS:
        raise ValueError(f"The demo has the models {', '.join(MODELS)}; {name!r} is not one of them.")
    teacher = read_weights(file_of("teacher", folder))
    unet = teacher if name == "teacher" else read_weights(file_of(name, folder))
    vae = load_vae(file_of("vae", folder))
    return Portraits(model_of(unpack_unet(unet), vae), clip_of(unpack_text(teacher)), vae_of(vae))


def model_of(unet: dict[str, torch.Tensor], vae: Autoencoder) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of a UNet's state dict; the autoencoder gives the colours of previews."""
    model = new_unet()
    model.diffusion_model.load_state_dict(unet)
    factors, bias = vae.rgb_factors()
    model.latent_format.latent_rgb_factors = factors
    model.latent_format.latent_rgb_factors_bias = bias
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def clip_of(text: dict[str, torch.Tensor]) -> comfy.sd.CLIP:
    """A CLIP of a text transformer's state dict."""
    target = comfy.supported_models_base.ClipTarget(DemoTokenizer, DemoTextEncoder)
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    clip.cond_stage_model.clip_l.transformer.load_state_dict(text)
    return clip


def vae_of(module: Autoencoder) -> comfy.sd.VAE:
    """A VAE around the autoencoder."""
    # The host builds a VAE object only from weights it recognises; its pixel-space VAE is the one without any.
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.ones(1)}, dtype=torch.float32)
    vae.first_stage_model = module.eval().to(vae.vae_dtype)
    vae.latent_channels = LATENT_CHANNELS
    vae.upscale_ratio = vae.downscale_ratio = 8
    # Bytes a picture: about what the widest layers hold, several times 64 channels at half the picture's resolution.
    vae.memory_used_encode = lambda shape, dtype: 512 * shape[-1] * shape[-2] * 4
    vae.memory_used_decode = lambda shape, dtype: 512 * 64 * shape[-1] * shape[-2] * 4
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    return vae
