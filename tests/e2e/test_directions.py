"""Sweeping, labelling, composing and measuring on the running server, and what the panel asks it."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo.server import Server, ServerError
from elrond_core.storage.format import load_directions, save_directions

SHIPPED = Path(__file__).parents[2] / "demo" / "directions" / "demo person.safetensors"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def sweep(**changes: Any) -> dict[str, Any]:
    """Two labelled directions on a contact sheet, and how different its images are."""
    settings: dict[str, Any] = {"which": "", "lowest": -0.6, "highest": 0.6, "columns": 3, "unit": "token norms"}
    settings |= {"width": 64, "height": 64, "seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler"}
    settings |= {"scheduler": "simple", "batch_size": 3, "cell": 96, "concept": "", "thumbnails": True, **changes}
    words = "red, green, blue, small, large, left, right, top, bottom, dark, bright, round, square"
    return {
        "model": node("ElrondLoadDemoModel", name="teacher"),
        "encode": node("ElrondEncodeConcept", clip=["model", 1], prompt="a [person]", concept="", occurrence=1),
        "load": node("ElrondLoadDirections", name="demo person"),
        "some": node(
            "ElrondComposeDirections", directions=["load", 0], operation="subset", which="0-1", weights="", names=""
        ),
        "label": node(
            "ElrondLabelDirections",
            clip=["model", 1],
            directions=["some", 0],
            words=words,
            least=0.05,
            replace=True,
            names="",
        ),
        "names": node("PreviewAny", source=["label", 1]),
        "sweep": node(
            "ElrondDirectionSweep",
            **{"model": ["model", 0], "positive": ["encode", 0], "directions": ["label", 0], "vae": ["model", 2]},
            **settings,
        ),
        "sheet": node("PreviewImage", images=["sweep", 0]),
        "measure": node("ElrondMeasureDiversity", images=["sweep", 1]),
        "vendi": node("PreviewAny", source=["measure", 1]),
        "report": node("PreviewAny", source=["measure", 3]),
    }


def ask(server: Server, path: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, Any]:
    """Status and answer of a request to the panel's routes."""
    request = urllib.request.Request(server.url + path, body, {"Content-Type": kind})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as reply:
            data = reply.read()
            return reply.status, data if reply.headers["Content-Type"] == "image/png" else json.loads(data)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def thumbnails(server: Server) -> list[str]:
    """Where the panel finds a picture of each direction of the shipped file; empty where there is none."""
    status, told = ask(server, "/elrond/directions?name=demo%20person")
    assert status == 200 and told["concept"] == "person"
    return [entry["thumbnail"] for entry in told["directions"]]


def test_directions_are_labelled_swept_and_measured(server: Server) -> None:
    done: list[tuple[str, float]] = []
    before = thumbnails(server)
    outputs = server.run(sweep(), on_progress=lambda name, share: done.append((name, share)))
    names = outputs["names"]["text"][0].splitlines()
    assert len(names) == 2 and all("→" in line or "←" in line for line in names)
    (file,) = outputs["sheet"]["images"]
    sheet = np.asarray(Image.open(io.BytesIO(server.view(file))).convert("RGB"))
    assert sheet.shape[0] > 2 * 96 and sheet.shape[1] > 3 * 96
    assert 1 < float(outputs["vendi"]["text"][0]) <= 6
    assert "6 images, compared by their pixels" in outputs["report"]["text"][0]
    assert any(name == "ElrondDirectionSweep" and 0 < share < 1 for name, share in done)

    # The panel now has pictures of those two, whatever file they are in.
    pictures = thumbnails(server)
    assert all(pictures[:2]) and pictures[:2] != before[:2] and pictures[2:] == before[2:]
    status, data = ask(server, "/api" + pictures[0])
    assert status == 200
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (192, 64)


def test_a_sweep_can_be_cancelled(server: Server) -> None:
    graph = sweep(columns=33, steps=50, batch_size=1, seed=2)
    told: list[float] = []

    def stop(name: str, share: float) -> None:
        if name == "ElrondDirectionSweep" and share > 0 and not told:
            told.append(share)
            server.interrupt()

    with pytest.raises(ServerError, match="interrupted"):
        server.run(graph, on_progress=stop)


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("sweep", {"which": "0, 7"}, "There are no directions 7: this set holds 0 to 1"),
        ("sweep", {"lowest": 0.5, "highest": 0.5}, "The strengths must go from low to high"),
        ("sweep", {"cfg": 4.0}, r"A cfg of 4\.0 needs a negative prompt"),
        ("some", {"which": "0-99"}, "There are no directions 0-99"),
        ("some", {"weights": "1, 1"}, "Weights belong to a weighted sum"),
        ("label", {"words": "red"}, "at least two words"),
        ("label", {"names": "a\nb\nc"}, "3 names for 2 directions"),
        ("measure", {"images": ["single", 0]}, "at least two images in the batch, got 1"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(server: Server, kind: str, changes: dict[str, Any], sentence: str) -> None:
    graph = sweep()
    graph["single"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0)
    graph[kind]["inputs"].update(changes)
    with pytest.raises(ServerError, match=sentence) as caught:
        server.run(graph)
    assert caught.value.node_id == kind
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_names_and_stars_go_to_the_file(server: Server) -> None:
    path = server.output / "elrond" / "directions" / "panel" / "mine.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_directions(load_directions(SHIPPED), path)
    assert "panel/mine" in ask(server, "/elrond/files")[1]["names"]
    change = {"name": "panel/mine", "index": 1, "label": "größer", "star": True}
    status, told = ask(server, "/elrond/directions", json.dumps(change).encode())
    assert status == 200
    assert (told["directions"][1]["label"], told["directions"][1]["star"]) == ("größer", True)
    kept = load_directions(path)
    assert (kept.names[1], kept.stars[1]) == ("größer", True)


@pytest.mark.parametrize("name", ["../gradients/plain", "/etc/passwd", "..\\x", "", "a:b", "panel/../../x", "no such"])
def test_no_other_file_can_be_read_or_written(server: Server, name: str) -> None:
    for reply in (
        ask(server, "/elrond/directions?" + urllib.parse.urlencode({"name": name})),
        ask(server, "/elrond/directions", json.dumps({"name": name, "index": 0, "star": True}).encode()),
    ):
        assert reply[0] in (400, 404) and reply[1]["error"].endswith(".")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"name": 1, "index": 0}',
        b'{"name": "demo person", "index": true}',
        b'{"name": "x", "index": 1e9}',
    ],
)
def test_other_requests_are_refused(server: Server, body: bytes) -> None:
    assert ask(server, "/elrond/directions", body)[0] == 400


def test_forms_of_other_sites_and_other_pictures_are_refused(server: Server) -> None:
    change = b'{"name": "demo person", "index": 0, "star": true}'
    assert ask(server, "/elrond/directions", change, "text/plain")[0] == 400
    for digest in ("../../x", "", "0" * 23, "g" * 24):
        assert ask(server, "/elrond/thumbnail?" + urllib.parse.urlencode({"digest": digest}))[0] == 400
    assert ask(server, "/elrond/thumbnail?digest=" + "0" * 24)[0] == 404
