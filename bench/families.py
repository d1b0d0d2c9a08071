"""What a gradient costs on the model families that people run, at full size with random weights.

    ELROND_GPU=1 python -m bench.families                    all families, on the graphics card
    ELROND_GPU=1 python -m bench.families --family "Z-Image"
    python -m bench.families --small                         the same steps with small networks, on the processor

Of each family, with weights stored in bfloat16 and in float8: seconds a gradient and peak memory with all of the card
free and with less, activations kept or computed again, and the share of the card's matrix rate. Results are written to
bench/results/families.json after each family and storage; what is there already is not measured again. Those of --small
go to a temporary file.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import host as demo_host

# isort: split
import comfy.ldm.chroma.model
import comfy.ldm.flux.model
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from torch.utils.flop_counter import FlopCounterMode

demo_host.pack()
from comfyui_elrond.elrond_core.collect.differentiate import Differentiator, gradient  # noqa: E402
from comfyui_elrond.elrond_core.errors import ElrondError  # noqa: E402
from comfyui_elrond.elrond_core.prompt import Concept  # noqa: E402
from comfyui_elrond.elrond_core.seeding import normal  # noqa: E402
from comfyui_elrond.nodes import host  # noqa: E402

from .gradients import CPU, DEVICE, ON_GPU, clock, machine  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "families.json"
STORED = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
SIZES = (1024, 512)
# GiB that are free. The first is the whole card; the others come in the order in which people have such cards.
CARDS = (80, 24, 12, 16, 8)
# What of the activations is kept, as docs/memory.md has it.
WAYS = ("all kept", "without what is cheap", "computed twice")
# Targets that share a forward pass.
TARGETS = (1, 4)
# Seconds for all, unless others are asked for, after which no further family is begun; a later run goes on.
ALL = 540
# Bytes that the driver may not be able to hand out in one piece.
SLACK = 1 << 28
# Weights that exceed the free memory by more than this factor pass over the bus for minutes.
EXCESS = 2.5


@dataclass(frozen=True)
class Family:
    """A network at full size.

    Attributes:
        config: the host's class in `comfy.supported_models`.
        unet: its configuration.
        small: what differs in the small network.
        latent: channels of a latent, and the axes before height and width.
        cell: pixels a latent cell.
        rows: shape of an encoded prompt.
        pooled: length of the pooled vector that its conditioning carries, or None.
    """

    config: str
    unet: dict[str, Any]
    small: dict[str, Any]
    latent: tuple[int, ...]
    rows: tuple[int, int]
    cell: int = 8
    pooled: int | None = None


def _sd3(depth: int, side: int, attending: list[int]) -> dict[str, Any]:
    """MMDiT: 64 channels a layer of depth."""
    return {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "depth": depth,
        "input_size": None,
        "adm_in_channels": 2048,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 4096, "out_features": 64 * depth},
        },
        "num_patches": side**2,
        "pos_embed_max_size": side,
        "qk_norm": "rms",
        "x_block_self_attn_layers": attending,
    }


def _known(params: type, **fields: Any) -> dict[str, Any]:
    """Those fields that this host's configuration of a network has."""
    return {name: value for name, value in fields.items() if name in params.__dataclass_fields__}


_FLUX: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "context_in_dim": 4096,
    "vec_in_dim": 768,
    "hidden_size": 3072,
    "num_heads": 24,
    "mlp_ratio": 4.0,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    **_known(comfy.ldm.flux.model.FluxParams, txt_ids_dims=[]),
}
_FEW = {"depth": 1, "depth_single_blocks": 1, "hidden_size": 128, "num_heads": 1}
_SMALL_SD3 = {**_sd3(2, 192, []), "adm_in_channels": 2048}
FAMILIES = {
    "SDXL": Family(
        "SDXL",
        {
            **comfy.supported_models.SDXL.unet_config,
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "num_classes": "sequential",
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4],
            "num_head_channels": 64,
            "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "use_spatial_transformer": True,
            "use_temporal_resblock": False,
            "legacy": False,
        },
        {
            "model_channels": 64,
            "transformer_depth": [0, 0, 1, 1, 1, 1],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
        },
        (4,),
        (77, 2048),
        pooled=1280,
    ),
    "SD 3.5 medium": Family("SD3", _sd3(24, 384, list(range(13))), _SMALL_SD3, (16,), (154, 4096), pooled=2048),
    "SD 3.5 large": Family("SD3", _sd3(38, 192, []), _SMALL_SD3, (16,), (154, 4096), pooled=2048),
    "Flux schnell": Family("FluxSchnell", _FLUX, _FEW, (16,), (256, 4096), pooled=768),
    "Flux.2 Klein": Family(
        "Flux2",
        {
            **_FLUX,
            "image_model": "flux2",
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "context_in_dim": 7680,
            "vec_in_dim": None,
            "mlp_ratio": 3.0,
            "depth": 5,
            "depth_single_blocks": 20,
            "axes_dim": [32, 32, 32, 32],
            "theta": 2000,
            "qkv_bias": False,
            "ops_bias": False,
            "global_modulation": True,
            "mlp_silu_act": True,
            **_known(comfy.ldm.flux.model.FluxParams, txt_ids_dims=[3]),
        },
        _FEW,
        (128,),
        (512, 7680),
        cell=16,
    ),
    "Z-Image": Family(
        "ZImage",
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 3840,
            "cap_feat_dim": 2560,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "qk_norm": True,
            "ffn_dim_multiplier": 8 / 3,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        {"dim": 256, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
        (16,),
        (128, 2560),
    ),
    "Qwen-Image": Family(
        "QwenImage",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "axes_dims_rope": [16, 56, 56],
        },
        {"num_layers": 2, "num_attention_heads": 1},
        (16, 1),
        (128, 3584),
    ),
    "Chroma": Family(
        "Chroma",
        {
            **{k: v for k, v in _FLUX.items() if k not in ("vec_in_dim", "guidance_embed", "txt_ids_dims")},
            **_known(comfy.ldm.chroma.model.ChromaParams, vec_in_dim=None, txt_ids_dims=[]),
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "in_dim": 64,
            "out_dim": 3072,
            "hidden_dim": 5120,
            "n_layers": 5,
        },
        {**_FEW, "out_dim": 128, "hidden_dim": 64, "n_layers": 1},
        (16,),
        (256, 4096),
    ),
}


def build(family: Family, stored: torch.dtype, small: bool) -> tuple[Any, int]:
    """The family as a MODEL with random weights, made where they are used, and the number of its parameters."""
    config = getattr(comfy.supported_models, family.config)({**family.unet, **(family.small if small else {})})
    config.set_inference_dtype(stored, torch.bfloat16 if stored is not torch.bfloat16 else None)
    model = config.get_model({}, device=DEVICE).eval()
    generator = torch.Generator(DEVICE).manual_seed(0)
    model.requires_grad_(False)
    # Positions of some families are buffers that a checkpoint fills.
    for name, weight in model.diffusion_model.state_dict().items():
        if weight.ndim > 1:
            mean, deviation = 0.0, weight[0].numel() ** -0.5
        else:
            mean, deviation = 0.0 if name.endswith("bias") else 1.0, 0.1
        values = torch.empty(weight.shape, dtype=torch.bfloat16, device=DEVICE)
        weight.copy_(values.normal_(mean, deviation, generator=generator))
    count = sum(weight.numel() for weight in model.diffusion_model.parameters())
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=DEVICE, offload_device=CPU)
    # The host takes note of where the weights are.
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    return patcher, count


def prompt(family: Family) -> Any:
    """A marked CONDITIONING."""
    options = {"pooled_output": normal((family.pooled,), 0, "pooled", [0]) if family.pooled else None}
    concept = Concept("dog", (3,), ("dog",))
    return host.mark([[normal(family.rows, 0, "rows", [0]), options]], family.config, "a dog", [concept])


def matrix_rate() -> float:
    """Operations a second of large matrix products in bfloat16, the best of several."""
    side = 8192 if ON_GPU else 512
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(5):
        started = clock()
        for _ in range(4):
            a @ b
        rates.append(4 * 2 * side**3 / (clock() - started))
    return max(rates)


@contextmanager
def only_free(gib: int, small: bool) -> Iterator[int]:
    """For the time being, so much of the card is free, what loaded models take included; yields what is taken of it."""
    manager = comfy.model_management
    if not ON_GPU:
        # For small networks that is twice so many MiB, and nothing but a figure that the host is told.
        before = manager.get_free_memory
        manager.get_free_memory = lambda *_, torch_free_too=False, **__: (
            (gib << 21,) * 2 if torch_free_too else gib << 21
        )
        try:
            yield 0
        finally:
            manager.get_free_memory = before
        return
    taken = 0 if gib == CARDS[0] else max(0, torch.cuda.mem_get_info()[1] - gib * 2**30)
    manager.free_memory(taken, DEVICE)
    manager.soft_empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, min(taken, free - SLACK)), dtype=torch.uint8, device=DEVICE)
    try:
        yield ballast.numel()
    finally:
        del ballast
        manager.soft_empty_cache()


def costs(model: Any, family: Family, size: int, way: str, count: bool) -> dict[str, Any]:
    """Of one visit: seconds a gradient by targets, the way it went (or one that needs less), operations if asked."""
    shape = (*family.latent, size // family.cell, size // family.cell)
    sigma, noise = host.sigma_of(model, 1.0), normal(shape, 0, "noise", [0])

    def work(denoiser: Any, latents: torch.Tensor) -> dict[str, Any]:
        denoiser.saved.sparing, denoiser.checkpointed = way != WAYS[0], way == WAYS[2]
        differentiate = Differentiator(denoiser)
        found: dict[str, Any] = {}
        # Memory is handed out for the first time, and kernels are chosen.
        differentiate(latents[:1], latents[1:2], noise, sigma)
        if count:
            with FlopCounterMode(display=False) as counter:
                gradient(denoiser, latents[:1], latents[1:2], noise, sigma)
            found["operations"] = counter.get_total_flops()
        for targets in TARGETS:
            started = clock()
            differentiate(latents[:1], latents[1 : 1 + targets, None], noise, sigma)
            found[f"seconds, {targets} targets"] = round((clock() - started) / targets, 4)
        return {**found, "way": WAYS[denoiser.saved.sparing + denoiser.checkpointed]}

    latents = normal(shape, 0, "latents", list(range(1 + max(TARGETS))))
    return host.with_denoiser(model, prompt(family), None, 1.0, latents, 0, work)


def measured(model: Any, family: Family, weights: float, small: bool, deadline: float) -> dict[str, Any]:
    """All points of one family and storage, by name; what there was no time for is absent."""
    points: dict[str, Any] = {}
    # Free memory first, so that weights leave the card once only, and the larger size of every card before the smaller.
    order = [(CARDS[0], SIZES[0], WAYS[0]), *((gib, SIZES[0], WAYS[0]) for gib in CARDS[1:])]
    order += [(CARDS[0], size, way) for size in SIZES for way in WAYS if (size, way) != (SIZES[0], WAYS[0])]
    order += [(gib, SIZES[1], WAYS[0]) for gib in CARDS[1:]]
    for gib, size, way in order:
        name = f"{gib} GiB, {size}²" + (f", {way}" if gib == CARDS[0] else "")
        if time.monotonic() > deadline or (not small and weights > EXCESS * gib):
            continue
        with only_free(gib, small) as taken:
            if ON_GPU:
                # What an earlier point left reserved would count as this one's.
                comfy.model_management.soft_empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                point = costs(
                    model, family, 8 * family.cell if small else size, way, gib == CARDS[0] and way == WAYS[0]
                )
            except (ElrondError, torch.cuda.OutOfMemoryError) as error:
                points[name] = {"error": str(error).splitlines()[0]}
                continue
            if ON_GPU:
                point["peak_gib"] = round((torch.cuda.max_memory_reserved() - taken) / 2**30, 2)
            points[name] = point
            print(f"  {name}: {point}", flush=True)
    return points


def _allocated() -> int:
    """Bytes on the card, without what cuBLAS keeps for itself."""
    if not ON_GPU:
        return 0
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def one(name: str, storage: str, small: bool, rate: float, deadline: float) -> dict[str, Any]:
    """Everything about one family and storage."""
    started, family = time.monotonic(), FAMILIES[name]
    allocated = _allocated()
    model, count = build(family, STORED[storage], small)
    built = time.monotonic() - started
    weights = count * STORED[storage].itemsize / 2**30
    print(f"{name}, {storage}: {count:,} parameters, {weights:.2f} GiB, {built:.1f} s", flush=True)
    points = measured(model, family, weights, small, deadline)
    for point in points.values():
        # Elsewhere some of them are counted twice.
        if "operations" in point and point["way"] == WAYS[0]:
            share = point["operations"] / point[f"seconds, {TARGETS[0]} targets"] / rate
            point["share_of_matrix_rate"] = round(share, 3)
    # Every point is a collection.
    collected = sum("error" not in point for point in points.values())
    comfy.model_management.unload_all_models()
    del model
    gc.collect()
    comfy.model_management.soft_empty_cache()
    left = _allocated() - allocated
    return {
        "parameters": count,
        "weights_gib": round(weights, 2),
        "points": points,
        "leaked_gib_after_three": round(left / 2**30, 3) if collected >= 3 else None,
    }


def main() -> None:
    """Measure what is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, help="this one only, even if it is in the results")
    parser.add_argument("--small", action="store_true", help="small networks, to try the script itself")
    parser.add_argument("--seconds", type=int, default=ALL, help="for all that is not in the results yet")
    chosen = parser.parse_args()
    if not chosen.small and not ON_GPU:
        parser.error("Full size needs a graphics card: set ELROND_GPU=1, or give --small.")
    path = Path(tempfile.mkdtemp()) / "families.json" if chosen.small else RESULTS
    results = json.loads(path.read_text()) if path.is_file() else {}
    deadline = time.monotonic() + chosen.seconds
    keys = [f"{name}, {storage}" for name in FAMILIES for storage in STORED]
    with torch.no_grad():
        rate = matrix_rate()
        mine = results.setdefault(machine(), {"tera_operations_a_second": round(rate / 1e12, 1), "families": {}})
        wanted = [key for key in keys if key.startswith(f"{chosen.family}, ")]
        wanted = wanted or [key for key in keys if key not in mine["families"]]
        for place, key in enumerate(wanted):
            # What is left of the time is shared evenly.
            now = time.monotonic()
            share = (deadline - now) / (len(wanted) - place)
            if now < deadline:
                name, storage = key.rsplit(", ", 1)
                mine["families"][key] = one(name, storage, chosen.small, rate, now + share)
                path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    missing = [key for key in keys if key not in mine["families"]]
    print(f"Written to {path}." + (f" Run again for {'; '.join(missing)}." if missing and not chosen.family else ""))


if __name__ == "__main__":
    main()
