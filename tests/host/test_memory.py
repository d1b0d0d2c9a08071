"""Memory of collecting: checkpointing on every model family, by need, and what is kept at all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import pytest
import torch
from comfyui_elrond.elrond_core.collect import saved
from comfyui_elrond.elrond_core.collect.checkpointing import blocks_of
from comfyui_elrond.elrond_core.collect.collection import CollectionPlan, collect
from comfyui_elrond.elrond_core.collect.differentiate import gradient
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.provenance import Provenance
from comfyui_elrond.nodes import host

from bench.activations import activations

# isort: split
sys.path.append(str(Path(__file__).parent))

from families import CONCEPT, FAMILIES, WIDTH, Family, build, latents, prompt, random

NAMED = {family.name: family for family in FAMILIES}
SD, FLUX, LUMINA = NAMED["SD 1.x"], NAMED["Flux dev"], NAMED["Lumina 2"]


def with_denoiser(family: Family, model: Any, work: Callable[..., Any]) -> Any:
    return host.with_denoiser(model, prompt(family), None, 1.0, latents(family), 0, work)


def rows_of(denoiser: host.HostDenoiser, count: int = 1) -> torch.Tensor:
    return denoiser.rows.to(denoiser.device).expand(count, -1, -1).clone().requires_grad_(True)


def patched(model: Any) -> list[str]:
    """Modules with a forward pass that is not their class's."""
    return [name for name, part in model.model.diffusion_model.named_modules() if "forward" in vars(part)]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_computing_again_changes_no_bit(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "SMALL", 64)
    with torch.inference_mode():
        model = build(family)

    def found(checkpointed: bool, sparing: bool) -> tuple[torch.Tensor, ...]:
        def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> Any:
            denoiser.checkpointed, denoiser.saved.sparing = checkpointed, sparing
            a, b = realizations[:1], torch.stack([realizations[1:], -realizations[1:]])
            sigma = host.sigma_of(model, 1.0)
            out = gradient(denoiser, a, b, random(*a.shape, seed=5), sigma, random(*a.shape, seed=6))
            assert (denoiser.checkpointed, denoiser.saved.sparing) == (checkpointed, sparing)
            needs = denoiser.footprint
            assert 0 < needs.checkpointed < needs.plain and 0 < needs.spared < needs.plain
            return out

        return with_denoiser(family, model, work)

    kept = found(False, False)
    assert kept[0].norm() > 1e-4
    for ways in ((False, True), (True, False), (True, True)):
        for one, other in zip(kept, found(*ways), strict=True):
            assert torch.equal(one, other)
    assert not patched(model)


@pytest.mark.parametrize("family", [SD, FLUX, LUMINA], ids=lambda family: family.name)
@pytest.mark.parametrize("place", [0, -1])
def test_nothing_stays_patched_when_a_block_fails_or_the_user_cancels(family: Family, place: int) -> None:
    model = build(family)
    blocks = blocks_of(model.model.diffusion_model)

    def interrupt(*_: Any) -> None:
        comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> None:
        denoiser.checkpointed = True
        a, b = realizations[:1], realizations[1:]
        gradient(denoiser, a, b, a, 1.0)
        hook = blocks[place].register_forward_hook(interrupt)
        try:
            gradient(denoiser, a, b, a, 1.0)
        finally:
            hook.remove()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        with_denoiser(family, model, work)
    assert not patched(model)


def test_room_is_made_by_need() -> None:
    model = build(SD)

    def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> list[bool]:
        noisy, rows = realizations[:1].to(denoiser.device), rows_of(denoiser)
        denoiser.make_room(noisy, 1.0, rows)
        found = [denoiser.checkpointed]
        # The same sample again and again takes no memory, but a backward pass through so many would.
        many = 2 * comfy.model_management.get_free_memory(noisy.device) // denoiser.footprint.plain
        denoiser.make_room(noisy.expand(many, -1, -1, -1), 1.0, rows)
        return [*found, denoiser.checkpointed]

    assert with_denoiser(SD, model, work) == [False, True]


def test_the_host_is_told_how_much_room_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(SD)
    asked: list[tuple[int, int]] = []
    load = comfy.model_management.load_models_gpu

    def watch(
        models: Any, memory_required: int = 0, minimum_memory_required: int | None = None, **options: Any
    ) -> None:
        assert minimum_memory_required is not None and [each.model for each in models] == [model.model]
        asked.append((memory_required, minimum_memory_required))
        load(models, memory_required=memory_required, minimum_memory_required=minimum_memory_required, **options)

    def nothing(_: Any = None, torch_free_too: bool = False) -> Any:
        return (1, 1) if torch_free_too else 1

    def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> tuple[int, int, int]:
        rows, realizations = rows_of(denoiser, 2), realizations.to(denoiser.device)
        with monkeypatch.context() as patch:
            patch.setattr(comfy.model_management, "load_models_gpu", watch)
            patch.setattr(comfy.model_management, "get_free_memory", nothing)
            denoiser.make_room(realizations, 1.0, rows)
            # What there was room for needs no more.
            denoiser.make_room(realizations[:1], 1.0, rows[:1])
        assert denoiser.checkpointed
        passing = model.model.memory_required(list(realizations.shape))
        return passing, denoiser.footprint.plain, denoiser.footprint.checkpointed

    passing, plain, checkpointed = with_denoiser(SD, model, work)
    assert asked == [(passing + 2 * plain, passing + 2 * checkpointed)]


def test_the_host_makes_room_for_one_realization_at_first() -> None:
    model = build(SD).clone()
    shapes: list[tuple[int, ...]] = []

    def prepare(proceed: Callable[..., Any], patcher: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(shape))
        return proceed(patcher, shape, *args, **kwargs)

    model.add_wrapper(comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING, prepare)
    given = latents(SD, 5)

    def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> torch.Tensor:
        return realizations

    found = host.with_denoiser(model, prompt(SD), None, 1.0, given, 0, work)
    assert shapes == [(1, *SD.latent)]
    assert torch.equal(found, model.model.process_latent_in(given))


def test_what_is_estimated_is_what_is_kept() -> None:
    """Storages that the graph keeps alive after a forward pass, beside the weights, against the estimate."""
    model = build(SD)

    def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> tuple[int, int]:
        own = {p.untyped_storage().data_ptr() for p in model.model.diffusion_model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if tensor.device == denoiser.device and storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            # With its history, an output would hold what made it.
            return tensor.detach()

        rows, realizations = rows_of(denoiser), realizations.to(denoiser.device)
        with torch.enable_grad():
            denoiser.make_room(realizations[:1], 1.0, rows)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                estimate = denoiser.denoised(realizations[:1], 1.0, rows)
        # The graph must live until here, or an address could be counted twice.
        assert estimate.requires_grad
        return sum(kept.values()), denoiser.footprint.plain

    kept, estimated = with_denoiser(SD, model, work)
    assert kept == estimated


@pytest.mark.parametrize("family", [SD, NAMED["SDXL"]], ids=lambda family: family.name)
def test_gradients_flow_from_the_conditioning_only(family: Family) -> None:
    model = build(family)
    unet = model.model.diffusion_model
    for weight in unet.parameters():
        weight.requires_grad_(True)
    attention = next(part for name, part in unet.named_modules() if name.endswith("attn2"))
    saved: list[torch.Tensor] = []
    depends: list[bool] = []
    before: list[int] = []

    def watch(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
        depends.extend((args[0].requires_grad, out.requires_grad))

    def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> None:
        rows, realizations = rows_of(denoiser), realizations.to(denoiser.device)
        denoiser.make_room(realizations[:1], 1.0, rows)
        hooks = [
            attention.register_forward_pre_hook(lambda *_: before.append(len(saved))),
            attention.register_forward_hook(watch, with_kwargs=True),
        ]
        try:
            with (
                torch.enable_grad(),
                torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
            ):
                denoiser.denoised(realizations[:1], 1.0, rows).sum().backward()
        finally:
            for hook in hooks:
                hook.remove()
        assert rows.grad is not None

    with_denoiser(family, model, work)
    assert depends == [False, True]
    # The concept's rows and their place, which are saved where they are put in, and nothing of the model.
    concept = len(CONCEPT.rows)
    assert [tuple(tensor.shape) for tensor in saved[: before[0]]] == [(concept,), (1, concept, WIDTH)]
    assert len(saved) > 100
    assert all(weight.grad is None and weight.requires_grad for weight in unet.parameters())


def test_training_takes_a_card_with_room_only(monkeypatch: pytest.MonkeyPatch) -> None:
    card, asked = torch.device("cuda"), []
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: card)
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda size, device: asked.append((size, device)))
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 100)
    assert host.training_device(100) == card and host.training_device(101) == torch.device("cpu")
    # Others were asked to make room before it was looked for.
    assert asked == [(100, card), (101, card)]


def test_out_of_memory_on_the_way() -> None:
    """A block that really runs out: collecting goes on with one sample at a time, and ends with one sentence."""
    model = build(SD)
    block = blocks_of(model.model.diffusion_model)[-1]
    sizes: list[int] = []

    def collected(limit: int) -> torch.Tensor:
        def full(_: Any, args: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled():
                sizes.append(len(args[0]))
                if len(args[0]) > limit:
                    raise torch.cuda.OutOfMemoryError("Tried to allocate 2.00 GiB.")

        def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> torch.Tensor:
            hook = block.register_forward_pre_hook(full)
            try:
                return collect(denoiser, realizations, Provenance("test"), CollectionPlan(6, (1.0,), 0, 4)).vectors
            finally:
                hook.remove()

        return with_denoiser(SD, model, work)

    plenty, little = collected(4), collected(1)
    torch.testing.assert_close(little, plenty, rtol=1e-4, atol=1e-5 * float(plenty.abs().max()))
    # The first of each is the count of what a sample needs.
    assert sizes == [1, 4, 2, 1, 4, 2, 1, 1, 1, 1, 1, 1]
    sizes.clear()
    with pytest.raises(ElrondError, match=r"^There is too little memory for a single gradient .*\.$"):
        collected(0)
    # The count runs out for four, two and one; then with what is cheap computed again, and with everything.
    assert sizes == [1, 1, 1, 1, 1]
    assert not patched(model)


@pytest.mark.parametrize(
    ("name", "changes", "stored", "ratio"),
    [
        ("Flux schnell", {"depth": 1, "depth_single_blocks": 2}, torch.bfloat16, 0.88),
        ("Flux schnell", {"depth": 1, "depth_single_blocks": 2}, torch.float8_e4m3fn, 0.48),
        ("Z-Image", {"n_layers": 3}, torch.bfloat16, 0.7),
        ("Z-Image", {"n_layers": 3}, torch.float8_e4m3fn, 0.45),
    ],
)
def test_what_is_cheap_saves_memory_at_full_width(
    name: str, changes: dict[str, int], stored: torch.dtype, ratio: float
) -> None:
    needs, _ = activations(name, stored, 1024, **changes)
    assert needs.spared < ratio * needs.plain
    # The model adds to its hidden states in place.
    assert needs.overwritten is (name == "Flux schnell")
    # However weights are stored, large ones are not kept in another form.
    assert needs.spared < 1.001 * activations(name, torch.bfloat16, 1024, **changes)[0].spared
