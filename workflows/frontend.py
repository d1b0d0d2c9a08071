"""Writes graphs in the frontend's own format, laid out in groups of columns."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

# What the host's frontend calls itself in files; those that it opens may be of an older one.
FRONTEND = "1.32.9"
# Names of files are drawn from these, so that a graph has the same ids whenever it is written.
NAMESPACE = uuid.UUID("c0a6b0d2-6f0e-5d0c-9e4b-2f7a1d3c5e61")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
# In pixels: a node, and the space beside it, below it and around all nodes of a group.
WIDTH, BESIDE, BELOW, AROUND, TITLE = 320, 60, 60, 30, 30
# Heights that the frontend gives to a row of sockets and to a widget, and to a text of several lines.
ROW, WIDGET, TEXT = 20, 24, 90
# By how much a widget is taller, with what lies around it, where the frontend draws "Nodes 2.0".
TALLER = 12
# What the pack's panels need at least.
TALL = {
    "ElrondLoadDirections": 118,
    "ElrondApplyDirection": 360,
    "ElrondGuideDirections": 360,
    "ElrondDiversify": 480,
    "SaveImage": 320,
    "PreviewAny": 200,
}


@dataclass(frozen=True)
class Output:
    """A node's output, to be connected to an input of another one."""

    node: int
    slot: int


# How the host numbers the two ends of a subgraph.
INLET, OUTLET = -10, -20
# How the frontend names a widget of a subgraph's face that belongs to an input of the subgraph.
FACE = "-1"


@dataclass
class _Node:
    kind: str
    inputs: dict[str, Any]
    title: str
    pos: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (WIDTH, 60)


@dataclass
class _Group:
    title: str
    columns: list[list[int]] = field(default_factory=list)


class Sheet:
    """A graph that is being written.

    Args:
        name: the file's.
        known: the nodes that the host knows, as its `/object_info` has them.
    """

    def __init__(self, name: str, known: dict[str, Any]) -> None:
        self.name, self._known = name, known
        self._nodes: dict[int, _Node] = {}
        self._groups: list[_Group] = []
        self._note = ""
        # Name, type and value of what comes in, if the graph is to be a subgraph.
        self._inlets: list[tuple[str, str, Any]] = []

    def note(self, text: str) -> None:
        """What stands beside the graph, in Markdown."""
        self._note = text

    def inlet(self, name: str, kind: str, value: Any = None) -> Output:
        """An input of the subgraph that the graph is to be, with the value of its field if it has one."""
        self._inlets.append((name, kind, value))
        return Output(INLET, len(self._inlets) - 1)

    def group(self, title: str) -> None:
        """Begin a group; what is added afterwards is in it."""
        self._groups.append(_Group(title))

    def column(self) -> None:
        """Begin a column of the group."""
        self._groups[-1].columns.append([])

    def add(self, kind: str, title: str = "", **inputs: Any) -> tuple[Output, ...]:
        """Add a node below the last one of the column.

        Args:
            kind: its class.
            title: instead of the class's own.
            inputs: values and outputs of other nodes. What is left out has its default.

        Returns:
            its outputs.
        """
        number = len(self._nodes) + 1
        schema = self._known[kind]
        unknown = inputs.keys() - {entry.name for entry in entries(schema)}
        if unknown:
            raise ValueError(f"{kind} has no input {', '.join(sorted(unknown))}.")
        self._nodes[number] = _Node(kind, inputs, title)
        self._groups[-1].columns[-1].append(number)
        return tuple(Output(number, slot) for slot in range(len(schema["output"])))

    def graph(self) -> dict[str, Any]:
        """The graph as the frontend saves it."""
        boxes = self._lay_out()
        nodes, links = self.parts()
        if self._note:
            nodes.append(
                {
                    "id": len(nodes) + 1,
                    "type": "MarkdownNote",
                    "pos": [-480, 40],
                    "size": [440, 620],
                    "flags": {},
                    "order": 0,
                    "mode": 0,
                    "inputs": [],
                    "outputs": [],
                    "title": "About this workflow",
                    "properties": {},
                    "widgets_values": [self._note],
                }
            )
            for node in nodes[:-1]:
                node["order"] += 1
        return {
            "id": self._id("file"),
            "revision": 0,
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": [
                {"id": i, "title": group.title, "bounding": list(box), "color": "#3f789e", "font_size": 24, "flags": {}}
                for i, (group, box) in enumerate(zip(self._groups, boxes, strict=True), 1)
            ],
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [520, 80]}, "frontendVersion": FRONTEND},
            "version": 0.4,
        }

    def parts(self) -> tuple[list[dict[str, Any]], list[list[Any]]]:
        """The nodes and links of the graph, as the frontend saves them."""
        links: list[list[Any]] = []
        nodes: list[dict[str, Any]] = []
        outgoing: dict[Output, list[int]] = {}
        for number, node in self._nodes.items():
            schema = self._known[node.kind]
            listed = list(entries(schema))
            sockets: list[dict[str, Any]] = []
            for entry in sorted(listed, key=lambda entry: entry.is_widget):
                given = node.inputs.get(entry.name)
                socket: dict[str, Any] = {"localized_name": entry.name, "name": entry.name, "type": entry.type}
                if entry.is_widget:
                    socket["widget"] = {"name": entry.name}
                elif entry.optional:
                    socket["shape"] = 7
                socket["link"] = None
                if isinstance(given, Output):
                    links.append([len(links) + 1, given.node, given.slot, number, len(sockets), self.type_of(given)])
                    outgoing.setdefault(given, []).append(len(links))
                    socket["link"] = len(links)
                sockets.append(socket)
            values: list[Any] = []
            for entry in listed:
                if entry.is_widget:
                    given = node.inputs.get(entry.name, entry.default)
                    if isinstance(given, Output):
                        given = self._inlets[given.slot][2] if given.node == INLET else entry.default
                    values.append(given)
                    values += ["fixed"] if entry.control else []
            ours = node.kind.startswith("Elrond")
            saved: dict[str, Any] = {
                "id": number,
                "type": node.kind,
                "pos": list(node.pos),
                "size": list(node.size),
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": sockets,
                "outputs": [
                    {"localized_name": name, "name": name, "type": kind, "links": None}
                    for name, kind in zip(schema["output_name"], schema["output"], strict=True)
                ],
            }
            if node.title:
                saved["title"] = node.title
            saved["properties"] = {
                "cnr_id": "elrond" if ours else "comfy-core",
                "Node name for S&R": node.kind,
            }
            saved["widgets_values"] = values
            nodes.append(saved)
        for source, numbers in outgoing.items():
            if source.node != INLET:
                nodes[source.node - 1]["outputs"][source.slot]["links"] = numbers
        return nodes, links

    def type_of(self, output: Output) -> str:
        """What comes out of an output."""
        if output.node == INLET:
            return self._inlets[output.slot][1]
        kind: str = self._known[self._nodes[output.node].kind]["output"][output.slot]
        return kind

    def subgraph(self, category: str, description: str, outlets: dict[str, Output]) -> dict[str, Any]:
        """A blueprint of one node that holds the graph, as the frontend publishes it.

        Args:
            category: where the frontend lists it.
            description: what it does.
            outlets: what comes out, by name.
        """
        boxes = self._lay_out()
        nodes, links = self.parts()
        ends: list[list[int]] = []
        for place, output in enumerate(outlets.values()):
            links.append([len(links) + 1, output.node, output.slot, OUTLET, place, self.type_of(output)])
            socket = nodes[output.node - 1]["outputs"][output.slot]
            socket["links"] = [*(socket["links"] or []), len(links)]
            ends.append([len(links)])
        right = max(x + width for x, _, width, _ in boxes)
        inlets, face, promoted, values = [], [], [], []
        for slot, (name, kind, value) in enumerate(self._inlets):
            numbers = [link[0] for link in links if link[1] == INLET and link[2] == slot]
            pos = [-200, 100 + ROW * slot]
            inlets.append({"id": self._id(f"in {name}"), "name": name, "type": kind, "linkIds": numbers, "pos": pos})
            socket = {"name": name, "type": kind, "link": None}
            if kind in WIDGETS:
                socket["widget"] = {"name": name}
                promoted.append([FACE, name])
                values.append(value)
            face.append(socket)
        definition = {
            "id": self._id("definition"),
            "version": 1,
            "state": {
                "lastGroupId": 0,
                "lastNodeId": len(nodes),
                "lastLinkId": len(links),
                "lastRerouteId": 0,
            },
            "revision": 0,
            "config": {},
            "name": self.name,
            "inputNode": {"id": INLET, "bounding": [-300, 80, 120, ROW * (len(inlets) + 2)]},
            "outputNode": {"id": OUTLET, "bounding": [right + 60, 80, 120, ROW * (len(outlets) + 2)]},
            "inputs": inlets,
            "outputs": [
                {
                    "id": self._id(f"out {name}"),
                    "name": name,
                    "type": self.type_of(output),
                    "linkIds": numbers,
                    "pos": [right + 80, 100 + ROW * place],
                }
                for place, ((name, output), numbers) in enumerate(zip(outlets.items(), ends, strict=True))
            ],
            "widgets": [],
            "nodes": nodes,
            "groups": [],
            "links": [
                dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link, strict=True))
                for link in links
            ],
            "extra": {},
            "category": category,
            "description": description,
        }
        widgets = len(promoted)
        height = ROW * max(len(face) - widgets, len(outlets)) + 6 + WIDGET * widgets + 8
        if any(self._is_text(Output(INLET, slot)) for slot in range(len(self._inlets))):
            height += TEXT
        node = {
            "id": 1,
            "type": definition["id"],
            "pos": [0, 0],
            "size": [WIDTH, height],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": face,
            "outputs": [
                {"name": name, "type": self.type_of(output), "links": None} for name, output in outlets.items()
            ],
            "title": self.name,
            "properties": {"proxyWidgets": promoted, "cnr_id": "elrond"},
            "widgets_values": values,
        }
        return {
            "id": self._id("file"),
            "revision": 0,
            "last_node_id": 1,
            "last_link_id": 0,
            "nodes": [node],
            "links": [],
            "groups": [],
            "definitions": {"subgraphs": [definition]},
            "config": {},
            "extra": {"frontendVersion": FRONTEND},
            "version": 0.4,
        }

    def _is_text(self, inlet: Output) -> bool:
        """Whether an input of the subgraph feeds a text of several lines."""
        return any(
            entry.multiline and node.inputs.get(entry.name) == inlet
            for node in self._nodes.values()
            for entry in entries(self._known[node.kind])
        )

    def _id(self, what: str) -> str:
        return str(uuid.uuid5(NAMESPACE, f"{self.name}: {what}"))

    def _lay_out(self) -> list[tuple[int, int, int, int]]:
        """Place the nodes; returns the groups' boxes."""
        boxes: list[tuple[int, int, int, int]] = []
        left = 0
        for group in self._groups:
            x, bottom = left + AROUND, 0
            for column in group.columns:
                y = AROUND + 2 * TITLE
                for number in column:
                    node = self._nodes[number]
                    node.size = (WIDTH, self._height(node.kind))
                    node.pos = (x, y)
                    bottom = max(bottom, y + node.size[1])
                    widgets = sum(entry.is_widget for entry in entries(self._known[node.kind]))
                    y += node.size[1] + BELOW + TALLER * widgets
                x += WIDTH + BESIDE
            boxes.append((left, 0, x - BESIDE + AROUND - left, bottom + AROUND))
            left = x - BESIDE + AROUND + BESIDE
        return boxes

    def _height(self, kind: str) -> int:
        schema = self._known[kind]
        widgets = [entry for entry in entries(schema) if entry.is_widget]
        sockets = len(list(entries(schema))) - len(widgets)
        height = ROW * max(sockets, len(schema["output"]), 1) + 6
        height += WIDGET * (len(widgets) + sum(entry.control for entry in widgets)) + (8 if widgets else 0)
        height += TEXT * sum(entry.multiline for entry in widgets)
        return max(height, TALL.get(kind, 0))


@dataclass(frozen=True)
class Entry:
    """One input of a node.

    Attributes:
        name: the input's.
        type: of what it takes.
        default: its value if it is a widget.
        options: the choices, of a list.
        optional: whether it may be left out.
        control: whether the frontend puts a control beside it that changes it after each run.
        multiline: whether its text has several lines.
    """

    name: str
    type: str
    default: Any
    options: Sequence[Any] | None
    optional: bool
    control: bool
    multiline: bool

    @property
    def is_widget(self) -> bool:
        """Whether it has a field of its own."""
        return self.type in WIDGETS


def entries(schema: dict[str, Any]) -> Iterator[Entry]:
    """A node's inputs in the frontend's order: required ones first."""
    for part in ("required", "optional"):
        for name, (kind, *rest) in schema["input"].get(part, {}).items():
            extra = rest[0] if rest else {}
            options = kind if isinstance(kind, list) else extra.get("options")
            kind = "COMBO" if isinstance(kind, list) else kind
            usual = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False, "COMBO": (options or [""])[0]}
            control = kind == "INT" and extra.get("control_after_generate", name in ("seed", "noise_seed"))
            yield Entry(
                name,
                kind,
                extra.get("default", usual.get(kind)),
                options,
                part == "optional",
                bool(control),
                bool(extra.get("multiline")),
            )
