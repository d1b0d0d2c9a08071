"""Train the portraits' teacher: a text-conditional rectified flow on the autoencoder's latents.

The UNet predicts noise minus latents. Noise levels are logit-normal with a shift (Esser et al., arXiv 2403.03206); a
tenth of the captions is empty, for guidance; the weights that are kept are a moving average. The text encoder is
trained along. The denoiser sees captions as the encoder made them, and nothing else.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import host  # noqa: F401

# isort: split
import torch

from ..host_model.checkpoint import file_of, load_vae, pack_text, pack_unet, read_weights, unpack_text, unpack_unet
from ..host_model.text import END_TOKEN
from ..host_model.unet import SAMPLING, new_unet
from .bank import Bank, captioned, encoded, make_bank
from .optimizer import Muon
from .progress import Progress, generator_of, rate_at, save_weights
from .text import TextEncoder, Tokens


@dataclass(frozen=True)
class Recipe:
    """Numbers of one cycle of the teacher's training.

    Attributes:
        pictures: captioned pictures, each drawn and encoded once.
        steps: number of steps.
        batch: samples a step.
        rate: peak learning rate.
        warm_up: steps of the learning rate's rise.
        decay: share of the steps over which the learning rate falls to zero.
        weight_decay: of matrices.
        dropout: share of samples with the empty caption.
        highest: share of samples at the highest noise level, where sampling begins.
        spread: standard deviation of the noise levels' logits before the shift.
        half_life: samples after which the moving average has forgotten half.
        validation: captioned pictures that are never trained on.
    """

    pictures: int
    steps: int
    batch: int
    rate: float
    warm_up: int = 200
    decay: float = 0.6
    weight_decay: float = 0.01
    dropout: float = 0.1
    highest: float = 0.04
    spread: float = 1.0
    half_life: int = 16384
    validation: int = 512


# Two cycles of the learning rate, one after the other: large batches, then small ones. The rate of the first is the
# best of 1.5e-3, 3e-3 and 6e-3 by the validation loss after 300 steps.
RECIPE = (
    Recipe(pictures=262144, steps=1000, batch=1024, rate=6e-3, half_life=131072),
    Recipe(pictures=40960, steps=2500, batch=96, rate=2e-3, warm_up=50, decay=1.0),
)
# For tests.
SMALL = (
    Recipe(pictures=16, steps=4, batch=4, rate=1e-3, warm_up=1, validation=8),
    Recipe(pictures=16, steps=4, batch=2, rate=1e-3, warm_up=1, validation=8),
)
SAVE_EVERY = 250
# Noise levels at which the validation loss is taken.
_LEVELS = (1.0, 0.85, 0.7, 0.5, 0.3)
# What the host's UNet zeroes at the end of its branches, as the diffusion models it comes from are initialised.
_ZERO = ("out_layers.3", "proj_out", "out.2", "ff.net.2", "to_out.0")
# First and last layers, which Muon leaves to AdamW.
_ENDS = ("input_blocks.0.0", "out.2", "rows", "embeddings")


def initialise(unet: torch.nn.Module, generator: torch.Generator) -> None:
    """Seeded initial weights: uniform as torch's own, and zero where branches end."""
    with torch.no_grad():
        for name, module in unet.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                bound = 1 / math.sqrt(module.weight[0].numel())
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.uniform_(-bound, bound, generator=generator)
                if name.endswith(_ZERO):
                    module.weight.zero_()
                    if module.bias is not None:
                        module.bias.zero_()
            elif isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
                module.weight.fill_(1)
                module.bias.zero_()


def new_models(device: str) -> torch.nn.ModuleDict:
    """UNet and text encoder with seeded initial weights."""
    generator = generator_of("teacher", -1)
    unet = new_unet().diffusion_model
    initialise(unet, generator)
    text = TextEncoder(Tokens(), generator)
    models = torch.nn.ModuleDict({"unet": unet, "text": text})
    return models.to(memory_format=torch.channels_last).to(device).requires_grad_(True)


def shifted(time: torch.Tensor) -> torch.Tensor:
    """Times in [0, 1] to noise levels, as the host's schedule does."""
    shift = SAMPLING["shift"]
    return shift * time / (1 + (shift - 1) * time)


def draw_levels(count: int, spread: float, highest: float, generator: torch.Generator) -> torch.Tensor:
    """Noise levels (count,): shifted logit-normal, and the highest level for a share of them."""
    levels = shifted(torch.sigmoid(spread * torch.randn(count, generator=generator)))
    at_highest = torch.rand(count, generator=generator) < highest
    return torch.where(at_highest, torch.ones_like(levels), levels)


def mixed(latents: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Latents (N, 16, 8, 8) at noise levels (N,)."""
    level = levels[:, None, None, None]
    return (1 - level) * latents + level * noise


def velocity(unet: torch.nn.Module, noisy: torch.Tensor, levels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The UNet's output (N, 16, 8, 8) in float32; on a card in bfloat16 arithmetic."""
    card = noisy.device.type == "cuda"
    with torch.autocast(noisy.device.type, torch.bfloat16, enabled=card):
        out = unet(noisy, levels * SAMPLING["multiplier"], context=rows)
    return out.float()


def optimizer_of(models: torch.nn.Module, rate: float, decay: float) -> Muon:
    """Muon for hidden matrices, AdamW for first and last layers, embeddings, gains and biases."""
    matrices: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, parameter in models.named_parameters():
        hidden = parameter.ndim > 1 and not any(end in name for end in _ENDS)
        (matrices if hidden else others).append(parameter)
    return Muon(matrices, others, rate, decay=decay)


@torch.no_grad()
def validation_loss(models: torch.nn.ModuleDict, bank: Bank, device: str) -> dict[str, float]:
    """The loss on held-out pictures at each of some noise levels, and its mean."""
    generator = generator_of("teacher validation", 0)
    losses = {}
    for level in _LEVELS:
        total = 0.0
        for start in range(0, len(bank), 128):
            latents = bank.latents[start : start + 128].float().to(device)
            noise = torch.randn(latents.shape, generator=generator).to(device)
            levels = torch.full((len(latents),), level, device=device)
            rows = models["text"](bank.tokens[start : start + 128].long().to(device))
            made = velocity(models["unet"], mixed(latents, noise, levels), levels, rows)
            total += float((made - (noise - latents)).square().mean((1, 2, 3)).sum())
        losses[f"at {level}"] = total / len(bank)
    return {"validation": sum(losses.values()) / len(losses), **losses}


def train(out: Path, cycles: Sequence[Recipe], device: str = "cpu", steps: int | None = None) -> Path:
    """Train the teacher on the autoencoder in a folder, resuming from its checkpoints there.

    Args:
        out: folder of the autoencoder's weights, of checkpoints, logs and weights.
        cycles: the numbers of each cycle; one begins with the moving average of the one before.
        device: "cpu" or "cuda".
        steps: stop after so many steps of a cycle, to go on another time.

    Returns:
        the file of the weights, written when all steps are done.
    """
    before = None
    for number, recipe in enumerate(cycles, 1):
        name = "teacher" if number == 1 else f"teacher {number}"
        if not _cycle(out, name, recipe, before, device, steps):
            return file_of("teacher", out)
        before = _average(out, name)
    if before is not None:
        shutil.copyfile(before, file_of("teacher", out))
    return file_of("teacher", out)


def _average(out: Path, name: str) -> Path:
    """Where the moving average of a cycle is kept."""
    return out / f"{name} average.safetensors"


def _cycle(out: Path, name: str, recipe: Recipe, before: Path | None, device: str, steps: int | None) -> bool:
    """One cycle, from the weights of the one before; whether all its steps are done."""
    models = new_models(device)
    if before is not None:
        packed = read_weights(before)
        models["text"].load(unpack_text(packed))
        models["unet"].load_state_dict(unpack_unet(packed))
    average = copy.deepcopy(models).requires_grad_(False)
    optimizer = optimizer_of(models, recipe.rate, recipe.weight_decay)
    parts = {"models": models, "average": average, "optimizer": optimizer}
    progress = Progress(out, name, recipe, parts)
    if progress.step == recipe.steps:
        return True
    vae = load_vae(file_of("vae", out)).to(device, memory_format=torch.channels_last)
    bank = make_bank(vae, recipe.pictures, out / "bank", device)
    tokens, factors = captioned(-1, recipe.validation)
    held_out = Bank(encoded(vae, factors, device), tokens)
    parameters, averages = list(models.parameters()), list(average.parameters())
    running, count = torch.zeros((), device=device), 0
    while progress.step < min(recipe.steps, steps or recipe.steps):
        for group in optimizer.param_groups:
            group["rate"] = rate_at(progress.step, recipe.steps, recipe.rate, recipe.warm_up, recipe.decay)
        generator = generator_of(name, progress.step)
        chosen = torch.randint(len(bank), (recipe.batch,), generator=generator)
        latents = bank.latents[chosen].float().to(device)
        captions = bank.tokens[chosen].long()
        captions[torch.rand(recipe.batch, generator=generator) < recipe.dropout, 1:] = END_TOKEN
        levels = draw_levels(recipe.batch, recipe.spread, recipe.highest, generator).to(device)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        rows = models["text"](captions.to(device))
        made = velocity(models["unet"], mixed(latents, noise, levels), levels, rows)
        loss = (made - (noise - latents)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress.step += 1
        # The average starts as a plain mean, so that it forgets the initial weights.
        keep = min(0.5 ** (recipe.batch / recipe.half_life), progress.step / (progress.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - keep)
        running, count = running + loss.detach(), count + 1
        if progress.step % SAVE_EVERY == 0 or progress.step == recipe.steps:
            progress.log(loss=float(running) / count, **validation_loss(average, held_out, device))
            running, count = torch.zeros_like(running), 0
            _write(_average(out, name), progress, average, recipe)
            progress.save()
    if progress.step < recipe.steps:
        progress.save()
    return progress.step == recipe.steps


def _write(path: Path, progress: Progress, average: torch.nn.ModuleDict, recipe: Recipe) -> None:
    """The weights of the moving average."""
    text = average["text"]
    weights = pack_unet(average["unet"].state_dict()) | pack_text(text.weights(), text.used)
    save_weights(weights, path, recipe, steps=str(progress.step))
