"""Sweeping, composing, labelling and measuring, with the host's own objects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_elrond.elrond_core.directions import Directions
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.files import load_directions
from comfyui_elrond.elrond_core.provenance import Provenance
from comfyui_elrond.nodes import host, routes
from PIL import Image

SHIPPED = Path(__file__).parents[2] / "demo" / "directions" / "demo thing.safetensors"


@pytest.fixture(scope="module")
def shipped() -> Directions:
    return load_directions(SHIPPED)


def sweep(nodes: dict[str, Any], teacher: SimpleNamespace, directions: Directions, **changes: Any) -> Any:
    settings = {
        "which": "0, 1",
        "lowest": -0.5,
        "highest": 0.5,
        "columns": 3,
        "unit": "token norms",
        "width": 64,
        "height": 64,
        "seed": 3,
        "steps": 2,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "batch_size": 3,
        "cell": 64,
        "concept": "",
        "thumbnails": False,
        **changes,
    }
    with torch.inference_mode():
        node = nodes["ElrondDirectionSweep"]
        return node.execute(
            model=teacher.model, positive=teacher.positive, directions=directions, vae=teacher.vae, **settings
        ).args


def test_a_sweep_starts_every_image_from_the_same_noise(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions
) -> None:
    sheet, images = sweep(nodes, teacher, shipped, thumbnails=True)
    assert images.shape == (6, 64, 64, 3) and sheet.shape[0] == 1 and sheet.shape[2] > 3 * 64
    # The middle column is the plain prompt in both rows; it is what Sample Realizations makes of this seed.
    with torch.inference_mode():
        plain = nodes["ElrondSampleRealizations"].execute(
            teacher.model, teacher.positive, 64, 64, 2, 2, 3, 2, 1.0, "euler", "simple"
        )
        expected = teacher.vae.decode(plain.args[0]["samples"][:1])[0]
    for middle in (images[1], images[4]):
        assert (middle - expected).abs().max() < 1e-3
    assert (images[0] - images[2]).abs().max() > 0.05
    one_by_one, few = sweep(nodes, teacher, shipped, batch_size=1)[1], sweep(nodes, teacher, shipped, which="1")[1]
    assert (one_by_one - images).abs().max() < 1e-2
    assert (few - images[3:]).abs().max() < 1e-2
    with Image.open(routes.thumbnail(shipped.digest(0))) as strip:
        assert strip.size == (192, 64)
        first = np.asarray(strip)[:, :64].astype(np.float32) / 255
    assert np.abs(first - images[0].numpy()).max() < 0.01


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"which": "0-99"}, "There are no directions 0-99"),
        ({"cfg": 5.0}, "needs a negative prompt"),
        ({"concept": "dog"}, "no marked concept 'dog'"),
    ],
)
def test_sweeps_that_cannot_be(
    nodes: dict[str, Any],
    teacher: SimpleNamespace,
    shipped: Directions,
    changes: dict[str, Any],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "sample", lambda *_, **__: pytest.fail("it sampled before it looked"))
    with pytest.raises(ElrondError, match=sentence):
        sweep(nodes, teacher, shipped, **changes)


def test_impossible_ranges_are_refused_before_the_graph_runs(nodes: dict[str, Any]) -> None:
    for name, bad, sentence in (
        ("DirectionSweep", {"lowest": 1.0, "highest": 1.0}, "from low to high"),
        ("Diversify", {"lowest": 1.0, "highest": 0.5}, "lowest strength 1.0 is above the highest 0.5"),
        ("Diversify", {"start": 0.5, "end": 0.5}, "start before it ends"),
        ("ApplyDirection", {"start": 0.9, "end": 0.5}, "start before it ends"),
        ("ApplyDirection", {"strengths": "red"}, "'red' is not a direction and its strength"),
        ("ComposeDirections", {"weights": "1, x"}, "'x' is not a number"),
        ("LabelDirections", {"words": "red"}, "at least two words"),
    ):
        check = nodes[f"Elrond{name}"].validate_inputs
        assert sentence in check(**bad), name
        # A value that comes over a wire is not known yet.
        assert check(**dict.fromkeys(bad)) is True


def test_several_strengths_are_a_chain_of_single_ones(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions
) -> None:
    node = nodes["ElrondApplyDirection"]

    def apply(positive: Any, index: int, strength: float, strengths: str = "") -> Any:
        return node.execute(positive, shipped, index, strength, "token norms", 0.0, 1.0, "", strengths).args[0]

    chained = apply(apply(teacher.positive, 0, 0.4), 2, -0.3)
    torch.testing.assert_close(apply(teacher.positive, 7, 9.0, "2: -0.3, 0: 0.4")[0][0], chained[0][0])
    assert torch.equal(apply(teacher.positive, 0, 0.9, "0: 0")[0][0], teacher.positive[0][0])
    with pytest.raises(ElrondError, match="no direction 99"):
        apply(teacher.positive, 0, 0.5, "99: 1")


def test_compose(nodes: dict[str, Any], shipped: Directions) -> None:
    run = nodes["ElrondComposeDirections"].execute
    mixed, report = run(shipped, "weighted sum", "1, 0", "2, 1", "both").args
    assert len(mixed) == 1 and report.startswith("0: both")
    expected = 2 * shipped.vectors[1] + shipped.vectors[0]
    torch.testing.assert_close(mixed.vectors[0], expected / expected.norm())
    some, _ = run(shipped, "subset", "2", "", "", mixed).args
    assert torch.equal(some.vectors[0], shipped.vectors[2])
    straight, _ = run(shipped, "orthogonalise", "0-2", "", "\nsecond").args
    assert straight.names[1] == "second"
    with pytest.raises(ElrondError, match="Weights belong to a weighted sum, not to subset"):
        run(shipped, "subset", "", "1", "")


def rows_with(teacher: SimpleNamespace, word: str) -> torch.Tensor:
    return host.encode(teacher.clip, f"a {word} thing")[0][0][0, 3]


def test_labels_of_directions_that_words_make(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    """Directions planted in the demo's own text encoder get their words back."""
    words = ["red", "blue", "large", "small", "left", "right", "dark", "bright"]
    with torch.inference_mode():
        rows = torch.stack([rows_with(teacher, word) for word in words]).clone()
    moves = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)[:, None]
    origin = Provenance("Demo", "a thing", "thing", ("thing",), (2,))
    planted = Directions(moves, torch.ones(8), {"name": "test"}, origin, names=("", "mine", *[""] * 6))
    with torch.inference_mode():
        run = nodes["ElrondLabelDirections"].execute
        named, report = run(teacher.clip, planted, ", ".join(words), 0.1, False, "\n\n\ntiny").args
    lines = report.splitlines()
    for i, word in enumerate(words):
        assert f"+ {word} 1.00" in lines[i]
    assert named.names[0].endswith("→ red") and named.names[1] == "mine" and named.names[3] == "tiny"
    with pytest.raises(ElrondError, match="made for SDXL, but this text encoder is Demo's"):
        run(teacher.clip, replace(planted, provenance=Provenance("SDXL")), "a, b", 0.1, False, "")
    with pytest.raises(ElrondError, match="do not say which concept"):
        run(teacher.clip, replace(planted, provenance=Provenance("Demo")), "a, b", 0.1, False, "")
    with pytest.raises(ElrondError, match="2 names for 1 directions"):
        one = Directions(moves[:1], torch.ones(1), {}, origin)
        run(teacher.clip, one, "a, b", 0.1, False, "x\ny")


def test_labels_look_at_the_occurrence_the_directions_are_for(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    from comfyui_elrond.nodes.labels import _occurrence

    origin = Provenance("Demo", "a thing and a thing", "thing", ("thing",), (5,))
    directions = Directions(torch.eye(128)[:1, None], torch.ones(1), {}, origin)
    with torch.inference_mode():
        assert _occurrence(teacher.clip, directions) == 1


def test_measure_diversity(nodes: dict[str, Any], encoder: Any) -> None:
    run = nodes["ElrondMeasureDiversity"].execute
    images = torch.rand(5, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    images[4] = images[1] * 0.98
    with torch.inference_mode():
        for vision, how in ((None, "their pixels"), (encoder, "image encoder")):
            distance, vendi, nearest, report = run(images, vision).args
            assert distance > 0 and 1 < vendi < 5 and how in report
            assert torch.equal(nearest, images[[1, 4]])
            same = run(images[:1].repeat(5, 1, 1, 1), vision).args
            assert same[0] == pytest.approx(0, abs=1e-6) and same[1] == pytest.approx(1, abs=1e-5)
    with pytest.raises(ElrondError, match="at least two images in the batch, got 1"):
        run(images[:1])


def test_what_the_panel_is_told_and_changes(nodes: dict[str, Any], shipped: Directions) -> None:
    nodes["ElrondSaveDirections"].execute(shipped, "animals/panel", True)
    routes.change("animals/panel", 1, " round ", None)
    routes.change("animals/panel", 0, None, True)
    told = routes.describe("animals/panel")["directions"]
    assert [entry["label"] for entry in told[:2]] == ["", "round"]
    assert [entry["star"] for entry in told[:2]] == [True, False]
    for name, index, label, sentence in (
        ("../../evil", 0, "x", "cannot be a file name"),
        ("no such", 0, "x", "There is no directions file"),
        ("animals/panel", 99, "x", "There is no direction 99"),
        ("animals/panel", 0, "x" * 101, "at most 100"),
        ("animals/panel", 0, "a\nb", "printable"),
    ):
        with pytest.raises(ElrondError, match=sentence):
            routes.change(name, index, label, None)
    with pytest.raises(ElrondError, match="24 hexadecimal"):
        routes.thumbnail("../../../secret")


def test_a_shipped_file_is_copied_before_it_is_changed(nodes: dict[str, Any]) -> None:
    before = SHIPPED.read_bytes()
    routes.change("demo thing", 0, "mine", None)
    assert SHIPPED.read_bytes() == before
    assert routes.describe("demo thing")["directions"][0]["label"] == "mine"
    (host.output_folder() / "directions" / "demo thing.safetensors").unlink()


def test_diversify_leaves_masks_and_other_prompts_alone(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions
) -> None:
    tensor, options = teacher.positive[0]
    mask = torch.ones(1, 64, 64)
    stock = [torch.zeros_like(tensor), {"pooled_output": None}]
    settings = {"lowest": 0.2, "highest": 0.4, "unit": "token norms", "mix": 1, "leading": 3, "both_signs": True}
    out, report = (
        nodes["ElrondDiversify"]
        .execute(
            conditioning=[[tensor, {**options, "mask": mask, "strength": 0.7}], stock],
            directions=shipped,
            count=4,
            seed=1,
            **settings,
            start=0.0,
            end=0.3,
            concept="",
            how="spread",
            weights="by score",
        )
        .args
    )
    early, late, other = out
    assert other is stock or (torch.equal(other[0], stock[0]) and other[1] == stock[1])
    for rows, kept in (early, late):
        assert len(rows) == 4 and kept["mask"] is mask and kept["strength"] == 0.7
    assert early[1]["end_percent"] == 0.3 and late[1]["start_percent"] == pytest.approx(0.3, abs=1e-4)
    assert not torch.equal(early[0][0], early[0][1]) and torch.equal(late[0], tensor.expand(4, -1, -1))
    # Every line of the report names the parts of a mix, its strength and its unit.
    assert [line.count(" x direction ") for line in report.splitlines()] == [3] * 4
    assert all("strength +0." in line and line.endswith("token norms") for line in report.splitlines())
