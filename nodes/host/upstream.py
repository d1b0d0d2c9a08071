"""What stands in the graph before a node."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from comfy_execution.graph_utils import GraphBuilder, is_link

# The host's module, which has the name of this pack's own.
HOST_NODES: Any = importlib.import_module("nodes")
# The host's name for inputs that grow by one socket for each that is connected starts with this.
_GROWING = "COMFY_AUTOGROW"


class ImageNode(NamedTuple):
    """A node that may encode a text together with images.

    Attributes:
        id: its id in the graph.
        kind: its class, as the host calls it.
        clip: the name of its CLIP input.
        text: the name of the input that holds the text.
        values: its other inputs, by name; None for what comes from a node.
        images: where its images come from, as links by the name of the input; none if none are connected.
    """

    id: str
    kind: str
    clip: str
    text: str
    values: dict[str, Any]
    images: dict[str, list[Any]]


def texts_before(hidden: Any, name: str) -> list[list[str]]:
    """The texts that nodes before an input hold, as the graph has them: for each node, the nearest first.

    Args:
        hidden: the hidden values of the node that asks: the graph (`dynprompt`) and its own id; None outside a graph.
        name: the input.
    """
    values = [node.get("inputs", {}).values() for _, node in _before(hidden, name)]
    texts = [[value for value in each if isinstance(value, str) and value.strip()] for each in values]
    return [each for each in texts if each]


def image_nodes_before(hidden: Any, name: str) -> list[ImageNode]:
    """The nodes before an input that may encode a text together with images, the nearest first.

    Args:
        hidden: see `texts_before`.
        name: the input.
    """
    out: list[ImageNode] = []
    for node_id, node in _before(hidden, name):
        inputs, kinds = node.get("inputs", {}), _kinds(node.get("class_type", ""))
        clips, texts = ([name for name, kind in kinds.items() if kind == wanted] for wanted in ("CLIP", "STRING"))
        sockets = {name for name, kind in kinds.items() if kind.startswith(("IMAGE", _GROWING))}
        # An input that grows has its sockets after a dot: images.image_1.
        images = {name: value for name, value in inputs.items() if is_link(value) and name.split(".")[0] in sockets}
        if clips and texts and sockets and _encodes(node.get("class_type", "")):
            values = {
                name: None if is_link(value) else value
                for name, value in inputs.items()
                if name not in (*images, clips[0], texts[0])
            }
            out.append(ImageNode(node_id, node["class_type"], clips[0], texts[0], values, images))
    return out


def _encodes(kind: str) -> bool:
    """Whether a class of nodes returns a conditioning."""
    found = HOST_NODES.NODE_CLASS_MAPPINGS.get(kind)
    return found is not None and "CONDITIONING" in (getattr(found, "RETURN_TYPES", None) or ())


def with_links(hidden: Any, links: dict[str, list[Any]]) -> tuple[Any, dict[str, Any]]:
    """A node once more, with further links, to be run in its place.

    Args:
        hidden: see `texts_before`.
        links: by the name of the input, which need not be one of the node's.

    Returns:
        the new node, and the graph that it is in.
    """
    node = hidden.dynprompt.get_node(hidden.unique_id)
    graph = GraphBuilder()
    again = graph.node(node["class_type"], **node["inputs"], **links)
    return again, graph.finalize()


def _before(hidden: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The nodes before an input, with their ids."""
    graph = getattr(hidden, "dynprompt", None)
    if graph is None:
        return
    seen: set[str] = set()
    inputs = graph.get_node(hidden.unique_id)["inputs"]
    links = [inputs[name]] if is_link(inputs.get(name)) else []
    while links:
        node_id = links.pop(0)[0]
        if node_id in seen or not graph.has_node(node_id):
            continue
        seen.add(node_id)
        node = graph.get_node(node_id)
        yield node_id, node
        links += [value for value in node.get("inputs", {}).values() if is_link(value)]


def _kinds(class_type: str) -> dict[str, str]:
    """The types of a node's inputs, by name; a choice of several has none."""
    found = HOST_NODES.NODE_CLASS_MAPPINGS.get(class_type)
    declared = found.INPUT_TYPES() if found else {}
    return {
        name: kind
        for group in ("required", "optional")
        for name, (kind, *_) in declared.get(group, {}).items()
        if isinstance(kind, str)
    }
