"""The pack in the host's own frontend, in a real browser."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from demo.browser import PATIENCE, open_page, post
from demo.server import Server
from elrond_core.directions import Directions
from elrond_core.provenance import Provenance
from elrond_core.storage.format import load_directions, save_directions
from tests.e2e.pages import ROOT, contrast, graph, guided, overlapping, queued, run, shot, show, strengths, swept

NAMES = ["complexity", "discover", "diversify", "steer"]


def test_the_pack_loads_without_a_console_error(page: Any) -> None:
    assert page.evaluate("() => window.app.extensions.some((extension) => extension.name === 'elrond.panel')")
    assert (
        page.evaluate("() => Object.keys(LiteGraph.registered_node_types).filter((n) => /^Elrond/.test(n)).length") > 17
    )
    # While it starts, the host sets a setting of its own that it does not know, and says so.
    assert [text for text in page.said if "elrond" in text.lower()] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_opens_as_it_is_shipped(page: Any, name: str) -> None:
    """No node is missing, and what the frontend would send is the graph in the API format."""
    before = len(page.said)
    workflow = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    page.evaluate("async (graph) => await window.app.loadGraphData(graph, true, true, 'opened')", workflow)
    page.wait_for_timeout(500)
    page.keyboard.press("Escape")
    known = page.evaluate("() => window.app.graph.nodes.map((n) => [n.type, n.has_errors === true])")
    assert len(known) == len(workflow["nodes"])
    assert not [kind for kind, bad in known if bad]
    sent = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    shipped = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node_id, node in sent.items():
        # The frontend gives the host's own Preview as Text a widget that shows the text.
        node["inputs"].pop("preview", None)
        assert node["class_type"] == shipped[node_id]["class_type"]
        # Optional values that the file leaves out are sent with their defaults.
        assert {name: node["inputs"][name] for name in shipped[node_id]["inputs"]} == shipped[node_id]["inputs"]
    assert set(sent) == set(shipped)
    # Panels make nodes taller, open ones most; no node may come to lie on another, or to stick out of its group.
    for head in page.locator(".elrond-head").all():
        head.evaluate("(head) => head.click()")
    page.wait_for_timeout(1500)
    boxes = page.evaluate("() => window.app.graph.nodes.map((n) => [n.type, ...n.pos, ...n.size])")
    assert overlapping(boxes) == []
    for kind, x, y, width, height in boxes:
        if kind != "MarkdownNote":
            groups = [group["bounding"] for group in workflow["groups"]]
            assert any(
                left <= x and x + width <= left + wide and top <= y and y + height <= top + high
                for left, top, wide, high in groups
            ), kind
    page.evaluate(
        """([left, top, right, bottom]) => {
            const { ds } = window.app.canvas;
            ds.scale = Math.min(1400 / (right - left), 800 / (bottom - top));
            ds.offset = [80 / ds.scale - left, 110 / ds.scale - top];
            window.app.canvas.setDirty(true, true);
        }""",
        [min(b[1] for b in boxes), min(b[2] for b in boxes)] + [max(b[k] + b[k + 2] for b in boxes) for k in (1, 2)],
    )
    page.wait_for_timeout(500)
    shot(page, f"workflow-{name}")
    assert page.said[before:] == []


def test_a_slider_changes_the_picture(page: Any, server: Server, stored: str) -> None:
    show(page, stored)
    plain = queued(page, server)
    page.get_by_label("Use direction 0", exact=True).check()
    assert strengths(page) == "0: 0"
    assert (queued(page, server) == plain).all()
    slider = page.get_by_label("Strength of direction 0", exact=True)
    slider.focus()
    page.keyboard.press("End")
    assert strengths(page) == "0: 1"
    steered = queued(page, server)
    assert np.abs(steered - plain).max() > 20
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    assert strengths(page) == "0: 0.97"
    page.get_by_label("Use direction 0", exact=True).uncheck()
    assert strengths(page) == ""
    assert (queued(page, server) == plain).all()
    # Where the slider stood is remembered.
    page.get_by_label("Use direction 0", exact=True).check()
    assert strengths(page) == "0: 0.97"


def test_randomise_moves_what_is_on_and_stays_in_its_range(page: Any, stored: str) -> None:
    show(page, stored)
    page.get_by_role("button", name="Off").click()
    page.get_by_role("button", name="Randomise").click()
    assert page.get_by_text("Switch on the directions to randomise first.").is_visible()
    for index in (0, 2):
        page.get_by_label(f"Use direction {index}", exact=True).check()
    highest = page.get_by_label("Highest strength of the sliders")
    highest.fill("0.2")
    highest.press("Tab")
    lowest = page.get_by_label("Lowest strength of the sliders")
    lowest.fill("0.3")
    lowest.press("Tab")
    # Longer than the panel takes to look at its widgets again: what it said stays.
    page.wait_for_timeout(600)
    assert page.get_by_text("The lowest strength must be below the highest.").is_visible()
    lowest.fill("0.1")
    lowest.press("Tab")
    seen = set()
    for _ in range(5):
        page.get_by_role("button", name="Randomise").click()
        text = strengths(page)
        values = dict(part.split(": ") for part in text.split(", "))
        assert set(values) == {"0", "2"}
        assert all(0.1 <= float(value) <= 0.2 for value in values.values())
        seen.add(text)
    assert len(seen) == 5
    page.get_by_role("button", name="Off").click()
    assert strengths(page) == ""


def test_a_slider_guides_a_model(page: Any, server: Server, stored: str) -> None:
    """On Guide Along Directions the sliders are the same, and the prompt stays as it is."""
    show(page, stored, guided)
    before = queued(page, server)
    page.get_by_label("Use direction 0", exact=True).check()
    # Its sliders go twice as far.
    page.get_by_label("Strength of direction 0", exact=True).press("End")
    assert strengths(page) == "0: 2"
    assert np.abs(queued(page, server) - before).max() > 8
    shot(page, "guided")


def test_a_slider_may_have_ends_of_its_own(page: Any, stored: str) -> None:
    show(page, stored)
    page.get_by_label("Ends of the slider, and start and end, of direction 1", exact=True).press("Enter")
    for end, value in (("Highest", "3"), ("Lowest", "2")):
        field = page.get_by_label(f"{end} strength of direction 1", exact=True)
        field.fill(value)
        field.press("Tab")
    slider = page.get_by_label("Strength of direction 1", exact=True)
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("2", "3")
    other = page.get_by_label("Strength of direction 0", exact=True)
    assert float(other.get_attribute("min")) < 0 < float(other.get_attribute("max")) <= 1
    page.get_by_label("Use direction 1", exact=True).check()
    assert strengths(page) == "1: 2"
    page.get_by_role("button", name="Randomise").click()
    assert 2 <= float(strengths(page).partition(": ")[2]) <= 3
    exact = page.get_by_label("Exact strength for direction 0", exact=True)
    exact.fill("-4.5")
    exact.press("Enter")
    assert strengths(page).startswith("0: -4.5, 1: ")
    saved = page.evaluate("() => window.app.graph.serialize()")
    page.evaluate("async (graph) => await window.app.loadGraphData(graph, true, true, 'again')", saved)
    slider = page.get_by_label("Strength of direction 1", exact=True)
    slider.wait_for()
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("2", "3")


def test_a_slider_changes_the_workflow(page: Any, stored: str) -> None:
    """The editor knows that there is something to save, and takes the change back."""
    show(page, stored)
    page.evaluate("() => window.app.extensionManager.workflow.activeWorkflow.changeTracker.reset()")
    modified = "() => window.app.extensionManager.workflow.activeWorkflow.isModified"
    page.get_by_label("Use direction 0", exact=True).check()
    slider = page.get_by_label("Strength of direction 0", exact=True)
    slider.press("End")
    page.wait_for_function(modified)
    slider.evaluate("(slider) => slider.blur()")
    page.keyboard.press("Control+z")
    page.wait_for_function(
        "() => window.app.graph.getNodeById(4).widgets.find((w) => w.name === 'strengths').value !== '0: 1'"
    )


def test_sliders_are_off_where_strengths_come_over_a_wire(page: Any, stored: str) -> None:
    show(page, stored)
    page.evaluate(
        """() => {
            const text = LiteGraph.createNode('PrimitiveString');
            window.app.graph.add(text);
            const apply = window.app.graph.getNodeById(4);
            text.connect(0, apply, apply.inputs.findIndex((input) => input.name === 'strengths'));
        }"""
    )
    page.get_by_text("The strengths come from another node, so the sliders are off.").wait_for()
    assert page.get_by_label("Strength of direction 0", exact=True).is_disabled()


def test_an_answer_that_is_no_json_is_one_sentence(page: Any, stored: str) -> None:
    show(page, stored)
    page.route("**/elrond/directions*", lambda route: route.fulfill(status=502, body="<html>Bad gateway</html>"))
    try:
        page.locator(".elrond-panel").first.get_by_label("Look at the files again").click()
        page.get_by_text("ComfyUI's server answered 502: look at its log.").first.wait_for()
    finally:
        page.unroute("**/elrond/directions*")


def test_an_image_dropped_onto_the_canvas_makes_its_batch_again(page: Any, server: Server) -> None:
    """The workflow that the frontend saves in an image is enough, whatever was open before."""
    workflow = json.loads((ROOT / "example_workflows" / "diversify.json").read_text(encoding="utf-8"))
    page.evaluate("async (graph) => await window.app.loadGraphData(graph, true, true, 'first')", workflow)
    diversified = str(next(n["id"] for n in workflow["nodes"] if n.get("title") == "Student, diversified"))
    first = run(page, server, diversified)
    page.evaluate(
        """async (image) => {
            const reply = await window.app.api.fetchApi('/view?' + new URLSearchParams(image));
            const file = new File([await reply.blob()], 'dropped.png', { type: 'image/png' });
            window.app.graph.clear();
            await window.app.handleFile(file);
        }""",
        page.evaluate(f"() => window.app.nodeOutputs['{diversified}'].images[5]"),
    )
    page.wait_for_function("() => window.app.graph.nodes.length > 10")
    post(server, "/free", {"unload_models": False, "free_memory": True})
    again = run(page, server, diversified)
    assert len(first) == 16 and all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[0] != first[1]).any()


def test_names_and_stars_are_kept_in_the_file(page: Any, server: Server, stored: str) -> None:
    show(page, stored)
    panel = page.locator(".elrond-panel").first
    name = panel.get_by_label("Name of direction 1", exact=True)
    name.focus()
    page.keyboard.type("rounder")
    page.keyboard.press("Delete")
    page.keyboard.press("Tab")
    page.get_by_label("Strength of rounder").wait_for()
    panel.get_by_label("Star direction 2").press("Enter")
    panel.locator('[aria-label="Star direction 2"][aria-pressed="true"]').wait_for()
    kept = load_directions(server.output / "elrond" / "directions" / f"{stored}.safetensors")
    assert kept.names[1] == "rounder"
    assert kept.stars[:3] == (False, False, True)
    # Delete in a field deletes text, not the node.
    assert page.evaluate("() => window.app.graph.nodes.length") == 8


def test_the_values_live_in_the_workflow(page: Any, stored: str) -> None:
    """Saved and opened again, the sliders stand where they stood; the panel itself is no value."""
    show(page, stored)
    page.get_by_label("Use direction 0", exact=True).check()
    page.get_by_label("Strength of direction 0", exact=True).press("End")
    saved = page.evaluate("() => window.app.graph.serialize()")
    values = {node["type"]: node.get("widgets_values") for node in saved["nodes"]}
    assert values["ElrondApplyDirection"] == [0, 0, "token norms", 0, 1, "", "0: 1"]
    assert values["ElrondLoadDirections"] == [stored]
    page.evaluate("async (graph) => await window.app.loadGraphData(graph, true, true, 'again')", saved)
    page.get_by_label("Strength of direction 0", exact=True).wait_for()
    assert page.get_by_label("Use direction 0", exact=True).is_checked()
    assert page.get_by_label("Strength of direction 0", exact=True).input_value() == "1"


def test_a_file_that_appears_is_found(page: Any, server: Server, stored: str) -> None:
    show(page, stored)
    new = Directions(torch.eye(128)[:2, None], torch.ones(2), {}, Provenance("Demo", "a person", "person"), ("a", "b"))
    save_directions(new, server.output / "elrond" / "directions" / "dropped in.safetensors")
    panel = page.locator(".elrond-panel").first
    panel.get_by_label("Look at the files again").click()
    page.wait_for_function(
        "() => window.app.graph.getNodeById(3).widgets[0].options.values.includes('dropped in')", timeout=PATIENCE
    )
    page.evaluate(
        "() => { const w = window.app.graph.getNodeById(3).widgets[0]; w.value = 'dropped in'; w.callback(w.value); }"
    )
    page.get_by_label("Strength of b").wait_for()
    assert page.locator('.elrond-panel input[type="range"]').count() == 2


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_panel_can_be_read(server: Server, browser: Any, stored: str, theme: str) -> None:
    """Text has a contrast of at least 4.5 against what is behind it."""
    page = open_page(server, browser, theme)
    before = len(page.said)
    page.evaluate("async (graph) => await window.app.loadApiJson(graph, 'sweep')", swept(stored))
    # The sweep makes thumbnails.
    run(page, server, "5")
    show(page, stored)
    thumbnail = page.get_by_alt_text("What direction 0 does").first
    thumbnail.scroll_into_view_if_needed()
    page.wait_for_function("(image) => image.naturalWidth > 0", arg=thumbnail.element_handle())
    page.get_by_label("Use direction 0", exact=True).check()
    page.get_by_label("Ends of the slider, and start and end, of direction 0", exact=True).click()
    page.wait_for_timeout(500)
    shot(page, f"panel-{theme}")
    pairs = page.evaluate(
        """() => {
            const box = document.querySelector('.elrond-panel');
            const style = getComputedStyle(box);
            const input = getComputedStyle(box.querySelector('.elrond-head'));
            const body = window.LiteGraph.NODE_DEFAULT_BGCOLOR;
            const faint = getComputedStyle(box.querySelector('.elrond-score'));
            return [[style.color, body], [input.color, input.backgroundColor], [faint.color, body]];
        }"""
    )
    for text, ground in pairs:
        assert contrast(text, ground) >= 4.5, (theme, text, ground)
    assert page.said[before:] == []
    page.context.close()


def test_without_the_script_plain_widgets_remain(server: Server, browser: Any, stored: str) -> None:
    page = open_page(server, browser, without="panel.js")
    page.evaluate("async (graph) => await window.app.loadApiJson(graph, 'plain')", graph(stored))
    assert page.locator(".elrond-panel").count() == 0
    names = page.evaluate("() => window.app.graph.getNodeById(4).widgets.map((w) => w.name)")
    assert names == ["index", "strength", "unit", "start", "end", "concept", "strengths"]
    plain = queued(page, server)
    page.evaluate("() => { window.app.graph.getNodeById(4).widgets.at(-1).value = '0: 1'; }")
    assert np.abs(queued(page, server) - plain).max() > 20
    page.context.close()
