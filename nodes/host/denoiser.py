"""The host's model as a differentiable function: `elrond_core.collect.differentiate.Denoiser` over its guider.

A `Sampler` subclass is handed a callable that returns the clean estimate for any parameterisation, with model patches,
LoRAs, guidance and memory management already in place.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import comfy.model_management
import comfy.samplers
import torch
from torch.utils._pytree import tree_map_only

from ...elrond_core.collect.checkpointing import Checkpointing, Footprint, blocks_of, footprint
from ...elrond_core.collect.saved import SavedTensors
from ...elrond_core.errors import ElrondError
from .conditioning import MARK, Conditioning, check_one_image, marked
from .gradient_patches import (
    NormalTensors,
    differentiable,
    differentiable_attention,
    exact,
    frozen,
    has_own_class,
    normal_clone,
    normal_conditioning,
    normal_copies,
    refuse_opaque,
)
from .guiding import without_guides
from .kernels import plain_kernels
from .patch_state import PatchState, seeded, without_caches
from .sampling import own_latents, sigma_of
from .schedule import Keyframes, acting

Result = TypeVar("Result")

# What torch says of operations that cannot take part in a backward pass.
_NO_DERIVATIVE = (
    "derivative for|autograd formula|implement either the backward|[Ii]nference tensor|"
    "functions don't support automatic differentiation"
)


class HostDenoiser:
    """`elrond_core.collect.differentiate.Denoiser` over the host's guider: any model, patches and guidance included."""

    def __init__(
        self, guider: Any, model_options: dict[str, Any], seed: int, latents: torch.Tensor, words: bool = False
    ) -> None:
        self._guider = guider
        self._options = model_options
        self._seed = seed
        # What the host's sampler tells the model about the latents beside the noisy ones.
        self._about = {"latent_image": latents, "denoise_mask": None, "seed": seed, "latent_shapes": [latents.shape]}
        self._marked = [entry for entry in guider.conds["positive"] if MARK in entry]
        self._words = words
        self._choose(self._marked[0])
        self._keyframes = Keyframes(guider.model_patcher, guider.conds)
        self._patches = PatchState(model_options)
        # The first clean estimate of the latest call.
        self.latest: torch.Tensor | None = None
        self.saved = SavedTensors()
        self.checkpointing = Checkpointing(blocks_of(guider.inner_model.diffusion_model), self.saved)
        # Whether activations are computed again instead of kept.
        self.checkpointed = False
        # The largest batch that there is room for.
        self._planned = 0
        self.footprint: Footprint | None = None
        # What is compared instead of estimates, and the modules that make it.
        self._features: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._beside: tuple[torch.nn.Module, ...] = ()

        self.patchers = [guider.model_patcher, *guider.loaded_models]
        # Control models take part in the estimate as well.
        self.module = torch.nn.ModuleList(patcher.model for patcher in self.patchers)
        self.device = guider.model_patcher.load_device
        self.process_out: Callable[[torch.Tensor], torch.Tensor] = guider.inner_model.process_latent_out

    def _choose(self, entry: dict[str, Any]) -> None:
        """Let an entry be the one that is differentiated."""
        self._entry = entry
        self._encoded: torch.Tensor = entry["cross_attn"]
        concept_rows = entry[MARK].concepts[0].rows
        other_rows = tuple(row for row in entry[MARK].words if row not in concept_rows) if self._words else ()
        # Where in the conditioning the rows are.
        self.order = concept_rows + other_rows
        self._index = torch.tensor(self.order)
        # How many of the last rows are not the concept's.
        self.other_rows = len(other_rows)
        self.rows: torch.Tensor = self._encoded[0, self._index].float().cpu().clone()

    def rows_at(self, sigma: float) -> torch.Tensor:
        """The rows of the marked entry that acts at a noise level, which is differentiated from now on."""
        entry = acting(self._guider.inner_model.model_sampling, self._marked, sigma)
        if entry is not self._entry:
            self._choose(entry)
        return self.rows

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """Equation 1, by the model's own noise schedule."""
        device = self._guider.model_patcher.load_device
        level = torch.full((len(latents),), sigma, device=device)
        sampling = self._guider.inner_model.model_sampling
        # The host adds the latents in place.
        return sampling.noise_scaling(level, noise.to(device, copy=True), latents.to(device), False)

    def reduce_memory(self) -> bool:
        """Compute again instead of keeping: first what is cheap, then all activations; False if they are already."""
        if self.checkpointed:
            return False
        self.checkpointed = self.saved.sparing
        self.saved.sparing = True
        return True

    @contextlib.contextmanager
    def through(self, features: Callable[[torch.Tensor], torch.Tensor], *modules: torch.nn.Module) -> Iterator[None]:
        """For the time being, `denoised` returns features of the estimate, which these modules make."""
        self._features, self._beside = features, modules
        self._planned, self.footprint = 0, None
        try:
            yield
        finally:
            self._features, self._beside = None, ()
            self._planned, self.footprint = 0, None

    def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        """Equation 2: what the sampler calls `denoised`, with the concept's rows replaced."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not (torch.is_grad_enabled() and rows.requires_grad):
            return self._compared(noisy, sigma, rows)
        self.make_room(noisy, sigma, rows)
        with self.checkpointing.active() if self.checkpointed else contextlib.nullcontext(), self.saved.recording():
            estimate = self._denoised(noisy, sigma, rows)
            self.latest = estimate[:1].detach()
            if not estimate.requires_grad:
                raise ElrondError(
                    f"{model_name(self._guider.inner_model)} cannot be differentiated at this noise level: its "
                    "estimate does not depend on the concept's rows."
                )
            # Several backward passes through one forward pass take as long as several denoiser calls.
            estimate.register_hook(lambda _: comfy.model_management.throw_exception_if_processing_interrupted())
            return self._features(estimate) if self._features else estimate

    def make_room(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> None:
        """Decide whether to keep activations, by what one sample's take, and have the host free memory for them."""
        if len(noisy) <= self._planned:
            return
        model, manager = self._guider.inner_model, comfy.model_management
        if self.footprint is None:
            self.saved.weights = self._weights()
            self.footprint = footprint(
                self.checkpointing.blocks,
                lambda: self._compared(noisy[:1], sigma, rows[:1]),
                self.saved,
                noisy.device,
            )
        self._planned = len(noisy)
        # What the forward pass itself needs, by the host's own estimate.
        passing = model.memory_required(list(noisy.shape))
        needs = self.footprint
        kept, spared, least = (passing + len(noisy) * n for n in (needs.plain, needs.spared, needs.checkpointed))
        if manager.get_free_memory(noisy.device) < kept:
            # Other models give way rather than time is spent; this model's own weights only where it must be.
            manager.load_models_gpu(self.patchers, memory_required=kept, minimum_memory_required=least)
            normal_copies(self.module)
            self.saved.weights = self._weights()
        free = manager.get_free_memory(noisy.device)
        self.saved.sparing = self.saved.sparing or free < kept
        self.checkpointed = self.checkpointed or free < spared

    def _weights(self) -> list[torch.Tensor]:
        modules = (self.module, *self._beside)
        return [weight for module in modules for weight in (*module.parameters(), *module.buffers())]

    def _compared(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        estimate = self._denoised(noisy, sigma, rows)
        return self._features(estimate) if self._features else estimate

    def _denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        self.rows_at(sigma)
        self._keyframes.hold(sigma)
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
            with seeded(self._seed, noisy.device), self._patches.fresh():
                estimate = self._guider(noisy, level, model_options=self._options, seed=self._seed)
            return estimate.as_subclass(torch.Tensor) if has_own_class(estimate) else estimate
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


class _DenoiserSampler(comfy.samplers.Sampler):
    """A sampler that takes no step: it hands the prepared model to `work`."""

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
                normal_conditioning(entry)
        options = extra_args["model_options"]
        options.setdefault("transformer_options", {})["optimized_attention_override"] = differentiable_attention
        # The threads that serve further devices record no graph.
        options.pop("multigpu_clones", None)
        denoiser = HostDenoiser(model_wrap, options, extra_args.get("seed", 0), latent_image, self.words)
        normal_copies(denoiser.module)
        with frozen(denoiser.module), exact(denoiser.module), _forgetful(denoiser.module):
            try:
                self.result = self._run(denoiser, model_wrap.inner_model.process_latent_in(self.latents))
            except (RuntimeError, NotImplementedError) as error:
                if not re.search(_NO_DERIVATIVE, str(error)):
                    raise
                reason = str(error).splitlines()[0].rstrip(".")
                name = model_name(model_wrap.inner_model)
                raise ElrondError(f"{name}, with its patches, cannot be differentiated: {reason}.") from error
        return latent_image

    def _run(self, denoiser: HostDenoiser, latents: torch.Tensor) -> Any:
        # An operation that saves its input, into which the model then writes, would be held by its own output, and
        # nothing would ever free the two. What the hooks keep has no history.
        saved = denoiser.saved
        with contextlib.ExitStack() as active:
            active.enter_context(torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack))
            try:
                return self.work(denoiser, latents)
            except RuntimeError as error:
                if "Inference tensors cannot be saved" not in str(error):
                    raise
            # Patches may hold what nodes made in inference mode. Only models with such patches pay for the remedy.
            active.enter_context(NormalTensors())
            return self.work(denoiser, latents)


@contextlib.contextmanager
def _forgetful(module: torch.nn.Module) -> Iterator[None]:
    """Tensors that a model has put into its attributes lose their history afterwards."""

    def forgotten(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach() if tensor.grad_fn is not None else tensor

    try:
        yield
    finally:
        for part in module.modules():
            for name, value in list(vars(part).items()):
                if isinstance(value, (torch.Tensor, list, tuple, dict)) and not name.startswith("_"):
                    setattr(part, name, tree_map_only(torch.Tensor, forgotten, value))


def model_name(model: Any) -> str:
    """The model family as the host's model class names it."""
    return type(model.model_config).__name__


def with_denoiser(
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
    check_one_image(positive)
    refuse_opaque(model.model)
    with differentiable(), plain_kernels(), without_caches(model), without_guides(model):
        latents = own_latents(model, latents)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(normal_clone(positive), normal_clone(negative if negative is not None else positive))
        guider.set_cfg(cfg if negative is not None else 1.0)
        sampler = _DenoiserSampler(work, latents, words)
        sigmas = torch.tensor([sigma_of(model, 1.0), 0.0])
        # The host is shown one of them only: it would make room for as many at once.
        shown = latents[:1]
        guider.sample(torch.zeros_like(shown), shown, sampler, sigmas, disable_pbar=True, seed=seed)
        return sampler.result
