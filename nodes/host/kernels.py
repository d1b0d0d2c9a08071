"""What takes the place of fused kernels while gradients are taken.

Newer hosts normalise, rotate and modulate in operators of the package `comfy_kitchen`, which have no derivative. The
package holds the same functions in plain PyTorch as well, for devices that have no kernel.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator

from .gradient_patches import replaced_attribute

_PACKAGE = "comfy_kitchen"
_PARTS = ("rope", "adaln")


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """For the time being, functions of `comfy_kitchen` are the package's own in plain PyTorch; without it, nothing."""
    with contextlib.ExitStack() as undo:
        for part in _PARTS:
            with contextlib.suppress(ImportError):
                package = importlib.import_module(_PACKAGE)
                plain = importlib.import_module(f"{_PACKAGE}.backends.eager.{part}")
                for name, function in inspect.getmembers(plain, inspect.isfunction):
                    if function.__module__ == plain.__name__ and not name.startswith("_"):
                        undo.enter_context(replaced_attribute(package, name, function))
        yield
