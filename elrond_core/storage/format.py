"""Directions and gradients as files: safetensors, never pickle; docs/format.md describes the format."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..directions import Directions
from ..errors import ElrondError, NotFoundError
from ..gradients import Gradients
from ..provenance import Provenance
from .atomic_write import atomic_write, locked, make_folder, reason, remove_abandoned
from .tensors import CHECKSUM, Entries, Metadata, Tensors, encode, header, plain, read, shown
from .values import is_calibration, is_text, list_of, numbers

FORMAT_VERSION = "2"
# Version 1 is the same without a checksum.
READABLE = ("1", "2")
NORM_TOLERANCE = 1e-3
# Values that are checked at a time. It bounds the additional memory.
_BLOCK = 2**20
_TYPES = {"F32": torch.float32, "I64": torch.int64}

# Per kind, every tensor's type and shape; equal letters are equal lengths.
_LAYOUTS: dict[str, dict[str, tuple[str, str]]] = {
    "directions": {"vectors": ("F32", "KRd"), "scores": ("F32", "K")},
    "gradients": {
        "vectors": ("F32", "NRd"),
        "sigma": ("F32", "N"),
        "sources": ("I64", "N"),
        "targets": ("I64", "N"),
        "response": ("F32", "MRd"),
        "response_sigma": ("F32", "M"),
    },
    "delta": {"delta": ("F32", "Rd")},
}
_COMMON = {"format_version", "kind", "project_version", "family", "d", "rows", "prompt", "concept", "tokens"}
_COMMON |= {"token_norm", "sigma", "count", "seed", "host"}
# Files of earlier releases lack them.
_OPTIONAL = {"latent_values", "seeds", "reach", "densities", "interval", "stops"}
# Only where there are several noise levels.
_OPTIONAL_TENSORS = {"response_sigma"}
_KEYS = {
    "directions": _COMMON | {"method", "score_name", "names", "stars"},
    "gradients": _COMMON,
    "delta": _COMMON | {"name", "strength"},
}
_KNOWN = {kind: keys | _OPTIONAL | {CHECKSUM} for kind, keys in _KEYS.items()}
# Attributes of `Gradients` whose tensors have another name in files.
_ATTRIBUTES = {"response": "probes", "response_sigma": "probe_sigma"}
# Characters that would end a line, or are none.
_NOT_IN_NAMES = {"Cc", "Cs", "Zl", "Zp"}


def save_directions(directions: Directions, path: Path, *, overwrite: bool = True) -> Path:
    """Write a directions file, whole or not at all.

    Args:
        directions: what to write.
        path: the file; its folder is made if missing.
        overwrite: replace a file that is there; if not, a number is added to the name while it is taken.

    Returns:
        The file that was written.

    Raises:
        ElrondError: if the directions are not finite unit vectors, something does not fit the format, or the file
            cannot be written.
    """
    content = _directions_content(directions, path.name)
    with _writing(path):
        return _put(path, content, overwrite)


def update_directions(path: Path, change: Callable[[Directions], Directions], source: Path | None = None) -> None:
    """Change a directions file; what another program saves there meanwhile is neither lost nor mixed in.

    Args:
        path: the file.
        change: from what is in the file to what is to be in it; may raise.
        source: the file to read where there is none at `path` yet.

    Raises:
        ElrondError: as `load_directions` and `save_directions`.
    """
    with _writing(path):
        directions = load_directions(source if source and not path.exists() else path)
        atomic_write(path, _directions_content(change(directions), path.name))


def load_directions(path: Path, *, family: str | None = None, width: int | None = None) -> Directions:
    """Read a directions file.

    Args:
        path: the file.
        family: refuse directions of another model family.
        width: refuse directions of another d.

    Raises:
        ElrondError: if the file is missing, damaged, of another kind, version, family or width, or not of finite unit
            vectors.
    """
    tensors, metadata, provenance = _read(path, "directions", family, width)
    vectors, scores = tensors["vectors"], tensors["scores"]
    return Directions(vectors, scores, provenance=provenance, **_described(path.name, metadata, len(vectors)))


def save_gradients(gradients: Gradients, path: Path, *, overwrite: bool = True) -> Path:
    """Write a gradients file, whole or not at all; arguments and result as for `save_directions`.

    Raises:
        ElrondError: if a gradient is not finite, something does not fit the format, or the file cannot be written.
    """
    tensors = {name: getattr(gradients, _ATTRIBUTES.get(name, name)) for name in _LAYOUTS["gradients"]}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    provenance = gradients.provenance.with_(count=len(gradients))
    content = _content(path.name, "gradients", tensors, {}, provenance, gradients.vectors.shape[2])
    with _writing(path):
        return _put(path, content, overwrite)


def load_gradients(path: Path, *, family: str | None = None, width: int | None = None) -> Gradients:
    """Read a gradients file; arguments and errors as for `load_directions`."""
    tensors, _, provenance = _read(path, "gradients", family, width)
    return Gradients(provenance=provenance, **{_ATTRIBUTES.get(name, name): tensor for name, tensor in tensors.items()})


def save_delta(
    directions: Directions, index: int, strength: float, path: Path, *, relative: bool = True, overwrite: bool = True
) -> Path:
    """Write one direction as a plain change of a conditioning, for programs that know nothing of ELROND.

    The file holds one tensor, `delta`, float32 (R, d): what steering adds to the concept's R rows.

    Args:
        directions: where it is taken from.
        index: which direction.
        strength: how far to go; not 0.
        path: the file; its folder is made if missing.
        relative: the strength is in norms of the concept's own embedding, not in units of the embedding.
        overwrite: replace a file that is there; if not, a number is added to the name while it is taken.

    Returns:
        The file that was written.

    Raises:
        ElrondError: if there is no such direction, the strength is 0 or not finite, or the file cannot be written.
    """
    vector = directions.pick(index)
    check_strength(strength)
    scale = strength * (directions.provenance.token_norm if relative else 1.0)
    metadata = {"name": directions.names[index], "strength": repr(float(scale))}
    content = _content(
        path.name, "delta", {"delta": scale * vector.float()}, metadata, directions.provenance, directions.width
    )
    with _writing(path):
        return _put(path, content, overwrite)


def check_strength(strength: float) -> None:
    """Refuse a strength of a change that is 0 or not finite."""
    if not math.isfinite(strength) or strength == 0:
        raise ElrondError(f"An exported direction needs a strength other than 0, not {strength}.")


def load_delta(path: Path) -> tuple[torch.Tensor, Provenance]:
    """Read what `save_delta` wrote: the change, float32 (R, d), and where it comes from.

    Raises:
        ElrondError: if the file is missing, damaged, or of another kind or version.
    """
    tensors, _, provenance = _read(path, "delta", None, None)
    return tensors["delta"], provenance


def _directions_content(directions: Directions, name: str) -> bytes:
    metadata = {
        "method": json.dumps(directions.method),
        "score_name": directions.score_name,
        "names": json.dumps(directions.names),
        "stars": json.dumps(directions.stars),
        "reach": json.dumps(directions.natural_std),
        "densities": json.dumps(directions.densities),
    }
    if directions.stops:
        metadata |= {"interval": json.dumps(directions.intervals), "stops": json.dumps(directions.stops)}
    tensors = {"vectors": directions.vectors, "scores": directions.scores}
    return _content(name, "directions", tensors, metadata, directions.provenance, directions.width)


def _content(name: str, kind: str, tensors: Tensors, specific: Metadata, provenance: Provenance, width: int) -> bytes:
    """The bytes of a file, once they are checked as a reader would check them."""
    metadata = {key: value for key, value in provenance.extra.items() if key not in _KNOWN[kind]}
    metadata |= {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "project_version": __version__,
        "family": provenance.family,
        "d": str(width),
        "rows": json.dumps(provenance.rows),
        "prompt": provenance.prompt,
        "concept": provenance.concept,
        "tokens": json.dumps(provenance.tokens),
        "token_norm": repr(float(provenance.token_norm)),
        "sigma": json.dumps(provenance.sigma),
        "count": str(provenance.count),
        "seed": str(provenance.seed),
        "host": provenance.host,
        "latent_values": str(provenance.latent_values),
        "seeds": json.dumps(provenance.seeds),
        **specific,
    }
    layout = _LAYOUTS[kind]
    tensors = {key: tensor.detach().to("cpu", _TYPES[layout[key][0]]) for key, tensor in tensors.items()}
    try:
        content = encode(tensors, metadata)
        _check_header(name, kind, *header(name, io.BytesIO(content), len(content)))
        check_values(name, kind, tensors)
    except ElrondError as error:
        raise ElrondError(f"Nothing was written: {error}") from error
    return content


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Make the folder of a file and keep other writers out of it.

    Raises:
        ElrondError: for whatever the disk refuses in the block.
    """
    try:
        make_folder(path.parent)
        remove_abandoned(path.parent)
        with locked(path.parent):
            yield
    except OSError as error:
        raise ElrondError(f"{path.name} could not be written: {reason(error)}.") from error


def _put(path: Path, content: bytes, overwrite: bool) -> Path:
    target, number = path, 1
    while True:
        if overwrite or not os.path.lexists(target):
            try:
                atomic_write(target, content, overwrite=overwrite)
                return target
            except FileExistsError:
                # Another program, which does not ask for the lock, was faster.
                if overwrite:
                    raise
        number += 1
        target = path.with_name(f"{path.stem}-{number}{path.suffix}")


def _read(path: Path, kind: str, family: str | None, width: int | None) -> tuple[Tensors, Metadata, Provenance]:
    about: list[tuple[Provenance, int]] = []

    def check(name: str, entries: Entries, metadata: Metadata) -> None:
        provenance, d = _check_header(name, kind, entries, metadata)
        if (family is not None and family != provenance.family) or (width is not None and width != d):
            wanted = " ".join(([family] if family else []) + ([f"of width {width}"] if width else []))
            raise ElrondError(f"{name} is for {plain(provenance.family)} of width {d}, and this model is {wanted}.")
        about.append((provenance, d))

    try:
        tensors, metadata = read(path, check)
    except FileNotFoundError as error:
        raise NotFoundError(f"There is no file {path.name}.") from error
    check_values(path.name, kind, tensors)
    return tensors, metadata, about[0][0]


def _check_header(name: str, kind: str, entries: Entries, metadata: Metadata) -> tuple[Provenance, int]:
    """Everything that a header says, before a tensor is read; returns where the tensors come from, and d."""
    if "kind" not in metadata or "format_version" not in metadata:
        raise ElrondError(f"{name} was not written by ELROND: it does not say what kind of file it is.")
    version = metadata["format_version"]
    if version not in READABLE:
        raise ElrondError(
            f"{name} has format version {plain(version)}, and this ELROND reads {' and '.join(READABLE)}: update it."
        )
    if metadata["kind"] != kind:
        raise ElrondError(f"{name} holds {plain(metadata['kind'])}, not {kind}.")
    needed = _KEYS[kind] if version == "1" else _KEYS[kind] | {CHECKSUM}
    missing = sorted(needed - set(metadata))
    if missing:
        raise ElrondError(f"{name} is incomplete: its metadata lacks {', '.join(missing)}.")

    lengths = _check_layout(name, kind, entries)
    provenance = _provenance(name, kind, metadata)
    d = _integer(metadata, "d", name)
    if lengths["d"] != d:
        raise ElrondError(f"{name} says its width is {d}, and its vectors have {lengths['d']} values.")
    if "N" in lengths and lengths["N"] != provenance.count:
        raise ElrondError(f"{name} says it is of {provenance.count} gradients, and has {lengths['N']}.")
    # What moves all rows of a concept alike has one row, and may have been made for a concept of several.
    rows = list(provenance.rows)
    if rows and len(rows) != lengths["R"] != 1:
        raise ElrondError(f"{name} says it is of {len(rows)} rows, {shown(rows)}, and its vectors have {lengths['R']}.")
    if "K" in lengths:
        _described(name, metadata, lengths["K"])
    return provenance, d


def _check_layout(name: str, kind: str, entries: Entries) -> dict[str, int]:
    """Compare the header's tensors with the layout of the kind; return the lengths by letter."""
    layout = _LAYOUTS[kind]
    needed = set(layout) - _OPTIONAL_TENSORS
    if not needed <= set(entries) <= set(layout):
        present = ", ".join(plain(key) for key in sorted(entries)[:10])
        raise ElrondError(f"{name} should hold the tensors {', '.join(sorted(needed))}, and holds {present}.")
    lengths: dict[str, int] = {}
    for key, (dtype, letters) in layout.items():
        if key not in entries:
            continue
        entry = entries[key]
        agrees = entry["dtype"] == dtype and len(entry["shape"]) == len(letters)
        for letter, length in zip(letters, entry["shape"], strict=False):
            agrees = agrees and lengths.setdefault(letter, length) == length
        if not agrees:
            raise ElrondError(f"{name} has a tensor {key!r} of the wrong type or shape, {shown(entry['shape'])}.")
    if not all(length or letter == "M" for letter, length in lengths.items()):
        raise ElrondError(f"{name} is empty.")
    return lengths


def _provenance(name: str, kind: str, metadata: Metadata) -> Provenance:
    rows, tokens = _decode(metadata, "rows", name), _decode(metadata, "tokens", name)
    sigma = _decode(metadata, "sigma", name)
    seeds = _decode(metadata, "seeds", name) if "seeds" in metadata else []
    try:
        token_norm = float(metadata["token_norm"])
    except ValueError:
        token_norm = math.nan
    texts = list_of(tokens, str) and all(map(is_text, [*tokens, *metadata.values()])) and 0 < token_norm < math.inf
    if not (texts and numbers(sigma) and all(list_of(whole, int) and numbers(whole) for whole in (rows, seeds))):
        raise ElrondError(f"{name} has seeds, rows, tokens, sigma or token_norm that cannot be understood.")
    return Provenance(
        family=metadata["family"],
        prompt=metadata["prompt"],
        concept=metadata["concept"],
        tokens=tuple(tokens),
        rows=tuple(rows),
        token_norm=token_norm,
        sigma=tuple(float(level) for level in sigma),
        count=_integer(metadata, "count", name),
        seed=_integer(metadata, "seed", name),
        host=metadata["host"],
        latent_values=_integer(metadata, "latent_values", name) if "latent_values" in metadata else 0,
        seeds=tuple(seeds),
        extra={key: value for key, value in metadata.items() if key not in _KNOWN[kind]},
    )


def _described(name: str, metadata: Metadata, count: int) -> dict[str, Any]:
    """What the metadata say of `count` directions, as attributes of `Directions`."""
    method = _decode(metadata, "method", name)
    names, stars = _decode(metadata, "names", name), _decode(metadata, "stars", name)
    reach, densities = (_decode(metadata, key, name) if key in metadata else [] for key in ("reach", "densities"))
    good = isinstance(method, dict) and all(isinstance(value, str) for value in method.values())
    good = good and all(map(is_text, [*method, *method.values()]))
    good = good and list_of(names, str, count) and list_of(stars, bool, count)
    good = good and numbers(reach) and numbers(densities, most=1)
    if not (good and {len(reach), len(densities)} <= {0, count}):
        raise ElrondError(
            f"{name} has a method, names, stars, reach or densities that do not fit its {count} directions."
        )
    interval, stops = (_decode(metadata, key, name) if key in metadata else [] for key in ("interval", "stops"))
    if not is_calibration(interval, stops, count):
        raise ElrondError(f"{name} has an interval or stops that are no calibration of its {count} directions.")
    for index, text in enumerate(names):
        unfit = next((character for character in text if unicodedata.category(character) in _NOT_IN_NAMES), None)
        if unfit is not None:
            raise ElrondError(f"{name}: the name of direction {index} has U+{ord(unfit):04X} in it; take it out.")
    return {
        "method": method,
        "score_name": metadata["score_name"],
        "names": tuple(names),
        "stars": tuple(stars),
        "natural_std": tuple(map(float, reach)),
        "densities": tuple(map(float, densities)),
        "intervals": tuple((float(low), float(high)) for low, high in interval),
        "stops": tuple(tuple(map(float, row)) for row in stops),
    }


def _decode(metadata: Metadata, key: str, name: str) -> Any:
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise ElrondError(f"{name} has a {key} that is not JSON.") from error


def _integer(metadata: Metadata, key: str, name: str) -> int:
    # What int() reads goes further: signs, underscores, other scripts.
    if not re.fullmatch("[0-9]{1,20}", metadata[key]):
        raise ElrondError(f"{name} has a {key} that is not a whole number of zero or more.")
    return int(metadata[key])


def check_values(name: str, kind: str, tensors: Tensors) -> None:
    """What tensors hold, beyond their types and shapes."""
    for key, tensor in tensors.items():
        whole = tensor.dtype == torch.int64
        row = _first_row(tensor, (lambda block: block < 0) if whole else (lambda block: ~block.isfinite()))
        if row is not None:
            raise ElrondError(f"{name}: row {row} of {key} is {'negative' if whole else 'not finite'}.")
    if kind == "directions":
        norms = tensors["vectors"].flatten(1).norm(dim=1)
        far = (norms - 1).abs() > NORM_TOLERANCE
        if far.any():
            index = int(far.long().argmax())
            raise ElrondError(f"{name}: direction {index} has norm {float(norms[index]):.4g} instead of 1.")


def _first_row(tensor: torch.Tensor, bad: Callable[[torch.Tensor], torch.Tensor]) -> int | None:
    """The first row of a tensor (N, …) in which a value is bad."""
    rows = max(1, _BLOCK // tensor.shape[1:].numel())
    for number, block in enumerate(tensor.split(rows)):
        bad_rows = bad(block)[..., None].flatten(1).any(1)
        if bad_rows.any():
            return number * rows + int(bad_rows.long().argmax())
    return None
