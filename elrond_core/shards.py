"""Work that survives a crash: every finished batch of a collection, on the disk as soon as it is done.

A collection's folder is named by a fingerprint of everything that determines its result, so that the same work finds
what is done already, and no other does. A shard is a safetensors file of one batch, or of many in a row, with a
checksum. It appears whole or not at all; one that does not agree with its checksum counts as not there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import types
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from .seeding import generator

Batch = dict[str, torch.Tensor]

# Batches that are joined into one file once they are all there: a folder of a million files serves nobody, and
# joining once writes everything twice only.
_JOINED = 64
# About eight collections of the published size (30,000 gradients) of one row of Qwen-Image's width, 3584.
LIMIT = 8 * 30_000 * 3584 * 4


class Shards:
    """The batches of one collection.

    A folder that cannot be written does not stop the work: it is said once, and the batches stay in memory.

    Args:
        root: folder of all collections.
        fingerprint: of everything that determines the result, see `fingerprint`.
        warn: told, in one sentence, what was damaged or could not be written.
    """

    def __init__(self, root: Path, fingerprint: str, warn: Callable[[str], None]) -> None:
        self._folder = root / fingerprint
        self._fingerprint = fingerprint
        self._warn = warn
        self._complained = False
        self._batches: dict[int, Batch] = {}
        # Batches that a file holds together with others.
        self._joined: set[int] = set()
        self._read()

    def __len__(self) -> int:
        """How many batches are done."""
        return len(self._batches)

    def get(self, number: int) -> Batch | None:
        """Batch `number`, if it is done."""
        return self._batches.get(number)

    def put(self, number: int, batch: Batch) -> None:
        """Keep a finished batch. On return it is on the disk, unless the disk refused."""
        self._batches[number] = batch
        try:
            _make(self._folder)
            self._write(number, [batch])
            first = number - number % _JOINED
            row = [self._batches.get(i) for i in range(first, first + _JOINED)]
            whole = [each for each in row if each is not None]
            if len(whole) == _JOINED and not self._joined.issuperset(range(first, first + _JOINED)):
                self._write(first, whole)
                self._joined.update(range(first, first + _JOINED))
                for i in range(first, first + _JOINED):
                    self._path(i, 1).unlink(missing_ok=True)
        except OSError as error:
            if not self._complained:
                self._warn(
                    f"Finished work cannot be kept in {self._folder} ({error.strerror or error}): the work goes on, "
                    "but if it is interrupted it starts from the last batch that was kept."
                )
            self._complained = True

    def _path(self, first: int, count: int) -> Path:
        return self._folder / f"{first:08d}-{count}.safetensors"

    def _write(self, first: int, batches: list[Batch]) -> None:
        tensors = {f"{first + i}.{name}": tensor for i, batch in enumerate(batches) for name, tensor in batch.items()}
        path = self._path(first, len(batches))
        write(path, save(tensors, {"fingerprint": self._fingerprint, "checksum": self._checksum(tensors)}))

    def _read(self) -> None:
        try:
            found = sorted(self._folder.iterdir())
        except OSError:
            # What keeps it from being read is said when it cannot be written either.
            return
        for path in found:
            if path.suffix == ".tmp":
                # Left behind by a process that was killed as it wrote.
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            try:
                with safe_open(path, "pt") as file:
                    tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
                    said = (file.metadata() or {}).get("checksum")
                good = said == self._checksum(tensors)
            except Exception:  # The library raises its own, undocumented types.
                good = False
            if not good:
                self._warn(f"{path.name} in {self._folder} is damaged: what it held is done again.")
                continue
            numbers = set()
            for name, tensor in tensors.items():
                number, _, name = name.partition(".")
                self._batches.setdefault(int(number), {})[name] = tensor
                numbers.add(int(number))
            if len(numbers) > 1:
                self._joined |= numbers

    def _checksum(self, tensors: Batch) -> str:
        """Of everything that is read: names, types, shapes and values, and whose they are."""
        summed = hashlib.blake2b(self._fingerprint.encode(), digest_size=32)
        for name in sorted(tensors):
            tensor = tensors[name]
            summed.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}/".encode())
            summed.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return summed.hexdigest()


def write(path: Path, content: bytes) -> None:
    """Write a file, flushed to the disk, whole or not at all.

    Raises:
        OSError: if it cannot be written; what was there before is still there.
    """
    # In the same folder, since a replacement is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    finally:
        # A full or read-only disk must be what is reported, not that nothing can be removed from it.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _make(folder: Path) -> None:
    """Make a folder, and those it is in, so that they survive a power cut as well as what is put into them."""
    missing = [each for each in (folder, *folder.parents) if not each.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in reversed(missing):
        _flush_folder(each.parent)


def _flush_folder(folder: Path) -> None:
    # A new name survives a power cut only once its folder is on the disk. Windows has no such call and no such need.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def prune(root: Path, fingerprint: str, limit: int = LIMIT) -> None:
    """Remove collections that were used longest ago, until all together hold at most `limit` bytes.

    Args:
        root: folder of all collections.
        fingerprint: the one in use, which counts as the latest and stays in any case.
        limit: bytes.
    """
    with contextlib.suppress(OSError):
        os.utime(root / fingerprint)
    with contextlib.suppress(OSError):
        found = sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: (p.name == fingerprint, _used(p)))
        sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in found]
        for place, folder in enumerate(found[:-1]):
            if sum(sizes[place:]) > limit:
                shutil.rmtree(folder, ignore_errors=True)


def _used(folder: Path) -> float:
    return folder.stat().st_mtime


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
                return [value.__name__.encode()]
            case functools.partial():
                return [self.of(each) for each in (value.func, value.args, value.keywords)]
            case types.MethodType():
                return [self.of(value.__func__), self.of(value.__self__)]
            case types.FunctionType():
                cells = [cell.cell_contents for cell in value.__closure__ or ()]
                about = (value.__code__, value.__defaults__, value.__kwdefaults__, cells)
                return [value.__module__.encode(), value.__qualname__.encode(), self.of(about)]
            case types.CodeType():
                return [value.co_code, self.of(value.co_names), self.of(value.co_consts)]
            case types.BuiltinFunctionType():
                return [f"{value.__module__}.{value.__qualname__}".encode()]
        if not hasattr(value, "__dict__"):
            raise NoFingerprintError(f"{_kind(type(value))} has no content that could be compared.")
        return [self.of(vars(value))]


def _kind(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# Numbers that are multiplied at once: 8 MiB of them in 64 bits.
_CHUNK = 2**20


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
    for place, chunk in enumerate(words.split(_CHUNK)):
        wide = chunk.long()
        for i in range(2):
            summed = int((wide * within[i, : len(wide)]).sum())
            factor = generator(i, "chunk", place).initial_seed() | 1
            totals[i] = (totals[i] + factor * summed + len(wide)) % 2**64
    return "".join(f"{total:016x}" for total in totals)


@functools.lru_cache(maxsize=1)
def _factors(purpose: str, count: int) -> torch.Tensor:
    return torch.stack(
        [torch.randint(-(2**63), 2**63 - 1, (_CHUNK,), generator=generator(i, purpose)) for i in range(count)]
    )
