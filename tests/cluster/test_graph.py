"""Graphs: what is divided, and what a list of concepts changes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from cluster import graph as graphs
from cluster.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def discover() -> graphs.Graph:
    return graphs.load(ROOT / "workflows" / "api" / "discover.json")


def test_jobs_come_after_those_they_need(discover: graphs.Graph) -> None:
    assert [(job.node, job.unit, job.upstream) for job in graphs.jobs(discover)] == [
        ("3", "images", ()),
        ("7", "gradients", ("3",)),
    ]


def test_jobs_of_a_graph_with_several_collections() -> None:
    several = graphs.jobs(graphs.load(ROOT / "workflows" / "api" / "complexity.json"))
    places = {job.node: place for place, job in enumerate(several)}
    assert sum(job.unit == "gradients" for job in several) > 1
    assert all(len(job.upstream) == 1 for job in several if job.unit == "gradients")
    assert all(places[other] < places[job.node] for job in several for other in job.upstream)


def test_a_part_holds_only_what_it_needs(discover: graphs.Graph) -> None:
    before = copy.deepcopy(discover)
    part = graphs.with_tasks(discover, {"3": {"mode": "whole"}, "7": {"mode": "range"}}, "7")
    assert set(part) == {"1", "2", "3", "7"}
    assert part["3"]["class_type"] == "ElrondSampleRange" and part["7"]["class_type"] == "ElrondCollectRange"
    assert json.loads(part["7"]["inputs"].pop("task")) == {"mode": "range"}
    assert part["7"]["inputs"] == discover["7"]["inputs"]
    assert set(graphs.with_tasks(discover, {"7": {}})) == set(discover)
    assert discover == before


def changed(graph: graphs.Graph, node: str, **inputs: Any) -> graphs.Graph:
    graph = copy.deepcopy(graph)
    graph[node]["inputs"] |= inputs
    return graph


@pytest.mark.parametrize(
    ("prompt", "concept", "given", "expected"),
    [
        ("a photo of a [dog]", "", "cat", ("a photo of a [cat]", "")),
        ("a photo of a [dog]", "", "the [sea] at night", ("the [sea] at night", "")),
        ("a dog and a hotdog", "dog", "cat", ("a cat and a hotdog", "cat")),
        ("a dog", "dog", "the [sea]", ("the [sea]", "")),
    ],
)
def test_concepts_of_encode_concept(
    discover: graphs.Graph, prompt: str, concept: str, given: str, expected: tuple[str, str]
) -> None:
    inputs = graphs.with_concept(changed(discover, "2", prompt=prompt, concept=concept), given)["2"]["inputs"]
    assert (inputs["prompt"], inputs["concept"]) == expected


def test_concepts_of_mark_concept(discover: graphs.Graph) -> None:
    graph = copy.deepcopy(discover)
    graph["20"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a photo of a dog"}}
    inputs = {"conditioning": ["20", 0], "clip": ["1", 1], "concept": "dog", "text": "", "occurrence": 1}
    graph["2"] = {"class_type": "ElrondMarkConcept", "inputs": inputs}
    cat = graphs.with_concept(graph, "cat")
    assert cat["20"]["inputs"]["text"] == "a photo of a cat" and cat["2"]["inputs"]["concept"] == "cat"
    # Words of other nodes stay.
    assert cat["15"] == graph["15"]
    with pytest.raises(graphs.GraphError, match="needs Encode Concept"):
        graphs.with_concept(graph, "the [sea]")


def test_a_concept_that_replaces_nothing_is_refused(discover: graphs.Graph) -> None:
    with pytest.raises(graphs.GraphError, match=r"put a word into \[brackets\] in its prompt"):
        graphs.with_concept(changed(discover, "2", prompt="a dog"), "cat")
    with pytest.raises(graphs.GraphError, match="comes from another node"):
        graphs.with_concept(changed(discover, "2", prompt=["9", 0]), "cat")
    complexity = graphs.load(ROOT / "workflows" / "api" / "complexity.json")
    with pytest.raises(graphs.GraphError, match="needs one Encode Concept or Mark Concept"):
        graphs.with_concept(complexity, "cat")


def test_lists(tmp_path: Path) -> None:
    assert graphs.concepts("dog, cat ,house") == ["dog", "cat", "house"]
    (tmp_path / "list.txt").write_text("# animals\na [dog], running\n\ncat\n")
    assert graphs.concepts(str(tmp_path / "list.txt")) == ["a [dog], running", "cat"]
    with pytest.raises(graphs.GraphError, match="twice"):
        graphs.concepts("dog, dog")
    with pytest.raises(graphs.GraphError, match="empty"):
        graphs.concepts(" , ")
    assert graphs.file_names(["a [dog]", "a dog!", "../x"]) == ["a-dog", "a-dog-1", "x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON file"),
        ("[]", "no graph in the API format"),
        ("{}", "no graph in the API format"),
        ('{"nodes": []}', r"choose Export \(API\) instead of Export"),
        ('{"1": {"class_type": "A", "inputs": {}}}', "no Collect Gradients"),
        ('{"1": {"class_type": "ElrondCollectGradients", "inputs": {"model": ["2", 0]}}}', "node 2, which it does not"),
        ('{"1": {"class_type": "ElrondCollectGradients", "inputs": {"model": ["1", 0]}}}', "depends on itself"),
    ],
)
def test_what_is_no_graph_is_refused_in_a_sentence(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "graph.json"
    path.write_text(content)
    with pytest.raises(graphs.GraphError, match=message):
        graphs.load(path)
    assert main(["collect", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_options_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "workflows" / "api" / "discover.json")
    assert main(["collect", path, "--workers", "0"]) == 2
    assert capsys.readouterr().err == "--workers must be at least 1, not 0.\n"
    assert main(["collect", str(ROOT / "nothing.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
