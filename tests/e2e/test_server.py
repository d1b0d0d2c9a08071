"""The real server, driven over HTTP and WebSocket with the host's own nodes."""

import io
import os
import subprocess
import sys
import time

import psutil
import pytest
from PIL import Image

from demo.server import Server, ServerError, progress_bar

RED = 0xFF0000


def chain(blurs: int, size: int = 64, color: int = RED) -> dict:
    """A stock graph: a plain image, blurred so many times, then saved."""
    graph = {
        "0": {"class_type": "EmptyImage", "inputs": {"width": size, "height": size, "batch_size": 1, "color": color}}
    }
    for step in range(1, blurs + 1):
        inputs = {"image": [str(step - 1), 0], "blur_radius": 20, "sigma": 5.0}
        graph[str(step)] = {"class_type": "ImageBlur", "inputs": inputs, "_meta": {"title": f"Blur {step}"}}
    graph["save"] = {"class_type": "SaveImage", "inputs": {"images": [str(blurs), 0], "filename_prefix": "plain"}}
    return graph


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_the_stock_nodes_are_there(server):
    assert {"KSampler", "CLIPTextEncode", "SaveImage"} <= set(server.object_info())


def test_a_graph_gives_its_images(server):
    progress = []
    outputs = server.run(chain(2), on_progress=lambda name, done: progress.append((name, done)))
    (saved,) = outputs["save"]["images"]
    assert (server.output / saved["subfolder"] / saved["filename"]).is_file()
    image = Image.open(io.BytesIO(server.view(saved)))
    assert image.size == (64, 64)
    assert image.getpixel((32, 32)) == (255, 0, 0)
    assert [entry for entry in progress if entry[1] == 1.0] == [
        ("EmptyImage", 1.0),
        ("Blur 1", 1.0),
        ("Blur 2", 1.0),
        ("SaveImage", 1.0),
    ]


def test_a_graph_that_is_cached_ends_too(server):
    graph = chain(1, color=0x00FF00)
    first = server.run(graph)
    assert not server.reused()
    assert server.run(graph) == first
    assert server.reused() == {"0", "1", "save"}


def test_a_graph_is_computed_anew_once_the_server_forgot(server):
    graph = chain(1, color=0x00FFFF)
    server.run(graph)
    server.forget()
    server.run(graph)
    assert not server.reused()


def test_a_value_out_of_range_names_the_node(server):
    graph = chain(1)
    graph["1"]["inputs"]["blur_radius"] = 1000
    with pytest.raises(ServerError, match=r"ImageBlur \(node 1\): Value 1000 bigger than max of 31") as caught:
        server.run(graph)
    assert (caught.value.node_type, caught.value.node_id) == ("ImageBlur", "1")
    assert "node_errors" in caught.value.details


def test_an_unknown_node_is_named(server):
    with pytest.raises(ServerError, match="NoSuchNode"):
        server.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_a_graph_that_is_partly_wrong_is_refused(server):
    graph = chain(1)
    graph["other"] = {"class_type": "SaveImage", "inputs": {"filename_prefix": "plain"}}
    with pytest.raises(ServerError, match=r"SaveImage \(node other\): Required input is missing: images"):
        server.run(graph)


def test_a_node_that_fails_gives_its_own_sentence(server):
    with pytest.raises(ServerError, match=r"ImageBlur \(node 1\): .*[Pp]adding") as caught:
        server.run(chain(1, size=16))
    assert (caught.value.node_type, caught.value.node_id) == ("ImageBlur", "1")
    assert "traceback" in caught.value.details


def test_interrupt(server):
    told = []

    def stop_once(name: str, done: float) -> None:
        if not told:
            server.interrupt()
        told.append(name)

    with pytest.raises(ServerError, match="interrupted"):
        server.run(chain(40, size=512, color=0x0000FF), on_progress=stop_once)
    assert server.run(chain(1))["save"]["images"]


def test_a_graph_that_lasts_too_long_is_cancelled(server):
    with pytest.raises(ServerError, match=r"did not finish in 0\.2 s"):
        server.run(chain(60, size=1024, color=0x00FFFF), timeout=0.2)
    assert server.run(chain(1))["save"]["images"]


def test_a_file_that_is_not_there(server):
    with pytest.raises(ServerError, match="404"):
        server.view({"filename": "none.png", "subfolder": "", "type": "output"})


def test_memory_is_measured(server):
    assert server.peak_memory() > 100_000_000


def test_the_server_is_gone_after_an_error_and_its_log_stays(tmp_path):
    server = Server(tmp_path / "output", user=tmp_path / "user")
    with pytest.raises(ZeroDivisionError), server:
        pid = server._process.pid
        assert is_running(pid)
        raise ZeroDivisionError
    assert not is_running(pid)
    assert "Starting server" in server.log.read_text()
    assert server.peak_memory() > 100_000_000
    assert (tmp_path / "user" / "custom_nodes" / "ComfyUI-ELROND" / "dev.py").is_file()
    with pytest.raises(ServerError, match="does not answer"):
        server.object_info()


def test_a_server_that_cannot_start_shows_its_log(tmp_path):
    with pytest.raises(ServerError, match=r"(?s)ended with exit code 2.*unrecognized arguments: --no-such-option"):
        Server(tmp_path, extra=["--no-such-option"]).__enter__()


@pytest.mark.skipif(os.name == "nt", reason="signals are a Unix matter")
def test_the_server_ends_with_a_client_that_is_killed(tmp_path):
    client = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import pathlib, sys, time\nfrom demo.server import Server\n"
            "folder = pathlib.Path(sys.argv[1])\n"
            "with Server(folder / 'output', user=folder / 'user') as server:\n"
            "    print(server._process.pid, flush=True)\n    time.sleep(600)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    pid = int(client.stdout.readline())
    assert is_running(pid)
    client.kill()
    client.wait()
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(pid)


def test_a_progress_bar_is_plain_lines_in_a_file():
    stream = io.StringIO()
    show = progress_bar(stream)
    for done in (0, 0.1, 0.3, 0.4, 1):
        show("Sample", done)
    assert stream.getvalue() == "  Sample 25%\n  Sample 100%\n"


def test_a_progress_bar_on_a_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    show = progress_bar(stream)
    show("Sample", 0.5)
    show("Decode", 1)
    first, second = stream.getvalue().rstrip("\n").split("\n")
    assert first.count("#") == 15
    assert second.count("#") == 30
