"""Range nodes: parts that several processes make are together what one makes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.storage.format import load_gradients
from comfyui_elrond.nodes import ranges

SAMPLING = {
    "width": 64,
    "height": 64,
    "count": 10,
    "batch_size": 4,
    "seed": 3,
    "steps": 3,
    "cfg": 1.0,
    "sampler_name": "euler",
    "scheduler": "simple",
}
COLLECTING: dict[str, Any] = {
    "count": 11,
    "noise_level": 1.0,
    "batch_size": 2,
    "seed": 5,
    "response": True,
    "targets_per_realization": 2,
    "more_levels": "0.7",
}


@pytest.fixture
def inputs(teacher: SimpleNamespace) -> dict[str, Any]:
    return {"model": teacher.model, "positive": teacher.positive}


def ask(node: Any, inputs: dict[str, Any], folder: Path, mode: str, **more: Any) -> Any:
    """What a range node answers."""
    task = json.dumps({"mode": mode, "folder": str(folder), **more})
    with torch.inference_mode():
        output = node.execute(task=task, **inputs)
    return output if mode == "whole" else json.loads(output.ui.as_dict()["text"][0])


def test_parts_of_images(nodes: dict[str, Any], inputs: dict[str, Any], tmp_path: Path) -> None:
    inputs = {**inputs, **SAMPLING}
    with torch.inference_mode():
        plain = nodes["ElrondSampleRealizations"].execute(**inputs).args[0]["samples"]
    about = ask(ranges.SampleRange, inputs, tmp_path, "describe")
    assert about["sizes"] == [4, 4, 2]
    for first, count in ((1, 2), (0, 1)):
        answer = ask(ranges.SampleRange, inputs, tmp_path, "range", name=about["name"], first=first, count=count)
        assert answer["file"] == f"0000000{first}-{count}.safetensors"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / about["name"]).iterdir()}
    whole = ask(ranges.SampleRange, inputs, tmp_path, "whole", name=about["name"]).args[0]["samples"]
    assert torch.equal(whole, plain)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / about["name"]).iterdir()} == before


def test_parts_of_gradients(
    nodes: dict[str, Any], inputs: dict[str, Any], teacher: SimpleNamespace, tmp_path: Path
) -> None:
    inputs = {**inputs, "realizations": teacher.realizations, **COLLECTING}
    with torch.inference_mode():
        plain, report = nodes["ElrondCollectGradients"].execute(**inputs).args
    about = ask(ranges.CollectRange, inputs, tmp_path, "describe")
    assert sum(about["sizes"]) == 11
    for number in reversed(range(len(about["sizes"]))):
        ask(ranges.CollectRange, inputs, tmp_path, "range", name=about["name"], first=number, count=1)
    # One that is damaged is made again.
    damaged = tmp_path / about["name"] / "00000001-1.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    save = tmp_path / "merged.safetensors"
    whole = ask(ranges.CollectRange, inputs, tmp_path, "whole", name=about["name"], save=str(save))
    assert whole.args[1] == report
    for name in ("vectors", "sigma", "sources", "targets", "probes", "probe_sigma"):
        assert torch.equal(getattr(whole.args[0], name), getattr(plain, name))
        assert torch.equal(getattr(load_gradients(save), name), getattr(plain, name))
    assert whole.args[0].provenance == plain.provenance


def test_what_determines_the_name(inputs: dict[str, Any], teacher: SimpleNamespace, tmp_path: Path) -> None:
    def name(**more: Any) -> str:
        return ask(ranges.SampleRange, {**inputs, **SAMPLING, **more}, tmp_path, "describe")["name"]

    first = name()
    assert name() == first
    other = [[tensor + 1e-6, options] for tensor, options in teacher.positive]
    patched = teacher.model.clone()
    patched.add_patches(
        {
            "diffusion_model.out.2.weight": (
                "diff",
                (torch.ones_like(patched.model.state_dict()["diffusion_model.out.2.weight"]),),
            )
        }
    )
    names = [name(seed=4), name(batch_size=5), name(steps=4), name(positive=other), name(model=patched)]
    assert len({first, *names}) == 6
    assert name() == first


def test_another_model_is_refused_and_does_nothing(inputs: dict[str, Any], tmp_path: Path) -> None:
    inputs = {**inputs, **SAMPLING}
    answer = ask(ranges.SampleRange, inputs, tmp_path, "range", name="0" * 32, first=0, count=1)
    assert set(answer["refused"]) == {"pack", "host", "torch", "device", "model"}
    assert not list(tmp_path.iterdir())
    with pytest.raises(ElrondError, match="There are batches 0 to 2, and not 2 to 3"):
        name = ask(ranges.SampleRange, inputs, tmp_path, "describe")["name"]
        ask(ranges.SampleRange, inputs, tmp_path, "range", name=name, first=2, count=2)


def test_a_mixture_says_so(
    inputs: dict[str, Any], teacher: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {**inputs, "realizations": teacher.realizations, **COLLECTING}
    mixed = {"name": "mixed-1", "mixed": True}
    about = ask(ranges.CollectRange, inputs, tmp_path, "describe", **mixed)
    assert about["name"] == "mixed-1"
    ask(ranges.CollectRange, inputs, tmp_path, "range", first=0, count=1, **mixed)
    whole = ask(ranges.CollectRange, inputs, tmp_path, "whole", **mixed).args[0]
    assert "made_by_several" not in whole.provenance.extra
    monkeypatch.setattr(ranges._Names, "origin", lambda self, model: {**about["origin"], "device": "another card"})
    ask(ranges.CollectRange, inputs, tmp_path, "range", first=1, count=1, **mixed)
    whole = ask(ranges.CollectRange, inputs, tmp_path, "whole", **mixed).args[0]
    assert whole.provenance.extra["made_by_several"].split("; ") == sorted(["another card", about["origin"]["device"]])
    # What is not readable is nobody's.
    (tmp_path / "mixed-1" / "origin-0.json").write_text("[")
    ask(ranges.CollectRange, inputs, tmp_path, "whole", **mixed)


def test_users_do_not_see_them(nodes: dict[str, Any]) -> None:
    assert not [name for name in nodes if name.endswith("Range")]
