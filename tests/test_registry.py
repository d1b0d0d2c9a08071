"""What the registry gets: the project's description, its pictures, and a set of files that works by itself."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from PIL import Image

from elrond_core import __version__

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
# What a person with the pack does in ComfyUI, in a process that sees the shipped files only.
TRY = """
import asyncio, importlib.util, json, sys
from pathlib import Path

pack, host = map(Path, sys.argv[1:])
sys.path.insert(0, str(host))
import comfy.options

comfy.options.enable_args_parsing(False)
import comfy.cli_args

comfy.cli_args.args.cpu = True
import folder_paths

folder_paths.set_output_directory(str(pack.parent / "output"))
spec = importlib.util.spec_from_file_location("pack", pack / "__init__.py", submodule_search_locations=[str(pack)])
sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch

import execution
import nodes
from comfy_extras import nodes_preview_any

ours = {node.GET_SCHEMA().node_id: node for node in module.NODES}
nodes.NODE_CLASS_MAPPINGS.update(ours | nodes_preview_any.NODE_CLASS_MAPPINGS)
for path in sorted((pack / "workflows" / "api").glob("*.json")):
    valid, error, _, errors = asyncio.run(execution.validate_prompt("1", json.loads(path.read_text()), None))
    assert valid and not errors, (path.name, error, errors)
    print("valid:", path.stem)
with torch.inference_mode():
    model, clip, vae = ours["ElrondLoadDemoModel"].execute("student").args
    prompt = ours["ElrondEncodeConcept"].execute(clip, "a [person]", "", 1).args[0]
    directions = ours["ElrondLoadDirections"].execute("demo person words").args[0]
    sweep = ours["ElrondDirectionSweep"].execute(
        model, prompt, directions, vae, "0", -0.8, 0.8, 2, "token norms", 64, 64, 1, 1, 1.0, "euler", "simple", 1, 64,
        "", False,
    )
    print("images:", tuple(sweep.args[1].shape))
"""


def value(key: str) -> str:
    found = re.search(rf'^{re.escape(key)} = "(.*)"$', TEXT, re.MULTILINE)
    assert found, key
    return found[1]


def test_the_name_follows_the_registrys_rules() -> None:
    """No "comfyui" in it; letters, digits and single - _ . after a letter; below 100 characters."""
    name = value("name")
    assert re.fullmatch(r"[a-z](?:[-_.]?[a-z0-9])*", name) and len(name) < 100 and "comfy" not in name
    assert value("version") == __version__ and re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_pictures_are_there_and_as_large_as_the_registry_takes() -> None:
    for key in ("Icon", "Banner"):
        address = value(key)
        assert address.startswith(value("Repository").replace("github.com", "raw.githubusercontent.com") + "/main/")
        path = ROOT / address.partition("/main/")[2]
        assert path.stat().st_size < 100_000
        with Image.open(path) as picture:
            if key == "Icon":
                assert picture.width == picture.height <= 400
            else:
                assert picture.width * 9 == picture.height * 21


def test_the_oldest_host_is_the_one_that_is_tested() -> None:
    from dev import HOST_VERSION

    assert value("requires-comfyui") == f">={HOST_VERSION}"


def test_requirements_are_those_of_the_project() -> None:
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", TEXT, re.MULTILINE | re.DOTALL)
    assert listed
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert sorted(re.findall(r'"(.*?)"', listed[1])) == sorted(required)


def test_workflows_of_the_repository_are_sound() -> None:
    """Each is YAML with its triggers, and names steps whose actions have a version."""
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        workflow: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        # YAML reads the key `on` as true.
        assert {"name", True, "permissions", "jobs"} <= set(workflow), path.name
        for job in workflow["jobs"].values():
            for step in job["steps"]:
                assert ("run" in step) != ("uses" in step), path.name
                assert "@v" in step.get("uses", "@v"), path.name


def test_nodes_are_found_by_what_people_call_the_trouble(pack: ModuleType) -> None:
    """Where the host's schema takes other words for its search; older hosts get none."""
    from comfy_api.latest import io

    known = "search_aliases" in {field.name for field in dataclasses.fields(io.Schema)}
    words = {node.GET_SCHEMA().node_id: getattr(node.GET_SCHEMA(), "search_aliases", None) for node in pack.NODES}
    wanted = {
        "ElrondDiversify": {"diversity", "variation", "same face"},
        "ElrondApplyDirection": {"slider"},
        "ElrondMeasureDiversity": {"diversity"},
    }
    for node_id, some in wanted.items():
        assert some <= set(words[node_id]) if known else not words[node_id]


def shipped() -> list[str]:
    """Paths of the files that the registry gets: git's, without those that `.comfyignore` names."""
    pathspec = pytest.importorskip("pathspec", reason="What is published is tested with the pathspec package.")
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(git, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("What is published is tested in a git clone only.")
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".comfyignore").read_text().splitlines())
    return [path for path in listed if path and (ROOT / path).is_file() and not ignored.match_file(path)]


def test_what_is_published_is_small_and_has_no_tests() -> None:
    paths = shipped()
    folders = {path.partition("/")[0] for path in paths}
    assert {"nodes", "elrond_core", "web", "workflows", "demo", "locales", "__init__.py"} <= folders
    assert not folders & {"tests", "bench", ".ci", ".github", "dev.py"}
    assert not [path for path in paths if "train" in path and path.startswith("demo/")]
    assert sum((ROOT / path).stat().st_size for path in paths) < 40e6


def test_what_is_published_works_by_itself(tmp_path: Path) -> None:
    from demo import host

    for path in shipped():
        target = tmp_path / "elrond" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, target)
    command = [sys.executable, "-c", TRY, str(tmp_path / "elrond"), str(host.path().resolve())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "images: (2, 64, 64, 3)" in done.stdout
    assert done.stdout.count("valid: ") == len(list((ROOT / "workflows" / "api").glob("*.json")))
