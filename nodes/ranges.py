"""Sample Realizations and Collect Gradients in parts, for `cluster/`: nodes that no user sees.

They take the inputs of the node they stand for, and a task as JSON text: to say what the work is, to make a range of
its batches, or to hand on the whole. Ranges go into a folder named by all that determines the result, as those of an
interrupted collection do. The host offers these nodes if `ELROND_RANGES` is set.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..elrond_core.errors import ElrondError
from ..elrond_core.gradients import Gradients
from ..elrond_core.storage.atomic_write import atomic_write, make_folder
from ..elrond_core.storage.format import save_gradients
from ..elrond_core.storage.shards import write_shard
from . import host
from .gradients import CollectGradients
from .jobs import GradientJob, RealizationJob
from .realizations import SampleRealizations

DESCRIBE, RANGE, WHOLE = "describe", "range", "whole"
OFFERED = bool(os.environ.get("ELROND_RANGES"))


@dataclass(frozen=True)
class Task:
    """What is asked of a range node.

    Attributes:
        mode: "describe", "range" or "whole".
        folder: where the folders of all works are.
        name: of the work, if it is known.
        first: number of the first batch of a range.
        count: batches of a range.
        mixed: take over what another model, host, version or device would make.
        upstream: names of the works that this one depends on.
        save: file for all gradients.
        number: makes two tasks differ, so that the host does not take the second for done.
    """

    mode: str
    folder: str
    name: str = ""
    first: int = 0
    count: int = 0
    mixed: bool = False
    upstream: tuple[str, ...] = ()
    save: str = ""
    number: str = ""

    @property
    def root(self) -> Path:
        """Where the folders of all works are."""
        return Path(self.folder)


class _Names:
    """The name of the latest work and the digest of the latest model, which take reading all weights to find out."""

    def __init__(self) -> None:
        self._model: Any = None
        self._origin: dict[str, str] = {}
        # The inputs themselves are kept, so that no other object takes the place of one.
        self._inputs: dict[str, Any] = {}
        self._name = ""

    def origin(self, model: Any) -> dict[str, str]:
        """See `host.origin`."""
        if model is not self._model:
            self._origin = host.origin(model)
            self._model = model
        return self._origin

    def of(self, job: RealizationJob | GradientJob, inputs: dict[str, Any]) -> str:
        """See `host.work_name`."""
        origin = self.origin(inputs["model"])
        if not _same(inputs, self._inputs):
            self._name = host.work_name(origin, *job.determined_by)
            self._inputs = dict(inputs)
        return self._name


def _same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    plain = (str, int, float, bool)
    return one.keys() == two.keys() and all(
        value is two[key] or (isinstance(value, plain) and type(value) is type(two[key]) and value == two[key])
        for key, value in one.items()
    )


_names = {RealizationJob: _Names(), GradientJob: _Names()}


def _answer(job: RealizationJob | GradientJob, inputs: dict[str, Any], task: Task) -> dict[str, Any]:
    """Do what a task asks that is not the whole, and say what was done.

    Raises:
        ElrondError: if the model's weights cannot be read, or the range is outside of the work.
        OSError: if the range cannot be written.
    """
    names = _names[type(job)]
    origin = names.origin(inputs["model"])
    name = task.name if task.mixed and task.name else names.of(job, inputs)
    sizes = job.sizes()
    if task.mode == DESCRIBE:
        return {"name": name, "sizes": sizes, "origin": origin}
    if name != task.name:
        return {"refused": origin}
    numbers = range(task.first, task.first + task.count)
    if not numbers or numbers.stop > len(sizes):
        raise ElrondError(f"There are batches 0 to {len(sizes) - 1}, and not {task.first} to {numbers.stop - 1}.")
    start = time.monotonic()
    batches = job.batches(numbers)
    _write_origin(task.root / name, origin)
    return {"file": write_shard(task.root, name, batches), "seconds": time.monotonic() - start, "origin": origin}


def _write_origin(folder: Path, origin: dict[str, str]) -> None:
    """Keep who made a part of a work, once for all that are alike."""
    content = json.dumps(origin, sort_keys=True).encode()
    path = folder / f"origin-{hashlib.blake2b(content, digest_size=8).hexdigest()}.json"
    if not path.exists():
        make_folder(folder)
        atomic_write(path, content)


def _origins(task: Task) -> list[dict[str, str]]:
    """Who made parts of a work and of those it depends on, each once; a file that cannot be read counts as nobody."""
    origins = {}
    for name in (task.name, *task.upstream):
        for path in sorted((task.root / name).glob("origin-*.json")):
            try:
                origin = json.loads(path.read_bytes())
                origins[json.dumps(origin, sort_keys=True)] = {key: str(value) for key, value in origin.items()}
            except (OSError, ValueError, AttributeError):
                continue
    return [origins[key] for key in sorted(origins)]


def _with_origins(gradients: Gradients, task: Task) -> Gradients:
    """Gradients whose provenance says which kinds of machines made them, if there were several."""
    origins = _origins(task)
    differing = [key for key in ("host", "torch", "device", "model") if len({o.get(key) for o in origins}) > 1]
    if not differing:
        return gradients
    text = "; ".join(sorted({", ".join(origin.get(key, "?") for key in differing) for origin in origins}))
    origin = gradients.provenance
    extra = {**origin.extra, "made_by_several": text}
    return Gradients(**{**vars(gradients), "provenance": origin.with_(extra=extra)})


def _parsed(task: str) -> Task:
    values = json.loads(task)
    values["upstream"] = tuple(values.get("upstream", ()))
    return Task(**values)


def _schema(node: type[io.ComfyNode], node_id: str) -> io.Schema:
    schema = node.define_schema()
    schema.node_id = node_id
    schema.inputs = [*schema.inputs, io.String.Input("task", tooltip="What to do, as JSON.")]
    schema.is_output_node = True
    return schema


class SampleRange(io.ComfyNode):
    """Sample Realizations in parts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return _schema(SampleRealizations, "ElrondSampleRange")

    @classmethod
    def execute(cls, task: str, **inputs: Any) -> io.NodeOutput:
        """Do what the task asks."""
        asked, job = _parsed(task), RealizationJob(**inputs)
        if asked.mode == WHOLE:
            # A batch that is missing or damaged is sampled again and kept.
            return io.NodeOutput({"samples": job.run(host.shards_in(asked.root, asked.name))})
        answer = json.dumps(_answer(job, inputs, asked))
        return io.NodeOutput({"samples": torch.empty(0)}, ui=ui.PreviewText(answer))


class CollectRange(io.ComfyNode):
    """Collect Gradients in parts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return _schema(CollectGradients, "ElrondCollectRange")

    @classmethod
    def execute(cls, task: str, **inputs: Any) -> io.NodeOutput:
        """Do what the task asks."""
        asked, job = _parsed(task), GradientJob(**inputs)
        if asked.mode != WHOLE:
            return io.NodeOutput(None, None, ui=ui.PreviewText(json.dumps(_answer(job, inputs, asked))))
        gradients, report = job.run(host.shards_in(asked.root, asked.name))
        gradients = _with_origins(gradients, asked)
        if asked.save:
            save_gradients(gradients, Path(asked.save))
        return io.NodeOutput(gradients, report, ui=ui.PreviewText(json.dumps({"report": report})))


NODES = [SampleRange, CollectRange] if OFFERED else []
