"""The table of ComfyUI's templates: the committed figures follow from the templates and the tests that passed."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import templates, users

ROOT = Path(__file__).parents[1]


def kept() -> dict[str, Any]:
    return json.loads(users.FIGURES.read_text(encoding="utf-8"))


def passed(version: str) -> dict[str, list[str]]:
    return json.loads(users.PASSED.read_text(encoding="utf-8"))[users.HOST_OF.get(version, users.NEWER_HOST)]


def installed() -> str:
    """The version of the templates that are installed, if the figures have it."""
    try:
        version = importlib.metadata.version(users.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("comfyui-workflow-templates is not installed")
    if version not in kept()["packages"] or not templates.installed():
        pytest.skip(f"bench/results/users.json has no figures of comfyui-workflow-templates {version}")
    return version


def test_the_figures_follow_from_the_templates() -> None:
    version = installed()
    found = users.figures(templates.read(templates.installed()), passed(version))
    assert found == {key: value for key, value in kept()["packages"][version].items() if key != "comfyui"}


def test_the_figures_are_those_of_the_templates_that_are_set_up() -> None:
    figures = kept()
    first = figures["packages"][next(iter(users.HOST_OF))]
    assert {key: figures[key] for key in ("templates_total", "templates_usable")} == {
        key: first[key] for key in ("templates_total", "templates_usable")
    }
    for of in figures["packages"].values():
        named = [name for names in of["others"].values() for name in names]
        assert len(named) == len(set(named)) == of["templates_total"] - of["templates_usable"]


def test_the_page_of_models_names_every_reason() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert users.table(kept()) in page, f"Put this into docs/models.md:\n{users.table(kept())}"


def node(number: int, kind: str, inputs: list[Any], outputs: list[str], values: Any = ()) -> dict[str, Any]:
    entries = [{"name": name, "type": type_, "link": None} for name, type_ in inputs]
    return {
        "id": number,
        "type": kind,
        "inputs": entries,
        "outputs": [{"name": each, "type": each} for each in outputs],
        "widgets_values": list(values),
    }


LOADER = ("CLIPLoader", [], ["CLIP"], ["qwen_3_4b.safetensors", "lumina2", "default"])
MODEL = ("UNETLoader", [], ["MODEL"], ["z_image_bf16.safetensors", "default"])
ENCODE = ("CLIPTextEncode", [("clip", "CLIP")], ["CONDITIONING"], ["a dog"])
SAMPLE = ("KSampler", [("model", "MODEL"), ("positive", "CONDITIONING")], ["LATENT"])
ENCODING = templates.Encoding(
    "CLIPTextEncode",
    False,
    "CLIPLoader",
    "qwen_3_4b.safetensors lumina2 default",
    ("z_image_bf16.safetensors default",),
    "KSampler",
)


def test_encoders_are_found_across_the_boundaries_of_subgraphs() -> None:
    """The encoder in one subgraph, the sampler in another, the loaders outside, and a node between that hands on."""
    reroute = ("Reroute", [("", "*")], ["*"])
    definitions = [
        {
            "id": "encoding",
            "nodes": [node(5, *ENCODE)],
            "links": [
                {"origin_id": -10, "origin_slot": 0, "target_id": 5, "target_slot": 0},
                {"origin_id": 5, "origin_slot": 0, "target_id": -20, "target_slot": 0},
            ],
        },
        {
            "id": "sampling",
            "nodes": [node(5, *SAMPLE)],
            "links": [
                {"origin_id": -10, "origin_slot": 0, "target_id": 5, "target_slot": 0},
                {"origin_id": -10, "origin_slot": 1, "target_id": 5, "target_slot": 1},
            ],
        },
    ]
    whole = {
        "nodes": [
            node(1, *LOADER),
            node(2, *MODEL),
            node(3, "encoding", [("clip", "CLIP")], ["CONDITIONING"]),
            node(4, "sampling", [("model", "MODEL"), ("positive", "CONDITIONING")], []),
            node(6, *reroute),
        ],
        "links": [
            [1, 1, 0, 3, 0, "CLIP"],
            [2, 2, 0, 4, 0, "MODEL"],
            [3, 3, 0, 6, 0, "*"],
            [4, 6, 0, 4, 1, "*"],
        ],
        "definitions": {"subgraphs": definitions},
    }
    assert templates.encodings(whole) == [ENCODING]


PASSED = {"encoders": ["ZImage"], "models": ["Z-Image"], "nodes": ["TextEncodeQwenImageEdit ZImage with images"]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"node": "TextEncodeQwenImageEdit", "images": True}, ""),
        ({"node": "TextEncodeQwenImageEdit"}, "no test has Mark Concept behind TextEncodeQwenImageEdit ZImage"),
        ({"clip": "t5xxl.safetensors sd3 default"}, "no test has its text encoder: t5xxl"),
        ({"clip": "t5xxl_fp16.safetensors mochi default"}, "no test has its text encoder: t5xxl_fp16"),
        ({"models": ("z_image.safetensors", "other.safetensors default")}, "no test has its model: other"),
        ({"models": ("sd_xl_base_1.0.safetensors",)}, "no test has its model: sd_xl_base_1.0"),
        ({"models": (), "reader": "SAM3_Detect"}, "its text says what to look for in an image, and nothing is drawn"),
        ({"models": (), "reader": "Other"}, "no test has its model: Other"),
        ({"models": ("ace_step_v1.safetensors",)}, "it makes sound"),
    ],
)
def test_why_not(changes: dict[str, Any], reason: str) -> None:
    found = users.why_not(templates.Encoding(**{**vars_of(ENCODING), **changes}), PASSED)
    assert found.startswith(reason) and bool(found) == bool(reason)


def vars_of(encoding: templates.Encoding) -> dict[str, Any]:
    return {name: getattr(encoding, name) for name in encoding.__dataclass_fields__}


def test_only_what_passed_everywhere_counts(tmp_path: Path) -> None:
    cases = {
        "tests.host.test_families": ["test_family[SDXL]", "test_family[Flux dev]F", "test_family[Wan]S"],
        "tests.host.test_mark": [
            "test_the_mark_is_encode_concepts_own[SD1-a dog]",
            "test_the_mark_is_encode_concepts_own[SD3-a dog]",
            "test_the_mark_is_encode_concepts_own[SD3-a cat]F",
            "test_the_hosts_encoders[Flux-CLIPTextEncodeFlux]",
        ],
        "tests.host.test_mark_images": [
            "test_the_rows_are_those_that_change_with_the_word[Krea2-TextEncodeQwenImageEditPlus-1-dog]",
            "test_the_rows_are_those_that_change_with_the_word[QwenImage-TextEncodeQwenImageEditPlus-0-dog]",
        ],
    }
    lines = ["<testsuite>"]
    for module, names in cases.items():
        for name in names:
            inside = {"F": "<failure/>", "S": "<skipped/>"}.get(re.sub(r".*\]", "", name), "")
            lines.append(f'<testcase classname="{module}" name="{name.rstrip("FS")}">{inside}</testcase>')
    report = tmp_path / "tests.xml"
    report.write_text("".join([*lines, "</testsuite>"]))
    assert users.passed_of(report) == {
        "encoders": ["SD1"],
        "models": ["SDXL"],
        "nodes": [
            "CLIPTextEncodeFlux Flux",
            "TextEncodeQwenImageEditPlus Krea2 with images",
            "TextEncodeQwenImageEditPlus QwenImage",
        ],
    }
