"""Workers without a ComfyUI, for tests of the driver. Ray imports this module in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from cluster.schedule import DESCRIBE, RANGE, Task
from cluster.worker import Settings, Worker, WorkerError, result_name

SIZES = {"3": [1] * 4, "7": [1] * 6}


class Actor(Worker):
    """A worker that only says that it has done something."""

    def __init__(self, given: Settings, misfortune: str = "") -> None:
        self._misfortune = misfortune
        self._given = given
        self._folder = Path(given.store)

    def start(self) -> dict[str, Any]:
        if self._misfortune == "does not start":
            raise WorkerError("ComfyUI does not start: no such file")
        return {"pid": os.getpid(), "machine": "here"}

    def status(self) -> tuple[str, float]:
        return "working", 0.5

    def close(self) -> None:
        pass

    def work(self, task: Task, works: dict[str, str]) -> dict[str, Any]:
        (self._folder / "order.txt").open("a").write(f"{task.kind} {task.node} {task.numbers}\n")
        if task.kind == DESCRIBE:
            origin = {"pack": "1", "host": "2", "torch": "3", "device": "card", "model": "m"}
            return {"name": f"{task.concept}-{task.node}", "sizes": SIZES[task.node], "origin": origin}
        if task.kind == RANGE:
            time.sleep(0.05)
            if self._misfortune == "waits for another to be refused":
                while not (self._folder / "refused").exists():
                    time.sleep(0.05)
            if self._misfortune == "differs":
                (self._folder / "refused").touch()
                return {"refused": {"pack": "1", "host": "2", "torch": "4", "device": "card", "model": "n"}}
            if self._misfortune == "fails" and task.node == "7" and 2 in task.batches():
                raise WorkerError("Collect Gradients (node 7): no memory")
            if self._misfortune == "dies" and task.node == "7" and not (self._folder / "died").exists():
                (self._folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return {"seconds": 0.05, "origin": {}}
        name = self._folder / "results" / result_name(self._given, 0, works)
        name.mkdir(parents=True, exist_ok=True)
        result = {"reports": ["done"], "texts": {}, "files": [], "gradients": [], "concept": "person"}
        (name / "result.json").write_text(json.dumps(result))
        return result
