"""The demo model as genuine ComfyUI objects: a UNet from the host, its CLIP text encoder and tokenizer, a linear VAE.

A checkpoint is one safetensors file with the prefixes `unet.`, `text.` and `vae.` and nothing else. The token
table has a row for every entry of the CLIP vocabulary; rows that no caption of the demo world uses keep their
seeded initial values, so the file stores the trained rows only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import safetensors.torch
import torch

LATENT_CHANNELS = 24
PATCH = 4
TOKEN_WIDTH = 128
MAX_TOKENS = 16
VOCABULARY = 49408
END_TOKEN = 49407
MODELS = ("teacher", "student")
WEIGHTS = Path(__file__).parent / "weights"

UNET_CONFIG: dict[str, Any] = {
    "image_size": 8,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "model_channels": 96,
    "num_res_blocks": [2, 1],
    "dropout": 0,
    "channel_mult": (1, 1),
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1, 1],
    "transformer_depth_output": [1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": TOKEN_WIDTH,
    "use_checkpoint": False,
    "legacy": False,
}
TEXT_CONFIG: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": TOKEN_WIDTH,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": MAX_TOKENS,
    "eos_token_id": END_TOKEN,
}
SAMPLING = {"shift": 2.0, "multiplier": 1000}
TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"


class PatchVAE(torch.nn.Module):
    """A linear autoencoder: principal components of the world's 4x4 patches, each scaled by its std^-1/2.

    Decoded images are 64x64, every pixel doubled, so that a latent cell is 8x8 pixels as in Stable Diffusion.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        size = 3 * PATCH * PATCH
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.zeros(LATENT_CHANNELS, size))
        self.register_buffer("scale", torch.ones(LATENT_CHANNELS))

    @torch.no_grad()
    def fit(self, images: torch.Tensor) -> None:
        """Learn the components from (N, 3, 32, 32) images in [-1, 1]."""
        patches = torch.nn.functional.pixel_unshuffle(images, PATCH).movedim(1, -1).flatten(0, 2).double()
        self.mean.copy_(patches.mean(0))
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))
        top = vectors.flip(1)[:, :LATENT_CHANNELS].T
        top = top * torch.sign(top.gather(1, top.abs().argmax(1, keepdim=True)))
        self.basis.copy_(top)
        self.scale.copy_(values.flip(0)[:LATENT_CHANNELS] ** -0.25)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, 64, 64) in [-1, 1] to (N, 24, 8, 8)."""
        return self.encode_small(torch.nn.functional.avg_pool2d(pixels, 2))

    def encode_small(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, 32, 32) in [-1, 1] to (N, 24, 8, 8)."""
        patches = torch.nn.functional.pixel_unshuffle(pixels, PATCH) - self.mean[:, None, None]
        return torch.einsum("cp,nphw->nchw", self.basis * self.scale[:, None], patches)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, 24, 8, 8) to (N, 3, 64, 64) in [-1, 1]."""
        return torch.nn.functional.interpolate(self.decode_small(latents), scale_factor=2, mode="nearest")

    def decode_small(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, 24, 8, 8) to (N, 3, 32, 32) in [-1, 1]."""
        patches = torch.einsum("cp,nchw->nphw", self.basis / self.scale[:, None], latents)
        return torch.nn.functional.pixel_shuffle(patches + self.mean[:, None, None], PATCH)

    def rgb_factors(self) -> tuple[list[list[float]], list[float]]:
        """The linear map from a latent cell to its mean colour, for the host's previews."""
        decode = (self.basis / self.scale[:, None]).reshape(LATENT_CHANNELS, 3, -1).mean(-1)
        return decode.tolist(), self.mean.reshape(3, -1).mean(-1).tolist()


class DemoLatent(comfy.latent_formats.LatentFormat):
    """24 channels of 8x8 pixels; the VAE scales, so the host need not."""

    latent_channels = LATENT_CHANNELS
    scale_factor = 1.0


class DemoConfig(comfy.supported_models_base.BASE):
    """What the host wants to know of a model: UNet, rectified flow, latent format."""

    unet_config = UNET_CONFIG
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


class DemoTokenizer(comfy.sd1_clip.SD1Tokenizer):
    """The host's CLIP tokenizer with chunks of 16 tokens."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        data = {**(tokenizer_data or {}), "l_max_length": MAX_TOKENS}
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=data, tokenizer=_Tokenizer)


class _Tokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, **kwargs: Any) -> None:
        kwargs.update(max_length=MAX_TOKENS, embedding_size=TOKEN_WIDTH)
        super().__init__(**kwargs)


class DemoTextModel(comfy.sd1_clip.SDClipModel):
    """A causal CLIP text transformer; rows after the end token are zero."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        super().__init__(
            device=device,
            max_length=MAX_TOKENS,
            layer="last",
            textmodel_json_config=dict(TEXT_CONFIG),
            dtype=dtype,
            special_tokens={"start": 49406, "end": END_TOKEN, "pad": END_TOKEN},
            zero_out_masked=True,
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class DemoTextEncoder(comfy.sd1_clip.SD1ClipModel):
    """The wrapper the host's CLIP object expects."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=DemoTextModel)


def token_table() -> torch.Tensor:
    """The seeded initial token table, (49408, 128) float32."""
    generator = torch.Generator().manual_seed(2602)
    return torch.randn(VOCABULARY, TOKEN_WIDTH, generator=generator) * 0.5


def new_unet() -> comfy.model_base.BaseModel:
    """The host's model object around a UNet whose weights are not set yet."""
    config = DemoConfig(UNET_CONFIG)
    config.set_inference_dtype(torch.float32, None)
    return config.get_model({}, device=torch.device("cpu")).eval()


def new_text_transformer() -> torch.nn.Module:
    """The text transformer alone, weights not set yet."""
    return comfy.clip_model.CLIPTextModel(dict(TEXT_CONFIG), torch.float32, "cpu", comfy.ops.manual_cast)


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
