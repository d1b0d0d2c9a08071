"""What ComfyUI's workflow templates do with text: their encoders, with what each encodes and which model reads it."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# The packages that ComfyUI installs its templates with start with this.
PACKAGES = "comfyui_workflow_templates*"
# How the host numbers the two ends of a subgraph.
INPUT, OUTPUT = -10, -20


class Place(NamedTuple):
    """An output of a node."""

    node: str
    slot: int


@dataclass
class Node:
    """A node of a graph without subgraphs.

    Attributes:
        kind: its class.
        values: of its widgets.
        inputs: name, type and source of each input.
        outputs: the type of each output.
    """

    kind: str
    values: list[Any]
    inputs: list[tuple[str, str, Place | None]] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def takes(self, kind: str) -> bool:
        """Whether it has an input of a type."""
        return any(each == kind for _, each, _ in self.inputs)


@dataclass(frozen=True)
class Encoding:
    """A text encoder in a template.

    Attributes:
        node: the class of the node.
        images: whether images are connected to it.
        loader: the class of the node that loads its CLIP.
        clip: the names of the files and the type that the loader has, joined by spaces.
        models: the files of the models whose sampling it conditions; none if it conditions something else.
        reader: the class of the node that reads the conditioning in the end.
    """

    node: str
    images: bool
    loader: str
    clip: str
    models: tuple[str, ...]
    reader: str


def installed() -> list[Path]:
    """The folders of templates of the installed packages."""
    found = importlib.util.find_spec("comfyui_workflow_templates")
    if found is None or found.origin is None:
        return []
    packages = Path(found.origin).parents[1].glob(PACKAGES)
    return sorted(folder / "templates" for folder in packages if (folder / "templates").is_dir())


def read(places: list[Path]) -> dict[str, dict[str, Any]]:
    """The templates in some folders and wheels, by name."""
    out: dict[str, dict[str, Any]] = {}
    for place in places:
        for name, text in sorted(_texts(place)):
            graph = json.loads(text)
            if isinstance(graph, dict) and "nodes" in graph:
                out[name] = graph
    return dict(sorted(out.items()))


def _texts(place: Path) -> Iterator[tuple[str, str]]:
    if place.is_dir():
        for path in place.glob("*.json"):
            yield path.stem, path.read_text(encoding="utf-8")
        return
    with zipfile.ZipFile(place) as archive:
        for inside in map(Path, archive.namelist()):
            if inside.suffix == ".json" and inside.parent.name == "templates":
                yield inside.stem, archive.read(inside.as_posix()).decode()


def encodings(graph: dict[str, Any]) -> list[Encoding]:
    """The text encoders of a template: nodes that make a conditioning of a CLIP, and not of another conditioning."""
    nodes = _flat(graph)
    readers: dict[str, list[str]] = {}
    for name, node in nodes.items():
        for _, _, source in node.inputs:
            if source is not None:
                readers.setdefault(source.node, []).append(name)
    out: list[Encoding] = []
    for name, node in nodes.items():
        if not node.takes("CLIP") or "CONDITIONING" not in node.outputs or node.takes("CONDITIONING"):
            continue
        loader = _origin(nodes, name, "CLIP")
        sinks = _sinks(nodes, readers, name)
        models = {_origin(nodes, sink, "MODEL") for sink in sinks}
        files = {_files(nodes[model]) for model in models if model is not None}
        kinds = sorted(nodes[sink].kind for sink in sinks)
        images = any(kind in ("IMAGE", "CLIP_VISION_OUTPUT") and source for _, kind, source in node.inputs)
        out.append(
            Encoding(
                node.kind,
                images,
                nodes[loader].kind if loader else "",
                _files(nodes[loader]) if loader else "",
                tuple(sorted(files)),
                kinds[0] if kinds else "",
            )
        )
    return sorted(set(out), key=repr)


def _files(node: Node) -> str:
    return " ".join(value for value in node.values if isinstance(value, str))


def _sinks(nodes: dict[str, Node], readers: dict[str, list[str]], start: str) -> list[str]:
    """The nodes that read a conditioning together with a model, and else those at which it ends."""
    seen, queue, ends = {start}, [start], []
    sinks: list[str] = []
    while queue:
        name = queue.pop(0)
        reading = [
            each
            for each in readers.get(name, ())
            if any(
                source is not None and source.node == name and nodes[name].outputs[source.slot] in ("CONDITIONING", "*")
                for _, _, source in nodes[each].inputs
            )
        ]
        if not reading and name != start:
            ends.append(name)
        for each in reading:
            if nodes[each].takes("MODEL"):
                sinks.append(each)
            elif each not in seen:
                queue.append(each)
            seen.add(each)
    return sorted(set(sinks)) or sorted(set(ends))


def _origin(nodes: dict[str, Node], name: str, kind: str) -> str | None:
    """The node that loads what an input of a type has: the first one back that has none of the type itself."""
    seen: set[str] = set()
    while name not in seen:
        seen.add(name)
        sources = [source for _, each, source in nodes[name].inputs if each == kind and source is not None]
        if not sources:
            sources = [source for _, each, source in nodes[name].inputs if each in ("*", "") and source is not None]
        if not sources:
            return name if kind in nodes[name].outputs or "*" in nodes[name].outputs else None
        name = sources[0].node
    return None


def _flat(graph: dict[str, Any]) -> dict[str, Node]:
    """A graph's nodes with those of subgraphs in the place of these, by path of ids."""
    definitions = {each["id"]: each for each in graph.get("definitions", {}).get("subgraphs", [])}
    nodes: dict[str, Node] = {}
    # Where the outputs and the inputs of subgraphs come from.
    ends: dict[Place, Place | None] = {}
    wires: list[tuple[str, int, Place]] = []

    def walk(level: dict[str, Any], path: str) -> None:
        links = [_link(link) for link in level.get("links", [])]
        for node in level.get("nodes", []):
            here = f"{path}{node['id']}"
            if node["type"] in definitions:
                walk(definitions[node["type"]], f"{here}/")
                continue
            values = node.get("widgets_values") or []
            nodes[here] = Node(
                node["type"],
                list(values.values()) if isinstance(values, dict) else list(values),
                [(entry.get("name", ""), str(entry.get("type", "")), None) for entry in node.get("inputs") or []],
                [str(entry.get("type", "")) for entry in node.get("outputs") or []],
            )
        for origin, slot, target, place in links:
            source = Place(f"{path}in" if origin == INPUT else f"{path}{origin}", slot)
            if target == OUTPUT:
                ends[Place(path.removesuffix("/"), place)] = source
            elif f"{path}{target}" in nodes:
                wires.append((f"{path}{target}", place, source))
            else:
                ends[Place(f"{path}{target}/in", place)] = source

    walk(graph, "")
    for target, place, source in wires:
        resolved: Place | None = source
        while resolved is not None and resolved.node not in nodes:
            resolved = ends.get(resolved)
        if place < len(nodes[target].inputs):
            name, kind, _ = nodes[target].inputs[place]
            nodes[target].inputs[place] = (name, kind, resolved)
    return nodes


def _link(link: Any) -> tuple[int, int, int, int]:
    """Origin, its output, target, its input."""
    if isinstance(link, dict):
        return link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"]
    return link[1], link[2], link[3], link[4]
