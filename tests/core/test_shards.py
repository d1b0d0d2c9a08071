"""Collections that go on after an interruption: crashes, bad disks, damaged shards; fingerprints and clean-up."""

import contextlib
import errno
import functools
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from elrond_core.collect.collection import CollectionPlan, collect
from elrond_core.gradients import Gradients
from elrond_core.provenance import Provenance
from elrond_core.storage import atomic_write
from elrond_core.storage import fingerprint as fingerprints
from elrond_core.storage.fingerprint import NoFingerprintError, digest, fingerprint
from elrond_core.storage.shards import Shards, prune

ROOT = Path(__file__).parents[2]
LATENTS = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1))
PLAN = CollectionPlan(count=299, sigma=(0.9, 0.5), seed=3, batch_size=2, probes=True)
posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


class Network:
    def __init__(self) -> None:
        self.rows = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
        self.weights = torch.randn(42, 32, generator=torch.Generator().manual_seed(2)) / 6
        self.calls = 0

    def rows_at(self, sigma: float) -> torch.Tensor:
        return self.rows

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        return (1 - sigma) * latents + sigma * noise

    def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.tanh(torch.cat([noisy.flatten(1), rows.flatten(1)], 1) @ self.weights).reshape(noisy.shape)

    def reduce_memory(self) -> bool:
        return False


def run(root: Path, warn: Callable[[str], None] = pytest.fail, **options) -> tuple[Gradients, int]:
    """150 batches, and how many of them were computed."""
    model = Network()
    kept = Shards(root, "0f" * 16, warn)
    return collect(model, LATENTS, Provenance("toy"), PLAN, store=kept, **options), model.calls


@pytest.fixture(scope="module")
def uninterrupted() -> Gradients:
    return collect(Network(), LATENTS, Provenance("toy"), PLAN)


def same(one: Gradients, two: Gradients) -> None:
    for name in ("vectors", "probes", "sigma", "probe_sigma", "sources", "targets"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert one.provenance == two.provenance


def files(root: Path) -> list[Path]:
    return sorted(root.glob("*/*"))


def test_kept_batches_are_not_computed_again(tmp_path: Path, uninterrupted: Gradients) -> None:
    def cancel(done: int) -> None:
        if done >= 141:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(tmp_path, on_batch=cancel)
    # 71 batches: 64 of them joined, the others by themselves.
    assert [path.name for path in files(tmp_path)] == [
        "00000000-64.safetensors",
        *(f"{n:08d}-1.safetensors" for n in range(64, 71)),
    ]
    progress: list[int] = []
    found, calls = run(tmp_path, on_batch=progress.append)
    assert calls == 150 - 71 and progress[70:72] == [142, 144] and progress[-1] == 299
    same(found, uninterrupted)
    found, calls = run(tmp_path)
    assert calls == 0
    same(found, uninterrupted)


CRASH = """
import os, signal, sys
from pathlib import Path
import pytest
from tests.core.test_shards import run

left = int(sys.argv[2])

def kill(event, args):
    global left
    if event == sys.argv[3] and ".tmp" in str(args[0]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
run(Path(sys.argv[1]), on_batch=lambda done: print(done, flush=True))
"""


@posix
# A file that is opened, renamed; the 65th is that which joins the first 64.
@pytest.mark.parametrize(("number", "event"), [(3, "open"), (8, "os.rename"), (65, "os.rename")])
def test_killed_in_the_middle_of_a_shard(tmp_path: Path, uninterrupted: Gradients, number: int, event: str) -> None:
    command = [sys.executable, "-c", CRASH, str(tmp_path), str(number), event]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    temporary = [path for path in files(tmp_path) if path.name.endswith(".tmp")]
    assert len(temporary) == (event == "os.rename")
    for path in temporary:
        os.utime(path, (time.time() - 3700,) * 2)
    found, calls = run(tmp_path)
    same(found, uninterrupted)
    assert calls == 150 - len(done.stdout.split()) - (number == 65)
    assert not any(path.name.endswith(".tmp") for path in files(tmp_path))


def test_another_process_at_the_same_work_loses_nothing(tmp_path: Path) -> None:
    """What it is writing stays, and what it joins with others while it is listed is found in the new file."""
    batches = [{"vectors": torch.full((2,), float(number))} for number in range(64)]
    first = Shards(tmp_path, "ab", pytest.fail)
    for number in range(63):
        first.put(number, batches[number])
    live = tmp_path / "ab" / f".00000063-1.safetensors.{'a' * 32}.tmp"
    live.write_bytes(b"a part of it")

    class Late(Shards):
        """Reads a file only after the other process has joined all."""

        def _take(self, path: Path) -> None:
            if len(first) == 63:
                first.put(63, batches[63])
            super()._take(path)

    late = Late(tmp_path, "ab", pytest.fail)
    assert len(late) == 64
    assert all(torch.equal(late.get(number)["vectors"], batches[number]["vectors"]) for number in range(64))
    assert live.exists()


@posix
@pytest.mark.parametrize("kind", ["pipe", "dangling link", "folder", "other names"])
def test_what_is_no_shard_does_no_harm(tmp_path: Path, kind: str) -> None:
    """A named pipe would be waited for, a link to nowhere is a file that is not there."""
    Shards(tmp_path, "ab", pytest.fail).put(0, {"vectors": torch.ones(2)})
    path = tmp_path / "ab" / "00000001-1.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "folder":
        path.mkdir()
    else:
        for name in ("notes.txt", "x-1.safetensors", "1-1.safetensors", ".hidden"):
            (tmp_path / "ab" / name).write_bytes(b"x")
    said: list[str] = []
    kept = Shards(tmp_path, "ab", said.append)
    assert len(kept) == 1 and len(said) == (kind in ("pipe", "folder"))
    kept.put(1, {"vectors": torch.zeros(2)})
    assert len(Shards(tmp_path, "ab", lambda sentence: None)) == (1 if kind == "folder" else 2)


def test_a_shard_of_another_collection_is_not_taken(tmp_path: Path) -> None:
    Shards(tmp_path, "ab", pytest.fail).put(0, {"vectors": torch.ones(2)})
    (tmp_path / "ab").rename(tmp_path / "cd")
    said: list[str] = []
    assert not len(Shards(tmp_path, "cd", said.append)) and "is damaged" in said[0]


def test_each_cause_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    kept = Shards(tmp_path, "ab", said.append)
    for number, code in enumerate((errno.EACCES, errno.EACCES, errno.ENOSPC, errno.EACCES, errno.ENOSPC)):

        def refuse(*_: object, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", refuse)
        kept.put(number, {"vectors": torch.ones(2)})
    assert len(said) == 2 and len(kept) == 5
    assert "may not be written to" in said[0] and "the disk is full" in said[1]


def test_files_that_cannot_be_removed_once_they_are_joined_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows refuses to remove a file that another process reads."""
    unlink = Path.unlink

    def busy(path: Path, missing_ok: bool = False) -> None:
        if path.name.endswith("-1.safetensors"):
            raise PermissionError(errno.EACCES, "Access is denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", busy)
    kept = Shards(tmp_path, "ab", pytest.fail)
    for number in range(65):
        kept.put(number, {"vectors": torch.full((2,), float(number))})
    assert len(files(tmp_path)) == 66
    again = Shards(tmp_path, "ab", pytest.fail)
    assert all(torch.equal(again.get(number)["vectors"], kept.get(number)["vectors"]) for number in range(65))


def test_a_shard_that_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Shards(tmp_path, "ab", pytest.fail).put(0, {"vectors": torch.ones(2)})

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "open", refuse)
    said: list[str] = []
    assert not len(Shards(tmp_path, "ab", said.append))
    assert len(said) == 1 and "could not be read: Input/output error" in said[0] and "damaged" not in said[0]


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_shard_is_collected_again(
    tmp_path: Path, uninterrupted: Gradients, damage: str, joined: bool
) -> None:
    run(tmp_path)
    path = files(tmp_path)[0 if joined else -1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes({"cut": content[:-10], "flipped": content, "empty": b""}[damage])
    said: list[str] = []
    found, calls = run(tmp_path, said.append)
    assert calls == (64 if joined else 1)
    assert len(said) == 1 and path.name in said[0] and "damaged" in said[0]
    same(found, uninterrupted)
    assert run(tmp_path)[1] == 0


def test_what_is_kept_is_flushed_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    flush, rename = atomic_write.flush_folder, Path.replace

    def flushed(folder: Path) -> None:
        done.append(("flush", folder.name))
        flush(folder)

    def renamed(path: Path, target: Path) -> Path:
        done.append(("rename", target.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", lambda handle: done.append(("sync", "")))
    monkeypatch.setattr(atomic_write, "flush_folder", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    root = tmp_path / "output" / "collections"
    Shards(root, "ab", pytest.fail).put(0, {"vectors": torch.ones(2)})
    steps = [step for step in done if step[0] != "sync"]
    assert steps == [
        *(("flush", name) for name in (tmp_path.name, "output", "collections")),
        ("rename", "00000000-1.safetensors"),
        ("flush", "ab"),
    ]
    # A file before it is renamed, a folder once it has what it is to keep.
    assert [kind for kind, _ in done] == [*["flush", "sync"] * 3, "sync", "rename", "flush", "sync"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_any_type_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    batch = {"samples": torch.arange(6).view(2, 3).to(dtype), "one": torch.tensor(1, dtype=dtype)}
    Shards(tmp_path, "ab", pytest.fail).put(0, batch)
    kept = Shards(tmp_path, "ab", pytest.fail).get(0)
    assert kept is not None
    for name, tensor in batch.items():
        assert kept[name].dtype == dtype and torch.equal(kept[name], tensor)


def test_every_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    vectors = torch.randn(2, 1, 3)
    Shards(tmp_path, "ab", pytest.fail).put(5, {"vectors": vectors})
    (path,) = files(tmp_path)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        kept = Shards(tmp_path, "ab", lambda sentence: None).get(5)
        assert kept is None or torch.equal(kept["vectors"], vectors), place


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file grows beyond 300 bytes: a write stops in the middle, as on a disk that fills up."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that may be read and not written; the superuser may do anything, and becomes somebody else."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@posix
@pytest.mark.parametrize("reason", ["full disk", "read-only"])
def test_a_disk_that_refuses_is_said_once_and_loses_nothing(
    tmp_path: Path, uninterrupted: Gradients, reason: str
) -> None:
    said: list[str] = []
    with full_disk() if reason == "full disk" else read_only(tmp_path):
        found, calls = run(tmp_path, said.append)
    assert calls == 150
    assert len(said) == 1 and "cannot be kept" in said[0] and "the work goes on" in said[0]
    same(found, uninterrupted)
    assert not [path for path in files(tmp_path) if path.is_file()]
    # Once there is room again, as before.
    same(run(tmp_path)[0], uninterrupted)
    assert run(tmp_path)[1] == 0


def test_clean_up_removes_what_was_used_longest_ago(tmp_path: Path) -> None:
    for age, name in enumerate(["newest", "newer", "old", "mine"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.safetensors").write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    prune(tmp_path, "mine", limit=300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "newer", "newest"]
    prune(tmp_path, "mine", limit=50)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    prune(tmp_path / "not there", "mine", limit=0)
    prune(tmp_path, "of a collection that has not begun")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_clean_up_is_not_stopped_by_one_bad_file(tmp_path: Path) -> None:
    """Links to nowhere count as nothing; a collection of the last hour may be another process's."""
    for age, name in enumerate(["live", "newer", "old", "mine"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.safetensors").write_bytes(bytes(100))
        (tmp_path / name / "link").symlink_to(tmp_path / "nowhere")
        if name != "live":
            os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / "linked").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a file").write_bytes(bytes(1000))
    prune(tmp_path, "mine", limit=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a file", "linked", "live", "mine"]


def scaled(factor: float, shift: float = 0.0) -> Callable[[float], float]:
    return lambda value: factor * value + shift


class Thing:
    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


WEIGHTS = torch.arange(12.0).reshape(3, 4)


def values() -> list[object]:
    changed, subnormal = WEIGHTS.clone(), WEIGHTS.clone()
    changed[2, 3] = 11.000001
    subnormal[0, 0] = 1e-45
    looped = Thing(weights=WEIGHTS)
    looped.itself = looped
    return [
        *(None, True, 1, 1.0, "1", b"1", [1], (1,), [], [[]], [[], []], {"a": 1}, {"a": 1, "b": 2}, {1}),
        *(WEIGHTS, changed, subnormal, WEIGHTS.reshape(4, 3), WEIGHTS.half(), WEIGHTS.T.contiguous(), -WEIGHTS),
        *(WEIGHTS[:2], torch.zeros(3), torch.zeros(4), torch.zeros(0), WEIGHTS.to(torch.float8_e4m3fn)),
        *(Thing(a=1), Thing(b=1), Thing(a=WEIGHTS), looped, scaled(2.0), scaled(3.0), scaled(2.0, 1.0)),
        *(functools.partial(max, 1), functools.partial(max, 2), torch.float16, torch.nn.Linear, WEIGHTS.numpy()),
    ]


def test_fingerprints_tell_contents_apart_and_nothing_else() -> None:
    one, two = ([fingerprint(value) for value in values()] for _ in range(2))
    assert one == two
    assert len(set(one)) == len(one)
    # Neither how a tensor lies in memory nor who shares it matters.
    assert fingerprint(WEIGHTS.T.contiguous().T) == fingerprint(WEIGHTS)
    assert fingerprint([WEIGHTS, WEIGHTS]) == fingerprint([WEIGHTS, WEIGHTS.clone()])
    script = "from tests.core.test_shards import values, fingerprint; print(*map(fingerprint, values()))"
    other = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.split() == one


def test_a_fingerprint_does_not_depend_on_where_the_host_is_installed() -> None:
    """The host calls a node pack by the path of its folder, and its modules by that and their own names."""
    source = "def patch(x):\n    return x + 1\n\nclass Patch:\n    def __init__(self):\n        self.scale = 2\n"
    found = []
    for folder in ("/home/one/ComfyUI/custom_nodes/", "/opt/two_x_0/custom_nodes/", "C:\\ComfyUI\\custom_nodes\\"):
        module = types.ModuleType(f"{folder}pack.nodes")
        exec(compile(source, f"{folder}pack/nodes.py", "exec"), module.__dict__)
        found.append(fingerprint(module.patch, module.Patch(), module.Patch, module))
    assert len(set(found)) == 1
    other = types.ModuleType("/home/one/ComfyUI/custom_nodes/other.nodes")
    exec(source, other.__dict__)
    assert fingerprint(other.patch, other.Patch(), other.Patch, other) != found[0]


def test_what_has_no_content_has_no_fingerprint() -> None:
    with pytest.raises(NoFingerprintError, match="object has no content"):
        fingerprint({"patch": object()})
    assert fingerprint(object(), content=lambda value: 7) == fingerprint(object(), content=lambda value: 7)


def test_the_digest_notices_one_bit_anywhere() -> None:
    size = 2 * fingerprints.CHUNK + 5
    tensor = torch.zeros(4 * size - 1, dtype=torch.uint8)
    found = {digest(tensor)}
    places = [0, 1, 4 * fingerprints.CHUNK, 4 * fingerprints.CHUNK + 1, len(tensor) - 1]
    for place in places:
        changed = tensor.clone()
        changed[place] = 128
        found.add(digest(changed))
    assert len(found) == 1 + len(places)
    # A swap within a chunk, and of whole chunks.
    words = torch.arange(size, dtype=torch.int32)
    swapped = words.roll(fingerprints.CHUNK)
    assert len({digest(words), digest(swapped), digest(words.flip(0))}) == 3
