"""A real Ray on this machine, with the demo's teacher: whatever happens, the gradients are those of a plain run."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import graph as graphs
from cluster.progress import Progress

ray = pytest.importorskip("ray", reason="Tests of cluster/ need Ray: pip install 'ray[client]'.")

from cluster.driver import RunError, collect, connect  # noqa: E402
from cluster.worker import Settings  # noqa: E402
from tests.cluster.actors import Actor  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    connect("", 4, 0)
    yield
    ray.shutdown()


def settings(store: Path, **changes: Any) -> Settings:
    graph = graphs.load(ROOT / "workflows" / "api" / "discover.json")
    graph["3"]["inputs"] |= {"count": 12, "batch_size": 4, "steps": 2}
    graph["7"]["inputs"] |= {"count": 20, "batch_size": 4}
    # The rest of the graph is short.
    for node in ("11", "12", "13", "15", "16", "17"):
        del graph[node]
    known = {"graph": graph, "concepts": (), "names": ("person",), "store": str(store), "cards": 0, "threads": 1}
    return Settings(**{**known, **changes})


def run(given: Settings, workers: int = 1, **more: Any) -> tuple[list[dict[str, Any]], str]:
    """The results, and what was shown."""
    shown = io.StringIO()
    return collect(given, workers, 1.0, Progress(shown), **more), shown.getvalue()


def merged(store: Path, name: str = "person") -> bytes:
    (path,) = (store / "gradients").glob(f"{name}-*.safetensors")
    return path.read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What one ComfyUI saves, with one thread as workers have."""
    from demo.server import Server

    folder = tmp_path_factory.mktemp("plain")
    graph = settings(folder).graph
    inputs = {"gradients": ["7", 0], "name": "plain", "overwrite": True}
    graph["18"] = {"class_type": "ElrondSaveGradients", "inputs": inputs}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with Server(folder) as server:
            server.run(graph)
    return (folder / "elrond" / "gradients" / "plain.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(plain: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run of two workers, one of which was killed."""
    store = tmp_path_factory.mktemp("store")
    killed: list[int] = []

    def kill() -> None:
        while not list((store / "works").glob("*/*.safetensors")):
            time.sleep(0.05)
        victim = next(iter(_actors()))
        killed.append(victim)
        os.kill(victim, signal.SIGKILL)

    # A worker may be idle when it is killed: then nothing is lost, and nothing said.
    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    results, _ = run(settings(store), 2)
    thread.join()
    assert killed and results[0]["reports"] == ["20 gradients of 12 realizations"]
    assert results[0]["texts"]["Save PCA directions"].endswith("directions as demo person pca")
    return store


def _actors() -> list[int]:
    import psutil

    return [each.pid for each in psutil.Process().children(recursive=True) if each.name().startswith("ray::Worker")]


def test_gradients_are_those_of_a_plain_run(finished: Path, plain: bytes) -> None:
    assert merged(finished) == plain


def test_the_rest_of_the_graph_is_kept(finished: Path) -> None:
    (results,) = (finished / "results").iterdir()
    assert (results / "elrond" / "directions" / "demo person pca.safetensors").is_file()
    assert (results / "elrond" / "realizations_00012_.png").is_file()
    assert json.loads((results / "result.json").read_text())["concept"] == "person"


def test_only_what_is_missing_or_damaged_is_made_again(finished: Path, plain: bytes, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(finished, store)
    shards = sorted((store / "works").glob("*/*.safetensors"))
    shards[0].unlink()
    shards[-1].write_bytes(shards[-1].read_bytes()[:100])
    before = {path: path.stat().st_mtime_ns for path in shards[1:-1]}
    shutil.rmtree(store / "gradients")
    shutil.rmtree(store / "results")
    run(settings(store))
    assert merged(store) == plain
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_concepts_one_after_the_other(tmp_path: Path) -> None:
    results, _ = run(settings(tmp_path, concepts=("sailor", "a red [person]"), names=("sailor", "red")))
    assert [each["concept"] for each in results] == ["sailor", "red"]
    assert merged(tmp_path, "sailor") != merged(tmp_path, "red")


# Without ComfyUI: what the driver makes of what workers do.


def pretended(store: Path, *misfortunes: str) -> Callable[[], Any]:
    """Makes one actor after another, each with its misfortune."""
    waiting = list(misfortunes)

    def make() -> Any:
        remote = ray.remote(Actor).options(num_cpus=1, max_restarts=-1, max_concurrency=4)
        return remote.remote(settings(store), waiting.pop(0) if waiting else "")

    return make


def test_a_range_that_fails_three_times_stops_the_run(tmp_path: Path) -> None:
    message = r"here \(\d\) failed at gradients \d to \d of 'person', as did 2 attempts before: "
    with pytest.raises(RunError, match=message + r"Collect Gradients \(node 7\): no memory\. Everything else is kept"):
        run(settings(tmp_path), 2, make=pretended(tmp_path, "fails", "fails"))


def test_a_worker_that_dies_is_started_again(tmp_path: Path) -> None:
    results, shown = run(settings(tmp_path), make=pretended(tmp_path, "dies"))
    assert results[0]["reports"] == ["done"]
    assert "here (1) was lost at gradients" in shown


def test_a_worker_that_differs_is_refused_by_name(tmp_path: Path) -> None:
    _, shown = run(settings(tmp_path), 2, make=pretended(tmp_path, "waits for another to be refused", "differs"))
    assert "here (2) is refused: its torch is 4, that of the others 3; its model is n, that of the others m." in shown
    with pytest.raises(RunError, match=r"is refused: .* No worker is left\."):
        run(settings(tmp_path / "other"), 1, make=pretended(tmp_path, "differs"))


def test_a_worker_that_does_not_start_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"worker 1 does not start: ComfyUI does not start: no such file\. No worker"):
        run(settings(tmp_path), make=pretended(tmp_path, "does not start"))


def test_only_names_go_through_the_driver(tmp_path: Path) -> None:
    _, shown = run(settings(tmp_path), 2, make=pretended(tmp_path))
    assert int(shown.split("; ")[-1].split(" bytes")[0]) < 20_000
