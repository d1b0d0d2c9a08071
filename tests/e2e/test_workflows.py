"""The shipped workflows on the running server, and what bad input to them says."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import torch
from PIL import Image

from demo.server import PACK, Server, ServerError
from elrond_core.directions import Directions
from elrond_core.gradients import Gradients
from elrond_core.provenance import Provenance
from elrond_core.storage.format import load_directions, save_directions, save_gradients

WORKFLOWS = Path(__file__).parents[2] / "example_workflows"
GRAPHS = Path(__file__).parents[2] / "workflows" / "api"
NAMES = ["complexity", "discover", "diversify", "steer"]
# Of models that people use, which the tests do not have.
EXAMPLES = ["flux_schnell", "qwen_image", "sdxl_dmd2", "sdxl_turbo", "z_image_turbo"]
# Counts under which every workflow takes seconds; a significance of 0 keeps directions that so few gradients hide.
SMALL: dict[str, dict[str, Any]] = {
    "ElrondSampleRealizations": {"count": 24, "batch_size": 12, "steps": 2},
    "ElrondCollectGradients": {"count": 48, "batch_size": 24, "targets_per_realization": 1},
    "ElrondFitPCA": {"significance": 0.0, "most": 4},
    "ElrondFitResponse": {"significance": 0.0, "most": 4},
    "KSampler": {"steps": 2},
}
HEAVY = {"KSampler", "ElrondSampleRealizations", "ElrondCollectGradients"}
WIDTH = 128


def workflow(name: str) -> dict[str, Any]:
    graph = json.loads((GRAPHS / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        node["inputs"].update(SMALL.get(node["class_type"], {}))
    return graph


def pictures(server: Server, outputs: dict[str, Any], node: str) -> np.ndarray:
    """Images a node saved or previewed, uint8 (N, H, W, 3)."""
    files = [Image.open(io.BytesIO(server.view(image))) for image in outputs[node]["images"]]
    return np.stack([np.asarray(file.convert("RGB")) for file in files])


def assert_plot(images: np.ndarray) -> None:
    """One plot with data in it: points and lines have colours, of which the legend alone has about 100 pixels."""
    (plot,) = images.astype(int)
    assert (plot.max(-1) - plot.min(-1) > 60).sum() > 200


def ids(graph: dict[str, Any], kind: str) -> list[str]:
    return [node_id for node_id, node in graph.items() if node["class_type"] == kind]


def titled(graph: dict[str, Any], title: str) -> str:
    (found,) = (node_id for node_id, node in graph.items() if node["_meta"]["title"] == title)
    return found


def fetch(server: Server, path: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.url + path, timeout=30) as reply:
        return reply.read()


@pytest.fixture(scope="module")
def discovered(server: Server) -> dict[str, Any]:
    """What the discover workflow shows; afterwards its directions can be loaded."""
    return server.run(workflow("discover"))


def test_the_template_browser_lists_the_workflows_only(server: Server) -> None:
    listed = json.loads(fetch(server, "/workflow_templates"))
    assert sorted(listed[PACK]) == sorted([*NAMES, *EXAMPLES])
    for name in listed[PACK]:
        graph = json.loads(fetch(server, f"/api/workflow_templates/{PACK}/{name}.json"))
        assert graph == json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
        picture = Image.open(io.BytesIO(fetch(server, f"/api/workflow_templates/{PACK}/{name}.jpg")))
        assert picture.format == "JPEG"


def test_the_server_hands_out_help_pages(server: Server) -> None:
    ours = [node_id for node_id, node in server.object_info().items() if node["python_module"].endswith(PACK)]
    assert len(ours) >= 14
    for node_id in ours:
        assert fetch(server, f"/extensions/{PACK}/docs/{node_id}.md").startswith(b"# ")


def test_discover(server: Server, discovered: dict[str, Any]) -> None:
    graph = workflow("discover")
    (saved,) = ids(graph, "SaveImage")
    images = pictures(server, discovered, saved)
    assert images.shape == (16, 64, 64, 3)
    assert all((images[0] != image).any() for image in images[1:])
    for plot in ids(graph, "PreviewImage"):
        assert_plot(pictures(server, discovered, plot))
    for name, method in (("demo person pca", "pca"), ("demo person", "response")):
        directions = load_directions(server.output / "elrond" / "directions" / f"{name}.safetensors", width=WIDTH)
        assert len(directions) == 4
        assert directions.method["name"] == method
        origin = directions.provenance
        assert (origin.concept, origin.prompt, origin.count, origin.seed) == ("person", "a person", 48, 1)


@pytest.mark.usefixtures("discovered")
def test_steer(server: Server) -> None:
    graph = workflow("steer")
    outputs = server.run(graph)
    (report,), (saved,) = ids(graph, "PreviewAny"), ids(graph, "SaveImage")
    # What a person just saved comes before a file of that name that ships with the pack.
    assert "from 48 gradients" in outputs[report]["text"][0]
    plain, against, along, both = pictures(server, outputs, saved).reshape(4, 4, 64, 64, 3)
    for a, b in ((plain, against), (plain, along), (against, along), (along, both)):
        assert (a != b).any(axis=(1, 2, 3)).all()


@pytest.mark.usefixtures("discovered")
def test_a_strength_of_zero_changes_no_pixel(server: Server) -> None:
    graph = workflow("steer")
    for node in ids(graph, "ElrondApplyDirection"):
        graph[node]["inputs"]["strength"] = 0.0
    (saved,) = ids(graph, "SaveImage")
    rows = pictures(server, server.run(graph), saved).reshape(4, 4, 64, 64, 3)
    assert (rows == rows[0]).all()


@pytest.mark.usefixtures("discovered")
def test_diversify(server: Server) -> None:
    graph = workflow("diversify")
    outputs = server.run(graph)
    plain, diversified = (pictures(server, outputs, node) for node in ids(graph, "SaveImage"))
    assert plain.shape == diversified.shape == (16, 64, 64, 3)
    assert (plain != diversified).any(axis=(1, 2, 3)).all()
    assert len(outputs[titled(graph, "What every image got")]["text"][0].splitlines()) == 16
    for batch in ("as it is", "diversified"):
        assert "16 images, compared by" in outputs[titled(graph, f"How different: {batch}")]["text"][0]


@pytest.mark.usefixtures("discovered")
def test_an_image_does_not_depend_on_how_many_are_diversified(server: Server) -> None:
    graph = workflow("diversify")
    (wide,) = ids(graph, "ElrondDiversify")
    (latent,) = ids(graph, "EmptyLatentImage")
    saved = ids(graph, "SaveImage")[1]
    many = pictures(server, server.run(graph), saved)
    graph[wide]["inputs"]["count"] = graph[latent]["inputs"]["batch_size"] = 5
    few = pictures(server, server.run(graph), saved)
    assert np.abs(many[:5].astype(int) - few).max() <= 1


@pytest.mark.usefixtures("discovered")
def test_a_saved_image_makes_its_batch_again(server: Server) -> None:
    graph = workflow("diversify")
    saved = ids(graph, "SaveImage")[1]
    outputs = server.run(graph)
    with Image.open(io.BytesIO(server.view(outputs[saved]["images"][3]))) as image:
        kept = json.loads(image.info["prompt"])
    server.forget()
    again = server.run(kept)
    assert not server.reused()
    assert (pictures(server, again, saved) == pictures(server, outputs, saved)).all()


@pytest.mark.usefixtures("discovered")
def test_one_image_of_a_batch_is_made_again_from_the_report(server: Server, node: Any) -> None:
    graph = workflow("diversify")
    saved = ids(graph, "SaveImage")[1]
    (wide,), (latent,) = ids(graph, "ElrondDiversify"), ids(graph, "EmptyLatentImage")
    outputs = server.run(graph)
    line = outputs[titled(graph, "What every image got")]["text"][0].splitlines()[5]
    strengths, unit = re.fullmatch(r"image 5: strengths (.*?) in (token norms|absolute)( \(.*\))?", line).group(1, 2)
    # A single image has no diversity.
    graph = {i: n for i, n in graph.items() if not re.match("Variety|How different", n["_meta"]["title"])}
    same = {k: graph[wide]["inputs"][k] for k in ("conditioning", "directions", "start", "end")}
    graph["apply"] = node("ElrondApplyDirection", **same, strengths=strengths, unit=unit)
    graph["sixth"] = node("LatentFromBatch", samples=[latent, 0], batch_index=5, length=1)
    (sampler,) = (i for i in ids(graph, "KSampler") if graph[i]["inputs"]["positive"] == [wide, 0])
    graph[sampler]["inputs"] |= {"positive": ["apply", 0], "latent_image": ["sixth", 0]}
    (one,) = pictures(server, server.run(graph), saved)
    assert np.abs(one.astype(int) - pictures(server, outputs, saved)[5]).max() <= 3


def test_files_that_appear_are_listed(server: Server) -> None:
    save_directions(some_directions("Demo"), server.output / "elrond" / "directions" / "appeared.safetensors")
    save_gradients(some_gradients(4), server.output / "elrond" / "gradients" / "appeared too.safetensors")
    known = server.object_info()
    for kind, name in (("ElrondLoadDirections", "appeared"), ("ElrondLoadGradients", "appeared too")):
        assert name in known[kind]["input"]["required"]["name"][1]["options"]


def test_complexity(server: Server) -> None:
    graph = workflow("complexity")
    outputs = server.run(graph)
    shown = {graph[node]["_meta"]["title"]: outputs[node]["text"][0] for node in ids(graph, "PreviewAny")}
    for word in ("clone", "person"):
        assert float(shown[f"Dimension: {word}"]) >= 0
        assert "48 gradients" in shown[f"Report: {word}"]
    for plot in ids(graph, "PreviewImage"):
        assert_plot(pictures(server, outputs, plot))


# Files that the error cases load, written by the pack's own writers.


def some_directions(family: str, rows: int = 1, width: int = WIDTH) -> Directions:
    vectors = torch.nn.functional.normalize(torch.randn(3, rows * width, generator=torch.Generator().manual_seed(0)))
    provenance = Provenance(family, "a person", "person", ("person",) * rows, tuple(range(2, 2 + rows)), 1.0, (1.0,), 9)
    return Directions(vectors.reshape(3, rows, width), torch.ones(3), {"name": "pca"}, provenance)


def some_gradients(count: int, response: bool = False) -> Gradients:
    vectors = torch.randn(count, 1, WIDTH, generator=torch.Generator().manual_seed(count))
    places = torch.arange(count)
    return builders.gradients(
        vectors,
        sources=places,
        targets=places + 1,
        probes=vectors if response else None,
        provenance=some_directions("Demo").provenance,
    )


@pytest.fixture(scope="module")
def family(server: Server, discovered: dict[str, Any]) -> str:
    return load_directions(server.output / "elrond" / "directions" / "demo person.safetensors").provenance.family


@pytest.fixture(scope="module")
def stored(server: Server, family: str) -> None:
    folder = server.output / "elrond"
    for name, directions in (
        ("good", some_directions(family)),
        ("other family", some_directions("SDXL")),
        ("other width", some_directions(family, width=64)),
        ("two tokens", some_directions(family, rows=2)),
    ):
        save_directions(directions, folder / "directions" / f"{name}.safetensors")
    (folder / "gradients").mkdir(exist_ok=True)
    for name, gradients in (("one", some_gradients(1)), ("few", some_gradients(12)), ("plain", some_gradients(64))):
        save_gradients(gradients, folder / "gradients" / f"{name}.safetensors")
    shutil.copy(folder / "gradients" / "plain.safetensors", folder / "directions" / "gradients in truth.safetensors")
    whole = (folder / "directions" / "good.safetensors").read_bytes()
    (folder / "directions" / "cut short.safetensors").write_bytes(whole[: len(whole) // 2])


@pytest.fixture(scope="module")
def node(server: Server) -> Any:
    """A node of a graph: what is not given has its default."""
    known = server.object_info()

    def make(kind: str, **inputs: Any) -> dict[str, Any]:
        filled = {}
        for name, (type_, *rest) in known[kind]["input"].get("required", {}).items():
            extra = rest[0] if rest else {}
            if "default" in extra:
                filled[name] = extra["default"]
            elif isinstance(type_, list):
                filled[name] = type_[0]
        return {"class_type": kind, "inputs": {**filled, **inputs}}

    return make


def fails(server: Server, graph: dict[str, Any], kind: str, pattern: str) -> None:
    """The graph stops at a node of this class with one sentence, before anything costly has run."""
    with pytest.raises(ServerError, match=pattern) as caught:
        server.run(graph)
    assert caught.value.node_type == kind
    message = str(caught.value).partition("): ")[2]
    assert message.endswith("."), message
    assert not re.search(r"\n|[.!?] [A-Z]", message), message
    ran = {graph[node_id]["class_type"] for node_id in caught.value.details.get("executed", ())}
    assert not ran & HEAVY


def sampled(node: Any, positive: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A graph that encodes a prompt, samples two realizations of it and shows them."""
    return {
        "model": node("ElrondLoadDemoModel"),
        "encode": positive,
        "sample": node(
            "ElrondSampleRealizations", model=["model", 0], positive=["encode", 0], width=64, height=64, count=2, **more
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["model", 2]),
        "show": node("PreviewImage", images=["decode", 0]),
    }


@pytest.mark.parametrize(
    ("inputs", "pattern"),
    [
        ({"prompt": "a person", "concept": "dog"}, "The concept 'dog' is not in the prompt 'a person'"),
        ({"prompt": "a person"}, "Name the concept"),
        ({"prompt": "a [person"}, "do not match"),
        ({"prompt": "a [ ]"}, "empty brackets"),
        ({"prompt": "a person", "concept": "person", "occurrence": 2}, "has 'person' 1 times"),
    ],
)
def test_a_concept_that_is_not_in_the_prompt(server: Server, node: Any, inputs: dict[str, Any], pattern: str) -> None:
    graph = sampled(node, node("ElrondEncodeConcept", clip=["model", 1], **inputs))
    fails(server, graph, "ElrondEncodeConcept", pattern)


def marked(node: Any, **inputs: Any) -> dict[str, Any]:
    """A graph that marks a concept in two stock prompts, samples them and shows the report."""
    return {
        "word": node("PrimitiveString", value="a red lady"),
        "plain": node("CLIPTextEncode", clip=["model", 1], text=["word", 0]),
        "other": node("CLIPTextEncode", clip=["model", 1], text="a blue lady"),
        "both": node("ConditioningCombine", conditioning_1=["plain", 0], conditioning_2=["other", 0]),
        **sampled(node, node("ElrondMarkConcept", conditioning=["both", 0], clip=["model", 1], **inputs)),
        "report": node("PreviewAny", source=["encode", 1]),
    }


def test_mark_concept_reads_the_texts_of_the_graph(server: Server, node: Any) -> None:
    (report,) = server.run(marked(node, concept="lady"))["report"]["text"]
    assert re.findall(r"entry \d: (.*)\nconcept 'lady': tokens lady, rows \[3\]", report) == [
        "a red lady",
        "a blue lady",
    ]


@pytest.mark.parametrize(
    ("inputs", "pattern"),
    [
        ({}, "Name the concept"),
        ({"concept": "dog"}, "No node before Mark Concept holds a text with the concept 'dog'"),
        ({"text": "a red [box]"}, "The conditioning does not have the rows of 'a red box'"),
        ({"concept": "dog", "text": "a red box"}, "The concept 'dog' is not in the prompt 'a red box'"),
    ],
)
def test_a_concept_that_cannot_be_marked(server: Server, node: Any, inputs: dict[str, Any], pattern: str) -> None:
    fails(server, marked(node, **inputs), "ElrondMarkConcept", pattern)


def test_fewer_than_two_realizations_are_not_sampled(server: Server, node: Any) -> None:
    graph = sampled(node, node("ElrondEncodeConcept", clip=["model", 1]))
    graph["sample"]["inputs"]["count"] = 1
    with pytest.raises(ServerError, match=r"ElrondSampleRealizations \(node sample\): Value 1 smaller than min of 2"):
        server.run(graph)


def collected(node: Any, **more: Any) -> dict[str, Any]:
    """A graph that collects gradients of empty latents and shows their principal components."""
    return {
        "model": node("ElrondLoadDemoModel"),
        "encode": node("ElrondEncodeConcept", clip=["model", 1]),
        "plain": node("CLIPTextEncode", clip=["model", 1], text="a person"),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=more.pop("batch_size", 2)),
        "collect": node(
            "ElrondCollectGradients",
            **{"model": ["model", 0], "positive": ["encode", 0], "realizations": ["latent", 0], **more},
        ),
        "fit": node("ElrondFitPCA", gradients=["collect", 0]),
        "show": node("PreviewImage", images=["fit", 1]),
    }


@pytest.mark.parametrize(
    ("inputs", "pattern"),
    [
        ({"batch_size": 1}, "at least two realizations"),
        ({"positive": ["plain", 0]}, "does not know its concept"),
        ({"cfg": 7.0}, r"A cfg of 7\.0 needs a negative prompt"),
    ],
)
def test_gradients_that_cannot_be_collected(server: Server, node: Any, inputs: dict[str, Any], pattern: str) -> None:
    fails(server, collected(node, **inputs), "ElrondCollectGradients", pattern)


def steered(node: Any, file: str, kind: str, **inputs: Any) -> dict[str, Any]:
    """A graph that loads directions, steers a prompt with them and samples it."""
    return {
        "model": node("ElrondLoadDemoModel"),
        "encode": node("ElrondEncodeConcept", clip=["model", 1]),
        "plain": node("CLIPTextEncode", clip=["model", 1], text="a person"),
        "load": node("ElrondLoadDirections", name=file),
        "steer": node(kind, **{"conditioning": ["encode", 0], "directions": ["load", 0], **inputs}),
        "latent": node("EmptyLatentImage", width=64, height=64),
        "sample": node(
            "KSampler",
            model=["model", 0],
            positive=["steer", 0],
            negative=["plain", 0],
            latent_image=["latent", 0],
            steps=1,
            cfg=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["model", 2]),
        "show": node("PreviewImage", images=["decode", 0]),
    }


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("kind", ["ElrondApplyDirection", "ElrondDiversify"])
@pytest.mark.parametrize(
    ("file", "inputs", "pattern"),
    [
        ("other family", {}, "made for SDXL"),
        ("other width", {}, "64 wide .* 128 wide"),
        ("two tokens", {}, "concept of 2 tokens, but this one has 1"),
        ("good", {"start": 0.5, "end": 0.5}, "start before it ends"),
        ("good", {"concept": "dog"}, "no marked concept 'dog'"),
        ("good", {"conditioning": ["plain", 0]}, "does not know its concept"),
    ],
)
def test_directions_that_do_not_fit(
    server: Server, node: Any, kind: str, file: str, inputs: dict[str, Any], pattern: str
) -> None:
    fails(server, steered(node, file, kind, **inputs), kind, pattern)


@pytest.mark.usefixtures("stored")
def test_a_direction_that_is_not_there(server: Server, node: Any) -> None:
    graph = steered(node, "good", "ElrondApplyDirection", index=3)
    fails(server, graph, "ElrondApplyDirection", "There is no direction 3: this set holds 0 to 2")


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    ("inputs", "pattern"),
    [
        ({"lowest": 1.0, "highest": 0.5}, r"lowest strength 1\.0 is above the highest 0\.5"),
        ({"mix": 4}, "mix 1 to 3 of these directions, not 4"),
        ({"mix": 3, "leading": 2}, "mix 1 to 2 of these directions, not 3"),
    ],
)
def test_steps_that_cannot_be_drawn(server: Server, node: Any, inputs: dict[str, Any], pattern: str) -> None:
    fails(server, steered(node, "good", "ElrondDiversify", **inputs), "ElrondDiversify", pattern)


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("no such file", "There is no directions file 'no such file'"),
        ("../gradients/plain", "cannot be a file name"),
        ("cut short", "cut short|damaged|does not fit the file"),
        ("gradients in truth", "gradients"),
    ],
)
def test_a_file_that_cannot_be_loaded(server: Server, node: Any, file: str, pattern: str) -> None:
    fails(server, steered(node, file, "ElrondApplyDirection"), "ElrondLoadDirections", pattern)


def decomposed(node: Any, file: str, kind: str, **inputs: Any) -> dict[str, Any]:
    """A graph that loads gradients and shows what a node makes of them."""
    plot = 2 if kind == "ElrondEstimateLID" else 1
    return {
        "load": node("ElrondLoadGradients", name=file),
        "fit": node(kind, gradients=["load", 0], **inputs),
        "show": node("PreviewImage", images=["fit", plot]),
    }


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    ("file", "kind", "inputs", "pattern"),
    [
        ("one", "ElrondFitPCA", {}, "at least 2"),
        ("one", "ElrondTrainSAE", {}, "at least 2"),
        ("plain", "ElrondFitResponse", {}, "without the model's response"),
        ("few", "ElrondEstimateLID", {}, "at least 20 gradients"),
        ("plain", "ElrondTrainSAE", {"latents": 8, "k": 9}, "k|active"),
        (
            "plain",
            "ElrondTrainSAE",
            {"lowest_density": -0.5, "highest_density": -1.0},
            "densities must go from low to high",
        ),
    ],
)
def test_gradients_that_cannot_be_decomposed(
    server: Server, node: Any, file: str, kind: str, inputs: dict[str, Any], pattern: str
) -> None:
    fails(server, decomposed(node, file, kind, **inputs), kind, pattern)


@pytest.mark.usefixtures("stored")
def test_gradients_that_are_not_there(server: Server, node: Any) -> None:
    graph = decomposed(node, "no such file", "ElrondFitPCA")
    fails(server, graph, "ElrondLoadGradients", "There is no gradients file 'no such file'")


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("name", ["../outside", "", "a:b"])
def test_a_name_that_no_file_may_have(server: Server, node: Any, name: str) -> None:
    graph = {
        "load": node("ElrondLoadDirections", name="good"),
        "save": node("ElrondSaveDirections", directions=["load", 0], name=name),
    }
    fails(server, graph, "ElrondSaveDirections", "cannot be a file name")


@pytest.mark.usefixtures("stored")
def test_saving_twice_keeps_both(server: Server, node: Any) -> None:
    graph = {
        "load": node("ElrondLoadGradients", name="plain"),
        "save": node("ElrondSaveGradients", gradients=["load", 0], name="sub/kept"),
        "name": node("PreviewAny", source=["save", 1]),
    }
    again = copy.deepcopy(graph)
    again["load"]["inputs"]["name"] = "few"
    shown = [server.run(wanted)["name"]["text"][0] for wanted in (graph, again)]
    assert shown == ["sub/kept", "sub/kept-2"]


@pytest.mark.usefixtures("stored")
def test_a_sparse_autoencoder_is_trained(server: Server, node: Any) -> None:
    graph = decomposed(node, "plain", "ElrondTrainSAE", latents=16, k=2, epochs=3)
    graph["report"] = node("PreviewAny", source=["fit", 2])
    outputs = server.run(graph)
    assert "16 latents, 2 active at once" in outputs["report"]["text"][0]
    assert_plot(pictures(server, outputs, "show"))
