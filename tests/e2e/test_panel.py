"""What the panel keeps and copies: first look, App mode, reload, copy, undo, parts of the sampling, batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from demo.browser import PATIENCE, open_page, post
from demo.server import Server
from elrond_core.storage.format import load_directions, save_directions
from tests.e2e.pages import ROOT, graph, queued, run, shot, show, strengths

WORDS = "demo person words"
NAMES = load_directions(ROOT / "demo" / "directions" / f"{WORDS}.safetensors").names
LOAD_API = "async (graph) => await window.app.loadApiJson(graph, 'graph')"
OPEN = "async (graph) => await window.app.loadGraphData(graph, true, true, 'again')"
SERIALIZE = "() => window.app.graph.serialize()"


def head(page: Any, node: int) -> Any:
    """The button that unfolds the panel of a node."""
    page.wait_for_function("(id) => window.app.graph.getNodeById(id)?.elrondPanel?.file", arg=node)
    page.evaluate("(id) => { window.app.graph.getNodeById(id).elrondPanel.root.id = `panel-${id}`; }", node)
    return page.locator(f"#panel-{node} .elrond-head")


def expanded(page: Any, node: int) -> bool:
    return head(page, node).get_attribute("aria-expanded") == "true"


def set_field(page: Any, label: str, value: str) -> None:
    field = page.get_by_label(label, exact=True)
    field.fill(value)
    field.press("Tab")


def unfold_row(page: Any, title: str) -> None:
    page.get_by_label(f"Ends of the slider, and start and end, of {title}", exact=True).click()


def test_a_first_look_shows_names_and_pictures(page: Any) -> None:
    """A new node is open and shows what there is; a node of a saved graph stays as it was saved."""
    page.evaluate(LOAD_API, graph(WORDS))
    assert expanded(page, 4) and expanded(page, 3)
    panel = page.locator("#panel-4")
    picture = panel.get_by_alt_text(f"What {NAMES[0]} does")
    page.wait_for_function("(image) => image.naturalWidth > 0", arg=picture.element_handle())
    assert panel.get_by_label("Name of direction 1", exact=True).input_value() == NAMES[1]
    assert panel.locator(".elrond-columns").inner_text().split("\n") == [
        "direction",
        "latent variance per unit of change",
    ]
    head(page, 4).evaluate("(head) => head.click()")
    saved = page.evaluate(SERIALIZE)
    page.evaluate(OPEN, saved)
    assert not expanded(page, 4) and expanded(page, 3)
    assert f"{NAMES[0]}, {NAMES[1]}" in head(page, 4).text_content()
    for node in saved["nodes"]:
        node.get("properties", {}).pop("elrond", None)
    page.evaluate(OPEN, saved)
    assert not expanded(page, 4) and not expanded(page, 3)


def test_names_may_have_joiners(page: Any, server: Server, stored: str) -> None:
    show(page, stored)
    field = page.locator(".elrond-panel").first.get_by_label("Name of direction 3")
    field.fill("👩‍🚀 می‌خواهم")
    field.press("Tab")
    page.get_by_label("Strength of 👩‍🚀 می‌خواهم", exact=True).wait_for()
    kept = load_directions(server.output / "elrond" / "directions" / f"{stored}.safetensors")
    assert kept.names[3] == "👩‍🚀 می‌خواهم"


@pytest.fixture
def app_mode(server: Server, browser: Any) -> Iterator[Any]:
    """A page whose frontend has App mode."""
    page = open_page(server, browser)
    # An introduction that the frontend shows once.
    page.add_locator_handler(page.get_by_role("button", name="Skip", exact=True), lambda button: button.click())
    labels = page.evaluate("() => window.app.extensionManager.command.commands.map((each) => each.label)")
    if "Toggle App Mode" not in [label if isinstance(label, str) else "" for label in labels]:
        page.context.close()
        pytest.skip("This frontend has no App mode: ELROND_FRONTEND names a newer one.")
    yield page
    page.context.close()


TOGGLE_APP = "() => window.app.extensionManager.command.execute('Comfy.ToggleLinear')"


def test_sliders_in_app_mode(app_mode: Any, server: Server, stored: str) -> None:
    """The list of directions is an input that an app may show. What it sets is what runs, here and in the graph."""
    page = app_mode
    show(page, stored)
    plain = queued(page, server)
    saved = page.evaluate(SERIALIZE)
    saved["extra"]["linearData"] = {"inputs": [[4, "elrond_panel"], [6, "seed"]], "outputs": [8]}
    page.evaluate(OPEN, saved)
    head(page, 4)
    page.evaluate(TOGGLE_APP)
    item = page.get_by_test_id("app-mode-widget-item").filter(has=page.locator(".elrond-panel"))
    item.wait_for()
    assert item.get_by_test_id("builder-widget-label").inner_text().strip() == "Directions"
    item.get_by_label("Use direction 0", exact=True).check()
    slider = item.get_by_label("Strength of direction 0", exact=True)
    slider.press("End")
    assert strengths(page) == "0: 1"
    box, outer = (each.bounding_box() for each in (item.get_by_label("Look at the files again"), item))
    assert box["x"] + box["width"] <= outer["x"] + outer["width"] + 1
    shot(page, "app")
    assert np.abs(queued(page, server) - plain).max() > 20
    # The app is kept in the workflow, and its inputs are found again.
    again = page.evaluate(SERIALIZE)
    page.evaluate(OPEN, again)
    item.get_by_label("Use direction 0", exact=True).wait_for()
    assert item.get_by_label("Strength of direction 0", exact=True).input_value() == "1"
    page.evaluate(TOGGLE_APP)
    assert expanded(page, 4)
    assert page.locator("#panel-4").get_by_label("Strength of direction 0", exact=True).input_value() == "1"


def test_sliders_stand_where_they_stood_after_a_reload(server: Server, browser: Any, stored: str) -> None:
    page = open_page(server, browser, settings={"Comfy.Workflow.Persist": True})
    try:
        show(page, stored)
        page.get_by_label("Use direction 1", exact=True).check()
        page.get_by_label("Strength of direction 1", exact=True).press("End")
        unfold_row(page, "direction 1")
        set_field(page, "Highest strength of direction 1", "2")
        assert strengths(page) == "1: 1"
        # The frontend saves what has changed a moment later.
        page.wait_for_timeout(3000)
        page.reload()
        page.wait_for_function("() => window.app?.vueAppReady && window.app.graph?.getNodeById(4)?.elrondPanel?.file")
        assert strengths(page) == "1: 1"
        assert page.get_by_label("Use direction 1", exact=True).is_checked()
        assert page.get_by_label("Exact strength for direction 1", exact=True).input_value() == "1"
        assert page.get_by_label("Strength of direction 1", exact=True).get_attribute("max") == "2"
    finally:
        page.context.close()
        post(server, "/settings", {"Comfy.Workflow.Persist": False})


def test_a_copy_has_sliders_of_its_own(page: Any, stored: str) -> None:
    show(page, stored)
    page.get_by_label("Use direction 0", exact=True).check()
    page.get_by_label("Strength of direction 0", exact=True).press("End")
    unfold_row(page, "direction 0")
    set_field(page, "Highest strength of direction 0", "2")
    page.evaluate(
        """() => {
            const { canvas } = window.app;
            canvas.ds.offset = [120, 320];
            canvas.setDirty(true, true);
            document.activeElement.blur();
        }"""
    )
    page.wait_for_timeout(300)
    page.mouse.click(500 + 120 + 200, 320 - 15)
    page.keyboard.press("Control+c")
    page.keyboard.press("Control+Shift+v")
    page.wait_for_function(
        "() => window.app.graph.nodes.filter((n) => n.comfyClass === 'ElrondApplyDirection').length > 1"
    )
    copy = page.evaluate(
        "() => window.app.graph.nodes.find((n) => n.comfyClass === 'ElrondApplyDirection' && n.id != 4).id"
    )
    head(page, copy)
    page.evaluate("(id) => { window.app.graph.getNodeById(id).pos = [1000, 0]; }", copy)
    panel = page.locator(f"#panel-{copy}")
    slider = panel.get_by_label("Strength of direction 0", exact=True)
    slider.wait_for()
    assert slider.get_attribute("max") == "2"
    assert panel.get_by_label("Exact strength for direction 0", exact=True).input_value() == "1"
    slider.evaluate("(slider) => { slider.value = -1; slider.dispatchEvent(new Event('input')); }")
    value = "(id) => window.app.graph.getNodeById(id).widgets.find((w) => w.name === 'strengths').value"
    assert (page.evaluate(value, copy), page.evaluate(value, 4)) == ("0: -1", "0: 1")
    kept = "window.app.graph.getNodeById(4).properties.elrond"
    assert page.evaluate(f"(id) => window.app.graph.getNodeById(id).properties.elrond !== {kept}", copy)


def test_undo_and_redo_move_the_slider(page: Any, stored: str) -> None:
    """Step by step, with the panel as it was."""
    from playwright.sync_api import expect

    show(page, stored)
    # What is done together is one step to undo.
    pause = 700
    page.wait_for_timeout(pause)
    tracker = "window.app.extensionManager.workflow.activeWorkflow.changeTracker"
    # The layout of `show` is a step of its own.
    page.evaluate(
        f"() => {{ const tracker = {tracker}; (tracker.captureCanvasState ?? tracker.checkState).call(tracker); }}"
    )
    before = page.evaluate(f"() => {tracker}.undoQueue.length")
    page.get_by_label("Use direction 0", exact=True).check()
    page.wait_for_function(f"(before) => {tracker}.undoQueue.length === before + 1", arg=before)
    page.get_by_label("Strength of direction 0", exact=True).press("End")
    page.wait_for_function(f"(before) => {tracker}.undoQueue.length === before + 2", arg=before)
    assert strengths(page) == "0: 1"
    for command, wanted in (("Undo", "0: 0"), ("Undo", ""), ("Redo", "0: 0"), ("Redo", "0: 1")):
        # What the keys do; the host drops keys that come while it is still loading the step before.
        page.evaluate("(id) => window.app.extensionManager.command.execute(id)", f"Comfy.{command}")
        value = "window.app.graph.getNodeById(4)?.widgets.find((widget) => widget.name === 'strengths').value"
        page.wait_for_function(f"(wanted) => {value} === wanted", arg=wanted)
        assert expanded(page, 4)
        panel = page.locator("#panel-4")
        exact = panel.get_by_label("Exact strength for direction 0", exact=True)
        expect(exact).to_have_value(wanted.partition(": ")[2] or "0")
        assert panel.get_by_label("Use direction 0", exact=True).is_checked() == bool(wanted)


def test_a_direction_acts_in_its_own_part_of_the_sampling(page: Any, server: Server, stored: str) -> None:
    show(page, stored)
    page.get_by_label("Use direction 0", exact=True).check()
    page.get_by_label("Strength of direction 0", exact=True).press("End")
    whole = queued(page, server)
    unfold_row(page, "direction 0")
    set_field(page, "Start of direction 0", "0.5")
    assert strengths(page) == "0: 1 @ 0.5-1"
    late = queued(page, server)
    assert np.abs(late - whole).max() > 20
    # The slider keeps it, also while it is off.
    page.get_by_label("Strength of direction 0", exact=True).press("ArrowLeft")
    assert strengths(page) == "0: 0.99 @ 0.5-1"
    page.get_by_label("Use direction 0", exact=True).uncheck()
    assert strengths(page) == ""
    set_field(page, "End of direction 0", "0.75")
    page.get_by_label("Use direction 0", exact=True).check()
    assert strengths(page) == "0: 0.99 @ 0.5-0.75"
    set_field(page, "Start of direction 0", "0.8")
    assert page.get_by_text("A direction starts before it ends, between 0 and 1.").is_visible()
    assert strengths(page) == "0: 0.99 @ 0.5-0.75"
    # Emptied, it follows the node's start and end again.
    set_field(page, "Start of direction 0", "")
    page.get_by_label("Strength of direction 0", exact=True).press("End")
    assert strengths(page) == "0: 1"
    page.evaluate("() => { window.app.graph.getNodeById(4).widgets.find((w) => w.name === 'start').value = 0.5; }")
    page.wait_for_function(
        """() => [...document.querySelectorAll('[aria-label="Start of direction 0"]')]
            .some((field) => field.placeholder === '0.5')"""
    )
    assert (queued(page, server) == late).all()


def test_randomise_keeps_to_a_total(page: Any, server: Server, stored: str) -> None:
    """The length of the sum of the directions, which are not orthogonal."""
    vectors = load_directions(server.output / "elrond" / "directions" / f"{stored}.safetensors").vectors.flatten(1)
    show(page, stored)
    for index in (0, 1, 2):
        page.get_by_label(f"Use direction {index}", exact=True).check()
    set_field(page, "Total strength that Randomise keeps to", "0.6")
    seen = {strengths(page)}
    for _ in range(3):
        page.get_by_role("button", name="Randomise").click()
        for _ in range(PATIENCE // 100):
            if strengths(page) not in seen:
                break
            page.wait_for_timeout(100)
        text = strengths(page)
        assert text not in seen
        seen.add(text)
        parts = {int(part.split(": ")[0]): float(part.split(": ")[1]) for part in text.split(", ")}
        assert set(parts) == {0, 1, 2}
        assert float(sum(value * vectors[index] for index, value in parts.items()).norm()) == pytest.approx(
            0.6, abs=1e-3
        )
    set_field(page, "Total strength that Randomise keeps to", "")


def diversified(count: int) -> dict[str, Any]:
    """A batch whose images have steps of their own, and beside it the same batch with the same step for all."""
    nodes = graph(WORDS)
    nodes["5"]["inputs"]["batch_size"] = count
    apply, sampler, decode, preview = (nodes[key] for key in "4678")
    for key, node in (("14", apply), ("16", sampler), ("17", decode), ("18", preview)):
        nodes[key] = {**node, "inputs": dict(node["inputs"])}
    nodes["16"]["inputs"]["positive"] = ["14", 0]
    nodes["17"]["inputs"]["samples"] = ["16", 0]
    nodes["18"]["inputs"]["images"] = ["17", 0]
    drawing = {"count": count, "seed": 3, "lowest": 8.0, "highest": 9.0, "unit": "absolute", "mix": 2, "leading": 3}
    drawing |= {"both_signs": True, "start": 0.0, "end": 0.7, "concept": "", "how": "random", "weights": "equal"}
    wires = {"conditioning": ["2", 0], "directions": ["3", 0]}
    nodes["4"] = {"class_type": "ElrondDiversify", "inputs": {**wires, **drawing}, "_meta": {"title": "Diversify"}}
    return nodes


def test_what_an_image_got_is_copied_to_the_sliders(page: Any, server: Server) -> None:
    page.evaluate(LOAD_API, diversified(4))
    page.wait_for_function("() => window.app.graph.getNodeById(14)?.elrondPanel?.file")
    page.evaluate(
        """() => {
            for (const id of [6, 16]) {
                const { widgets } = window.app.graph.getNodeById(id);
                widgets.find((widget) => widget.name === 'control_after_generate').value = 'fixed';
            }
        }"""
    )
    assert page.get_by_role("button", name="What each image got").count() == 0
    batch = run(page, server, "8")
    page.get_by_role("button", name="What each image got").evaluate("(button) => button.click()")
    rows = page.get_by_label("Images", exact=True).locator("li")
    assert rows.count() == 4
    page.get_by_label("Copy the strengths of image 2 to the sliders").evaluate("(button) => button.click()")
    values = page.evaluate(
        "() => Object.fromEntries(window.app.graph.getNodeById(14).widgets.map((w) => [w.name, w.value]))"
    )
    assert (values["unit"], values["start"], values["end"]) == ("absolute", 0, 0.7)
    assert (
        page.evaluate("() => window.app.graph.getNodeById(14).elrondPanel.root.querySelectorAll('li :checked').length")
        == 2
    )
    again = run(page, server, "18")
    assert np.abs(again[2] - batch[2]).max() <= 2
    assert np.abs(again[1] - batch[1]).max() > 20

    # Without such a node, one is made between the same wires.
    page.get_by_label("Where the strengths are copied to").select_option("new")
    page.get_by_label("Copy the strengths of image 3 to the sliders").evaluate("(button) => button.click()")
    made = page.evaluate(
        """async () => {
            const node = window.app.graph.nodes.find((n) => n.comfyClass === 'ElrondApplyDirection' && n.id != 14);
            const sampler = window.app.graph.getNodeById(16);
            node.connect(0, sampler, sampler.inputs.findIndex((each) => each.name === 'positive'));
            return (await window.app.graphToPrompt()).output[node.id].inputs;
        }"""
    )
    assert (made["conditioning"], made["directions"]) == (["2", 0], ["3", 0])
    assert (made["unit"], made["end"]) == ("absolute", 0.7)
    assert np.abs(run(page, server, "18")[3] - batch[3]).max() <= 2


def test_what_an_image_got_is_known_in_a_subgraph(page: Any, server: Server) -> None:
    page.evaluate(LOAD_API, diversified(2))
    page.evaluate(
        """() => {
            const node = window.app.graph.getNodeById(4);
            window.wrapped = window.app.graph.convertToSubgraph(new Set([node])).node;
        }"""
    )
    run(page, server, "8")
    inside = "window.wrapped.subgraph.nodes.find((each) => each.elrondBatch)"
    page.wait_for_function(f"() => {inside}.elrondBatch.got?.strengths.length === 2")
    page.evaluate(f"() => {{ {inside}.elrondBatch.toggle(); {inside}.elrondBatch.copy(1); }}")
    copied = page.evaluate("() => window.app.graph.getNodeById(14).widgets.find((w) => w.name === 'strengths').value")
    assert copied == page.evaluate(f"() => {inside}.elrondBatch.got.strengths[1]")


FAR = "How far the images go: how, lowest and highest"
WHEN = "In which part of the sampling it acts: start and end"


def choose(page: Any, label: str, choice: str) -> None:
    page.get_by_label(label, exact=True).first.select_option(choice)


def wait_for(page: Any, node: int, **values: Any) -> None:
    page.wait_for_function(
        """([id, values]) => Object.entries(values).every(([name, value]) =>
            window.app.graph.getNodeById(id).widgets.find((widget) => widget.name === name).value === value)""",
        arg=[node, values],
    )


def batch_of(file: str, count: int) -> dict[str, Any]:
    """A diversified batch with no other node that steers."""
    nodes = diversified(count)
    nodes["3"]["inputs"]["name"] = file
    return {key: node for key, node in nodes.items() if key not in ("14", "16", "17", "18")}


def test_presets_write_the_numbers_and_follow_them(page: Any, server: Server, stored: str) -> None:
    page.evaluate(LOAD_API, batch_of(WORDS, 3))
    chosen = page.get_by_label(FAR, exact=True)
    chosen.wait_for()
    assert chosen.input_value() == "own numbers"
    choose(page, FAR, "wild")
    wait_for(page, 4, how="natural", lowest=0.7, highest=0.7, total=0)
    choose(page, WHEN, "keep the composition: late steps")
    wait_for(page, 4, start=0.3, end=1)
    late = run(page, server, "8")
    choose(page, WHEN, "new composition: first steps")
    wait_for(page, 4, start=0, end=0.3)
    first = run(page, server, "8")
    assert np.abs(first[0] - late[0]).max() > 20 and np.abs(first[0] - first[1]).max() > 20
    # They are kept as numbers, and read from them again.
    page.evaluate(OPEN, page.evaluate(SERIALIZE))
    page.wait_for_function("(label) => document.querySelector(`[aria-label='${label}']`)?.value === 'wild'", arg=FAR)
    assert page.get_by_label(WHEN, exact=True).first.input_value() == "new composition: first steps"
    page.evaluate("() => { window.app.graph.getNodeById(4).widgets.find((w) => w.name === 'lowest').value = 0.6; }")
    page.wait_for_function(
        "(label) => document.querySelector(`[aria-label='${label}']`).value === 'own numbers'", arg=FAR
    )


def test_presets_spread_where_the_models_variety_is_unknown(page: Any, server: Server) -> None:
    shipped = load_directions(ROOT / "demo" / "directions" / "demo person.safetensors")
    path = server.output / "elrond" / "directions" / "without variety.safetensors"
    save_directions(replace(shipped, natural_std=()), path)
    page.evaluate(LOAD_API, batch_of("without variety", 2))
    choose(page, FAR, "as varied as the base model")
    wait_for(page, 4, how="spread", lowest=0.3, highest=0.7, unit="auto")
    page.get_by_text("How far the model varies along these directions is not known").wait_for()
    images = run(page, server, "8")
    assert np.abs(images[0] - images[1]).max() > 20


def test_a_part_of_the_sampling_is_chosen_for_all_sliders(page: Any, stored: str) -> None:
    show(page, stored)
    choose(page, WHEN, "keep the composition: late steps")
    wait_for(page, 4, start=0.3, end=1)
    page.evaluate(
        """() => {
            const nodes = new Set([window.app.graph.getNodeById(4)]);
            window.outer = window.app.graph.convertToSubgraph(nodes).node;
        }"""
    )
    inside = "window.outer.subgraph.nodes[0]"
    page.wait_for_function(f"() => {inside}.elrondPanel.when.select.value === 'keep the composition: late steps'")
    page.evaluate(
        f"""() => {{
            const input = {inside}.inputs.find((each) => each.widget?.name === 'start');
            window.outer.subgraph.addInput('start', input.type).connect(input, {inside});
            {inside}.elrondPanel.when.choose('throughout');
        }}"""
    )
    page.wait_for_function("() => window.outer.widgets.find((widget) => widget.name === 'start').value === 0")


def test_sliders_of_calibrated_directions_end_where_they_are_usable(page: Any, server: Server) -> None:
    """In token norms at the interval, else at 1; with a mark at every stop."""
    shipped = load_directions(ROOT / "demo" / "directions" / "demo person.safetensors")
    stops = (-0.8, -0.3, 0.0, 0.5, 1.4)
    none = len(shipped) - 1
    names = ("",) * len(shipped)
    calibrated = replace(
        shipped, names=names, intervals=((-0.8, 1.4), *none * [(0.0, 0.0)]), stops=(stops, *none * [()])
    )
    save_directions(calibrated, server.output / "elrond" / "directions" / "calibrated.safetensors")
    show(page, "calibrated")
    slider = page.get_by_label("Strength of direction 0", exact=True)
    assert [slider.get_attribute(end) for end in ("min", "max")] == ["-0.8", "1.4"]
    other = page.get_by_label("Strength of direction 1", exact=True)
    assert [other.get_attribute(end) for end in ("min", "max")] == ["-1", "1"]
    marks = "(slider) => [...slider.list.options].map((each) => Number(each.value))"
    assert (slider.evaluate(marks), other.evaluate(marks)) == (list(stops), [])
    page.evaluate("() => { window.app.graph.getNodeById(4).widgets.find((w) => w.name === 'unit').value = 'auto'; }")
    page.wait_for_function("() => document.querySelector('[aria-label=\"Strength of direction 0\"]').max === '1'")
    assert slider.evaluate(marks) == [-1, -0.5, 0, 0.5, 1]
    unfold_row(page, "direction 0")
    set_field(page, "Highest strength of direction 0", "3")
    assert slider.get_attribute("max") == "3"


def test_shipped_directions_have_pictures() -> None:
    for path in (ROOT / "demo" / "directions").glob("*.safetensors"):
        shipped = load_directions(path)
        for index in range(len(shipped)):
            assert (ROOT / "demo" / "thumbnails" / f"{shipped.digest(index)}.png").is_file(), (path.name, index)
