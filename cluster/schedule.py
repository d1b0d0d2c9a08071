"""Which worker does what next: the state of a run, without Ray.

Every concept of a list is a chain: images, then gradients, then the rest of the graph. Each link is divided into ranges
of batches. A worker that is free takes the next range of the first concept that has one, so that no worker waits for
the last range of a link while another concept has work. Batches are numbered by the job alone; how they are put into
ranges changes nothing in the result.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from .graph import Job

DESCRIBE, RANGE, JOIN, REST = "describe", "range", "join", "rest"
# A task that fails so often stops the run.
STRIKES = 3
# Where no other concept has work, ranges become shorter towards the end of a job, so that all workers end together: so
# many are left for each worker, of at least this share of the wanted length.
_LAST, _SHORTEST = 2, 1 / 6
# Latest times from which the next range's length follows.
_TIMES = 16
# A range that takes so many times the expected seconds is given to a second worker, if that has nothing else to do.
_LATE = 2.0
# Files of a work are joined if there are more, so many at a time and up to so many bytes.
FILES, FAN_IN, MOST_JOINED = 64, 16, 2**30


class FailedError(RuntimeError):
    """A task has failed too often."""


@dataclass(frozen=True)
class Task:
    """Something for one worker.

    Attributes:
        kind: "describe", "range", "join" or "rest".
        concept: number of the concept.
        node: id of the job's node; empty for "rest".
        numbers: first batch and number of batches, of a range.
        files: names of the files to join.
        label: for progress and errors.
    """

    kind: str
    concept: int
    node: str = ""
    numbers: tuple[int, int] = (0, 0)
    files: tuple[str, ...] = ()
    label: str = ""

    def batches(self) -> range:
        """Numbers of the batches of a range."""
        return range(self.numbers[0], sum(self.numbers))


@dataclass
class _JobState:
    job: Job
    name: str = ""
    origin: dict[str, str] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    # Batches that nobody has made or is making.
    open: set[int] = field(default_factory=set)
    # Batches that are made.
    made: set[int] = field(default_factory=set)
    again: list[Task] = field(default_factory=list)
    describing: bool = False
    # None until the ranges are there.
    joins: list[Task] | None = None
    joining: int = 0
    # Files before the latest level of joins.
    count: float = math.inf
    start: int = 0

    @property
    def described(self) -> bool:
        return bool(self.sizes)

    @property
    def complete(self) -> bool:
        return self.described and len(self.made) == len(self.sizes)

    @property
    def ready(self) -> bool:
        return self.complete and self.joins is not None and not self.joins and not self.joining


@dataclass
class _ConceptState:
    name: str
    jobs: dict[str, _JobState]
    rest: str = "waiting"
    again: list[Task] = field(default_factory=list)


class Plan:
    """All work of a run and its state.

    Args:
        names: of the concepts.
        jobs: of the graph, each after those it needs.
        done: given the name of a work, the numbers of its batches that the store holds.
        files: given the name of a work, names and bytes of its files in the store, in order.
        seconds: how long a range should take.
        finished: given the number of a concept and the names of its works by node, whether its results are there.
    """

    def __init__(
        self,
        names: Sequence[str],
        jobs: Sequence[Job],
        done: Callable[[str], Collection[int]],
        files: Callable[[str], dict[str, int]],
        seconds: float,
        finished: Callable[[int, dict[str, str]], bool] = lambda concept, works: False,
    ) -> None:
        self._concepts = [_ConceptState(name, {job.node: _JobState(job) for job in jobs}) for name in names]
        self._done, self._files, self._seconds, self._finished = done, files, seconds, finished
        self._flying: dict[int, tuple[Task, float]] = {}
        self._numbers = 0
        self._strikes: dict[Task, int] = {}
        # Seconds a unit (an image, a gradient) by node, of the latest ranges.
        self._paces: dict[str, list[float]] = {}
        self.workers = 1
        # Seconds a unit of all ranges by node.
        self.times: dict[str, list[float]] = {}

    # What the driver asks and tells.

    def next(self, now: float) -> tuple[int, Task] | None:
        """The next task and a number for it, or None if there is nothing to do at the moment."""
        task = self._next() or self._late(now)
        if task is None:
            return None
        self._numbers += 1
        self._flying[self._numbers] = (task, now)
        return self._numbers, task

    def succeeded(self, number: int, result: dict[str, Any]) -> None:
        """A task has been done; `result` is what the worker says about it."""
        task, _ = self._flying.pop(number)
        if task.kind == REST:
            self._concepts[task.concept].rest = "done"
            return
        state = self._state(task)
        if task.kind == DESCRIBE:
            state.describing = False
            self._described(task, result)
        elif task.kind == RANGE:
            units = sum(state.sizes[i] for i in task.batches())
            if units and "seconds" in result:
                paces = self._paces.setdefault(task.node, [])
                paces.append(result["seconds"] / units)
                self.times.setdefault(task.node, []).append(paces[-1])
                del paces[:-_TIMES]
            state.made.update(task.batches())
            state.open.difference_update(task.batches())
            state.again = [each for each in state.again if not state.made.issuperset(each.batches())]
            self._complete(task.concept, state)
        else:
            state.joining -= 1
            if not state.joining and not state.joins:
                self._join(task.concept, state)

    def failed(self, number: int, worker: str, cause: str, counts: bool = True) -> None:
        """A task has failed and will be done again.

        Args:
            number: of the task.
            worker: its name.
            cause: one sentence.
            counts: whether it may be the task's own fault.

        Raises:
            FailedError: if it has failed too often.
        """
        task, _ = self._flying.pop(number)
        strikes = self._strikes[task] = self._strikes.get(task, 0) + int(counts)
        if task.kind == REST:
            self._concepts[task.concept].rest = "waiting"
        elif task.kind == DESCRIBE:
            self._state(task).describing = False
        elif task.kind == JOIN:
            state = self._state(task)
            state.joining -= 1
            state.joins = [*(state.joins or []), task]
        elif not self._state(task).made.issuperset(task.batches()) and not self._elsewhere(task):
            self._state(task).again.append(task)
        if strikes >= STRIKES:
            raise FailedError(f"{worker} failed at {task.label}, as did {STRIKES - 1} attempts before: {cause}")

    @property
    def names(self) -> list[str]:
        """The names of all concepts."""
        return [concept.name for concept in self._concepts]

    @property
    def over(self) -> bool:
        """Whether all is done."""
        return all(concept.rest == "done" for concept in self._concepts)

    def works(self, concept: int) -> dict[str, str]:
        """Names of the works of a concept by node, as far as they are known."""
        return {node: state.name for node, state in self._concepts[concept].jobs.items() if state.name}

    def origin(self, task: Task) -> dict[str, str]:
        """Who described the work of a task."""
        return self._state(task).origin

    def counts(self) -> list[tuple[str, int, int]]:
        """Of every kind of unit how many are made and how many are known of, for the progress."""
        totals: dict[str, tuple[int, int]] = {}
        for concept in self._concepts:
            for state in concept.jobs.values():
                made, known = totals.get(state.job.unit, (0, 0))
                sizes = state.sizes or self._sizes_of(state.job.node)
                made += sum(sizes[i] for i in state.made)
                totals[state.job.unit] = (made, known + sum(sizes))
        return [(unit, *both) for unit, both in totals.items()]

    def left(self) -> float | None:
        """Seconds until all ranges are there, by the latest ranges and the number of workers; None if not known."""
        total = 0.0
        for concept in self._concepts:
            for state in concept.jobs.values():
                pace, sizes = self._pace(state.job.node), state.sizes or self._sizes_of(state.job.node)
                if state.complete:
                    continue
                if pace is None or not sizes:
                    return None
                total += pace * (sum(sizes) - sum(sizes[i] for i in state.made))
        return total / max(1, self.workers)

    def concepts_done(self) -> int:
        """How many concepts are finished, with the rest of the graph."""
        return sum(concept.rest == "done" for concept in self._concepts)

    # How it is decided.

    def _next(self) -> Task | None:
        for index, concept in enumerate(self._concepts):
            if concept.rest == "waiting" and all(state.ready for state in concept.jobs.values()):
                concept.rest = "running"
                return Task(REST, index, label=f"the rest of the graph for {concept.name!r}")
            for state in concept.jobs.values():
                if not all(concept.jobs[node].ready for node in state.job.upstream):
                    continue
                if not state.described:
                    if not state.describing:
                        state.describing = True
                        return Task(DESCRIBE, index, state.job.node, label=f"{state.job.unit} of {concept.name!r}")
                    continue
                if state.joins:
                    state.joining += 1
                    return state.joins.pop()
                if state.again:
                    return state.again.pop()
                if state.open:
                    return self._range(index, state)
        return None

    def _range(self, index: int, state: _JobState) -> Task:
        """The next batches in a row that nobody has."""
        later = [number for number in state.open if number >= state.start]
        first = min(later or state.open)
        pace = self._pace(state.job.node)
        left = sum(state.sizes[i] for i in state.open)
        most = math.inf
        if pace is not None and index == len(self._concepts) - 1:
            most = max(left / (_LAST * max(1, self.workers)), _SHORTEST * self._seconds / max(pace, 1e-9))
        units = 0
        numbers: list[int] = []
        while first + len(numbers) in state.open:
            size = state.sizes[first + len(numbers)]
            if numbers and (pace is None or (units + size) * pace > self._seconds or units + size > most):
                break
            units += size
            numbers.append(first + len(numbers))
        state.open.difference_update(numbers)
        state.start = numbers[-1] + 1
        return self._task(index, state, numbers[0], len(numbers))

    def _task(self, index: int, state: _JobState, first: int, count: int) -> Task:
        before = sum(state.sizes[:first])
        after = before + sum(state.sizes[first : first + count])
        label = f"{state.job.unit} {before + 1} to {after} of {self._concepts[index].name!r}"
        return Task(RANGE, index, state.job.node, (first, count), label=label)

    def _late(self, now: float) -> Task | None:
        """The range that has taken the longest, for a second worker."""
        tasks = [task for task, _ in self._flying.values()]
        late = []
        for task, began in self._flying.values():
            pace = self._pace(task.node)
            if task.kind != RANGE or pace is None or tasks.count(task) > 1:
                continue
            if self._state(task).made.issuperset(task.batches()):
                continue
            expected = pace * sum(self._state(task).sizes[i] for i in task.batches())
            if now - began > _LATE * max(expected, 1e-3):
                late.append((began, task))
        return min(late, key=lambda pair: pair[0])[1] if late else None

    def _elsewhere(self, task: Task) -> bool:
        return any(task == other for other, _ in self._flying.values())

    def _described(self, task: Task, result: dict[str, Any]) -> None:
        state = self._state(task)
        state.name, state.sizes, state.origin = result["name"], result["sizes"], result["origin"]
        state.made = set(self._done(state.name)) & set(range(len(state.sizes)))
        state.open = set(range(len(state.sizes))) - state.made
        # Two runs on one store begin in different places.
        state.start = random.choice(sorted(state.open)) if state.open else 0
        self._complete(task.concept, state)

    def _complete(self, concept: int, state: _JobState) -> None:
        if state.complete and state.joins is None:
            self._join(concept, state)
        whole = self._concepts[concept]
        complete = all(each.complete for each in whole.jobs.values())
        if complete and whole.rest == "waiting" and self._finished(concept, self.works(concept)):
            whole.rest = "done"

    def _join(self, concept: int, state: _JobState) -> None:
        """Plan one level of the tree in which many small files become few."""
        state.joins = []
        files = self._files(state.name)
        # A level that made nothing of them will not the next time.
        if len(files) <= FILES or len(files) >= state.count:
            return
        state.count = len(files)
        groups: list[list[str]] = [[]]
        size = 0
        for name, length in files.items():
            if groups[-1] and (len(groups[-1]) == FAN_IN or size + length > MOST_JOINED):
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += length
        for group in groups:
            if len(group) > 1:
                label = f"{len(group)} files of the {state.job.unit} of {self._concepts[concept].name!r}"
                state.joins.append(Task(JOIN, concept, state.job.node, files=tuple(group), label=label))

    def _pace(self, node: str) -> float | None:
        paces = self._paces.get(node)
        return statistics.median(paces) if paces else None

    def _sizes_of(self, node: str) -> list[int]:
        """Sizes of the same job of another concept, which is as large in all likelihood."""
        return next((c.jobs[node].sizes for c in self._concepts if node in c.jobs and c.jobs[node].sizes), [])

    def _state(self, task: Task) -> _JobState:
        return self._concepts[task.concept].jobs[task.node]


def clock() -> float:
    """Seconds, for `Plan.next`."""
    return time.monotonic()
