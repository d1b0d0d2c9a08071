"""Tensors and text in one safetensors file, with a checksum; read once, into memory of their own.

Every file of the pack is written and read here: directions, gradients, shards of a collection, and checkpoints. A file
is opened once. Its header is checked before a tensor is allocated, its bytes are read and not mapped, and nothing in it
is executed. docs/format.md describes the checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save

from ..errors import ElrondError

CHECKSUM = "checksum"
MOST_HEADER = 4 * 2**20
# Bytes of a file, at most: 30,000 gradients of 150 rows of Qwen-Image's width, 3584.
MOST_BYTES = 60 * 2**30
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_MOST_DIMENSIONS = 8

Entries = dict[str, dict[str, Any]]
Tensors = dict[str, torch.Tensor]
Metadata = dict[str, str]


class DamagedError(ElrondError):
    """A file is not what its writer wrote."""


def encode(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file whose metadata has a checksum.

    Args:
        tensors: on any device; two may share memory.
        metadata: anything but a checksum.

    Raises:
        ElrondError: if a tensor is of a type that no file holds, or a text is not Unicode.
    """
    plain: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ElrondError(f"A tensor {shown(name)} of type {tensor.dtype} cannot be kept in a file.")
        copy = tensor.detach().to("cpu").contiguous()
        # The library does not take tensors that share their memory.
        memory = copy.untyped_storage().data_ptr()
        shared = memory in {other.untyped_storage().data_ptr() for other in plain.values()}
        plain[name] = copy.clone() if shared else copy
    try:
        return _ordered(save(plain, {**metadata, CHECKSUM: checksum(plain, metadata)}))
    except UnicodeEncodeError as error:
        raise ElrondError(f"A text has a character that is not Unicode: {shown(error.object)}.") from error


def _ordered(content: bytes) -> bytes:
    """The same file with its metadata in order, which the library writes in another order each time.

    Files of equal content are then equal, so that machines that make the same can be compared by their files.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    parsed = json.loads(content[8:end])
    metadata = parsed.pop("__metadata__", {})
    header = json.dumps(
        {"__metadata__": dict(sorted(metadata.items())), **parsed}, ensure_ascii=False, separators=(",", ":")
    ).encode()
    # Tensors begin at a multiple of eight bytes.
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, memoryview(content)[end:]])


def require_checksum(name: str, entries: Entries, metadata: Metadata) -> None:
    """Refuse a file without a checksum."""
    if CHECKSUM not in metadata:
        raise DamagedError(f"{name} is damaged: it has no checksum.")


def read(path: Path, check: Callable[[str, Entries, Metadata], None] = require_checksum) -> tuple[Tensors, Metadata]:
    """Read a file, once, whatever happens to its name meanwhile.

    Args:
        path: the file.
        check: given the file's name, type, shape and place of every tensor, and the metadata, before a tensor is
            allocated; may raise.

    Returns:
        The tensors, on the CPU, in memory of their own; and the metadata without the checksum.

    Raises:
        FileNotFoundError: if there is no file.
        DamagedError: if it is no safetensors file, is cut short, or does not agree with its checksum.
        ElrondError: if it cannot be read, or is too large.
    """
    name = path.name
    try:
        with _opened(path) as (file, size):
            entries, metadata = header(name, file, size)
            check(name, entries, metadata)
            tensors = {key: read_tensor(name, file, entry) for key, entry in entries.items()}
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ElrondError(f"{name} could not be read: {error.strerror or error}.") from error
    said = metadata.pop(CHECKSUM, None)
    if said is not None and said != checksum(tensors, metadata):
        raise DamagedError(f"{name} is damaged: its content does not agree with its checksum; get or make it again.")
    return tensors, metadata


def checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """BLAKE2b of 32 bytes, in hexadecimal, of everything that a reader of a file is given."""
    summed = hashlib.blake2b(digest_size=32)

    def add(part: bytes | memoryview) -> None:
        # Lengths first, so that no two sequences of parts read the same.
        summed.update(len(part).to_bytes(8, "little"))
        summed.update(part)

    add(str(len(metadata)).encode())
    for key in sorted(metadata):
        add(key.encode())
        add(metadata[key].encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        add(key.encode())
        add(_NAMES[tensor.dtype].encode())
        add(",".join(map(str, tensor.shape)).encode())
        add(_memory(tensor))
    return summed.hexdigest()


def shown(text: object, most: int = 80) -> str:
    """A text as a message quotes it: escaped, and cut where it is long."""
    quoted = ascii(text) if isinstance(text, str) and not text.isprintable() else repr(text)
    return quoted if len(quoted) <= most else f"{quoted[: most - 3]}..."


def plain(text: str) -> str:
    """As `shown`, without quotation marks."""
    return shown(text)[1:].removesuffix("'").removesuffix('"')


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file and its size; without the flag, opening a named pipe would wait for its writer."""
    flag = getattr(os, "O_NONBLOCK", 0)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | flag)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{path.name} is not a regular file.")
        yield file, status.st_size


def header(name: str, file: BinaryIO, size: int) -> tuple[Entries, Metadata]:
    """Everything that the header of an open file says, in the order of the tensors' bytes.

    Args:
        name: what messages call the file.
        file: at its start; left at the first tensor.
        size: bytes of the whole file.

    Raises:
        DamagedError: if it is no safetensors file, or is cut short.
        ElrondError: if it is too large.
    """
    damaged = f"{name} is not a safetensors file, or is cut short."
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise DamagedError(damaged)
    if length > MOST_HEADER:
        raise DamagedError(f"{name} has a header of {length} bytes, and {MOST_HEADER} is the most.")
    if size > MOST_BYTES:
        raise ElrondError(f"{name} has {size} bytes, and {MOST_BYTES} is the most.")
    try:
        # Text that is no Unicode, such as half of a surrogate pair, is a ValueError too.
        parsed = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
        json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DamagedError(damaged) from error
    if not isinstance(parsed, dict):
        raise DamagedError(damaged)
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedError(f"{name} has metadata that is not text.")
    for key, entry in parsed.items():
        if not _sound(entry):
            raise DamagedError(f"{name} is damaged: its tensor {shown(key)} does not fit the file.")
    place = 0
    entries = dict(sorted(parsed.items(), key=lambda item: item[1]["data_offsets"]))
    for key, entry in entries.items():
        start, end = entry["data_offsets"]
        if start != place or end > size - 8 - length:
            raise DamagedError(f"{name} is damaged: its tensor {shown(key)} does not fit the file.")
        place = end
    if place != size - 8 - length:
        raise DamagedError(f"{name} is damaged: there is more in it than its tensors.")
    return entries, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a repeated key is how one reader is shown another file than the next."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("repeated key")
    return result


def _sound(entry: Any) -> bool:
    """Whether a tensor's type, shape and place in the file agree with one another."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if dtype in _TYPES:
            # A bool is an int to isinstance.
            whole = all(type(x) is int and x >= 0 for x in (*shape, start, end))
            short = len(shape) <= _MOST_DIMENSIONS
            return whole and short and math.prod(shape) * _TYPES[dtype].itemsize == end - start
    return False


def read_tensor(name: str, file: BinaryIO, entry: dict[str, Any]) -> torch.Tensor:
    """Read one tensor of an open file into memory of its own; `entry` is its part of the header."""
    try:
        tensor = torch.empty(entry["shape"], dtype=_TYPES[entry["dtype"]])
    except (RuntimeError, MemoryError) as error:
        raise ElrondError(f"{name} does not fit into memory: close other programs, or use a smaller file.") from error
    memory = _memory(tensor)
    if len(memory) and file.readinto(memory) != len(memory):  # type: ignore[attr-defined]
        raise DamagedError(f"{name} was cut short while it was read; try again.")
    return tensor


def _memory(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
