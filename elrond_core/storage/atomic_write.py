"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


def atomic_write(path: Path, content: bytes) -> None:
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


def make_folder(folder: Path) -> None:
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
