"""The driver: hands tasks to workers with Ray, and reads names.

Ray starts workers where there are cards, restarts those that die, on another machine if theirs is gone, and asks an
autoscaler for more. What a worker makes goes from it to the store; the driver sees names, numbers and times.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from elrond_core.storage.shard_names import batches_of

from .graph import jobs
from .progress import Progress, duration
from .schedule import FailedError, Plan, Task, clock
from .store import RESULTS, TIMES, WORKS, Store
from .worker import ROOT, Settings, Worker, result_name

# Seconds to wait for a message of any worker before the progress is shown again.
_PAUSE = 0.5
# Seconds for a worker's answer about what it does.
_PATIENCE = 0.2
# Seconds after which a worker that is not there is asked for again.
_ABSENT = 2.0
# Seconds for workers to stop their hosts.
_FAREWELL = 15.0
# What the workers need of the repository, and what would be much to send.
_NOT_SENT = ["/.venv", "/.comfyui", "/.comfyui.part", "/output", "/.git", "/bench", "/docs", "/tests", "node_modules"]
_ORIGIN = {"pack": "version of this pack", "host": "ComfyUI", "torch": "torch", "device": "device", "model": "model"}


class RunError(RuntimeError):
    """The run has stopped; the message is one sentence."""


@dataclass
class Traffic:
    """Bytes of all messages between the driver and workers, as pickled."""

    bytes: int = 0

    def add(self, *values: Any) -> None:
        """Count a message."""
        self.bytes += sum(len(pickle.dumps(value)) for value in values)


@dataclass
class _Member:
    """A worker as the driver sees it."""

    name: str
    handle: Any
    number: int = 0
    task: Task | None = None
    status: tuple[str, float] = ("waiting for a card", 0.0)
    starts: int = 0
    rank: int = 0
    started: bool = False


@dataclass
class Run:
    """One run over all its concepts.

    Attributes:
        plan: what is to do.
        handles: Ray's handles of the workers.
        progress: where it is shown.
        traffic: what has gone through the driver.
        on_finish: called with the number and the results of each finished concept.
        poll: whether workers are asked what they do.
    """

    plan: Plan
    handles: list[Any]
    progress: Progress
    traffic: Traffic = field(default_factory=Traffic)
    on_finish: Callable[[int, dict[str, Any]], None] = lambda concept, result: None
    poll: bool = True

    def __post_init__(self) -> None:
        self._members = [_Member(f"worker {i + 1}", handle, rank=i + 1) for i, handle in enumerate(self.handles)]
        self._flying: dict[Any, _Member] = {}
        self._free: list[_Member] = []
        # Workers that Ray is starting again, and when to ask for them.
        self._absent: list[tuple[float, _Member]] = []
        self._refused: list[str] = []
        self._shown = float("-inf")

    def go(self) -> None:
        """Run until all is done.

        Raises:
            RunError: if a task has failed too often, or no worker is left.
        """
        for member in self._members:
            self._begin(member)
        while not self.plan.over:
            self._hand_out()
            while self._absent and self._absent[0][0] <= clock():
                self._begin(self._absent.pop(0)[1])
            if not self._flying and self._absent:
                time.sleep(_PAUSE)
                continue
            if not self._flying:
                raise RunError(" ".join([*self._refused, "No worker is left."]))
            ready, _ = ray.wait(list(self._flying), num_returns=1, timeout=_PAUSE)
            for reference in ready:
                self._receive(reference, self._flying.pop(reference))
            self._show()

    def close(self) -> None:
        """Stop all workers. They have a moment to stop their hosts."""
        started = [member.handle.close.remote() for member in self._members if member.started]
        if started:
            ray.wait(started, num_returns=len(started), timeout=_FAREWELL)
        for member in self._members:
            ray.kill(member.handle)

    def _begin(self, member: _Member) -> None:
        """Start a worker, or see that Ray has started it again; it waits until there is a place for it."""
        member.task = None
        member.status = ("starting", 0.0)
        self._flying[member.handle.start.remote()] = member

    def _hand_out(self) -> None:
        self.plan.workers = max(1, len(self._free) + sum(m.task is not None for m in self._flying.values()))
        while self._free:
            given = self.plan.next(clock())
            if given is None:
                return
            member = self._free.pop(0)
            member.number, member.task = given
            works = self.plan.works(member.task.concept)
            self.traffic.add(member.task, works)
            member.status = (member.task.label, 0.0)
            self._flying[member.handle.work.remote(member.task, works)] = member

    def _receive(self, reference: Any, member: _Member) -> None:
        task = member.task
        try:
            result = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            self._failed(member, _cause(error))
            return
        except ray.exceptions.ActorUnavailableError as error:
            if task is None:
                # Ray is starting it again.
                self._absent.append((clock() + _ABSENT, member))
            else:
                self._died(member, error)
            return
        except ray.exceptions.RayActorError as error:
            self._died(member, error)
            return
        self.traffic.add(result)
        if task is None:
            member.name = f"{result['machine']} ({member.rank})"
            member.starts, member.started = 0, True
        elif "refused" in result:
            self._refuse(member, task, result["refused"])
            return
        else:
            self.plan.succeeded(member.number, result)
            if task.kind == "rest":
                self.on_finish(task.concept, result)
        self._rest(member)

    def _rest(self, member: _Member) -> None:
        member.task, member.status = None, ("waiting", 0.0)
        self._free.append(member)

    def _failed(self, member: _Member, cause: str) -> None:
        task = member.task
        if task is None:
            self._lost(member, cause)
            return
        self.progress.say(f"{member.name} failed at {task.label}: {cause}")
        self._strike(member, cause)
        self._rest(member)

    def _died(self, member: _Member, error: Any) -> None:
        if member.task is None:
            self._lost(member, "its process ends when it starts")
            return
        preempted = bool(getattr(error, "preempted", False))
        cause = "its machine was taken away" if preempted else "its process ended"
        self.progress.say(f"{member.name} was lost at {member.task.label}: {cause}. Ray starts it again.")
        self._strike(member, cause, counts=not preempted)
        self._begin(member)

    def _lost(self, member: _Member, cause: str) -> None:
        member.starts += 1
        if member.starts < 3:
            self._begin(member)
            return
        self._refused.append(_ended(f"{member.name} does not start: {cause}"))
        self.progress.say(self._refused[-1])

    def _strike(self, member: _Member, cause: str, counts: bool = True) -> None:
        try:
            self.plan.failed(member.number, member.name, cause, counts)
        except FailedError as error:
            raise RunError(
                f"{_ended(str(error))} Everything else is kept: mend the cause, then run this again."
            ) from None

    def _refuse(self, member: _Member, task: Task, origin: Mapping[str, str]) -> None:
        """Go on without a worker that would make other numbers."""
        differences = _differences(self.plan.origin(task), origin) or "what its nodes make of the prompt differs"
        line = f"{member.name} is refused: {differences}. Make them equal, or allow it with --allow-mixed."
        self._refused.append(line)
        self.progress.say(line)
        self.plan.failed(member.number, member.name, differences, counts=False)
        ray.kill(member.handle)

    def _show(self) -> None:
        now = clock()
        if now - self._shown < self.progress.pause:
            return
        self._shown = now
        busy = list(self._flying.values())
        if self.poll:
            asked = {m.handle.status.remote(): m for m in busy if m.task is not None}
            ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE) if asked else ([], [])
            for reference in ready:
                try:
                    asked[reference].status = ray.get(reference)
                except ray.exceptions.RayError:
                    # It is said when the task's own answer comes.
                    continue
        concepts = (self.plan.concepts_done(), len(self.plan.names))
        workers = {member.name: member.status for member in self._members if member in busy or member in self._free}
        self.progress.show(now, self.plan.counts(), concepts, self.plan.left(), workers)


def _differences(one: Mapping[str, str], two: Mapping[str, str]) -> str:
    """Where two origins differ, as a sentence without its end."""
    parts = [
        f"its {what} is {two.get(key, 'not known')}, that of the others {one.get(key, 'not known')}"
        for key, what in _ORIGIN.items()
        if one.get(key) != two.get(key)
    ]
    return "; ".join(parts)


def _ended(text: str) -> str:
    """A sentence with its full stop."""
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _cause(error: Any) -> str:
    return " ".join(str(getattr(error, "cause", None) or error).split()) or type(error).__name__


def connect(address: str, workers: int, cards: int, comfyui: str = "") -> None:
    """Connect to a cluster, or start a Ray of this machine only.

    Args:
        address: of the cluster; empty for this machine.
        workers: how many there will be at least, for a Ray of this machine.
        cards: cards of each.
        comfyui: folder of ComfyUI on the workers.

    Raises:
        RunError: if there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A worker is as important as a ComfyUI that somebody starts; by default Ray gives way to all other programs.
    os.environ.setdefault("RAY_worker_niceness", "0")
    environment: dict[str, Any] = {"env_vars": {"COMFYUI_PATH": comfyui} if comfyui else {}}
    try:
        if address:
            environment |= {"working_dir": str(ROOT), "excludes": _NOT_SENT}
            ray.init(address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
            return
        environment["env_vars"]["PYTHONPATH"] = str(ROOT)
        ray.init(
            # Not one that happens to run here.
            "local",
            # Workers without cards share the processor, whatever its number of cores.
            num_cpus=max(workers, os.cpu_count() or 1),
            include_dashboard=False,
            # Messages are names.
            object_store_memory=100 * 2**20,
            runtime_env=environment,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    # Ray raises many kinds.
    except Exception as error:
        where = f"The cluster {address} cannot be reached" if address else "Ray does not start"
        raise RunError(f"{where}: {_cause(error)}") from error


def workers_there(cards: int) -> int:
    """How many workers the cards, or the processors, of all machines are enough for."""
    resources = ray.cluster_resources()
    return int(resources.get("GPU", 0)) // cards if cards else 1


def collect(
    settings: Settings,
    workers: int,
    seconds: float,
    progress: Progress,
    make: Callable[[], Any] | None = None,
) -> list[dict[str, Any]]:
    """Run a graph for all its concepts.

    Args:
        settings: what the workers are given.
        workers: how many.
        seconds: how long a range should take.
        progress: where it is shown.
        make: makes a worker's handle.

    Returns:
        The results of each concept, as `result.json` holds them.

    Raises:
        RunError: if it stops before the end; everything finished is kept.
    """
    store = Store(settings.store, Path())
    store.make()

    def files(work: str) -> dict[str, int]:
        sizes = store.sizes(f"{WORKS}/{work}")
        return {name: sizes[name] for name in sorted(sizes) if batches_of(name)}

    def done(work: str) -> set[int]:
        return {number for name in files(work) for number in batches_of(name)}

    def finished(concept: int, works: dict[str, str]) -> bool:
        return store.exists(f"{RESULTS}/{result_name(settings, concept, works)}/result.json")

    plan = Plan(settings.names, jobs(settings.graph), done, files, seconds, finished)
    handles = [(make or (lambda: worker(settings)))() for _ in range(workers)]
    began = clock()

    def told(concept: int, result: dict[str, Any]) -> None:
        progress.say(f"{settings.names[concept]}: {'; '.join(result['reports'])}")

    run = Run(plan, handles, progress, on_finish=told)
    try:
        run.go()
    finally:
        run.close()
    units = {job.node: job.unit.removesuffix("s") for job in jobs(settings.graph)}
    for node, times in plan.times.items():
        progress.say(
            f"{statistics.median(times):.3g} s of a worker each {units[node]}, the median of {len(times)} ranges."
        )
    store.write(TIMES, json.dumps(plan.times).encode())
    progress.say(f"Done in {duration(clock() - began)}; {run.traffic.bytes} bytes went through the driver.")
    names = [result_name(settings, concept, plan.works(concept)) for concept in range(len(settings.names))]
    return [_read(store, name) for name in names]


def _read(store: Store, name: str) -> dict[str, Any]:
    return {"name": name, **json.loads(store.read(f"{RESULTS}/{name}/result.json"))}


def worker(settings: Settings) -> Any:
    """A worker's handle; Ray starts it where and when there is a place for it."""
    remote = ray.remote(Worker).options(
        num_cpus=1,
        num_gpus=settings.cards,
        max_restarts=-1,
        # One thread works, another says what it does.
        max_concurrency=4,
    )
    return remote.remote(settings)


def stream() -> Any:
    """Where progress goes: results are printed to the other stream."""
    return sys.stderr
