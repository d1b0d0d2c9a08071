"""A worker: one ComfyUI on one card, which makes ranges and writes them to the store.

The ComfyUI is a process of its own with its own model management, as on a desk. Between two tasks its cache keeps what
the next one needs too: models, the encoded prompt, the realizations.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .graph import COLLECT, Graph, Job, jobs, with_concept, with_tasks
from .schedule import DESCRIBE, JOIN, RANGE, REST, Task
from .store import GRADIENTS, RESULTS, WORKS, Store

ROOT = Path(__file__).resolve().parents[1]
# Seconds for one task. A range takes minutes, the rest of a graph may train an autoencoder.
_LIMIT = 24 * 3600.0
# Seconds for a host to start: many machines may read one disk at once.
_START = 900.0
# The host's log, in its output folder.
_LOG = "comfyui.log"
_PREFIX, _LOCK = "elrond-worker-", ".lock"
# Characters of a cause that a message shows.
_LONGEST = 600


class WorkerError(Exception):
    """A task could not be done; the message is one sentence. Unlike the host's own errors it survives pickling."""


@dataclass(frozen=True)
class Settings:
    """What all workers of a run are given.

    Attributes:
        graph: as the user exported it.
        concepts: what takes the place of its concept; empty for the graph as it is.
        names: file names of the concepts.
        store: address of the store.
        cards: cards of a worker; 0 for the processor.
        threads: threads of the processor; 0 leaves them to torch.
        comfyui: folder of ComfyUI on the workers, or empty.
        flags: options for ComfyUI's command line.
        mixed: whether workers may differ.
    """

    graph: Graph
    concepts: tuple[str, ...]
    names: tuple[str, ...]
    store: str
    cards: int = 1
    threads: int = 0
    comfyui: str = ""
    flags: tuple[str, ...] = ()
    mixed: bool = False

    def graph_of(self, concept: int) -> Graph:
        """The graph for one concept."""
        return with_concept(self.graph, self.concepts[concept]) if self.concepts else self.graph


class Worker:
    """Starts a host when it is first needed, again when it has died, and runs tasks on it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._jobs = {job.node: job for job in jobs(settings.graph)}
        _remove_abandoned()
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # Held as long as the process lives.
        self._lock = FileLock(str(self._folder / _LOCK))
        self._lock.acquire()
        self._store = Store(settings.store, self._folder / "store")
        self._server: Any = None
        self._status: tuple[str, float] = ("starting", 0.0)
        self._set_up()

    def start(self) -> dict[str, Any]:
        """Start the host; returns where the worker is.

        Raises:
            WorkerError: if it does not start.
        """
        self._host()
        self._status = ("waiting", 0.0)
        return {"pid": os.getpid(), "machine": os.uname().nodename if hasattr(os, "uname") else "this machine"}

    def status(self) -> tuple[str, float]:
        """What the worker does, and how much of it is done, in [0, 1]."""
        return self._status

    def work(self, task: Task, works: dict[str, str]) -> dict[str, Any]:
        """Do a task.

        Args:
            task: the task.
            works: names of the concept's works by node, as far as they are known.

        Returns:
            What `Plan.succeeded` needs, or {"refused": origin} if this worker differs from the others.

        Raises:
            WorkerError: if it cannot be done.
        """
        self._status = (task.label, 0.0)
        began = time.monotonic()
        try:
            if task.kind == JOIN:
                return self._join(works[task.node], task.files)
            result = self._rest(task, works) if task.kind == REST else self._part(task, works)
            return result if task.kind != RANGE else {**result, "seconds": time.monotonic() - began}
        except WorkerError:
            raise
        except Exception as error:
            raise WorkerError(_sentence(error)) from None
        finally:
            self._status = ("waiting", 0.0)

    def close(self) -> None:
        """Stop the host and remove what is temporary."""
        if self._server is not None:
            self._server.__exit__(None, None, None)
        self._lock.release()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _set_up(self) -> None:
        """Say by variables, which the host inherits, what the options of this run are."""
        settings = self._settings
        os.environ["ELROND_RANGES"] = "1"
        os.environ["ELROND_GPU"] = "1" if settings.cards else ""
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            # Ray sets one thread for each CPU that a worker asked for. Threads change last bits of sums.
            os.environ.pop(variable, None)
            if settings.threads:
                os.environ[variable] = str(settings.threads)
        around = ROOT.parents[1]
        if settings.comfyui:
            os.environ["COMFYUI_PATH"] = settings.comfyui
        elif ROOT.parent.name == "custom_nodes" and (around / "main.py").is_file():
            os.environ.setdefault("COMFYUI_PATH", str(around))

    def _host(self) -> Any:
        if self._server is None or not self._server.running:
            try:
                from demo.server import Server

                if self._server is not None:
                    self._server.__exit__(None, None, None)
                self._server = Server(
                    self._folder / "output",
                    user=self._folder / "base",
                    shared=True,
                    extra=self._settings.flags,
                    patience=_START,
                )
                self._server.__enter__()
            except Exception as error:
                self._server = None
                raise WorkerError(f"ComfyUI does not start: {_sentence(error)}") from None
        return self._server

    def _run(self, graph: Graph) -> dict[str, Any]:
        label = self._status[0]

        def show(name: str, done: float) -> None:
            self._status = (label, done)

        outputs: dict[str, Any] = self._host().run(graph, show, _LIMIT)
        return outputs

    def _tasks(self, nodes: tuple[str, ...], works: dict[str, str], save: str = "") -> dict[str, dict[str, Any]]:
        """Tasks that let the jobs of these nodes hand on the whole."""
        tasks = {}
        for node in nodes:
            job = self._jobs[node]
            upstream = [works[other] for other in job.upstream]
            whole = {"mode": "whole", "folder": str(self._store.works), "name": works[node], "upstream": upstream}
            tasks[node] = {**whole, "save": save.format(node=node)} if save and job.kind == COLLECT else whole
        return tasks

    def _part(self, task: Task, works: dict[str, str]) -> dict[str, Any]:
        """Describe a job's work, or make a range of it."""
        job, graph = self._jobs[task.node], self._settings.graph_of(task.concept)
        for node in job.upstream:
            self._store.pull(f"{WORKS}/{works[node]}")
        mixed = self._settings.mixed
        asked: dict[str, Any] = {"mode": task.kind, "folder": str(self._store.works), "mixed": mixed}
        asked["name"] = works.get(task.node) or (mixed_name(graph, job) if mixed else "")
        if task.kind == RANGE:
            asked |= {"first": task.numbers[0], "count": task.numbers[1]}
        asked["number"] = uuid.uuid4().hex
        tasks = {**self._tasks(job.upstream, works), task.node: asked}
        answer: dict[str, Any] = json.loads(self._run(with_tasks(graph, tasks, task.node))[task.node]["text"][0])
        if task.kind == RANGE and "refused" not in answer:
            self._store.push(f"{WORKS}/{asked['name']}")
        elif task.kind == DESCRIBE and len(self._settings.names) > 1:
            for other in self._store.sizes(WORKS):
                if other not in works.values():
                    self._store.forget(f"{WORKS}/{other}")
        return answer

    def _rest(self, task: Task, works: dict[str, str]) -> dict[str, Any]:
        """Run the whole graph, in which the long work is already done, and keep what it saves."""
        graph, name = self._settings.graph_of(task.concept), result_name(self._settings, task.concept, works)
        for work in works.values():
            self._store.pull(f"{WORKS}/{work}")
        collected = [node for node, job in self._jobs.items() if job.kind == COLLECT]
        file = name if len(collected) == 1 else f"{name}-{{node}}"
        save = str(self._folder / "gradients" / f"{file}.safetensors")
        output = self._folder / "output"
        for folder in (output, self._folder / "gradients"):
            _empty(folder)
        outputs = self._run(with_tasks(graph, self._tasks(tuple(self._jobs), works, save)))
        for work in works.values():
            # Batches that were damaged have been made again.
            self._store.push(f"{WORKS}/{work}")
        texts = {
            _title(graph, node): shown["text"][0]
            for node, shown in sorted(outputs.items())
            if shown.get("text") and node not in self._jobs
        }
        reports = [json.loads(outputs[node]["text"][0])["report"] for node in collected]
        gradients = self._store.put(self._folder / "gradients", GRADIENTS)
        saved = self._store.put(output, f"{RESULTS}/{name}", besides=_LOG)
        result = {"gradients": gradients, "files": saved, "texts": texts, "reports": reports, "works": works}
        content = json.dumps({"concept": self._settings.names[task.concept], **result}, indent=1, sort_keys=True)
        self._store.write(f"{RESULTS}/{name}/result.json", content.encode() + b"\n")
        return result

    def _join(self, work: str, names: tuple[str, ...]) -> dict[str, Any]:
        """Put files of batches that follow each other into one, then remove them."""
        from elrond_core.errors import ElrondError
        from elrond_core.storage.shard_names import batches_of
        from elrond_core.storage.shards import read_shard, write_shard

        self._store.pull(f"{WORKS}/{work}")
        batches: dict[int, Any] = {}
        for name in names:
            try:
                batches |= read_shard(self._store.works, work, name)
            except FileNotFoundError:
                # Another run has joined it.
                continue
            except ElrondError:
                # What it held is made again when the whole is put together.
                self._store.remove(f"{WORKS}/{work}/{name}")
        written = set()
        while batches:
            first = min(batches)
            row: dict[int, Any] = {}
            while first + len(row) in batches:
                row[first + len(row)] = batches.pop(first + len(row))
            written.add(write_shard(self._store.works, work, row))
        self._store.push(f"{WORKS}/{work}")
        covered = {number for name in written for number in batches_of(name)}
        for name in names:
            if name not in written and covered.issuperset(batches_of(name)):
                self._store.remove(f"{WORKS}/{work}/{name}")
        return {"files": sorted(written)}


def mixed_name(graph: Graph, job: Job) -> str:
    """The name of a work that different workers make together: by what the graph says, not by what they read."""
    return f"mixed-{_digest(with_tasks(graph, {}, job.node))}"


def result_name(settings: Settings, concept: int, works: dict[str, str]) -> str:
    """The name of a concept's results: by the graph and by the works that are in them."""
    name = settings.names[concept]
    return f"{name}-{_digest((settings.graph_of(concept), sorted(works.items())))[:8]}"


def _digest(value: Any) -> str:
    def plain(part: Any) -> Any:
        # Titles change nothing.
        return {k: plain(v) for k, v in part.items() if k != "_meta"} if isinstance(part, dict) else part

    graph, *more = value if isinstance(value, tuple) else (value,)
    text = json.dumps([plain(graph), *more], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _remove_abandoned() -> None:
    """Remove the folders of workers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            if (folder / _LOCK).is_file():
                FileLock(str(folder / _LOCK), timeout=0).acquire()
                shutil.rmtree(folder, ignore_errors=True)
        except (Timeout, OSError, NotImplementedError):
            continue


def _title(graph: Graph, node: str) -> str:
    entry = graph.get(node, {})
    return str(entry.get("_meta", {}).get("title") or entry.get("class_type", node))


def _empty(folder: Path) -> None:
    """Remove what an earlier concept has left in a folder, beside the host's log, which is open."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != _LOG:
            path.unlink(missing_ok=True)


def _sentence(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 3]} … {text[-_LONGEST * 2 // 3 :]}"
