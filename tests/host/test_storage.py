"""The pack's files as the host's nodes and the panel see them: lists, names, full disks, and requests of any kind."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from comfyui_elrond.elrond_core.directions import Directions
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.provenance import Provenance
from comfyui_elrond.elrond_core.storage.format import load_directions, save_directions
from comfyui_elrond.nodes import files, host, routes

posix = pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")


def directions(name: str = "") -> Directions:
    vectors = torch.eye(4)[:2, None]
    return Directions(vectors, torch.ones(2), {"name": "pca"}, Provenance("Demo", "a person", "person"), (name, ""))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of directions in an output folder of the test's own."""
    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    (tmp_path / "elrond" / "directions").mkdir(parents=True)
    yield tmp_path / "elrond" / "directions"
    folder_paths.set_output_directory(before)


def own(folder: Path) -> set[str]:
    """What is listed, less what ships with the demo."""
    shipped = {path.stem for path in (host.file_folders()[-1] / "directions").iterdir()}
    return set(files.listed("directions")) - shipped


@posix
def test_only_files_that_can_be_loaded_are_listed(nodes: dict[str, Any], folder: Path) -> None:
    """One dangling link in the output folder must not keep the pack from being imported."""
    save_directions(directions(), folder / "good.safetensors")
    save_directions(directions(), folder / "animals" / "cat.safetensors")
    (folder / "dangling.safetensors").symlink_to(folder / "nowhere")
    (folder / "circle.safetensors").symlink_to(folder / "circle.safetensors")
    (folder / "outside.safetensors").symlink_to(Path(__file__))
    (folder / "linked.safetensors").symlink_to(folder / "good.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / "hidden\u200bname.safetensors").write_bytes(b"")
    os.mkfifo(folder / "pipe.safetensors")
    Path(os.fsdecode(bytes(folder) + b"/latin\xe9.safetensors")).write_bytes(b"")
    assert own(folder) == {"good", "animals/cat", "linked"}
    schema = nodes["ElrondLoadDirections"].define_schema()
    assert "good" in schema.inputs[0].options and json.dumps(schema.inputs[0].options)
    assert nodes["ElrondLoadDirections"].execute("linked").args[0].provenance.concept == "person"
    for name in ("dangling", "pipe", "folder"):
        assert "There is no directions file" in nodes["ElrondLoadDirections"].validate_inputs(name)
        assert nodes["ElrondLoadDirections"].fingerprint_inputs(name) == "missing"


def test_files_that_vanish_while_they_are_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        save_directions(directions(), folder / f"{name}.safetensors")
    is_file = Path.is_file

    def vanishing(path: Path, **options: Any) -> bool:
        found = is_file(path, **options)
        if path.name == "one.safetensors":
            path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "is_file", vanishing)
    assert own(folder) == {"two"}


def test_a_long_list_is_shortened_in_the_sentence(folder: Path) -> None:
    for number in range(300):
        (folder / f"{'x' * 100}{number}.safetensors").write_bytes(b"")
    with pytest.raises(ElrondError, match=r"There is no directions file 'none' .* and \d+ more\.$") as caught:
        files.find("directions", "none")
    assert len(str(caught.value)) < 3000


def test_a_name_that_is_taken_gets_a_number(nodes: dict[str, Any], folder: Path) -> None:
    save = nodes["ElrondSaveDirections"].execute
    longest = "x" * 200
    for name, expected in (("cat", "cat"), ("cat", "cat-2"), (longest, longest), (longest, f"{longest}-2")):
        assert save(directions(), name, False).args[1] == expected
        assert len(nodes["ElrondLoadDirections"].execute(expected).args[0]) == 2
    assert save(directions("new"), "cat", True).args[1] == "cat"
    assert load_directions(folder / "cat.safetensors").names[0] == "new"


@pytest.mark.parametrize(
    ("number", "sentence"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "may not be written to")],
)
@pytest.mark.parametrize("step", ["mkdir", "fsync"])
def test_a_save_that_the_disk_refuses_is_a_sentence(
    nodes: dict[str, Any], folder: Path, number: int, sentence: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    monkeypatch.setattr(Path if step == "mkdir" else os, step, refuse)
    with pytest.raises(ElrondError, match=rf"^x\.safetensors could not be written: .*{sentence}") as caught:
        nodes["ElrondSaveDirections"].execute(directions(), "new/x", False)
    assert str(folder) not in str(caught.value) and str(caught.value).endswith(".")


def test_a_change_from_the_panel_keeps_what_was_saved_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that saves between the panel's look and its change loses nothing: the change is made to what it saved."""
    path = folder / "shared.safetensors"
    save_directions(directions("old"), path)
    find = files.find

    def then_saved(*arguments: Any) -> Path:
        found = find(*arguments)
        save_directions(replace(directions("new"), score_name="saved meanwhile"), path)
        return found

    monkeypatch.setattr(files, "find", then_saved)
    routes.change("shared", 1, "round", True)
    kept = load_directions(path)
    assert (kept.names, kept.stars, kept.score_name) == (("new", "round"), (False, True), "saved meanwhile")


def answers(*requests: tuple[str, str, dict[str, Any]]) -> list[tuple[int, Any]]:
    """Status and answer of each request to the panel's routes."""

    async def asked() -> list[tuple[int, Any]]:
        app, table = web.Application(), web.RouteTableDef()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host, "routes", lambda: table)
            routes.register()
        app.add_routes(table)
        async with TestClient(TestServer(app)) as client:
            found = []
            for method, path, options in requests:
                async with client.request(method, path, **options) as reply:
                    found.append((reply.status, await reply.json()))
            return found

    return asyncio.run(asked())


def posted(body: bytes | Any, kind: str = "application/json") -> tuple[str, str, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return "POST", "/elrond/directions", {"data": data, "headers": {"Content-Type": kind}}


def star(name: Any = "mine", **changes: Any) -> dict[str, Any]:
    return {"name": name, "index": 0, "star": True, **changes}


BODIES = [
    posted(star("\ud800")),
    posted(star("x" * 60000)),
    posted(star("a/" * 20000)),
    posted(star("x" * 2**20)),
    posted(star("a\0b")),
    posted(star("\u202emine")),
    posted(star(label="\ud800")),
    posted(star(label="x" * 60000)),
    posted(star(label="\u202egpj")),
    posted(star(index=10**30)),
    posted(star(index=-1)),
    posted(star(index=True)),
    posted(star(label=["x"])),
    posted(b"[" * 60000),
    posted(b'{"name": ' * 5000),
    posted(b"\xff\xfe"),
    posted(b'{"index": ' + b"9" * 60000 + b"}"),
    posted(json.dumps(star()).encode("utf-16")),
    posted(json.dumps(star("none")).encode(), "application/json; charset=bogus"),
    posted(b"\xff", "application/json; charset=latin-1"),
]
NAMES = ["%ED%A0%80", "%00", "a%0Ab", "%FF%FE", "x" * 5000, "a/" * 2000, "%E2%80%AEx", "mine%00.safetensors", ""]


def test_no_request_is_a_fault_of_the_server(folder: Path) -> None:
    save_directions(directions(), folder / "mine.safetensors")
    before = (folder / "mine.safetensors").read_bytes()
    asked = [
        ("GET", f"/elrond/{kind}", {})
        for name in NAMES
        for kind in (f"directions?name={name}", f"length?name={name}&strengths=0:1", f"thumbnail?digest={name}")
    ]
    for request, (status, answer) in zip([*BODIES, *asked], answers(*BODIES, *asked), strict=True):
        assert status in (400, 404), (request[1][:80], status)
        assert answer["error"].endswith(".") and len(answer["error"]) < 3000
    assert (folder / "mine.safetensors").read_bytes() == before
    (status, answer), (again, _) = answers(
        posted(star()), posted(json.dumps(star()).encode(), "application/json; charset=x")
    )
    assert status == again == 200 and answer["directions"][0]["star"] is True


def test_what_is_not_there_is_told_by_the_kind_of_error(folder: Path) -> None:
    """And not by words of the message, which repeats what was asked."""
    save_directions(directions(), folder / "mine.safetensors")
    found = answers(
        ("GET", "/elrond/directions?name=There%20is%20no%20<", {}),
        ("GET", "/elrond/length?name=mine&strengths=There%20is%20no", {}),
        ("GET", "/elrond/directions?name=other", {}),
        ("GET", "/elrond/length?name=mine&strengths=99:%201", {}),
        posted(star(index=99)),
        posted(star("other")),
        ("GET", "/elrond/length?name=mine&strengths=0:%20-0.5", {}),
    )
    assert [status for status, _ in found] == [400, 400, 404, 404, 404, 404, 200]
    assert all("There is no" in answer["error"] for _, answer in found[:-1])
    assert found[-1][1] == {"length": pytest.approx(0.5)}


def test_a_thumbnail_that_may_not_be_read_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(Path, "is_file", refuse)
    ((status, answer),) = answers(("GET", f"/elrond/thumbnail?digest={'a' * 24}", {}))
    assert status == 404 and "no such thumbnail" in answer["error"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "pipe"])
def test_a_damaged_file_is_a_sentence_in_the_panel(folder: Path, damage: str) -> None:
    path = folder / "mine.safetensors"
    save_directions(directions(), path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:-1])
    if damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    for status, answer in answers(("GET", "/elrond/directions?name=mine", {}), posted(star())):
        assert status in (400, 404) and answer["error"].endswith(".")


def test_names_reach_the_panel_as_they_are_in_the_file(folder: Path) -> None:
    names = ("<img src=x onerror=alert(1)>", "\u202egpj" + "x" * 65536)
    save_directions(replace(directions(), names=names), folder / "mine.safetensors")
    ((status, answer),) = answers(("GET", "/elrond/directions?name=mine", {}))
    assert status == 200 and tuple(entry["label"] for entry in answer["directions"]) == names
