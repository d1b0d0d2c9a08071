"""What a visit to a model leaves behind on every family, however it ends: no tensor with a history, and no weight."""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from comfy.ldm.chroma_radiance.layers import NerfEmbedder
from comfyui_elrond.elrond_core.collect.checkpointing import blocks_of
from comfyui_elrond.elrond_core.collect.collection import CollectionPlan, collect
from comfyui_elrond.elrond_core.collect.differentiate import gradient
from comfyui_elrond.elrond_core.provenance import Provenance
from comfyui_elrond.nodes import host
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

# isort: split
sys.path.append(str(Path(__file__).parent))

from families import FAMILIES, Family, build, latents, prompt, random

Work = Callable[[host.HostDenoiser, torch.Tensor], Any]


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """What is there before is left out of every census, which makes it quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tensors() -> list[torch.Tensor]:
    """All that Python knows of, once garbage is collected."""
    gc.collect()
    return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]


def with_history() -> dict[int, tuple[int, ...]]:
    """Shapes of all tensors with a history."""
    return {id(tensor): tuple(tensor.shape) for tensor in tensors() if tensor.grad_fn is not None}


def held() -> dict[int, int]:
    """Bytes of all storages."""
    # Some tensors of other tests are of kinds that have no storage.
    plain = [tensor for tensor in tensors() if type(tensor) in (torch.Tensor, torch.nn.Parameter)]
    plain = [tensor for tensor in plain if tensor.layout is torch.strided]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in plain}


class Decoder(torch.nn.Module):
    """Latents of any family to images."""

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        flat = raw.flatten(2, -3).mean(2) if raw.ndim == 5 else raw
        return torch.sigmoid(flat[:, :3].repeat_interleave(4, -1).repeat_interleave(4, -2))

    decode = forward


@pytest.fixture(scope="module")
def decoder() -> Any:
    module, cpu = Decoder(), torch.device("cpu")
    return SimpleNamespace(
        first_stage_model=module,
        patcher=comfy.model_patcher.ModelPatcher(module, load_device=cpu, offload_device=cpu),
        memory_used_decode=lambda shape, dtype: 0,
        process_output=lambda image: image,
        device=cpu,
        vae_dtype=torch.float32,
        latent_dim=3,
    )


class Probe:
    """Tells by its life how long a node of the graph lives."""


@contextlib.contextmanager
def hooked(blocks: list[torch.nn.Module], hook: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """For the time being, what blocks return is shown to `hook` where it has a history."""

    def shown(_: Any, inputs: Any, out: Any) -> None:
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                hook(leaf)

    with contextlib.ExitStack() as undo:
        for block in blocks:
            undo.callback(block.register_forward_hook(shown).remove)
        yield


def ways(model: Any, decoder: Any, encoder: Any) -> dict[str, tuple[type[BaseException] | None, Work]]:
    """What may happen in a visit, and the exception that it ends with."""
    blocks, sigma = blocks_of(model.model.diffusion_model), host.sigma_of(model, 1.0)

    def plain(denoiser: Any, realizations: torch.Tensor) -> Any:
        a, b = realizations[:1], torch.stack([realizations[1:], -realizations[1:]])
        return gradient(denoiser, a, b, random(*a.shape, seed=5), sigma, random(*a.shape, seed=6))

    def checkpointed(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> Any:
        denoiser.checkpointed = True
        return plain(denoiser, realizations)

    def features(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> Any:
        with host.through_features(denoiser, decoder, encoder, realizations, 1) as (seen, compared):
            noise = random(*realizations[:1].shape, seed=5)
            return gradient(seen, realizations[:1], compared[1:], noise, sigma)

    def failing(run: Work, trial: bool = False) -> Work:
        """The second block fails, in the forward pass by which memory is counted or in one that is for a gradient."""

        def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> Any:
            seen = 0

            def fail(_: torch.Tensor) -> None:
                nonlocal seen
                seen += trial or denoiser.footprint is not None
                if seen == 2:
                    raise ValueError("stop here")

            with hooked(blocks, fail):
                return run(denoiser, realizations)

        return work

    def cancelled(run: Work) -> Work:
        """In the backward pass, at the second block that it comes to."""

        def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> Any:
            seen = 0

            def count(_: torch.Tensor) -> None:
                nonlocal seen
                seen += 1
                if seen == 2:
                    comfy.model_management.interrupt_current_processing()
                    comfy.model_management.throw_exception_if_processing_interrupted()

            with hooked(blocks, lambda out: out.register_hook(count) and None):
                return run(denoiser, realizations)

        return work

    def halved(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> Any:
        probes: list[weakref.ref[Probe]] = []

        def full(out: torch.Tensor) -> None:
            if denoiser.footprint is None:
                return
            if len(probes) == 2:
                # The half has the room of what failed.
                assert all(probe() is None for probe in probes)
                return
            probe = Probe()
            out.grad_fn.metadata["probe"] = probe
            probes.append(weakref.ref(probe))
            if len(probes) == 2:
                raise torch.cuda.OutOfMemoryError("Tried to allocate 2.00 GiB.")

        with hooked(blocks, full):
            collect(denoiser, realizations, Provenance("test"), CollectionPlan(2, (sigma,), 0, 2))
        assert len(probes) == 2

    cancel = comfy.model_management.InterruptProcessingException
    return {
        "plain": (None, plain),
        "checkpointed": (None, checkpointed),
        "with features": (None, features),
        "an exception in the trial": (ValueError, failing(plain, trial=True)),
        "an exception": (ValueError, failing(plain)),
        "an exception with features": (ValueError, failing(features)),
        "cancelled": (cancel, cancelled(plain)),
        "cancelled, checkpointed": (cancel, cancelled(checkpointed)),
        "out of memory": (None, halved),
    }


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_history_outlives_a_visit(family: Family, decoder: Any, encoder: Any) -> None:
    model, before = build(family), with_history()
    left = {}
    for name, (error, work) in ways(model, decoder, encoder).items():
        with contextlib.nullcontext() if error is None else pytest.raises(error):
            host.with_denoiser(model, prompt(family), None, 1.0, latents(family), 0, work)
        after = with_history()
        left[name] = [shape for key, shape in after.items() if key not in before]
        before = after
    assert left == {name: [] for name in left}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_later_collections_hold_what_the_first_does_and_a_model_can_go(family: Family) -> None:
    model, sizes = build(family), []
    sigma = host.sigma_of(model, 1.0)
    weights = [StorageWeakRef(weight.untyped_storage()) for weight in model.model.parameters()]

    def collected(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> None:
        collect(denoiser, realizations, Provenance("test"), CollectionPlan(2, (sigma,), 0, 1))

    before = held()
    for _ in range(3):
        host.with_denoiser(model, prompt(family), None, 1.0, latents(family), 0, collected)
        sizes.append(sum(held().values()))
    assert sizes[1:] == sizes[:1] * 2
    del model
    comfy.model_management.unload_all_models()
    # The host keeps this family's positions, and with them a layer.
    NerfEmbedder.fetch_pos.cache_clear()
    after = held()
    assert [size for storage, size in after.items() if storage not in before] == []
    assert all(weight.expired() for weight in weights)


def test_the_census_sees_what_would_stay() -> None:
    """An operation saves its input and the model writes into it: torch never frees the two."""
    before, steps = with_history(), torch.ones(3, 4, requires_grad=True)
    x = steps * 1
    y = torch.nn.functional.layer_norm(x, (4,))
    x += y
    del x, y
    assert [shape for key, shape in with_history().items() if key not in before] == [(3, 4)]
