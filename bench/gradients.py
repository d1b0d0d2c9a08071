"""Memory and speed of collecting gradients on the full SDXL architecture, with random weights in bfloat16.

    python -m bench.gradients memory     peak of a forward and a backward pass, by size, up to 1024² pixels
    python -m bench.gradients speed      against a plain version of the published procedure: same pairs, same numbers
    python -m bench.gradients cards      the same gradients on graphics cards of less and less memory

With the host's own network and VAE, on the processor or, with ELROND_GPU=1, on the graphics card. A processor's seconds
are its own, which other programs beside them do not lengthen. Figures go to bench/results/gradients.json, a graphics
card's under its name.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from demo import host as demo_host

# isort: split
import comfy.ldm.models.autoencoder
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch

demo_host.pack()
from comfyui_elrond.elrond_core.collect.collection import CollectionPlan, collect  # noqa: E402
from comfyui_elrond.elrond_core.collect.differentiate import Differentiator, gradient  # noqa: E402
from comfyui_elrond.elrond_core.collect.pairs import draw_pairs  # noqa: E402
from comfyui_elrond.elrond_core.prompt import Concept  # noqa: E402
from comfyui_elrond.elrond_core.provenance import Provenance  # noqa: E402
from comfyui_elrond.elrond_core.seeding import normal  # noqa: E402
from comfyui_elrond.nodes import host  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "gradients.json"
MODELS = Path(__file__).parents[1] / "docs" / "models.md"
CPU, DEVICE = torch.device("cpu"), comfy.model_management.get_torch_device()
ON_GPU = DEVICE.type == "cuda"
TOKENS, WIDTH, POOLED, ROW = 77, 2048, 1280, 3
# Latents a side; the last is 1024² pixels, and is not fitted.
FITTED, WANTED = (32, 48, 64), 128
# Of the comparison: latents a side, images, pairs, how many of these have a noised image in common, and how many of
# those the pack serves with one forward pass.
SIDE, IMAGES, PAIRS, COMMON, SHARED = 128 if ON_GPU else 64, 9, 8, 8, (1, 4, 8)
# GiB that are free on cards, and images at once.
CARDS, BATCHES = (24, 12, 8, 6, 4), (1, 4)


def keep(**figures: Any) -> None:
    """Add to the results, beside what others have put there."""
    before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if ON_GPU:
        name = torch.cuda.get_device_name(DEVICE)
        figures = {name: {**before.get(name, {}), **figures}}
    RESULTS.write_text(json.dumps({**before, **figures}, indent=1, sort_keys=True) + "\n")


def families() -> int:
    """Model families in the table of docs/models.md, which a test holds against those that it proves."""
    table = MODELS.read_text(encoding="utf-8").split("| family | ComfyUI's class |")[1].split("\n\n")[0]
    return sum(line.startswith("| ") for line in table.splitlines()[2:])


def machine() -> str:
    """What the figures were measured on."""
    if ON_GPU:
        return f"{torch.cuda.get_device_name(DEVICE)}, torch {torch.__version__}"
    kind = f"{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{kind}, threads: {torch.get_num_threads()}, torch {torch.__version__}"


def clock() -> float:
    """Seconds of the processor's own, or of the graphics card when all its work is done."""
    if not ON_GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights that keep activations at about their size."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, weight in module.named_parameters():
        weight.requires_grad_(False)
        if weight.ndim > 1:
            mean, deviation = 0.0, weight[0].numel() ** -0.5
        else:
            mean, deviation = 0.0 if name.endswith("bias") else 1.0, 0.1
        weight.copy_(torch.empty_like(weight, device=DEVICE).normal_(mean, deviation, generator=generator))
    return module


def sdxl() -> Any:
    """SDXL as a MODEL."""
    # The host fixes some of its sizes itself; these are the others.
    config = comfy.supported_models.SDXL(
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
        }
    )
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model({}, device=CPU).eval()
    fill(model.diffusion_model)
    count = sum(weight.numel() for weight in model.diffusion_model.parameters())
    print(f"SDXL: {count:,} parameters, {count * 2 / 2**30:.2f} GiB")
    return comfy.model_patcher.ModelPatcher(model, load_device=DEVICE, offload_device=CPU)


def prompt(side: int) -> Any:
    """A marked CONDITIONING for images of 8 pixels a latent."""
    rows, pooled = normal((TOKENS, WIDTH), 0, "rows", [0]), normal((POOLED,), 0, "pooled", [0])
    options = {"pooled_output": pooled, "width": 8 * side, "height": 8 * side}
    return host.mark([[rows, options]], "SDXL", "a dog", [Concept("dog", (ROW,), ("dog",))])


def peak(work: Callable[[], object]) -> int:
    """Bytes that are allocated at most while `work` runs, beyond those from before, by the allocator's own record."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


def check_peak() -> None:
    """The measure, where the answer is known."""

    def work() -> None:
        a = torch.ones(1000, 1000, device=DEVICE)
        b = a.exp()
        del a
        c = b.softmax(0)
        del b, c

    # A graphics card's allocator rounds up.
    assert 0 <= peak(work) - 8_000_000 < 2048, "The allocator's record does not add up."


def memory() -> None:
    """Peak memory by size, kept and recomputed, and the estimate that the host is given."""
    check_peak()
    model = sdxl()
    sigma = host.sigma_of(model, 1.0)
    found: dict[bool, dict[int, float]] = {False: {}, True: {}}
    print("   side  activations  peak GiB  estimate GiB  seconds")
    for side in (*FITTED, WANTED):
        # On the processor, what is not checkpointed is fitted only.
        for checkpointed in (False, True) if side != WANTED or ON_GPU else (True,):

            def work(denoiser: host.HostDenoiser, latents: torch.Tensor, checkpointed: bool = checkpointed) -> Any:
                noise = normal(tuple(latents.shape[1:]), 0, "noise", [0])
                rows = denoiser.rows[None].clone().requires_grad_(True)
                denoiser.make_room(denoiser.noised(latents[:1], noise, sigma), sigma, rows)
                denoiser.checkpointed = checkpointed
                started = clock()
                highest = peak(lambda: gradient(denoiser, latents[:1], latents[1:], noise, sigma))
                took = clock() - started
                assert denoiser.checkpointed is checkpointed
                return highest, (denoiser.footprint.plain, denoiser.footprint.checkpointed), took

            latents = normal((4, side, side), 0, "latents", [0, 1])
            highest, needs, took = host.with_denoiser(model, prompt(side), None, 1.0, latents, 0, work)
            found[checkpointed][side] = highest / 2**30
            kind = "recomputed" if checkpointed else "kept"
            print(
                f"{side:7} {kind:>12} {highest / 2**30:9.3f} {needs[checkpointed] / 2**30:13.3f} {took:8.1f}",
                flush=True,
            )
    if ON_GPU:
        keep(
            sdxl_activation_gib_1024=round(found[True][WANTED], 3),
            sdxl_activation_gib_1024_kept=round(found[False][WANTED], 3),
        )
        return
    fitted = {}
    for checkpointed, peaks in found.items():
        coefficients = np.polyfit([side**2 for side in FITTED], [peaks[side] for side in FITTED], 2)
        fitted[checkpointed] = float(np.polyval(coefficients, WANTED**2))
        c, b, a = coefficients
        kind = "recomputed" if checkpointed else "kept"
        print(
            f"{kind}: {a:.3g} + {b:.3g} n + {c:.3g} n² GiB, n latent cells; "
            f"at {WANTED}²: {fitted[checkpointed]:.2f} GiB"
        )
    keep(
        sdxl_activation_gib_1024=round(found[True][WANTED], 3),
        sdxl_activation_gib_1024_fitted=round(fitted[True], 3),
        sdxl_activation_gib_1024_kept_fitted=round(fitted[False], 3),
    )


class Timed:
    """A denoiser that notes how long its forward passes take."""

    def __init__(self, denoiser: host.HostDenoiser) -> None:
        self._denoiser = denoiser
        self.forward = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        """As the denoiser's."""
        started = clock()
        try:
            return self._denoiser.denoised(noisy, sigma, rows)
        finally:
            self.forward += clock() - started


def autoencoder() -> Any:
    """SDXL's autoencoder as a VAE."""
    layers = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    shape = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3}
    weights = fill(comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig={**layers, **shape}, embed_dim=4))
    return comfy.sd.VAE(sd=weights.state_dict(), device=DEVICE, dtype=torch.bfloat16)


def published(
    model: Any, vae: Any, images: torch.Tensor, pairs: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """The published procedure, plainly: a pair's images are encoded, A is noised and denoised, the loss differentiated.

    Args:
        model: MODEL.
        vae: VAE.
        images: (n, H, W, 3).
        pairs: (N, 2).
        noise: (N, 4, h, w).

    Returns:
        Gradients (N, 1, d), and seconds by what they were spent on.
    """
    ((rows, options),) = prompt(SIDE)
    inner = model.model
    level = torch.tensor([host.sigma_of(model, 1.0)], device=DEVICE)
    found, spent = [], dict.fromkeys(("encode", "forward", "backward", "rest"), 0.0)
    for (a, b), eps in zip(pairs.tolist(), noise, strict=True):
        marks = [clock()]
        source, target = (inner.process_latent_in(vae.encode(images[i : i + 1]).to(DEVICE)) for i in (a, b))
        marks.append(clock())
        noisy = inner.model_sampling.noise_scaling(level, eps[None].to(DEVICE, copy=True), source, False)
        pooled = {key: value for key, value in options.items() if key != host.MARK}
        vector = inner.encode_adm(**pooled, device=DEVICE)
        context = rows.to(DEVICE, copy=True).requires_grad_(True)
        marks.append(clock())
        with torch.enable_grad():
            estimate = inner.apply_model(noisy, level, c_crossattn=context, y=vector)
            loss = (estimate - target).square().mean()
        marks.append(clock())
        loss.backward()
        assert context.grad is not None
        found.append(context.grad[0, ROW : ROW + 1].cpu())
        marks.append(clock())
        for name, seconds in zip(("encode", "rest", "forward", "backward"), np.diff(marks), strict=True):
            spent[name] += seconds
    return torch.stack(found), spent


def ours(
    model: Any, latents: torch.Tensor, pairs: torch.Tensor, noise: torch.Tensor, shared: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """Gradients (N, 1, d) of the same pairs by the pack, `shared` of them a forward pass, and seconds."""
    spent = dict.fromkeys(("encode", "forward", "backward", "rest"), 0.0)

    def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> torch.Tensor:
        timed, found = Timed(denoiser), []
        differentiate = Differentiator(timed)
        sigma = host.sigma_of(model, 1.0)
        # Once a collection: how much memory backward passes need, by one more forward pass.
        noisy = denoiser.noised(realizations[:1], noise[:1], sigma)
        denoiser.make_room(noisy, sigma, denoiser.rows[None].to(DEVICE, copy=True).requires_grad_(True))
        started = clock()
        for first in range(0, len(pairs), shared):
            a, b = pairs[first : first + shared].unbind(1)
            vectors, _ = differentiate(realizations[a[:1]], realizations[b][:, None], noise[first : first + 1], sigma)
            found.append(vectors[:, 0])
        spent["forward"] = timed.forward
        spent["backward"] = clock() - started - timed.forward
        return torch.cat(found)

    return host.with_denoiser(model, prompt(SIDE), None, 1.0, latents, 0, work), spent


def speed() -> None:
    """Gradients a second, ours and the published procedure's, with the same result."""
    model, vae = sdxl(), autoencoder()
    images = torch.rand(IMAGES, 8 * SIDE, 8 * SIDE, 3, generator=torch.Generator().manual_seed(0))
    pairs = draw_pairs(PAIRS, IMAGES, 0, COMMON)
    noise = normal((4, SIDE, SIDE), 0, "noise", [i // COMMON for i in range(PAIRS)])
    comfy.model_management.load_models_gpu([model])
    # Memory is handed out for the first time, and kernels are chosen.
    published(model, vae, images, pairs[:1], noise[:1])
    started = clock()
    latents = torch.cat([vae.encode(images[i : i + 1]) for i in range(IMAGES)])
    encoding = clock() - started
    expected, plain = published(model, vae, images, pairs, noise)
    report("published", plain)
    figures: dict[str, float] = {}
    for shared in SHARED:
        vectors, spent = ours(model, latents, pairs, noise, shared)
        report(f"ours, {shared} a forward pass", spent)
        error = float(((vectors - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))).max())
        total = sum(spent.values())
        figures[f"speedup_same_pairs_{shared}_targets"] = round(sum(plain.values()) / total, 2)
        print(
            f"{sum(plain.values()) / total:.2f} times the gradients a second, "
            f"{sum(plain.values()) / (total + encoding):.2f} times where every image is encoded once; "
            f"largest relative difference of a gradient {error:.1e}"
        )
        # A graphics card sums in another order each time, in bfloat16.
        assert error < (8 if ON_GPU else 1) * torch.finfo(torch.bfloat16).eps, "The two do not compute the same."
    figures["speedup_same_pairs"] = max(figures.values())
    keep(**figures)


def report(name: str, spent: dict[str, float]) -> None:
    """One line of seconds a gradient."""
    parts = ", ".join(f"{part} {seconds / PAIRS:.2f}" for part, seconds in spent.items())
    print(f"{name}: {sum(spent.values()) / PAIRS:.2f} s a gradient ({parts})", flush=True)


def cards() -> None:
    """Gradients of 1024² pixels where only so much of the card is free, against those where all of it is."""
    model, manager = sdxl(), comfy.model_management
    latents = normal((4, WANTED, WANTED), 0, "latents", list(range(IMAGES)))
    sigma = host.sigma_of(model, 1.0)
    figures, expected = {}, None
    print("GiB free  batch  recomputed  peak GiB  seconds a gradient  relative difference")
    for gib in (None, *CARDS):
        for batch in BATCHES:
            manager.unload_all_models()
            manager.soft_empty_cache()
            free, _ = torch.cuda.mem_get_info()
            taken = max(0, free - gib * 2**30) if gib else 0
            ballast = torch.empty(taken, dtype=torch.uint8, device=DEVICE)
            torch.cuda.reset_peak_memory_stats()
            seen = []

            def work(
                denoiser: host.HostDenoiser, latents: torch.Tensor, batch: int = batch, seen: list[bool] = seen
            ) -> torch.Tensor:
                found = collect(denoiser, latents, Provenance("SDXL"), CollectionPlan(max(BATCHES), (sigma,), 0, batch))
                seen.append(denoiser.checkpointed)
                return found.flat

            started = clock()
            vectors = host.with_denoiser(model, prompt(WANTED), None, 1.0, latents, 0, work)
            took = (clock() - started) / max(BATCHES)
            highest = (torch.cuda.max_memory_reserved() - ballast.numel()) / 2**30
            expected = vectors if expected is None else expected
            error = float(((vectors - expected).norm(dim=1) / expected.norm(dim=1)).max())
            print(f"{gib or 'all':>8} {batch:6} {seen[0]!s:>11} {highest:9.2f} {took:19.2f} {error:20.1e}", flush=True)
            figures[f"{gib or 'all'} GiB, batch {batch}"] = {
                "gib": round(highest, 2),
                "recomputed": seen[0],
                "error": error,
            }
            del ballast
    keep(cards=figures)


def main() -> None:
    """Run a part and keep its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("memory", "speed", "cards"))
    part = parser.parse_args().part
    if part == "cards" and not ON_GPU:
        parser.error("cards needs a graphics card: set ELROND_GPU=1.")
    with torch.no_grad():
        {"memory": memory, "speed": speed, "cards": cards}[part]()
    keep(machine=machine(), families_proven=families())


if __name__ == "__main__":
    main()
