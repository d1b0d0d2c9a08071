"""Names of files that a person types: inside one folder, and such as every operating system can store and show."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from ..errors import ElrondError
from .tensors import shown

SUFFIX = ".safetensors"
# Bytes. Most file systems take 255 for one part, of which a temporary file needs some.
_MOST_PART, _MOST_NAME = 200, 1000
# Windows takes a superscript digit for the digit.
_PORTS = {f"{port}{digit}" for port in ("COM", "LPT") for digit in "0123456789¹²³"}
_RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *_PORTS}
_FORBIDDEN = set('<>:"|?*')
# Control and format characters, halves of surrogate pairs, separators of lines and paragraphs.
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Letters and marks that are shown as nothing.
_BLANK = set("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")


def safe_path(folder: Path, name: str, suffix: str = SUFFIX) -> Path:
    """Where a file that a person named belongs: inside `folder`, in subfolders if the name has slashes.

    Names that another operating system could not store are refused too, since files travel; and names with characters
    that nobody sees, since two of them would look the same.

    Args:
        folder: the folder that the file must not leave.
        name: such as "monster" or "animals/dog", with or without the suffix.
        suffix: added where it is missing.

    Raises:
        ElrondError: if the name is empty or too long, leaves the folder, or has a character or part that no file may.
    """
    refused = ElrondError(
        f"{shown(name)} cannot be a file name here: use letters, digits, spaces, - and _ in a subfolder/name."
    )
    parts = name.strip().replace("\\", "/").removesuffix(suffix).split("/")
    if sum(len(part.encode(errors="replace")) + 1 for part in parts) > _MOST_NAME or not all(map(_is_sound, parts)):
        raise refused
    path = folder.joinpath(*parts[:-1], parts[-1] + suffix)
    try:
        # A link inside the folder may still point out of it.
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):
        # Links in a circle, or a folder whose own name is nearly too long.
        inside = False
    if not inside:
        raise refused
    return path


def _is_sound(part: str) -> bool:
    if not part.strip(". ") or part != part.rstrip(". ") or not _FORBIDDEN.isdisjoint(part):
        return False
    if not _BLANK.isdisjoint(part) or any(unicodedata.category(character) in _UNSEEN for character in part):
        return False
    # The number that is added to a name that is taken does not count.
    stem = re.sub(r"-[0-9]{1,9}$", "", part)
    return part.split(".")[0].rstrip().upper() not in _RESERVED and len(stem.encode()) <= _MOST_PART
