"""Fixtures that several layers share: core tests need no host, host tests import it, e2e tests talk to a server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from demo.server import Server

ROOT = Path(__file__).resolve().parents[1]
# Tests import what is tested from the repository, and what they share (`builders`) from its tests.
for folder in (ROOT / "tests", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(os.cpu_count() or 1)
if os.environ.get("ELROND_GPU"):
    # Results are compared to the bit, and to what single precision leaves of them. Processes of tests inherit these.
    os.environ.update(CUBLAS_WORKSPACE_CONFIG=":4096:8", NVIDIA_TF32_OVERRIDE="0")
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """`demo.host` with ComfyUI importable in this process; what it writes goes to a temporary folder."""
    from demo import host

    # isort: split
    import folder_paths

    for kind in ("output", "temp", "input", "user"):
        getattr(folder_paths, f"set_{kind}_directory")(str(tmp_path_factory.mktemp(kind)))
    return host


@pytest.fixture(scope="session")
def pack(host: ModuleType) -> ModuleType:
    """The repository imported as the host imports it."""
    return host.pack()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running ComfyUI with this pack, shared by all tests that only send it graphs.

    `ELROND_FRONTEND` names the `static` folder of another frontend than the one that the host's version pins.
    """
    from demo.server import Server

    frontend = os.environ.get("ELROND_FRONTEND")
    extra = ["--front-end-root", frontend] if frontend else []
    with Server(tmp_path_factory.mktemp("server-output"), extra=extra) as running:
        yield running
