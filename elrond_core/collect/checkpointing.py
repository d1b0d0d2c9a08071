"""Memory of the backward pass: counted, and spared by activation checkpointing (Chen et al., arXiv 1604.06174).

With checkpointing a block keeps its inputs only; the rest of what its backward pass needs is computed again when it is
due. `torch.utils.checkpoint` does not serve here: it does not notice when a tensor that its second run saved is
overwritten in place, as Flux and its kin do, and its second run sees the options that the model has changed since.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import get_device_states, set_device_states

from .saved import Saved, SavedTensors


def blocks_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated blocks of a denoiser: what its lists of layers hold.

    Of a UNet the residual blocks and, within its spatial transformers, the transformer blocks; of a transformer the
    blocks of every stream.
    """
    listed = isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential))
    blocks: dict[torch.nn.Module, None] = {}
    for part in module.children():
        whole = listed and not isinstance(part, (torch.nn.ModuleList, torch.nn.Sequential))
        if not whole or any(_repeats(child) for child in part.children()):
            blocks.update(dict.fromkeys(blocks_of(part)))
        elif next(part.children(), None) is not None:
            blocks[part] = None
    return list(blocks)


def _repeats(module: torch.nn.Module) -> bool:
    """Whether this is a list of blocks of one class."""
    if not isinstance(module, torch.nn.ModuleList) or len({type(part) for part in module}) != 1:
        return False
    return next(module[0].children(), None) is not None


def _unused(packed: Any) -> torch.Tensor:
    raise RuntimeError("There is no backward pass through this run.")


@contextlib.contextmanager
def _wrapped(blocks: Iterable[torch.nn.Module], around: Callable[..., Any]) -> Iterator[None]:
    """For the time being, a block's `forward(...)` is `around(forward, ...)`."""
    with contextlib.ExitStack() as undo:
        for block in blocks:
            if "forward" in vars(block):
                undo.callback(setattr, block, "forward", block.forward)
            else:
                undo.callback(delattr, block, "forward")
            block.forward = functools.partial(around, block.forward)
        yield


class _Run:
    """One run of a block of which only the inputs are kept."""

    def __init__(
        self, owner: Checkpointing, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._owner = owner
        self._forward = forward
        # Containers are copied on the way, because models write into the options that they hand to their blocks.
        self._inputs = tree_map_only(torch.Tensor, owner.saved.pack, (args, kwargs))
        on_device = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.is_cuda]
        self._random = torch.get_rng_state(), *get_device_states(*on_device)
        # Hooks may give the block other weights for a later run.
        block = getattr(forward, "__self__", None)
        modules = block.modules() if isinstance(block, torch.nn.Module) else ()
        self._weights = [(part, dict(part._parameters)) for part in modules if part._parameters]
        self._count = 0
        self.again: dict[int, Saved] = {}

    def pack(self, tensor: torch.Tensor) -> int:
        self._count += 1
        return self._count - 1

    def unpack(self, place: int) -> torch.Tensor:
        if place not in self.again:
            self._owner.only(self)
            self._repeat()
        return self._owner.saved.unpack(self.again.pop(place))

    def _repeat(self) -> None:
        again: list[Saved] = []
        saved = self._owner.saved

        def keep(tensor: torch.Tensor) -> None:
            again.append(saved.pack(tensor))

        def as_it_was(saved_input: Saved) -> torch.Tensor:
            # The block may write into a copy; and what requires a gradient cannot be written to unless it is one.
            tensor = saved_input.get().detach().requires_grad_(saved_input.requires_grad)
            return tensor.clone() if saved.active else tensor

        cpu, devices, states = self._random
        with (
            _weights_as_they_were(self._weights),
            torch.enable_grad(),
            torch.random.fork_rng(devices),
            torch.autograd.graph.saved_tensors_hooks(keep, _unused),
            saved.recording(),
        ):
            torch.set_rng_state(cpu)
            if states:
                set_device_states(devices, states)
            args, kwargs = tree_map_only(Saved, as_it_was, self._inputs)
            self._forward(*args, **kwargs)
        if len(again) != self._count:
            raise RuntimeError(f"A block saved {self._count} tensors, and {len(again)} when it ran again.")
        self.again = dict(enumerate(again))


@contextlib.contextmanager
def _weights_as_they_were(weights: list[tuple[torch.nn.Module, dict[str, Any]]]) -> Iterator[None]:
    now = [(part, dict(part._parameters)) for part, _ in weights]
    for part, before in weights:
        part._parameters.update(before)
    try:
        yield
    finally:
        for part, given in now:
            part._parameters.update(given)


class Checkpointing:
    """Activation checkpointing of blocks; nothing stays patched outside `active`.

    Gradients are bit by bit those without it, where the same kernels run twice alike. Several backward passes through
    one forward pass are possible; each runs the blocks again.

    Attributes:
        blocks: the modules whose activations are not kept.
        saved: keeps what is kept.
    """

    def __init__(self, blocks: list[torch.nn.Module], saved: SavedTensors) -> None:
        self.blocks = blocks
        self.saved = saved
        self._last: weakref.ref[_Run] | None = None

    def active(self) -> contextlib.AbstractContextManager[None]:
        """To be entered for the forward pass; the backward pass needs nothing."""
        return _wrapped(self.blocks, self._forward)

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        run = _Run(self, forward, args, kwargs)
        before, self.saved.passing = self.saved.passing, True
        try:
            with torch.autograd.graph.saved_tensors_hooks(run.pack, run.unpack):
                return forward(*args, **kwargs)
        finally:
            self.saved.passing = before

    def only(self, run: _Run) -> None:
        """Forget what an earlier run has left unused: the backward pass is done with that block."""
        last = self._last() if self._last else None
        if last is not None:
            last.again.clear()
        self._last = weakref.ref(run)


@dataclass(frozen=True)
class Footprint:
    """Bytes that a backward pass needs kept, weights apart.

    Attributes:
        plain: of everything that is saved.
        spared: without what cheap operations compute again.
        checkpointed: with checkpointing as well: what is saved outside the blocks, the inputs of all, and the inside of
            the largest.
        overwritten: whether the model writes into what is saved.
    """

    plain: int
    spared: int
    checkpointed: int
    overwritten: bool


def footprint(
    blocks: list[torch.nn.Module], forward: Callable[[], Any], saved: SavedTensors, device: torch.device
) -> Footprint:
    """Count what a forward pass saves on a device, in one forward pass that saves nothing.

    Args:
        blocks: those that checkpointing would run again.
        forward: the forward pass; its output is dropped.
        saved: keeps tensors in the passes that follow; it knows the weights.
        device: where memory is short.
    """
    weight_storages = {StorageWeakRef(weight.untyped_storage()) for weight in saved.weights}
    everything: dict[Any, int] = {}
    spared: dict[Any, int] = {}
    checkpointed: dict[Any, int] = {}
    inside: dict[Any, int] | None = None
    largest = 0

    def count(tensor: torch.Tensor, cheap: bool, content: Any) -> None:
        storage = tensor.untyped_storage()
        if tensor.device == device and StorageWeakRef(storage) not in weight_storages:
            for tally in [everything] if cheap else [everything, spared, checkpointed if inside is None else inside]:
                tally[content] = storage.nbytes()

    def around(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal inside, largest
        outside, inside = inside, {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        contents = [(leaf, saved.content(leaf)) for leaf in given]
        out = block(*args, **kwargs)
        if inside:
            for leaf, content in contents:
                storage = leaf.untyped_storage()
                if leaf.device == device and StorageWeakRef(storage) not in weight_storages:
                    # The inputs are there twice when the block runs again, since it may write into them.
                    checkpointed[content] = inside[content] = storage.nbytes()
            largest = max(largest, sum(inside.values()))
        inside = outside
        return out

    with torch.enable_grad(), saved.counted(count), _wrapped(blocks, around):
        forward()
    return Footprint(
        sum(everything.values()), sum(spared.values()), sum(checkpointed.values()) + largest, saved.overwritten
    )
