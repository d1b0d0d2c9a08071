"""Who does what next, with workers that are numbers and a clock that is a number."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from cluster import schedule
from cluster.graph import COLLECT, SAMPLE, Job
from cluster.schedule import DESCRIBE, JOIN, RANGE, REST, FailedError, Plan, Task

JOBS = [Job("images", SAMPLE, ()), Job("gradients", COLLECT, ("images",))]
SIZES = {"images": [4] * 25 + [2], "gradients": [8] * 60}


class Clock:
    """Runs a plan in simulated time.

    Attributes:
        ranges: of each (concept, node), how often each batch was made.
        ended: when all was done.
        latest: when the last worker would have come to the end of what it was given.
    """

    def __init__(self, plan: Plan, workers: int) -> None:
        self.plan = plan
        plan.workers = workers
        self.workers = workers
        self.ranges: dict[tuple[int, str], Counter[int]] = {}
        self.order: list[Task] = []
        self.lengths: list[float] = []
        self.ended = self.latest = 0.0

    def run(self, seconds: Callable[[Task, int], float], fails: Callable[[Task], bool] = lambda task: False) -> None:
        free, flying, now = list(range(self.workers)), [], 0.0
        while not self.plan.over:
            while free and (given := self.plan.next(now)):
                worker = free.pop()
                number, task = given
                self.order.append(task)
                heapq.heappush(flying, (now + seconds(task, worker), number, worker, now, task))
            # As the driver does, ask again after a while.
            if free and flying and flying[0][0] > now + 1:
                now += 1
            elif flying:
                now, number, worker, began, task = heapq.heappop(flying)
                free.append(worker)
                if fails(task):
                    self.plan.failed(number, f"worker {worker}", "by chance")
                    continue
                result: dict[str, Any] = {"seconds": now - began}
                if task.kind == DESCRIBE:
                    result = {"name": f"{task.concept}/{task.node}", "sizes": SIZES[task.node], "origin": {}}
                elif task.kind == RANGE:
                    self.lengths.append(now - began)
                    self.ranges.setdefault((task.concept, task.node), Counter()).update(task.batches())
                self.plan.succeeded(number, result)
            else:
                raise AssertionError("nothing to do and not over")
        self.ended = now
        self.latest = max([now, *(end for end, *_ in flying)])


def cost(task: Task, worker: int = 0) -> float:
    """Ten seconds a batch."""
    return 10.0 * task.numbers[1] if task.kind == RANGE else 1.0


def plan(concepts: int = 1, done: Callable[[str], Any] = lambda work: (), **more: Any) -> Plan:
    return Plan([f"c{i}" for i in range(concepts)], JOBS, done, lambda work: {}, 60.0, **more)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_batch_is_made_once(workers: int) -> None:
    clock = Clock(plan(3), workers)
    clock.run(cost)
    assert {key: sorted(counts) for key, counts in clock.ranges.items()} == {
        (concept, node): list(range(len(SIZES[node]))) for concept in range(3) for node in SIZES
    }
    assert all(set(counts.values()) == {1} for counts in clock.ranges.values())


def test_ranges_are_as_long_as_wanted() -> None:
    clock = Clock(plan(4), 2)
    clock.run(cost)
    assert max(clock.lengths) == 60.0
    # Only the first ones, and those at the end of a job or of the run, are shorter.
    assert sum(length == 60.0 for length in clock.lengths) > len(clock.lengths) / 2
    assert min(clock.lengths[2:]) >= 10.0


def test_gradients_wait_for_all_images_and_the_rest_for_all_gradients() -> None:
    clock = Clock(plan(2), 3)
    clock.run(cost)
    for concept in range(2):
        own = [task for task in clock.order if task.concept == concept]
        kinds = [(task.kind, task.node) for task in own]
        assert kinds.index((DESCRIBE, "gradients")) > max(
            i for i, kind in enumerate(kinds) if kind == (RANGE, "images")
        )
        assert kinds[-1] == (REST, "") and kinds.count((REST, "")) == 1


def test_no_worker_waits_while_another_concept_has_work() -> None:
    clock = Clock(plan(8), 8)
    clock.run(cost)
    ideal = 8 * 10.0 * sum(len(sizes) for sizes in SIZES.values()) / 8
    assert clock.ended < 1.1 * ideal


def test_slow_workers_are_overtaken() -> None:
    luck = random.Random(0)

    def uneven(task: Task, worker: int) -> float:
        return cost(task) * (5 if worker == 0 else 1) * luck.choice([0.9, 1, 1.1])

    clock = Clock(plan(1), 4)
    clock.run(uneven)
    # The slow worker's last range was given to another one as well, and the run did not wait for the slow one.
    assert max(Counter(clock.order).values()) == 2
    assert clock.ended < clock.latest


def test_what_is_in_the_store_is_not_made_again() -> None:
    there = {"0/images": set(range(len(SIZES["images"]))), "0/gradients": {0, 1, 2, 10, 11, 59}}
    clock = Clock(plan(1, there.get), 2)
    clock.run(cost)
    assert set(clock.ranges) == {(0, "gradients")}
    assert sorted(clock.ranges[0, "gradients"]) == sorted(set(range(60)) - there["0/gradients"])
    # Results that are there are not computed again either.
    there["0/gradients"] = set(range(60))
    clock = Clock(plan(1, there.get, finished=lambda concept, works: works["images"] == "0/images"), 2)
    clock.run(cost)
    assert {task.kind for task in clock.order} == {DESCRIBE}


def test_failures_are_repeated() -> None:
    luck = random.Random(1)
    clock = Clock(plan(2), 3)
    clock.run(cost, lambda task: luck.random() < 0.1)
    assert all(sorted(counts) == list(range(len(SIZES[node]))) for (_, node), counts in clock.ranges.items())


def test_three_strikes_stop_the_run() -> None:
    clock = Clock(plan(), 2)
    with pytest.raises(FailedError, match=r"worker \d failed at gradients .* of 'c0', as did 2 attempts .*: by chance"):
        clock.run(cost, lambda task: task.node == "gradients" and 7 in task.batches())
    # Everything else that was under way by then is kept, and no failure counts twice.
    assert sum(7 in task.batches() for task in clock.order if task.node == "gradients") >= 3


def test_machines_that_are_taken_away_are_no_strikes() -> None:
    one = plan()
    for _ in range(2 * schedule.STRIKES):
        number, task = one.next(0.0) or pytest.fail("nothing to do")
        assert task.kind == DESCRIBE
        one.failed(number, "worker 1", "its machine was taken away", counts=False)


def test_many_files_are_joined_as_a_tree() -> None:
    files = {"0/images": {f"{i:08d}-1.safetensors": 10 for i in range(300)}, "0/gradients": {}}
    one = Plan(["c0"], JOBS, lambda work: range(60), lambda work: files[work], 60.0)
    sizes = []

    def seconds(task: Task, worker: int) -> float:
        if task.kind == JOIN:
            for name in task.files[1:]:
                del files["0/images"][name]
            sizes.append(len(task.files))
        return 1.0

    Clock(one, 4).run(seconds)
    assert len(files["0/images"]) <= schedule.FILES and max(sizes) == schedule.FAN_IN


def test_joins_that_change_nothing_end() -> None:
    files = {f"{i:08d}-1.safetensors": 10 for i in range(300)}
    one = Plan(["c0"], JOBS, lambda work: range(60), lambda work: dict(files), 60.0)
    clock = Clock(one, 4)
    clock.run(cost)
    assert sum(task.kind == JOIN for task in clock.order) == 2 * -(-300 // schedule.FAN_IN)


def test_the_rest_of_the_time_is_estimated() -> None:
    one = plan()
    assert one.left() is None
    clock = Clock(one, 2)
    clock.run(cost)
    assert one.left() == 0.0
    assert one.counts() == [("images", 102, 102), ("gradients", 480, 480)] and one.concepts_done() == 1
