"""In which of ComfyUI's own workflow templates ELROND can be used, and why not in the others.

    python -m bench.users                         the templates that are installed
    python -m bench.users --templates 1.2=A.whl   others as well: the version of comfyui-workflow-templates, and where
    python -m bench.users --tests                 first runs the tests that decide, on the ComfyUI at hand
    python -m bench.users --frontends FOLDER …    first runs tests/e2e/test_subgraphs.py on these frontends

A template counts if it has a text encoder. ELROND can be used in it if, for each of its text encoders, tests passed
with the node (*Mark Concept* finds the rows behind it), with the encoder that it encodes with, and with the model that
reads what it encodes (the gradient is that of finite differences, steering by zero changes nothing). What passed is in
bench/results/users_tests.json for each ComfyUI that the tests were run on. Figures are in bench/results/users.json:
`templates_total` and `templates_usable` are of the templates that `dev.py` installs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from . import templates
from .templates import Encoding

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "bench" / "results" / "users.json"
PASSED = ROOT / "bench" / "results" / "users_tests.json"
PACKAGE, FRONTEND = "comfyui_workflow_templates", "comfyui_frontend_package"
# The templates that `dev.py` installs with its ComfyUI, and those that a newer ComfyUI names.
HOST_OF = {"0.7.25": "0.3.75"}
NEWER_HOST = "0.33.0"
TESTS = (
    "test_mark.py",
    "test_mark_images.py",
    "test_template_encoders.py",
    "test_tokenizers.py",
    "test_families.py",
    "test_variants.py",
)
# Of these the tests that decide; the others of the same files say nothing of a template.
SELECTED = "own or another_word or hosts_encoders or rows_are_those or (test_family and not other_rows) or test_variant"

# What a template's text encoder is in the tests: by the loader's class, the names of its files and its type.
ENCODERS = (
    (r"CheckpointLoader.* (sd_xl_refiner)", "SDXLRefiner"),
    (r"CheckpointLoader.* sd_xl", "SDXL"),
    (r"CheckpointLoader.* sd3", "SD3"),
    (r"CheckpointLoader.* (v2-1|512-inpainting)", "SD2"),
    (r"CheckpointLoader.* flux1", "Flux"),
    (r"CheckpointLoader.* NetaYume", "Lumina"),
    (r"CheckpointLoader.* (v1-5|dreamshaper|majicmix|awpainting|japanesestyle|architecture|interiordesign)", "SD1"),
    (r"QuadrupleCLIPLoader .*llama_3", "HiDream"),
    (r"t5xxl.* flux ", "Flux"),
    (r"qwen_3_[48]b.* flux2 ", "Flux2"),
    (r"mistral.* flux2 ", "Flux2, Mistral"),
    (r"ministral", "Ernie"),
    (r"t5xxl.* chroma ", "PixArt"),
    (r"t5xxl.* ltxv ", "LTXV"),
    (r"t5xxl.* mochi ", "Mochi"),
    (r" wan ", "Wan"),
    (r"qwen_2\.5_vl.* qwen_image ", "QwenImage"),
    (r"qwen_2\.5_vl.* longcat_image ", "LongCatImage"),
    (r" omnigen2 ", "Omnigen2"),
    (r"llama3.* hunyuan_video ", "HunyuanVideo"),
    (r" hunyuan_video_15 ", "HunyuanVideo15"),
    (r" kandinsky5_image ", "Kandinsky5"),
    (r"qwen_3_4b.* lumina2 ", "ZImage"),
    (r"qwen_3_06b", "Anima"),
    (r" boogu ", "Boogu"),
    (r" mage ", "MageFlow"),
    (r" krea2 ", "Krea2"),
    (r" lens ", "Lens"),
    (r" ideogram4 ", "Ideogram4"),
    (r" joyimage ", "JoyImage"),
    (r" ovis ", "Ovis"),
    (r" pixeldit ", "PixelDiT"),
)
# What a template's model is in the tests, by the name of its file.
MODELS = (
    (r"wan2\.[12]_t2v", "Wan, video"),
    (r"wan2\.1_(i2v|flf2v|fun_inp)|chrono_edit|i2v-ati", "Wan 2.1, image to video"),
    (r"wan2\.2_(i2v|fun_inpaint)_(high|low)", "Wan 2.2, image to video"),
    (r"wan2\.2_ti2v_5b", "Wan 2.2 5B"),
    (r"wan2\.2_fun_control_5b", "Wan 2.2 5B Fun Control"),
    (r"wan2\.2_fun_inpaint_5b", "Wan 2.2 5B Fun Inpaint"),
    (r"wan2\.1_fun_control", "Wan Fun Control"),
    (r"wan2\.2_fun_control", "Wan 2.2 Fun Control"),
    (r"wan2\.1_fun_camera", "Wan 2.1 Fun Camera"),
    (r"wan2\.2_fun_camera", "Wan Fun Camera"),
    (r"wan2\.1_vace", "Wan VACE"),
    (r"wan2_2-animate", "Wan 2.2 Animate"),
    (r"wan2\.2_s2v", "Wan 2.2 Sound to Video"),
    (r"humo", "Wan HuMo"),
    (r"hunyuan_video_t2v", "HunyuanVideo"),
    (r"hunyuanvideo1\.5_720p", "HunyuanVideo 1.5"),
    (r"hunyuanvideo1\.5_1080p_sr", "HunyuanVideo 1.5, super resolution"),
    (r"ltx-video-2b", "LTX-Video"),
    (r"mochi", "Mochi"),
    (r"flux1-schnell", "Flux schnell"),
    (r"flux1-dev-kontext", "Flux, editing"),
    (r"flux\.?1-fill", "Flux Fill"),
    (r"flux1-canny", "Flux Canny and Depth"),
    (r"flux1-(krea-)?dev", "Flux dev"),
    (r"flux2_dev", "Flux.2, editing"),
    (r"flux-2-klein-(base-)?[49]b(-fp8)?\.", "Flux.2 Klein, editing"),
    (r"qwen_image_edit|firered", "Qwen-Image, editing"),
    (r"qwen_image_(2512_)?(fp8|bf16)", "Qwen-Image"),
    (r"longcat_image_edit", "LongCat-Image, editing"),
    (r"longcat_image", "LongCat-Image"),
    (r"joyai_image_edit", "JoyImage, editing"),
    (r"boogu_image_edit", "Boogu, editing"),
    (r"boogu_image", "Boogu"),
    (r"mage_flow_edit", "Mage-Flow, editing"),
    (r"mage_flow", "Mage-Flow"),
    (r"hidream_e1", "HiDream, editing"),
    (r"hidream_i1", "HiDream"),
    (r"omnigen2", "OmniGen2, editing"),
    (r"z_image", "Z-Image"),
    (r"chroma1-hd", "Chroma"),
    (r"chroma(1)?-radiance", "Chroma Radiance"),
    (r"^anima-", "Anima"),
    (r"ernie", "Ernie-Image"),
    (r"ideogram4", "Ideogram 4"),
    (r"kandinsky5lite_t2i", "Kandinsky 5 Image"),
    (r"krea2", "Krea 2"),
    (r"^lens_", "Lens"),
    (r"netayume", "Lumina 2"),
    (r"sd3\.5", "SD 3 / 3.5"),
    (r"sd_xl_refiner", "SDXL refiner"),
    (r"sd_xl", "SDXL"),
    (r"512-inpainting", "SD 2.x inpainting"),
    (r"v2-1_768", "SD 2.x (v)"),
    (r"v1-5|dreamshaper|majicmix|awpainting|japanesestyle|architecture|interiordesign", "SD 1.x"),
)
AUDIO = r"ace_?step|stable.audio|music"


def why_not(encoding: Encoding, passed: dict[str, list[str]]) -> str:
    """Why ELROND cannot be used with a text encoder of a template; empty if it can.

    Args:
        encoding: the encoder.
        passed: nodes, encoders and models that tests have passed with.
    """
    files = " ".join((encoding.clip, *encoding.models)).lower()
    if re.search(AUDIO, files):
        return "it makes sound"
    if encoding.reader.startswith("SAM3"):
        return "its text says what to look for in an image, and nothing is drawn from it"
    if "hidream_o1" in files:
        return "HiDream-O1 reads the prompt inside its diffusion model"
    encoder = _named(ENCODERS, f"{encoding.loader} {encoding.clip} ")
    if not encoder or encoder not in passed["encoders"]:
        return f"no test has its text encoder: {_short(encoding.clip) or encoding.loader}"
    node = encoding.node if encoding.node == "CLIPTextEncode" else f"{encoding.node} {encoder}"
    if encoding.images:
        node += " with images"
    if encoding.node != "CLIPTextEncode" and node not in passed["nodes"]:
        return f"no test has Mark Concept behind {node}"
    for model in encoding.models or ("",):
        name = _named(MODELS, model)
        if not name or name not in passed["models"]:
            return f"no test has its model: {_short(model) or encoding.reader}"
    return ""


def _named(table: tuple[tuple[str, str], ...], text: str) -> str:
    return next((name for pattern, name in table if re.search(pattern, text, re.IGNORECASE)), "")


def _short(files: str) -> str:
    """Names of files without their endings."""
    return " + ".join(name.removesuffix(".safetensors") for name in files.split() if name.endswith(".safetensors"))


def figures(graphs: dict[str, dict[str, Any]], passed: dict[str, list[str]]) -> dict[str, Any]:
    """How many of some templates have a text encoder, in how many ELROND can be used, and the others by reason."""
    reasons: dict[str, list[str]] = {}
    total = usable = 0
    for name, graph in graphs.items():
        found = templates.encodings(graph)
        if not found:
            continue
        total += 1
        against = sorted({why_not(encoding, passed) for encoding in found} - {""})
        usable += not against
        if against:
            reasons.setdefault("; ".join(against), []).append(name)
    return {"templates_total": total, "templates_usable": usable, "others": dict(sorted(reasons.items()))}


def table(kept: dict[str, Any]) -> str:
    """The figures as a table in Markdown, with the templates in which ELROND cannot be used by their reason."""
    lines = ["| templates | ComfyUI | with a text encoder | usable |", "| --- | --- | --- | --- |"]
    for version, of in kept["packages"].items():
        lines.append(f"| {version} | {of['comfyui']} | {of['templates_total']} | {of['templates_usable']} |")
    first = kept["packages"][next(iter(HOST_OF))]
    lines += ["", f"| why not, in {next(iter(HOST_OF))} | templates |", "| --- | --- |"]
    lines += [f"| {reason} | {', '.join(f'`{name}`' for name in names)} |" for reason, names in first["others"].items()]
    return "\n".join(lines)


def passed_of(report: Path) -> dict[str, list[str]]:
    """The nodes, encoders and models that all deciding tests of a JUnit report passed with."""
    outcomes: dict[tuple[str, str], bool] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        test, _, parameters = str(case.get("name")).partition("[")
        skipped = any(child.tag == "skipped" for child in case)
        if skipped:
            continue
        good = not any(child.tag in ("failure", "error") for child in case)
        for subject in _subjects(str(case.get("classname")).split(".")[-1], test, parameters.removesuffix("]")):
            outcomes[subject] = outcomes.get(subject, True) and good
    out: dict[str, list[str]] = {"encoders": [], "models": [], "nodes": []}
    for (kind, name), good in sorted(outcomes.items()):
        if good:
            out[kind].append(name)
    return out


def _subjects(module: str, test: str, parameters: str) -> list[tuple[str, str]]:
    """What a test is about."""
    if test in ("test_family", "test_variant"):
        return [("models", parameters)]
    if module in ("test_mark", "test_tokenizers") and test in (
        "test_the_mark_is_encode_concepts_own",
        "test_another_word_changes_the_concepts_rows_most",
    ):
        return [("encoders", parameters.split("-")[0])]
    if module == "test_template_encoders":
        return [("encoders", parameters.split("-")[0])]
    if module == "test_mark" and test == "test_the_hosts_encoders":
        family, node = parameters.split("-")
        subjects = [("nodes", f"{node} {family}")]
        # It has no other test: the encoder of one family is part of another.
        return [*subjects, ("encoders", family)] if family == "SDXLRefiner" else subjects
    if module == "test_mark_images" and test == "test_the_rows_are_those_that_change_with_the_word":
        family, node, count = parameters.split("-")[:3]
        return [("nodes", f"{node} {family}" + (" with images" if int(count) else ""))]
    return []


def run_tests() -> None:
    """Run the tests that decide on the ComfyUI at hand, and keep what passed."""
    from demo import host

    version = re.search(r'"(.*)"', (host.path() / "comfyui_version.py").read_text(encoding="utf-8"))
    assert version is not None
    files = [str(ROOT / "tests" / "host" / name) for name in TESTS]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", "-k", SELECTED, *files]
        subprocess.run(command, cwd=ROOT, check=False)
        known = _kept(PASSED)
        known[version[1]] = passed_of(report)
    _keep(PASSED, known)


def test_frontend(folder: Path | None) -> str | None:
    """Run the tests of panels in subgraphs on a frontend.

    Args:
        folder: its `static` folder; None for the installed one.

    Returns:
        its version if they passed, else None.
    """
    if folder is None:
        version = importlib.metadata.version(FRONTEND)
    else:
        (info,) = folder.resolve().parents[1].glob(f"{FRONTEND}-*.dist-info")
        version = info.name.removesuffix(".dist-info").split("-")[1]
    environment = {**os.environ, **({"ELROND_FRONTEND": str(folder.resolve())} if folder else {})}
    command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "e2e" / "test_subgraphs.py")]
    return version if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0 else None


def _kept(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _keep(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def versions_of(others: list[str]) -> dict[str, list[Path]]:
    """Folders and wheels of templates by the version of the package that they belong to.

    Args:
        others: version and place of those that are not installed, as 1.2=place.
    """
    out = {importlib.metadata.version(PACKAGE): templates.installed()} if templates.installed() else {}
    for version, _, place in (other.partition("=") for other in others):
        out[version] = [Path(place)]
    return out


def main() -> None:
    """Decide, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", nargs="+", default=[], metavar="VERSION=PLACE")
    parser.add_argument("--tests", action="store_true")
    parser.add_argument("--frontends", nargs="*", type=Path, metavar="FOLDER")
    chosen = parser.parse_args()
    if chosen.tests:
        run_tests()
    kept = _kept(FIGURES)
    if chosen.frontends is not None:
        passed = [version for folder in (None, *chosen.frontends) if (version := test_frontend(folder))]
        kept["frontends_tested"] = passed
    packages = kept.get("packages", {})
    for version, places in versions_of(chosen.templates).items():
        host = HOST_OF.get(version, NEWER_HOST)
        packages[version] = {"comfyui": host, **figures(templates.read(places), _kept(PASSED)[host])}
    for version, of in packages.items():
        print(f"{version}: {of['templates_usable']} of {of['templates_total']} templates with a text encoder")
        for reason, names in of["others"].items():
            print(f"    {len(names):3} {reason}: {', '.join(names)}")
    first = packages[next(iter(HOST_OF))]
    _keep(
        FIGURES, {**kept, **{key: first[key] for key in ("templates_total", "templates_usable")}, "packages": packages}
    )


if __name__ == "__main__":
    main()
