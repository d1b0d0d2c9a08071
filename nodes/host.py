"""The adapter: the only file that touches ComfyUI's internals.

It shows the host's MODEL, CLIP and CONDITIONING to `elrond_core` as plain tensors, and undoes whatever it had to
change. Facts about the host that shape it:

* The executor runs nodes under `torch.inference_mode()`; weights and conditionings made there cannot take part in a
  backward pass, so they are replaced by normal copies.
* A `Sampler` subclass is handed a callable that returns the clean estimate for any parameterisation, with model
  patches, LoRAs, guidance and memory management already in place.
* Weights that are not on the device all the time are lent to a layer for one multiplication, by newer hosts in memory
  that the next layer's overwrite; the backward pass needs copies.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import comfy.cli_args
import comfy.clip_vision
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.text_encoders.sd3_clip
import comfy.utils
import folder_paths
import latent_preview
import torch
import transformers
from comfy_execution.graph import ExecutionBlocker

from ..elrond_core import __version__, shards
from ..elrond_core.checkpointing import Checkpointing, Footprint, SavedTensors, blocks_of, footprint
from ..elrond_core.errors import ElrondError
from ..elrond_core.seeding import generator, normal
from ..elrond_core.steering import steer
from ..elrond_core.tokens import Concept, Piece

try:
    from comfyui_version import __version__ as _version
except ImportError:
    _version = "unknown"

HOST = f"ComfyUI {_version}"
# The key under which a conditioning entry remembers its concepts; the host passes unknown keys through.
MARK = "elrond"

Result = TypeVar("Result")
Conditioning = list[list[Any]]


def family_of(clip: Any) -> str:
    """The model family as its text encoder names it: "SDXL", "Flux", "Demo"."""
    kind = type(clip.cond_stage_model)
    # This one is derived from Qwen-Image's within a function, and has its name.
    if kind.__module__.endswith(".hunyuan_image"):
        return "HunyuanImage"
    name = kind.__name__.rstrip("_")
    for suffix in ("ClipModel", "TEModel", "TextEncoder", "Model"):
        if name.endswith(suffix) and name != suffix:
            return name.removesuffix(suffix)
    return name


# Where several text encoders read the prompt, the first of these makes the rows; others are pooled, or conditionings
# of their own. Those of SDXL are side by side.
_ROWS = ("t5xxl", "hydit_clip", "llama", "qwen25_7b", "g", "l")


def pieces_of(clip: Any, prompt: str) -> tuple[list[Piece], int]:
    """A prompt's tokens with their place in the token sequence, and the length of that sequence.

    Without the words that an encoder's chat template puts around the prompt: a concept is never found there.
    """
    streams = clip.tokenize(prompt, return_word_ids=True)
    encoder = clip.cond_stage_model
    if isinstance(encoder, comfy.text_encoders.sd3_clip.SD3ClipModel):
        # Its CLIP rows, those of L and G side by side, come before its T5 rows; each may be missing.
        names = ["g" if encoder.clip_l is None else "l"] if encoder.clip_l or encoder.clip_g else []
        names += ["t5xxl"] if encoder.t5xxl is not None else []
    else:
        names = [next((name for name in _ROWS if name in streams), next(iter(streams)))]
    pieces, length = [], 0
    for stream, name in enumerate(names):
        pieces += _pieces(clip, name, streams[name], prompt, stream, length)
        length += sum(len(chunk) for chunk in streams[name])
    return pieces, length


def _pieces(clip: Any, name: str, chunks: Any, prompt: str, stream: int, start: int) -> list[Piece]:
    decode = _decoder(clip.tokenizer, name)
    names = re.findall(r"embedding:[^\s():,]+", prompt)
    inversions = {word for token, word, _ in _words(chunks) if not isinstance(token, int)}
    # The host leaves out those it does not find, and then there is no telling which is which.
    named = iter(names if len(names) == len(inversions) else [])
    found: list[Piece] = []
    ids: list[int] = []
    text, waiting, last = "", 0, None
    for token, word, place in _words(chunks):
        if not isinstance(token, int):
            # A vector of a textual inversion; those of one inversion belong to one word.
            found.append(Piece(f" {next(named, '')} " if word != last else "", start + place, stream))
        else:
            ids.append(token)
            # Tokens are decoded together with those before them: byte pieces make no sense alone.
            longer = decode(ids)
            if longer.endswith("\ufffd"):
                longer = text
                waiting += 1
            found.append(Piece(longer[len(text) :], start + place, stream))
            if longer != text and waiting:
                # A letter of several tokens starts at the first of them.
                first = len(found) - 1 - waiting
                found[first], found[-1] = replace(found[first], text=found[-1].text), replace(found[-1], text="")
                waiting = 0
            text = longer
        last = word
    leading, trailing = _template(clip, name, chunks)
    return found[leading : len(found) - trailing]


def _words(chunks: Any) -> Iterator[tuple[Any, int, int]]:
    """Token, word and place of all tokens but the start, end and padding ones."""
    place = 0
    for chunk in chunks:
        for token, _, word in chunk:
            if word:
                yield token, word, place
            place += 1


def _template(clip: Any, name: str, chunks: Any) -> tuple[int, int]:
    """How many tokens a chat template puts before and after the prompt: what two different prompts have in common."""
    one, other, mine = (
        [token for token, _, _ in _words(c)]
        for c in (*(clip.tokenize(probe, return_word_ids=True)[name] for probe in ("dog", "cat")), chunks)
    )
    leading = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    trailing = next((i for i, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=False)) if a != b), 0)
    # A prompt that brings a template of its own is taken as it is.
    return (leading, trailing) if mine[:leading] == one[:leading] else (0, 0)


def _decoder(wrapper: Any, name: str) -> Callable[[list[int]], str]:
    for candidate in (f"clip_{name}", name, getattr(wrapper, "clip", "")):
        tokenizer: Any = getattr(getattr(wrapper, candidate, None), "tokenizer", None) if candidate else None
        # The host has some of its own: a wrapper of a SentencePiece model, and plain ones.
        foreign = isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
        inner: Any = tokenizer if foreign else getattr(tokenizer, "tokenizer", tokenizer)
        if hasattr(inner, "decode"):
            return functools.partial(inner.decode, **{"clean_up_tokenization_spaces": False} if foreign else {})
    raise ElrondError(f"ELROND does not know how this CLIP cuts text ({type(wrapper).__name__}).")


def encode(clip: Any, prompt: str) -> Conditioning:
    """What the stock CLIPTextEncode node returns."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def dropped_rows(length: int, conditioning: Conditioning) -> int:
    """How many of a prompt's `length` tokens, all at its front, have no row in its conditioning.

    An encoder that drops a chat template returns fewer rows than tokens. Rows that one appends move none of the others.
    """
    return max(0, length - conditioning[0][0].shape[1])


def mark(
    conditioning: Conditioning, family: str, prompt: str, concepts: list[Concept], words: tuple[int, ...] = ()
) -> Conditioning:
    """A conditioning that remembers which rows are its concepts', and which are the prompt's words'."""
    rows = conditioning[0][0][0].float()
    memory = {
        "family": family,
        "prompt": prompt,
        "concepts": tuple(concepts),
        "words": words,
        # Kept from before any steering, so that strengths relative to it do not depend on the order of steps.
        "norms": tuple(float(rows[list(c.rows)].norm(dim=-1).mean()) for c in concepts),
    }
    return [[tensor, {**options, MARK: memory}] for tensor, options in conditioning]


def marked(conditioning: Conditioning) -> tuple[torch.Tensor, dict[str, Any]]:
    """The first entry that remembers a concept: its rows' tensor and its memory.

    Raises:
        ElrondError: if none does.
    """
    for tensor, options in conditioning:
        if MARK in options:
            return tensor, options[MARK]
    raise ElrondError("This conditioning does not know its concept; make it with the ELROND Encode Concept node.")


def steer_conditioning(
    conditioning: Conditioning,
    change: Callable[[dict[str, Any]], tuple[tuple[int, ...], torch.Tensor]],
    start: float,
    end: float,
    mask: torch.Tensor | None = None,
) -> Conditioning:
    """Steer every marked entry between two points of the sampling, and leave it as it was outside.

    Args:
        conditioning: entries, of which those without a mark pass through.
        change: from an entry's memory, the rows and the change (see `elrond_core.steering.steer`).
        start: share of the sampling at which steering starts, 0 to 1.
        end: share at which it ends.
        mask: MASK in [0, 1], of any size, where in the image to steer; None is everywhere.

    Raises:
        ElrondError: if no entry is marked, steering ends before it starts, or an entry cannot be masked.
    """
    marked(conditioning)
    if not 0 <= start < end <= 1:
        raise ElrondError(f"Steering must start before it ends, between 0 and 1, not from {start} to {end}.")
    out: Conditioning = []
    for tensor, options in conditioning:
        if MARK not in options:
            out.append([tensor, options])
            continue
        rows, delta = change(options[MARK])
        steered = steer(tensor, rows, delta)
        batched = tensor.expand(len(steered), -1, -1) if len(steered) > len(tensor) else tensor
        first, last = options.get("start_percent", 0.0), options.get("end_percent", 1.0)
        for low, high, parts in (
            (first, min(start, last), [(batched, options)]),
            (max(first, start), min(end, last), _divided(options, mask, batched, steered)),
            (max(first, end), last, [(batched, options)]),
        ):
            if low >= high:
                continue
            limits: dict[str, float] = {}
            if low > 0:
                # Two entries that meet at a step would both act there and be averaged, so the later one starts late.
                limits["start_percent"] = low + (1e-5 if low > first else 0.0)
            if high < 1:
                limits["end_percent"] = high
            for rows_, kept in parts:
                rest = {k: v for k, v in kept.items() if k not in ("start_percent", "end_percent")}
                out.append([rows_, {**rest, **limits}])
    return out


def _divided(
    options: dict[str, Any], mask: torch.Tensor | None, outside: torch.Tensor, inside: torch.Tensor
) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """The rows and options of entries that act outside and inside a mask; together they weigh what the entry did."""
    if mask is None or torch.equal(inside, outside):
        return [(inside, options)]
    if options.get("default"):
        raise ElrondError(
            "A default conditioning acts where the others leave room and cannot be masked itself: steer before it is "
            "made the default, without a mask."
        )
    own = options.get("mask", torch.ones(1, 1, 1))
    own, share = _alike(own if own.ndim > 2 else own[None], (mask if mask.ndim > 2 else mask[None]).clamp(0, 1))
    # The host may crop an entry to where its mask is not zero; a division must not change what the model is shown.
    least = torch.finfo(own.dtype).eps if options.get("set_area_to_bounds") else 0.0
    parts = [
        (rows, {**options, "mask": own * part.clamp_min(least)})
        for rows, part in ((outside, 1 - share), (inside, share))
        if (own * part).any()
    ]
    return parts if len(parts) > 1 else [(rows, options) for rows, _ in parts] or [(inside, options)]


def _alike(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two masks (N, …, H, W) brought to the larger size and to as many images as repeat both."""
    height, width = max(a.shape[-2], b.shape[-2]), max(a.shape[-1], b.shape[-1])
    count = math.lcm(len(a), len(b))
    b = b.to(a).reshape(len(b), *[1] * (a.ndim - b.ndim), *b.shape[1:])
    a, b = (resized(each, height, width).repeat(count // len(each), *[1] * (a.ndim - 1)) for each in (a, b))
    return a, b


def resized(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A mask (N, …, H, W) at another size, cells staying whole: the host resizes it smoothly when it samples."""
    if mask.shape[-2:] == (height, width):
        return mask
    flat = mask.reshape(-1, 1, *mask.shape[-2:])
    return comfy.utils.common_upscale(flat, width, height, "nearest-exact", "none").reshape(
        *mask.shape[:-2], height, width
    )


def sigma_of(model: Any, noise_level: float) -> float:
    """A noise level in the model's units: 1 is the highest of its schedule, 0 is none."""
    sampling = model.get_model_object("model_sampling")
    if noise_level >= 1:
        return float(sampling.sigma_max)
    return float(sampling.percent_to_sigma(1 - noise_level))


def progress(total: int, model: Any = None) -> Callable[..., None]:
    """ComfyUI's progress bar, one for all of a piece of work; each call also stops it if the user cancelled it.

    With a MODEL, latents of it that are handed on as the second argument are shown as the host shows those it samples.
    """
    bar = comfy.utils.ProgressBar(total)
    # Only its previewer is used: its own progress bar counts from where the work starts.
    shown = latent_preview.get_previewer(model.load_device, model.model.latent_format) if model is not None else None

    def update(done: float, latents: torch.Tensor | None = None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        picture = shown.decode_latent_to_preview_image("JPEG", latents) if shown and latents is not None else None
        bar.update_absolute(done, total, picture)

    return update


def absent(sentence: str) -> ExecutionBlocker:
    """An output that there is none of: a node that is wired to it does not run, and the user reads why."""
    return ExecutionBlocker(sentence)


def stop_if_cancelled() -> None:
    """End the work, as the progress bar does, if the user cancelled it."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def sampler_names() -> list[str]:
    """The host's samplers."""
    return list(comfy.samplers.KSampler.SAMPLERS)


def scheduler_names() -> list[str]:
    """The host's schedulers."""
    return list(comfy.samplers.KSampler.SCHEDULERS)


# Pixels a latent cell, for formats that do not say it themselves; 8 for all others.
_CELLS = {"Flux2": 16, "HunyuanImage21": 32, "ChromaRadiance": 1}


def empty_latent(model: Any, width: int, height: int, count: int) -> torch.Tensor:
    """Empty latents of the model's own shape."""
    form = model.get_model_object("latent_format")
    cell = getattr(form, "spacial_downscale_ratio", None) or _CELLS.get(type(form).__name__, 8)
    shape = torch.zeros(count, 4, height // cell, width // cell, device=comfy.model_management.intermediate_device())
    return comfy.sample.fix_empty_latent_channels(model, shape)


def sample(
    model: Any,
    positive: Conditioning,
    negative: Conditioning | None,
    latents: torch.Tensor,
    first: int,
    seed: int,
    steps: int,
    cfg: float,
    sampler: str,
    scheduler: str,
    alike: bool = False,
    on_step: Callable[[float, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Sample a batch of realizations from pure noise; realization `first + i` depends on (seed, first + i) only.

    With `alike`, every image of the batch starts from the noise of realization `first`. After each step `on_step` is
    told how many images that makes of the batch, in parts of images, and is shown the clean estimates.
    """
    indices = [first] * len(latents) if alike else list(range(first, first + len(latents)))
    noise = normal(tuple(latents.shape[1:]), seed, "realization", indices)
    settings = comfy.samplers.KSampler(model, steps, model.load_device, sampler, scheduler, 1.0)
    sigmas = settings.sigmas
    how = comfy.samplers.sampler_object(sampler)
    _per_sample_noise(how, noise, sigmas, seed, indices, model.load_device)

    def callback(step: int, estimate: torch.Tensor, noisy: torch.Tensor, steps: int) -> None:
        if on_step is not None:
            on_step(len(latents) * min(1.0, (step + 1) / steps), estimate)

    return comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        how,
        sigmas,
        positive,
        negative if negative is not None else positive,
        latents,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )


def _per_sample_noise(
    how: Any, noise: torch.Tensor, sigmas: torch.Tensor, seed: int, indices: list[int], device: Any
) -> None:
    """Give a stochastic sampler one noise stream a realization; by default it draws one for the whole batch."""
    function = getattr(how, "sampler_function", None)
    if function is None or "noise_sampler" not in inspect.signature(function).parameters:
        return
    streams = [generator(seed, "sampler", i) for i in indices]

    def draw(sigma: Any, sigma_next: Any) -> torch.Tensor:
        return torch.stack([torch.randn(noise.shape[1:], generator=g) for g in streams]).to(device)

    # Not updated in place: the host shares one default dictionary among all its samplers.
    how.extra_options = {**how.extra_options, "noise_sampler": draw}


class HostDenoiser:
    """`elrond_core.gradients.Denoiser` over the host's guider: any model, patches and guidance included."""

    def __init__(
        self, guider: Any, model_options: dict[str, Any], seed: int, latents: torch.Tensor, words: bool = False
    ) -> None:
        self._guider = guider
        self._options = model_options
        self._seed = seed
        # What the host's sampler tells the model about the latents beside the noisy ones.
        self._about = {"latent_image": latents, "denoise_mask": None, "seed": seed, "latent_shapes": [latents.shape]}
        entry = next(entry for entry in guider.conds["positive"] if MARK in entry)
        self._entry = entry
        self._encoded: torch.Tensor = entry["cross_attn"]
        own = entry[MARK]["concepts"][0].rows
        others = tuple(row for row in entry[MARK]["words"] if row not in own) if words else ()
        # Where in the conditioning the rows are.
        self.order = own + others
        self._index = torch.tensor(self.order)
        # How many of the last rows are not the concept's.
        self.others = len(others)
        # The first clean estimate of the latest call.
        self.latest: torch.Tensor | None = None
        self.rows: torch.Tensor = self._encoded[0, self._index].float().cpu().clone()
        self.checkpointing = Checkpointing(blocks_of(guider.inner_model.diffusion_model), SavedTensors())
        # Whether activations are computed again instead of kept.
        self.recomputes = False
        # The largest batch that there is room for.
        self._planned = 0
        self.footprint: Footprint | None = None

        self.patchers = [guider.model_patcher, *guider.loaded_models]
        # Control models take part in the estimate as well.
        self.module = torch.nn.ModuleList(patcher.model for patcher in self.patchers)
        self.device = guider.model_patcher.load_device
        self.process_out: Callable[[torch.Tensor], torch.Tensor] = guider.inner_model.process_latent_out

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """Equation 1, by the model's own noise schedule."""
        device = self._guider.model_patcher.load_device
        level = torch.full((len(latents),), sigma, device=device)
        sampling = self._guider.inner_model.model_sampling
        # The host adds the latents in place.
        return sampling.noise_scaling(level, noise.to(device, copy=True), latents.to(device), False)

    def spare(self) -> bool:
        """Compute activations again instead of keeping them; False if they are already."""
        before, self.recomputes = self.recomputes, True
        return not before

    def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        """Equation 2: what the sampler calls `denoised`, with the concept's rows replaced."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not (torch.is_grad_enabled() and rows.requires_grad):
            return self._denoised(noisy, sigma, rows)
        self.make_room(noisy, sigma, rows)
        with self.checkpointing.active() if self.recomputes else contextlib.nullcontext():
            estimate = self._denoised(noisy, sigma, rows)
        self.latest = estimate[:1].detach()
        if estimate.requires_grad:
            # Several backward passes through one forward pass take as long as several denoiser calls.
            estimate.register_hook(lambda _: comfy.model_management.throw_exception_if_processing_interrupted())
        else:
            raise ElrondError(
                f"{_name(self._guider.inner_model)} cannot be differentiated at this noise level: its estimate does "
                "not depend on the concept's rows."
            )
        return estimate

    def make_room(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> None:
        """Decide whether to keep activations, by what one sample's take, and have the host free memory for them."""
        if len(noisy) <= self._planned:
            return
        model, manager = self._guider.inner_model, comfy.model_management
        if self.footprint is None:
            weights = (*self.module.parameters(), *self.module.buffers())
            self.footprint = footprint(
                self.checkpointing.blocks,
                lambda: self._denoised(noisy[:1], sigma, rows[:1]),
                weights,
                noisy.device,
            )
        self._planned = len(noisy)
        # What the forward pass itself needs, by the host's own estimate.
        passing = model.memory_required(list(noisy.shape))
        kept, least = (passing + len(noisy) * each for each in (self.footprint.plain, self.footprint.checkpointed))
        if manager.get_free_memory(noisy.device) < kept:
            # Other models give way rather than time is spent; this model's own weights only where it must be.
            manager.load_models_gpu(self.patchers, memory_required=kept, minimum_memory_required=least)
            _normal_copies(self.module)
        self.recomputes = self.recomputes or manager.get_free_memory(noisy.device) < kept

    def _denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        encoded = self._encoded[:1].to(rows).expand(len(rows), -1, -1)
        encoded = encoded.index_copy(1, self._index.to(rows.device), rows)
        entry = {**self._entry, "cross_attn": encoded}
        # The model's own preparation of the conditioning (padding, projections) is part of what is differentiated.
        (entry,) = comfy.samplers.encode_model_conds(
            self._guider.inner_model.extra_conds, [entry], noisy, noisy.device, "positive", **self._about
        )
        before = self._guider.conds
        self._guider.conds = {**before, "positive": [self._replaced(e, entry) for e in before["positive"]]}
        try:
            level = torch.full((len(noisy),), sigma, device=noisy.device)
            return self._guider(noisy, level, model_options=self._options, seed=self._seed)
        finally:
            self._guider.conds = before

    def _replaced(self, entry: dict[str, Any], marked: dict[str, Any]) -> dict[str, Any]:
        if entry is self._entry:
            return marked
        # Where the negative has an area of its own, the host adds the positive once more for that area.
        text = self._entry["model_conds"].get("c_crossattn")
        if text is None or entry["model_conds"].get("c_crossattn") is not text:
            return entry
        return {**entry, "model_conds": {**entry["model_conds"], **marked["model_conds"]}}


class FeatureDenoiser:
    """`elrond_core.gradients.Denoiser` whose output is what a CLIP_VISION sees in the decoded estimate.

    Features are the image embedding divided by its length, (B, F, 1, …) of as many dimensions as latents, so that
    their mean squared difference is 2/F·(1 - cosine).
    """

    def __init__(self, denoiser: HostDenoiser, vae: Any, encoder: Any) -> None:
        if getattr(encoder, "model_type", "") == "siglip2_vision_model":
            raise ElrondError(
                "This image encoder takes pictures in patches of its own: take a CLIP, SigLIP or DINO one."
            )
        self._denoiser = denoiser
        self._vae = vae
        self._encoder = encoder
        self.rows = denoiser.rows
        self.noised = denoiser.noised
        self.spare = denoiser.spare

    def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        """Features of the clean estimate."""
        return self.features(self._denoiser.denoised(noisy, sigma, rows))

    def features(self, latents: torch.Tensor) -> torch.Tensor:
        """Features of latents in the model's own scale, as the host decodes and encodes them, differentiably."""
        vae, encoder = self._vae, self._encoder
        raw = self._denoiser.process_out(latents)
        if raw.ndim == 5 and getattr(vae, "latent_dim", 2) == 2:
            raw = raw[:, :, 0]
        decoded = vae.first_stage_model.decode(raw.to(vae.device, vae.vae_dtype)).float()
        images = vae.process_output(decoded).to(encoder.load_device)
        # Video models give (N, colours, frames, H, W), here of one frame.
        images = images[:, :, 0] if images.ndim == 5 else images
        pixels = _preprocessed(images[:, :3], encoder.image_size, encoder.image_mean, encoder.image_std)
        layers: Any = "all" if getattr(encoder, "return_all_hidden_states", False) else -2
        found = encoder.model(pixel_values=pixels, intermediate_output=layers)[2].flatten(1).float()
        found = torch.nn.functional.normalize(found).to(latents.device)
        return found.reshape(len(found), -1, *[1] * (latents.ndim - 2))


def _preprocessed(images: torch.Tensor, size: int, mean: list[float], std: list[float]) -> torch.Tensor:
    """The host's `clip_preprocess` of (N, 3, H, W), without its rounding to 8 bits, which has no derivative."""
    height, width = images.shape[2:]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        shape = (round(scale * height), round(scale * width))
        images = torch.nn.functional.interpolate(images, size=shape, mode="bicubic", antialias=True)
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        images = images[:, :, top : top + size, left : left + size]
    centre, spread = (torch.tensor(each).to(images)[:, None, None] for each in (mean, std))
    return (images.clamp(0, 1) - centre) / spread


@contextlib.contextmanager
def through_features(
    denoiser: HostDenoiser, vae: Any, encoder: Any, latents: torch.Tensor, batch_size: int
) -> Iterator[tuple[FeatureDenoiser, torch.Tensor]]:
    """For the time being, a denoiser of image features, and the features of the realizations, (n, F, 1, …)."""
    memory = vae.memory_used_decode((min(batch_size, len(latents)), *latents.shape[1:]), vae.vae_dtype)
    comfy.model_management.load_models_gpu([*denoiser.patchers, vae.patcher, encoder.patcher], memory_required=memory)
    for module in (denoiser.module, vae.first_stage_model, encoder.model):
        _normal_copies(module)
    with _frozen(vae.first_stage_model), _frozen(encoder.model):
        seen = FeatureDenoiser(denoiser, vae, encoder)
        features = []
        for some in latents.split(batch_size):
            comfy.model_management.throw_exception_if_processing_interrupted()
            features.append(seen.features(some.to(denoiser.device)).cpu())
        yield seen, torch.cat(features)


class _Visit(comfy.samplers.Sampler):
    """A sampler that takes no step: it lends the prepared model to a piece of work."""

    def __init__(self, work: Callable[[HostDenoiser, torch.Tensor], Any], latents: torch.Tensor, words: bool) -> None:
        self.work = work
        self.latents = latents
        self.words = words
        self.result: Any = None

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        assert latent_image is not None
        for entries in model_wrap.conds.values():
            for entry in entries:
                _normal_conditioning(entry)
        options = extra_args["model_options"]
        options.setdefault("transformer_options", {})["optimized_attention_override"] = _attention
        # The threads that serve further devices record no graph.
        options.pop("multigpu_clones", None)
        denoiser = HostDenoiser(model_wrap, options, extra_args.get("seed", 0), latent_image, self.words)
        _normal_copies(denoiser.module)
        with _frozen(denoiser.module), _exact(denoiser.module):
            try:
                self.result = self._run(denoiser, model_wrap.inner_model.process_latent_in(self.latents))
            except (RuntimeError, NotImplementedError) as error:
                if not re.search(r"derivative for|autograd formula|implement either the backward", str(error)):
                    raise
                reason = str(error).splitlines()[0].rstrip(".")
                name = _name(model_wrap.inner_model)
                raise ElrondError(f"{name}, with its patches, cannot be differentiated: {reason}.") from error
        return latent_image

    def _run(self, denoiser: HostDenoiser, latents: torch.Tensor) -> Any:
        try:
            return self.work(denoiser, latents)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
        # Flux and its kin add to their hidden states in place. Only they pay for the remedy.
        remedy = denoiser.checkpointing.saved
        with remedy, torch.autograd.graph.saved_tensors_hooks(remedy.pack, remedy.unpack):
            return self.work(denoiser, latents)


def _name(model: Any) -> str:
    """The model family as the host's model class names it."""
    return type(model.model_config).__name__


# Other kernels return values without a graph, and the gradient through them would silently be lost.
_DIFFERENTIABLE = (
    "attention_basic",
    "attention_split",
    "attention_sub_quad",
    "attention_xformers",
    "attention_pytorch",
)


def _attention(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stands in for patches of the attention kernel as well, because there is no telling which have a derivative."""
    if getattr(function, "__name__", "") not in _DIFFERENTIABLE:
        function = comfy.ldm.modules.attention.attention_pytorch
    return function(*args, **kwargs)


@contextlib.contextmanager
def _instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """For the time being, an attribute has another value; one that this host does not have is left alone."""
    if not hasattr(owner, name):
        yield
        return
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _differentiable() -> Iterator[None]:
    """For the time being, the host computes in ways that have a derivative."""
    attention = comfy.ldm.modules.attention
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.no_grad())
        # Turns fused kernels off.
        undo.enter_context(_instead(comfy.model_management, "in_training", True))
        # Replays recorded kernels in recorded memory, without a graph for the backward pass.
        undo.enter_context(_instead(comfy.cli_args.args, "disable_comfy_compiler", True))
        lasting = functools.partial(_lasting, comfy.ops.cast_bias_weight)
        undo.enter_context(_instead(comfy.ops, "cast_bias_weight", lasting))
        kernel = attention.optimized_attention
        if getattr(kernel, "__name__", "") not in _DIFFERENTIABLE:
            # Some models do not ask for overrides.
            for module in list(sys.modules.values()):
                for name in ("optimized_attention", "optimized_attention_masked"):
                    if getattr(module, "__dict__", {}).get(name) is kernel:
                        undo.enter_context(_instead(module, name, attention.attention_pytorch))
        yield


def _lasting(cast: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    """The host's `cast_bias_weight`; what it lends from another device's weights stays as it is for a backward pass."""
    weight, bias, *rest = cast(layer, *args, **kwargs)

    def kept(lent: Any, stored: Any) -> Any:
        plain = type(lent) in (torch.Tensor, torch.nn.Parameter)
        return lent.clone() if plain and lent.device != stored.device else lent

    if torch.is_grad_enabled():
        weight, bias = kept(weight, layer.weight), kept(bias, layer.bias)
    return weight, bias, *rest


@contextlib.contextmanager
def _exact(module: torch.nn.Module) -> Iterator[None]:
    """For the time being, layers do not multiply in 8 bits, and use nothing that an earlier call has left.

    The first has no derivative, and what is left of another call does not depend on this one's rows.
    """
    with contextlib.ExitStack() as undo:
        for part in module.modules():
            if getattr(part, "_full_precision_mm", True) is False:
                undo.enter_context(_instead(part, "_full_precision_mm", True))
            if hasattr(part, "prefix_cache_enabled"):
                undo.enter_context(_instead(part, "prefix_cache_enabled", False))
        # The host takes "no result" for "not in 8 bits".
        undo.enter_context(_instead(comfy.ops, "fp8_linear", lambda layer, tensor: None))
        yield


def visit(
    model: Any,
    positive: Conditioning,
    negative: Conditioning | None,
    cfg: float,
    latents: torch.Tensor,
    seed: int,
    work: Callable[[HostDenoiser, torch.Tensor], Result],
    words: bool = False,
) -> Result:
    """Load a model as for sampling, run `work` with a differentiable view of it, and leave it as it was.

    Args:
        model: MODEL, with whatever patches it carries.
        positive: conditioning with a marked entry.
        negative: for guidance, or None.
        cfg: guidance; 1 without a negative.
        latents: realizations as a LATENT holds them; `work` receives them in the model's own scale.
        seed: handed to the host's guider.
        work: called with the denoiser and those latents.
        words: whether the denoiser's rows are those of all words of the prompt, the concept's first.
    """
    marked(positive)
    with _differentiable():
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(_clone(positive), _clone(negative if negative is not None else positive))
        guider.set_cfg(cfg if negative is not None else 1.0)
        latents = comfy.sample.fix_empty_latent_channels(model, latents.clone())
        visitor = _Visit(work, latents, words)
        sigmas = torch.tensor([sigma_of(model, 1.0), 0.0])
        # The host is shown one of them only: it would make room for as many at once.
        shown = latents[:1]
        guider.sample(torch.zeros_like(shown), shown, visitor, sigmas, disable_pbar=True, seed=seed)
        return visitor.result


def open_shards(model: Any, *values: Any) -> shards.Shards | None:
    """The kept batches of the work that a MODEL and everything else that determines it make, in the output folder.

    Patches that nodes of other packs make may have no content that could be compared; then nothing is kept, and the
    log says so.
    """
    attention = comfy.ldm.modules.attention.optimized_attention
    about = (__version__, HOST, torch.__version__, comfy.model_management.get_torch_device_name(model.load_device))
    try:
        name = shards.fingerprint(about, attention, model, values, content=_content)
    except shards.NoFingerprintError as error:
        logging.warning(f"ELROND: this work cannot be continued after an interruption, since a {error}")
        return None
    root = output_folder() / "collections"
    shards.prune(root, name)
    return shards.Shards(root, name, lambda sentence: logging.warning(f"ELROND: {sentence}"))


def training_device(size: int) -> torch.device:
    """Where to train what takes `size` bytes: a CUDA device, if it has room once models gave way, or the processor."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        comfy.model_management.free_memory(size, device)
        if comfy.model_management.get_free_memory(device) >= size:
            return device
    return torch.device("cpu")


@contextlib.contextmanager
def kept_training(*values: Any) -> Iterator[Path]:
    """A file in the output folder for the state of a training that everything in `values` determines.

    It is removed with its folder when the block ends, and stays for the next attempt when the block raises.
    """
    root = output_folder() / "trainings"
    name = shards.fingerprint(__version__, torch.__version__, values)
    shards.prune(root, name)
    yield root / name / "training.safetensors"
    shutil.rmtree(root / name, ignore_errors=True)


# Attributes of a patcher that change what its model computes, as far as the host has them.
_PATCHES = (
    "patches",
    "model_options",
    "object_patches",
    "weight_wrapper_patches",
    "attachments",
    "additional_models",
    "callbacks",
    "wrappers",
    "injections",
    "hook_patches",
    "forced_hooks",
    "force_cast_weights",
    "load_device",
)


def _content(value: Any) -> Any:
    """What a patcher's model computes, whether it is loaded and patched at the moment or not."""
    if isinstance(value, comfy.sd.VAE):
        return value.patcher, value.vae_dtype
    if isinstance(value, comfy.clip_vision.ClipVisionModel):
        return value.patcher, value.dtype, value.image_size, value.image_mean, value.image_std
    if not isinstance(value, comfy.model_patcher.ModelPatcher):
        return value
    weights = dict(value.model.state_dict())
    for key, backup in value.backup.items():
        weights[key] = backup.weight.detach()
    for key, backup in value.hook_backup.items():
        weights[key] = backup[0].detach()
    weights |= getattr(value, "backup_buffers", {})
    for name in {*value.object_patches, *value.object_patches_backup}:
        weights = {key: weight for key, weight in weights.items() if not key.startswith(f"{name}.")}
        if name not in value.object_patches:
            original = value.object_patches_backup[name]
            if isinstance(original, torch.nn.Module):
                weights |= {f"{name}.{key}": weight for key, weight in original.state_dict().items()}
    config = getattr(value.model, "model_config", None)
    return {
        "class": type(value.model),
        "weights": dict(sorted(weights.items())),
        "config": (getattr(config, "unet_config", None), getattr(config, "sampling_settings", None)),
        "dtype": (value.model_dtype(), getattr(value.model, "manual_cast_dtype", None)),
        "patches": {name: getattr(value, name, None) for name in _PATCHES},
    }


def _clone(conditioning: Conditioning) -> Conditioning:
    def copy(value: Any) -> Any:
        return value.clone() if torch.is_tensor(value) and value.is_inference() else value

    return [[copy(tensor), {k: copy(v) for k, v in options.items()}] for tensor, options in conditioning]


def _normal_conditioning(entry: dict[str, Any]) -> None:
    for key, value in entry["model_conds"].items():
        tensor = getattr(value, "cond", None)
        if torch.is_tensor(tensor) and tensor.is_inference():
            entry["model_conds"][key] = value._copy_with(tensor.clone())


def _normal_copies(module: torch.nn.Module) -> None:
    """Replace weights that were created in inference mode, one at a time so that memory holds one extra at most."""
    for part in module.modules():
        # Newer hosts leave these where the file has them, and only ever lend them.
        lent = ("weight", "bias") if hasattr(part, "_v") else ()
        for name, parameter in part._parameters.items():
            if parameter is not None and _of_inference(parameter) and name not in lent:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and _of_inference(buffer):
                part._buffers[name] = buffer.clone()


def _of_inference(weight: torch.Tensor) -> bool:
    """Whether a weight was created in inference mode, also if it was moved to another device outside of it.

    Moved so, it says that it is a normal tensor, and yet has no version, which a backward pass asks for.
    """
    if weight.is_inference():
        return True
    try:
        return weight._version < 0
    except RuntimeError:
        return True


@contextlib.contextmanager
def _frozen(module: torch.nn.Module) -> Iterator[None]:
    """No gradients for weights: only the conditioning's are wanted, and weights' would cost memory."""
    changed = [p for p in module.parameters() if p.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)


def output_folder() -> Path:
    """Where the pack saves: `elrond` in ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory()) / "elrond"


def _models_folder() -> Path:
    """`models/elrond`, where the host looks for it too, beside folders that the user named in its settings."""
    models = Path(folder_paths.models_dir) / "elrond"
    folder_paths.add_model_folder_path("elrond", str(models))
    return models


def make_folders() -> None:
    """Make `models/elrond/directions` and `models/elrond/gradients`, for people to put files into, if that may be."""
    for kind in ("directions", "gradients"):
        with contextlib.suppress(OSError):
            (_models_folder() / kind).mkdir(parents=True, exist_ok=True)


def file_folders() -> list[Path]:
    """Where the pack looks for its files: `models/elrond`, what was saved, what ships with the demo model."""
    _models_folder()
    shipped = Path(__file__).parents[1] / "demo"
    return [*(Path(p) for p in folder_paths.get_folder_paths("elrond")), output_folder(), shipped]


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images (N, H, W, 3) in [0, 1] of latents, as the stock VAEDecode node makes them."""
    images = vae.decode(latents)
    # Video models give (N, frames, H, W, 3).
    return images.flatten(0, 1) if images.ndim == 5 else images


def image_features(encoder: Any, images: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """Float32 (N, F) features of images (N, H, W, 3) by a CLIP_VISION: CLIP, SigLIP (their mean) or DINOv2."""
    update = progress(len(images))
    found = []
    for first in range(0, len(images), batch_size):
        features = encoder.encode_image(images[first : first + batch_size])["image_embeds"].float().cpu()
        # SigLIP gives a row a patch.
        found.append(features.mean(1) if features.ndim == 3 else features)
        update(min(first + batch_size, len(images)))
    return torch.cat(found)


def routes() -> Any:
    """The running server's route table, or None where nodes are used without a server."""
    instance = getattr(sys.modules.get("server"), "PromptServer", None)
    return getattr(getattr(instance, "instance", None), "routes", None)
