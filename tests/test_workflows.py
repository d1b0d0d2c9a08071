"""The shipped workflows: the graph that the frontend opens is the graph that clients send, and both are sound."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[1] / "example_workflows"
API = Path(__file__).parents[1] / "workflows" / "api"
NAMES = ("complexity", "discover", "diversify", "steer")
# Of models that people use: they are not run here, and have no other format.
EXAMPLES = ("flux_schnell", "qwen_image", "sdxl_dmd2", "sdxl_turbo", "z_image_turbo")
# Nodes of the examples that are not among the host's own list, with the modules that they are in.
MORE = {
    "CLIPTextEncodeFlux": "nodes_flux",
    "EmptySD3LatentImage": "nodes_sd3",
    "ModelSamplingAuraFlow": "nodes_model_advanced",
    "PreviewAny": "nodes_preview_any",
}
# Inputs whose choices are the files that a user has.
FILES = ("ckpt_name", "clip_name", "clip_name1", "clip_name2", "lora_name", "unet_name", "vae_name")
NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


@dataclass
class Entry:
    """One input of a node's schema."""

    name: str
    type: str
    options: list[Any] | None
    control: bool
    optional: bool

    @property
    def is_widget(self) -> bool:
        return self.type in WIDGETS


@dataclass
class Schema:
    """What both formats take from a node."""

    title: str
    inputs: list[Entry]
    outputs: list[tuple[str, str]]
    ours: bool


@pytest.fixture(scope="module")
def schemas(pack: ModuleType) -> dict[str, Schema]:
    import nodes as stock

    classes, titles = dict(stock.NODE_CLASS_MAPPINGS), dict(stock.NODE_DISPLAY_NAME_MAPPINGS)
    for name, module in MORE.items():
        source = importlib.import_module(f"comfy_extras.{module}")
        listed = getattr(source, "NODE_CLASS_MAPPINGS", {})
        classes[name] = listed.get(name) or getattr(source, name)
        titles |= getattr(source, "NODE_DISPLAY_NAME_MAPPINGS", {})
    ours = {node.GET_SCHEMA().node_id: node for node in pack.NODES}
    titles |= {node_id: node.GET_SCHEMA().display_name for node_id, node in ours.items()}
    return {
        name: Schema(titles.get(name, name), list(entries(node)), outputs(node), name in ours)
        for name, node in {**classes, **ours}.items()
        if name in ours or name in used_types()
    }


def used_types() -> set[str]:
    return {node["type"] for name in (*NAMES, *EXAMPLES) for node in ui(name)["nodes"]}


def entries(node: Any) -> Iterator[Entry]:
    """Inputs in the frontend's order: required ones first."""
    types = node.INPUT_TYPES()
    for part in ("required", "optional"):
        for name, (kind, *rest) in (types.get(part) or {}).items():
            extra = rest[0] if rest else {}
            options = kind if isinstance(kind, list) else extra.get("options")
            kind = "COMBO" if isinstance(kind, list) else kind
            # The frontend puts a control beside a seed unless the schema says no.
            control = kind == "INT" and extra.get("control_after_generate", name in ("seed", "noise_seed"))
            yield Entry(name, kind, options, bool(control), part == "optional")


def outputs(node: Any) -> list[tuple[str, str]]:
    # Newer nodes declare their outputs in a schema.
    node.INPUT_TYPES()
    names = getattr(node, "RETURN_NAMES", None) or node.RETURN_TYPES
    return list(zip(names, node.RETURN_TYPES, strict=True))


def read(path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), f"{path.name} repeats a key"
        return dict(pairs)

    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)


def ui(name: str) -> dict[str, Any]:
    return read(FOLDER / f"{name}.json")


def api(name: str) -> dict[str, Any]:
    return read(API / f"{name}.json")


def to_api(graph: dict[str, Any], schemas: dict[str, Schema]) -> dict[str, Any]:
    """What the frontend sends for a graph it has open."""
    links = {link[0]: link for link in graph["links"]}
    out = {}
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        schema = schemas[node["type"]]
        linked = {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
        values = iter(node["widgets_values"])
        inputs = {}
        for entry in schema.inputs:
            if entry.is_widget:
                inputs[entry.name] = next(values)
                if entry.control:
                    assert next(values) == "fixed"
            if entry.name in linked:
                _, source, slot, *_ = linked[entry.name]
                inputs[entry.name] = [str(source), slot]
        assert not list(values), f"{node['type']} has more values than widgets"
        title = node.get("title", schema.title)
        out[str(node["id"])] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}
    return out


def test_every_workflow_comes_in_both_formats() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted((*NAMES, *EXAMPLES))
    assert sorted(path.stem for path in API.glob("*.json")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_has_a_picture(name: str) -> None:
    """Where the template browser looks for it, and in the folder's own page."""
    with Image.open(FOLDER / f"{name}.jpg") as picture:
        assert picture.format == "JPEG" and 300 <= picture.width <= 1200
    assert (FOLDER / f"{name}.jpg").stat().st_size < 200_000
    assert f"({name}.jpg)" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_are_the_same_graph(name: str, schemas: dict[str, Schema]) -> None:
    assert to_api(ui(name), schemas) == api(name)


@pytest.mark.parametrize("name", (*NAMES, *EXAMPLES))
def test_values_are_what_the_nodes_take(name: str, schemas: dict[str, Schema]) -> None:
    kinds = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": str}
    graph = to_api(ui(name), schemas)
    for node in graph.values():
        schema = schemas[node["class_type"]]
        assert set(node["inputs"]) >= {entry.name for entry in schema.inputs if not entry.optional}
        for entry in schema.inputs:
            value = node["inputs"].get(entry.name)
            if isinstance(value, list):
                source, slot = value
                given = schemas[graph[source]["class_type"]].outputs[slot][1]
                assert given == entry.type or entry.type == "*", (node["class_type"], entry.name)
            elif value is not None:
                assert isinstance(value, kinds[entry.type]), (node["class_type"], entry.name)
                if node["class_type"] != "ElrondLoadDirections" and entry.options and entry.name not in FILES:
                    assert value in entry.options


@pytest.mark.parametrize("name", (*NAMES, *EXAMPLES))
def test_links_and_slots_agree(name: str, schemas: dict[str, Schema]) -> None:
    graph = ui(name)
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}
    assert len(nodes) == len(graph["nodes"])
    assert len(links) == len(graph["links"])
    assert graph["last_node_id"] == max(nodes)
    assert graph["last_link_id"] == max(links)
    for link_id, source, slot, target, place, kind in graph["links"]:
        given, taken = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert given["type"] == kind
        assert taken["type"] in (kind, "*")
        assert link_id in given["links"]
        assert taken["link"] == link_id
        assert nodes[source]["order"] < nodes[target]["order"]
    for node in nodes.values():
        ends = [entry["link"] for entry in node["inputs"] if entry["link"] is not None]
        assert [links[link][3] for link in ends] == [node["id"]] * len(ends)
        starts = [link for entry in node["outputs"] for link in entry["links"] or []]
        assert [links[link][1] for link in starts] == [node["id"]] * len(starts)
    assert sorted(node["order"] for node in nodes.values()) == list(range(len(nodes)))


@pytest.mark.parametrize("name", (*NAMES, *EXAMPLES))
def test_nodes_are_as_the_frontend_saves_them(name: str, schemas: dict[str, Schema]) -> None:
    graph = ui(name)
    assert graph["version"] == 0.4
    assert graph["extra"]["frontendVersion"].startswith("1.32")
    assert any(node["type"] in NOTES for node in graph["nodes"])
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        schema = schemas[node["type"]]
        ordered = [e for e in schema.inputs if not e.is_widget] + [e for e in schema.inputs if e.is_widget]
        assert [entry["name"] for entry in node["inputs"]] == [entry.name for entry in ordered]
        assert [entry.get("widget") for entry in node["inputs"]] == [
            {"name": entry.name} if entry.is_widget else None for entry in ordered
        ]
        assert [(entry["name"], entry["type"]) for entry in node["outputs"]] == schema.outputs
        properties = node["properties"]
        assert properties["Node name for S&R"] == node["type"]
        assert properties["cnr_id"] == ("elrond" if schema.ours else "comfy-core")


@pytest.mark.parametrize("name", (*NAMES, *EXAMPLES))
def test_the_layout_is_readable(name: str) -> None:
    """No node covers another, none crosses the edge of a group, and everything but the notes is in a group."""
    graph = ui(name)
    groups = [group["bounding"] for group in graph["groups"]]
    assert all(group["title"] for group in graph["groups"])
    # A node's title bar is 30 pixels above its position.
    boxes = {node["id"]: (*node["pos"], *node["size"]) for node in graph["nodes"]}
    boxes = {key: (x, y - 30, width, height + 30) for key, (x, y, width, height) in boxes.items()}
    for node in graph["nodes"]:
        box = boxes[node["id"]]
        assert not any(overlaps(box, other) for key, other in boxes.items() if key != node["id"]), node["type"]
        holders = [group for group in groups if contains(group, widened(box))]
        assert len(holders) == (0 if node["type"] in NOTES else 1), node["type"]
    assert not any(overlaps(a, b) for i, a in enumerate(groups) for b in groups[:i])
    positions = {node["id"]: node["pos"] for node in graph["nodes"]}
    assert all(
        positions[source][0] < positions[target][0] or positions[source][1] < positions[target][1]
        for _, source, _, target, *_ in graph["links"]
    )


def overlaps(a: Any, b: Any) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def widened(box: Any, margin: int = 10) -> Any:
    x, y, width, height = box
    return x - margin, y - margin, width + 2 * margin, height + 2 * margin


def contains(outer: Any, inner: Any) -> bool:
    return (
        outer[0] <= inner[0]
        and outer[1] <= inner[1]
        and outer[0] + outer[2] >= inner[0] + inner[2]
        and outer[1] + outer[3] >= inner[1] + inner[3]
    )


def test_no_file_names_a_machine() -> None:
    for path in FOLDER.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(/home/|/Users/|[A-Z]:\\\\|https?://)", text), path.name
