"""Server routes of the browser panel: directions of a file, their names and stars, their thumbnails.

    GET  /elrond/files                                    {"names": [...]}, newest first
    GET  /elrond/directions?name=NAME                     see `describe`
    POST /elrond/directions {name, index, label?, star?}  the same, after the change is written to the file
    GET  /elrond/length?name=NAME&strengths=STRENGTHS     {"length": of the whole step, see `length`}
    GET  /elrond/thumbnail?digest=DIGEST                  a PNG that Direction Sweep wrote

Errors are {"error": one sentence} with status 400 or 404.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiohttp import web

from ..elrond_core.directions import Directions
from ..elrond_core.errors import ElrondError, NotFoundError
from ..elrond_core.storage import format as files
from ..elrond_core.storage.names import safe_path
from . import files as shelf
from . import host
from .widget_text import strengths_of

KIND = "directions"
# Characters of a direction's name.
LONGEST = 100
# Zero-width joiner and non-joiner behind a character: emoji, Persian and Indic scripts need them.
_JOINED = re.compile("(?<=[^\\s\u200c\u200d])[\u200c\u200d]")
# Bytes of a request: a file's name, a direction's name and two numbers, with JSON's escapes.
_MAX_BODY = 2**16
# Above every index. Python refuses to print an integer of thousands of digits, as an error message would.
_MAX_INDEX = 2**31


def thumbnail(digest: str) -> Path:
    """Path of a direction's thumbnail, which may not exist: the user's own, or one that ships with the pack.

    Raises:
        ElrondError: if the text is no digest: nothing else becomes part of a path.
    """
    if not re.fullmatch(r"[0-9a-f]{24}", digest):
        raise ElrondError("A thumbnail is named by 24 hexadecimal digits.")
    own, shipped = (folder / "thumbnails" / f"{digest}.png" for folder in host.file_folders()[-2:])
    # Unlike `is_file`, this raises in no folder.
    return shipped if os.access(shipped, os.R_OK) and not os.access(own, os.R_OK) else own


def describe(name: str) -> dict[str, Any]:
    """A directions file for the panel.

    Raises:
        ElrondError: if there is no such file, or it is damaged.
    """
    directions = files.load_directions(shelf.find(KIND, name))
    entries = []
    for i, score in enumerate(directions.scores.tolist()):
        digest = directions.digest(i)
        picture = thumbnail(digest)
        try:
            stamp = f"{digest}&v={picture.stat().st_mtime_ns}" if picture.is_file() else ""
        except OSError:
            stamp = ""
        entries.append(
            {
                "index": i,
                "label": directions.names[i],
                "star": directions.stars[i],
                "score": score,
                "thumbnail": stamp and f"/elrond/thumbnail?digest={stamp}",
                "interval": directions.intervals[i] if directions.intervals else (0.0, 0.0),
                "stops": directions.stops[i] if directions.stops else (),
            }
        )
    return {
        "name": name,
        "concept": directions.provenance.concept,
        "score_name": directions.score_name,
        "natural": bool(directions.natural_std),
        "directions": entries,
    }


def change(name: str, index: int, label: str | None, star: bool | None) -> None:
    """Rename or star one direction of a file.

    A file that ships with the pack is not changed. The changed copy goes to the output folder, which is searched first.

    Raises:
        ElrondError: if there is no such file or direction, or the label is too long.
    """
    path = shelf.find(KIND, name)
    if label is not None and (len(label) > LONGEST or not _JOINED.sub("", label).isprintable()):
        raise ElrondError(
            f"A direction's name has at most {LONGEST} characters, all of them printable; joiners may stand behind "
            "others, as in emoji."
        )

    def renamed(directions: Directions) -> Directions:
        directions.pick(index)
        names, stars = list(directions.names), list(directions.stars)
        names[index] = names[index] if label is None else label.strip()
        stars[index] = stars[index] if star is None else star
        return replace(directions, names=tuple(names), stars=tuple(stars))

    shipped = path.is_relative_to(host.file_folders()[-1])
    target = safe_path(host.output_folder() / KIND, name) if shipped else path
    files.update_directions(target, renamed, source=path)


def length(name: str, strengths: str) -> float:
    """The length of a step along several directions of a file: the norm of their sum, whether orthogonal or not.

    Args:
        name: the file.
        strengths: as *Apply Direction* takes them; the length is in their unit.

    Raises:
        ElrondError: if there is no such file or direction, or the strengths cannot be read.
    """
    directions = files.load_directions(shelf.find(KIND, name))
    steps = [strength * directions.pick(index) for index, strength in strengths_of(strengths).items()]
    return float(sum(steps).norm()) if steps else 0.0


async def _answer(work: Callable[..., Any], *arguments: Any) -> web.Response:
    try:
        return web.json_response(await asyncio.to_thread(work, *arguments))
    except ElrondError as error:
        return web.json_response({"error": str(error)}, status=404 if isinstance(error, NotFoundError) else 400)
    except OSError as error:
        return web.json_response({"error": f"The disk does not answer: {error.strerror or error}."}, status=400)


async def get_files(request: web.Request) -> web.Response:
    """Names of all directions files."""
    return await _answer(lambda: {"names": shelf.listed(KIND)})


async def get_directions(request: web.Request) -> web.Response:
    """One directions file."""
    return await _answer(describe, request.query.get("name", ""))


async def get_length(request: web.Request) -> web.Response:
    """The length of a step."""
    name, strengths = request.query.get("name", ""), request.query.get("strengths", "")
    return await _answer(lambda: {"length": length(name, strengths)})


async def post_directions(request: web.Request) -> web.Response:
    """A new name or star."""
    # A page of another site can post a form to this address, but not JSON.
    if request.content_type != "application/json":
        return web.json_response({"error": "Send JSON."}, status=400)
    body = b""
    async for part in request.content.iter_any():
        body += part
        if len(body) > _MAX_BODY:
            return web.json_response({"error": f"Send at most {_MAX_BODY} bytes."}, status=400)
    try:
        # JSON is UTF-8, whatever the request's header says.
        edit = json.loads(body.decode())
    except (ValueError, RecursionError):
        return web.json_response({"error": "This is not JSON."}, status=400)
    good = isinstance(edit, dict) and type(edit.get("name")) is str and type(edit.get("index")) is int
    good = good and type(edit.get("label")) in (str, type(None)) and type(edit.get("star")) in (bool, type(None))
    if not good or abs(edit["index"]) >= _MAX_INDEX:
        return web.json_response({"error": "Send a name, an index, and a label or a star."}, status=400)

    def work() -> dict[str, Any]:
        change(edit["name"], edit["index"], edit.get("label"), edit.get("star"))
        return describe(edit["name"])

    return await _answer(work)


async def get_thumbnail(request: web.Request) -> web.StreamResponse:
    """A picture of what a direction does."""
    try:
        path = thumbnail(request.query.get("digest", ""))
    except ElrondError as error:
        return web.json_response({"error": str(error)}, status=400)
    # `is_file` raises in a folder that may not be read.
    if not os.access(path, os.R_OK) or not path.is_file():
        return web.json_response({"error": "There is no such thumbnail."}, status=404)
    return web.FileResponse(path, headers={"Content-Type": "image/png"})


def register() -> None:
    """Add the routes to the running server, if there is one."""
    table = host.routes()
    if table is None:
        return
    table.get("/elrond/files")(get_files)
    table.get("/elrond/directions")(get_directions)
    table.post("/elrond/directions")(post_directions)
    table.get("/elrond/length")(get_length)
    table.get("/elrond/thumbnail")(get_thumbnail)
