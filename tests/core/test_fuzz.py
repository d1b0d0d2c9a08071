"""Attacks on files, a part of `bench/reliability.py`: damage, writers that are killed, processes that write at once.

`ELROND_MUTATIONS=100000` makes the fuzzer run longer, `ELROND_SEED=7` makes other attacks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import reliability
from elrond_core.storage import tensors as tensor_files

ROOT = Path(__file__).parents[2]
SEED = os.environ.get("ELROND_SEED", "1")


def attacked(name: str, count: int | str) -> dict[str, Any]:
    """The figures of one attack, in a process of its own: its memory counts, and it forks."""
    command = [sys.executable, "-m", "bench.reliability", name, "--count", str(count), "--seed", SEED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert not figures["failures"], "\n".join(figures["failures"])
    return figures


def test_damage_is_refused_or_harmless() -> None:
    """Whatever was done to a file, it loads to the bit as it was or gives ElrondError, in 2 seconds and 500 MB."""
    figures = attacked("mutations", os.environ.get("ELROND_MUTATIONS", "3000"))
    assert figures["mutations"] >= 3000 and figures["silently_wrong"] == 0
    assert figures["refused"] + figures["identical"] == figures["mutations"] and figures["refused"] > 2000
    assert figures["forged"] > 200 and figures["mutations_without_checksum"] > 1000
    assert figures["slowest_seconds"] < 2 and figures["memory_mb"] < 500


def test_a_seed_makes_the_same_attack_again(tmp_path: Path) -> None:
    one, two = (reliability.subjects(tmp_path / name) for name in "ab")
    for number in range(100):
        assert reliability.mutated(one, 1, number)[1:] == reliability.mutated(two, 1, number)[1:]


def test_the_fuzzer_finds_what_a_checksum_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Agrees(str):
        def __ne__(self, other: object) -> bool:
            return False

    monkeypatch.setattr(tensor_files, "checksum", lambda *_: Agrees("0"))
    figures = reliability.mutations(300, 1)
    assert figures["silently_wrong"] > 10
    assert all(": different" in failure for failure in figures["failures"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that are killed are forked")
def test_a_writer_that_is_killed_loses_nothing() -> None:
    figures = attacked("kills", 10)
    assert (figures["kill_points"], figures["lost"]) == (10, 0)


def test_processes_at_the_same_files_undo_nothing() -> None:
    """A writer, renamers and readers at one file, four renamers at another, four that save under one name."""
    figures = attacked("races", 40)
    assert figures["races_lost"] == 0 and figures["reads"] > 0 and figures["races"] > 360
