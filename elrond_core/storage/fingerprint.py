"""A digest of everything that a piece of work depends on."""

from __future__ import annotations

import functools
import hashlib
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..seeding import generator


class NoFingerprintError(TypeError):
    """Something has no content that could be told from another's."""


def fingerprint(*values: Any, content: Callable[[Any], Any] = lambda value: value) -> str:
    """A text that is the same, in this process or another, if all the values are, and but for chance only then.

    Tensors are taken by type, shape and every value, functions by their code and what they close over, objects by
    their class and attributes.

    Args:
        values: whatever determines a result.
        content: may put something else in the place of an object whose attributes do not say what it is.

    Raises:
        NoFingerprintError: if something has no content that could be compared.
    """
    return _Fingerprint(content).of(values).hex()


class _Fingerprint:
    def __init__(self, content: Callable[[Any], Any]) -> None:
        self._content = content
        self._known: dict[int, bytes] = {}
        self._open: list[int] = []
        # An object that were freed could lend its place to another, which would then be taken for it.
        self._alive: list[Any] = []

    def of(self, value: Any) -> bytes:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
            return self._sum(_kind(type(value)).encode(), repr(value).encode())
        if id(value) in self._known:
            return self._known[id(value)]
        if id(value) in self._open:
            return self._sum(b"within", str(len(self._open) - self._open.index(id(value))).encode())
        self._open.append(id(value))
        self._alive.append(value)
        replaced = self._content(value)
        parts = self._parts(value) if replaced is value else [self.of(replaced)]
        self._known[id(value)] = self._sum(_kind(type(value)).encode(), *parts)
        self._open.pop()
        return self._known[id(value)]

    @staticmethod
    def _sum(*parts: bytes) -> bytes:
        summed = hashlib.blake2b(digest_size=16)
        for part in parts:
            # Lengths first, so that no two sequences of parts read the same.
            summed.update(len(part).to_bytes(8, "little") + part)
        return summed.digest()

    def _parts(self, value: Any) -> list[bytes]:
        match value:
            case torch.Tensor() if value.is_meta:
                raise NoFingerprintError("weight that is described only has no content that could be compared.")
            case torch.Tensor() if type(value) in (torch.Tensor, torch.nn.Parameter):
                return [f"{value.dtype} {tuple(value.shape)} {digest(value)}".encode()]
            case torch.Tensor():
                # One of its own kind, such as quantised weights: what it is made of.
                names = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
                raw = [getattr(value, name) for name in names] or [value.as_subclass(torch.Tensor)]
                return [self.of(raw), self.of(vars(value))]
            case np.ndarray() if value.dtype.kind in "biufc":
                return [f"{value.dtype} {value.shape}".encode(), np.ascontiguousarray(value).tobytes()]
            case Mapping():
                return [self.of(each) for pair in value.items() for each in pair]
            case list() | tuple():
                return [self.of(each) for each in value]
            case set() | frozenset():
                return sorted(self.of(each) for each in value)
            case type():
                return [_kind(value).encode()]
            case types.ModuleType():
                return [_module(value.__name__).encode()]
            case functools.partial():
                return [self.of(each) for each in (value.func, value.args, value.keywords)]
            case types.MethodType():
                return [self.of(value.__func__), self.of(value.__self__)]
            case types.FunctionType():
                cells = [cell.cell_contents for cell in value.__closure__ or ()]
                about = (value.__code__, value.__defaults__, value.__kwdefaults__, cells)
                return [_module(value.__module__).encode(), value.__qualname__.encode(), self.of(about)]
            case types.CodeType():
                return [value.co_code, self.of(value.co_names), self.of(value.co_consts)]
            case types.BuiltinFunctionType():
                return [f"{_module(value.__module__)}.{value.__qualname__}".encode()]
        if not hasattr(value, "__dict__"):
            raise NoFingerprintError(f"{_kind(type(value))} has no content that could be compared.")
        return [self.of(vars(value))]


def _kind(kind: type) -> str:
    return f"{_module(kind.__module__)}.{kind.__qualname__}"


def _module(name: str | None) -> str:
    """A module's name wherever it is installed: the host calls node packs by the path of their folder."""
    return re.split(r"[/\\\\]", name or "")[-1]


# Numbers that are multiplied at once: 8 MiB of them in 64 bits.
CHUNK = 2**20


def digest(tensor: torch.Tensor) -> str:
    """A checksum of every byte of a tensor, computed on its device at about the speed of its memory.

    Two multilinear hashes (Lemire & Kaser, "Strongly universal string hashing is fast", 2014) of its 32-bit words,
    modulo 2⁶⁴, whose random factors depend on the place within a chunk and on the chunk. Not against malice: against
    two models being taken for one.
    """
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -len(raw) % 4)) if len(raw) % 4 else raw
    # A view needs a start that is a multiple of four bytes.
    words = (raw if raw.storage_offset() % 4 == 0 else raw.clone()).view(torch.int32)
    within = _factors("word", 2).to(words.device)
    totals = [0, 0]
    for place, chunk in enumerate(words.split(CHUNK)):
        wide = chunk.long()
        for i in range(2):
            summed = int((wide * within[i, : len(wide)]).sum())
            factor = generator(i, "chunk", place).initial_seed() | 1
            totals[i] = (totals[i] + factor * summed + len(wide)) % 2**64
    return "".join(f"{total:016x}" for total in totals)


@functools.lru_cache(maxsize=1)
def _factors(purpose: str, count: int) -> torch.Tensor:
    return torch.stack(
        [torch.randint(-(2**63), 2**63 - 1, (CHUNK,), generator=generator(i, purpose)) for i in range(count)]
    )
