"""Help pages say what every input and output is for. README and docs name only what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "web" / "docs"
TEXTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        ROOT / "demo" / "README.md",
        ROOT / "example_workflows" / "README.md",
    )
)
# A name in backticks that starts so is a path in the repository.
FOLDERS = (
    "elrond_core/",
    "nodes/",
    "cluster/",
    "web/",
    "docs/",
    "demo/",
    "workflows/",
    "example_workflows/",
    "subgraphs/",
    "bench/",
    "tests/",
    "dev.py",
    ".ci/",
)
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
    assert {path.suffix for path in PAGES.iterdir() if path.is_file()} == {".md"}


def test_every_page_has_a_chinese_one(schemas: dict) -> None:
    """Where ComfyUI's page looks for it: in a folder of the node's name. It has the rows of the English one."""
    texts = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert {path.relative_to(PAGES).as_posix() for path in PAGES.glob("*/*")} == {f"{name}/zh.md" for name in schemas}
    for node_id, names in texts.items():
        english = (PAGES / f"{node_id}.md").read_text(encoding="utf-8")
        page = (PAGES / node_id / "zh.md").read_text(encoding="utf-8")
        lines = page.splitlines()
        assert lines[0] == f"# {names['display_name']}" and len(lines) <= LONGEST, node_id
        for heading, chinese, part in (("Inputs", "输入", "inputs"), ("Outputs", "输出", "outputs")):
            assert named(section(page, chinese)) == named(section(english, heading)), node_id
            shown = "".join(cells(section(page, chinese), 0))
            assert all(entry["name"] in shown for entry in names[part].values()), node_id
        for choice in re.findall(r"`([a-z ]+)`:", section(english, "Inputs")):
            assert f"`{choice}`" in section(page, "输入"), (node_id, choice)
        if "## When it complains" in english:
            rows = [cells(section(*of), 0) for of in ((english, "When it complains"), (page, "报错时"))]
            said = [[re.findall(r"\*(.+?)\*", cell) for cell in column] for column in rows]
            assert said[0] == said[1], node_id


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


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def cells(table: str, column: int) -> list[str]:
    """A column of a table, without its head."""
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")]
    return [row[column].strip() for row in rows[2:]]


def test_the_readme_is_short() -> None:
    assert len(text("README.md").splitlines()) <= 150


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", text(name))
    local = [target.split("#")[0] for target in targets if not re.match(r"https?://|#", target)]
    assert [target for target in local if not (ROOT / name).parent.joinpath(target).exists()] == []


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_named_exist(name: str) -> None:
    quoted = re.findall(r"`([^`\s]+)`", text(name))
    paths = [path for path in quoted if path.startswith(FOLDERS) and not re.search(r"[<*]", path)]
    # `demo/training` and `bench/results/collections` are made by scripts and not kept.
    made = ("demo/training", "bench/results/collections")
    assert [path for path in paths if not (ROOT / path).exists() and not path.startswith(made)] == []


@pytest.mark.parametrize("name", TEXTS)
def test_classes_are_in_the_files_named(name: str) -> None:
    for symbol, path in re.findall(r"`(\w+)` in\s+`([\w/]+\.py)`", text(name)):
        assert re.search(rf"^(class|def) {symbol}\b", text(path), re.MULTILINE), (symbol, path)


@pytest.mark.parametrize("name", TEXTS)
def test_commands_exist(name: str) -> None:
    """A module that is run is there, and knows its arguments."""
    for module, arguments in re.findall(r"python -m ([\w.]+)([^`\n#]*)", text(name)):
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        if module.split(".")[0] in ("bench", "demo", "workflows"):
            assert path.is_file(), module
            for word in re.findall(r"(?:^| )(?:--)?([a-z]\w+)", arguments):
                assert word in path.read_text(encoding="utf-8"), (module, word)
    for command in re.findall(r"python dev\.py (\w+)", text(name)):
        assert command in ("demo", "test")


@pytest.mark.parametrize("name", TEXTS)
def test_every_figure_can_be_repeated(name: str) -> None:
    assert not re.search(r"\bby hand\b", text(name))


def test_the_readme_lists_the_nodes(schemas: dict) -> None:
    listed = [node for cell in cells(section(text("README.md"), "The nodes"), 0) for node in cell.split(", ")]
    nodes = [node for node in listed if not node.startswith("**")]
    assert sorted(nodes) == sorted(schema.display_name.removesuffix(" (ELROND)") for schema in schemas.values())


def test_recipes_name_nodes_and_settings_of_the_host(host: ModuleType) -> None:
    import comfy.samplers
    from comfy_extras import nodes_model_advanced

    import nodes

    page = section(text("README.md"), "First run on your own model")
    table = page[page.index("| model | loaders |") :].partition("\n\n")[0]
    classes = {*nodes.NODE_CLASS_MAPPINGS, *nodes_model_advanced.NODE_CLASS_MAPPINGS}
    shown = nodes.NODE_DISPLAY_NAME_MAPPINGS.values()
    loaders = {name for cell in cells(table, 1) for name in re.findall(r"\*([^*]+)\*", cell)}
    assert len(loaders) > 4
    assert [
        name for name in loaders if name not in classes and not any(title.startswith(name) for title in shown)
    ] == []
    for cell in cells(table, 2):
        sampler, scheduler = re.findall(r"`(\w+)`", cell)
        assert sampler in comfy.samplers.KSampler.SAMPLERS and scheduler in comfy.samplers.KSampler.SCHEDULERS


def test_the_architecture_names_every_folder_and_stage() -> None:
    page = text("docs/architecture.md")
    folders = [path.name for path in (ROOT / "elrond_core").iterdir() if (path / "__init__.py").is_file()]
    assert [name for name in folders if f"elrond_core/{name}/" not in page] == []
