"""The help pages: one a node, and each says what every input and output is for."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

PAGES = Path(__file__).parents[1] / "web" / "docs"
# About one screen of the help panel.
LONGEST = 50


@pytest.fixture(scope="module")
def schemas(pack: ModuleType) -> dict[str, object]:
    return {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in pack.NODES)}


def section(page: str, heading: str) -> str:
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, f"no section {heading!r}"
    return found[1]


def named(table: str) -> list[str]:
    """What a table's first column names, in order."""
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_every_node_has_a_page_and_every_page_a_node(schemas: dict) -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == set(schemas)
    assert {path.suffix for path in PAGES.iterdir()} == {".md"}


def test_pages_name_every_input_and_output(schemas: dict) -> None:
    for node_id, schema in schemas.items():
        page = (PAGES / f"{node_id}.md").read_text(encoding="utf-8")
        inputs, outputs = named(section(page, "Inputs")), named(section(page, "Outputs"))
        assert sorted(inputs) == sorted(entry.id for entry in schema.inputs), node_id
        assert outputs == [entry.display_name for entry in schema.outputs], node_id


def test_pages_are_headed_by_the_nodes_name_and_fit_a_screen(schemas: dict) -> None:
    for node_id, schema in schemas.items():
        lines = (PAGES / f"{node_id}.md").read_text(encoding="utf-8").splitlines()
        assert lines[0] == f"# {schema.display_name}"
        assert len(lines) <= LONGEST, node_id


def test_choices_are_those_of_the_node(schemas: dict) -> None:
    """A page explains each choice of the pack's own lists; samplers and files are the host's and the user's."""
    for node_id, schema in schemas.items():
        page = (PAGES / f"{node_id}.md").read_text(encoding="utf-8")
        for entry in schema.inputs:
            if entry.id in ("sampler_name", "scheduler") or node_id in ("ElrondLoadDirections", "ElrondLoadGradients"):
                continue
            for choice in getattr(entry, "options", None) or []:
                assert re.search(f"[`*]{choice}[`*]", section(page, "Inputs")), (node_id, choice)


def test_every_input_and_output_has_a_tooltip(schemas: dict) -> None:
    for node_id, schema in schemas.items():
        assert schema.description, node_id
        for entry in [*schema.inputs, *schema.outputs]:
            assert entry.tooltip, (node_id, entry)
