"""Distil the portraits' student from the teacher by distribution matching.

Improved distribution matching (Yin et al., arXiv 2405.14867): the student's clean estimates move along the difference
between a real score (the teacher with guidance) and a fake score (a copy of the teacher that is trained on what the
student makes). Inputs of later steps are simulated by the student's own earlier steps, Euler steps as the host's
sampler `euler` takes them. No regression, no adversary, no images of the world. That is the reverse Kullback–Leibler
divergence, which prefers few modes; with guidance it is where the diversity of distilled models goes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from .. import host  # noqa: F401

# isort: split
import torch

from ..host_model.checkpoint import file_of, pack_unet, read_weights, unpack_text, unpack_unet
from ..host_model.unet import new_unet
from ..host_model.vae import LATENT_CHANNELS
from ..portraits.captions import Captions
from .progress import Progress, generator_of, number_of, rate_at, save_weights
from .teacher import draw_levels, mixed, shifted, velocity
from .text import TextEncoder, Tokens, empty_rows

STEPS = 4


@dataclass(frozen=True)
class Recipe:
    """Numbers of the student's training.

    Attributes:
        iterations: number of iterations.
        batch: samples an iteration.
        guidance: of the real score, the same throughout.
        rate: learning rate of the student.
        fake_rate: learning rate of the fake score.
        fake_steps: steps of the fake score an iteration.
        warm_up: iterations of the learning rates' rise.
        decay: share of the iterations over which the learning rates fall to zero.
        half_life: iterations after which the moving average of the student has forgotten half.
    """

    iterations: int
    batch: int
    guidance: float = 8.0
    rate: float = 2e-4
    fake_rate: float = 4e-4
    fake_steps: int = 1
    warm_up: int = 20
    decay: float = 0.55
    half_life: int = 60


RECIPE = Recipe(iterations=1000, batch=48)
# For tests.
SMALL = Recipe(iterations=4, batch=2, warm_up=1)
SAVE_EVERY = 50
# Noise levels at which scores are compared, as published: all but the ends.
_LOWEST, _HIGHEST = 0.02, 0.98


def levels_of(device: str) -> torch.Tensor:
    """The noise levels of the student's steps: the host's `simple` schedule for four."""
    return shifted(1 - torch.arange(STEPS, device=device) / STEPS)


def clean(unet: torch.nn.Module, noisy: torch.Tensor, levels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The clean estimate (N, 16, 8, 8) of a flow model."""
    return noisy - levels[:, None, None, None] * velocity(unet, noisy, levels, rows)


def _randn(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)


@torch.no_grad()
def simulate(student: torch.nn.Module, noise: torch.Tensor, steps: int, rows: torch.Tensor) -> torch.Tensor:
    """What the student's next step sees after `steps` Euler steps of its own, from noise (N, 16, 8, 8)."""
    levels = levels_of(str(noise.device))
    noisy = noise
    for step in range(steps):
        made = velocity(student, noisy, levels[step].expand(len(noisy)), rows)
        noisy = noisy + (levels[step + 1] - levels[step]) * made
    return noisy


@torch.no_grad()
def direction(
    teacher: torch.nn.Module,
    fake: torch.nn.Module,
    made: torch.Tensor,
    rows: torch.Tensor,
    empty: torch.Tensor,
    guidance: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """The gradient of the divergence by the student's images (N, 16, 8, 8), with the published weights."""
    levels = torch.rand(len(made), generator=generator) * (_HIGHEST - _LOWEST) + _LOWEST
    levels = levels.to(made.device)
    noisy = mixed(made, _randn(made, generator), levels)
    both = clean(teacher, noisy.repeat(2, 1, 1, 1), levels.repeat(2), torch.cat([rows, empty]))
    conditional, unconditional = both.chunk(2)
    real = unconditional + guidance * (conditional - unconditional)
    scale = (made - real).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-3)
    return (clean(fake, noisy, levels, rows) - real) / scale


def train(out: Path, recipe: Recipe, device: str = "cpu", steps: int | None = None) -> Path:
    """Distil the teacher in a folder, resuming from the student's checkpoint there.

    Args:
        out: folder of the teacher's weights, of checkpoint, log and weights.
        recipe: its numbers.
        device: "cpu" or "cuda".
        steps: stop after so many iterations, to go on another time.

    Returns:
        the file of the weights; it is written with every checkpoint.
    """
    packed = read_weights(file_of("teacher", out))
    tokens = Tokens()
    text = TextEncoder(tokens, generator_of("student", -1))
    text.load(unpack_text(packed))
    text = text.to(device).requires_grad_(False)
    teacher = new_unet().diffusion_model
    teacher.load_state_dict(unpack_unet(packed))
    teacher = teacher.to(device, memory_format=torch.channels_last).requires_grad_(False)
    student, fake = copy.deepcopy(teacher).requires_grad_(True), copy.deepcopy(teacher).requires_grad_(True)
    average = copy.deepcopy(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=recipe.rate, betas=(0.0, 0.99), fused=True)
    fake_optimizer = torch.optim.AdamW(fake.parameters(), lr=recipe.fake_rate, betas=(0.0, 0.99), fused=True)
    parts = {
        "student": student,
        "fake": fake,
        "average": average,
        "optimizer": optimizer,
        "fake_optimizer": fake_optimizer,
    }
    progress = Progress(out, "student", recipe, parts)
    if progress.step == recipe.iterations and file_of("student", out).is_file():
        return file_of("student", out)
    nothing = empty_rows(text)
    levels = levels_of(device)
    while progress.step < min(recipe.iterations, steps or recipe.iterations):
        for one, rate in ((optimizer, recipe.rate), (fake_optimizer, recipe.fake_rate)):
            now = rate_at(progress.step, recipe.iterations, rate, recipe.warm_up, recipe.decay)
            one.param_groups[0]["lr"] = now
        generator = generator_of("student", progress.step)
        captions, _ = Captions(number_of("student captions", progress.step)).batch(recipe.batch)
        rows = text(tokens.encode(captions).to(device))
        noise = torch.randn(recipe.batch, LATENT_CHANNELS, 8, 8, generator=generator).to(device)
        step = int(torch.randint(STEPS, (), generator=generator))
        noisy = simulate(student, noise, step, rows)
        made = clean(student, noisy, levels[step].expand(recipe.batch), rows)
        empty = nothing.expand_as(rows)
        gradient = direction(teacher, fake, made.detach(), rows, empty, recipe.guidance, generator)
        optimizer.zero_grad(set_to_none=True)
        (made * gradient).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        keep = min(0.5 ** (1 / recipe.half_life), (progress.step + 1) / (progress.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - keep)
        loss = _train_fake(fake, fake_optimizer, made.detach(), rows, recipe, generator)
        progress.step += 1
        if progress.step % SAVE_EVERY == 0 or progress.step == recipe.iterations:
            progress.log(fake_loss=float(loss), spread=float(made.detach().std(0).mean()))
            progress.save()
            save_weights(
                pack_unet(average.state_dict()), file_of("student", out), recipe, iterations=str(progress.step)
            )
    if progress.step < recipe.iterations:
        progress.save()
    return file_of("student", out)


def _train_fake(
    fake: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    made: torch.Tensor,
    rows: torch.Tensor,
    recipe: Recipe,
    generator: torch.Generator,
) -> torch.Tensor:
    """Train the fake score on the student's images; the last loss, which nothing waits for."""
    loss = torch.zeros(())
    for _ in range(recipe.fake_steps):
        levels = draw_levels(len(made), 1.0, 0.0, generator).to(made.device)
        noise = _randn(made, generator)
        loss = (velocity(fake, mixed(made, noise, levels), levels, rows) - (noise - made)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(fake.parameters(), 1.0)
        optimizer.step()
    return loss.detach()
