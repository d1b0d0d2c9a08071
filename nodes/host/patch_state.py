"""State that patches of a model keep between calls: switched off, or fresh for every estimate.

In sampling one step follows another, and patches make use of the steps before. A gradient has no steps before it.
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

# Patches that give out what an earlier step has computed, by the key or the name of their functions.
_CACHES = re.compile(r"(easy|lazy|tea|mag|block|fb)_?cache", re.IGNORECASE)

# Running averages over the steps, by the names that adaptive projected guidance and its kin give them, as they begin.
_FRESH = {"running_avg": 0, "running_average": 0, "prev_sigma": None}


@contextlib.contextmanager
def without_caches(model: Any) -> Iterator[None]:
    """For the time being, a MODEL computes every step, also where patches would reuse what an earlier step computed."""
    found: set[str] = set()

    def allowed(name: Any) -> bool:
        match = _CACHES.search(str(name))
        if match:
            found.add(match.group())
        return match is None

    wrappers = {
        kind: {key: functions for key, functions in each.items() if allowed(key)}
        for kind, each in model.wrappers.items()
    }
    options = dict(model.model_options)
    around = options.get("model_function_wrapper")
    if around is not None and not allowed(getattr(around, "__qualname__", type(around).__qualname__)):
        del options["model_function_wrapper"]
    if not found:
        yield
        return
    logging.warning(f"ELROND: {', '.join(sorted(found))} is off while gradients are taken: each needs every step.")
    with replaced_attribute(model, "wrappers", wrappers), replaced_attribute(model, "model_options", options):
        yield


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """For the time being, patches that draw random numbers of their own, as token merging does, draw these."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class PatchState:
    """Variables that the functions among a model's options keep from one call to the next.

    Without this a gradient would depend on the gradients before, and on how the model was last sampled.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._cells: dict[int, tuple[str, types.CellType]] = {}
        self._objects: dict[int, Any] = {}
        self._seen: set[int] = set()
        self._told = False
        self._find(options)

    def _find(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        match value:
            case dict():
                for each in value.values():
                    self._find(each)
            case list() | tuple() | set():
                for each in value:
                    self._find(each)
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
        """For one estimate, averages over the steps begin anew; afterwards everything is as it was.

        Of objects only averages and what has a history are put back: others may keep what took long to compute.
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
            if not self._told and any(torch.is_tensor(average) for average in averages):
                self._told = True
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
