"""Files with hostile names and texts in the panel, in a real browser: shown as text, and nothing in them runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from demo.browser import NO_CHROMIUM, chromium, find_chromium, open_page
from demo.server import Server
from elrond_core.storage.format import load_directions, save_directions

pytest.importorskip("playwright.sync_api", reason="The browser tests need the playwright package.")

SHIPPED = Path(__file__).parents[2] / "demo" / "directions" / "demo person.safetensors"
# What each would do if it ran.
RUN = "window.hostile = (window.hostile || 0) + 1"
NAMES = [
    f"<img src=x onerror='{RUN}'>",
    f"<script>{RUN}</script>",
    f'"><svg onload="{RUN}">',
    f"javascript:{RUN}",
    f"{{{{constructor.constructor('{RUN}')()}}}} ${{{RUN}}}",
    "\u202egpj.exe \u2066\u05d0\u05d1 \u200f",
    "\u0627\u0644\u0643\u0644\u0628 e\u0301" + "\u0301" * 200,
    "64 KB " + "x" * 65536,
    "<b>" * 20000,
]
FILE = "it's 50% {no} & #1"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if find_chromium() is None:
        pytest.skip(NO_CHROMIUM)
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def page(server: Server, browser: Any) -> Iterator[Any]:
    """The panel of Load Directions and of Apply Direction, with a file whose every text is hostile."""
    shipped = load_directions(SHIPPED)
    count = len(NAMES)
    few = replace(
        shipped,
        vectors=shipped.vectors[:1].repeat(count, 1, 1),
        scores=shipped.scores[:1].repeat(count),
        names=tuple(NAMES),
        stars=(False,) * count,
        natural_std=(),
        densities=(),
        score_name=NAMES[0],
        method={NAMES[0]: NAMES[1]},
        provenance=shipped.provenance.with_(concept=NAMES[2], prompt=NAMES[0], tokens=(NAMES[1],), rows=()),
    )
    save_directions(few, server.output / "elrond" / "directions" / f"{FILE}.safetensors")
    found = open_page(server, browser)
    wires = {"conditioning": ["2", 0], "directions": ["3", 0]}
    steering = {"index": 0, "strength": 0.0, "unit": "token norms", "start": 0.0, "end": 1.0, "concept": ""}
    graph = {
        "1": {"class_type": "ElrondLoadDemoModel", "inputs": {"name": "student"}},
        "2": {
            "class_type": "ElrondEncodeConcept",
            "inputs": {"clip": ["1", 1], "prompt": "a [person]", "concept": "", "occurrence": 1},
        },
        "3": {"class_type": "ElrondLoadDirections", "inputs": {"name": FILE}},
        "4": {"class_type": "ElrondApplyDirection", "inputs": {**wires, **steering, "strengths": ""}},
    }
    found.evaluate("async (graph) => await window.app.loadApiJson(graph, 'hostile')", graph)
    found.evaluate(
        """() => {
            const { app } = window;
            app.graph.getNodeById(3).pos = [0, 0];
            app.graph.getNodeById(4).pos = [600, 0];
            for (const id of [3, 4]) app.graph.getNodeById(id).setSize([460, app.graph.getNodeById(id).size[1]]);
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [120, 120];
            app.canvas.setDirty(true, true);
        }"""
    )
    for index in (0, 1):
        head = found.locator(".elrond-head").nth(index)
        head.wait_for()
        if head.get_attribute("aria-expanded") != "true":
            head.click()
    found.wait_for_function(f"() => document.querySelectorAll('.elrond-panel li').length === {2 * count}")
    yield found
    found.context.close()


def test_every_text_is_shown_as_it_is_in_the_file(page: Any) -> None:
    for panel in range(2):
        shown = page.evaluate(
            """(panel) => [...document.querySelectorAll('.elrond-panel')[panel].querySelectorAll('li')]
                .map((row) => row.querySelector('input[type="text"]').value)""",
            panel,
        )
        assert shown == NAMES
        head = page.locator(".elrond-head").nth(panel)
        assert head.text_content().endswith(f"{len(NAMES)} directions of “{NAMES[2]}”")
    titles = page.evaluate("() => [...document.querySelectorAll('.elrond-score')].map((score) => score.title)")
    assert len(titles) == 2 * len(NAMES) and all(title.startswith(f"{NAMES[0]} ") for title in titles)


def test_nothing_in_a_name_becomes_an_element_or_runs(page: Any) -> None:
    """Also after a slider is moved, a direction is starred, and the panel draws itself again."""
    page.evaluate(
        """() => {
            const apply = document.querySelector('.elrond-panel [type="range"]').closest('.elrond-panel');
            for (const box of apply.querySelectorAll('li input[type="checkbox"]')) box.click();
            apply.querySelector('.elrond-star').click();
        }"""
    )
    page.locator('.elrond-star[aria-pressed="true"]').nth(1).wait_for()
    page.wait_for_timeout(500)
    tags = page.evaluate("() => [...document.querySelectorAll('.elrond-panel li *')].map((e) => e.localName)")
    assert set(tags) == {"img", "div", "button", "input", "span", "datalist"}
    sources = page.evaluate(
        "() => [...document.querySelectorAll('.elrond-panel img')].map((e) => e.getAttribute('src'))"
    )
    assert all(source is None or "/elrond/thumbnail?" in source for source in sources)
    assert page.evaluate("() => window.hostile") is None
    assert [text for text in page.said if "elrond" in text.lower() or "hostile" in text] == []


def test_long_names_do_not_push_the_panel_out_of_its_node(page: Any) -> None:
    boxes = page.evaluate(
        """() => [...document.querySelectorAll('.elrond-panel')].map((panel) => {
            const outer = panel.getBoundingClientRect();
            const inner = [...panel.querySelectorAll('*')].map((e) => e.getBoundingClientRect());
            const rows = [...panel.querySelectorAll('li')].map((e) => e.getBoundingClientRect().height);
            return [outer.right, Math.max(...inner.map((box) => box.right)), Math.max(...rows)];
        })"""
    )
    for right, furthest, tallest in boxes:
        assert furthest <= right + 1 and tallest < 100


def test_a_file_with_an_odd_name_is_changed_by_its_panel(page: Any, server: Server) -> None:
    field = page.locator(".elrond-panel").first.get_by_label("Name of direction 0")
    field.fill("<i>renamed</i>")
    field.press("Tab")
    page.wait_for_function(
        """() => [...document.querySelectorAll('.elrond-panel [aria-label="Name of direction 0"]')]
            .every((field) => field.value === '<i>renamed</i>')"""
    )
    kept = load_directions(server.output / "elrond" / "directions" / f"{FILE}.safetensors")
    assert kept.names == ("<i>renamed</i>", *NAMES[1:])


def test_a_hostile_file_name_is_refused_in_a_sentence_of_text(page: Any) -> None:
    """A graph from somebody else may name any file."""
    page.evaluate(
        """(name) => {
            const widget = window.app.graph.getNodeById(3).widgets[0];
            widget.value = name;
            widget.callback(name);
        }""",
        NAMES[0] + "y" * 5000,
    )
    status = page.locator('.elrond-panel [role="status"]', has_text="cannot be a file name here").first
    status.wait_for()
    assert len(status.text_content()) < 300 and status.locator("*").count() == 0
    assert page.evaluate("() => window.hostile") is None
