"""Calibrating with the host's own objects: what it finds, what it refuses, and going on after a cancel."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from comfyui_elrond.elrond_core.directions import Directions
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.measure import diversity
from comfyui_elrond.elrond_core.steering.calibration import strength_at
from comfyui_elrond.elrond_core.storage.format import load_directions, save_directions
from comfyui_elrond.nodes import host

SHIPPED = Path(__file__).parents[2] / "demo" / "directions" / "demo person.safetensors"
SETTINGS: dict[str, Any] = {
    "which": "0, 1",
    "seeds": 2,
    "samples": 16,
    "references": 8,
    "furthest": 1.0,
    "width": 64,
    "height": 64,
    "seed": 3,
    "steps": 2,
    "cfg": 1.0,
    "sampler_name": "euler",
    "scheduler": "simple",
    "batch_size": 4,
    "cell": 32,
    "concept": "",
}


@pytest.fixture(scope="module")
def shipped() -> Directions:
    return load_directions(SHIPPED)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where finished work is kept, in an output folder of its own; afterwards nothing is cancelled."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    yield tmp_path / "elrond" / "collections"
    comfy.model_management.interrupt_current_processing(False)


def calibrate(nodes: dict[str, Any], teacher: SimpleNamespace, directions: Directions, **changes: Any) -> Any:
    inputs = {"model": teacher.model, "positive": teacher.positive, "vae": teacher.vae, **SETTINGS, **changes}
    with torch.inference_mode():
        return nodes["ElrondCalibrateDirections"].execute(directions=directions, **inputs).args


def change_at(teacher: SimpleNamespace, nodes: dict[str, Any], directions: Directions, strength: float) -> float:
    """The mean change of the calibration's own seeds at a strength in token norms, by the nodes a user would take."""
    apply = nodes["ElrondApplyDirection"].execute
    steered = apply(teacher.positive, directions, 0, strength, "token norms", 0.0, 1.0, "").args[0]
    sample = nodes["ElrondSampleRealizations"].execute
    with torch.inference_mode():
        before, after = (
            teacher.vae.decode(
                sample(teacher.model, prompt, 64, 64, 2, 4, 3, 2, 1.0, "euler", "simple").args[0]["samples"]
            )
            for prompt in (teacher.positive, steered)
        )
    before, after = (diversity.points_of_pixels(images).double() for images in (before, after))
    return float((before - after).norm(dim=1).mean())


def test_stops_lie_at_equal_changes(nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions) -> None:
    found, sheet, report = calibrate(nodes, teacher, shipped, samples=40)
    assert "more samples" not in report
    assert all(found.stops[:2]) and not any(found.stops[2:])
    assert torch.equal(found.vectors, shipped.vectors) and found.names == shipped.names
    assert "2 seeds of 'person'" in found.method["calibration"] and "pixels at 32 x 32" in report
    assert sheet.shape[0] == 1 and sheet.shape[2] > 9 * 32
    stops = found.stops[0]
    assert len(stops) == 9 and stops[4] == 0 and found.intervals[0] == (stops[0], stops[-1])
    for side in (stops[4::-1], stops[4:]):
        changes = [change_at(teacher, nodes, shipped, stop) for stop in side]
        step = changes[-1] / 4
        assert step > 0
        assert changes == pytest.approx([step * n for n in range(5)], abs=0.15 * step)


def test_a_cancelled_calibration_goes_on_where_it_stopped(
    nodes: dict[str, Any],
    teacher: SimpleNamespace,
    shipped: Directions,
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampled: list[int] = []
    sample = host.sample

    def counted(*inputs: Any, **options: Any) -> torch.Tensor:
        if len(sampled) == cancel_after:
            comfy.model_management.interrupt_current_processing()
        sampled.append(len(inputs[3]))
        return sample(*inputs, **options)

    monkeypatch.setattr(host, "sample", counted)
    cancel_after = -1
    whole, sheet, report = calibrate(nodes, teacher, shipped)
    save_directions(whole, tmp_path / "whole")
    everything = len(sampled)
    shutil.rmtree(folder)

    sampled.clear()
    cancel_after = everything // 2
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        calibrate(nodes, teacher, shipped)
    assert len(sampled) == everything // 2 + 1
    cancel_after = -1
    sampled.clear()
    resumed, same_sheet, same_report = calibrate(nodes, teacher, shipped)
    assert len(sampled) < everything * 0.8
    save_directions(resumed, tmp_path / "resumed")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()
    assert torch.equal(sheet, same_sheet) and report == same_report
    # Another seed is other work.
    sampled.clear()
    calibrate(nodes, teacher, shipped, seed=4, which="0")
    assert len(sampled) > 6


def test_the_bar_ends_at_its_end(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, *_, **__: seen.append(done / total))
    calibrate(nodes, teacher, shipped, which="0")
    assert seen[-1] == 1 and seen == sorted(seen)


def test_an_image_encoder_compares_what_images_show(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions, encoder: Any
) -> None:
    found, _, report = calibrate(nodes, teacher, shipped, clip_vision=encoder, which="0")
    assert "the cosine of an image encoder's features" in report and found.stops[0]
    assert found.stops[0] != calibrate(nodes, teacher, shipped, which="0")[0].stops[0]


def test_realizations_take_the_place_of_references(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the node would sample itself give the same result."""
    with torch.inference_mode():
        sample = nodes["ElrondSampleRealizations"].execute
        latents = sample(teacher.model, teacher.positive, 64, 64, 10, 4, 3, 2, 1.0, "euler", "simple").args[0]
    given = {"samples": latents["samples"][2:]}
    one, other = (calibrate(nodes, teacher, shipped, which="0", **more)[0] for more in ({}, {"realizations": given}))
    assert one.stops[0] == pytest.approx(other.stops[0], abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"which": "0-99"}, "There are no directions 0-99"),
        ({"cfg": 5.0}, "needs a negative prompt"),
        ({"concept": "dog"}, "no marked concept 'dog'"),
        ({"samples": 3}, "at least 16 samples, not 3"),
        ({"furthest": -1.0}, "furthest strength must lie above 0"),
        ({"realizations": {"samples": torch.zeros(3, 16, 8, 8)}}, "at least 8 realizations, not 3"),
        ({"realizations": {"samples": torch.zeros(9, 24, 8, 16)}}, "of another size: set width and height to theirs"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    nodes: dict[str, Any],
    teacher: SimpleNamespace,
    shipped: Directions,
    changes: dict[str, Any],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "sample", lambda *_, **__: pytest.fail("it sampled before it looked"))
    with pytest.raises(ElrondError, match=sentence):
        calibrate(nodes, teacher, shipped, **changes)


def test_a_prompt_for_each_image_is_refused(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions
) -> None:
    settings = (3, 1, 0.3, 0.6, "token norms", 1, 0, True, 0.0, 1.0, "")
    several = nodes["ElrondDiversify"].execute(teacher.positive, shipped, *settings).args[0]
    with pytest.raises(ElrondError, match="another one for each of 3 images"):
        calibrate(nodes, teacher, shipped, positive=several)
    check = nodes["ElrondCalibrateDirections"].validate_inputs
    assert "'first' is not a direction" in check(which="first") and "needs a negative prompt" in check(cfg=4.0)


def test_a_model_that_draws_one_image_is_refused(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "decode", lambda vae, latents: torch.full((len(latents), 64, 64, 3), 0.5))
    with pytest.raises(ElrondError, match="the same image for every seed"):
        calibrate(nodes, teacher, shipped)


STOPS = ((-0.9, -0.3, 0.0, 0.1, 0.7), (-0.4, 0.0, 0.4))


def with_stops(shipped: Directions, *stops: tuple[float, ...]) -> Directions:
    """Directions of which the first ones are calibrated."""
    rest = len(shipped) - len(stops)
    intervals = tuple((one[0], one[-1]) for one in stops) + ((0.0, 0.0),) * rest
    return replace(shipped, stops=(*stops, *((),) * rest), intervals=intervals)


def applied(nodes: dict[str, Any], teacher: SimpleNamespace, directions: Directions, **inputs: Any) -> torch.Tensor:
    settings = {"index": 0, "strength": 0.0, "unit": "token norms", "start": 0.0, "end": 1.0, "concept": "", **inputs}
    return nodes["ElrondApplyDirection"].execute(teacher.positive, directions, **settings).args[0][0][0]


@pytest.mark.parametrize("calibrated", [-1.0, -0.625, 0.0, 0.3, 1.0, 1.5])
def test_a_calibrated_strength_is_the_one_in_token_norms_to_the_bit(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions, calibrated: float
) -> None:
    known = with_stops(shipped, *STOPS)
    expected = applied(nodes, teacher, known, strength=strength_at(STOPS[0], calibrated))
    for unit in ("calibrated", "auto"):
        assert torch.equal(applied(nodes, teacher, known, strength=calibrated, unit=unit), expected)
        several = applied(nodes, teacher, known, strengths=f"0: {calibrated}, 1: -0.5", unit=unit)
        same = f"0: {strength_at(STOPS[0], calibrated):.17g}, 1: {strength_at(STOPS[1], -0.5):.17g}"
        assert torch.equal(several, applied(nodes, teacher, known, strengths=same))


def test_what_is_not_calibrated_is_in_token_norms_or_refused(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions
) -> None:
    known = with_stops(shipped, *STOPS)
    for directions in (known, shipped):
        one, other = (
            applied(nodes, teacher, directions, index=2, strength=0.4, unit=u) for u in ("auto", "token norms")
        )
        assert torch.equal(one, other)
        with pytest.raises(ElrondError, match="Direction 2 is not calibrated: use Calibrate Directions"):
            applied(nodes, teacher, directions, index=2, strength=0.4, unit="calibrated")
    mixed = applied(nodes, teacher, known, strengths="0: -0.5, 2: 0.4", unit="auto")
    assert torch.equal(mixed, applied(nodes, teacher, known, strengths="0: -0.3, 2: 0.4"))


def test_graphs_of_before_keep_their_unit(nodes: dict[str, Any]) -> None:
    for name in ("ApplyDirection", "Diversify", "DirectionSweep"):
        inputs = {entry.id: entry for entry in nodes[f"Elrond{name}"].define_schema().inputs}
        assert inputs["unit"].options == ["token norms", "absolute", "calibrated", "auto"]
        assert inputs["unit"].default == "auto"


def test_a_sweep_goes_from_stop_to_stop(nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions) -> None:
    known = with_stops(shipped, *STOPS)

    def images(lowest: float, highest: float, unit: str) -> torch.Tensor:
        settings = (64, 64, 3, 2, 1.0, "euler", "simple", 3, 32, "", False)
        with torch.inference_mode():
            sweep = nodes["ElrondDirectionSweep"].execute
            inputs = (teacher.model, teacher.positive, known, teacher.vae, "1", lowest, highest, 3, unit)
            return sweep(*inputs, *settings).args[1]

    expected = images(-0.4, 0.4, "token norms")
    for unit in ("calibrated", "auto"):
        assert torch.equal(images(-1.0, 1.0, unit), expected)


@pytest.mark.parametrize(("how", "mix"), [("random", 1), ("random", 2), ("spread", 1)])
@pytest.mark.parametrize("unit", ["calibrated", "auto"])
def test_images_of_a_batch_have_calibrated_strengths(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions, how: str, mix: int, unit: str
) -> None:
    """What the report says of an image makes it again, and all steps are within the usable range."""
    known = with_stops(shipped, *STOPS)
    settings = (3, 5, 0.3, 0.9, unit, mix, 2, True, 0.0, 1.0, "")
    batch, report = nodes["ElrondDiversify"].execute(teacher.positive, known, *settings, how=how).args
    for i, line in enumerate(report.splitlines()):
        found = re.match(rf"image {i}: strengths (.*) in {unit}", line)
        assert found
        again = applied(nodes, teacher, known, strengths=found[1], unit=unit)
        torch.testing.assert_close(again[0], torch.Tensor(batch[0][0][i]), rtol=0, atol=1e-3)
    plain = nodes["ElrondDiversify"].execute(
        teacher.positive, shipped, 3, 5, 0.3, 0.9, "token norms", mix, 2, True, 0.0, 1.0, "", how=how
    )
    if unit == "auto":
        same = nodes["ElrondDiversify"].execute(teacher.positive, shipped, *settings, how=how)
        assert torch.equal(same.args[0][0][0], plain.args[0][0][0])
    assert not torch.equal(batch[0][0], plain.args[0][0][0])
