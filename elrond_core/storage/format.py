"""Directions, gradients and moments as files: safetensors, never pickle; docs/format.md describes the format."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save

from .. import __version__
from ..decompose.moments import Moments
from ..directions import Directions
from ..errors import ElrondError
from ..gradients import Gradients
from ..provenance import Provenance
from .atomic_write import atomic_write

FORMAT_VERSION = "1"
NORM_TOLERANCE = 1e-3
_MAX_HEADER = 4 * 2**20
_TYPES = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}

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
    "moments": {"shape": ("I64", "s"), "mean": ("F64", "P"), "scatter": ("F64", "PP")},
}
_COMMON = {"format_version", "kind", "project_version", "family", "d", "rows", "prompt", "concept", "tokens"}
_COMMON |= {"token_norm", "sigma", "count", "seed", "host"}
# Files of earlier releases lack them.
_OPTIONAL = {"latent_values", "seeds", "reach", "densities"}
# Only where there are several noise levels.
_OPTIONAL_TENSORS = {"response_sigma"}
_KEYS = {
    "directions": _COMMON | {"method", "score_name", "names", "stars"},
    "gradients": _COMMON,
    "moments": _COMMON,
}


def save_directions(directions: Directions, path: Path) -> None:
    """Write a directions file, whole or not at all.

    Raises:
        ElrondError: if the directions are not finite unit vectors, something does not fit the format, or the file
            cannot be written.
    """
    metadata = {
        "method": json.dumps(directions.method),
        "score_name": directions.score_name,
        "names": json.dumps(directions.names),
        "stars": json.dumps(directions.stars),
        "reach": json.dumps(directions.reach),
        "densities": json.dumps(directions.densities),
    }
    tensors = {"vectors": directions.vectors, "scores": directions.scores}
    _write(path, "directions", tensors, metadata, directions.provenance, directions.width)


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
    return Directions(vectors, scores, provenance=provenance, **_described(path, metadata, len(vectors)))


def save_gradients(gradients: Gradients, path: Path) -> None:
    """Write a gradients file, whole or not at all.

    Raises:
        ElrondError: if a gradient is not finite, something does not fit the format, or the file cannot be written.
    """
    tensors = {name: getattr(gradients, name) for name in _LAYOUTS["gradients"]}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    provenance = gradients.provenance.with_(count=len(gradients))
    _write(path, "gradients", tensors, {}, provenance, gradients.vectors.shape[2])


def load_gradients(path: Path, *, family: str | None = None, width: int | None = None) -> Gradients:
    """Read a gradients file; arguments and errors as for `load_directions`."""
    tensors, _, provenance = _read(path, "gradients", family, width)
    return Gradients(provenance=provenance, **tensors)


def save_moments(moments: Moments, path: Path) -> None:
    """Write a moments file, whole or not at all.

    Raises:
        ElrondError: if the moments are not finite, something does not fit the format, or the file cannot be written.
    """
    _write(path, "moments", moments.tensors(), {}, moments.provenance.with_(count=moments.count), moments.width)


def load_moments(path: Path, *, family: str | None = None, width: int | None = None) -> Moments:
    """Read a moments file; arguments and errors as for `load_directions`."""
    tensors, _, provenance = _read(path, "moments", family, width)
    return Moments.from_tensors(tensors, provenance)


_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{i}" for port in ("COM", "LPT") for i in range(10))}
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*]')


def safe_path(folder: Path, name: str, suffix: str = ".safetensors") -> Path:
    """Where a file that a person named belongs: inside `folder`, in subfolders if the name has slashes.

    Names that another operating system could not store are refused too, since files travel.

    Args:
        folder: the folder that the file must not leave.
        name: such as "monster" or "animals/dog", with or without the suffix.
        suffix: added where it is missing.

    Raises:
        ElrondError: if the name is empty or too long, leaves the folder, or has a character or part that no file may.
    """
    shown = name if len(name) <= 80 else name[:77] + "..."
    refused = ElrondError(
        f"{shown!r} cannot be a file name here: use letters, digits, spaces, - and _ in a subfolder/name."
    )
    parts = name.strip().replace("\\", "/").removesuffix(suffix).split("/")
    for part in parts:
        if not part.strip(". ") or part != part.rstrip(". ") or _FORBIDDEN.search(part):
            raise refused
        if part.split(".")[0].rstrip().upper() in _RESERVED or len(part.encode(errors="replace")) > 200:
            raise refused
    path = folder.joinpath(*parts[:-1], parts[-1] + suffix)
    # A link inside the folder may still point out of it.
    if not path.resolve().is_relative_to(folder.resolve()):
        raise refused
    return path


def _write(
    path: Path, kind: str, tensors: dict[str, torch.Tensor], own: dict[str, str], provenance: Provenance, width: int
) -> None:
    metadata = {key: value for key, value in provenance.extra.items() if key not in _KEYS[kind] | _OPTIONAL}
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
        **own,
    }
    tensors = _plain(kind, tensors)
    content = save(tensors, metadata)
    try:
        _check_header(path, kind, _parsed(path, io.BytesIO(content), len(content)))
        _check_values(path, kind, tensors, provenance, width)
    except ElrondError as error:
        raise ElrondError(f"Nothing was written: {error}") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
    except OSError as error:
        raise ElrondError(f"{path.name} could not be written: {error.strerror or error}.") from error


def _plain(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the types in the file, each with memory of its own, without which the library does not take them."""
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        own = tensor.detach().to("cpu", _TYPES[_LAYOUTS[kind][name][0]]).contiguous()
        memory = own.untyped_storage().data_ptr()
        shared = memory in {other.untyped_storage().data_ptr() for other in plain.values()}
        plain[name] = own.clone() if shared else own
    return plain


def _read(
    path: Path, kind: str, family: str | None, width: int | None
) -> tuple[dict[str, torch.Tensor], dict[str, str], Provenance]:
    header = _read_header(path)
    metadata, provenance, d = _check_header(path, kind, header)
    if (family is not None and family != provenance.family) or (width is not None and width != d):
        wanted = " ".join(([family] if family else []) + ([f"of width {width}"] if width else []))
        raise ElrondError(f"{path.name} is for {provenance.family} of width {d}, and this model is {wanted}.")

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in header}
    except Exception as error:  # The library raises its own, undocumented types.
        raise ElrondError(f"{path.name} is damaged: {str(error).rstrip('.')}.") from error
    _check_values(path, kind, tensors, provenance, d)
    return tensors, metadata, provenance


def _check_header(path: Path, kind: str, header: dict[str, Any]) -> tuple[dict[str, str], Provenance, int]:
    """Everything that a header says, before a tensor is read; takes the metadata out of it and returns them and d."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ElrondError(f"{path.name} has metadata that is not text.")
    if "kind" not in metadata or "format_version" not in metadata:
        raise ElrondError(f"{path.name} was not written by ELROND: it does not say what kind of file it is.")
    if metadata["format_version"] != FORMAT_VERSION:
        raise ElrondError(
            f"{path.name} has format version {metadata['format_version']}, and this ELROND reads version "
            f"{FORMAT_VERSION}: update it."
        )
    if metadata["kind"] != kind:
        raise ElrondError(f"{path.name} holds {metadata['kind']}, not {kind}.")
    missing = sorted(_KEYS[kind] - set(metadata))
    if missing:
        raise ElrondError(f"{path.name} is incomplete: its metadata lacks {', '.join(missing)}.")

    lengths = _check_layout(path, kind, header)
    provenance = _provenance(path, kind, metadata)
    d = _integer(metadata, "d", path)
    if "d" in lengths and lengths["d"] != d:
        raise ElrondError(f"{path.name} says its width is {d}, and its vectors have {lengths['d']} values.")
    if "N" in lengths and lengths["N"] != provenance.count:
        raise ElrondError(f"{path.name} says it is of {provenance.count} gradients, and has {lengths['N']}.")
    if "R" in lengths:
        _check_rows(path, provenance, lengths["R"])
    if kind == "directions":
        _described(path, metadata, lengths["K"])
    return metadata, provenance, d


def _read_header(path: Path) -> dict[str, Any]:
    """The JSON header, before anything else is read or allocated."""
    try:
        with path.open("rb") as file:
            return _parsed(path, file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError as error:
        raise ElrondError(f"There is no file {path.name}.") from error
    except OSError as error:
        raise ElrondError(f"{path.name} could not be read: {error.strerror or error}.") from error


def _parsed(path: Path, file: BinaryIO, size: int) -> dict[str, Any]:
    damaged = f"{path.name} is not a safetensors file, or is cut short."
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ElrondError(damaged)
    if length > _MAX_HEADER:
        raise ElrondError(f"{path.name} has a header of {length} bytes, and {_MAX_HEADER} is the most.")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ElrondError(damaged) from error
    if not isinstance(header, dict):
        raise ElrondError(damaged)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not _sound(entry, size - 8 - length):
            raise ElrondError(f"{path.name} is damaged: its tensor {name!r} does not fit the file.")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a repeated key is how one reader is shown another file than the next."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("repeated key")
    return result


def _sound(entry: Any, available: int) -> bool:
    """Whether a tensor's type, shape and place in the file agree with one another."""
    match entry:
        case {"dtype": "F32" | "F64" | "I64" as dtype, "shape": list(shape), "data_offsets": [start, end]}:
            size = _TYPES[dtype].itemsize
            whole = all(type(x) is int and x >= 0 for x in (*shape, start, end))  # A bool is an int to isinstance.
            return whole and len(shape) <= 3 and end <= available and math.prod(shape) * size == end - start
    return False


def _check_layout(path: Path, kind: str, header: dict[str, Any]) -> dict[str, int]:
    """Compare the header's tensors with the layout of the kind; return the lengths by letter."""
    layout = _LAYOUTS[kind]
    needed = set(layout) - _OPTIONAL_TENSORS
    if not needed <= set(header) <= set(layout):
        raise ElrondError(
            f"{path.name} should hold the tensors {', '.join(sorted(needed))}, and holds {', '.join(sorted(header))}."
        )
    lengths: dict[str, int] = {}
    for name, (dtype, letters) in layout.items():
        if name not in header:
            continue
        entry = header[name]
        agrees = entry["dtype"] == dtype and len(entry["shape"]) == len(letters)
        for letter, length in zip(letters, entry["shape"], strict=False):
            agrees = agrees and lengths.setdefault(letter, length) == length
        if not agrees:
            raise ElrondError(f"{path.name} has a tensor {name!r} of the wrong type or shape, {entry['shape']}.")
    if not all(length or letter == "M" for letter, length in lengths.items()):
        raise ElrondError(f"{path.name} is empty.")
    return lengths


def _provenance(path: Path, kind: str, metadata: dict[str, str]) -> Provenance:
    rows, tokens = _decode(metadata, "rows", path), _decode(metadata, "tokens", path)
    sigma = _decode(metadata, "sigma", path)
    seeds = _decode(metadata, "seeds", path) if "seeds" in metadata else []
    try:
        token_norm = float(metadata["token_norm"])
    except ValueError:
        token_norm = math.nan
    texts = _list_of(tokens, str) and 0 < token_norm < math.inf
    if not (texts and _numbers(sigma) and all(_list_of(whole, int) and _numbers(whole) for whole in (rows, seeds))):
        raise ElrondError(f"{path.name} has seeds, rows, tokens, sigma or token_norm that cannot be understood.")
    return Provenance(
        family=metadata["family"],
        prompt=metadata["prompt"],
        concept=metadata["concept"],
        tokens=tuple(tokens),
        rows=tuple(rows),
        token_norm=token_norm,
        sigma=tuple(float(level) for level in sigma),
        count=_integer(metadata, "count", path),
        seed=_integer(metadata, "seed", path),
        host=metadata["host"],
        latent_values=_integer(metadata, "latent_values", path) if "latent_values" in metadata else 0,
        seeds=tuple(seeds),
        extra={key: value for key, value in metadata.items() if key not in _KEYS[kind] | _OPTIONAL},
    )


def _described(path: Path, metadata: dict[str, str], count: int) -> dict[str, Any]:
    """What the metadata say of `count` directions, as attributes of `Directions`."""
    method = _decode(metadata, "method", path)
    names, stars = _decode(metadata, "names", path), _decode(metadata, "stars", path)
    reach, densities = (_decode(metadata, key, path) if key in metadata else [] for key in ("reach", "densities"))
    good = isinstance(method, dict) and all(isinstance(value, str) for value in method.values())
    good = good and _list_of(names, str, count) and _list_of(stars, bool, count)
    good = good and _numbers(reach) and _numbers(densities, most=1)
    if not (good and {len(reach), len(densities)} <= {0, count}):
        raise ElrondError(
            f"{path.name} has a method, names, stars, reach or densities that do not fit its {count} directions."
        )
    return {
        "method": method,
        "score_name": metadata["score_name"],
        "names": tuple(names),
        "stars": tuple(stars),
        "reach": tuple(map(float, reach)),
        "densities": tuple(map(float, densities)),
    }


def _decode(metadata: dict[str, str], key: str, path: Path) -> Any:
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise ElrondError(f"{path.name} has a {key} that is not JSON.") from error


def _integer(metadata: dict[str, str], key: str, path: Path) -> int:
    # What int() reads goes further: signs, underscores, other scripts.
    if not re.fullmatch("[0-9]{1,20}", metadata[key]):
        raise ElrondError(f"{path.name} has a {key} that is not a whole number of zero or more.")
    return int(metadata[key])


def _list_of(value: Any, kind: type, count: int | None = None) -> bool:
    return isinstance(value, list) and all(type(x) is kind for x in value) and count in (None, len(value))


def _numbers(value: Any, most: float = sys.float_info.max) -> bool:
    """Whether this is a list of numbers from 0 to `most`; JavaScript writes 1.0 as 1."""
    return isinstance(value, list) and all(type(x) in (int, float) and 0 <= x <= most for x in value)


def _check_rows(path: Path, provenance: Provenance, count: int) -> None:
    # What moves all rows of a concept alike has one row, and may have been made for a concept of several.
    rows = list(provenance.rows)
    if rows and len(rows) != count != 1:
        raise ElrondError(f"{path.name} says it is of {len(rows)} rows, {rows}, and its vectors have {count}.")


def _check_values(path: Path, kind: str, tensors: dict[str, torch.Tensor], provenance: Provenance, width: int) -> None:
    """What tensors hold, beyond their types and shapes."""
    for name, tensor in tensors.items():
        finite = torch.isfinite(tensor)[..., None].flatten(1).all(1)
        if not finite.all():
            raise ElrondError(f"{path.name}: row {int(finite.long().argmin())} of {name} is not finite.")
        if tensor.dtype == torch.int64 and (tensor < 0).any():
            raise ElrondError(f"{path.name}: row {int((tensor < 0).long().argmax())} of {name} is negative.")
    if kind == "directions":
        norms = tensors["vectors"].flatten(1).norm(dim=1)
        far = (norms - 1).abs() > NORM_TOLERANCE
        if far.any():
            index = int(far.long().argmax())
            raise ElrondError(f"{path.name}: direction {index} has norm {float(norms[index]):.4g} instead of 1.")
    if kind == "moments":
        shape = tensors["shape"].tolist()
        size = len(tensors["mean"])
        if len(shape) != 3 or (shape[0], shape[2]) != (provenance.count, width) or shape[1] * width != size:
            raise ElrondError(
                f"{path.name} says it is of {provenance.count} gradients of width {width}, and has the shape {shape} "
                f"and a mean of {size} values."
            )
        _check_rows(path, provenance, shape[1])
