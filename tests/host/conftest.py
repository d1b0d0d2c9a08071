"""The demo teacher and a prompt of it, as nodes hand them on."""

from __future__ import annotations

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
