"""Models as ComfyUI's templates use them beyond `families.KNOWN`: editing, control by images, video.

Each is a family with what the templates' nodes put beside the prompt.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# isort: split
sys.path.append(str(Path(__file__).parent))

import families
import torch
from families import Family, random

NAMED = {family.name: family for family in families.KNOWN}
# Frames of a video latent.
FRAMES = 3
VIDEO = (16, FRAMES, 8, 8)


def _wan(name: str, config: str, latent: tuple[int, ...] = VIDEO, options: Any = None, **unet: Any) -> Family:
    base = NAMED["Wan 2.1 / 2.2, one frame"]
    return replace(base, name=name, config=config, unet={**base.unet, **unet}, latent=latent, options=options or {})


def _hunyuan15(name: str, config: str, options: dict[str, Any], **unet: Any) -> Family:
    base = NAMED["HunyuanImage 2.1"]
    video = {"out_channels": 32, "patch_size": [1, 1, 1], "axes_dim": [8, 12, 12]}
    seen = {"vision_in_dim": 1152, "use_cond_type_embedding": True}
    unet = {**base.unet, **video, **seen, **unet}
    options = {**options, "pooled_output": None}
    return replace(base, name=name, config=config, unet=unet, latent=(32, FRAMES, 8, 8), options=options)


def _beside(name: str, family: str, options: dict[str, Any], **unet: Any) -> Family:
    """A family with more beside the prompt."""
    base = NAMED[family]
    return replace(base, name=name, unet={**base.unet, **unet}, options={**base.options, **options})


# A start image, encoded, and where it is.
_START = {
    "concat_latent_image": random(1, *VIDEO, seed=20),
    "concat_mask": random(1, 1, FRAMES, 8, 8, seed=21).sigmoid(),
}
# What CLIP Vision says of it, as wide as Wan's.
_SEEN = {"clip_vision_output": SimpleNamespace(penultimate_hidden_states=random(1, 5, 1280, seed=22))}

VARIANTS = (
    _wan("Wan, video", "WAN21_T2V"),
    _wan("Wan 2.1, image to video", "WAN21_I2V", options={**_START, **_SEEN}, model_type="i2v", in_dim=36),
    _wan("Wan 2.2, image to video", "WAN21_T2V", options=_START, in_dim=36),
    _wan("Wan 2.2 5B", "WAN22_T2V", latent=(48, FRAMES, 8, 8), in_dim=48, out_dim=48),
    _wan(
        "Wan Fun Control",
        "WAN21_FunControl2V",
        options={"concat_latent_image": random(1, 32, FRAMES, 8, 8, seed=20), **_SEEN},
        model_type="i2v",
        in_dim=48,
    ),
    _wan(
        "Wan VACE",
        "WAN21_Vace",
        options={
            "vace_frames": [random(1, 32, FRAMES, 8, 8, seed=23)],
            "vace_mask": [random(1, 64, FRAMES, 8, 8, seed=24).sigmoid()],
            "vace_strength": [1.0],
        },
        model_type="vace",
        vace_in_dim=96,
        vace_layers=1,
    ),
    _wan(
        "Wan Fun Camera",
        "WAN22_Camera",
        options={**_START, "camera_conditions": random(1, 24, FRAMES, 64, 64, seed=25)},
        model_type="camera_2.2",
        in_dim=36,
    ),
    _wan(
        "Wan 2.1 Fun Camera",
        "WAN21_Camera",
        options={
            "concat_latent_image": random(1, 16, FRAMES, 8, 8, seed=20),
            "camera_conditions": random(1, 24, FRAMES, 64, 64, seed=25),
            **_SEEN,
        },
        model_type="camera",
        in_dim=32,
    ),
    _wan(
        "Wan 2.2 Fun Control",
        "WAN21_T2V",
        options={
            "concat_latent_image": random(1, 32, FRAMES, 8, 8, seed=20),
            "concat_mask": _START["concat_mask"],
            "concat_mask_index": 16,
            "reference_latents": [random(1, 16, 1, 8, 8, seed=29)],
        },
        in_dim=52,
        in_dim_ref_conv=16,
    ),
    _wan(
        "Wan 2.2 5B Fun Control",
        "WAN22_T2V",
        latent=(48, FRAMES, 8, 8),
        options={
            "concat_latent_image": random(1, 96, FRAMES, 8, 8, seed=20),
            "concat_mask": _START["concat_mask"],
            "concat_mask_index": 48,
            "reference_latents": [random(1, 48, 1, 8, 8, seed=29)],
        },
        in_dim=148,
        out_dim=48,
        in_dim_ref_conv=48,
    ),
    _wan(
        "Wan 2.2 5B Fun Inpaint",
        "WAN22_T2V",
        latent=(48, FRAMES, 8, 8),
        options={
            "concat_latent_image": random(1, 48, FRAMES, 8, 8, seed=20),
            "concat_mask": _START["concat_mask"],
        },
        in_dim=100,
        out_dim=48,
    ),
    replace(
        NAMED["HunyuanImage 2.1"],
        name="HunyuanVideo",
        config="HunyuanVideo",
        unet={
            **NAMED["HunyuanImage 2.1"].unet,
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": families.WIDTH,
            "patch_size": [1, 2, 2],
            "axes_dim": [8, 12, 12],
            "guidance_embed": True,
        },
        latent=VIDEO,
        options={**NAMED["SDXL"].options, "guidance": 6.0},
    ),
    _hunyuan15(
        "HunyuanVideo 1.5",
        "HunyuanVideo15",
        {
            "concat_latent_image": random(1, 32, FRAMES, 8, 8, seed=30),
            "concat_mask": _START["concat_mask"],
            "clip_vision_output": SimpleNamespace(last_hidden_state=random(1, 5, 1152, seed=31)),
        },
        in_channels=65,
    ),
    _hunyuan15(
        "HunyuanVideo 1.5, super resolution",
        "HunyuanVideo15_SR_Distilled",
        {"concat_latent_image": random(1, 66, FRAMES, 8, 8, seed=30), "noise_augmentation": 0.7},
        in_channels=98,
    ),
    Family(
        "LTX-Video",
        "T5",
        "LTXV",
        {
            "image_model": "ltxv",
            "in_channels": 128,
            "cross_attention_dim": 64,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "caption_channels": families.WIDTH,
            "num_layers": 2,
        },
        (128, FRAMES, 4, 4),
        {"frame_rate": 25.0, "attention_mask": torch.ones(1, families.ROWS)},
    ),
    Family(
        "Mochi",
        "T5",
        "GenmoMochi",
        {
            "image_model": "mochi_preview",
            "patch_size": 2,
            "in_channels": 12,
            "hidden_size_x": 64,
            "hidden_size_y": 32,
            "depth": 2,
            "num_heads": 2,
            # The host takes no other hidden size than 12288.
            "mlp_ratio_x": 192.0,
            "mlp_ratio_y": 2.0,
            "t5_feat_dim": families.WIDTH,
            "t5_token_length": families.ROWS,
            "use_t5": True,
            "qkv_bias": False,
            "out_bias": True,
            "attn_drop": 0.0,
            "patch_embed_bias": True,
            "posenc_preserve_area": True,
            "timestep_mlp_bias": True,
            "attend_to_padding": False,
            "timestep_scale": 1000.0,
            "rope_theta": 10000.0,
            "qk_norm": True,
            "learn_sigma": False,
        },
        (12, FRAMES, 8, 8),
        {"attention_mask": torch.ones(1, families.ROWS, dtype=torch.long)},
    ),
    _wan(
        "Wan HuMo",
        "WAN21_HuMo",
        options={
            "reference_latents": [random(1, 16, 1, 8, 8, seed=32)],
            "audio_embed": random(1, FRAMES, 8, 5, 1280, seed=33),
        },
        model_type="humo",
        in_dim=36,
    ),
    _wan(
        "Wan 2.2 Sound to Video",
        "WAN22_S2V",
        options={
            "reference_latents": [random(1, 16, 1, 8, 8, seed=32)],
            "control_video": random(1, *VIDEO, seed=34),
        },
        model_type="s2v",
        audio_inject_layers=[0],
        cond_dim=16,
    ),
    _wan(
        "Wan 2.2 Animate",
        "WAN22_Animate",
        options={**_START, **_SEEN, "pose_video_latent": random(1, *VIDEO, seed=35)},
        model_type="animate",
        in_dim=36,
    ),
    replace(
        NAMED["SD 2.x (v)"],
        name="SD 2.x inpainting",
        unet={**NAMED["SD 2.x (v)"].unet, "in_channels": 9},
        detected={},
        options={
            "concat_latent_image": random(1, 4, 8, 8, seed=27),
            "concat_mask": random(1, 1, 64, 64, seed=28).sigmoid(),
        },
    ),
    replace(
        NAMED["SDXL"],
        name="SDXL refiner",
        encoder="CLIP G",
        config="SDXLRefiner",
        unet={**NAMED["SDXL"].unet, "adm_in_channels": families.WIDTH + 5 * 256},
    ),
    _beside("Qwen-Image, editing", "Qwen-Image", {"reference_latents": [random(1, 16, 1, 8, 4, seed=26)] * 2}),
    _beside("Flux, editing", "Flux dev", {"reference_latents": [random(1, 16, 8, 4, seed=26)]}),
    _beside("Flux.2, editing", "Flux.2", {"reference_latents": [random(1, 128, 4, 2, seed=26)] * 2}),
    _beside("Flux.2 Klein, editing", "Flux.2 Klein", {"reference_latents": [random(1, 128, 4, 2, seed=26)]}),
    _beside("OmniGen2, editing", "OmniGen2", {"reference_latents": [random(1, 16, 8, 4, seed=26)]}),
    _beside("LongCat-Image, editing", "LongCat-Image", {"reference_latents": [random(1, 16, 8, 4, seed=26)]}),
    _beside("Boogu, editing", "Boogu", {"reference_latents": [random(1, 16, 8, 4, seed=26)]}),
    _beside("JoyImage, editing", "JoyImage", {"reference_latents": [random(1, 16, 1, 8, 4, seed=26)]}),
    _beside("Mage-Flow, editing", "Mage-Flow", {"reference_latents": [random(1, 128, 4, 4, seed=26)]}),
    _beside("HiDream, editing", "HiDream", {"concat_latent_image": random(1, 16, 8, 8, seed=26)}),
    _beside(
        "Flux Fill",
        "Flux dev",
        {"concat_latent_image": random(1, 16, 8, 8, seed=27), "concat_mask": random(1, 1, 64, 64, seed=28).sigmoid()},
        in_channels=96,
    ),
    _beside("Flux Canny and Depth", "Flux dev", {"concat_latent_image": random(1, 16, 8, 8, seed=27)}, in_channels=32),
)
BY_NAME = {**NAMED, **{variant.name: variant for variant in VARIANTS}}
