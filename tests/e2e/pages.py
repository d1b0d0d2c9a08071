"""Small graphs on ComfyUI's page, and what the page holds. Screenshots go to `output/browser`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from demo.browser import run_graph
from demo.server import Server

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "output" / "browser"


def graph(file: str) -> dict[str, Any]:
    """Directions loaded, applied and sampled, small enough for seconds."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}

    steering = {"index": 0, "strength": 0.0, "unit": "token norms", "start": 0.0, "end": 1.0, "concept": ""}
    sampling = {"seed": 5, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {
        "1": node("ElrondLoadDemoModel", name="student"),
        "2": node("ElrondEncodeConcept", clip=["1", 1], prompt="a [person]", concept="", occurrence=1),
        "3": node("ElrondLoadDirections", name=file),
        "4": node("ElrondApplyDirection", conditioning=["2", 0], directions=["3", 0], strengths="", **steering),
        "5": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "6": node("KSampler", model=["1", 0], positive=["4", 0], negative=["2", 0], latent_image=["5", 0], **sampling),
        "7": node("VAEDecode", samples=["6", 0], vae=["1", 2]),
        "8": node("PreviewImage", images=["7", 0]),
    }


def guided(file: str) -> dict[str, Any]:
    """The same with Guide Along Directions in the place of Apply Direction."""
    nodes = graph(file)
    given = {key: value for key, value in nodes["4"]["inputs"].items() if key != "conditioning"}
    wires = {"model": ["4", 0], "positive": ["2", 0]}
    guide = {"class_type": "ElrondGuideDirections", "inputs": {**given, "model": ["1", 0], "local": True}}
    return {**nodes, "4": guide, "6": {**nodes["6"], "inputs": {**nodes["6"]["inputs"], **wires}}}


def swept(file: str) -> dict[str, Any]:
    """A graph that makes thumbnails of the first three directions."""
    settings = {"which": "0-2", "lowest": -0.8, "highest": 0.8, "columns": 3, "unit": "token norms", "seed": 1}
    settings |= {"width": 64, "height": 64, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    settings |= {"batch_size": 3, "cell": 96, "concept": "", "thumbnails": True}
    wires = {"model": ["1", 0], "positive": ["2", 0], "directions": ["3", 0], "vae": ["1", 2]}
    nodes = {key: node for key, node in graph(file).items() if key in "123"}
    return {
        **nodes,
        "4": {"class_type": "ElrondDirectionSweep", "inputs": {**wires, **settings}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
    }


def show(page: Any, file: str, nodes: Callable[[str], dict[str, Any]] = graph) -> None:
    """Open the graph with both panels unfolded, the node that steers in the middle of the view."""
    page.evaluate("async (graph) => await window.app.loadApiJson(graph, 'browser')", nodes(file))
    page.evaluate(
        """() => {
            const { app } = window;
            const load = app.graph.getNodeById(3), apply = app.graph.getNodeById(4);
            load.pos = [0, 0];
            apply.pos = [500, 0];
            for (const node of [load, apply]) node.setSize([460, node.size[1]]);
            const seed = app.graph.getNodeById(6).widgets.find((w) => w.name === 'control_after_generate');
            if (seed) seed.value = 'fixed';
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [120, 120];
            app.canvas.setDirty(true, true);
        }"""
    )
    for index in (0, 1):
        head = page.locator(".elrond-head").nth(index)
        head.wait_for()
        if head.get_attribute("aria-expanded") != "true":
            head.evaluate("(head) => head.click()")
    page.locator(".elrond-panel li").first.wait_for()
    page.locator('.elrond-panel input[type="range"]').first.wait_for()


def strengths(page: Any) -> str:
    return page.evaluate("() => window.app.graph.getNodeById(4).widgets.find((w) => w.name === 'strengths').value")


def run(page: Any, server: Server, node: str) -> list[np.ndarray]:
    """The pictures that a node of the graph on the page shows, queued as the button does."""
    run_graph(page)
    images = page.evaluate(f"() => window.app.nodeOutputs['{node}'].images")
    return [np.asarray(Image.open(io.BytesIO(server.view(i))).convert("RGB"), dtype=np.int64) for i in images]


def queued(page: Any, server: Server) -> np.ndarray:
    """The picture of the graph that `show` opens."""
    (picture,) = run(page, server, "8")
    return picture


def shot(page: Any, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two CSS colours, as the accessibility guidelines define it."""
    levels = []
    for colour in (first, second):
        digits = colour.lstrip("#")
        if colour.startswith("#"):
            digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
            rgb = [int(digits[i : i + 2], 16) for i in (0, 2, 4)]
        else:
            rgb = [float(part) for part in colour.split("(")[1].rstrip(")").split(",")[:3]]
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        levels.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(levels) + 0.05) / (min(levels) + 0.05)


def overlapping(boxes: list[list[Any]]) -> list[tuple[Any, Any]]:
    """Nodes that lie on one another; a box is a name, left, top, width and height, its title the 30 pixels above."""
    return [
        (kind, other)
        for i, (kind, x, y, width, height) in enumerate(boxes)
        for other, x2, y2, width2, height2 in boxes[:i]
        if not (x + width <= x2 or x2 + width2 <= x or y + height <= y2 - 30 or y2 + height2 <= y - 30)
    ]
