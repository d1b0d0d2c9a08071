"""The demo teacher and a prompt of it, as nodes hand them on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from demo import host  # noqa: F401  (puts ComfyUI on the path)

# Test modules here import the host and the pack when they are collected, before any fixture runs.
_ROOT = Path(__file__).resolve().parents[2]
_SPEC = importlib.util.spec_from_file_location(
    "comfyui_elrond", _ROOT / "__init__.py", submodule_search_locations=[str(_ROOT)]
)
assert _SPEC is not None and _SPEC.loader is not None
if "comfyui_elrond" not in sys.modules:
    sys.modules["comfyui_elrond"] = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(sys.modules["comfyui_elrond"])


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
        positive = nodes["ElrondEncodeConcept"].execute(clip, "a [thing]", "", 1).args[0]
        realizations = (
            nodes["ElrondSampleRealizations"]
            .execute(model, positive, 64, 64, 24, 24, 3, 8, 1.0, "euler", "simple")
            .args[0]
        )
    return SimpleNamespace(model=model, clip=clip, vae=vae, positive=positive, realizations=realizations)
