"""What dividing a collection among workers costs, and whether anything changes: the figures of docs/many-machines.md.

    python -m bench.cluster identical     1, 2 and 4 workers, against a plain ComfyUI, byte by byte
    python -m bench.cluster kill          ten ways to be interrupted, each against the same file
    python -m bench.cluster overhead      seconds of a plain run and of a run with one worker, by turns
    python -m bench.cluster simulate      64 workers that sleep, with stragglers and failures, under Ray's scheduler
    python -m bench.cluster               all of them

The model is the demo's teacher, on the processor with one thread a worker. Results go to bench/results/cluster.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from cluster.graph import SAMPLE, Job
from cluster.schedule import DESCRIBE, RANGE, Task

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "cluster.json"
# Processor threads of a host. Sums are divided between threads, so that another number gives other last bits.
THREADS = 1
# Seconds for one run, after which it counts as failed.
PATIENCE = 900.0


def record(key: str, value: Any) -> None:
    """Keep a result."""
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results[key] = value
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    print(key, json.dumps(value, indent=1), flush=True)


def graph(images: int, gradients: int, batch: int, steps: int) -> dict[str, Any]:
    """The discover workflow as it is exported, with these counts, and with Save Gradients for a plain run."""
    exported = json.loads((ROOT / "workflows" / "api" / "discover.json").read_text())
    exported["3"]["inputs"] |= {"count": images, "batch_size": batch, "steps": steps}
    exported["7"]["inputs"] |= {"count": gradients, "batch_size": batch}
    inputs = {"gradients": ["7", 0], "name": "plain", "overwrite": True}
    exported["18"] = {"class_type": "ElrondSaveGradients", "inputs": inputs}
    return exported


SMALL = {"images": 48, "gradients": 192, "batch": 8, "steps": 6}


class Bench:
    """A folder with a graph, and the file that a plain run makes of it."""

    def __init__(self, folder: Path, **counts: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.graph = folder / "graph.json"
        self.graph.write_text(json.dumps(graph(**counts)))

    def plain(self) -> subprocess.Popen[bytes]:
        """Start a plain run, in a process of its own."""
        return self._start("-m", "bench.cluster", "plain", "--folder", str(self.folder))

    def plain_file(self) -> bytes:
        """What it saved."""
        return (self.folder / "plain" / "elrond" / "gradients" / "plain.safetensors").read_bytes()

    def cluster(self, store: str, workers: int = 2, seconds: float = 4.0) -> subprocess.Popen[bytes]:
        """Start a divided run."""
        options = ["--cards-per-worker", "0", "--workers", str(workers), "--threads", str(THREADS)]
        where = ["--store", str(self.folder / store), "--range-seconds", str(seconds)]
        return self._start("-m", "cluster", "collect", str(self.graph), *options, *where)

    def merged(self, store: str) -> bytes:
        """The gradients that a divided run saved."""
        (path,) = (self.folder / store / "gradients").glob("*.safetensors")
        return path.read_bytes()

    def shards(self, store: str) -> dict[Path, int]:
        """Finished ranges and when they were written."""
        return {path: path.stat().st_mtime_ns for path in (self.folder / store / "works").glob("*/*.safetensors")}

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS)}
        log = (self.folder / "log.txt").open("ab")
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def run_plain(folder: Path) -> None:
    """The graph on a ComfyUI of its own, as anybody runs it."""
    from demo.server import Server

    exported = json.loads((folder / "graph.json").read_text())
    with Server(folder / "plain") as server:
        server.run(exported, timeout=PATIENCE)


def complete(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run.

    Raises:
        RuntimeError: if it failed.
    """
    if process.wait(PATIENCE):
        raise RuntimeError(f"A run ended with {process.returncode}; see its log.")


def identical(folder: Path) -> None:
    """Files of 1, 2 and 4 workers against that of a plain run."""
    bench = Bench(folder / "identical", **SMALL)
    complete(bench.plain())
    plain = bench.plain_file()
    same = {}
    for workers in (1, 2, 4):
        complete(bench.cluster(f"store{workers}", workers))
        same[str(workers)] = bench.merged(f"store{workers}") == plain
    ranges = {workers: len(bench.shards(f"store{workers}")) for workers in same}
    record(
        "bit_identical", {"all": all(same.values()), "workers": same, "ranges": ranges, "bytes": len(plain), **SMALL}
    )


# Ways to be interrupted.


def descendants(process: subprocess.Popen[bytes], what: str) -> list[psutil.Process]:
    """Processes that a run has started, whose command line has a text."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                if what in " ".join(each.cmdline()):
                    found.append(each)
    return found


def kill_actor(process: subprocess.Popen[bytes]) -> None:
    """End a worker at once."""
    actors = descendants(process, "ray::Worker")
    random.choice(actors).kill()


def kill_host(process: subprocess.Popen[bytes]) -> None:
    """End the ComfyUI of a worker at once."""
    random.choice(descendants(process, "main.py")).kill()


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """End the driver and everything of its machine at once, as a power cut does."""
    below = psutil.Process(process.pid).children(recursive=True)
    for each in [psutil.Process(process.pid), *below]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def kill_driver(process: subprocess.Popen[bytes]) -> None:
    """End the driver alone at once."""
    process.kill()


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C."""
    process.send_signal(signal.SIGINT)


def truncate(path: Path) -> None:
    """A file of which half was written."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    path.with_name(f".{path.name}.{'0' * 32}.tmp").write_bytes(b"left behind")


def flip(path: Path) -> None:
    """A file with one other bit."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def images(shards: int) -> bool:
    """In the middle of the images."""
    return shards >= 2


def gradients(shards: int) -> bool:
    """In the middle of the gradients: the images take six batches, of one or two a range."""
    return shards >= 10


def kill_points(folder: Path) -> None:
    """Interrupt runs in ten ways, run what is left again, and compare with the uninterrupted file."""
    bench = Bench(folder / "kill", **SMALL)
    complete(bench.plain())
    plain = bench.plain_file()
    points: dict[str, Callable[[str], dict[str, Any]]] = {
        "worker killed at images": lambda store: _survives(bench, store, images, kill_actor),
        "worker killed at gradients": lambda store: _survives(bench, store, gradients, kill_actor),
        "ComfyUI of a worker killed": lambda store: _survives(bench, store, gradients, kill_host),
        "driver killed at images": lambda store: _goes_on(bench, store, images, kill_driver),
        "driver killed at gradients": lambda store: _goes_on(bench, store, gradients, kill_driver),
        "machine killed at gradients": lambda store: _goes_on(bench, store, gradients, kill_all),
        "Ctrl-C at gradients": lambda store: _goes_on(bench, store, gradients, interrupt),
        "a range half written": lambda store: _mends(bench, store, truncate),
        "a range with one other bit": lambda store: _mends(bench, store, flip),
        "two drivers on one store": lambda store: _two(bench, store),
    }
    found: dict[str, Any] = {}
    for place, (name, run) in enumerate(points.items()):
        store = f"store{place}"
        found[name] = run(store)
        found[name]["identical"] = bench.merged(store) == plain
        print(name, found[name], flush=True)
        shutil.rmtree(bench.folder / store)
    whole = all(each["identical"] and each.get("kept", True) for each in found.values())
    record("kill_points", {"all": whole, "points": found, **SMALL})


def _until(bench: Bench, store: str, process: subprocess.Popen[bytes], when: Callable[[int], bool]) -> None:
    """Wait until a run has made so many ranges.

    Raises:
        RuntimeError: if it ends before.
    """
    while not when(len(bench.shards(store))):
        if process.poll() is not None:
            raise RuntimeError("The run was over before it was interrupted.")
        time.sleep(0.05)


def _survives(bench: Bench, store: str, when: Callable[[int], bool], kill: Any) -> dict[str, Any]:
    """Kill something; the run itself goes on to its end."""
    process = bench.cluster(store)
    _until(bench, store, process, when)
    before = bench.shards(store)
    kill(process)
    complete(process)
    return {"kept": _kept(bench, store, before), "finished before": len(before)}


def _goes_on(bench: Bench, store: str, when: Callable[[int], bool], kill: Any) -> dict[str, Any]:
    """Kill the run; a second one goes on."""
    process = bench.cluster(store)
    _until(bench, store, process, when)
    kill(process)
    process.wait(PATIENCE)
    before = bench.shards(store)
    complete(bench.cluster(store))
    return {"kept": _kept(bench, store, before), "finished before": len(before)}


def _mends(bench: Bench, store: str, damage: Callable[[Path], None]) -> dict[str, Any]:
    """Damage two ranges, one of images and one of gradients; a second run makes them again and nothing else."""
    complete(bench.cluster(store))
    before = bench.shards(store)
    folders = sorted({path.parent for path in before})
    damaged = [sorted(path for path in before if path.parent == folder)[1] for folder in folders]
    for path in damaged:
        damage(path)
        del before[path]
    for results in ("gradients", "results"):
        shutil.rmtree(bench.folder / store / results)
    complete(bench.cluster(store))
    return {"kept": _kept(bench, store, before), "damaged": len(damaged)}


def _two(bench: Bench, store: str) -> dict[str, Any]:
    """Two runs at once."""
    processes = [bench.cluster(store, 1) for _ in range(2)]
    for process in processes:
        complete(process)
    return {"ranges": len(bench.shards(store))}


def _kept(bench: Bench, store: str, before: dict[Path, int]) -> bool:
    """Whether ranges that were finished are still there and were not written again."""
    after = bench.shards(store)
    return bool(before) and all(after.get(path) == written for path, written in before.items())


# What it costs.


@contextlib.contextmanager
def processor_seconds(process: subprocess.Popen[bytes]) -> Iterator[list[float]]:
    """Processor seconds of a process and of all that it starts, as seen twice a second; in the list at the end."""
    used: dict[tuple[int, float], float] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(process.pid)
                for each in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                        times = each.cpu_times()
                        used[each.pid, each.create_time()] = times.user + times.system

    total: list[float] = []
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield total
    finally:
        over.set()
        thread.join()
        total.append(sum(used.values()))


def overhead(folder: Path, rounds: int) -> None:
    """Seconds of a plain run and of one worker on ranges of a minute, by turns, from nothing to the last file."""
    counts = {"images": 192, "gradients": 8192, "batch": 64, "steps": 20}
    bench = Bench(folder / "overhead", **counts)
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "one worker": []}
    for round_ in range(rounds):
        for name in times:
            shutil.rmtree(bench.folder / "plain", ignore_errors=True)
            began = time.monotonic()
            process = bench.plain() if name == "plain" else bench.cluster(f"store{round_}", 1, 60.0)
            with processor_seconds(process) as processor:
                complete(process)
            times[name].append((time.monotonic() - began, processor[0]))
            print(name, times[name][-1], flush=True)
        print("ranges", len(bench.shards(f"store{round_}")), flush=True)
    ratios = {
        what: statistics.median(t[i] for t in times["one worker"]) / statistics.median(t[i] for t in times["plain"]) - 1
        for i, what in enumerate(("wall", "processor"))
    }
    ranges = [len(bench.shards(f"store{i}")) for i in range(rounds)]
    about = "from start to end of each command, with starting Ray and ComfyUI; share beyond the plain run, of medians"
    record("overhead", {**ratios, "what": about, "seconds": times, "ranges": ranges, "load": os.getloadavg(), **counts})


# What many workers come to.


class SleepingWorker:
    """Sleeps as long as a card would compute; some are slow, some ranges take long, and some fail.

    Args:
        rank: fixes its luck.
        recipe: seconds by unit, and what goes wrong how often.
    """

    def __init__(self, rank: int, recipe: dict[str, Any]) -> None:
        self._luck = random.Random(rank)
        self._recipe = recipe
        self._slow = recipe["slow_factor"] if self._luck.random() < recipe["slow_workers"] else 1.0
        self._latest = ""
        self._slept: list[tuple[float, float]] = []

    def start(self) -> dict[str, Any]:
        """As a worker does."""
        return {"pid": os.getpid(), "machine": "sleeper"}

    def close(self) -> None:
        """As a worker does."""

    def busy(self, until: float) -> float:
        """Seconds of what it had done by a time."""
        return sum(seconds for end, seconds in self._slept if end <= until)

    def _sleep(self, seconds: float) -> None:
        """Sleep for so many simulated seconds."""
        time.sleep(seconds / self._recipe["scale"])
        self._slept.append((time.monotonic(), seconds / self._recipe["scale"]))

    def work(self, task: Task, works: dict[str, str]) -> dict[str, Any]:
        """Sleep instead of working."""
        recipe = self._recipe
        if task.kind == DESCRIBE:
            self._sleep(recipe["describe"])
            sizes = recipe["sizes"][task.node]
            return {"name": f"{task.concept}-{task.node}", "sizes": sizes, "origin": {}}
        if task.kind != RANGE:
            self._sleep(recipe["rest"])
            return {"reports": [], "texts": {}, "files": [], "gradients": []}
        sizes = recipe["sizes"][task.node]
        units = sum(sizes[i] for i in task.batches())
        seconds = units * recipe["seconds"][task.node] * self._slow * self._luck.choice(recipe["spread"])
        # The first gradients of a concept wait for its realizations to be read.
        where = f"{task.concept}-{task.node}"
        seconds += recipe["load"] * (where != self._latest and task.node == "7")
        self._latest = where
        if self._luck.random() < recipe["straggling_ranges"]:
            seconds *= recipe["straggling_factor"]
        if self._luck.random() < recipe["failures"]:
            self._sleep(seconds * self._luck.random() + recipe["restart"])
            raise RuntimeError("its machine was taken away")
        self._sleep(seconds)
        return {"file": "00000000-1.safetensors", "seconds": seconds / recipe["scale"], "origin": {}}


def simulate(scale: float, workers: int, concepts: int) -> None:
    """Workers that sleep under Ray's scheduler and this pack's driver.

    A failure is a machine that is taken away in the middle of a range; another one starts in its place.
    Seconds are those of Z-Image on a large card, as far as known; what counts is the share that is lost.

    * efficiency: against the seconds of all images and gradients on workers none of which is slow, divided
      among them: no straggler, no failure, no reading of files, no rest of the graph. No scheduler can reach 1.
    * of_these_machines: the share of the workers' time that went into what had to be done with these machines: what the
      scheduler is for. Waiting, and a range that another worker had done before, do not count. What stragglers take
      and what is lost with a machine had to be done; `needed` is all that, in units of perfect machines' work.
    """
    import ray

    from cluster.driver import Run
    from cluster.progress import Progress
    from cluster.schedule import Plan, clock

    class Lossy(Plan):
        """A plan for which failures are machines that were taken away, which is no range's fault."""

        twice = 0.0

        def failed(self, number: int, worker: str, cause: str, counts: bool = True) -> None:
            super().failed(number, worker, cause, counts=False)

        def succeeded(self, number: int, result: dict[str, Any]) -> None:
            task, _ = self._flying[number]
            if task.kind == RANGE and self._state(task).made.issuperset(task.batches()):
                self.twice += result["seconds"]
            super().succeeded(number, result)

    spread = recorded_spread()
    sizes = {"3": [4] * 2500, "7": [4] * 7500}
    recipe = {
        "scale": scale,
        "sizes": sizes,
        "seconds": {"3": 1.0, "7": 0.3},
        "describe": 20.0,
        "rest": 120.0,
        "load": 5.0,
        "spread": [round(each, 3) for each in spread],
        "slow_workers": 0.05,
        "slow_factor": 1.5,
        "straggling_ranges": 0.02,
        "straggling_factor": 4.0,
        "failures": 0.05,
        "restart": 90.0,
    }
    range_seconds = 120.0
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        "local",
        num_cpus=workers,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    jobs = [Job("3", SAMPLE, ()), Job("7", "ElrondCollectGradients", ("3",))]
    names = [f"concept {i}" for i in range(concepts)]
    plan = Lossy(names, jobs, lambda work: set(), lambda work: {}, range_seconds / scale)
    remote = ray.remote(SleepingWorker).options(num_cpus=1, max_restarts=-1)
    handles = [remote.remote(i, recipe) for i in range(workers)]
    # Processes start before the clock does.
    ray.get([handle.start.remote() for handle in handles])
    with Path(os.devnull).open("w") as nowhere:
        run = Run(plan, handles, Progress(nowhere), poll=False)
        began = clock()
        run.go()
        wall = clock() - began
        needed = sum(ray.get([handle.busy.remote(began + wall) for handle in handles])) - plan.twice
        run.close()
    ray.shutdown()
    units = {node: concepts * sum(each) for node, each in sizes.items()}
    ideal = sum(units[node] * recipe["seconds"][node] for node in units) / workers / scale
    gradient_bytes = units["7"] * 2 * 2048 * 4
    about = {key: recipe[key] for key in recipe if key != "sizes"}
    record(
        "simulated_efficiency",
        {
            "efficiency": ideal / wall,
            "of_these_machines": needed / wall / workers,
            "needed": needed / workers / ideal,
            "twice": plan.twice / workers / ideal,
            "workers": workers,
            "concepts": concepts,
            "gradients_each": sum(sizes["7"]),
            "images_each": sum(sizes["3"]),
            "hours_simulated": wall * scale / 3600,
            "seconds_slept": wall,
            "driver_bytes": run.traffic.bytes,
            "gradient_bytes": gradient_bytes,
            "driver_share": run.traffic.bytes / gradient_bytes,
            "range_seconds": range_seconds,
            "recipe": about,
        },
    )


def recorded_spread() -> list[float]:
    """Seconds a gradient of real ranges of the demo's teacher, which `identical` has recorded, divided by their mean.

    Raises:
        RuntimeError: if there are none.
    """
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    times: list[float] = results.get("recorded_times", {}).get("7", [])
    if not times:
        raise RuntimeError("Ranges have no recorded times yet: run `python -m bench.cluster identical` first.")
    return [each / statistics.mean(times) for each in times]


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("identical", "kill", "overhead", "simulate")
    parser.add_argument("part", nargs="?", choices=(*parts, "plain"))
    parser.add_argument("--folder", type=Path, help="where stores and logs go; a temporary one if not given")
    parser.add_argument("--rounds", type=int, default=2, help="of overhead")
    parser.add_argument("--scale", type=float, default=100.0, help="how much faster than life workers sleep")
    parser.add_argument("--workers", type=int, default=64, help="of the simulation")
    parser.add_argument("--concepts", type=int, default=50, help="of the simulation")
    given = parser.parse_args()
    if given.part == "plain":
        run_plain(given.folder)
        return
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="elrond-bench-")))
        for part in [given.part] if given.part else parts:
            if part == "identical":
                identical(folder)
            elif part == "kill":
                kill_points(folder)
            elif part == "overhead":
                overhead(folder, given.rounds)
            else:
                simulate(given.scale, given.workers, given.concepts)


if __name__ == "__main__":
    main()
