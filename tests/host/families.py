"""Every model family that the pack is proven on, built from the host's own classes at small random weights.

The configurations are what the host's detection makes of a checkpoint, with fewer and narrower layers. Every weight is
random, also those that training starts at zero: a zero output layer would make every gradient zero.

`KNOWN` are those of all versions that the tests were run on, `FAMILIES` those that the host at hand has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import comfy.ldm.chroma.model
import comfy.ldm.chroma_radiance.model
import comfy.ldm.flux.model
import comfy.ldm.hunyuan_video.model
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy_extras import nodes_model_advanced
from comfyui_elrond.elrond_core.prompt import Concept
from comfyui_elrond.nodes import host

# The versions of ComfyUI that these tests were run on.
HOSTS = ("0.3.75", "0.33.0")
WIDTH = 32
ROWS = 7
# A concept of two rows, so that a mix-up of rows shows.
CONCEPT = Concept("dog", (3, 4), ("do", "g"))


@dataclass(frozen=True)
class Family:
    """How to build a family.

    Attributes:
        name: as the table in `docs/models.md` has it.
        encoder: what makes the rows of its prompts, as that table has it.
        config: the host's class in `comfy.supported_models`.
        unet: the small configuration of its network.
        latent: shape of one latent, channels first.
        options: what else its conditioning carries, by name.
        detected: state dict entries from which the host tells variants of a family apart.
        patch: what a loader of this variant does to the model.
        needs: a class, as "module:name", that a host which knows this family has beside `config`.
        hosts: versions of ComfyUI, of those in `HOSTS`, that have the family.
        centred: how names of weights end that multiply by one more than themselves.
        curved: whether finite differences need short steps, and so double precision.
        smaller: makes parts small while the model is built whose size no configuration sets.
    """

    name: str
    encoder: str
    config: str
    unet: dict[str, Any]
    latent: tuple[int, ...] = (4, 8, 8)
    options: dict[str, Any] = field(default_factory=dict)
    detected: dict[str, torch.Tensor] = field(default_factory=dict)
    patch: Callable[[Any], Any] | None = None
    needs: str = ""
    hosts: tuple[str, ...] = HOSTS
    centred: tuple[str, ...] = ()
    curved: bool = False
    smaller: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def exists(self) -> bool:
        """Whether the host at hand has this family."""
        if not hasattr(comfy.supported_models, self.config):
            return False
        module, _, name = self.needs.partition(":")
        return not module or hasattr(importlib.import_module(module), name)


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
    config = getattr(comfy.supported_models, family.config)(dict(family.unet))
    # The host's own settings of a family would make it as large as its checkpoints.
    config.unet_config |= family.unet
    config.set_inference_dtype(stored, computed)
    config.custom_operations = operations
    with family.smaller():
        model = config.get_model(dict(family.detected), device=torch.device("cpu")).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.diffusion_model.state_dict().items():
        value = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            value = value / weight[0].numel() ** 0.5
        else:
            value = 0.1 * value + (0.0 if name.endswith(("bias", *family.centred)) else 1.0)
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


def _known(parameters: Any, **values: Any) -> dict[str, Any]:
    """Those of the values that this version's dataclass of a network's parameters has a field for."""
    names = {each.name for each in dataclasses.fields(parameters)}
    return {name: value for name, value in values.items() if name in names}


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
    **_known(comfy.ldm.flux.model.FluxParams, txt_ids_dims=[]),
}
_FLUX2: dict[str, Any] = {
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
    **_known(comfy.ldm.flux.model.FluxParams, txt_ids_dims=[3]),
}
_CHROMA = {
    **{k: v for k, v in _FLUX.items() if k not in ("vec_in_dim", "guidance_embed", "txt_ids_dims")},
    **_known(comfy.ldm.chroma.model.ChromaParams, vec_in_dim=None, txt_ids_dims=[]),
}
_HUNYUAN = {k: v for k, v in _FLUX.items() if k != "txt_ids_dims"}
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


_COSMOS: dict[str, Any] = {
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
}


def _lcm(model: Any) -> Any:
    return nodes_model_advanced.ModelSamplingDiscrete().patch(model, "lcm", False)[0]


@contextlib.contextmanager
def _small_adapter() -> Iterator[None]:
    """The widths and depth of Anima's text adapter are defaults of its class."""
    module = importlib.import_module("comfy.ldm.anima.model")
    small = functools.partial(
        module.LLMAdapter, source_dim=WIDTH, target_dim=WIDTH, model_dim=WIDTH, num_layers=2, num_heads=2
    )
    with mock.patch.object(module, "LLMAdapter", small):
        yield


KNOWN = (
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
        _FLUX2,
        (128, 4, 4),
        {"pooled_output": None},
    ),
    Family(
        "Flux.2 Klein",
        "Qwen 3",
        "Flux2",
        {**_FLUX2, "guidance_embed": False},
        (128, 4, 4),
        {"pooled_output": None},
        needs="comfy.text_encoders.flux:KleinTokenizer",
        hosts=("0.33.0",),
    ),
    Family(
        "LongCat-Image",
        "Qwen 2.5 VL",
        "LongCatImage",
        {**_FLUX, "guidance_embed": False, "vec_in_dim": None, "txt_ids_dims": [1, 2]},
        (16, 8, 8),
        {"pooled_output": None},
        hosts=("0.33.0",),
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
            **_HUNYUAN,
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
            **_known(comfy.ldm.hunyuan_video.model.HunyuanVideoParams, meanflow_sum=False),
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
            **_known(comfy.ldm.chroma_radiance.model.ChromaRadianceParams, use_x0=False, use_sequential_txt_ids=False),
        },
        (3, 16, 16),
        {"pooled_output": None},
    ),
    Family(
        "Cosmos Predict2",
        "T5",
        "CosmosT2IPredict2",
        _COSMOS,
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
    Family(
        "Anima",
        "Qwen 3; its T5 token ids stay as they are",
        "Anima",
        {**_COSMOS, "image_model": "anima"},
        (16, 1, 8, 8),
        {"t5xxl_ids": torch.arange(64), "t5xxl_weights": torch.ones(64)},
        hosts=("0.33.0",),
        smaller=_small_adapter,
    ),
    Family(
        "Boogu",
        "Qwen 3 VL",
        "Boogu",
        {
            "image_model": "boogu",
            "axes_dim_rope": (8, 12, 12),
            "hidden_size": 64,
            "instruction_feat_dim": WIDTH,
            "multiple_of": 32,
            "num_attention_heads": 2,
            "num_double_stream_layers": 1,
            "num_kv_heads": 1,
            "num_layers": 2,
            "num_refiner_layers": 1,
        },
        (16, 8, 8),
        {"attention_mask": torch.ones(1, ROWS, dtype=torch.long)},
        hosts=("0.33.0",),
    ),
    Family(
        "Ernie-Image",
        "Ministral 3",
        "ErnieImage",
        {
            "image_model": "ernie",
            "ffn_hidden_size": 64,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_layers": 2,
            "rope_axes_dim": (8, 12, 12),
            "text_in_dim": WIDTH,
        },
        (128, 4, 4),
        hosts=("0.33.0",),
    ),
    Family(
        "Ideogram 4",
        "Qwen 3 VL, several layers side by side",
        "Ideogram4",
        {
            "image_model": "ideogram4",
            "adaln_dim": 32,
            "attention_head_dim": 32,
            "in_channels": 128,
            "intermediate_size": 64,
            "llm_features_dim": WIDTH,
            "mrope_section": (6, 5, 5),
            "num_attention_heads": 2,
            "num_layers": 2,
        },
        (128, 4, 4),
        hosts=("0.33.0",),
    ),
    Family(
        "JoyImage",
        "Qwen 3 VL",
        "JoyImage",
        {
            "image_model": "joyimage",
            "hidden_size": 64,
            "in_channels": 16,
            "num_attention_heads": 2,
            "num_layers": 2,
            "patch_size": [1, 2, 2],
            "rope_dim_list": [8, 12, 12],
            "text_dim": WIDTH,
        },
        (16, 1, 8, 8),
        hosts=("0.33.0",),
    ),
    Family(
        "Kandinsky 5 Image",
        "Qwen 2.5 VL; the vector of CLIP L stays as it is",
        "Kandinsky5Image",
        {
            "image_model": "kandinsky5",
            "axes_dims": (8, 12, 12),
            "ff_dim": 64,
            "in_text_dim": WIDTH,
            "in_text_dim2": WIDTH,
            "model_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "rope_scale_factor": (1.0, 1.0, 1.0),
            "time_dim": 32,
            "visual_embed_dim": 64,
        },
        (16, 8, 8),
        _POOLED,
        hosts=("0.33.0",),
    ),
    Family(
        "Krea 2",
        "Qwen 3 VL, several layers side by side",
        "Krea2",
        {
            "image_model": "krea2",
            "channels": 16,
            "features": 64,
            "heads": 2,
            "kvheads": 1,
            "layers": 2,
            "patch": 2,
            "txtdim": WIDTH // 2,
            "txtheads": 2,
            "txtkvheads": 2,
            "txtlayers": 2,
        },
        (16, 1, 8, 8),
        hosts=("0.33.0",),
        centred=(".scale",),
        curved=True,
    ),
    Family(
        "Lens",
        "GPT-OSS, several layers side by side",
        "Lens",
        {
            "image_model": "lens",
            "attention_head_dim": 32,
            "axes_dims_rope": (8, 12, 12),
            "enc_hidden_dim": WIDTH // 2,
            "in_channels": 128,
            "multi_layer_encoder_feature": True,
            "num_attention_heads": 2,
            "num_layers": 2,
            "out_channels": 32,
            "selected_layer_index": (0, 1),
        },
        (128, 4, 4),
        hosts=("0.33.0",),
    ),
    Family(
        "Mage-Flow",
        "Qwen 3 VL",
        "MageFlow",
        {
            "image_model": "mage_flow",
            "attention_head_dim": 32,
            "axes_dims_rope": [8, 12, 12],
            "in_channels": 128,
            "joint_attention_dim": WIDTH,
            "num_attention_heads": 2,
            "num_layers": 2,
        },
        (128, 4, 4),
        hosts=("0.33.0",),
    ),
)
FAMILIES = tuple(family for family in KNOWN if family.exists())
