"""The panel where a graph has subgraphs, and with the frontend's newer way to draw nodes ("Nodes 2.0")."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demo.browser import PATIENCE, open_page, post
from demo.server import Server
from elrond_core.directions import Directions
from elrond_core.provenance import Provenance
from elrond_core.storage.format import load_directions, save_directions
from tests.e2e.pages import ROOT, overlapping, queued, shot, show

LOAD, APPLY = 3, 4
# Wraps some nodes of the root graph into a subgraph, called by its name afterwards.
WRAP = """([name, ...ids]) => {
    const nodes = new Set(ids.map((id) => window.app.graph.getNodeById(id)));
    window[name] = window.app.graph.convertToSubgraph(nodes).node;
}"""
# What the frontend does when a widget inside is put on the subgraph's face: its socket is linked to the boundary.
PROMOTE = """([name, type, widget]) => {
    const { subgraph } = window[name];
    const node = subgraph.nodes.find((each) => each.type === type);
    const input = node.inputs.find((each) => each.widget?.name === widget);
    subgraph.addInput(widget, input.type).connect(input, node);
}"""
SET = """([name, widget, value]) => {
    window[name].widgets.find((each) => each.name === widget).value = value;
}"""


@pytest.fixture
def second(server: Server) -> str:
    """A file of two directions with names of their own."""
    path = server.output / "elrond" / "directions" / "second.safetensors"
    vectors = torch.eye(128)[:2, None]
    save_directions(
        Directions(vectors, torch.ones(2), {}, Provenance("Demo", "a person", "person"), ("left", "right")), path
    )
    return "second"


@pytest.fixture
def quiet(page: Any) -> Iterator[Any]:
    """The page, of which no test may make the console complain."""
    before = len(page.said)
    yield page
    page.evaluate("() => window.app.canvas.setGraph(window.app.rootGraph ?? window.app.graph)")
    assert page.said[before:] == []


def enter(page: Any, name: str) -> None:
    """Look into a subgraph, with its panel unfolded in the middle of the view."""
    page.evaluate(
        """(name) => {
            const { subgraph } = window[name];
            const { app } = window;
            app.canvas.setGraph(subgraph);
            const node = subgraph.nodes.find((each) => each.elrondPanel);
            node.pos = [0, 0];
            node.setSize([460, node.size[1]]);
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [400, 120];
            app.canvas.setDirty(true, true);
            node.elrondPanel.root.id = `inside-${name}`;
        }""",
        name,
    )
    head = page.locator(f"#inside-{name} .elrond-head")
    head.wait_for()
    # The panel of a node that has just been moved unfolds itself once it has asked for its file.
    page.wait_for_function(
        "(name) => window[name].subgraph.nodes.find((each) => each.elrondPanel).elrondPanel.asked > 0", arg=name
    )
    page.wait_for_timeout(300)
    if head.get_attribute("aria-expanded") != "true":
        head.click()


def test_apply_direction_moves_into_a_subgraph(quiet: Any, server: Server, stored: str) -> None:
    """Its directions come from outside; the sliders inside change the picture."""
    page = quiet
    show(page, stored)
    plain = queued(page, server)
    page.evaluate(WRAP, ["outer", APPLY])
    enter(page, "outer")
    page.get_by_label("Use direction 0", exact=True).check()
    page.get_by_label("Strength of direction 0", exact=True).press("End")
    shot(page, "subgraph")
    assert np.abs(queued(page, server) - plain).max() > 20


def test_load_directions_moves_into_a_subgraph(quiet: Any, stored: str) -> None:
    page = quiet
    show(page, stored)
    page.evaluate(WRAP, ["outer", LOAD])
    page.wait_for_timeout(600)
    assert page.evaluate("() => window.app.graph.getNodeById(4).elrondPanel.file.directions.length") == 12
    page.get_by_label("Use direction 0", exact=True).check()


def test_the_boundary_may_be_crossed_twice(quiet: Any, stored: str) -> None:
    """Load Directions in one subgraph, Apply Direction in another, and that in a third."""
    page = quiet
    show(page, stored)
    page.evaluate(WRAP, ["source", LOAD])
    page.evaluate(WRAP, ["inner", APPLY])
    page.evaluate("() => { window.app.graph.convertToSubgraph(new Set([window.inner])); }")
    page.wait_for_function(
        "() => window.inner.subgraph.nodes.find((each) => each.elrondPanel).elrondPanel.file?.directions.length === 12",
        timeout=PATIENCE,
    )


def test_a_name_on_the_face_of_a_subgraph_counts(quiet: Any, server: Server, stored: str, second: str) -> None:
    """The panel inside shows and edits the file that runs, and not the one that its own widget still names."""
    page = quiet
    show(page, stored)
    page.evaluate(WRAP, ["outer", LOAD])
    page.evaluate(PROMOTE, ["outer", "ElrondLoadDirections", "name"])
    page.evaluate(SET, ["outer", "name", second])
    page.get_by_label("Strength of right", exact=True).wait_for()
    enter(page, "outer")
    folder = server.output / "elrond" / "directions"
    before = (folder / f"{stored}.safetensors").read_bytes()
    label = page.get_by_label("Name of direction 1", exact=True).locator("visible=true")
    label.fill("righter")
    label.press("Tab")
    wait_for_name(page, folder / f"{second}.safetensors", 1, "righter")
    assert (folder / f"{stored}.safetensors").read_bytes() == before


def wait_for_name(page: Any, path: Path, index: int, name: str) -> None:
    for _ in range(PATIENCE // 100):
        if load_directions(path).names[index] == name:
            return
        page.wait_for_timeout(100)
    raise AssertionError(load_directions(path).names)


def test_sliders_write_to_strengths_on_the_face_of_a_subgraph(quiet: Any, server: Server, stored: str) -> None:
    page = quiet
    show(page, stored)
    plain = queued(page, server)
    page.evaluate(WRAP, ["outer", APPLY])
    page.evaluate(PROMOTE, ["outer", "ElrondApplyDirection", "strengths"])
    enter(page, "outer")
    page.get_by_label("Use direction 0", exact=True).check()
    page.get_by_label("Strength of direction 0", exact=True).press("End")
    face = "() => window.outer.widgets.find((each) => each.name === 'strengths').value"
    assert page.evaluate(face) == "0: 1"
    assert np.abs(queued(page, server) - plain).max() > 20
    # And follow what is written there.
    page.evaluate(SET, ["outer", "strengths", "1: 0.5"])
    page.locator('[aria-label="Use direction 1"]:checked').wait_for()
    assert not page.get_by_label("Use direction 0", exact=True).is_checked()


def test_two_uses_of_a_subgraph_with_different_files_are_told(quiet: Any, stored: str, second: str) -> None:
    page = quiet
    show(page, stored)
    page.evaluate(WRAP, ["outer", LOAD])
    page.evaluate(PROMOTE, ["outer", "ElrondLoadDirections", "name"])
    # The frontend remembers values of a face by the node's number, which an earlier graph used as well.
    page.evaluate(SET, ["outer", "name", stored])
    page.evaluate(
        """(value) => {
            const { app } = window;
            window.again = LiteGraph.createNode(window.outer.type);
            app.graph.add(window.again);
            window.again.widgets.find((each) => each.name === 'name').value = value;
        }""",
        second,
    )
    enter(page, "outer")
    page.get_by_text("Each use of this subgraph has a file of its own; look at one outside of it.").wait_for()
    page.evaluate("() => window.app.graph.remove(window.again)")
    page.get_by_label("Name of direction 5", exact=True).locator("visible=true").wait_for()


def test_panels_of_removed_nodes_ask_for_nothing(quiet: Any, stored: str) -> None:
    page = quiet
    show(page, stored)
    page.evaluate("() => { for (const id of [3, 4]) window.app.graph.remove(window.app.graph.getNodeById(id)); }")
    page.wait_for_timeout(300)
    asked: list[str] = []
    listen = lambda request: "/elrond/" in request.url and asked.append(request.url)  # noqa: E731
    page.on("request", listen)
    page.evaluate("() => window.app.api.dispatchCustomEvent('execution_success', {})")
    page.wait_for_timeout(1000)
    page.remove_listener("request", listen)
    assert asked == []


@pytest.fixture
def nodes_2(server: Server, browser: Any) -> Iterator[Any]:
    """A page with nodes drawn the newer way."""
    page = open_page(server, browser, settings={"Comfy.VueNodes.Enabled": True})
    yield page
    page.context.close()
    post(server, "/settings", {"Comfy.VueNodes.Enabled": False})


def test_nodes_2_keep_a_long_list_short(nodes_2: Any, server: Server) -> None:
    """Twenty directions scroll in a list as tall as six, and the wheel over it does not zoom the canvas."""
    names = tuple(f"number {i}" for i in range(20))
    twenty = Directions(torch.eye(128)[:20, None], torch.ones(20), {}, Provenance("Demo", "a person", "person"), names)
    save_directions(twenty, server.output / "elrond" / "directions" / "twenty.safetensors")
    page = nodes_2
    show(page, "twenty")
    page.get_by_label("Strength of number 19", exact=True).wait_for(state="attached")
    listed = page.locator(".elrond-panel ul").nth(1)
    box = listed.bounding_box()
    assert box["height"] < 7 * listed.locator("li").first.bounding_box()["height"]
    page.mouse.move(box["x"] + 200, box["y"] + 40)
    before = page.evaluate("() => window.app.canvas.ds.scale")
    page.mouse.wheel(0, 90)
    page.wait_for_function("() => document.querySelectorAll('.elrond-panel ul')[1].scrollTop > 0")
    assert page.evaluate("() => window.app.canvas.ds.scale") == before
    shot(page, "nodes-2")


def test_nodes_2_do_not_overlap_in_the_workflows(nodes_2: Any) -> None:
    page = nodes_2
    for path in sorted((ROOT / "example_workflows").glob("*.json")):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        page.evaluate("async (graph) => await window.app.loadGraphData(graph, true, true, 'opened')", workflow)
        page.wait_for_function(
            "() => window.app.graph.nodes.every((n) => document.querySelector(`.lg-node[data-node-id='${n.id}']`))"
        )
        page.wait_for_timeout(1000)
        boxes = page.evaluate(
            """() => window.app.graph.nodes.map((node) => {
                const drawn = document.querySelector(`.lg-node[data-node-id='${node.id}']`);
                return [node.type, ...node.pos, drawn.offsetWidth, drawn.offsetHeight - 30];
            })"""
        )
        assert len(boxes) == len(workflow["nodes"])
        assert overlapping(boxes) == [], path.name
