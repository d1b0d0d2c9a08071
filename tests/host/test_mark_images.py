"""Mark Concept behind the host's encoders that read images beside the text."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import execution
import pytest
import torch
from comfy_execution.graph import DynamicPrompt
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.nodes import host
from comfyui_elrond.nodes.mark import MarkConcept

# isort: split
sys.path.append(str(Path(__file__).parent))

import families
from test_families import double_error_of, picture, steered
from test_tokenizers import load, usable
from variants import BY_NAME

import nodes as host_nodes

PROMPT = "let the dog sit in the park"
# Of other shapes, so that a mix-up shows; the encoders make them smaller or larger.
IMAGES = (families.random(1, 40, 56, 3).sigmoid(), families.random(1, 64, 32, 3, seed=1).sigmoid())
# Family, node, its module, its inputs beside clip, text and images, and the names of the images' sockets.
NODES = (
    ("QwenImage", "TextEncodeQwenImageEdit", "nodes_qwen", {}, ("image",)),
    ("QwenImage", "TextEncodeQwenImageEditPlus", "nodes_qwen", {}, ("image1", "image3")),
    ("QwenImage", "TextEncodeQwenImageEditPlus", "nodes_qwen", {}, ()),
    ("LongCatImage", "TextEncodeQwenImageEdit", "nodes_qwen", {}, ("image",)),
    ("Krea2", "TextEncodeQwenImageEditPlus", "nodes_qwen", {}, ("image1",)),
    ("ZImage", "TextEncodeZImageOmni", "nodes_zimage", {"auto_resize_images": True}, ("image1", "image2")),
    ("JoyImage", "TextEncodeJoyImageEdit", "nodes_joyimage", {}, ("images.image0",)),
    (
        "Boogu",
        "TextEncodeBooguEdit",
        "nodes_boogu",
        {"negative_prompt": "", "vae": ["7", 2]},
        ("images.image_1",),
    ),
    (
        "MageFlow",
        "TextEncodeMageFlowEdit",
        "nodes_mage",
        {"negative_prompt": "", "width": 64, "height": 64, "batch_size": 1},
        ("images.image_1", "images.image_2"),
    ),
)


class Vision(torch.nn.Module):
    """In the place of an encoder's vision tower, which has a size of its own: a vector for each four patches."""

    def __init__(self, width: int, deep: bool) -> None:
        super().__init__()
        self._width, self._deep = width, deep

    def forward(self, patches: torch.Tensor, grid: torch.Tensor) -> Any:
        means = patches.reshape(int(grid.prod()) // 4, 4, -1).mean(1)
        rows = means @ families.random(means.shape[1], self._width, seed=2)
        return (rows, []) if self._deep else rows


@pytest.fixture(params=NODES, ids=[f"{family}-{node}-{len(images)}" for family, node, _, _, images in NODES])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An encoder node, as the host knows it, with its CLIP and what a graph says of it."""
    family, kind, module, values, sockets = request.param
    try:
        found = getattr(importlib.import_module(f"comfy_extras.{module}"), kind)
    except (ImportError, AttributeError):
        pytest.skip(f"this host has no {kind}")
    clip = load(usable(family))
    for part in list(clip.cond_stage_model.modules()):
        if hasattr(part, "visual"):
            vision = Vision(part.get_input_embeddings().weight.shape[1], "Qwen3VL" in type(part.visual).__name__)
            monkeypatch.setitem(part._modules, "visual", vision)
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, kind, found)
    images = dict(zip(sockets, IMAGES, strict=False))
    links = {socket: ["5", i] for i, socket in enumerate(sockets)}
    return SimpleNamespace(family=family, clip=clip, kind=kind, node=found, values=values, images=images, links=links)


def encoded(case: SimpleNamespace, prompt: str, images: dict[str, Any] | None = None) -> Any:
    """What the node makes of a text."""
    inputs: dict[str, Any] = {name: None if isinstance(v, list) else v for name, v in case.values.items()}
    for name, image in (case.images if images is None else images).items():
        group, _, socket = name.partition(".")
        if socket:
            inputs.setdefault(group, {})[socket] = image
        else:
            inputs[name] = image
    return case.node.execute(clip=case.clip, prompt=prompt, **inputs).args[0]


def graph(case: SimpleNamespace, prompt: str = PROMPT, **mark: Any) -> dict[str, Any]:
    inputs = {"clip": ["1", 0], "prompt": prompt, **case.values, **case.links}
    marking = {"conditioning": ["3", 0], "clip": ["1", 0], "concept": "dog", "text": "", "occurrence": 1, **mark}
    return {
        "2": {"class_type": case.kind, "inputs": inputs},
        "3": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["2", 0], "guidance": 2.0}},
        "9": {"class_type": "ElrondMarkConcept", "inputs": marking},
    }


def run(case: SimpleNamespace, conditioning: Any, prompt: str = PROMPT, concept: str = "dog", **images: Any) -> Any:
    """Mark Concept in that graph."""

    class Prepared(MarkConcept):
        hidden = SimpleNamespace(dynprompt=DynamicPrompt(graph(case, prompt)), unique_id="9")

    return Prepared.execute(conditioning, case.clip, concept, "", 1, **images)


def marked(case: SimpleNamespace, conditioning: Any, prompt: str = PROMPT, concept: str = "dog") -> Any:
    """The CONDITIONING that Mark Concept makes, with its images connected."""
    sockets = {f"2: {name}": image for name, image in case.images.items()}
    return run(case, conditioning, prompt, concept, **sockets).args


def test_another_mark_concept_takes_its_place_with_the_images_connected(case: SimpleNamespace) -> None:
    found = run(case, encoded(case, PROMPT))
    if not case.links:
        assert found.expand is None
        return
    (again,) = found.expand.values()
    sockets = {f"2: {name}": link for name, link in case.links.items()}
    assert again == {"class_type": "ElrondMarkConcept", "inputs": {**graph(case)["9"]["inputs"], **sockets}}
    assert [link[1] for link in found.args] == [0, 1] and {link[0] for link in found.args} == set(found.expand)


@pytest.mark.parametrize("prompt", [PROMPT, "dog", "a (red:1.2) chiaroscuro dog, a dog"])
def test_the_rows_are_those_that_change_with_the_word(case: SimpleNamespace, prompt: str) -> None:
    conditioning = encoded(case, prompt)
    found, report = marked(case, conditioning, prompt)
    assert found[0][0] is conditioning[0][0]
    assert "warning" not in report
    mark = found[0][1][host.MARK]
    (concept,) = mark.concepts
    assert (concept.tokens, mark.prompt) == (("dog",), prompt)
    change = (conditioning[0][0] - encoded(case, prompt.replace("dog", "cat", 1))[0][0])[0].norm(dim=1)
    # No row depends on later tokens: the first one that changes is the word's.
    assert int(change.nonzero()[0]) == concept.rows[0]
    # The words are the prompt's, without instruction and images.
    one, other = (
        set(marked(case, encoded(case, text), text, "dog")[0][0][1][host.MARK].words) for text in ("dog", prompt)
    )
    assert len(one) == 1 and other >= set(concept.rows)
    assert min(other) >= min(one) or prompt == "dog"


def test_a_word_of_several_tokens(case: SimpleNamespace) -> None:
    prompt = "a chiaroscuro dog"
    found, _ = marked(case, encoded(case, prompt), prompt, "chiaroscuro")
    (concept,) = found[0][1][host.MARK].concepts
    assert "".join(concept.tokens) == "chiaroscuro"
    assert list(concept.rows) == list(range(concept.rows[0], concept.rows[0] + len(concept.rows)))


def test_other_images_or_texts_are_not_marked(case: SimpleNamespace) -> None:
    with pytest.raises(ElrondError, match=r"does not have the rows of 'let the dog sit in the park'"):
        marked(case, encoded(case, PROMPT.replace("let", "now")))
    if case.links and case.kind != "TextEncodeZImageOmni":
        # Whose text's rows do not depend on what the images show.
        others = {name: 1 - image for name, image in case.images.items()}
        with pytest.raises(ElrondError, match=r"does not have the rows of"):
            marked(case, encoded(case, PROMPT, others))


# The small network that takes each encoder's rows, and how much larger it is for them.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "QwenImage": ("Qwen-Image, editing", {}),
    "LongCatImage": ("LongCat-Image, editing", {}),
    "Krea2": ("Krea 2", {"txtdim": 32, "txtlayers": 12}),
    "JoyImage": ("JoyImage, editing", {}),
    "Boogu": ("Boogu, editing", {}),
    "MageFlow": ("Mage-Flow, editing", {}),
}


def test_gradients_and_steering(case: SimpleNamespace) -> None:
    """Of the prompt as the node encodes it, in front of a network that reads the images' latents beside it."""
    if case.family not in NETWORKS:
        pytest.skip("the images of this node are read by a part that the host's small networks do not have")
    name, larger = NETWORKS[case.family]
    network = replace(BY_NAME[name], unet={**BY_NAME[name].unet, **larger})
    with torch.inference_mode():
        model = families.build(network)
        plain = encoded(case, PROMPT)
        ((tensor, options),) = marked(case, plain)[0]
        beside = {name: value for name, value in network.options.items() if name == "reference_latents"}
        positive = [[tensor, {**options, **beside}]]
    # An image of a million pixels has 1400 rows. Finite differences along one of them need double precision.
    assert double_error_of(network, model, positive) < 1e-4
    before = picture(network, model, [[plain[0][0], {**plain[0][1], **beside}]])
    change = families.random(len(options[host.MARK].concepts[0].rows), tensor.shape[2], seed=6)
    assert torch.equal(picture(network, model, positive), before)
    assert torch.equal(picture(network, model, steered(positive, 0 * change)), before)
    assert not torch.equal(picture(network, model, steered(positive, change)), before)


def test_what_the_node_says_if_it_fails(case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    conditioning = encoded(case, PROMPT)

    class Broken(case.node):
        @classmethod
        def execute(cls, **_: Any) -> Any:
            raise RuntimeError("no such bucket")

    class Silent(case.node):
        @classmethod
        def execute(cls, **_: Any) -> Any:
            return None

    for kind, sentence in (
        (Broken, "could not be asked for its tokens: no such bucket"),
        (Silent, "without asking the CLIP"),
    ):
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, case.kind, kind)
        with pytest.raises(ElrondError, match=sentence):
            marked(case, conditioning)


def test_a_node_that_names_how_it_encodes_before_it_asks_for_tokens(
    case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = marked(case, encoded(case, PROMPT))[0][0][1][host.MARK]

    class Nested(case.node):
        @classmethod
        def execute(cls, clip: Any, **inputs: Any) -> Any:
            class Clip:
                encode_from_tokens_scheduled = clip.encode_from_tokens_scheduled

                def tokenize(self, *arguments: Any, **options: Any) -> Any:
                    return clip.encode_from_tokens_scheduled(clip.tokenize(*arguments, **options))

            return case.node.execute(clip=Clip(), **inputs)

    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, case.kind, Nested)
    assert marked(case, encoded(case, PROMPT))[0][0][1][host.MARK] == expected


def test_an_encoder_that_drops_rows_after_the_prompt(case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As LongCat-Image's does with the end of its chat template."""
    if case.family != "QwenImage":
        pytest.skip("one encoder of this kind will do")
    expected = marked(case, encoded(case, PROMPT))[0][0][1][host.MARK].concepts
    encoder = case.clip.cond_stage_model
    whole = encoder.encode_token_weights

    def shorter(tokens: Any) -> Any:
        rows, *rest = whole(tokens)
        return rows[:, :-4], *rest

    monkeypatch.setattr(encoder, "encode_token_weights", shorter)
    found, report = marked(case, encoded(case, PROMPT))
    assert found[0][1][host.MARK].concepts == expected
    assert "warning" not in report


def test_the_encoder_is_left_as_it_was(case: SimpleNamespace) -> None:
    marked(case, encoded(case, PROMPT))
    assert not any("preprocess_embed" in vars(part) for part in case.clip.cond_stage_model.modules())


@pytest.fixture
def executor() -> Iterator[Any]:
    """The host's, without a server."""
    server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *_: None, last_prompt_id=None)
    cache = getattr(execution.CacheType, "CLASSIC", False)
    yield execution.PromptExecutor(server, cache_type=cache, cache_args={"lru": 0, "ram": 0.0, "ram_inactive": 0.0})


def test_the_hosts_executor_connects_the_images(
    case: SimpleNamespace, executor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []

    def node(outputs: tuple[str, ...], values: tuple[Any, ...], **inputs: str) -> type:
        class Node:
            RETURN_TYPES = outputs
            FUNCTION = "run"
            OUTPUT_NODE = bool(inputs)

            @classmethod
            def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
                return {"required": {name: (kind,) for name, kind in inputs.items()}}

            def run(self, **given: Any) -> tuple[Any, ...]:
                shown.append(given)
                return values

        return Node

    known = {
        "TestClip": node(("CLIP",), (case.clip,)),
        "TestImages": node(("IMAGE", "IMAGE"), IMAGES),
        "TestVae": node(("VAE", "VAE", "VAE"), (None, None, None)),
        "TestShow": node((), (), conditioning="CONDITIONING", report="STRING"),
        "ElrondMarkConcept": MarkConcept,
        "FluxGuidance": importlib.import_module("comfy_extras.nodes_flux").FluxGuidance,
    }
    for name, kind in known.items():
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, name, kind)
    whole = {
        "1": {"class_type": "TestClip", "inputs": {}},
        "5": {"class_type": "TestImages", "inputs": {}},
        "7": {"class_type": "TestVae", "inputs": {}},
        **graph(case),
        "10": {"class_type": "TestShow", "inputs": {"conditioning": ["9", 0], "report": ["9", 1]}},
    }
    executor.execute(whole, "test", execute_outputs=["10"])
    assert executor.success, executor.status_messages
    result = shown[-1]
    expected, _ = marked(case, encoded(case, PROMPT))
    assert result["conditioning"][0][1][host.MARK] == expected[0][1][host.MARK]
    assert result["report"].startswith(f"entry 1: {PROMPT}\nconcept 'dog': tokens dog, rows [")
