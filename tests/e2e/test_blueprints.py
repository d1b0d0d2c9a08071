"""The blueprints and the example workflows in the real frontend; blueprints also run, on the demo's model."""

from __future__ import annotations

import copy
import json
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo.browser import PATIENCE
from demo.server import PACK, Server
from elrond_core.storage.format import load_directions
from tests.e2e.pages import ROOT, run, shot
from workflows.blueprints import BLUEPRINTS
from workflows.examples import EXAMPLES, write
from workflows.frontend import WIDGETS, Output, Sheet

FOLDER = ROOT / "subgraphs"
FIND, DIVERSIFY, STEER = ("Find Directions (ELROND)", "Diversify a Batch (ELROND)", "Steer with Sliders (ELROND)")
# Counts under which finding directions takes seconds, and a significance that keeps what so few gradients hide.
SMALL: dict[str, dict[str, Any]] = {
    "ElrondSampleRealizations": {"count": 24, "batch_size": 12},
    "ElrondCollectGradients": {"count": 48, "batch_size": 24, "targets_per_realization": 1},
    "ElrondFitResponse": {"significance": 0.0, "most": 4},
}


def blueprint(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def fetch(server: Server, path: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.url + urllib.parse.quote(path), timeout=30) as reply:
        return json.loads(reply.read())


@pytest.fixture(scope="module")
def known(server: Server) -> dict[str, Any]:
    return server.object_info()


def test_the_host_lists_the_blueprints(server: Server) -> None:
    listed = {
        entry["name"]: (number, entry)
        for number, entry in fetch(server, "/global_subgraphs").items()
        if entry["info"]["node_pack"] == f"custom_nodes.{PACK}"
    }
    assert set(listed) == {FIND, DIVERSIFY, STEER} == {path.stem for path in FOLDER.glob("*.json")}
    for name, (number, _) in listed.items():
        assert json.loads(fetch(server, f"/global_subgraphs/{number}")["data"]) == blueprint(name)


def test_the_scripts_write_these_files(known: dict[str, Any]) -> None:
    """With the schemas that the nodes have now."""
    for make in BLUEPRINTS:
        graph = make(known)
        assert graph == blueprint(graph["nodes"][0]["title"])
    for load in EXAMPLES:
        path = ROOT / "example_workflows" / f"{load.__name__}.json"
        assert write(load.__name__, load, known) == json.loads(path.read_text(encoding="utf-8")), path.name


def schema_of(graph: dict[str, Any]) -> dict[str, Any]:
    """A blueprint's node, as the host describes its nodes."""
    (node,) = graph["nodes"]
    inputs = {entry["name"]: (entry["type"], {}) for entry in node["inputs"]}
    outputs = [entry["type"] for entry in node["outputs"]]
    return {
        "input": {"required": inputs},
        "output": outputs,
        "output_name": [entry["name"] for entry in node["outputs"]],
    }


class Graph:
    """A graph with a blueprint in it, around the demo's model.

    Args:
        known: the nodes that the host knows.
        name: the blueprint.
    """

    def __init__(self, known: dict[str, Any], name: str) -> None:
        self._blueprint = blueprint(name)
        (self.kind,) = (node["type"] for node in self._blueprint["nodes"])
        self.sheet = Sheet(name, {**known, self.kind: schema_of(self._blueprint)})
        self.sheet.group("All")
        self.sheet.column()
        self.model, self.clip, self.vae = self.sheet.add("ElrondLoadDemoModel", name="student")
        (self.prompt,) = self.sheet.add("CLIPTextEncode", clip=self.clip, text="a person")

    def shown(self, positive: Output, count: int) -> int:
        """Sample and show images; returns the number of the node that shows them."""
        (latent,) = self.sheet.add("EmptyLatentImage", width=64, height=64, batch_size=count)
        (samples,) = self.sheet.add(
            "KSampler",
            model=self.model,
            positive=positive,
            negative=self.prompt,
            latent_image=latent,
            seed=5,
            steps=4,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
        )
        (images,) = self.sheet.add("VAEDecode", samples=samples, vae=self.vae)
        self.sheet.add("PreviewImage", images=images)
        return self.last()

    def last(self) -> int:
        return self.sheet.parts()[0][-1]["id"]

    def saved(self) -> dict[str, Any]:
        """As the frontend saves it."""
        graph = self.sheet.graph()
        (original,) = self._blueprint["nodes"]
        for node in graph["nodes"]:
            if node["type"] == self.kind:
                node |= {"properties": original["properties"], "widgets_values": original["widgets_values"]}
        graph["definitions"] = copy.deepcopy(self._blueprint["definitions"])
        for node in graph["definitions"]["subgraphs"][0]["nodes"]:
            for widget, value in SMALL.get(node["type"], {}).items():
                place = [entry["name"] for entry in node["inputs"] if "widget" in entry].index(widget)
                node["widgets_values"][place] = value
        return graph


def opened(page: Any, graph: dict[str, Any]) -> None:
    page.evaluate("async (graph) => await window.app.loadGraphData(graph, true, true, 'blueprint')", graph)
    page.wait_for_timeout(500)


def put(page: Any, kind: str, **values: Any) -> None:
    """Set widgets on the face of the graph's subgraph."""
    page.evaluate(
        """([kind, values]) => {
            const node = window.app.graph.nodes.find((each) => each.type === kind);
            for (const [name, value] of Object.entries(values)) {
                const widget = node.widgets.find((each) => each.name === name);
                if (!widget) throw new Error(`no widget ${name} among ${node.widgets.map((each) => each.name)}`);
                widget.value = value;
            }
        }""",
        [kind, values],
    )


@pytest.fixture
def quiet(page: Any) -> Iterator[Any]:
    """The page, of which no test may make the console complain."""
    before = len(page.said)
    yield page
    assert page.said[before:] == []


@pytest.mark.parametrize("name", [FIND, DIVERSIFY, STEER])
def test_a_blueprint_opens(quiet: Any, name: str) -> None:
    """With its values on its face, and the same nodes and links within when the frontend saves it again."""
    graph = blueprint(name)
    opened(quiet, graph)
    shot(quiet, f"blueprint {name}")
    face = quiet.evaluate(
        """() => {
            const [node] = window.app.graph.nodes;
            return [node.title, node.inputs.map((each) => each.name), node.outputs.map((each) => each.name),
                Object.fromEntries((node.widgets ?? []).map((each) => [each.name, each.value]))];
        }"""
    )
    (node,) = graph["nodes"]
    (definition,) = graph["definitions"]["subgraphs"]
    assert face[:3] == [name, [e["name"] for e in node["inputs"]], [e["name"] for e in node["outputs"]]]
    inner = {entry["id"]: entry for entry in definition["nodes"]}
    links = {link["id"]: link for link in definition["links"]}
    for entry in definition["inputs"]:
        if entry["type"] in WIDGETS:
            target = inner[links[entry["linkIds"][0]]["target_id"]]
            assert face[3][entry["name"]] in target["widgets_values"], entry["name"]
    again = quiet.evaluate("() => window.app.graph.serialize().definitions.subgraphs[0]")
    assert kinds(again) == kinds(definition)
    assert wires(again) == wires(definition)


def kinds(definition: dict[str, Any]) -> list[str]:
    return sorted(node["type"] for node in definition["nodes"])


def wires(definition: dict[str, Any]) -> set[tuple[str, ...]]:
    """The links of a subgraph by the names of what they connect."""
    nodes = {node["id"]: node for node in definition["nodes"]}
    out: set[tuple[str, ...]] = set()
    for link in definition["links"]:
        start, end = nodes.get(link["origin_id"]), nodes.get(link["target_id"])
        source = start["outputs"][link["origin_slot"]]["name"] if start else f"in {link['origin_slot']}"
        target = end["inputs"][link["target_slot"]]["name"] if end else f"out {link['target_slot']}"
        out.add((start["type"] if start else "", source, end["type"] if end else "", target))
    return out


# What the frontend offers among its nodes; up to version 1.32.9 subgraphs have a store of their own.
OFFERED = """() => {
    const { $pinia } = document.querySelector('#vue-app').__vue_app__.config.globalProperties;
    const { nodeDefs } = $pinia._s.get('nodeDef');
    const { subgraphBlueprints } = $pinia._s.get('subgraph');
    return [...nodeDefs, ...(subgraphBlueprints ?? [])]
        .filter((each) => each.name.startsWith('SubgraphBlueprint.')).map((each) => each.display_name);
}"""


def test_the_frontend_offers_the_blueprints_as_nodes(quiet: Any) -> None:
    for _ in range(PATIENCE // 100):
        offered = quiet.evaluate(OFFERED)
        if {FIND, DIVERSIFY, STEER} <= set(offered):
            return
        quiet.wait_for_timeout(100)
    raise AssertionError(offered)


def test_find_directions_and_diversify_with_them(quiet: Any, server: Server, known: dict[str, Any]) -> None:
    graph = Graph(known, FIND)
    found = graph.sheet.add(graph.kind, model=graph.model, clip=graph.clip)
    (marked, _) = graph.sheet.add("ElrondEncodeConcept", clip=graph.clip, prompt="a [person]")
    diverse = graph.sheet.add("ElrondDiversify", conditioning=marked, directions=found[0], count=3)
    node = graph.shown(diverse[0], 3)
    graph.sheet.add("PreviewImage", images=found[1])
    plot = graph.last()
    opened(quiet, graph.saved())
    put(quiet, graph.kind, prompt="a [person]", size=64, steps=2, name="by the blueprint")
    images = run(quiet, server, str(node))
    assert len(images) == 3 and np.abs(images[0] - images[1]).max() > 20
    assert run(quiet, server, str(plot))[0].std() > 1
    assert (server.output / "elrond" / "directions" / "by the blueprint.safetensors").is_file()


def test_diversify_a_batch(quiet: Any, server: Server, known: dict[str, Any]) -> None:
    graph = Graph(known, DIVERSIFY)
    (directions, _) = graph.sheet.add("ElrondLoadDirections", name="demo person words")
    diverse = graph.sheet.add(graph.kind, conditioning=graph.prompt, clip=graph.clip, directions=directions)
    plain, steered = graph.shown(graph.prompt, 4), graph.shown(diverse[0], 4)
    opened(quiet, graph.saved())
    put(quiet, graph.kind, concept="person", count=4, seed=3)
    images = {node: np.stack(run(quiet, server, str(node))) for node in (plain, steered)}
    # The frontend hands out the student's images again: what differs is the step of each image.
    assert (np.abs(images[steered] - images[plain]).reshape(4, -1).max(1) > 20).all()


def test_steer_with_sliders(quiet: Any, server: Server, known: dict[str, Any]) -> None:
    graph = Graph(known, STEER)
    (steered,) = graph.sheet.add(graph.kind, conditioning=graph.prompt, clip=graph.clip)
    node = graph.shown(steered, 1)
    opened(quiet, graph.saved())
    put(quiet, graph.kind, concept="person", file="demo person words")
    (plain,) = run(quiet, server, str(node))
    # Inside, as when it is opened: the panel's slider writes to the face.
    quiet.evaluate(
        """(kind) => {
            const { app } = window;
            const { subgraph } = app.graph.nodes.find((each) => each.type === kind);
            app.canvas.setGraph(subgraph);
            const node = subgraph.nodes.find((each) => each.type === 'ElrondApplyDirection');
            node.pos = [0, 0];
            node.setSize([460, node.size[1]]);
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [400, 120];
            app.canvas.setDirty(true, true);
            node.elrondPanel.root.id = 'of-the-blueprint';
        }""",
        graph.kind,
    )
    head = quiet.locator("#of-the-blueprint .elrond-head")
    head.wait_for()
    quiet.wait_for_timeout(600)
    if head.get_attribute("aria-expanded") != "true":
        head.click()
    name = load_directions(ROOT / "demo" / "directions" / "demo person words.safetensors").names[0]
    quiet.get_by_label(f"Use {name}", exact=True).locator("visible=true").check()
    quiet.get_by_label(f"Strength of {name}", exact=True).locator("visible=true").press("End")
    shot(quiet, "blueprint steer, opened")
    quiet.evaluate("() => window.app.canvas.setGraph(window.app.rootGraph ?? window.app.graph)")
    (moved,) = run(quiet, server, str(node))
    assert np.abs(moved - plain).max() > 20


@pytest.mark.parametrize("name", [load.__name__ for load in EXAMPLES])
def test_an_example_opens(quiet: Any, name: str) -> None:
    """Nothing is missing, and saved again it is the same graph with the same values."""
    graph = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    opened(quiet, graph)
    quiet.evaluate("() => window.app.canvas.ds.reset()")
    shot(quiet, f"example {name}")
    again = quiet.evaluate("() => window.app.graph.serialize()")
    assert len(again["nodes"]) == len(graph["nodes"]) and not quiet.locator(".comfy-missing-nodes").count()
    saved = {node["id"]: node for node in again["nodes"]}
    for node in graph["nodes"]:
        assert saved[node["id"]]["type"] == node["type"]
        assert list(saved[node["id"]].get("widgets_values") or []) == node["widgets_values"], node["type"]
    assert {tuple(link[1:]) for link in again["links"]} == {tuple(link[1:]) for link in graph["links"]}


def test_no_blueprint_names_a_machine() -> None:
    for path in sorted(Path(FOLDER).glob("*.json")):
        assert "/home/" not in path.read_text(encoding="utf-8")
