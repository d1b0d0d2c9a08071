"""Finds the ComfyUI that `dev.py` set up, for scripts that run outside the server."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def path() -> Path:
    """The host's folder: `COMFYUI_PATH`, or `.comfyui` in this repository.

    Raises:
        FileNotFoundError: if there is none, with what to do about it.
    """
    folder = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".comfyui")
    if not (folder / "comfy" / "sd.py").is_file():
        raise FileNotFoundError(f"No ComfyUI in {folder}: run `python dev.py demo` once, or set COMFYUI_PATH.")
    return folder


def on_gpu() -> bool:
    """Whether the demo, the tests and the benchmarks run on the graphics card: if `ELROND_GPU` is set."""
    return bool(os.environ.get("ELROND_GPU"))


def pack() -> ModuleType:
    """The repository imported as the host imports it, as a package: its parts are `comfyui_elrond.nodes` and so on."""
    name = "comfyui_elrond"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _prepare() -> None:
    if "comfy" in sys.modules:
        return
    sys.path.insert(0, str(path()))
    # The host reads its options from the command line when first imported; scripts have options of their own.
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = not on_gpu()
    comfy.cli_args.args.use_pytorch_cross_attention = True


_prepare()
