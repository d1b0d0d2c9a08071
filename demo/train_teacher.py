"""Train the demo's teacher: `python -m demo.train_teacher` (resumes from its last checkpoint).

Objective: rectified flow; the UNet predicts noise minus image. So that the noun's row carries the whole concept,
as in CLIP, many training samples show the denoiser only that row, or that row inside the caption without attributes.

A few dozen attribute words would be a code to the denoiser, which would answer to each and to nothing between them,
where a model of real text has seen every shade. So many samples are shaded: the noun's row moves part of the way that
each word moves it alone, and the factors' windows move as far.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

from . import host

# isort: split
import safetensors.torch
import torch
from comfy.ldm.modules.attention import attention_pytorch as optimized_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer

from . import host_model as demo_model
from .captions import (
    NOUNS,
    WORDS,
    Caption,
    compose,
    draw_caption,
    draw_factors,
    draw_shaded_caption,
    draw_slid_caption,
    opposite,
)
from .world import CONTINUOUS, SHAPES, render

SEED = 2602
BATCH = 64


@dataclass(frozen=True)
class Leg:
    """A part of the training: a short warm-up, then a cosine to zero; and what shares of its samples are set apart.

    Attributes:
        last: its last step.
        rate: peak learning rate.
        shapes: captions that name a shape, at the noise levels at which shapes form. A shape is a few pixels there, and
            its words are not learnt among all the rest.
        forming: any captions at these noise levels.
        slid: captions whose noun's row moves between opposite words, at these noise levels: else the factors that a
            step leaves alone, shape first, go along with it.
        bare: nouns without attributes, at high noise levels, with the mean of the images as target (`Bank`).
    """

    last: int
    rate: float
    shapes: float = 0.0
    forming: float = 0.0
    slid: float = 0.0
    bare: float = 0.0


LEGS = (
    Leg(5400, 1.2e-3),
    Leg(8000, 1e-3),
    Leg(8350, 1e-3, shapes=1.0),
    Leg(10700, 9e-4),
    Leg(12300, 8e-4, shapes=0.3),
    Leg(14300, 7e-4, shapes=0.15, forming=0.2),
    Leg(15700, 6e-4, shapes=0.1, slid=0.22, bare=0.3),
)
WARM_UP = 100
SHAPES_FORM = (0.45, 0.88)
EMA = 0.999
# Shares of the training samples by what the denoiser sees: every row, the noun's row alone, the noun's row inside
# the rows of the caption without attributes; the rest sees the empty caption, for guidance.
FULL, ALONE, INSIDE = 0.36, 0.24, 0.33
# Of the samples that show the noun's row without its attributes: the share that is shaded, and the part of those whose
# row moves along the line between two opposite words, which goes on beyond them. The noise added to all of
# them is at most this share of the row's norm.
SHADED, SLID, ROW_NOISE = 0.6, 0.5, 0.2
# Share of samples at the highest noise level. There the best estimate is the mean of all images of a caption, which
# is drawn as the mean of so many instead of one, and counts so many times: else what a word does to the mean, on which
# the gradients of its row depend, would drown in what the images vary by.
HIGHEST_NOISE, IMAGES_OF_MEAN, WEIGHT_OF_MEAN = 0.15, 32, 10.0
# Noise levels of the bare nouns, images a noun in the bank, and the weight of their surer targets.
MEANS_MATTER, BANK, WEIGHT_OF_BANK = (0.6, 1.0), 4096, 4.0
OUT = demo_model.WEIGHTS.parent / "training"


class Words:
    """Captions to token ids, without a host CLIP object: the tables are small and the loop is hot."""

    def __init__(self) -> None:
        tokenizer = CLIPTokenizer.from_pretrained(host.path() / "comfy" / "sd1_tokenizer")
        vocabulary = ["a", *NOUNS, *(word for words in WORDS.values() for word in words)]
        self.ids = {word: tokenizer(word)["input_ids"] for word in vocabulary}
        if any(len(ids) != 3 for ids in self.ids.values()):
            raise ValueError("every word of the demo world must be one CLIP token")
        self.used = sorted({i for ids in self.ids.values() for i in ids})

    def encode(self, captions: list[str]) -> torch.Tensor:
        """(N, 16) token ids: start, the words, end tokens to fill."""
        rows = torch.full((len(captions), demo_model.MAX_TOKENS), demo_model.END_TOKEN)
        rows[:, 0] = 49406
        for row, caption in zip(rows, captions, strict=True):
            for position, word in enumerate(caption.split()):
                row[position + 1] = self.ids[word][1]
        return rows


def initialise(module: torch.nn.Module) -> None:
    """Torch's default initial weights (the host's layers leave theirs unset); residual branches end at zero."""
    for name, part in module.named_modules():
        for kind in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm):
            if isinstance(part, kind):
                kind.reset_parameters(part)
        if name.endswith(("out_layers.3", "proj_out", "out.2", "ff.net.2", "to_out.0")):
            torch.nn.init.zeros_(part.weight)
            torch.nn.init.zeros_(part.bias)


class TextEncoder(torch.nn.Module):
    """The host's text transformer as training needs it: only the used rows of the token table, nothing in place."""

    def __init__(self, words: Words) -> None:
        super().__init__()
        self.transformer = demo_model.new_text_transformer()
        initialise(self.transformer)
        self.words = words
        table = demo_model.token_table()
        self.rows = torch.nn.Parameter(table[words.used])
        self.register_buffer("index", torch.zeros(demo_model.VOCABULARY, dtype=torch.long), persistent=False)
        self.index[words.used] = torch.arange(len(words.used))
        embeddings = self.transformer.text_model.embeddings
        with torch.no_grad():
            torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.1)
        embeddings.token_embedding = torch.nn.Identity()

    def forward(self, captions: list[str]) -> torch.Tensor:
        """(N, 16, 128) rows, zero after the end token: what the host's CLIP object returns."""
        tokens = self.words.encode(captions)
        model = self.transformer.text_model
        x = self.rows[self.index[tokens]] + model.embeddings.position_embedding.weight
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu_(1)
        for layer in model.encoder.layers:
            x = x + layer.self_attn(layer.layer_norm1(x), mask, optimized_attention)
            x = x + layer.mlp(layer.layer_norm2(x))
        ended = torch.cumsum(tokens == demo_model.END_TOKEN, 1)
        return model.final_layer_norm(x) * (ended <= 1)[..., None]

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Take what `weights` returned."""
        with torch.no_grad():
            self.rows.copy_(weights[demo_model.TOKEN_TABLE][self.words.used])
        self.transformer.load_state_dict({k: v for k, v in weights.items() if k != demo_model.TOKEN_TABLE})

    def weights(self) -> dict[str, torch.Tensor]:
        """The transformer's state dict with the token table filled in."""
        table = demo_model.token_table()
        table[self.words.used] = self.rows.detach()
        return {**self.transformer.state_dict(), demo_model.TOKEN_TABLE: table}


@dataclass
class Samples:
    """What a batch of training samples shows the denoiser.

    Attributes:
        captions: what the images show.
        mode: (N,) index into `MODES`.
        noise: (N, 128) added to the noun's row where the attributes are hidden, in units of the row's norm.
    """

    captions: list[Caption]
    mode: torch.Tensor
    noise: torch.Tensor


MODES = ("full", "alone", "inside", "empty")


def draw_samples(count: int, generator: torch.Generator) -> Samples:
    """Random captions and how the denoiser sees them, in the shares given above."""
    bounds = torch.tensor([FULL, FULL + ALONE, FULL + ALONE + INSIDE])
    mode = torch.bucketize(torch.rand(count, generator=generator), bounds)
    hidden = (mode == MODES.index("alone")) | (mode == MODES.index("inside"))
    chance = torch.rand(count, generator=generator)
    captions = []
    for i in range(count):
        draw = draw_caption
        if hidden[i] and chance[i] < SHADED:
            draw = draw_slid_caption if chance[i] < SHADED * SLID else draw_shaded_caption
        captions.append(draw(generator))
    noise = torch.randn(count, demo_model.TOKEN_WIDTH, generator=generator) / demo_model.TOKEN_WIDTH**0.5
    amount = ROW_NOISE * torch.rand(count, generator=generator) * hidden
    return Samples(captions, mode, noise * amount[:, None])


def conditioning(text: TextEncoder, samples: Samples) -> torch.Tensor:
    """(N, 16, 128): the rows the denoiser sees."""
    captions = samples.captions
    every = torch.arange(len(captions))
    full = text([c.text for c in captions])
    bare = text([c.bare for c in captions])
    place = torch.tensor([len(c.text.split()) for c in captions])
    noun = torch.where(
        torch.tensor([bool(c.share) for c in captions])[:, None],
        bare[every, 2] + shades(text, captions, bare[every, 2]),
        full[every, place],
    )
    noun = noun + samples.noise * noun.detach().norm(dim=1, keepdim=True)
    alone = torch.zeros_like(full)
    alone[every, place] = noun
    inside = bare.clone()
    inside[:, 2] = noun
    empty = text([""]).expand_as(full)
    return torch.stack([full, alone, inside, empty])[samples.mode, every]


def shades(text: TextEncoder, captions: list[Caption], bare: torch.Tensor) -> torch.Tensor:
    """(N, 128): the sum of what each word alone does to the noun's row, as far as it holds.

    Across, a word does half of what leads from its opposite to it.
    """
    moves: list[tuple[int, str, float]] = []
    for i, caption in enumerate(captions):
        for factor, share in caption.share.items():
            word = caption.named[factor]
            if caption.across:
                moves += [(i, word, share / 2), (i, opposite(factor, word) or word, -share / 2)]
            else:
                moves.append((i, word, share))
    if not moves:
        return torch.zeros_like(bare)
    texts = sorted({f"a {word} {captions[i].noun}" for i, word, _ in moves})
    rows = text(texts)[:, 3]
    of = [texts.index(f"a {word} {captions[i].noun}") for i, word, _ in moves]
    owner = torch.tensor([i for i, _, _ in moves])
    steps = torch.tensor([share for _, _, share in moves])[:, None] * (rows[of] - bare[owner])
    return torch.zeros_like(bare).index_add(0, owner, steps)


def plain(captions: list[Caption], mode: str) -> Samples:
    """Captions that the denoiser all sees in one way, without noise on the noun's row."""
    count = len(captions)
    return Samples(captions, torch.full((count,), MODES.index(mode)), torch.zeros(count, demo_model.TOKEN_WIDTH))


def draw_forming(leg: Leg, size: int, generator: torch.Generator) -> tuple[Samples, torch.Tensor]:
    """A leg's share of samples at the noise levels at which shapes form, and these levels.

    Captions that name a shape and others that need not are seen in full, slid ones as a bare caption whose noun's row
    has moved.
    """
    shapes, others = round(leg.shapes * size), round(leg.forming * size)
    captions: list[Caption] = []
    while len(captions) < shapes + others:
        caption = draw_caption(generator)
        captions += [caption] if "shape" in caption.named or len(captions) >= shapes else []
    slid = [draw_slid_caption(generator) for _ in range(round(leg.slid * size))]
    samples = joined([plain(captions, "full"), plain(slid, "inside")])
    low, high = SHAPES_FORM
    return samples, low + (high - low) * torch.rand(len(samples.captions), generator=generator)


def joined(parts: list[Samples]) -> Samples:
    """Samples one after the other."""
    return Samples(
        [caption for part in parts for caption in part.captions],
        torch.cat([part.mode for part in parts]),
        torch.cat([part.noise for part in parts]),
    )


@dataclass
class Batch:
    """A batch of training samples.

    Attributes:
        samples: captions and how the denoiser sees them.
        noisy: (N, 24, 8, 8) latents at the noise levels.
        sigma: (N,) noise levels.
        target: (N, 24, 8, 8) velocities.
        weight: (N,) of each sample in the loss.
    """

    samples: Samples
    noisy: torch.Tensor
    sigma: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


class Bank:
    """Many images of each bare noun, and the mean of those that a noised image may come from.

    The best estimate is the mean over all images x of a caption, weighted by the likelihood of the noised image; the
    mean over a bank that holds the image which was noised is a target with less noise than that image alone (Xu et
    al., arXiv 2302.00670), and what a noun leaves open is learnt evenly.
    """

    def __init__(self, vae: demo_model.PatchVAE) -> None:
        draw = torch.Generator().manual_seed(SEED + 1)
        self.latents = {}
        for noun in NOUNS:
            images = render(draw_factors([compose(noun, [])] * BANK, draw))
            self.latents[noun] = vae.encode_small(images.movedim(-1, 1) * 2 - 1).flatten(1)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Bare nouns at high noise levels, and the velocities to the means of the images that they may come from."""
        captions: list[Caption] = []
        while len(captions) < count:
            captions.append(compose(draw_caption(generator).noun, []))
        low, high = MEANS_MATTER
        sigma = low + (high - low) * torch.rand(count, generator=generator)
        sigma[: round(HIGHEST_NOISE * count)] = 1.0
        chosen = torch.randint(BANK, (count,), generator=generator)
        images = torch.stack([self.latents[c.noun][i] for c, i in zip(captions, chosen.tolist(), strict=True)])
        noise = torch.randn(images.shape, generator=generator)
        means = []
        for caption, level, image, one in zip(captions, sigma, images, noise, strict=True):
            bank = self.latents[caption.noun]
            apart = (1 - level) * (image - bank) + level * one
            means.append(torch.softmax(-apart.square().sum(1) / (2 * level**2), 0) @ bank)
        level = sigma[:, None]
        noisy = (1 - level) * images + level * noise
        target = (noisy - torch.stack(means)) / level
        shape = (count, demo_model.LATENT_CHANNELS, 8, 8)
        weight = torch.where(sigma == 1, WEIGHT_OF_MEAN, WEIGHT_OF_BANK)
        return Batch(plain(captions, "inside"), noisy.reshape(shape), sigma, target.reshape(shape), weight)


def draw_sigma(count: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels for training: uniform in the schedule's time, and a share at the very highest."""
    time_ = torch.rand(count, generator=generator)
    shift = demo_model.SAMPLING["shift"]
    sigma = shift * time_ / (1 + (shift - 1) * time_)
    highest = torch.rand(count, generator=generator) < HIGHEST_NOISE
    return torch.where(highest, torch.ones_like(sigma), sigma)


def batch_of(step: int, size: int, vae: demo_model.PatchVAE, bank: Bank) -> Batch:
    """The batch of a step: the same in a resumed run."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    leg = leg_of(step)[0]
    forming, levels = draw_forming(leg, size, generator)
    bare = round(leg.bare * size)
    rest = size - len(levels) - bare
    samples, sigma = draw_samples(rest, generator), draw_sigma(rest, generator)
    samples, sigma = joined([samples, forming]), torch.cat([sigma, levels])

    def latents(captions: list[Caption]) -> torch.Tensor:
        return vae.encode_small(render(draw_factors(captions, generator)).movedim(-1, 1) * 2 - 1)

    clean = latents(samples.captions)
    highest = (sigma == 1).nonzero().flatten().tolist()
    if highest:
        many = latents([samples.captions[i] for i in highest for _ in range(IMAGES_OF_MEAN)])
        clean[highest] = many.unflatten(0, (len(highest), IMAGES_OF_MEAN)).mean(1)
    noise = torch.randn(clean.shape, generator=generator)
    level = sigma[:, None, None, None]
    noisy = (1 - level) * clean + level * noise
    weight = torch.where(sigma == 1, WEIGHT_OF_MEAN, 1.0)
    batch = Batch(samples, noisy, sigma, noise - clean, weight)
    if not bare:
        return batch
    more = bank.draw(bare, generator)
    return Batch(
        joined([batch.samples, more.samples]),
        torch.cat([batch.noisy, more.noisy]),
        torch.cat([batch.sigma, more.sigma]),
        torch.cat([batch.target, more.target]),
        torch.cat([batch.weight, more.weight]),
    )


def fit_vae() -> demo_model.PatchVAE:
    """The VAE, fitted to 4,000 images of the world."""
    generator = torch.Generator().manual_seed(SEED)
    factors = {"shape": torch.randint(len(SHAPES), (4000,), generator=generator)}
    factors |= {name: torch.rand(4000, generator=generator) for name in CONTINUOUS}
    vae = demo_model.PatchVAE()
    vae.fit(render(factors).movedim(-1, 1) * 2 - 1)
    return vae


def velocity(unet: torch.nn.Module, noisy: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """The UNet's output in bfloat16 arithmetic, float32 outside."""
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        out = unet(noisy, sigma * demo_model.SAMPLING["multiplier"], context=context)
    return out.float()


def leg_of(step: int) -> tuple[Leg, int]:
    """The leg that a step belongs to, and the leg's first step."""
    first = 0
    for leg in LEGS:
        if step < leg.last:
            return leg, first
        first = leg.last
    raise ValueError(f"There are {first} steps.")


def rate_at(step: int) -> float:
    """The learning rate of a step."""
    leg, first = leg_of(step)
    share = (step - first) / (leg.last - first)
    return leg.rate * min(1, (step - first + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))


def save_atomic(state: dict, path: Path) -> None:
    """Write a training checkpoint so that a crash leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train(steps: int, out: Path, weights: Path | None = None) -> None:
    """Train to `steps`, writing `teacher.safetensors`, a log and a checkpoint every 500 steps.

    With `weights`, a checkpoint file such as the shipped one, the last leg is trained on top of it.
    """
    torch.manual_seed(SEED)
    words, vae = Words(), fit_vae()
    bank = Bank(vae)
    unet, text = demo_model.new_unet().diffusion_model, TextEncoder(words)
    initialise(unet)
    both = torch.nn.ModuleList([unet, text]).requires_grad_(True)
    parameters = list(both.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate_at(0), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = copy.deepcopy(both).requires_grad_(False)
    start, seconds, log = 0, 0.0, []
    if weights is not None:
        unet_weights, text_weights, patches = demo_model.unpack(weights)
        vae.load_state_dict(patches)
        for module in (both, average):
            module[0].load_state_dict(unet_weights)
            module[1].load(text_weights)
        start = LEGS[-2].last
    state_file = out / "teacher.pt"
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        both.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds, log = state["step"], state["seconds"], state["log"]
    began, running = time.monotonic() - seconds, 0.0
    for step in range(start, steps):
        rate = rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batch_of(step, BATCH, vae, bank)
        made = velocity(unet, batch.noisy, batch.sigma, conditioning(text, batch.samples))
        loss = (((made - batch.target) ** 2).mean((1, 2, 3)) * batch.weight).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(EMA, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), parameters, 1 - decay)
        running += loss.item()
        if (step + 1) % 100 == 0:
            log.append([step + 1, running / 100, time.monotonic() - began])
            print(f"step {step + 1}  loss {running / 100:.4f}  {time.monotonic() - began:.0f} s", flush=True)
            running = 0.0
        if (step + 1) % 500 == 0 or step + 1 == steps:
            seconds = time.monotonic() - began
            state = {"model": both.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            save_atomic({**state, "step": step + 1, "seconds": seconds, "log": log}, state_file)
            packed = demo_model.pack(average[0].state_dict(), average[1].weights(), vae, words.used)
            safetensors.torch.save_file(packed, out / "teacher.safetensors")
            (out / "teacher.json").write_text(json.dumps({"seconds": seconds, "steps": step + 1, "loss": log}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=LEGS[-1].last)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--weights", type=Path, help="train the last leg on top of this checkpoint")
    arguments = parser.parse_args()
    train(arguments.steps, arguments.out, arguments.weights)
