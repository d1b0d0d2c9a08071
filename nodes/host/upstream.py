"""What stands in the graph before a node."""

from __future__ import annotations

from typing import Any

from comfy_execution.graph_utils import is_link


def texts_before(hidden: Any, name: str) -> list[list[str]]:
    """The texts that nodes before an input hold, as the graph has them: for each node, the nearest first.

    Args:
        hidden: the hidden values of the node that asks: the graph (`dynprompt`) and its own id; None outside a graph.
        name: the input.
    """
    graph = getattr(hidden, "dynprompt", None)
    if graph is None:
        return []
    out: list[list[str]] = []
    seen: set[str] = set()
    inputs = graph.get_node(hidden.unique_id)["inputs"]
    links = [inputs[name]] if is_link(inputs.get(name)) else []
    while links:
        node_id = links.pop(0)[0]
        if node_id in seen or not graph.has_node(node_id):
            continue
        seen.add(node_id)
        values = list(graph.get_node(node_id).get("inputs", {}).values())
        out.append([value for value in values if isinstance(value, str) and value.strip()])
        links += [value for value in values if is_link(value)]
    return [texts for texts in out if texts]
