"""Draws what each workflow makes and how the pack looks: `python -m workflows.pictures [NAME …]`.

Runs on the real server, about four minutes on two cores for all. A workflow's picture is `<name>.jpg` beside it, for
ComfyUI's template browser; those of the workflows for models that people use are screenshots of the graph. `graph`,
`panel` and `blueprints` are screenshots of Chromium in docs/pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from demo.browser import chromium, open_page, post, run_graph
from demo.screenshots import FILE, NAMES
from demo.screenshots import graph as steered
from demo.server import Server, progress_bar
from demo.thumbnails import sweep
from elrond_core.sheets import contact_sheet
from elrond_core.storage.format import load_directions

from .examples import EXAMPLES

GRAPHS = Path(__file__).parent / "api"
FOLDER = Path(__file__).parents[1] / "example_workflows"
DIRECTIONS = FOLDER.parent / "demo" / "directions"
SCREENSHOTS = FOLDER.parent / "docs" / "pictures"
# The part of the page for the graph, in pixels; the frontend's menus lie left, above and below.
WIDTH, HEIGHT, LEFT, ABOVE, BELOW = 1800, 1100, 70, 200, 70


class Run:
    """One workflow, run: what its nodes show, by their titles."""

    def __init__(self, server: Server, name: str) -> None:
        self._server = server
        self._graph = json.loads((GRAPHS / f"{name}.json").read_text(encoding="utf-8"))
        self._outputs = server.run(self._graph, progress_bar(sys.stdout))

    def images(self, title: str) -> torch.Tensor:
        """The images a node saved or previewed, float32 (N, H, W, 3)."""
        files = [Image.open(io.BytesIO(self._server.view(image))) for image in self._of(title)["images"]]
        return torch.from_numpy(np.stack([np.asarray(f.convert("RGB"), dtype=np.float32) / 255 for f in files]))

    def text(self, title: str) -> str:
        """What a node previews as text."""
        return self._of(title)["text"][0]

    def _of(self, title: str) -> dict[str, Any]:
        (node,) = (i for i, node in self._graph.items() if node["_meta"]["title"] == title and i in self._outputs)
        return self._outputs[node]


def discover(run: Run) -> np.ndarray:
    """Sample images over both spectra."""
    images = contact_sheet(run.images("Save Image"), ["", ""], [""] * 8, "images of “a person”", cell=96)
    plots = torch.cat([run.images("PCA: explained variance"), run.images("Response: variance per change")])
    spectra = contact_sheet(plots, [""], ["PCA of their gradients", "normalised by the response"], cell=640)
    return np.concatenate([images, _narrowed(spectra, images.shape[1])])


def steer(run: Run) -> np.ndarray:
    """A row a setting."""
    rows = ["as it is", "against direction 1", "along direction 1", "along 1 and 2"]
    return contact_sheet(run.images("Four rows of four"), rows, [""] * 4, "the same noise in every row", cell=112)


def diversify(run: Run) -> np.ndarray:
    """Before and after."""
    images = torch.cat([run.images("Student"), run.images("Student, diversified")])
    rows = ["distilled", "", "diversified", ""]
    return contact_sheet(images, rows, [""] * 8, "sixteen images of “a person”", cell=96)


def complexity(run: Run) -> np.ndarray:
    """Both spectra under their estimates."""
    words = ["clone", "person"]
    titles = [f"a {word}: about {float(run.text(f'Dimension: {word}')):.1f} ways to vary" for word in words]
    plots = torch.cat([run.images(f"Plot: {word}") for word in words])
    return _narrowed(contact_sheet(plots, [""], titles, cell=640), 900)


def _narrowed(picture: np.ndarray, width: int) -> np.ndarray:
    small = Image.fromarray((picture * 255).round().astype(np.uint8)).resize(
        (width, round(width * picture.shape[0] / picture.shape[1])), Image.Resampling.LANCZOS
    )
    return np.asarray(small, dtype=np.float32) / 255


def _save(picture: np.ndarray, path: Path) -> None:
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(path, quality=88, optimize=True)


def graph(server: Server, path: Path) -> None:
    """Take a screenshot of the discover workflow after it has run."""
    with _page(server) as page:
        workflow = json.loads((FOLDER / "discover.json").read_text(encoding="utf-8"))
        workflow["nodes"] = [node for node in workflow["nodes"] if node["type"] != "MarkdownNote"]
        page.evaluate("async (graph) => await window.app.loadGraphData(graph, true, true, 'discover')", workflow)
        run_graph(page)
        _shoot(page, path)


def panel(server: Server, path: Path) -> None:
    """Take a screenshot of Apply Direction's sliders, two of them moved, beside the images they make."""
    server.run(sweep(FILE, len(NAMES)))
    with _page(server) as page:
        page.evaluate("async (graph) => await window.app.loadApiJson(graph, 'panel')", steered())
        page.evaluate(
            """() => {
                const places = { 1: [0, 0, 300], 2: [0, 170, 300], 5: [0, 480, 300], 3: [340, 0, 300],
                    4: [680, 0, 480], 6: [1200, 0, 300], 7: [1200, 320, 300], 8: [1540, 0, 250] };
                for (const [id, [x, y, width]] of Object.entries(places)) {
                    const node = window.app.graph.getNodeById(Number(id));
                    node.title = node.constructor.title;
                    node.pos = [x, y];
                    node.setSize([width, id === "8" ? 290 : node.size[1]]);
                }
                const sampler = window.app.graph.getNodeById(6);
                sampler.widgets.find((widget) => widget.name === "control_after_generate").value = "fixed";
                // Fields that are out of sight cannot be moved.
                window.app.canvas.ds.scale = 0.8;
                window.app.canvas.ds.offset = [120, 260];
                window.app.canvas.setDirty(true, true);
            }"""
        )
        names = load_directions(DIRECTIONS / f"{FILE}.safetensors").names
        page.get_by_label(f"Use {names[0]}", exact=True).wait_for()
        for name, strength in zip(names, ("-0.5", "0.6"), strict=False):
            page.get_by_label(f"Use {name}", exact=True).check()
            page.get_by_label(f"Strength of {name}", exact=True).fill(strength)
        run_graph(page)
        page.evaluate("() => window.app.canvas.deselectAll()")
        _shoot(page, path)


def blueprints(server: Server, path: Path) -> None:
    """Take a screenshot of the nodes that the blueprints are."""
    graphs = [json.loads(each.read_text(encoding="utf-8")) for each in sorted((FOLDER.parent / "subgraphs").iterdir())]
    whole = {**graphs[0], "nodes": [], "definitions": {"subgraphs": []}}
    for number, each in enumerate(graphs):
        (node,) = each["nodes"]
        whole["nodes"].append({**node, "id": number + 1, "pos": [number * 400, 0]})
        whole["definitions"]["subgraphs"] += each["definitions"]["subgraphs"]
    whole["last_node_id"] = len(graphs)
    with _page(server) as page:
        page.evaluate("async (graph) => await window.app.loadGraphData(graph, true, true, 'blueprints')", whole)
        _shoot(page, path)


def example(server: Server, path: Path) -> None:
    """Take a screenshot of a workflow without its note, as small as the template browser shows it."""
    with _page(server) as page:
        workflow = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        workflow["nodes"] = [node for node in workflow["nodes"] if node["type"] != "MarkdownNote"]
        page.evaluate("async (graph) => await window.app.loadGraphData(graph, true, true, 'example')", workflow)
        taken = path.with_suffix(".png")
        _shoot(page, taken)
    large = np.asarray(Image.open(taken).convert("RGB"), dtype=np.float32) / 255
    taken.unlink()
    _save(_narrowed(large, 1000), path)


@contextlib.contextmanager
def _page(server: Server) -> Iterator[Any]:
    post(server, "/settings", {"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False})
    with chromium() as browser:
        yield open_page(server, browser, size=(WIDTH + LEFT, HEIGHT + ABOVE))


def _shoot(page: Any, path: Path) -> None:
    """Fit the graph into the part of the page that no menu covers, and save a screenshot of the graph."""
    width, height = page.evaluate(
        """([left, above, width, height]) => {
            const { graph, canvas } = window.app;
            const boxes = graph.nodes.map((n) => [n.pos[0], n.pos[1] - 30, ...n.pos.map((p, i) => p + n.size[i])]);
            boxes.push(...graph.groups.map((g) => [...g.pos, ...g.pos.map((p, i) => p + g.size[i])]));
            const [x, y] = [0, 1].map((i) => Math.min(...boxes.map((box) => box[i])) - 20);
            const [x2, y2] = [2, 3].map((i) => Math.max(...boxes.map((box) => box[i])) + 20);
            canvas.ds.scale = Math.min(width / (x2 - x), height / (y2 - y));
            canvas.ds.offset = [left / canvas.ds.scale - x, above / canvas.ds.scale - y];
            canvas.setDirty(true, true);
            return [(x2 - x) * canvas.ds.scale, (y2 - y) * canvas.ds.scale];
        }""",
        [LEFT, ABOVE, WIDTH, HEIGHT - BELOW],
    )
    # Previews are loaded and drawn after the run.
    page.wait_for_timeout(3000)
    page.screenshot(path=path, clip={"x": LEFT, "y": ABOVE, "width": width, "height": height})


# In this order: steer loads directions that discover saves.
WORKFLOWS: tuple[Callable[[Run], np.ndarray], ...] = (discover, steer, diversify, complexity)
SHOTS: tuple[Callable[[Server, Path], None], ...] = (graph, panel, blueprints)


def main() -> None:
    """Draw the pictures named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    examples = [load.__name__ for load in EXAMPLES]
    names = [*(draw.__name__ for draw in (*WORKFLOWS, *SHOTS)), *examples]
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*names, []], help=", ".join(names))
    chosen = parser.parse_args().names or names
    with tempfile.TemporaryDirectory() as output, Server(Path(output)) as server:
        for draw in WORKFLOWS:
            if draw.__name__ in chosen:
                print(draw.__name__)
                _save(draw(Run(server, draw.__name__)), FOLDER / f"{draw.__name__}.jpg")
        for shoot in SHOTS:
            if shoot.__name__ in chosen:
                print(shoot.__name__)
                shoot(server, SCREENSHOTS / f"{shoot.__name__}.png")
        for name in examples:
            if name in chosen:
                print(name)
                example(server, FOLDER / f"{name}.jpg")


if __name__ == "__main__":
    main()
