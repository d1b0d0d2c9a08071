"""Takes screenshots of sliders in a subgraph and in App mode, and of presets: `python -m demo.screenshots [NAME …]`.

They go to docs/pictures. App mode needs a newer frontend than ComfyUI 0.3.75 pins: `ELROND_FRONTEND` names its `static`
folder (`pip download comfyui-frontend-package` and unzip). Without it, the picture of App mode stays as it is.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from elrond_core.storage.format import load_directions

from .browser import chromium, open_page, post, run_graph
from .server import Server

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
# Width and height of the page in pixels.
SIZE = (1500, 940)
FILE = "demo person words"
NAMES = load_directions(Path(__file__).parent / "directions" / f"{FILE}.safetensors").names


def graph() -> dict[str, Any]:
    """Directions loaded, applied and sampled."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}

    steering = {"index": 0, "strength": 0.0, "unit": "token norms", "start": 0.0, "end": 1.0, "concept": ""}
    sampling = {"seed": 5, "steps": 20, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {
        "1": node("ElrondLoadDemoModel", name="teacher"),
        "2": node("ElrondEncodeConcept", clip=["1", 1], prompt="a [person]", concept="", occurrence=1, row=0),
        "3": node("ElrondLoadDirections", name=FILE),
        "4": node("ElrondApplyDirection", conditioning=["2", 0], directions=["3", 0], strengths="", **steering),
        "5": node("EmptyLatentImage", width=64, height=64, batch_size=9),
        "6": node("KSampler", model=["1", 0], positive=["4", 0], negative=["2", 0], latent_image=["5", 0], **sampling),
        "7": node("VAEDecode", samples=["6", 0], vae=["1", 2]),
        "8": node("PreviewImage", images=["7", 0]),
    }


def _open(page: Any) -> None:
    page.evaluate("async (graph) => await window.app.loadApiJson(graph, 'sliders')", graph())
    page.get_by_label(f"Use {NAMES[0]}", exact=True).wait_for()
    page.evaluate(
        """() => {
            const { app } = window;
            for (const node of app.graph.nodes) node.title = node.constructor.title;
            const { widgets } = app.graph.getNodeById(6);
            widgets.find((widget) => widget.name === 'control_after_generate').value = 'fixed';
        }"""
    )


def _move(page: Any, within: Any) -> None:
    """Move two sliders, one of which acts in the second half of the sampling only."""
    for name, strength in zip(NAMES, ("-0.5", "0.6"), strict=False):
        within.get_by_label(f"Use {name}", exact=True).check()
        within.get_by_label(f"Strength of {name}", exact=True).fill(strength)
    within.get_by_label(f"Ends of the slider, and start and end, of {NAMES[1]}").click()
    field = within.get_by_label("Start of direction 1", exact=True)
    field.fill("0.5")
    field.press("Tab")
    within.get_by_label(f"Ends of the slider, and start and end, of {NAMES[1]}").click()
    page.evaluate("() => document.activeElement.blur()")


def subgraph(page: Any) -> bytes:
    """The inside of a subgraph that steers, as a PNG."""
    _open(page)
    page.evaluate(
        """() => {
            const { app } = window;
            const nodes = new Set([3, 4].map((id) => app.graph.getNodeById(id)));
            const { node } = app.graph.convertToSubgraph(nodes);
            node.title = node.subgraph.name = 'Steer with sliders';
            app.canvas.setGraph(node.subgraph);
            const [load, apply] = [3, 4].map((id) => node.subgraph.nodes.find((each) => each.elrondPanel
                && each.comfyClass === (id === 3 ? 'ElrondLoadDirections' : 'ElrondApplyDirection')));
            load.pos = [0, 0];
            apply.pos = [420, 0];
            load.setSize([340, load.size[1]]);
            apply.setSize([480, apply.size[1]]);
            node.subgraph.inputNode.pos = [-220, 0];
            node.subgraph.outputNode.pos = [1000, 0];
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [320, 170];
            app.canvas.setDirty(true, true);
            apply.elrondPanel.root.id = 'inside';
        }"""
    )
    within = page.locator("#inside")
    within.get_by_label(f"Use {NAMES[0]}", exact=True).wait_for()
    _move(page, within)
    page.evaluate("() => window.app.canvas.deselectAll()")
    page.wait_for_timeout(1500)
    return page.screenshot()


def presets(page: Any) -> bytes:
    """Diversify with its presets, beside the images as they are and as they are diversified, as a PNG."""
    nodes = graph()
    for key in ("6", "7", "8"):
        nodes[f"1{key}"] = {**nodes[key], "inputs": dict(nodes[key]["inputs"])}
    drawing = {"count": 9, "seed": 3, "lowest": 0.2, "highest": 0.8, "unit": "auto", "mix": 1, "leading": 0}
    drawing |= {"both_signs": True, "start": 0.0, "end": 1.0, "concept": "", "how": "random", "weights": "equal"}
    drawing |= {"total": 0.0, "conditioning": ["2", 0], "directions": ["3", 0]}
    nodes["4"] = {"class_type": "ElrondDiversify", "inputs": drawing, "_meta": {"title": "Diversify"}}
    nodes["1"]["inputs"]["name"] = "student"
    for key, source in (("6", ["2", 0]), ("16", ["4", 0])):
        nodes[key]["inputs"] |= {"positive": source, "steps": 4}
    nodes["17"]["inputs"]["samples"], nodes["18"]["inputs"]["images"] = ["16", 0], ["17", 0]
    page.evaluate("async (graph) => await window.app.loadApiJson(graph, 'presets')", nodes)
    page.get_by_label("How far the images go: how, lowest and highest").wait_for()
    page.evaluate(
        """() => {
            const { app } = window;
            const places = { 1: [-800, 0, 300], 5: [-800, 170, 300], 2: [-800, 360, 300], 3: [-420, 0, 320],
                6: [-420, 460, 300], 7: [-800, 660, 200], 16: [450, 400, 290], 17: [790, 400, 290],
                4: [0, 0, 400], 8: [450, 0, 290], 18: [790, 0, 290] };
            for (const [id, [x, y, width]] of Object.entries(places)) {
                const node = app.graph.getNodeById(Number(id));
                node.title = node.constructor.title;
                node.pos = [x, y];
                node.setSize([width, node.comfyClass === 'PreviewImage' ? 320 : node.size[1]]);
                const { widgets } = node;
                const control = widgets?.find((widget) => widget.name === 'control_after_generate');
                if (control) control.value = 'fixed';
            }
            app.graph.getNodeById(8).title = 'The distilled model';
            app.graph.getNodeById(18).title = 'Diversified';
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [130, 190];
            app.canvas.setDirty(true, true);
        }"""
    )
    page.get_by_label("How far the images go: how, lowest and highest").select_option("as varied as the base model")
    page.get_by_label("In which part of the sampling it acts: start and end").select_option(
        "new composition: first steps"
    )
    page.wait_for_timeout(1000)
    run_graph(page)
    page.get_by_role("button", name="What each image got").click()
    page.evaluate("() => { document.activeElement.blur(); window.app.canvas.deselectAll(); }")
    page.wait_for_timeout(3000)
    return page.screenshot()


def app(page: Any) -> bytes | None:
    """App mode with the list of directions as an input, as a PNG; None if the frontend has none."""
    if "Toggle App Mode" not in page.evaluate(
        "() => window.app.extensionManager.command.commands.map((each) => String(each.label))"
    ):
        return None
    # An introduction that the frontend shows once.
    page.add_locator_handler(page.get_by_role("button", name="Skip", exact=True), lambda button: button.click())
    _open(page)
    page.evaluate(
        """async () => {
            const { app } = window;
            const saved = app.graph.serialize();
            saved.extra.linearData = { inputs: [[4, 'elrond_panel'], [6, 'seed']], outputs: [8] };
            await app.loadGraphData(saved, true, true, 'sliders');
            await app.extensionManager.command.execute('Comfy.ToggleLinear');
        }"""
    )
    item = page.get_by_test_id("app-mode-widget-item").filter(has=page.locator(".elrond-panel"))
    item.wait_for()
    _move(page, item)
    run_graph(page)
    # ComfyUI 0.3.75 has no list of jobs, so a newer frontend does not see that the run has ended.
    page.add_style_tag(content="[data-testid=linear-cancel-run] { display: none !important; }")
    page.wait_for_timeout(3000)
    return page.screenshot()


def main() -> None:
    """Take those named, or all."""
    chosen = sys.argv[1:] or [take.__name__ for take in (subgraph, presets, app)]
    frontend = os.environ.get("ELROND_FRONTEND")
    extra = ["--front-end-root", frontend] if frontend else []
    with tempfile.TemporaryDirectory() as output, Server(Path(output), extra=extra) as server, chromium() as browser:
        post(server, "/settings", {"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False})
        for take in (subgraph, presets, app):
            if take.__name__ not in chosen:
                continue
            page = open_page(server, browser, size=SIZE)
            picture = take(page)
            page.context.close()
            if picture:
                Image.open(io.BytesIO(picture)).save(PICTURES / f"{take.__name__}.webp", quality=85, method=6)
                print(f"{take.__name__}.webp")


if __name__ == "__main__":
    main()
