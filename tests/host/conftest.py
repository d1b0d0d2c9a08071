"""The demo teacher and a prompt of it, as nodes hand them on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from demo import host  # puts ComfyUI on the path

# Test modules here import the host and the pack when they are collected, before any fixture runs.
host.pack()


@pytest.fixture(autouse=True, scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Collections are kept in the host's output folder: here, in one that goes away."""
    import folder_paths

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path_factory.mktemp("output")))
    yield
    folder_paths.set_output_directory(before)


@pytest.fixture(autouse=True)
def unthrottled_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer hosts send only some updates of a progress bar, by the clock: here they send all."""
    import comfy.utils

    for name in ("PROGRESS_THROTTLE_MIN_INTERVAL", "PROGRESS_THROTTLE_MIN_PERCENT"):
        if hasattr(comfy.utils, name):
            monkeypatch.setattr(comfy.utils, name, 0)


@pytest.fixture(scope="session")
def nodes(pack: ModuleType) -> dict[str, Any]:
    """The pack's node classes by node id."""
    from comfyui_elrond.nodes import NODES

    return {node.define_schema().node_id: node for node in NODES}


@pytest.fixture(scope="session")
def teacher(nodes: dict[str, Any]) -> SimpleNamespace:
    """Model, clip, vae, a marked prompt and 24 realizations, made in inference mode as the executor does."""
    with torch.inference_mode():
        model, clip, vae = nodes["ElrondLoadDemoModel"].execute("teacher").args
        positive = nodes["ElrondEncodeConcept"].execute(clip, "a [person]", "", 1).args[0]
        realizations = (
            nodes["ElrondSampleRealizations"]
            .execute(model, positive, 64, 64, 24, 24, 3, 8, 1.0, "euler", "simple")
            .args[0]
        )
    return SimpleNamespace(model=model, clip=clip, vae=vae, positive=positive, realizations=realizations)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The host's CLIP_VISION object, small and with seeded weights."""
    config = {
        "model_type": "clip_vision_model",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "hidden_act": "quick_gelu",
        "num_channels": 3,
        "patch_size": 16,
        "image_size": 32,
        "projection_dim": 24,
        "use_text": False,
    }
    import comfy.clip_vision

    path = tmp_path_factory.mktemp("vision") / "config.json"
    path.write_text(json.dumps(config))
    model = comfy.clip_vision.ClipVisionModel(str(path))
    g = torch.Generator().manual_seed(0)
    model.load_sd({k: 0.2 * torch.randn(v.shape, generator=g) for k, v in model.get_sd().items()})
    return model
