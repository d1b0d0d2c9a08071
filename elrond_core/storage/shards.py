"""Work that survives a crash: every finished batch of a collection, on the disk as soon as it is done.

A collection's folder is named by a fingerprint of everything that determines its result, so that the same work finds
what is done already, and no other does. A shard is a safetensors file of one batch, or of many in a row, with a
checksum. It appears whole or not at all; one that does not agree with its checksum counts as not there.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import ElrondError
from .atomic_write import atomic_write, make_folder, reason, remove_abandoned
from .shard_names import batches_of, shard_name
from .tensors import DamagedError, Tensors, encode, read

Batch = dict[str, torch.Tensor]
# Batches that are joined into one file once they are all there: a folder of a million files serves nobody, and
# joining once writes everything twice only.
_JOINED = 64
# About eight collections of the published size (30,000 gradients) of one row of Qwen-Image's width, 3584.
LIMIT = 8 * 30_000 * 3584 * 4
# Another process may join files while they are listed; each time the listing is read again, fewer are left to join.
_LISTINGS = 5
# Seconds within which a collection that was written to may be another process's, which goes on.
_IN_USE = 3600.0


class Shards:
    """The batches of one collection.

    A folder that cannot be written does not stop the work: each cause is said once, and the batches stay in memory. Two
    processes may do the same work at once: each keeps what it makes, and their batches are the same.

    Args:
        root: folder of all collections.
        fingerprint: of everything that determines the result, see `fingerprint`.
        warn: told, in one sentence, what was damaged or could not be written.
    """

    def __init__(self, root: Path, fingerprint: str, warn: Callable[[str], None]) -> None:
        self._folder = root / fingerprint
        self._fingerprint = fingerprint
        self._warn = warn
        self._complaints: set[str] = set()
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
                    # Windows refuses while another process reads it. What stays is read twice and does no harm.
                    with contextlib.suppress(OSError):
                        self._path(i, 1).unlink(missing_ok=True)
        except OSError as error:
            why = reason(error)
            if why not in self._complaints:
                self._complaints.add(why)
                self._warn(
                    f"Finished work cannot be kept in {self._folder} ({why}): the work goes on, but if it is "
                    "interrupted it starts from the last batch that was kept."
                )

    def _path(self, first: int, count: int) -> Path:
        return self._folder / shard_name(first, count)

    def _write(self, first: int, batches: list[Batch]) -> None:
        _write(self._folder, self._fingerprint, first, batches)

    def _read(self) -> None:
        remove_abandoned(self._folder)
        seen: set[str] = set()
        for _ in range(_LISTINGS):
            try:
                names = sorted(name for name in os.listdir(self._folder) if batches_of(name))  # noqa: PTH208
            except OSError:
                # What keeps it from being read is said when it cannot be written either.
                return
            vanished = False
            for name in names:
                if name not in seen:
                    try:
                        self._take(self._folder / name)
                        seen.add(name)
                    except FileNotFoundError:
                        # Another process has joined it with others, into a file that may be new in the folder.
                        vanished = True
            if not vanished:
                return

    def _take(self, path: Path) -> None:
        """Take over the batches of one file.

        Raises:
            FileNotFoundError: if it is not there any more.
        """
        try:
            batches = _read(path, self._fingerprint)
        except DamagedError:
            self._warn(f"{path.name} in {self._folder} is damaged: what it held is done again.")
            return
        except ElrondError as error:
            self._warn(f"{error} It is in {self._folder}, and what it held is done again.")
            return
        self._batches |= batches
        if len(batches) > 1:
            self._joined |= set(batches)


def write_shard(root: Path, fingerprint: str, batches: dict[int, Batch]) -> str:
    """Write batches in a row as one shard, whole or not at all, where `Shards` finds it.

    Args:
        root: folder of all collections.
        fingerprint: of everything that determines the result.
        batches: by number, without gaps.

    Returns:
        The file's name.

    Raises:
        OSError: if it cannot be written.
    """
    first = min(batches)
    make_folder(root / fingerprint)
    _write(root / fingerprint, fingerprint, first, [batches[first + i] for i in range(len(batches))])
    return shard_name(first, len(batches))


def read_shard(root: Path, fingerprint: str, name: str) -> dict[int, Batch]:
    """The batches of one shard, by number.

    Raises:
        FileNotFoundError: if it is not there.
        ElrondError: if it is damaged, or cannot be read.
    """
    return _read(root / fingerprint / name, fingerprint)


def _read(path: Path, fingerprint: str) -> dict[int, Batch]:
    tensors, metadata = read(path)
    if metadata.get("fingerprint") != fingerprint:
        raise DamagedError("It is of another collection.")
    return _split(tensors)


def _write(folder: Path, fingerprint: str, first: int, batches: list[Batch]) -> None:
    tensors = {f"{first + i}.{name}": tensor for i, batch in enumerate(batches) for name, tensor in batch.items()}
    atomic_write(folder / shard_name(first, len(batches)), encode(tensors, {"fingerprint": fingerprint}))


def _split(tensors: Tensors) -> dict[int, Batch]:
    """Tensors called "number.name" by number and name."""
    batches: dict[int, Batch] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        if not re.fullmatch("[0-9]{1,12}", number):
            raise DamagedError("It holds something else.")
        batches.setdefault(int(number), {})[name] = tensor
    return batches


def prune(root: Path, fingerprint: str, limit: int = LIMIT) -> None:
    """Remove collections that were used longest ago, until all together hold at most `limit` bytes.

    One that was written to within the last hour stays: another process may be at work on it.

    Args:
        root: folder of all collections.
        fingerprint: the one in use, which counts as the latest and stays in any case.
        limit: bytes.
    """
    with contextlib.suppress(OSError):
        os.utime(root / fingerprint)
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    folders = sorted((root / name for name in names), key=lambda path: (path.name == fingerprint, _used(path)))
    sizes = [_size(folder) for folder in folders]
    for place, folder in enumerate(folders):
        live = folder.name == fingerprint or time.time() - _used(folder) < _IN_USE
        if not live and sum(sizes[place:]) > limit:
            shutil.rmtree(folder, ignore_errors=True)


def _used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _size(folder: Path) -> int:
    """Bytes of all files in a folder; what cannot be looked at, such as a link to nowhere, counts as nothing."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                total += entry.stat(follow_symlinks=False).st_size
    return total
