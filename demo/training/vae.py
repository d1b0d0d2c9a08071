"""Train the portraits' autoencoder.

The decoder sees latents with each channel normalised over the batch, and noise on them: so latents that a model makes
not quite right still decode to crisp pictures. The loss is the squared error, with absolute errors of pixels and of
differences between neighbours, which keep edges sharp. No adversary, no perceptual network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from .. import host  # noqa: F401

# isort: split
import torch

from ..host_model.checkpoint import file_of
from ..host_model.vae import LATENT_CHANNELS, Autoencoder
from ..portraits.world import compose, draw
from .optimizer import Muon
from .progress import Progress, generator_of, rate_at, save_weights


@dataclass(frozen=True)
class Recipe:
    """Numbers of the autoencoder's training.

    Attributes:
        steps: number of steps.
        batch: pictures a step.
        rate: peak learning rate.
        warm_up: steps of the learning rate's rise.
        decay: share of the steps over which the learning rate falls to zero.
        noise: standard deviation of the noise on normalised latents.
        absolute: weight of absolute errors of pixels.
        edges: weight of absolute errors of differences between neighbouring pixels.
        statistics: pictures over which the latents' means and deviations are taken in the end.
    """

    steps: int
    batch: int
    rate: float = 2e-3
    warm_up: int = 50
    decay: float = 0.5
    noise: float = 0.1
    absolute: float = 0.2
    edges: float = 0.2
    statistics: int = 2048


RECIPE = Recipe(steps=4000, batch=16)
# For tests.
SMALL = Recipe(steps=4, batch=2, warm_up=1, statistics=8)
SAVE_EVERY = 200


def initialise(vae: Autoencoder, generator: torch.Generator) -> None:
    """Seeded initial weights: convolutions keep variance, residual branches begin at zero."""
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.normal_(generator=generator).div_(math.sqrt(module.weight[0].numel()))
                if module.bias is not None:
                    module.bias.zero_()
                if name.endswith(("conv2", "proj_out")):
                    module.weight.zero_()
            elif isinstance(module, torch.nn.GroupNorm):
                module.weight.fill_(1)
                module.bias.zero_()


def pictures(count: int, generator: torch.Generator, device: str) -> torch.Tensor:
    """Random portraits as the autoencoder takes them: (N, 3, 64, 64) in [-1, 1], channels last."""
    return (compose(draw(count, generator), device) * 2 - 1).contiguous(memory_format=torch.channels_last)


def loss_of(decoded: torch.Tensor, pixels: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """The training loss of decoded pictures (N, 3, 64, 64)."""
    error = decoded - pixels
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.square().mean() + recipe.absolute * error.abs().mean() + recipe.edges * edges


def psnr(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture in decibels, (N,): both (N, 3, 64, 64) in [-1, 1]."""
    return 10 * torch.log10(4 / (decoded.clamp(-1, 1) - pixels).square().mean((1, 2, 3)))


def train(out: Path, recipe: Recipe, device: str = "cpu", steps: int | None = None) -> Path:
    """Train the autoencoder, resuming from its checkpoint in a folder.

    Args:
        out: folder of checkpoint, log and weights.
        recipe: its numbers.
        device: "cpu" or "cuda".
        steps: stop after so many steps, to go on another time.

    Returns:
        the file of the weights; it is written when all steps are done.
    """
    vae = Autoencoder()
    initialise(vae, generator_of("vae", -1))
    vae = vae.to(device, memory_format=torch.channels_last).requires_grad_(True).train()
    ends = ("encoder.conv_in.weight", "decoder.conv_out.weight")
    matrices = [p for name, p in vae.named_parameters() if p.ndim == 4 and name not in ends]
    others = [p for name, p in vae.named_parameters() if p.ndim != 4 or name in ends]
    optimizer = Muon(matrices, others, recipe.rate)
    progress = Progress(out, "vae", recipe, {"vae": vae, "optimizer": optimizer})
    path = file_of("vae", out)
    if progress.step == recipe.steps and path.is_file():
        return path
    normalise = torch.nn.BatchNorm2d(LATENT_CHANNELS, affine=False, track_running_stats=False)
    running, count = torch.zeros((), device=device), 0
    while progress.step < min(recipe.steps, steps or recipe.steps):
        for group in optimizer.param_groups:
            group["rate"] = rate_at(progress.step, recipe.steps, recipe.rate, recipe.warm_up, recipe.decay)
        generator = generator_of("vae", progress.step)
        pixels = pictures(recipe.batch, generator, device)
        latents = normalise(vae.encode(pixels))
        noise = torch.randn(latents.shape, generator=generator).to(device)
        loss = loss_of(vae.decode(latents + recipe.noise * noise), pixels, recipe)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        running, count = running + loss.detach(), count + 1
        progress.step += 1
        if progress.step % SAVE_EVERY == 0 or progress.step == recipe.steps:
            progress.log(loss=float(running) / count)
            running, count = torch.zeros_like(running), 0
            progress.save()
    if progress.step < recipe.steps:
        progress.save()
        return path
    return _finish(vae.eval().requires_grad_(False), out, recipe, device, progress)


@torch.no_grad()
def _finish(vae: Autoencoder, out: Path, recipe: Recipe, device: str, progress: Progress) -> Path:
    """Normalise the latents, measure fresh pictures, and write the weights."""
    generator = generator_of("vae statistics", 0)
    latents = torch.cat(
        [
            vae.encode(pictures(min(64, recipe.statistics), generator, device))
            for _ in range(-(-recipe.statistics // 64))
        ]
    )
    vae.normalise(latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    pixels = pictures(min(256, recipe.statistics), generator_of("vae validation", 0), device)
    ratio = torch.cat([psnr(vae.decode(vae.encode(part)), part) for part in pixels.split(64)]).mean()
    progress.log(psnr=float(ratio))
    path = file_of("vae", out)
    save_weights(vae.state_dict(), path, recipe, psnr=f"{float(ratio):.2f}")
    return path
