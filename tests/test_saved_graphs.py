"""Graphs that a release saved still mean what they meant: inputs and outputs are only ever appended."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import keep_graphs
import pytest

ROOT = Path(__file__).parents[1]
RELEASES = sorted(path.name for path in keep_graphs.GRAPHS.iterdir())
GRAPHS = [
    (release, path.stem) for release in RELEASES for path in sorted((keep_graphs.GRAPHS / release / "api").glob("*"))
]
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTES = ("Note", "MarkdownNote")

Inputs = list[dict[str, Any]]


def read(*parts: str) -> Any:
    return json.loads(keep_graphs.GRAPHS.joinpath(*parts).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def classes(pack: ModuleType) -> dict[str, Any]:
    """Node classes by id: the pack's, and those of the host that the kept graphs use."""
    from comfy_extras import nodes_preview_any

    import nodes as stock

    ours = {node.GET_SCHEMA().node_id: node for node in pack.NODES}
    return {**stock.NODE_CLASS_MAPPINGS, **nodes_preview_any.NODE_CLASS_MAPPINGS, **ours}


@pytest.fixture(scope="module")
def today(pack: ModuleType) -> dict[str, dict[str, Any]]:
    return {node.GET_SCHEMA().node_id: keep_graphs.schema_of(node) for node in pack.NODES}


def stock_inputs(node: Any) -> Inputs:
    """The inputs of one of the host's nodes, in the frontend's order."""
    out = []
    for part in keep_graphs.PARTS:
        for name, (kind, *rest) in (node.INPUT_TYPES().get(part) or {}).items():
            control = kind == "INT" and (rest[0] if rest else {}).get("control_after_generate", False)
            out.append({"name": name, "type": "COMBO" if isinstance(kind, list) else kind, "control": control})
    return out


def places(inputs: Inputs) -> list[str]:
    """What each position of `widgets_values` belongs to."""
    out = []
    for entry in inputs:
        if entry["type"] in WIDGETS:
            out += [entry["name"], f"control of {entry['name']}"] if entry.get("control") else [entry["name"]]
    return out


def misfits(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Why a node that was saved with one schema does not mean the same with another; empty if it does."""
    out = []
    count = len(places(before["inputs"]))
    if places(after["inputs"])[:count] != places(before["inputs"]):
        out.append(f"values were saved for {places(before['inputs'])} and are read as {places(after['inputs'])}")
    sockets = [[entry["name"] for entry in schema["inputs"]] for schema in (before, after)]
    if sockets[1][: len(sockets[0])] != sockets[0]:
        out.append(f"inputs were {sockets[0]} and are {sockets[1]}")
    if after["outputs"][: len(before["outputs"])] != before["outputs"]:
        out.append(f"outputs were {before['outputs']} and are {after['outputs']}")
    old, new = ({entry["name"]: entry for entry in schema["inputs"]} for schema in (before, after))
    for name, entry in new.items():
        if name not in old:
            if not entry.get("optional"):
                out.append(f"{name} is new and required")
            continue
        if entry["type"] != old[name]["type"]:
            out.append(f"{name} was {old[name]['type']} and is {entry['type']}")
        if old[name].get("optional") and not entry.get("optional"):
            out.append(f"{name} is no longer optional")
        if not set(old[name].get("options", ())) <= set(entry.get("options", old[name].get("options", ()))):
            out.append(f"{name} has lost a choice: {old[name]['options']} and {entry['options']}")
        if entry.get("min", 0) > old[name].get("min", 0) or entry.get("max", 0) < old[name].get("max", 0):
            out.append(f"the range of {name} is narrower")
    return out


@pytest.mark.parametrize("release", RELEASES)
def test_every_node_reads_what_a_release_saved(release: str, today: dict[str, dict[str, Any]]) -> None:
    schemas = read(release, "schemas.json")
    assert len(schemas) >= 24
    assert set(schemas) <= set(today)
    assert {
        name: misfits(schema, today[name]) for name, schema in schemas.items() if misfits(schema, today[name])
    } == {}


def test_a_schema_that_would_break_saved_graphs_is_found() -> None:
    """Each way of breaking one, and each harmless change."""
    count = {"name": "count", "type": "INT", "min": 0, "max": 8}
    seed = {"name": "seed", "type": "INT", "control": True}
    how = {"name": "how", "type": "COMBO", "options": ["a", "b"], "optional": True}
    before = {"inputs": [count, seed, how], "outputs": [["report", "STRING"]]}

    def after(*inputs: dict[str, Any], outputs: Any = before["outputs"]) -> list[str]:
        return misfits(before, {"inputs": list(inputs), "outputs": outputs})

    new = {"name": "new", "type": "STRING", "optional": True}
    assert after(count, seed, how) == after(count, seed, how, new) == []
    assert after({**count, "max": 9}, seed, {**how, "options": ["a", "b", "c"]}) == []
    assert after(count, seed, how, outputs=[["report", "STRING"], ["plot", "IMAGE"]]) == []
    broken = [
        after(count, new, seed, how),
        after(seed, count, how),
        after({**count, "name": "number"}, seed, how),
        after(count, {**seed, "control": False}, how),
        after(count, seed),
        after(count, seed, how, {**new, "optional": False}),
        after(count, seed, {**how, "optional": False}),
        after(count, seed, {**how, "options": ["a"]}),
        after({**count, "max": 7}, seed, how),
        after({**count, "type": "FLOAT"}, seed, how),
        after(count, seed, how, outputs=[["plot", "IMAGE"], ["report", "STRING"]]),
        after(count, seed, how, outputs=[]),
    ]
    assert all(broken)


@pytest.mark.parametrize(("release", "name"), GRAPHS)
def test_values_land_where_they_were_saved(release: str, name: str, classes: dict[str, Any], today: Any) -> None:
    """What clients sent for the graph then is what today's schemas make of the saved one."""
    graph, sent = read(release, f"{name}.json"), read(release, "api", f"{name}.json")
    links = {link[0]: link for link in graph["links"]}
    seen = 0
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs = today[node["type"]]["inputs"] if node["type"] in today else stock_inputs(classes[node["type"]])
        values = dict(zip(places(inputs), node["widgets_values"], strict=False))
        assert len(values) == len(node["widgets_values"]), node["type"]
        for entry in node["inputs"]:
            if entry["link"] is not None:
                _, source, slot, *_ = links[entry["link"]]
                values[entry["name"]] = [str(source), slot]
        expected = sent[str(node["id"])]["inputs"]
        assert {key: values[key] for key in expected} == expected, node["type"]
        seen += len(expected)
    assert seen > 20


@pytest.mark.parametrize(("release", "name"), GRAPHS)
def test_the_host_accepts_the_graph(
    release: str, name: str, classes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import execution

    import nodes as stock

    for class_type, node in classes.items():
        monkeypatch.setitem(stock.NODE_CLASS_MAPPINGS, class_type, node)
    sent = read(release, "api", f"{name}.json")
    # The directions file that a graph names is its user's.
    monkeypatch.setattr(sys.modules[classes["ElrondLoadDirections"].__module__], "find", lambda kind, name: None)
    valid, error, outputs, errors = asyncio.run(execution.validate_prompt("saved", sent, None))
    assert valid and not error and not errors
    ends = [node_id for node_id, node in sent.items() if getattr(classes[node["class_type"]], "OUTPUT_NODE", False)]
    assert sorted(outputs) == sorted(ends)


def test_every_release_is_kept() -> None:
    """Each version that the changelog calls released has its graphs; `tests/keep_graphs.py` keeps them."""
    headings = re.findall(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(headings) == RELEASES
    for release in RELEASES:
        names = {path.stem for path in (keep_graphs.GRAPHS / release).glob("*.json")}
        assert names - {"schemas"} == {path.stem for path in (keep_graphs.GRAPHS / release / "api").glob("*.json")}
