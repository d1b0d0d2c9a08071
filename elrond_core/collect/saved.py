"""What autograd saves for the backward pass: as it was when it was saved, and as little of it as possible.

A model may overwrite a saved tensor in place; then its earlier content is copied first. What cheap operations make of
other saved tensors, of weights or of small tensors is not saved but computed again when it is due: casts of weights
and of activations, activation functions, norms, rotary embeddings, residual sums. The same kernels run on the same
numbers, so that gradients are the same to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

# Operations from one saved tensor to another, at most. More would take longer than they save memory: each reads and
# writes the whole tensor.
LONGEST = 12
# Bytes of a storage that is copied to compute others from it: modulations of a block, against its activations.
SMALL = 2**18
# How many storages are remembered before those that are gone are forgotten.
_SWEEP = 512
# Beside the pointwise ones: limited by memory rather than by arithmetic, and the same to the bit when they run again.
_CHEAP = {
    "_to_copy",
    "clone",
    "copy_",
    "cat",
    "stack",
    "repeat",
    "constant_pad_nd",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "zeros_like",
    "mean",
    "native_layer_norm",
    "native_group_norm",
    "_fused_rms_norm",
}


class _Content:
    """What a storage holds until it is next written to.

    Attributes:
        size: bytes.
        kept: a tensor on the storage, or on a copy, once the content has to last.
        version: of that tensor.
        recipe: how to compute it again, or None.
        needs: the contents that the recipe computes on the way, with this one.
        copy: the same content apart from the storage, if it is small.
    """

    __slots__ = ("copy", "counted", "kept", "needs", "recipe", "saved", "size", "version")

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: torch.Tensor | None = None
        self.version = 0
        self.counted = False
        self.saved = False
        self.recipe: _Recipe | None = None
        self.needs: frozenset[_Content] = frozenset()
        self.copy: _Content | None = None

    @property
    def lasts(self) -> bool:
        return self.kept is not None or self.counted

    def keep(self, tensor: torch.Tensor) -> None:
        self.kept, self.version = tensor, _version(tensor)

    def can_be_had(self) -> bool:
        return self.lasts or (self.recipe is not None and all(part.content.can_be_had() for part in self.recipe.parts))

    def storage(self, computed: dict[_Content, torch.UntypedStorage]) -> torch.UntypedStorage:
        """The storage, computed again where it is not kept, or has not been yet."""
        if self.kept is None:
            if self not in computed:
                assert self.recipe is not None
                computed[self] = self.recipe.run(computed)
            return computed[self]
        if _version(self.kept) != self.version:
            # As torch says where it notices this itself.
            raise RuntimeError("A tensor saved for the backward pass has been modified by an inplace operation.")
        return self.kept.untyped_storage()


# Thousands of these are made in a forward pass, and frozen ones take several times as long to make.
@dataclass(eq=False, slots=True)
class _Part:
    """A tensor as a view of a content."""

    content: _Content
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def on(self, storage: torch.UntypedStorage) -> torch.Tensor:
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.size, self.stride)


@dataclass(eq=False, slots=True)
class _Recipe:
    """An operation, of which a content is an output or what it writes to.

    Attributes:
        arguments: positional and named, with parts in the place of tensors.
        parts: these.
        output: which of the outputs; or None, if the first part is written to.
        layout: size, stride and offset of that tensor.
    """

    function: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    parts: tuple[_Part, ...]
    output: int | None
    layout: tuple[Any, ...]

    def run(self, computed: dict[_Content, torch.UntypedStorage]) -> torch.UntypedStorage:
        def tensor(part: _Part) -> torch.Tensor:
            storage = part.content.storage(computed)
            if self.output is None and part is self.parts[0]:
                storage = storage.clone()
            return part.on(storage)

        args, kwargs = _replaced(_Part, tensor, *self.arguments)
        outputs = _tensors((self.function(*args, **kwargs),))
        found = outputs[self.output or 0]
        if (found.size(), found.stride(), found.storage_offset()) != self.layout:
            raise RuntimeError(f"{self.function} gave another layout when it ran again.")
        return found.untyped_storage()


class Saved:
    """What is kept instead of a tensor."""

    def __init__(self, requires_grad: bool, part: _Part | None, tensor: torch.Tensor | None = None) -> None:
        self.requires_grad = requires_grad
        self._part = part
        self._tensor = tensor
        self._version = 0 if tensor is None else _version(tensor)

    def get(self) -> torch.Tensor:
        """The tensor as it was, without its history."""
        if self._part is not None:
            with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
                return self._part.on(self._part.content.storage({}))
        assert self._tensor is not None
        if _version(self._tensor) != self._version:
            raise RuntimeError("A tensor saved for the backward pass has been modified by an inplace operation.")
        return self._tensor


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among arguments or results of an operation, which come one by one or in lists."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, torch.Tensor)]
    return found


def _replaced(
    kind: type, change: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An operation's arguments with all of a kind changed, in their order."""

    def one(value: Any) -> Any:
        if isinstance(value, kind):
            return change(value)
        if isinstance(value, (list, tuple)):
            return [change(item) if isinstance(item, kind) else item for item in value]
        return value

    return tuple([one(value) for value in args]), {name: one(value) for name, value in kwargs.items()}


class SavedTensors(TorchDispatchMode):
    """Keeps tensors for the backward pass: `pack` and `unpack` are hooks for saved tensors.

    Without `recording`, a tensor that was overwritten is a RuntimeError when it is used.
    `torch.autograd.graph.allow_mutation_on_saved_tensors` goes by address, and misses a saved part of a larger tensor
    when the whole is overwritten; here what counts is the memory they share.

    Attributes:
        overwritten: whether the model writes into what is saved, so that copies have to be made.
        sparing: whether what is cheap is computed again.
        passing: whether what is computed now will be computed again as a whole, so that its operations need no recipes.
    """

    # Other classes have storages of their own, or none.
    kinds: tuple[type, ...] = (torch.Tensor, torch.nn.Parameter)

    def __init__(self, weights: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.overwritten = False
        self.sparing = False
        self.passing = False
        # Instead of keeping anything.
        self.counting: Callable[[torch.Tensor, bool, Any], None] | None = None
        self._contents: dict[int, tuple[StorageWeakRef, _Content]] = {}
        self.weights = weights
        self._next_sweep = _SWEEP
        self._active = False

    @property
    def weights(self) -> Iterable[torch.Tensor]:
        """Tensors that are there anyway."""
        return self._weights

    @weights.setter
    def weights(self, weights: Iterable[torch.Tensor]) -> None:
        self._weights = list(weights)
        # By their storages: a model has thousands, and a run of checkpointed blocks asks for them again and again.
        self._own: dict[int, torch.Tensor] | None = None

    @property
    def active(self) -> bool:
        """Whether a forward pass must be recorded."""
        return self.overwritten or self.sparing

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """To be entered for a forward pass; the backward pass needs nothing."""
        if self._active or not (self.active or self.counting):
            yield
            return
        if self._own is None and (self.sparing or self.counting):
            self._own = {weight.untyped_storage()._cdata: weight for weight in self._weights if self._plain(weight)}
        self._active = True
        try:
            with self:
                yield
        finally:
            self._active = False
            self._contents.clear()
            self._next_sweep = _SWEEP

    @contextlib.contextmanager
    def counted(self, count: Callable[[torch.Tensor, bool, Any], None]) -> Iterator[None]:
        """To be entered for a forward pass that saves nothing.

        Args:
            count: told of every tensor that would be saved: the tensor, whether it would be spared, and an object that
                stands for the content of its memory.
        """
        self.counting = count
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack), self.recording():
                yield
        finally:
            self.counting = None

    def content(self, tensor: torch.Tensor) -> Any:
        """While recording, what stands for the content of a tensor's memory."""
        return self._content(tensor) if self._plain(tensor) else StorageWeakRef(tensor.untyped_storage())

    def _plain(self, tensor: torch.Tensor) -> bool:
        return (
            type(tensor) in self.kinds
            and tensor.layout is torch.strided
            and not tensor.is_conj()
            and not tensor.is_neg()
        )

    def pack(self, tensor: torch.Tensor) -> Saved:
        """What is kept instead of the tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            # Classes that loaders of quantised weights bring have a `detach` of their own.
            plain = torch.Tensor.detach(tensor)
        if not self._active or not self._plain(plain):
            if self.counting:
                self.counting(plain, False, StorageWeakRef(plain.untyped_storage()))
                return Saved(tensor.requires_grad, None)
            return Saved(tensor.requires_grad, None, plain)
        part = self._part(plain)
        content = part.content
        spared = not content.lasts and content.size > SMALL and content.can_be_had()
        if self.counting:
            self.counting(plain, spared, content)
            content.counted = not spared
            content.saved = True
        elif not content.lasts and not (spared and self.sparing):
            content.keep(plain)
        return Saved(tensor.requires_grad, part)

    def unpack(self, saved: Saved) -> torch.Tensor:
        """The tensor as it was, without its history."""
        return saved.get()

    def _content(self, tensor: torch.Tensor) -> _Content:
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._contents.get(key)
        if entry is None:
            content = _Content(storage.nbytes())
            weight = self._own.get(key) if self._own and (self.sparing or self.counting) else None
            # A weight that the host has moved since may have left its place to another tensor.
            if weight is not None and weight.untyped_storage()._cdata == key:
                content.keep(tensor.detach())
            self._remember(storage, content)
            return content
        return entry[1]

    def _remember(self, storage: torch.UntypedStorage, content: _Content) -> None:
        if len(self._contents) >= self._next_sweep:
            self._contents = {k: entry for k, entry in self._contents.items() if not entry[0].expired()}
            self._next_sweep = 2 * len(self._contents) + _SWEEP
        self._contents[storage._cdata] = StorageWeakRef(storage), content

    def _part(self, tensor: torch.Tensor) -> _Part:
        return _Part(self._content(tensor), tensor.size(), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    def _ingredient(self, tensor: torch.Tensor) -> _Part:
        """A part for a recipe; what is small is copied, so that it lasts."""
        part = self._part(tensor)
        content = part.content
        if content.lasts or content.size > SMALL:
            return part
        if content.copy is None:
            content.copy = _Content(content.size)
            if self.counting:
                content.copy.counted = True
            else:
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                content.copy.keep(whole.set_(tensor.untyped_storage().clone()))
        return _Part(content.copy, part.size, part.stride, part.offset, part.dtype)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        places, cheap = _about(func)
        recording = cheap and not self.passing and (self.sparing or self.counting is not None)
        if not places and not recording:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        written = [t for place, name in places for t in _tensors((_argument(args, kwargs, place, name),))]
        written = [tensor for tensor in written if self._plain(tensor)]
        recorded = self._recorded(args, kwargs) if recording and len(written) == len(places) <= 1 else None
        for tensor in written:
            content = self._content(tensor)
            if content.kept is not None and content.kept.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                copy = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                content.keep(copy.set_(content.kept.untyped_storage().clone()))
            self.overwritten = self.overwritten or content.lasts or content.saved
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        if written:
            for tensor in written:
                self._note(tensor, func, recorded, None)
        elif recorded:
            given = {tensor.untyped_storage()._cdata for tensor in _tensors((*args, *kwargs.values()))}
            for place, tensor in enumerate(_tensors((out,))):
                if self._plain(tensor) and tensor.untyped_storage()._cdata not in given:
                    self._note(tensor, func, recorded, place)
        return out

    def _recorded(self, args: Any, kwargs: Any) -> tuple[Any, tuple[_Part, ...]] | None:
        """Arguments with parts in the place of tensors, and these parts."""
        if not all(self._plain(tensor) for tensor in _tensors((*args, *kwargs.values()))):
            return None
        parts: list[_Part] = []

        def ingredient(tensor: torch.Tensor) -> _Part:
            parts.append(self._ingredient(tensor))
            return parts[-1]

        return _replaced(torch.Tensor, ingredient, args, kwargs), tuple(parts)

    def _note(
        self, tensor: torch.Tensor, func: Any, recorded: tuple[Any, tuple[_Part, ...]] | None, place: int | None
    ) -> None:
        """From now on a storage has another content."""
        storage = tensor.untyped_storage()
        content = _Content(storage.nbytes())
        if recorded:
            arguments, parts = recorded
            content.needs = frozenset({content}.union(*(p.content.needs for p in parts if not p.content.lasts)))
            if len(content.needs) <= LONGEST:
                layout = tensor.size(), tensor.stride(), tensor.storage_offset()
                content.recipe = _Recipe(func, arguments, parts, place, layout)
            else:
                content.needs = frozenset()
        self._remember(storage, content)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if place < len(args) else kwargs.get(name)


_known: dict[Any, tuple[list[tuple[int, str]], bool]] = {}


def _about(func: Any) -> tuple[list[tuple[int, str]], bool]:
    """Which arguments an operation writes to, and whether it is cheap."""
    if func not in _known:
        places = [
            (place, argument.name)
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        name = func._schema.name.split("::")[-1]
        cheap = torch.Tag.pointwise in func.tags or name in _CHEAP
        first = not places or places[0][0] == 0
        _known[func] = places, cheap and first and torch.Tag.nondeterministic_seeded not in func.tags
    return _known[func]
