"""Every model family that the pack is proven on, built from the host's own classes at small random weights.

The configurations are what the host's detection makes of a checkpoint, with fewer and narrower layers. Every weight is
random, also those that training starts at zero: a zero output layer would make every gradient zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy_extras import nodes_model_advanced
from comfyui_elrond.elrond_core.prompt import Concept
from comfyui_elrond.nodes import host

WIDTH = 32
ROWS = 7
# A concept of two rows, so that a mix-up of rows shows.
CONCEPT = Concept("dog", (3, 4), ("do", "g"))


@dataclass(frozen=True)
class Family:
    """How to build a family.

    Attributes:
        name: as the table of docs/models.md has it.
        encoder: what makes the rows of its prompts, as the table of docs/models.md has it.
        config: the host's class in `comfy.supported_models`.
        unet: the small configuration of its network.
        latent: shape of one latent, channels first.
        options: what else its conditioning carries, by name.
        detected: state dict entries from which the host tells variants of a family apart.
        patch: what a loader of this variant does to the model.
    """

    name: str
    encoder: str
    config: str
    unet: dict[str, Any]
    latent: tuple[int, ...] = (4, 8, 8)
    options: dict[str, Any] = field(default_factory=dict)
    detected: dict[str, torch.Tensor] = field(default_factory=dict)
    patch: Callable[[Any], Any] | None = None


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(
    family: Family, stored: torch.dtype = torch.float32, computed: torch.dtype | None = None, operations: Any = None
) -> Any:
    """The family as a MODEL.

    Args:
        family: which.
        stored: dtype of the weights.
        computed: dtype they are cast to for computation, where that differs.
        operations: the host's layer classes to use instead of those it picks for these dtypes.
    """
    config = getattr(comfy.supported_models, family.config)(family.unet)
    config.set_inference_dtype(stored, computed)
    config.custom_operations = operations
    model = config.get_model(dict(family.detected), device=torch.device("cpu")).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.diffusion_model.state_dict().items():
        value = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            value = value / weight[0].numel() ** 0.5
        else:
            value = 0.1 * value + (0.0 if name.endswith("bias") else 1.0)
        weight.copy_(value)
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=torch.device("cpu")
    )
    return family.patch(patcher) if family.patch else patcher


def prompt(family: Family, seed: int = 1) -> Any:
    """A CONDITIONING of this family, with its concept marked."""
    return host.mark([[random(1, ROWS, WIDTH, seed=seed), dict(family.options)]], family.name, "a dog", [CONCEPT])


def latents(family: Family, count: int = 2) -> torch.Tensor:
    """Random realizations."""
    return random(count, *family.latent, seed=2)


_UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "use_checkpoint": False,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
    "legacy": False,
    "adm_in_channels": None,
    "context_dim": WIDTH,
}
_SDXL = {**_UNET, "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": WIDTH + 6 * 256}
_POOLED = {"pooled_output": random(1, WIDTH, seed=3)}
_FLUX: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "context_in_dim": WIDTH,
    "vec_in_dim": WIDTH,
    "hidden_size": 64,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
}
_CHROMA = {k: v for k, v in _FLUX.items() if k not in ("vec_in_dim", "guidance_embed")}
_LUMINA: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 64,
    "cap_feat_dim": WIDTH,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "qk_norm": True,
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.0,
    "axes_dims": [8, 12, 12],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
}
_PIXART: dict[str, Any] = {
    "image_model": "pixart_alpha",
    "num_heads": 2,
    "patch_size": 2,
    "hidden_size": 48,
    "in_channels": 4,
    "depth": 2,
    "caption_channels": WIDTH,
    "model_max_length": ROWS,
    "input_size": 64,
    "pe_interpolation": 1,
    "micro_condition": True,
}


def _lcm(model: Any) -> Any:
    return nodes_model_advanced.ModelSamplingDiscrete().patch(model, "lcm", False)[0]


FAMILIES = (
    Family("SD 1.x", "CLIP L", "SD15", _UNET),
    Family(
        "SD 2.x (v)",
        "CLIP H",
        "SD20",
        {**_UNET, "use_linear_in_transformer": True},
        # The host reads the parameterisation from the spread of this weight.
        detected={"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.arange(4.0)},
    ),
    Family("SDXL", "CLIP L and G, side by side", "SDXL", _SDXL, options={**_POOLED, "width": 768, "height": 1024}),
    Family("SDXL with LCM", "CLIP L and G, side by side", "SDXL", _SDXL, options=_POOLED, patch=_lcm),
    Family(
        "SD 3 / 3.5",
        "CLIP L and G, then T5",
        "SD3",
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "depth": 2,
            "input_size": None,
            "adm_in_channels": WIDTH,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": WIDTH, "out_features": 128},
            },
            "num_patches": 64,
            "pos_embed_max_size": 8,
            "qk_norm": "rms",
            "x_block_self_attn_layers": [0],
        },
        (16, 8, 8),
        _POOLED,
    ),
    Family("Flux dev", "T5", "Flux", _FLUX, (16, 8, 8), {**_POOLED, "guidance": 3.5}),
    Family("Flux schnell", "T5", "FluxSchnell", {**_FLUX, "guidance_embed": False}, (16, 8, 8), _POOLED),
    Family(
        "Flux.2",
        "Mistral 3",
        "Flux2",
        {
            **_FLUX,
            "image_model": "flux2",
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "axes_dim": [8, 8, 8, 8],
            "theta": 2000,
            "vec_in_dim": None,
            "qkv_bias": False,
            "ops_bias": False,
            "global_modulation": True,
            "mlp_silu_act": True,
        },
        (128, 4, 4),
        {"pooled_output": None},
    ),
    Family(
        "Chroma",
        "T5",
        "Chroma",
        {
            **_CHROMA,
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "in_dim": 64,
            "out_dim": 64,
            "hidden_dim": 64,
            "n_layers": 2,
        },
        (16, 8, 8),
        {"pooled_output": None},
    ),
    Family(
        "AuraFlow",
        "Pile-T5",
        "AuraFlow",
        {
            "cond_seq_dim": WIDTH,
            "max_seq": 64,
            "n_double_layers": 1,
            "n_layers": 2,
            "dim": 64,
            "n_heads": 2,
            "global_conddim": 64,
        },
    ),
    # The host divides by zero below 33 latents a side.
    Family("PixArt α", "T5", "PixArtAlpha", _PIXART, (4, 36, 36)),
    Family(
        "PixArt Σ",
        "T5",
        "PixArtSigma",
        {**_PIXART, "image_model": "pixart_sigma", "micro_condition": False},
        (4, 36, 36),
    ),
    Family(
        "Lumina 2", "Gemma 2", "Lumina2", _LUMINA, (16, 8, 8), {"attention_mask": torch.ones(1, ROWS, dtype=torch.long)}
    ),
    Family(
        "Z-Image",
        "Qwen 3",
        "ZImage",
        {
            **_LUMINA,
            # Its modulation is 256 wide.
            "dim": 256,
            "n_heads": 8,
            "n_kv_heads": 8,
            "rope_theta": 256.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        (16, 8, 8),
    ),
    Family(
        "Qwen-Image",
        "Qwen 2.5 VL",
        "QwenImage",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": [8, 12, 12],
        },
        (16, 1, 8, 8),
    ),
    Family(
        "HunyuanDiT",
        "BERT; its mT5 rows stay as they are",
        "HunyuanDiT",
        {
            "image_model": "hydit",
            "hidden_size": 64,
            "depth": 4,
            "num_heads": 4,
            "text_states_dim": WIDTH,
            "text_states_dim_t5": 64,
            "text_len": ROWS,
            "text_len_t5": 8,
        },
        options={
            "attention_mask": torch.tensor([[1] * (ROWS - 1) + [0]]),
            "conditioning_mt5xl": random(1, 8, 64, seed=4),
            "attention_mask_mt5xl": torch.ones(1, 8, dtype=torch.long),
        },
    ),
    Family(
        "HunyuanImage 2.1",
        "Qwen 2.5 VL",
        "HunyuanImage21",
        {
            **_FLUX,
            "image_model": "hunyuan_video",
            "in_channels": 64,
            "out_channels": 64,
            "vec_in_dim": None,
            "patch_size": [1, 1],
            "axes_dim": [16, 16],
            "theta": 256,
            "guidance_embed": False,
            "byt5": False,
            "meanflow": False,
            "use_cond_type_embedding": False,
            "vision_in_dim": None,
        },
        # No attention mask: the encoder leaves out one without gaps, and with one the host samples single images only.
        (64, 4, 4),
    ),
    Family(
        "HiDream",
        "T5; its Llama rows stay as they are",
        "HiDream",
        {
            "image_model": "hidream",
            "attention_head_dim": 32,
            "axes_dims_rope": [16, 8, 8],
            "caption_channels": [WIDTH, WIDTH],
            "in_channels": 16,
            "out_channels": 16,
            "llama_layers": [0, 1],
            "num_attention_heads": 2,
            # As many as there are, because the choice among experts is not continuous.
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "num_layers": 1,
            "num_single_layers": 1,
            "patch_size": 2,
            "text_emb_dim": WIDTH,
        },
        (16, 8, 8),
        {**_POOLED, "conditioning_llama3": random(1, 2, 5, WIDTH, seed=4)},
    ),
    Family(
        "OmniGen2",
        "Qwen 2.5 VL",
        "Omnigen2",
        {
            "image_model": "omnigen2",
            "axes_dim_rope": [8, 12, 12],
            "axes_lens": [1024, 1664, 1664],
            "hidden_size": 64,
            "in_channels": 16,
            "multiple_of": 32,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "text_feat_dim": WIDTH,
            "timestep_scale": 1000.0,
        },
        (16, 8, 8),
        {"attention_mask": torch.ones(1, ROWS, dtype=torch.long)},
    ),
    Family(
        "Chroma Radiance",
        "T5",
        "ChromaRadiance",
        {
            **_CHROMA,
            "image_model": "chroma_radiance",
            "in_channels": 3,
            "out_channels": 3,
            "in_dim": 64,
            "out_dim": 64,
            "hidden_dim": 64,
            "n_layers": 2,
            "patch_size": 4,
            "nerf_hidden_size": 16,
            "nerf_mlp_ratio": 2,
            "nerf_depth": 1,
            "nerf_max_freqs": 4,
            "nerf_tile_size": 0,
            "nerf_final_head_type": "conv",
            "nerf_embedder_dtype": torch.float32,
        },
        (3, 16, 16),
        {"pooled_output": None},
    ),
    Family(
        "Cosmos Predict2",
        "T5",
        "CosmosT2IPredict2",
        {
            "image_model": "cosmos_predict2",
            "max_img_h": 16,
            "max_img_w": 16,
            "max_frames": 8,
            "in_channels": 16,
            "out_channels": 16,
            "patch_spatial": 2,
            "patch_temporal": 1,
            "model_channels": 64,
            "num_blocks": 2,
            "num_heads": 2,
            "crossattn_emb_channels": WIDTH,
            "pos_emb_cls": "rope3d",
            "pos_emb_learnable": True,
            "use_adaln_lora": True,
            "adaln_lora_dim": 16,
        },
        (16, 1, 8, 8),
    ),
    Family(
        "Wan 2.1 / 2.2, one frame",
        "UMT5",
        "WAN21_T2V",
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 64,
            "ffn_dim": 64,
            "num_heads": 2,
            "num_layers": 2,
            "text_dim": WIDTH,
            "in_dim": 16,
            "out_dim": 16,
        },
        (16, 1, 8, 8),
    ),
)
