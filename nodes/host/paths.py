"""Folders of the pack's files, and the server's routes."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import folder_paths


def output_folder() -> Path:
    """The folder for the pack's files: `elrond` in ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory()) / "elrond"


def _models_folder() -> Path:
    """`models/elrond`, registered with the host beside folders that the user's settings name."""
    models = Path(folder_paths.models_dir) / "elrond"
    folder_paths.add_model_folder_path("elrond", str(models))
    return models


def make_folders() -> None:
    """Make `models/elrond/directions` and `models/elrond/gradients` for the user's files, unless the disk refuses."""
    for kind in ("directions", "gradients"):
        with contextlib.suppress(OSError):
            (_models_folder() / kind).mkdir(parents=True, exist_ok=True)


def file_folders() -> list[Path]:
    """Folders of the pack's files, in order of search: `models/elrond`, the output folder, the demo's files."""
    _models_folder()
    shipped = Path(__file__).parents[2] / "demo"
    return [*(Path(p) for p in folder_paths.get_folder_paths("elrond")), output_folder(), shipped]


def routes() -> Any:
    """The running server's route table, or None where nodes are used without a server."""
    instance = getattr(sys.modules.get("server"), "PromptServer", None)
    return getattr(getattr(instance, "instance", None), "routes", None)
