"""Work that survives a crash: every finished batch of a collection, on the disk as soon as it is done.

A collection's folder is named by a fingerprint of everything that determines its result, so that the same work finds
what is done already, and no other does. A shard is a safetensors file of one batch, or of many in a row, with a
checksum. It appears whole or not at all; one that does not agree with its checksum counts as not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from .atomic_write import atomic_write, make_folder

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
            make_folder(self._folder)
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
        atomic_write(path, save(tensors, {"fingerprint": self._fingerprint, "checksum": self._checksum(tensors)}))

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
