"""Differentiable replacements of fused kernels while gradients are taken.

Newer hosts normalise, rotate and modulate by operators of the package `comfy_kitchen`, which have no derivative. The
package also has the same functions in plain PyTorch, for devices without these kernels.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator

from .gradient_patches import replaced_attribute

_PACKAGE = "comfy_kitchen"
# Modules of the plain functions that models use.
_PARTS = ("rope", "adaln")


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Within the context, functions of `comfy_kitchen`, if it is installed, are those in plain PyTorch."""
    with contextlib.ExitStack() as undo:
        for part in _PARTS:
            with contextlib.suppress(ImportError):
                package = importlib.import_module(_PACKAGE)
                plain = importlib.import_module(f"{_PACKAGE}.backends.eager.{part}")
                for name, function in inspect.getmembers(plain, inspect.isfunction):
                    if function.__module__ == plain.__name__ and not name.startswith("_"):
                        undo.enter_context(replaced_attribute(package, name, function))
        yield
