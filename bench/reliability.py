"""Attacks on files: damage of every kind, writers that are killed, processes that write at once.

    python -m bench.reliability                               all of it, at length: bench/results/reliability.json
    python -m bench.reliability mutations --count 3000        one attack, as short as wanted; figures are printed
    python -m bench.reliability kills --count 10
    python -m bench.reliability races --count 100

Every attack follows from `--seed`, but for what the operating system does first in a race. ComfyUI is not needed.

    mutations       files that were damaged in one of ten ways and read again
    silently_wrong  of these, files with a checksum that loaded as something else
    kill_points     processes that were killed before or after one call to the operating system
    lost            of these, the ones after which something was missing that had been reported as written
    races           saves, changes and reads of processes at the same files
    races_lost      of these, the ones that were undone, mixed up, or refused
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import multiprocessing
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from elrond_core.decompose.sae import TopKSAE
from elrond_core.decompose.sae_training import TrainConfig, TrainedSAE, train_sae
from elrond_core.directions import Directions
from elrond_core.errors import ElrondError
from elrond_core.gradients import Gradients
from elrond_core.provenance import Provenance
from elrond_core.storage import format as files
from elrond_core.storage import tensors as tensor_files
from elrond_core.storage.shards import Shards

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench" / "results" / "reliability.json"
GOLDEN = ROOT / "tests" / "golden"
LENGTHS = {"mutations": 30_000, "kills": 200, "races": 400}
# Seconds after which a file that is read counts as never answering.
HANG = 60
WIDTH = 4096
# Calls to the operating system that a process is killed before or after.
CALLS = {"open", "write", "flush", "fsync", "close", "flock", "mkdir", "link", "rename", "replace", "unlink"}


def same(one: Any, other: Any) -> bool:
    """Whether two loaded things are the same to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if is_dataclass(one):
        return type(one) is type(other) and same(vars(one), vars(other))
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


# Mutations.


@dataclass(frozen=True)
class Subject:
    """A file to damage: its bytes, what it is called, and how it is read; `checked` if it has a checksum."""

    name: str
    content: bytes
    place: str
    load: Callable[[Path], Any]
    checked: bool = True


def ordered(content: bytes) -> bytes:
    """The same file with the keys of its header in order; the library writes metadata in another order each time."""
    length = 8 + int.from_bytes(content[:8], "little")
    text = json.dumps(json.loads(content[8:length]), sort_keys=True).encode()
    return struct.pack("<Q", len(text)) + text + content[length:]


def subjects(folder: Path) -> list[Subject]:
    """Every golden file, two shards, the checkpoint of a training, and an autoencoder."""
    found = []
    readers = {"delta": files.load_delta, "directions": files.load_directions, "gradients": files.load_gradients}
    for path in sorted(GOLDEN.glob("*.safetensors")):
        load = readers[path.stem.split("-")[0]]
        found.append(Subject(path.stem, path.read_bytes(), path.name, load, checked="-1" not in path.stem))
    kept = Shards(folder / "made", "ab", print)
    for number in range(65):
        kept.put(number, {"vectors": torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(number))})
    for path in sorted((folder / "made" / "ab").glob("*.safetensors")):
        found.append(Subject(f"shard {path.stem}", ordered(path.read_bytes()), f"ab/{path.name}", load_shard))
    path = folder / "training.safetensors"
    stop_training(path, 3)
    found.append(Subject("checkpoint", ordered(path.read_bytes()), "training.safetensors", tensor_files.read))
    trained = stop_training(None, 0)
    assert trained is not None
    trained.model.save(path)
    found.append(Subject("autoencoder", ordered(path.read_bytes()), "sae.safetensors", load_autoencoder))
    return found


def load_shard(path: Path) -> Any:
    """The batches of one file, as a collection that goes on has them."""
    said: list[str] = []
    kept = Shards(path.parent.parent, path.parent.name, said.append)
    if said:
        raise ElrondError(said[0])
    return [kept.get(number) for number in range(66)]


def load_autoencoder(path: Path) -> Any:
    """Everything that an autoencoder's file says."""
    model = TopKSAE.load(path)
    return dict(model.state_dict()), model.k, model.rows, model.width


def _flip(content: bytearray, draw: random.Random, _: bytes) -> None:
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def _flip_header(content: bytearray, draw: random.Random, _: bytes) -> None:
    content[draw.randrange(min(len(content), 8 + int.from_bytes(content[:8], "little")))] ^= 1 << draw.randrange(8)


def _cut(content: bytearray, draw: random.Random, _: bytes) -> None:
    del content[draw.randrange(len(content)) :]


def _extend(content: bytearray, draw: random.Random, _: bytes) -> None:
    content += draw.randbytes(draw.choice((1, 8, 4096)))


def _overwrite(content: bytearray, draw: random.Random, _: bytes) -> None:
    start = draw.randrange(len(content))
    length = min(draw.choice((1, 4, 16, 512)), len(content) - start)
    content[start : start + length] = draw.choice((bytes(length), b"\xff" * length, draw.randbytes(length)))


def _remove(content: bytearray, draw: random.Random, _: bytes) -> None:
    start = draw.randrange(len(content))
    del content[start : start + draw.choice((1, 4, 8, 64))]


def _swap(content: bytearray, draw: random.Random, _: bytes) -> None:
    length = draw.choice((1, 4, 16))
    one, other = (draw.randrange(max(1, len(content) - length)) for _ in range(2))
    content[one : one + length], content[other : other + length] = (
        content[other : other + length],
        content[one : one + length],
    )


def _splice(content: bytearray, draw: random.Random, other: bytes) -> None:
    """The header of one file before the tensors of another, as a reader gets them that opens a name twice."""
    length, its = (8 + int.from_bytes(each[:8], "little") for each in (content, other))
    content[length:] = other[its:]


def _lengthen(content: bytearray, draw: random.Random, _: bytes) -> None:
    content[:8] = struct.pack("<Q", draw.choice((0, 1, 2**20, 2**40, 2**63, 2**64 - 1, len(content) - 8)))


HOSTILE: list[Any] = [None, True, -1, 0, 1.5, 2**31, 2**63, 10**30, "", "x", "\0", "\ud800", [], {}, [[]], "[" * 2000]
HOSTILE += [[1] * 5, {"a": {}}, "NaN", "1e999", "F32", "F64", "BOOL", "9" * 5000, "-5", "x" * 70000, [0, 8], [8, 0]]


def _field(content: bytearray, draw: random.Random, _: bytes) -> None:
    """Another value, name or place of something that the header says."""
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    part = draw.choice(list(header.values()))
    part = draw.choice((header, part, part, header["__metadata__"]))
    key = draw.choice(list(part))
    match draw.randrange(4):
        case 0:
            del part[key]
        case 1:
            part[f"{key}x"] = part.pop(key)
        case 2:
            part[key], other = part[draw.choice(list(part))], part[key]
            part[draw.choice(list(part))] = other
        case _:
            part[key] = draw.choice(HOSTILE)
    text = json.dumps(header).encode()
    content[:length] = struct.pack("<Q", len(text)) + text


MUTATIONS = (_flip, _flip_header, _cut, _extend, _overwrite, _remove, _swap, _splice, _lengthen, _field)


def mutated(all_subjects: list[Subject], seed: int, number: int) -> tuple[Subject, str, bytes]:
    """A subject, how it is damaged, and its damaged bytes."""
    draw = random.Random(f"{seed}/{number}")
    subject = all_subjects[number % len(all_subjects)]
    mutate = draw.choice(MUTATIONS)
    content = bytearray(subject.content)
    mutate(content, draw, draw.choice(all_subjects).content)
    return subject, mutate.__name__.strip("_"), bytes(content)


def forged(subject: Subject, seed: int, number: int) -> bytes:
    """A file with a hostile value and a checksum that agrees with it: no damage, but an attack."""
    draw = random.Random(f"{seed}/forged/{number}")
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "whole").write_bytes(subject.content)
        tensors, metadata = tensor_files.read(Path(name) / "whole", lambda *_: None)
    if draw.random() < 0.7:
        value = draw.choice(HOSTILE)
        text = value if isinstance(value, str) and "\ud800" not in value else json.dumps(value)
        metadata[draw.choice(list(metadata))] = text
    else:
        tensor = tensors[draw.choice(list(tensors))]
        values = (-1, 0, 2**62) if tensor.dtype == torch.int64 else (torch.nan, torch.inf, -torch.inf, 1e38, -0.0)
        if tensor.numel():
            tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice(values)
    return tensor_files.encode(tensors, metadata)


def mutations(count: int, seed: int) -> dict[str, Any]:
    """Damage files and read them: each loads as it was, or is refused with an ElrondError."""
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        all_subjects = subjects(folder)
        (folder / "ab").mkdir()
        whole = {}
        for subject in all_subjects:
            (folder / subject.place).write_bytes(subject.content)
            whole[subject.name] = subject.load(folder / subject.place)
            (folder / subject.place).unlink()
        start = _peak()

        def attempt(subject: Subject, content: bytes) -> str:
            nonlocal slowest
            path = folder / subject.place
            path.write_bytes(content)
            before = time.process_time()
            faulthandler.dump_traceback_later(HANG, exit=True)
            try:
                outcome = "identical" if same(subject.load(path), whole[subject.name]) else "different"
            except ElrondError:
                outcome = "refused"
            except Exception as error:  # Whatever it is, it is the finding.
                outcome = f"{type(error).__name__}: {error}"
            faulthandler.cancel_dump_traceback_later()
            slowest = max(slowest, time.process_time() - before)
            path.unlink()
            return outcome

        number = 0
        while counts["checked"] < count:
            subject, how, content = mutated(all_subjects, seed, number)
            outcome = attempt(subject, content)
            counts["checked" if subject.checked else "unchecked"] += 1
            counts[outcome if outcome in ("identical", "refused", "different") else "other error"] += subject.checked
            if outcome not in ("identical", "refused") and (subject.checked or outcome != "different"):
                failures.append(f"mutation {number} of seed {seed}, {how} of {subject.name}: {outcome}")
            if number % 10 == 0 and subject.place.startswith(("directions", "gradients")):
                outcome = attempt(subject, forged(subject, seed, number))
                counts["forged"] += 1
                if outcome not in ("identical", "refused", "different"):
                    failures.append(f"forgery {number} of seed {seed}, of {subject.name}: {outcome}")
            number += 1
        memory = _peak() - start
    return {
        "mutations": counts["checked"],
        "silently_wrong": counts["different"],
        "refused": counts["refused"],
        "identical": counts["identical"],
        "mutations_without_checksum": counts["unchecked"],
        "forged": counts["forged"],
        "failures": failures,
        "slowest_seconds": round(slowest, 3),
        "memory_mb": round(memory / 1e6, 1),
    }


def _peak() -> int:
    """The most memory this process ever held, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# Kills.


def directions(generation: int, count: int = 8) -> Directions:
    """Directions whose numbers follow from a generation, which they name."""
    vectors = torch.randn(count, 1, WIDTH, generator=torch.Generator().manual_seed(generation))
    vectors = torch.nn.functional.normalize(vectors, dim=2)
    return Directions(vectors, torch.ones(count), {"generation": str(generation)}, Provenance("SDXL"))


def generation_of(loaded: Directions) -> int:
    """The generation of directions, or -1 if their numbers are not its own."""
    number = int(loaded.method["generation"])
    return number if torch.equal(loaded.vectors, directions(number).vectors) else -1


def stop_training(checkpoint: Path | None, stop: int) -> TrainedSAE | None:
    """A small training, cancelled after so many steps; 0 for never."""
    vectors = torch.randn(60, 1, 6, generator=torch.Generator().manual_seed(1))
    numbers = torch.zeros(60, dtype=torch.int64)
    source = Gradients(vectors, torch.ones(60), numbers, numbers, Provenance("SDXL"), torch.empty(0, 1, 6))

    def on_step(step: int, *_: Any) -> None:
        if step == stop:
            raise KeyboardInterrupt

    try:
        config = TrainConfig(latents=4, epochs=20, batch_size=60)
        return train_sae(source, config, checkpoint=checkpoint, on_step=on_step)
    except KeyboardInterrupt:
        return None


class Killed:
    """Work in a folder that is killed, and what must be there afterwards."""

    def work(self, folder: Path, done: Callable[[int], None]) -> None:
        """What is killed; it reports each part that is finished."""
        raise NotImplementedError

    def missing(self, folder: Path, done: list[int]) -> int:
        """How many parts that were reported as finished are not there as they were."""
        raise NotImplementedError


class _Replacing(Killed):
    """A file that is saved again and again."""

    def work(self, folder: Path, done: Callable[[int], None]) -> None:
        for number in range(4):
            files.save_directions(directions(number), folder / "d")
            done(number)

    def missing(self, folder: Path, done: list[int]) -> int:
        if not (folder / "d").exists():
            return len(done)
        found = generation_of(files.load_directions(folder / "d"))
        # The next save works, whatever the killed process left.
        files.save_directions(directions(9), folder / "d")
        good = found in (len(done) - 1, len(done)) and generation_of(files.load_directions(folder / "d")) == 9
        return int(not good)


class _Numbering(Killed):
    """Files that are saved under one name and get numbers."""

    def work(self, folder: Path, done: Callable[[int], None]) -> None:
        for number in range(4):
            files.save_directions(directions(number), folder / "d", overwrite=False)
            done(number)

    def missing(self, folder: Path, done: list[int]) -> int:
        present = [files.load_directions(path) for path in folder.iterdir() if not path.name.startswith(".")]
        numbers = [generation_of(each) for each in present]
        return len(set(done) - set(numbers)) + numbers.count(-1)


class _Changing(Killed):
    """A file whose directions are named one after another."""

    def work(self, folder: Path, done: Callable[[int], None]) -> None:
        files.save_directions(directions(1), folder / "d")
        for number in range(4):
            files.update_directions(folder / "d", lambda d, number=number: named(d, number, str(number)))
            done(number)

    def missing(self, folder: Path, done: list[int]) -> int:
        if not (folder / "d").exists():
            return len(done)
        loaded = files.load_directions(folder / "d")
        return sum(loaded.names[number] != str(number) for number in done) + (generation_of(loaded) != 1)


class _Collecting(Killed):
    """Batches of a collection, which are joined once there are 64 of them."""

    @staticmethod
    def batch(number: int) -> dict[str, torch.Tensor]:
        """A batch whose numbers follow from its place."""
        return {"vectors": torch.full((2, 3), float(number))}

    def work(self, folder: Path, done: Callable[[int], None]) -> None:
        kept = Shards(folder, "ab", print)
        for number in range(66):
            kept.put(number, self.batch(number))
            done(number)

    def missing(self, folder: Path, done: list[int]) -> int:
        said: list[str] = []
        kept = Shards(folder, "ab", said.append)
        return len(said) + sum(not same(kept.get(number), self.batch(number)) for number in done)


class _Training(Killed):
    """A training, which ends as if it had never been killed."""

    def work(self, folder: Path, done: Callable[[int], None]) -> None:
        stop_training(folder / "training.safetensors", 19)

    def missing(self, folder: Path, done: list[int]) -> int:
        whole, again = (stop_training(path, 0) for path in (None, folder / "training.safetensors"))
        assert whole is not None and again is not None
        return int(not same(whole.directions, again.directions))


KILLED = (_Replacing(), _Numbering(), _Changing(), _Collecting(), _Training())


def named(old: Directions, index: int, name: str) -> Directions:
    """Directions of which one has another name."""
    return replace(old, names=tuple(name if i == index else each for i, each in enumerate(old.names)))


def killed(attack: Killed, folder: Path, point: int) -> tuple[list[int], int]:
    """Do the work in a process of its own that dies before or after a call to the operating system.

    Args:
        attack: the work.
        folder: where.
        point: at the how manieth beginning or end of a call it dies; 0 for never.

    Returns:
        What it reported as finished, and how many points there were if it did not die.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        passed = 0

        def profile(_: FrameType, event: str, function: Any) -> None:
            nonlocal passed
            if event in ("c_call", "c_return") and getattr(function, "__name__", "") in CALLS:
                passed += 1
                if passed == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            os.close(reading)
            sys.setprofile(profile)
            attack.work(folder, lambda number: os.write(writing, f"{number} ".encode()) and None)
            sys.setprofile(None)
            os.write(writing, f"points {passed}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text, _, points = pipe.read().partition("points ")
    os.waitpid(child, 0)
    return [int(number) for number in text.split()], int(points or 0)


def kills(count: int, seed: int) -> dict[str, Any]:
    """Kill writers at random moments; nothing that was reported as written may be missing."""
    draw = random.Random(seed)
    lost, failures = 0, []
    with tempfile.TemporaryDirectory() as name:
        points = {}
        for attack in KILLED:
            folder = Path(name) / type(attack).__name__
            folder.mkdir()
            done, points[attack] = killed(attack, folder, 0)
            assert points[attack] and not attack.missing(folder, done), f"{folder.name} fails without a kill"
        for number in range(count):
            attack = KILLED[number % len(KILLED)]
            folder = Path(name) / str(number)
            folder.mkdir()
            point = draw.randint(1, points[attack])
            done, _ = killed(attack, folder, point)
            try:
                missing = attack.missing(folder, done)
            except ElrondError as error:
                missing = 1
                failures.append(f"{type(attack).__name__} at point {point}: {error}")
            if missing:
                failures.append(f"{type(attack).__name__} at point {point}: {missing} of {len(done)} missing")
            lost += bool(missing)
    return {"kill_points": count, "lost": lost, "failures": failures}


# Races.


def save_generations(folder: Path, count: int) -> list[str]:
    """Save one generation after another, and look whether each is there."""
    wrong = []
    for number in range(1, count + 1):
        files.save_directions(directions(number), folder / "d")
        found = generation_of(files.load_directions(folder / "d"))
        if found != number:
            wrong.append(f"save {number} was undone: {found}")
    (folder / "end").touch()
    return wrong


def rename(folder: Path, index: int, count: int) -> list[str]:
    """Name one direction again and again, and look whether each name is there."""
    wrong = []
    for number in range(count):
        files.update_directions(folder / "d", lambda d, number=number: named(d, index, f"{index}/{number}"))
        found = files.load_directions(folder / "d").names[index]
        if found != f"{index}/{number}" and not (folder / "generations").exists():
            wrong.append(f"name {number} of direction {index} was undone: {found!r}")
    return wrong


def read_on(folder: Path) -> tuple[int, list[str]]:
    """Read until the writer ends: every file is whole, and none is older than the one before."""
    wrong, last, reads = [], 0, 0
    while not (folder / "end").exists():
        found = generation_of(files.load_directions(folder / "d"))
        if found < last:
            wrong.append(f"generation {last} was followed by {found}")
        last, reads = found, reads + 1
    return reads, wrong


def save_numbered(folder: Path, worker: int, count: int) -> list[tuple[str, int]]:
    """Save under one name without replacing, and say which file is whose."""
    numbers = range(worker * count, (worker + 1) * count)
    return [(files.save_directions(directions(n, 1), folder / "d", overwrite=False).name, n) for n in numbers]


def races(count: int, seed: int) -> dict[str, Any]:
    """Processes at the same files: nothing is undone, mixed up or refused."""
    del seed  # What comes first is the operating system's choice.
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(5, mp_context=context) as pool:
        # One saves generations, two name directions, two read.
        folder = Path(name) / "saved"
        folder.mkdir()
        (folder / "generations").touch()
        files.save_directions(directions(0), folder / "d")
        readers = [pool.submit(read_on, folder) for _ in range(2)]
        writers = [pool.submit(save_generations, folder, count)]
        writers += [pool.submit(rename, folder, index, count) for index in range(2)]
        for writer in writers:
            wrong += _result(writer, [], wrong)
        (folder / "end").touch()
        reads = 0
        for reader in readers:
            number, said = _result(reader, (0, []), wrong)
            reads, wrong = reads + number, wrong + said
        # Four name directions of one file.
        folder = Path(name) / "named"
        folder.mkdir()
        files.save_directions(directions(0), folder / "d")
        for future in [pool.submit(rename, folder, index, count) for index in range(4)]:
            wrong += _result(future, [], wrong)
        # Four save under one name.
        folder = Path(name) / "numbered"
        folder.mkdir()
        saved: list[tuple[str, int]] = []
        for future in [pool.submit(save_numbered, folder, worker, count // 2) for worker in range(4)]:
            saved += _result(future, [], wrong)
        for file, number in saved:
            loaded = files.load_directions(folder / file)
            if int(loaded.method["generation"]) != number:
                wrong.append(f"{file} of {number} was overwritten by {loaded.method['generation']}")
        if len(saved) != 4 * (count // 2):
            wrong.append(f"of {4 * (count // 2)} saves {len(saved)} came back")
    return {
        "races": count + 6 * count + len(saved) + reads,
        "reads": reads,
        "races_lost": len(wrong),
        "failures": wrong,
    }


def _result(future: Any, otherwise: Any, wrong: list[str]) -> Any:
    """What a process found, or `otherwise` if it stopped, and why is wrong."""
    try:
        return future.result(timeout=600)
    except Exception as error:  # Whatever it is, it is the finding.
        wrong.append(f"{type(error).__name__}: {error}")
        return otherwise


def main() -> None:
    """Run what the command line names; print its figures, and keep those of all attacks at length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attack", nargs="?", choices=list(LENGTHS), help="which one; all if left out")
    parser.add_argument("--count", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # Processes are forked, which threads do not survive; and figures must not depend on their number.
    torch.set_num_threads(1)
    attacks = {"mutations": mutations, "kills": kills, "races": races}
    if options.attack:
        print(json.dumps(attacks[options.attack](options.count or LENGTHS[options.attack], options.seed)))
        return
    figures: dict[str, Any] = {"seed": options.seed}
    for name, attack in attacks.items():
        if name != "kills" or hasattr(os, "fork"):
            found = attack(LENGTHS[name], options.seed)
            for failure in found.pop("failures"):
                print(failure)
            figures |= found
            print(json.dumps(found), flush=True)
    OUT.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
