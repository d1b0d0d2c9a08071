"""Distil the demo's student: `python -m demo.distill_student` (resumes from its last checkpoint).

Distribution matching distillation (Yin et al., arXiv 2311.18828; without the regression term, with simulated
sampling steps as in arXiv 2405.14867): the student's clean estimates move along the difference between a real score
(the frozen teacher, with guidance) and a fake score (a copy of the teacher kept trained on what the student makes).
That is the reverse Kullback–Leibler divergence, which prefers few modes: the student loses diversity as real
distilled models do, from the method and not from its data, which is the teacher's own.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

from . import host  # noqa: F401

# isort: split
import safetensors.torch
import torch

from . import host_model as demo_model
from .train_teacher import OUT, TextEncoder, Words, conditioning, draw_samples, draw_sigma, save_atomic, velocity

SEED = 10602
BATCH = 32
# Iterations and the guidance of the real score in each leg.
LEGS = ((600, 7.0), (300, 12.0), (300, 16.0), (50, 5.0))
ITERATIONS = sum(iterations for iterations, _ in LEGS)
STUDENT_STEPS = 4
STUDENT_RATE = 3e-4
FAKE_RATE = 4e-4
EMA = 0.99
# The host's `simple` schedule at 4 steps, for the demo's shift.
SIGMAS = [demo_model.SAMPLING["shift"] * t / (1 + (demo_model.SAMPLING["shift"] - 1) * t) for t in (1, 0.75, 0.5, 0.25)]


def guidance_at(iteration: int) -> float:
    """The guidance of an iteration."""
    for iterations, guidance in LEGS:
        if iteration < iterations:
            return guidance
        iteration -= iterations
    raise ValueError(f"There are {ITERATIONS} iterations.")


def clean(unet: torch.nn.Module, noisy: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """The clean estimate of a flow model."""
    return noisy - sigma[:, None, None, None] * velocity(unet, noisy, sigma, context)


def simulate(
    student: torch.nn.Module, noise: torch.Tensor, steps: torch.Tensor, context: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample sample i for `steps[i]` Euler steps: the noisy images, and the levels they are at."""
    x = noise
    for k in range(int(steps.max())):
        level = torch.full((len(x),), SIGMAS[k])
        following = torch.where(steps > k, torch.full_like(level, (*SIGMAS, 0.0)[k + 1]), level)
        x = x + (following - level)[:, None, None, None] * velocity(student, x, level, context)
    return x, torch.tensor(SIGMAS)[steps]


def noised(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images at random noise levels, the levels, and the noise."""
    sigma = draw_sigma(len(images), generator).clamp(0.02, 0.98)
    noise = torch.randn(images.shape, generator=generator)
    level = sigma[:, None, None, None]
    return (1 - level) * images + level * noise, sigma, noise


def distil(iterations: int, out: Path) -> None:
    """Distil to `iterations`, writing `student.safetensors` and a checkpoint every 100."""
    torch.manual_seed(SEED)
    unet, text, patches = demo_model.unpack(demo_model.WEIGHTS / "teacher.safetensors")
    vae = demo_model.PatchVAE()
    vae.load_state_dict(patches)
    words = Words()
    encoder = TextEncoder(words)
    encoder.load(text)
    encoder.requires_grad_(False)
    teacher = demo_model.new_unet().diffusion_model
    teacher.load_state_dict(unet)
    student, fake = copy.deepcopy(teacher).requires_grad_(True), copy.deepcopy(teacher).requires_grad_(True)
    teacher.requires_grad_(False)
    average = copy.deepcopy(teacher)
    student_optimizer = torch.optim.AdamW(student.parameters(), lr=STUDENT_RATE, betas=(0.0, 0.99), fused=True)
    fake_optimizer = torch.optim.AdamW(fake.parameters(), lr=FAKE_RATE, betas=(0.0, 0.99), fused=True)
    parts = {
        "student": student,
        "fake": fake,
        "average": average,
        "student_optimizer": student_optimizer,
        "fake_optimizer": fake_optimizer,
    }
    start, seconds = 0, 0.0
    state_file = out / "student.pt"
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        start, seconds = state["iteration"], state["seconds"]
    empty = encoder([""])
    began = time.monotonic() - seconds
    for iteration in range(start, iterations):
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + iteration)
        context = conditioning(encoder, draw_samples(BATCH, generator))
        nothing = empty.expand_as(context)
        noise = torch.randn(BATCH, demo_model.LATENT_CHANNELS, 8, 8, generator=generator)
        steps = torch.randint(STUDENT_STEPS, (BATCH,), generator=generator)
        with torch.no_grad():
            noisy, level = simulate(student, noise, steps, context)
        made = clean(student, noisy, level, context)

        with torch.no_grad():
            seen, sigma, _ = noised(made, generator)
            both = clean(teacher, seen.repeat(2, 1, 1, 1), sigma.repeat(2), torch.cat([context, nothing]))
            conditional, unconditional = both.chunk(2)
            real = unconditional + guidance_at(iteration) * (conditional - unconditional)
            direction = clean(fake, seen, sigma, context) - real
            direction = direction / (made - real).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-3)
        loss = (made * direction).sum() / BATCH / 100
        student_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        student_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - EMA)

        seen, sigma, added = noised(made.detach(), generator)
        fake_loss = ((velocity(fake, seen, sigma, context) - (added - made.detach())) ** 2).mean()
        fake_optimizer.zero_grad(set_to_none=True)
        fake_loss.backward()
        torch.nn.utils.clip_grad_norm_(fake.parameters(), 1.0)
        fake_optimizer.step()

        if (iteration + 1) % 50 == 0:
            spread = made.detach().std(0).mean()
            took = time.monotonic() - began
            print(
                f"iteration {iteration + 1}  fake loss {fake_loss:.4f}  spread {spread:.3f}  {took:.0f} s", flush=True
            )
        if (iteration + 1) % 100 == 0 or iteration + 1 == iterations:
            seconds = time.monotonic() - began
            state = {name: part.state_dict() for name, part in parts.items()}
            save_atomic({**state, "iteration": iteration + 1, "seconds": seconds}, state_file)
            packed = demo_model.pack(average.state_dict(), encoder.weights(), vae, words.used)
            safetensors.torch.save_file(packed, out / "student.safetensors")
            (out / "student.json").write_text(json.dumps({"seconds": seconds, "iterations": iteration + 1}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    distil(arguments.iterations, arguments.out)
