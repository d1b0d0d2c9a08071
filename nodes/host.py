"""The adapter: the only file that touches ComfyUI's internals.

It shows the host's MODEL, CLIP and CONDITIONING to `elrond_core` as plain tensors, and undoes whatever it had to
change. Facts about the host that shape it:

* The executor runs nodes under `torch.inference_mode()`; weights and conditionings made there cannot take part in a
  backward pass, so they are replaced by normal copies.
* A `Sampler` subclass is handed a callable that returns the clean estimate for any parameterisation, with model
  patches, LoRAs, guidance and memory management already in place.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
import torch

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
    name = type(clip.cond_stage_model).__name__
    for suffix in ("ClipModel", "TEModel_", "TEModel", "TextEncoder", "Model"):
        if name.endswith(suffix) and name != suffix:
            return name.removesuffix(suffix).rstrip("_")
    return name


def pieces_of(clip: Any, prompt: str) -> tuple[list[Piece], int]:
    """A prompt's tokens with their place in the token sequence, and the length of that sequence.

    Where a model has several text encoders, their rows are either side by side (SDXL: same places) or the widest one
    alone makes the rows (Flux: T5), so the encoder with the longest sequence is read.
    """
    streams = clip.tokenize(prompt, return_word_ids=True)
    name = max(streams, key=lambda key: sum(len(chunk) for chunk in streams[key]))
    tokenizer = _tokenizer(clip.tokenizer, name)
    pieces, start = [], 0
    for chunk in streams[name]:
        ids: list[int] = []
        text = ""
        for place, (token, _, word) in enumerate(chunk):
            if word == 0 or torch.is_tensor(token) or not isinstance(token, int):
                continue
            # Tokens are decoded together with those before them: byte pieces make no sense alone.
            ids.append(token)
            longer = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            pieces.append(Piece(longer[len(text) :] or "", start + place))
            text = longer
        start += len(chunk)
    return pieces, start


def _tokenizer(wrapper: Any, name: str) -> Any:
    for candidate in (f"clip_{name}", name, getattr(wrapper, "clip", "")):
        inner = getattr(wrapper, candidate, None) if candidate else None
        if inner is not None and hasattr(inner, "tokenizer"):
            return inner.tokenizer
    raise ElrondError(f"ELROND does not know how this CLIP cuts text ({type(wrapper).__name__}).")


def encode(clip: Any, prompt: str) -> Conditioning:
    """What the stock CLIPTextEncode node returns."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def mark(conditioning: Conditioning, family: str, prompt: str, concepts: list[Concept]) -> Conditioning:
    """A conditioning that remembers which rows are its concepts'."""
    rows = conditioning[0][0][0].float()
    memory = {
        "family": family,
        "prompt": prompt,
        "concepts": tuple(concepts),
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
) -> Conditioning:
    """Steer every marked entry between two points of the sampling, and leave it as it was outside.

    Args:
        conditioning: entries, of which those without a mark pass through.
        change: from an entry's memory, the rows and the change (see `elrond_core.steering.steer`).
        start: share of the sampling at which steering starts, 0 to 1.
        end: share at which it ends.
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
        for low, high, rows_ in (
            (first, min(start, last), batched),
            (max(first, start), min(end, last), steered),
            (max(first, end), last, batched),
        ):
            if low >= high:
                continue
            limits: dict[str, float] = {}
            if low > 0:
                # Two entries that meet at a step would both act there and be averaged, so the later one starts late.
                limits["start_percent"] = low + (1e-5 if low > first else 0.0)
            if high < 1:
                limits["end_percent"] = high
            rest = {k: v for k, v in options.items() if k not in ("start_percent", "end_percent")}
            out.append([rows_, {**rest, **limits}])
    return out


def sigma_of(model: Any, noise_level: float) -> float:
    """A noise level in the model's units: 1 is the highest of its schedule, 0 is none."""
    sampling = model.get_model_object("model_sampling")
    if noise_level >= 1:
        return float(sampling.sigma_max)
    return float(sampling.percent_to_sigma(1 - noise_level))


def progress(total: int) -> Callable[[int], None]:
    """ComfyUI's progress bar; each call also stops the work if the user cancelled it."""
    bar = comfy.utils.ProgressBar(total)

    def update(done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return update


def sampler_names() -> list[str]:
    """The host's samplers."""
    return list(comfy.samplers.KSampler.SAMPLERS)


def scheduler_names() -> list[str]:
    """The host's schedulers."""
    return list(comfy.samplers.KSampler.SCHEDULERS)


def empty_latent(model: Any, width: int, height: int, count: int) -> torch.Tensor:
    """Empty latents of the model's own shape."""
    shape = torch.zeros(count, 4, height // 8, width // 8, device=comfy.model_management.intermediate_device())
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
) -> torch.Tensor:
    """Sample a batch of realizations from pure noise; realization `first + i` depends on (seed, first + i) only.

    With `alike`, every image of the batch starts from the noise of realization `first`.
    """
    indices = [first] * len(latents) if alike else list(range(first, first + len(latents)))
    noise = normal(tuple(latents.shape[1:]), seed, "realization", indices)
    settings = comfy.samplers.KSampler(model, steps, model.load_device, sampler, scheduler, 1.0)
    sigmas = settings.sigmas
    how = comfy.samplers.sampler_object(sampler)
    _per_sample_noise(how, noise, sigmas, seed, indices, model.load_device)
    return comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        how,
        sigmas,
        positive,
        negative if negative is not None else positive,
        latents,
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
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

    def __init__(self, guider: Any, model_options: dict[str, Any], seed: int) -> None:
        self._guider = guider
        self._options = model_options
        self._seed = seed
        positive = guider.conds["positive"]
        self._place = next(i for i, entry in enumerate(positive) if MARK in entry)
        entry = positive[self._place]
        self._encoded: torch.Tensor = entry["cross_attn"]
        self._index = torch.tensor(entry[MARK]["concepts"][0].rows)
        self.rows: torch.Tensor = self._encoded[0, self._index].float().cpu().clone()

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """Equation 1, by the model's own noise schedule."""
        device = self._guider.model_patcher.load_device
        level = torch.full((len(latents),), sigma, device=device)
        sampling = self._guider.inner_model.model_sampling
        # The host adds the latents in place.
        return sampling.noise_scaling(level, noise.to(device, copy=True), latents.to(device), False)

    def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        """Equation 2: what the sampler calls `denoised`, with the concept's rows replaced."""
        encoded = self._encoded[:1].to(rows).expand(len(rows), -1, -1)
        encoded = encoded.index_copy(1, self._index.to(rows.device), rows)
        positive = list(self._guider.conds["positive"])
        entry = {**positive[self._place], "cross_attn": encoded}
        # The model's own preparation of the conditioning (padding, projections) is part of what is differentiated.
        positive[self._place] = comfy.samplers.encode_model_conds(
            self._guider.inner_model.extra_conds, [entry], noisy, noisy.device, "positive"
        )[0]
        before = self._guider.conds
        self._guider.conds = {**before, "positive": positive}
        try:
            level = torch.full((len(noisy),), sigma, device=noisy.device)
            return self._guider(noisy, level, model_options=self._options, seed=self._seed)
        finally:
            self._guider.conds = before


class _Visit(comfy.samplers.Sampler):
    """A sampler that takes no step: it lends the prepared model to a piece of work."""

    def __init__(self, work: Callable[[HostDenoiser, torch.Tensor], Any]) -> None:
        self.work = work
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
        _normal_copies(model_wrap.inner_model)
        for entries in model_wrap.conds.values():
            for entry in entries:
                _normal_conditioning(entry)
        with _frozen(model_wrap.inner_model):
            denoiser = HostDenoiser(model_wrap, extra_args["model_options"], extra_args.get("seed", 0))
            self.result = self.work(denoiser, latent_image)
        return latent_image


def visit(
    model: Any,
    positive: Conditioning,
    negative: Conditioning | None,
    cfg: float,
    latents: torch.Tensor,
    seed: int,
    work: Callable[[HostDenoiser, torch.Tensor], Result],
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
    """
    marked(positive)
    with torch.inference_mode(False), torch.no_grad(), _training_flag():
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(_clone(positive), _clone(negative if negative is not None else positive))
        guider.set_cfg(cfg if negative is not None else 1.0)
        visitor = _Visit(work)
        latents = comfy.sample.fix_empty_latent_channels(model, latents.clone())
        sigmas = torch.tensor([sigma_of(model, 1.0), 0.0])
        guider.sample(torch.zeros_like(latents), latents, visitor, sigmas, disable_pbar=True, seed=seed)
        return visitor.result


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
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_inference():
                part._parameters[name] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = buffer.clone()


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


@contextlib.contextmanager
def _training_flag() -> Iterator[None]:
    """Newer hosts have a flag that turns kernels off which cannot be differentiated."""
    manager = comfy.model_management
    if not hasattr(manager, "in_training"):
        yield
        return
    before = manager.in_training
    manager.in_training = True
    try:
        yield
    finally:
        manager.in_training = before


def output_folder() -> Path:
    """Where the pack saves: `elrond` in ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory()) / "elrond"


def file_folders() -> list[Path]:
    """Where the pack looks for its files: `models/elrond`, what was saved, what ships with the demo model."""
    models = Path(folder_paths.models_dir) / "elrond"
    if "elrond" not in folder_paths.folder_names_and_paths:
        folder_paths.add_model_folder_path("elrond", str(models))
    shipped = Path(__file__).parents[1] / "demo"
    return [*(Path(p) for p in folder_paths.get_folder_paths("elrond")), output_folder(), shipped]


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images (N, H, W, 3) in [0, 1] of latents, as the stock VAEDecode node makes them."""
    images = vae.decode(latents)
    # Video models give (N, frames, H, W, 3).
    return images.flatten(0, 1) if images.ndim == 5 else images


def image_features(encoder: Any, images: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """Float32 (N, F) features of images (N, H, W, 3) by a CLIP_VISION: CLIP, SigLIP or DINOv2."""
    update = progress(len(images))
    found = []
    for first in range(0, len(images), batch_size):
        found.append(encoder.encode_image(images[first : first + batch_size])["image_embeds"].float().cpu())
        update(min(first + batch_size, len(images)))
    return torch.cat(found)


def routes() -> Any:
    """The running server's route table, or None where nodes are used without a server."""
    instance = getattr(sys.modules.get("server"), "PromptServer", None)
    return getattr(getattr(instance, "instance", None), "routes", None)
