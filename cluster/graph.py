"""Graphs in ComfyUI's API format: where the long work is in them, and how it is put in parts."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLE, COLLECT = "ElrondSampleRealizations", "ElrondCollectGradients"
RANGE_NODES = {SAMPLE: "ElrondSampleRange", COLLECT: "ElrondCollectRange"}
ENCODE, MARK = "ElrondEncodeConcept", "ElrondMarkConcept"
_BRACKETS = re.compile(r"\[[^\[\]]*\]")

Graph = dict[str, dict[str, Any]]


class GraphError(ValueError):
    """A graph or a list of concepts is not what it should be; the message says what to change."""


@dataclass(frozen=True)
class Job:
    """A node whose work is divided.

    Attributes:
        node: its id.
        kind: its class.
        upstream: ids of the jobs it needs first.
    """

    node: str
    kind: str
    upstream: tuple[str, ...]

    @property
    def unit(self) -> str:
        """What its batches consist of."""
        return "images" if self.kind == SAMPLE else "gradients"


def load(path: Path) -> Graph:
    """Read a graph.

    Raises:
        GraphError: if it is none in the API format, or has no Collect Gradients.
    """
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GraphError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise GraphError(f"{path} is no JSON file: export the graph from ComfyUI again.") from error
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise GraphError(f"{path} is a saved workflow: in ComfyUI, choose Export (API) instead of Export.")
    sound = isinstance(graph, dict) and all(
        isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
        for node in graph.values()
    )
    if not sound or not graph:
        raise GraphError(f"{path} is no graph in the API format: in ComfyUI, choose Export (API).")
    if not any(node["class_type"] == COLLECT for node in graph.values()):
        raise GraphError(f"{path} has no Collect Gradients: there is nothing to divide.")
    for name in graph:
        before(graph, name)
    return graph


def before(graph: Graph, node: str) -> set[str]:
    """Ids of the nodes that a node depends on, and its own.

    Raises:
        GraphError: if one of them is missing, or depends on itself.
    """
    seen: set[str] = set()
    open_nodes: list[str] = []

    def visit(name: str) -> None:
        if name in open_nodes:
            raise GraphError(f"Node {name} of the graph depends on itself: export the graph from ComfyUI again.")
        if name in seen:
            return
        if name not in graph:
            raise GraphError(f"The graph links to node {name}, which it does not have: export it again.")
        open_nodes.append(name)
        for source in _sources(graph[name]):
            visit(source)
        open_nodes.pop()
        seen.add(name)

    visit(node)
    return seen


def _sources(node: Mapping[str, Any]) -> list[str]:
    links = [value for value in node["inputs"].values() if isinstance(value, list) and len(value) == 2]
    return [str(source) for source, output in links if isinstance(source, (str, int)) and isinstance(output, int)]


def jobs(graph: Graph) -> list[Job]:
    """All jobs of a graph, each after those that it needs."""
    found = [name for name, node in graph.items() if node["class_type"] in RANGE_NODES]
    upstream = {name: [other for other in found if other != name and other in before(graph, name)] for name in found}
    ordered = sorted(found, key=lambda name: (len(upstream[name]), name))
    return [Job(name, graph[name]["class_type"], tuple(upstream[name])) for name in ordered]


def with_tasks(graph: Graph, tasks: Mapping[str, Mapping[str, Any]], only: str | None = None) -> Graph:
    """A graph whose jobs have become range nodes with these tasks.

    Args:
        graph: the graph as the user exported it.
        tasks: by node id.
        only: if given, the node to run: the graph then holds nothing but what this node needs.
    """
    wanted = set(graph) if only is None else before(graph, only)
    changed = {name: copy.deepcopy(node) for name, node in graph.items() if name in wanted}
    for name, task in tasks.items():
        if name in changed:
            changed[name]["class_type"] = RANGE_NODES[graph[name]["class_type"]]
            changed[name]["inputs"]["task"] = json.dumps(task, sort_keys=True)
    return changed


def concepts(text: str) -> list[str]:
    """The concepts or prompts of a list: a text file with one a line, or a text with commas.

    Raises:
        GraphError: if there are none, or one is there twice.
    """
    path = Path(text)
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else text.split(",")
    except (OSError, ValueError) as error:
        raise GraphError(f"The list {text} cannot be read: {error}.") from error
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise GraphError("The list of concepts is empty: give words with commas between, or a file with one a line.")
    twice = sorted({each for each in found if found.count(each) > 1})
    if twice:
        raise GraphError(f"{twice[0]!r} is in the list of concepts twice: leave one out.")
    return found


def with_concept(graph: Graph, concept: str) -> Graph:
    """The graph for another concept.

    Args:
        graph: with one Encode Concept or one Mark Concept.
        concept: a word that takes the place of the graph's own; or a whole prompt with the word in [brackets], which
            takes the place of Encode Concept's prompt.

    Raises:
        GraphError: if it is not clear what to replace.
    """
    names = [name for name, node in graph.items() if node["class_type"] in (ENCODE, MARK)]
    if len(names) != 1:
        raise GraphError(
            f"The graph marks {len(names)} prompts: a list of concepts needs one Encode Concept or Mark Concept."
        )
    (name,) = names
    changed = copy.deepcopy(graph)
    inputs = changed[name]["inputs"]
    whole = bool(_BRACKETS.search(concept))
    if graph[name]["class_type"] == ENCODE:
        prompt = inputs.get("prompt")
        if whole:
            inputs |= {"prompt": concept, "concept": ""}
            return changed
        if not isinstance(prompt, str):
            raise GraphError(f"The prompt of node {name} comes from another node: write it into Encode Concept.")
    elif whole:
        raise GraphError("A list of prompts needs Encode Concept: give single words to a graph with Mark Concept.")
    _replace(changed, before(graph, name) if graph[name]["class_type"] == MARK else {name}, name, concept)
    return changed


def _replace(graph: Graph, texts: Iterable[str], name: str, concept: str) -> None:
    """Put a word in the place of the one that node `name` marks, in all texts of these nodes."""
    inputs = graph[name]["inputs"]
    field = "prompt" if graph[name]["class_type"] == ENCODE else "text"
    own = str(inputs.get("concept") or "").strip()
    replaced = False
    pattern = re.compile(rf"(?<!\w){re.escape(own)}(?!\w)") if own else _BRACKETS
    for node in texts:
        for key, value in graph[node]["inputs"].items():
            if isinstance(value, str) and (own or node == name) and key != "concept":
                text = pattern.sub(lambda _: concept if own else f"[{concept}]", value)
                replaced = replaced or text != value or concept in value
                graph[node]["inputs"][key] = text
    if own:
        inputs["concept"] = concept
    if not replaced:
        raise GraphError(
            f"Node {name} marks no word that {concept!r} could replace: put a word into [brackets] in its {field}."
        )


def file_names(names: Iterable[str]) -> list[str]:
    """Names of files for concepts, each another."""
    result: list[str] = []
    for name in names:
        plain = re.sub(r"[^\w]+", "-", name).strip("-").lower()[:60] or "concept"
        result.append(plain if plain not in result else f"{plain}-{len(result)}")
    return result


def concept_of(graph: Graph) -> str:
    """What a graph without a list is called: its prompt, or the word that is marked."""
    for node in graph.values():
        if node["class_type"] in (ENCODE, MARK):
            for key in ("prompt", "text", "concept"):
                value = node["inputs"].get(key)
                if isinstance(value, str) and value.strip():
                    return value.strip()
    return "graph"
