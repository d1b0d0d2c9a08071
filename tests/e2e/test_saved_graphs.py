"""Graphs that a release saved, opened and run by today's ComfyUI page and server."""

from __future__ import annotations

import json
import shutil
from typing import Any

import keep_graphs
import pytest

from demo.server import Server
from tests.e2e.pages import ROOT

RELEASES = sorted(path.name for path in keep_graphs.GRAPHS.iterdir())
GRAPHS = [
    (release, path.stem) for release in RELEASES for path in sorted((keep_graphs.GRAPHS / release / "api").glob("*"))
]


def read(*parts: str) -> Any:
    return json.loads(keep_graphs.GRAPHS.joinpath(*parts).read_text(encoding="utf-8"))


# Before the tests that open a browser, whose driver keeps an event loop of its own running.
@pytest.mark.parametrize("release", RELEASES)
def test_the_server_runs_it(server: Server, release: str) -> None:
    graph = read(release, "api", "steer.json")
    # The directions file that a graph names is its user's.
    mine = server.output / "elrond" / "directions"
    mine.mkdir(parents=True, exist_ok=True)
    for node in graph.values():
        if node["class_type"] == "ElrondLoadDirections":
            shutil.copy(
                ROOT / "demo" / "directions" / "demo person words.safetensors",
                mine / f"{node['inputs']['name']}.safetensors",
            )
    for node in graph.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    outputs = server.run(graph)
    (saved,) = (node_id for node_id, node in graph.items() if node["class_type"] == "SaveImage")
    assert len(outputs[saved]["images"]) == 16


@pytest.mark.parametrize(("release", "name"), GRAPHS)
def test_the_page_sends_what_it_sent_then(page: Any, release: str, name: str) -> None:
    page.evaluate("async (graph) => await window.app.loadGraphData(graph)", read(release, f"{name}.json"))
    sent = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    then = read(release, "api", f"{name}.json")
    assert set(sent) == set(then)
    for node_id, node in then.items():
        assert sent[node_id]["class_type"] == node["class_type"]
        now = sent[node_id]["inputs"]
        assert {key: now.get(key) for key in node["inputs"]} == node["inputs"], node["class_type"]
        # Opposites were guessed then.
        assert "pairs" in node["inputs"] or now.get("pairs", "guessed") == "guessed"
