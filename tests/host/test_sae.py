"""Train SAE under the host: progress, cancel, and going on where a cancelled training stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from builders import gradients
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.gradients import Gradients
from comfyui_elrond.elrond_core.provenance import Provenance

SETTINGS = {
    "latents": 48,
    "k": 4,
    "epochs": 30,
    "learning_rate": 1e-3,
    "lowest_density": -5.0,
    "highest_density": 0.0,
    "seed": 0,
}
STEPS = 60


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where trainings are kept, in an output folder of its own; afterwards nothing is cancelled."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    yield tmp_path / "elrond" / "trainings"
    comfy.model_management.interrupt_current_processing(False)


class Bar:
    """What the host's progress bar shows; cancels as the user does once it reaches a share of the work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cancel_at: float = 2.0) -> None:
        self.seen: list[float] = []
        self._cancel_at = cancel_at
        monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", self._show)

    def _show(self, done: float, total: float, *_: Any, **__: Any) -> None:
        self.seen.append(done / total)
        if self.seen[-1] >= self._cancel_at:
            comfy.model_management.interrupt_current_processing()


def made(count: int = 1000, width: int = 24) -> Gradients:
    """Gradients as another node hands them on: made in inference mode."""
    with torch.inference_mode():
        g = torch.Generator().manual_seed(0)
        vectors = torch.randn(count, 1, width, generator=g) * torch.rand(count, 1, width, generator=g).square()
        return gradients(vectors, kind=Gradients, provenance=Provenance("SDXL"))


def train(nodes: dict[str, Any], gradients: Gradients, **changes: Any) -> Any:
    with torch.inference_mode():
        return nodes["ElrondTrainSAE"].execute(gradients, **{**SETTINGS, **changes}).args


def test_a_cancelled_training_goes_on_where_it_stopped(
    nodes: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = made()
    before = gradients.vectors.clone()
    bar = Bar(monkeypatch)
    whole, plot, report = train(nodes, gradients)
    assert bar.seen == pytest.approx([step / STEPS for step in range(1, STEPS + 1)])
    assert not list(folder.glob("**/*.*"))

    bar = Bar(monkeypatch, cancel_at=25.5 / STEPS)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(nodes, gradients)
    assert len(bar.seen) == 26
    assert [path.suffix for path in folder.glob("*/*")] == [".safetensors"]
    # Neither another seed nor other gradients go on from there, nor do they take it away.
    for settings in ({"gradients": gradients, "seed": 1}, {"gradients": made(999)}):
        bar = Bar(monkeypatch)
        train(nodes, **settings)
        assert bar.seen[0] < 1.5 / STEPS

    bar = Bar(monkeypatch)
    resumed, same_plot, same_report = train(nodes, gradients)
    assert bar.seen == pytest.approx([step / STEPS for step in range(27, STEPS + 1)])
    assert torch.equal(resumed.vectors, whole.vectors) and torch.equal(resumed.scores, whole.scores)
    assert torch.equal(same_plot, plot) and same_report == report
    assert not list(folder.iterdir())
    assert torch.equal(gradients.vectors, before)


def test_a_cancel_ends_the_set_up(nodes: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = Bar(monkeypatch)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(nodes, made())
    assert not bar.seen


def test_another_range_of_densities_needs_no_training(
    nodes: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = made()
    with pytest.raises(ElrondError, match="widen the range"):
        train(nodes, gradients, lowest_density=-9.0, highest_density=-8.0)
    bar = Bar(monkeypatch)
    found = train(nodes, gradients)[0]
    assert not bar.seen
    assert torch.equal(found.vectors, train(nodes, gradients)[0].vectors)


def test_the_bar_ends_at_its_end_where_training_stops_early(
    nodes: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = Bar(monkeypatch)
    # As many active as dimensions: everything is soon explained.
    report = train(nodes, made(64, 4), latents=4, k=4, epochs=0, learning_rate=0.01)[2]
    assert "stopped early" in report
    assert bar.seen[-1] == 1 and len(bar.seen) < 3000
    assert bar.seen == sorted(bar.seen)


def test_a_folder_that_cannot_be_written_is_named_in_the_log(
    nodes: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(nodes, made())[0]
    folder.parent.mkdir(exist_ok=True)
    if folder.exists():
        folder.rmdir()
    folder.write_text("not a folder")
    found = train(nodes, made())[0]
    assert torch.equal(found.vectors, whole.vectors)
    assert [str(folder) in record.getMessage() for record in caplog.records if "ELROND" in record.getMessage()] == [
        True
    ]
