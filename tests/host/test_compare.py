"""CompareDirections and MergeGradients in process."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy_execution.graph import ExecutionBlocker
from comfyui_elrond.elrond_core.directions import Directions
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.provenance import Provenance

AXES = torch.eye(128)[:, None]


def directions(*axes: int) -> Directions:
    vectors = AXES[list(axes)]
    return Directions(vectors, torch.ones(len(axes)), {"name": "test"}, Provenance("Demo", concept="person"))


def collect(nodes: dict[str, Any], teacher: SimpleNamespace, seed: int, **more: Any) -> Any:
    node = nodes["ElrondCollectGradients"]
    with torch.inference_mode():
        return node.execute(teacher.model, teacher.positive, teacher.realizations, 40, 0.5, 8, seed, True, **more).args[
            0
        ]


def test_compare_gives_what_is_shared_and_what_is_not(nodes: dict[str, Any]) -> None:
    with torch.inference_mode():
        out = nodes["ElrondCompareDirections"].execute(directions(0, 1, 2), directions(1, 2, 3, 4), 45.0).args
    assert len(out) == len(nodes["ElrondCompareDirections"].define_schema().outputs)
    report, plot, shared, only_reference, only_sample = out
    assert report.splitlines() == [
        "shared directions: 2, only in A: 1, only in B: 2",
        "reconstruction (of A by B): 0.67",
        "hallucination (of B beside A): 0.50",
        "principal angles: 0°, 0°, 90°",
    ]
    assert plot.ndim == 4 and plot.shape[0] == 1 and plot.shape[3] == 3 and 0 <= plot.min() < plot.max() <= 1
    for found, axes in ((shared, [1, 2]), (only_reference, [0]), (only_sample, [3, 4])):
        assert len(found) == len(axes) and found.provenance.concept == "person"
        assert found.vectors.flatten(1)[:, axes].norm(dim=1).tolist() == pytest.approx([1.0] * len(axes))


def test_directions_of_real_gradients_are_compared_and_steer(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    one, other = (
        nodes["ElrondFitPCA"].execute(collect(nodes, teacher, seed), 2.5, 64, "width").args[0] for seed in (1, 2)
    )
    report, _, shared, *_ = nodes["ElrondCompareDirections"].execute(one, other, 80.0).args
    assert report.startswith("shared directions: ") and len(shared) >= 1
    steer = nodes["ElrondApplyDirection"].execute
    steered = steer(teacher.positive, shared, 0, 0.5, "token norms", 0.0, 1.0, "").args[0]
    assert (steered[0][0] - teacher.positive[0][0]).norm() > 0.1
    saved = nodes["ElrondSaveDirections"].execute(shared, "shared", True).args[1]
    assert torch.equal(nodes["ElrondLoadDirections"].execute(saved).args[0].vectors, shared.vectors)


def test_what_there_is_none_of_blocks_its_output_alone(nodes: dict[str, Any]) -> None:
    run = nodes["ElrondCompareDirections"].execute
    report, _, shared, only_reference, only_sample = run(directions(0, 1), directions(1, 0), 0.0).args
    assert report.startswith("shared directions: 2, only in A: 0, only in B: 0") and len(shared) == 2
    for blocked, sentence in (
        (only_reference, "The sample spans all of the reference up to 0 degrees."),
        (only_sample, "The reference spans all of the sample up to 0 degrees."),
        (run(directions(0), directions(1), 45.0).args[2], "The two sets share no direction up to 45 degrees."),
    ):
        assert isinstance(blocked, ExecutionBlocker) and blocked.message == sentence


def test_the_host_runs_no_node_that_is_wired_to_a_blocked_output(nodes: dict[str, Any]) -> None:
    import execution

    blocked = nodes["ElrondCompareDirections"].execute(directions(0), directions(0), 0.0).args[3]
    told = []

    def tell(block: ExecutionBlocker) -> ExecutionBlocker:
        told.append(block.message)
        return block

    node = nodes["ElrondSaveDirections"]
    inputs = {"directions": [blocked], "name": ["never"], "overwrite": [False]}
    asyncio.run(execution.get_output_data("prompt", "1", node, inputs, execution_block_cb=tell))
    assert told == ["The sample spans all of the reference up to 0 degrees."]
    assert nodes["ElrondLoadDirections"].validate_inputs("never") is not True


def test_compare_refuses_another_family(nodes: dict[str, Any]) -> None:
    other = replace(directions(0), provenance=Provenance("SDXL"))
    with pytest.raises(ElrondError, match="Directions of Demo cannot be compared with directions of SDXL"):
        nodes["ElrondCompareDirections"].execute(directions(0), other, 45.0)


def test_two_machines_gradients_are_merged_saved_and_decomposed(
    nodes: dict[str, Any], teacher: SimpleNamespace
) -> None:
    run = nodes["ElrondMergeGradients"].execute
    one, other = collect(nodes, teacher, 1), collect(nodes, teacher, 2)
    for gradients, name in ((one, "one"), (other, "other")):
        nodes["ElrondSaveGradients"].execute(gradients, name, True)
    loaded = [nodes["ElrondLoadGradients"].execute(name).args[0] for name in ("one", "other")]
    merged, report = run(*loaded).args
    assert torch.equal(merged.vectors, torch.cat([one.vectors, other.vectors]))
    assert merged.provenance.seeds == (1, 2) and merged.provenance.count == 80
    assert [line.split(",")[0] for line in report.splitlines()] == [
        "1: 40 gradients and 40 responses of seed 1",
        "2: 40 gradients and 40 responses of seed 2",
    ]
    saved = nodes["ElrondSaveGradients"].execute(merged, "both", True).args[1]
    assert nodes["ElrondLoadGradients"].execute(saved).args[0].provenance == merged.provenance
    for fit, settings in (("ElrondFitPCA", (2.5, 64, "width")), ("ElrondFitResponse", (1.0, 64))):
        assert nodes[fit].execute(merged, *settings).args[0].provenance.count == 80
    with pytest.raises(ElrondError, match="Of 40 gradients of seed 2, 40 are already among those of seed 1, 2"):
        run(merged, collect(nodes, teacher, 3), None, other)


def test_merge_refuses_another_concept_and_what_is_normalised(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    run = nodes["ElrondMergeGradients"].execute
    one, other = collect(nodes, teacher, 1), collect(nodes, teacher, 2)
    with pytest.raises(ElrondError, match="the concept of one is 'person', of the other 'lady'"):
        run(one, replace(other, provenance=other.provenance.with_(concept="lady")))
    normalised = nodes["ElrondSelectGradients"].execute(other, 0, True).args[0]
    with pytest.raises(ElrondError, match="merge them before they are normalised"):
        run(one, normalised)


def test_a_length_is_called_the_same_by_every_report(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    one, other = collect(nodes, teacher, 1), collect(nodes, teacher, 2)
    expected = f"{float(one.flat.double().square().sum(1).mean().sqrt()):.3g}"
    reports = (
        nodes["ElrondSelectGradients"].execute(one, 0, False).args[1],
        nodes["ElrondMergeGradients"].execute(one, other).args[1],
    )
    for report in reports:
        lengths = re.findall(r"([a-z ]*length) ([-+.e0-9]+)", report)
        assert lengths[0] == (lengths[0][0], expected) and lengths[0][0].endswith("root mean square length")
