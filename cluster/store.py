"""The folder of finished ranges that all workers share: on a disk, or wherever fsspec can open one.

    works/NAME/00000000-4.safetensors   batches of the work NAME, as `elrond_core/storage/shards.py` writes them
    gradients/CONCEPT-NAME.safetensors  all gradients of a concept, for Load Gradients
    results/CONCEPT-NAME/               what the rest of the graph saved, and result.json
    times.json                          seconds of a worker for an image or a gradient, in each range of the latest run

Content decides every name, and a file that does not agree with its checksum counts as missing. So two runs on one store
do no harm: they write the same files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from elrond_core.storage.atomic_write import atomic_write, make_folder

WORKS, GRADIENTS, RESULTS = "works", "gradients", "results"
# Seconds an image or a gradient of all ranges of the latest run, by node.
TIMES = "times.json"


class StoreError(RuntimeError):
    """The store cannot be used; the message says why."""


class Store:
    """A store, and this process's copy of what it needs of it.

    Args:
        url: a folder, or an address that fsspec knows, such as s3://bucket/folder.
        cache: folder for copies, if the store is on no disk.

    Attributes:
        folder: where hosts read and write: the store itself, or the copy.
    """

    def __init__(self, url: str, cache: Path) -> None:
        self.url = url
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StoreError(f"The store {url} cannot be opened: {error}.") from error
        self._local = "file" in _protocols(self._files)
        self.folder = Path(self._root).resolve() if self._local else cache.resolve()

    def make(self) -> None:
        """Make the store and see that it can be written.

        Raises:
            StoreError: if it cannot.
        """
        try:
            if self._local:
                make_folder(self.folder / WORKS)
            self._write(".elrond", b"A store of ComfyUI-ELROND.\n")
        # Every file system has errors of its own.
        except Exception as error:
            raise StoreError(f"The store {self.url} cannot be written: {error}.") from error

    @property
    def works(self) -> Path:
        """Folder of all works, for hosts."""
        return self.folder / WORKS

    def sizes(self, folder: str) -> dict[str, int]:
        """Names and bytes of the files in a folder of the store."""
        if self._local:
            found: dict[str, int] = {}
            with (
                contextlib.suppress(FileNotFoundError, NotADirectoryError),
                os.scandir(self.folder / folder) as entries,
            ):
                for entry in entries:
                    # It may have been joined with others meanwhile.
                    with contextlib.suppress(OSError):
                        found[entry.name] = entry.stat().st_size
            return found
        # Listings are kept otherwise, and other machines write.
        self._files.invalidate_cache()
        try:
            listed = self._files.ls(f"{self._root}/{folder}", detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] or 0 for entry in listed if entry["type"] == "file"}

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        folder, _, file = name.rpartition("/")
        return file in self.sizes(folder)

    def read(self, name: str) -> bytes:
        """A file's content."""
        if self._local:
            return (self.folder / name).read_bytes()
        content: bytes = self._files.cat_file(f"{self._root}/{name}")
        return content

    def pull(self, folder: str) -> None:
        """Have a folder of the store where hosts read it."""
        if self._local:
            return
        there = self.sizes(folder)
        make_folder(self.folder / folder)
        for name, size in there.items():
            path = self.folder / folder / name
            if not path.is_file() or path.stat().st_size != size:
                with contextlib.suppress(FileNotFoundError):
                    atomic_write(path, self.read(f"{folder}/{name}"))

    def push(self, folder: str) -> None:
        """Bring to the store what hosts have written into a folder."""
        if self._local:
            return
        there = self.sizes(folder)
        for path in _files_in(self.folder / folder):
            name = path.relative_to(self.folder / folder).as_posix()
            if there.get(name) != path.stat().st_size:
                self._write(f"{folder}/{name}", path.read_bytes())

    def put(self, source: Path, folder: str, besides: str = "") -> list[str]:
        """Copy all files of a folder but one, with its subfolders, into one of the store; returns their names."""
        names = []
        for path in _files_in(source):
            name = path.relative_to(source).as_posix()
            if name == besides:
                continue
            self._write(f"{folder}/{name}", path.read_bytes())
            names.append(name)
        return names

    def write(self, name: str, content: bytes) -> None:
        """Write a file: whole or not at all on disks, and on stores of objects, whose files appear when complete."""
        self._write(name, content)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(OSError):
            if self._local:
                (self.folder / name).unlink()
            else:
                self._files.rm_file(f"{self._root}/{name}")
                (self.folder / name).unlink(missing_ok=True)

    def forget(self, folder: str) -> None:
        """Remove this process's copy of a folder that it no longer needs."""
        if not self._local:
            shutil.rmtree(self.folder / folder, ignore_errors=True)

    def _write(self, name: str, content: bytes) -> None:
        if self._local:
            make_folder((self.folder / name).parent)
            atomic_write(self.folder / name, content)
        else:
            self._files.pipe_file(f"{self._root}/{name}", content)


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)


def _files_in(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        # Files in the middle of being written begin with a dot.
        if path.is_file() and not path.name.startswith("."):
            yield path
