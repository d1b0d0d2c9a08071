"""Finds the ComfyUI that `dev.py` set up, for scripts that run outside the server."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def path() -> Path:
    """The host's folder: `COMFYUI_PATH`, or `.comfyui` in this repository.

    Raises:
        FileNotFoundError: if there is none, with what to do about it.
    """
    folder = Path(os.environ.get("COMFYUI_PATH") or Path(__file__).parents[1] / ".comfyui")
    if not (folder / "comfy" / "sd.py").is_file():
        raise FileNotFoundError(f"No ComfyUI in {folder}: run `python dev.py demo` once, or set COMFYUI_PATH.")
    return folder


def _prepare() -> None:
    if "comfy" in sys.modules:
        return
    sys.path.insert(0, str(path()))
    # The host reads its options from the command line when first imported; scripts have options of their own.
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True


_prepare()
