"""State that patches of a model keep between calls: switched off, or reset for every estimate.

During sampling, patches use results of earlier steps. A gradient has no earlier steps.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import types
from collections.abc import Iterator
from typing import Any

import torch

from .gradient_patches import replaced_attribute

# Patches that reuse the result of an earlier step, by the key or the name of their functions.
_CACHES = re.compile(r"(easy|lazy|tea|mag|block|fb)_?cache", re.IGNORECASE)

# Initial values of running averages over the steps, by their names in adaptive projected guidance and its variants.
_FRESH = {"running_avg": 0, "running_average": 0, "prev_sigma": None}


def is_cache(name: Any) -> bool:
    """Whether a patch reuses the results of earlier steps, by its name."""
    return _CACHES.search(str(name)) is not None


@contextlib.contextmanager
def without_caches(model: Any) -> Iterator[None]:
    """Within the context, a MODEL computes every step: patches that reuse earlier results are off."""
    disabled: set[str] = set()

    def allowed(name: Any) -> bool:
        match = _CACHES.search(str(name))
        if match:
            disabled.add(match.group())
        return match is None

    wrappers = {
        kind: {key: functions for key, functions in by_key.items() if allowed(key)}
        for kind, by_key in model.wrappers.items()
    }
    options = dict(model.model_options)
    around = options.get("model_function_wrapper")
    if around is not None and not allowed(getattr(around, "__qualname__", type(around).__qualname__)):
        del options["model_function_wrapper"]
    if not disabled:
        yield
        return
    logging.warning(f"ELROND: {', '.join(sorted(disabled))} is off while gradients are taken: each needs every step.")
    with replaced_attribute(model, "wrappers", wrappers), replaced_attribute(model, "model_options", options):
        yield


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within the context, random numbers that patches draw, such as token merging, depend on the seed only."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class PatchState:
    """Variables that functions in a model's options keep between calls.

    They would make a gradient depend on earlier gradients, and on earlier sampling.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._cells: dict[int, tuple[str, types.CellType]] = {}
        self._objects: dict[int, Any] = {}
        self._seen: set[int] = set()
        self._warned = False
        self._find(options)

    def _find(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        match value:
            case dict():
                for item in value.values():
                    self._find(item)
            case list() | tuple() | set():
                for item in value:
                    self._find(item)
            case functools.partial():
                self._find([value.func, value.args, value.keywords])
            case types.MethodType():
                self._find([value.__func__, value.__self__])
            case types.FunctionType():
                for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                    self._cells[id(cell)] = name, cell
                    with contextlib.suppress(ValueError):
                        self._find(cell.cell_contents)
            case torch.nn.Module() | torch.Tensor() | type() | types.ModuleType():
                pass
            case _ if hasattr(value, "__dict__"):
                self._objects[id(value)] = value

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """Within the context, running averages have their initial values. Afterwards the variables are restored.

        Attributes of objects are restored only if they are averages or have a graph. Others may be results that are
        slow to compute.
        """
        cells = [(name, cell, cell.cell_contents) for name, cell in self._cells.values() if _is_set(cell)]
        objects = [(value, dict(vars(value))) for value in self._objects.values()]
        for name, cell, _ in cells:
            if name in _FRESH:
                cell.cell_contents = _FRESH[name]
        for value, before in objects:
            vars(value).update({name: _FRESH[name] for name in before if name in _FRESH})
        try:
            yield
        finally:
            averages = [cell.cell_contents for name, cell, _ in cells if name in _FRESH and name != "prev_sigma"]
            averages += [vars(value)[name] for value, before in objects for name in before if name in _FRESH]
            for _, cell, content in cells:
                cell.cell_contents = content
            for value, before in objects:
                for name, now in list(vars(value).items()):
                    if name in _FRESH or (torch.is_tensor(now) and now.grad_fn is not None):
                        if name in before:
                            vars(value)[name] = before[name]
                        else:
                            del vars(value)[name]
            if not self._warned and any(torch.is_tensor(average) for average in averages):
                self._warned = True
                logging.warning(
                    "ELROND: a patch of this model averages its guidance over the steps; for gradients the average "
                    "begins anew with each."
                )


def _is_set(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
