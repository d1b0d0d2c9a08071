"""Runs the real ComfyUI server and drives it as any client does: HTTP for graphs, the WebSocket for progress."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import AsyncIterable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import aiohttp
import psutil

from . import host

ROOT = Path(__file__).resolve().parents[1]
PACK = "ComfyUI-ELROND"
START_SECONDS = 180
STOP_SECONDS = 10
BAR = 30

# The host, ended as soon as whoever holds the other end of its standard input is gone, however that happened.
LAUNCHER = """
import os, runpy, sys, threading
threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""

Progress = Callable[[str, float], None]


class ServerError(RuntimeError):
    """The server or a graph failed; the message is one sentence.

    Attributes:
        node_type: the class of the node to blame, or None.
        node_id: its id in the graph, or None.
        details: the server's own report, as it sent it.
    """

    def __init__(
        self,
        message: str,
        *,
        node_type: str | None = None,
        node_id: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(f"{node_type} (node {node_id}): {message}" if node_type else message)
        self.node_type = node_type
        self.node_id = node_id
        self.details = details or {}


class Server:
    """A ComfyUI server with this pack, on the loopback interface, for as long as the context lasts.

    The host's own folder and its models stay untouched: the server gets a base folder of ours, which holds
    `models/`, `input/`, `temp/`, `user/` and a `custom_nodes/` with nothing but this pack.

    Args:
        output: where the host saves; its log goes there too.
        user: the base folder, made if missing and kept; a temporary one if None.
        port: where to listen; a free one if None.
        extra: further options for the host's command line.
        shared: read the host's own models, inputs and custom nodes instead; this pack is added where it is not there.
        patience: seconds within which the host has to answer.
    """

    def __init__(
        self,
        output: Path,
        *,
        user: Path | None = None,
        port: int | None = None,
        extra: Sequence[str] = (),
        shared: bool = False,
        patience: float = START_SECONDS,
    ) -> None:
        self.output = Path(output).resolve()
        self.log = self.output / "comfyui.log"
        self.url = f"http://127.0.0.1:{port or _free_port()}"
        self._user = user
        self._extra = list(extra)
        self._shared = shared
        self._patience = patience
        # The latest graph that the server took.
        self._latest = ""
        self._peak = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._clean_up = contextlib.ExitStack()
        # A proxy has no business between this machine and itself.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def __enter__(self) -> Server:
        """Start the host and wait until it answers.

        Raises:
            FileNotFoundError: if there is no ComfyUI to start.
            ServerError: if it ends or does not answer in time; the message holds the end of its log.
        """
        try:
            self._start()
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the host, whatever happened."""
        self._stop()

    def run(self, graph: dict[str, Any], on_progress: Progress | None = None, timeout: float = 600) -> dict[str, Any]:
        """Run a graph in the API format and return its outputs.

        Args:
            graph: node id to `class_type` and `inputs`.
            on_progress: called with a node's title and how much of it is done, in [0, 1].
            timeout: seconds after which the graph is cancelled.

        Returns:
            Node id to what that node shows, as the host's history has it.

        Raises:
            ServerError: if the host refuses the graph, a node fails, the run is interrupted or lasts too long.
        """
        prompt_id = self._latest = str(uuid.uuid4())
        try:
            asyncio.run(asyncio.wait_for(self._execute(prompt_id, graph, on_progress or _ignore), timeout))
        except ServerError:
            raise
        except aiohttp.ClientError as reason:
            raise self._gone() from reason
        except BaseException as reason:
            self._cancel(prompt_id)
            if isinstance(reason, asyncio.TimeoutError):
                raise ServerError(f"The graph was cancelled: it did not finish in {timeout:g} s.") from reason
            raise
        return self._history()["outputs"]

    def reused(self) -> set[str]:
        """Ids of the nodes of the latest graph whose results the server still had; messages of progress do not tell."""
        messages = dict(self._history()["status"]["messages"])
        return set(messages.get("execution_cached", {}).get("nodes", ()))

    def forget(self) -> None:
        """Empty the server's cache, so that a graph that ran before is computed anew."""
        self._request("/free", {"unload_models": False, "free_memory": True})
        # The server sees to that between two graphs, after the next one at the latest.
        self.run({"1": {"class_type": "PreviewAny", "inputs": {"source": "forget"}}})

    def view(self, image: dict[str, str]) -> bytes:
        """The file behind an output image, a dict of `filename`, `subfolder` and `type`."""
        return self._request("/view?" + urllib.parse.urlencode(image))

    def object_info(self) -> dict[str, Any]:
        """Every node the server knows, by its id."""
        return self._json("/object_info")

    def interrupt(self) -> None:
        """Stop the graph that is running, if one is."""
        self._request("/interrupt", {})

    def peak_memory(self) -> int:
        """The most memory the server process ever held, in bytes; after the context, as it was at the end."""
        if self._process and self._process.poll() is None:
            self._peak = max(self._peak, _peak_memory(self._process.pid))
        return self._peak

    @property
    def running(self) -> bool:
        """Whether the server process is there."""
        return self._process is not None and self._process.poll() is None

    def _start(self) -> None:
        folder = host.path().resolve()
        if self._user is None:
            base = Path(tempfile.mkdtemp(prefix="elrond-"))
            self._clean_up.callback(shutil.rmtree, base, ignore_errors=True)
        else:
            base = self._user.resolve()
        for part in ("models", "input", "temp", "user", "custom_nodes"):
            (base / part).mkdir(parents=True, exist_ok=True)
        _link(ROOT, base / "custom_nodes" / PACK)
        self.output.mkdir(parents=True, exist_ok=True)
        options = {
            "--listen": "127.0.0.1",
            "--port": self.url.rpartition(":")[2],
            "--base-directory": base,
            "--output-directory": self.output,
            "--input-directory": base / "input",
            "--temp-directory": base / "temp",
            "--user-directory": base / "user",
            "--database-url": f"sqlite:///{base / 'user' / 'comfyui.db'}",
        }
        flags = ["--use-pytorch-cross-attention", "--disable-auto-launch", "--disable-api-nodes"]
        if not host.on_gpu():
            flags.append("--cpu")
        if self._shared:
            # Without these, the host reads its own folders.
            del options["--base-directory"], options["--input-directory"]
            if not any((folder / "custom_nodes").glob("*/elrond_core/__init__.py")):
                more = base / "more_nodes.yaml"
                more.write_text(json.dumps({"elrond": {"custom_nodes": str(base / "custom_nodes")}}), encoding="utf-8")
                options["--extra-model-paths-config"] = more
        pairs = [str(part) for pair in options.items() for part in pair]
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(folder / "main.py"), *flags, *pairs, *self._extra],
            cwd=base,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"},
            stdin=subprocess.PIPE,
            stdout=self._clean_up.enter_context(self.log.open("wb")),
            stderr=subprocess.STDOUT,
            # A group of its own: a Ctrl-C in the terminal is for the client, which then stops the server.
            start_new_session=True,
        )

    def _wait(self) -> None:
        deadline = time.monotonic() + self._patience
        while True:
            if self._process is None or self._process.poll() is not None:
                raise self._gone()
            with contextlib.suppress(ServerError):
                self._request("/system_stats")
                return
            if time.monotonic() > deadline:
                raise ServerError(f"ComfyUI did not answer within {self._patience:g} s.\n{self._tail()}")
            time.sleep(0.25)

    def _stop(self) -> None:
        process = self._process
        if process is not None:
            self.peak_memory()
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                _kill(process)
            if process.stdin:
                process.stdin.close()
        self._process = None
        self._clean_up.close()

    async def _execute(self, prompt_id: str, graph: dict[str, Any], on_progress: Progress) -> None:
        client = uuid.uuid4().hex
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as events,
        ):
            prompt = {"prompt": graph, "prompt_id": prompt_id, "client_id": client}
            async with session.post(f"{self.url}/prompt", json=prompt) as reply:
                answer = await reply.json()
            if answer.get("error") or answer.get("node_errors"):
                # The host runs a graph whose outputs are only partly valid; a client that asked for all wants none.
                self._cancel(prompt_id)
                raise _refusal(answer)
            await self._follow(events, prompt_id, graph, on_progress)

    async def _follow(
        self, events: AsyncIterable[Any], prompt_id: str, graph: dict[str, Any], on_progress: Progress
    ) -> None:
        seen: dict[str, float] = {}
        failure: ServerError | None = None
        async for message in events:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            kind, data = event["type"], event["data"]
            if data.get("prompt_id") != prompt_id:
                continue
            if kind == "progress_state":
                for node_id, done in _changes(data["nodes"], seen):
                    on_progress(_title(graph, node_id), done)
            elif kind in ("execution_error", "execution_interrupted"):
                failure = _failure(data)
            elif kind == "executing" and data["node"] is None:
                if failure:
                    raise failure
                return
        raise self._gone()

    def _cancel(self, prompt_id: str) -> None:
        with contextlib.suppress(ServerError):
            self._request("/queue", {"delete": [prompt_id]})
            self._request("/interrupt", {"prompt_id": prompt_id})

    def _history(self) -> dict[str, Any]:
        return self._json(f"/history/{self._latest}")[self._latest]

    def _json(self, path: str) -> dict[str, Any]:
        return json.loads(self._request(path))

    def _request(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self._open(request, timeout=30) as reply:
                return reply.read()
        except urllib.error.HTTPError as reason:
            raise ServerError(f"ComfyUI answered {reason.code} to {path}.") from reason
        except OSError as reason:
            raise ServerError(f"ComfyUI does not answer at {self.url}; its log is {self.log}.") from reason

    def _gone(self) -> ServerError:
        code = self._process.poll() if self._process else None
        state = "does not answer" if code is None else f"ended with exit code {code}"
        return ServerError(f"ComfyUI {state}; its log ends:\n{self._tail()}")

    def _tail(self, lines: int = 30) -> str:
        if not self.log.is_file():
            return "(no log)"
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def progress_bar(stream: TextIO) -> Progress:
    """What `Server.run` may report to: a bar per node on a terminal, a line per quarter elsewhere."""
    shown = ("", -1)

    def show(name: str, done: float) -> None:
        nonlocal shown
        before, shown = shown, (name, int(done * (BAR if stream.isatty() else 4)))
        if shown == before:
            return
        if stream.isatty():
            if before[0] != name and 0 <= before[1] < BAR:
                stream.write("\n")
            stream.write(f"\r  {name:<32.32} [{'#' * shown[1]:.<{BAR}}]" + ("\n" if done >= 1 else ""))
        elif shown[1]:
            stream.write(f"  {name} {25 * shown[1]}%\n")
        stream.flush()

    return show


def _ignore(name: str, done: float) -> None:
    pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _link(target: Path, link: Path) -> None:
    if link.is_symlink():
        link.unlink()
    if sys.platform == "win32":
        # Unlike a symbolic link, a junction needs no privilege.
        import _winapi

        if not link.exists():
            _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _peak_memory(pid: int) -> int:
    status = Path(f"/proc/{pid}/status")
    if status.is_file():
        kib = next((line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")), "0")
        return 1024 * int(kib)
    memory = psutil.Process(pid).memory_info()
    return getattr(memory, "peak_wset", memory.rss)


def _changes(nodes: dict[str, Any], seen: dict[str, float]) -> Iterator[tuple[str, float]]:
    for node in nodes.values():
        done = 1.0 if node["state"] == "finished" else node["value"] / (node["max"] or 1)
        node_id = node["display_node_id"]
        if seen.get(node_id) != done:
            seen[node_id] = done
            yield node_id, done


def _title(graph: dict[str, Any], node_id: str) -> str:
    node = graph.get(node_id, {})
    return node.get("_meta", {}).get("title") or node.get("class_type", node_id)


def _refusal(answer: dict[str, Any]) -> ServerError:
    for node_id, report in (answer.get("node_errors") or {}).items():
        for error in report["errors"]:
            return ServerError(_sentence(error), node_type=report["class_type"], node_id=node_id, details=answer)
    return ServerError(_sentence(answer["error"]), details=answer)


def _sentence(error: dict[str, Any]) -> str:
    return ": ".join(part for part in (error["message"], error.get("details")) if part)


def _failure(report: dict[str, Any]) -> ServerError:
    message = report.get("exception_message", "interrupted").strip()
    return ServerError(message, node_type=report["node_type"], node_id=report["node_id"], details=report)
