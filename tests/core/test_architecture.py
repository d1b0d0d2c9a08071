"""Imports of the core run one way, and never lead to the host."""

import ast
import sys
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "elrond_core"
# A module may import modules of its own layer and of those before it.
LAYERS = [
    {"", "errors", "seeding", "provenance", "gradients", "directions", "prompt"},
    {"storage"},
    {"collect", "decompose"},
    {"dimension", "measure", "steering"},
    {"plots", "sheets"},
]
LIBRARIES = {"filelock", "matplotlib", "numpy", "PIL", "safetensors", "scipy", "sklearn", "torch"}


def part(module: str) -> str:
    """The part of the core that a module's dotted name belongs to; its `__init__` belongs to none."""
    return module.split(".")[0]


def imported(path: Path, core: Path) -> set[str]:
    """What a file imports: dotted names, those of the core relative to it and with a leading dot."""
    package = list(path.relative_to(core).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
        elif isinstance(node, ast.ImportFrom):
            up = node.level - 1
            assert up <= len(package), f"{path.name} imports from outside of the core"
            base = [*package[: len(package) - up], *filter(None, (node.module or "").split("."))]
            if base:
                found.add("." + ".".join(base))
            else:
                # `from .. import x` imports a module of the core, or else a name of the core itself.
                names = {alias.name for alias in node.names}
                modules = {name for name in names if (core / name).is_dir() or (core / f"{name}.py").is_file()}
                found |= {f".{name}" for name in modules} | ({"."} if names - modules else set())
    return found


def faults(core: Path) -> list[str]:
    """What is wrong with the imports of a core."""
    rank = {name: place for place, names in enumerate(LAYERS) for name in names}
    lines = []
    for path in sorted(core.rglob("*.py")):
        own = part(path.relative_to(core).with_suffix("").as_posix().replace("/", "."))
        own = "" if own == "__init__" else own
        for name in sorted(imported(path, core)):
            here = f"{path.relative_to(core).as_posix()} imports {name}"
            if not name.startswith("."):
                if name.split(".")[0] not in LIBRARIES | sys.stdlib_module_names:
                    lines.append(here)
            elif rank[part(name[1:])] > rank[own]:
                lines.append(here)
    return lines


def test_every_part_has_a_layer() -> None:
    parts = {path.stem for path in CORE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__"} == set().union(*LAYERS) - {""}


def test_imports_run_one_way() -> None:
    assert faults(CORE) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("collect/pairs.py", "from ..steering.draws import draw_steps"),
        ("collect/pairs.py", "import comfy.sd"),
        ("measure/quality.py", "def late():\n    from folder_paths import base_path"),
        ("storage/format.py", "from ..decompose.moments import Moments"),
        ("gradients.py", "from . import plots"),
        ("gradients.py", "from .storage.tensors import read"),
        ("decompose/pca.py", "from .. import plots"),
    ],
)
def test_what_is_against_the_order_is_noticed(path: str, line: str, tmp_path: Path) -> None:
    for source in CORE.rglob("*.py"):
        copy = tmp_path / source.relative_to(CORE)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / path).write_text((tmp_path / path).read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    assert len(faults(tmp_path)) == 1
