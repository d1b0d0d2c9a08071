"""Files that are written whole or not at all, and one writer at a time where a file is read to be written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_NAME = ".elrond.lock"
# Seconds to wait for another writer. A write takes as long as the disk needs for one file.
_PATIENCE = 60.0
# Seconds after which a temporary file is nobody's: a live one is written to all the time.
_ABANDONED = 3600.0
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
# Windows refuses to replace a file while another program reads it, so that a short wait helps.
_ATTEMPTS, _PAUSE = (40 if os.name == "nt" else 1), 0.05
_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file is larger than this disk or user may store; choose another folder",
    errno.EROFS: "the disk is read-only; choose another folder",
    errno.EACCES: "the folder may not be written to; change its permissions",
    errno.EPERM: "the folder may not be written to; change its permissions",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENOTDIR: "a file stands where a folder is needed; rename it",
    errno.EEXIST: "a file stands where a folder is needed; rename it",
}
# What a file system answers that cannot flush a folder, such as a network share, or one whose folder may not be listed.
_NO_FLUSH = {errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def atomic_write(path: Path, content: bytes, *, overwrite: bool = True) -> None:
    """Write a file, flushed to the disk, whole or not at all.

    Args:
        path: the file; its folder exists.
        content: all of it.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: if there is one, and it must not be replaced.
        OSError: if it cannot be written; what was there before is still there.
    """
    # In the same folder, since a replacement is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        (_replace if overwrite else _create)(temporary, path)
        flush_folder(path.parent)
    finally:
        # A full or read-only disk must be what is reported, not that nothing can be removed from it.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            temporary.replace(path)
            return
        except PermissionError:
            if attempt == _ATTEMPTS:
                raise
            time.sleep(_PAUSE)


def _create(temporary: Path, path: Path) -> None:
    """Give a file its name, unless another has it."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:
        # FAT and some network file systems have no hard links. An empty file takes the name first.
        path.open("xb").close()
        _replace(temporary, path)


def make_folder(folder: Path) -> None:
    """Make a folder, and those it is in, so that they survive a power cut as well as what is put into them."""
    missing = [each for each in (folder, *folder.parents) if not each.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in reversed(missing):
        flush_folder(each.parent)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of writers that were killed, an hour after they last wrote."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not _TEMPORARY.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED:
                    os.unlink(entry.path)  # noqa: PTH108


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep all other writers out of a folder, in this process and in others, until the block ends.

    A process that dies lets go of it. On a file system without locks nobody is kept out.

    Raises:
        OSError: if the folder cannot be written, or another writer does not let go of it within a minute.
    """
    lock = FileLock(str(folder / LOCK_NAME), timeout=_PATIENCE)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock)
        except Timeout as error:
            raise OSError(errno.EBUSY, "another program has been writing there for a minute; try again") from error
        except NotImplementedError:
            pass
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


def reason(error: OSError) -> str:
    """Why something could not be written, and what to do about it where that is known."""
    return _ADVICE.get(error.errno or 0, error.strerror or str(error))


def flush_folder(folder: Path) -> None:
    """Bring new names in a folder to the disk, where the file system can do that."""
    # A new name survives a power cut only once its folder is on the disk. Windows has no such call and no such need.
    if os.name != "posix":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
