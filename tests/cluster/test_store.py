"""The store, on a disk and where there is none; and what a run shows."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from cluster.progress import Progress, duration

pytest.importorskip("fsspec", reason="Tests of the store need fsspec, which comes with torch.")

from cluster.store import GRADIENTS, WORKS, Store, StoreError


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "new"), tmp_path / "cache")
    store.make()
    assert store.works == tmp_path / "new" / "works" and store.works.is_dir()
    store.write("works/a/1", b"12")
    assert store.sizes("works/a") == {"1": 2} and store.sizes("works/b") == {}
    assert store.exists("works/a/1") and not store.exists("works/a/2") and store.read("works/a/1") == b"12"
    store.remove("works/a/1")
    store.remove("works/a/1")
    assert store.sizes("works/a") == {}
    assert not (tmp_path / "cache").exists()


def test_a_store_without_a_disk_is_copied_both_ways(tmp_path: Path) -> None:
    one, two = (Store("memory://bucket/elrond", tmp_path / name) for name in ("one", "two"))
    one.make()
    (one.works / "a").mkdir(parents=True)
    (one.works / "a" / "1").write_bytes(b"first")
    (one.works / "a" / ".1.tmp").write_bytes(b"half")
    one.push(f"{WORKS}/a")
    assert two.sizes(f"{WORKS}/a") == {"1": 5}
    two.pull(f"{WORKS}/a")
    assert (two.works / "a" / "1").read_bytes() == b"first"
    # A copy that is cut short is fetched again, and what another machine has written is seen.
    (two.works / "a" / "1").write_bytes(b"f")
    one.write(f"{WORKS}/a/2", b"second")
    two.pull(f"{WORKS}/a")
    assert sorted(path.read_bytes() for path in (two.works / "a").iterdir()) == [b"first", b"second"]
    two.forget(f"{WORKS}/a")
    assert not (two.works / "a").exists() and one.exists(f"{WORKS}/a/2")
    one.remove(f"{WORKS}/a/2")
    assert not two.exists(f"{WORKS}/a/2")


def test_results_are_copied_with_their_folders(tmp_path: Path) -> None:
    store = Store("memory://bucket/results", tmp_path / "cache")
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "log").write_bytes(b"log")
    (tmp_path / "out" / "deep" / "file").write_bytes(b"1")
    assert store.put(tmp_path / "out", GRADIENTS, besides="log") == ["deep/file"]
    assert store.read(f"{GRADIENTS}/deep/file") == b"1"


def test_a_store_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be opened"):
        Store("nonsense://x", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        Store(str(tmp_path / "file" / "store"), tmp_path).make()


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (3.4, "3 s"), (75.0, "1 min 15 s"), (7260.0, "2 h 01 min"), (59.7, "1 min 00 s")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


COUNTS = [("images", 10, 10), ("gradients", 5, 30)]


def test_a_file_gets_a_line_now_and_then() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.show(0.0, [("images", 0, 0)], (0, 1), None, {})
    for now in (0.0, 1.0, 20.0):
        progress.show(now, COUNTS, (0, 1), 90.0, {"here": ("gradients", 0.5)})
    progress.show(40.0, [("images", 10, 10), ("gradients", 30, 30)], (1, 2), 0.0, {})
    assert stream.getvalue().splitlines() == [
        " 38%  10 of 10 images, 5 of 30 gradients; 1 min 30 s left",
        "100%  10 of 10 images, 30 of 30 gradients, 1 of 2 concepts; 0 s left",
    ]


def test_a_terminal_gets_a_bar_and_a_line_a_worker() -> None:
    stream = Terminal()
    progress = Progress(stream)
    workers = {f"machine ({i})": ("gradients 1 to 8", 0.25) for i in range(20)}
    progress.show(0.0, COUNTS, (0, 1), None, workers)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("[###########...................]  38%")
    assert lines[1] == "  machine (0): gradients 1 to 8, 25%" and lines[-1] == "  and 4 more workers"
    stream.truncate(0)
    progress.show(1.0, COUNTS, (0, 1), None, {})
    # The block before is drawn over.
    assert f"\033[{len(lines)}A\033[J" in stream.getvalue()


def test_a_total_that_is_not_known_yet_gives_no_share() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.show(0, [("images", 128, 192), ("gradients", 0, 0)], (0, 1), None, {})
    progress.show(60, [("images", 192, 192), ("gradients", 48, 768)], (0, 1), 30, {})
    assert stream.getvalue().splitlines() == [
        "   ?  128 of 192 images, 0 of ? gradients; ? left",
        " 25%  192 of 192 images, 48 of 768 gradients; 30 s left",
    ]
