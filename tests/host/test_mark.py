"""Mark Concept behind the host's text encoders and conditioning nodes, in front of small random encoders."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.hooks
import comfy.sdxl_clip
import pytest
import torch
from comfy_execution.graph import DynamicPrompt
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.nodes import host
from comfyui_elrond.nodes.concept import EncodeConcept
from comfyui_elrond.nodes.mark import MarkConcept

# isort: split
sys.path.append(str(Path(__file__).parent))

import families
from test_families import NAMED, error_of, picture, steered
from test_tokenizers import (  # noqa: F401  (fixtures)
    ENCODERS,
    Encoder,
    _each_vocabulary_is_read_once,
    family,
    load,
    usable,
)
from test_tokenizers import clip as small_clip

import nodes as host_nodes

PROMPT = "a photo of a dog in the park"
SDXL_SIZE = {"width": 768, "height": 512, "crop_w": 0, "crop_h": 8, "target_width": 768, "target_height": 512}


def run(node: str, module: str = "", **inputs: Any) -> Any:
    """The CONDITIONING of one of the host's nodes."""
    found = getattr(importlib.import_module(f"comfy_extras.{module}") if module else host_nodes, node)
    if hasattr(found, "define_schema"):
        return found.execute(**inputs).args[0]
    return getattr(found(), found.FUNCTION)(**inputs)[0]


def stock(clip: Any, prompt: str) -> Any:
    return run("CLIPTextEncode", clip=clip, text=prompt)


def marked(clip: Any, conditioning: Any, concept: str = "dog", text: str = PROMPT, occurrence: int = 1) -> Any:
    return MarkConcept.execute(conditioning, clip, concept, text, occurrence).args[0]


def own(clip: Any, prompt: str, concept: str = "", occurrence: int = 1) -> Any:
    """What Encode Concept marks."""
    return EncodeConcept.execute(clip, prompt, concept, occurrence).args[0][0][1][host.MARK]


def rows(conditioning: Any, entry: int = 0) -> list[tuple[str, tuple[int, ...]]]:
    return [(concept.word, concept.rows) for concept in conditioning[entry][1][host.MARK].concepts]


# What Encode Concept takes, with its brackets.
PROMPTS = (
    "a photo of a [dog] in the park",
    "a [chiaroscuro] dog, a [red] ([cat]:1.3)",
    "a [dog], another [dog], and a third [Dog]",
    "([dog]s:0.7) and (birds:1.2)",
    "two lines,\nand a [dog] in the second",
)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_mark_is_encode_concepts_own(family: str, prompt: str) -> None:  # noqa: F811
    clip = load(family)
    plain = prompt.replace("[", "").replace("]", "")
    conditioning = stock(clip, plain)
    found, report = MarkConcept.execute(conditioning, clip, "", prompt, 1).args
    assert found[0][1][host.MARK] == own(clip, prompt)
    assert found[0][0] is conditioning[0][0]
    assert {key: value for key, value in found[0][1].items() if key != host.MARK} == conditioning[0][1]
    assert host.MARK not in conditioning[0][1]
    assert "warning" not in report


@pytest.mark.parametrize("text", ["a photo of a dog in the garden", "a photo of the dog in the park", "a dog, a park"])
def test_another_text_is_not_marked(family: str, text: str) -> None:  # noqa: F811
    clip = load(family)
    with pytest.raises(ElrondError, match=f"does not have the rows of '{text}'"):
        marked(clip, stock(clip, PROMPT), text=text)


def test_the_message_says_where_the_text_differs() -> None:
    clip = load("SD1")
    with pytest.raises(ElrondError, match=r"the first 8 agree, and the next \('garden'\) does not"):
        marked(clip, stock(clip, PROMPT), text="a photo of a dog in the garden")


REFINER = Encoder(
    "SDXLRefiner", comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLRefinerClipModel, {"clip_g": small_clip(48)}
)
# Family, node, its module and its inputs. Where there are several texts, those that make no rows have no dog.
ENCODER_NODES = [
    ("SDXL", "CLIPTextEncodeSDXL", "nodes_clip_sdxl", {"text_g": PROMPT, "text_l": PROMPT, **SDXL_SIZE}),
    ("Flux", "CLIPTextEncodeFlux", "nodes_flux", {"clip_l": "photo, bird", "t5xxl": PROMPT, "guidance": 3.5}),
    ("PixArt", "CLIPTextEncodePixArtAlpha", "nodes_pixart", {"text": PROMPT, "width": 512, "height": 512}),
    ("Hydit", "CLIPTextEncodeHunyuanDiT", "nodes_hunyuan", {"bert": PROMPT, "mt5xl": "a bird"}),
    (
        "HiDream",
        "CLIPTextEncodeHiDream",
        "nodes_hidream",
        {"clip_l": "a", "clip_g": "b", "t5xxl": PROMPT, "llama": "a bird"},
    ),
    (
        "SD3",
        "CLIPTextEncodeSD3",
        "nodes_sd3",
        {"clip_l": PROMPT, "clip_g": PROMPT, "t5xxl": PROMPT, "empty_padding": "none"},
    ),
    ("QwenImage", "TextEncodeQwenImageEdit", "nodes_qwen", {"prompt": PROMPT}),
    ("Kandinsky5", "CLIPTextEncodeKandinsky5", "nodes_kandinsky5", {"clip_l": "a bird", "qwen25_7b": PROMPT}),
    ("ZImage", "TextEncodeZImageOmni", "nodes_zimage", {"prompt": PROMPT, "auto_resize_images": True}),
    ("JoyImage", "TextEncodeJoyImageEdit", "nodes_joyimage", {"prompt": PROMPT}),
    ("Boogu", "TextEncodeBooguEdit", "nodes_boogu", {"prompt": PROMPT, "negative_prompt": "a bird"}),
    ("MageFlow", "TextEncodeMageFlowEdit", "nodes_mage", {"prompt": PROMPT, "width": 64, "height": 64}),
    (
        "SDXLRefiner",
        "CLIPTextEncodeSDXLRefiner",
        "nodes_clip_sdxl",
        {"text": PROMPT, "ascore": 6.0, "width": 768, "height": 512},
    ),
]


@pytest.mark.parametrize(
    ("family", "node", "module", "texts"), ENCODER_NODES, ids=["-".join(case[:2]) for case in ENCODER_NODES]
)
def test_the_hosts_encoders(
    family: str,  # noqa: F811
    node: str,
    module: str,
    texts: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    try:
        getattr(importlib.import_module(f"comfy_extras.{module}"), node)
    except (ImportError, AttributeError):
        pytest.skip(f"this host has no {node}")
    if family == "SDXLRefiner":
        monkeypatch.setitem(ENCODERS, family, REFINER)
    clip = load.__wrapped__(family) if family == "SDXLRefiner" else load(usable(family))
    found = marked(clip, run(node, module, clip=clip, **texts))
    mark, expected = found[0][1][host.MARK], own(clip, PROMPT, "dog")
    assert (mark.concepts, mark.words, mark.prompt) == (expected.concepts, expected.words, PROMPT)
    assert mark.norms == pytest.approx(expected.norms)


def test_lumina_has_an_instruction_before_the_prompt() -> None:
    clip = load(usable("Lumina"))
    for kind in ("superior", "alignment"):
        encoded = run("CLIPTextEncodeLumina2", "nodes_lumina2", clip=clip, user_prompt=PROMPT, system_prompt=kind)
        ((tensor, options),) = marked(clip, encoded)
        ((row,),) = (concept.rows for concept in options[host.MARK].concepts)
        other = PROMPT.replace("dog", "cat")
        change = run("CLIPTextEncodeLumina2", "nodes_lumina2", clip=clip, user_prompt=other, system_prompt=kind)[0][0]
        assert (tensor - change)[0].norm(dim=1).argmax() == row


class TestSideBySide:
    """SDXL's two encoders share the rows, and each may read a text of its own."""

    @staticmethod
    def encoded(clip: Any, text_g: str, text_l: str) -> Any:
        return run("CLIPTextEncodeSDXL", "nodes_clip_sdxl", clip=clip, text_g=text_g, text_l=text_l, **SDXL_SIZE)

    def test_the_concept_in_both_texts(self) -> None:
        clip = load("SDXL")
        encoded = self.encoded(clip, "a dog", "some big dog")
        assert rows(marked(clip, encoded, text="a dog\nsome big dog")) == [("dog", (2, 3))]
        changed = self.encoded(clip, "a cat", "some big cat")
        moved = (encoded[0][0] - changed[0][0])[0].abs()
        assert moved[2, 32:].max() > 0 and moved[3, :32].max() > 0 and moved[:2].max() == 0

    @pytest.mark.parametrize("other", ["", "oil on canvas"])
    def test_the_concept_in_one_of_them(self, other: str) -> None:
        clip = load("SDXL")
        text = f"a dog\n{other}"
        assert rows(marked(clip, self.encoded(clip, "a dog", other), text=text)) == [("dog", (2,))]
        assert rows(marked(clip, self.encoded(clip, other, "a dog"), text=text)) == [("dog", (2,))]

    def test_texts_of_other_lengths(self) -> None:
        clip = load("SDXL")
        long = "very " * 80 + "big dog"
        found = marked(clip, self.encoded(clip, long, "a dog"), text=f"{long}\na dog")
        assert rows(found) == [("dog", (2, 77 + 1 + 6))]
        assert rows(marked(clip, self.encoded(clip, "a dog", long), text=f"{long}\na dog")) == [("dog", (2, 84))]

    def test_both_texts_are_needed(self) -> None:
        clip = load("SDXL")
        with pytest.raises(ElrondError, match="encoder g read 'a dog', and l read another text: give both"):
            marked(clip, self.encoded(clip, "a dog", "oil on canvas"), text="a dog")
        with pytest.raises(ElrondError, match="encoder l read 'a dog', and g read"):
            marked(clip, self.encoded(clip, "oil on canvas", "a dog"), text="a dog\noil on wood")


def test_sd3_with_a_text_for_each_encoder() -> None:
    clip = load("SD3")
    texts = {"clip_l": "a dog", "clip_g": "the dog", "t5xxl": "a photo of a dog", "empty_padding": "none"}
    encoded = run("CLIPTextEncodeSD3", "nodes_sd3", clip=clip, **texts)
    t5 = own(clip, "a photo of a [dog]").concepts[0].rows[1]
    assert rows(marked(clip, encoded, text="a dog\nthe dog\na photo of a dog")) == [("dog", (2, t5))]
    with pytest.raises(ElrondError, match="and t5xxl read another text: give both"):
        marked(clip, encoded, text="a dog\nthe dog")
    assert rows(marked(clip, encoded, "the dog", "a dog\nthe dog\na photo of a dog")) == [("the dog", (1, 2))]
    # T5 alone: its rows come first where the others are left out.
    encoded = run("CLIPTextEncodeSD3", "nodes_sd3", clip=clip, **{**texts, "clip_l": "", "clip_g": ""})
    assert rows(marked(clip, encoded, text="a photo of a dog")) == [("dog", (t5 - 77,))]


def test_rows_after_an_image_that_hardly_changes_them() -> None:
    """They are as many further on as the image has rows. Trained encoders change them more, and nothing is marked."""
    clip = load(usable("HunyuanVideo"))
    vision = SimpleNamespace(mm_projected=families.random(1, 16, 32))
    node = "TextEncodeHunyuanVideo_ImageToVideo"
    after = run(node, "nodes_hunyuan", clip=clip, clip_vision_output=vision, prompt=PROMPT, image_interleave=2)
    alone = stock(clip, PROMPT)
    assert rows(marked(clip, after)) == moved(rows(marked(clip, alone)), after[0][0].shape[1] - alone[0][0].shape[1])


@pytest.fixture(params=["SD1", "SDXL", "SD3", "Flux", "ZImage"])
def clip(request: pytest.FixtureRequest) -> Any:
    return load(usable(request.param))


def control(conditioning: Any) -> Any:
    class Control:
        previous_controlnet = None

        def copy(self) -> Control:
            return Control()

        def set_cond_hint(self, *_: Any, **__: Any) -> Control:
            return self

        def set_previous_controlnet(self, previous: Any) -> None:
            self.previous_controlnet = previous

    image = torch.zeros(1, 8, 8, 3)
    inputs = {"control_net": Control(), "image": image, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    return run("ControlNetApplyAdvanced", positive=conditioning, negative=conditioning, **inputs)


BETWEEN: dict[str, Callable[[Any], Any]] = {
    "ConditioningSetTimestepRange": lambda c: run("ConditioningSetTimestepRange", conditioning=c, start=0.2, end=0.8),
    "ConditioningSetMask": lambda c: run(
        "ConditioningSetMask", conditioning=c, mask=torch.ones(8, 8), strength=1.0, set_cond_area="default"
    ),
    "ConditioningSetArea": lambda c: run(
        "ConditioningSetArea", conditioning=c, width=64, height=64, x=0, y=0, strength=1.0
    ),
    "ConditioningSetProperties": lambda c: run(
        "ConditioningSetProperties", "nodes_hooks", cond_NEW=c, strength=0.9, set_cond_area="default"
    ),
    "hooks": lambda c: run(
        "ConditioningSetProperties",
        "nodes_hooks",
        cond_NEW=c,
        strength=1.0,
        set_cond_area="default",
        hooks=comfy.hooks.HookGroup(),
    ),
    "ControlNetApplyAdvanced": control,
    "CLIPTextEncodeControlnet": lambda c: run(
        "CLIPTextEncodeControlnet", "nodes_cond", clip=load("SD1"), conditioning=c, text="a bird"
    ),
    "FluxGuidance": lambda c: run("FluxGuidance", "nodes_flux", conditioning=c, guidance=2.0),
    "ReferenceLatent": lambda c: run(
        "ReferenceLatent", "nodes_edit_model", conditioning=c, latent={"samples": torch.zeros(1, 16, 8, 8)}
    ),
    "ConditioningAverage at 1": lambda c: run(
        "ConditioningAverage", conditioning_to=c, conditioning_from=c, conditioning_to_strength=1.0
    ),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_nodes_that_leave_the_rows_as_they_are(clip: Any, name: str) -> None:
    """Mark Concept before them and behind them gives the same entries."""
    before, behind = BETWEEN[name](marked(clip, stock(clip, PROMPT))), marked(clip, BETWEEN[name](stock(clip, PROMPT)))
    assert before[0][1][host.MARK] == behind[0][1][host.MARK] == own(clip, PROMPT, "dog")
    assert set(before[0][1]) == set(behind[0][1])
    assert torch.equal(before[0][0], behind[0][0])


def moved(found: Any, by: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(word, tuple(row + by for row in its)) for word, its in found]


def test_concat(clip: Any) -> None:
    """The rows are as many further on as the other prompt has."""
    other = stock(clip, "a cat on a mat")
    alone = rows(marked(clip, stock(clip, PROMPT)))
    first = run("ConditioningConcat", conditioning_to=stock(clip, PROMPT), conditioning_from=other)
    assert rows(marked(clip, first)) == alone
    second = run("ConditioningConcat", conditioning_to=other, conditioning_from=stock(clip, PROMPT))
    assert rows(marked(clip, second)) == moved(alone, other[0][0].shape[1])
    tensor = marked(clip, second)[0][0]
    assert torch.equal(tensor[0, rows(marked(clip, second))[0][1]], stock(clip, PROMPT)[0][0][0, alone[0][1]])
    # The first prompt's mark is the one that stays, and of the second there is none.
    kept = run("ConditioningConcat", conditioning_to=marked(clip, stock(clip, PROMPT)), conditioning_from=other)
    assert rows(kept) == alone
    lost = run("ConditioningConcat", conditioning_to=other, conditioning_from=marked(clip, stock(clip, PROMPT)))
    with pytest.raises(ElrondError, match="Mark Concept"):
        host.marked(lost)


def test_concepts_of_prompts_that_are_joined(clip: Any) -> None:
    texts = ["a big dog", "a cat, a dog"]
    both = run("ConditioningConcat", conditioning_to=stock(clip, texts[0]), conditioning_from=stock(clip, texts[1]))
    first, second = (own(clip, text) for text in ("a big [dog]", "a [cat], a [dog]"))
    shift = stock(clip, texts[0])[0][0].shape[1]
    cat, dog = (tuple(row + shift for row in concept.rows) for concept in second.concepts)
    assert rows(marked(clip, both, "cat", "\n".join(texts))) == [("cat", cat)]
    mark = marked(clip, both, "dog, cat", "\n".join(texts))[0][1][host.MARK]
    place = {name: mark.concepts[mark.index_of(name)].rows for name in ("dog", "dog #2", "cat")}
    assert place == {"dog": first.concepts[0].rows, "dog #2": dog, "cat": cat}


def test_combine_marks_each_entry_by_its_own_text(clip: Any) -> None:
    texts = ["a [dog] in the park", "in the park, a big [dog] and a [cat]", "nothing of the kind"]
    plain = [text.replace("[", "").replace("]", "") for text in texts]
    combined = run("ConditioningCombine", conditioning_1=stock(clip, plain[0]), conditioning_2=stock(clip, plain[1]))
    combined = run("ConditioningCombine", conditioning_1=combined, conditioning_2=stock(clip, plain[2]))
    found, report = MarkConcept.execute(combined, clip, "", "\n".join(texts), 1).args
    assert [found[i][1][host.MARK] for i in range(2)] == [own(clip, text) for text in texts[:2]]
    assert found[2] is combined[2]
    assert "entry 3 is not marked" in report


def test_an_entry_keeps_its_mark_where_the_text_is_another_ones(clip: Any) -> None:
    first = marked(clip, stock(clip, PROMPT))
    combined = run("ConditioningCombine", conditioning_1=first, conditioning_2=stock(clip, "a cat"))
    found = marked(clip, combined, "cat", "a cat")
    assert rows(found) == rows(first) and rows(found, 1) == rows(marked(clip, stock(clip, "a cat"), "cat", "a cat"))


def test_a_prompt_for_each_image(clip: Any) -> None:
    one, two = (stock(clip, text)[0][0] for text in ("a big dog", "a red dog"))
    batch = [[torch.cat([one, one, two]), {}]]
    assert rows(marked(clip, batch, text="a big dog\na red dog")) == rows(marked(clip, [[one, {}]], text="a big dog"))
    with pytest.raises(ElrondError, match="does not have the rows of 'a big dog'"):
        marked(clip, batch, text="a big dog")


def test_images_whose_prompts_have_the_concept_elsewhere() -> None:
    clip = load("SD1")
    batch = [[torch.cat([stock(clip, text)[0][0] for text in ("a dog", "a red dog")]), {}]]
    with pytest.raises(ElrondError, match="2 prompts of one batch have the concept at different rows"):
        marked(clip, batch, text="a dog\na red dog")


@pytest.mark.parametrize("text", ["a (dog:1.3) in the park", "a ((dog)) in the (park:0.5)"])
@pytest.mark.parametrize("name", ["SD1", "SDXL", "SD3", "Flux"])
def test_weights_that_another_pack_applies_to_the_rows(name: str, text: str) -> None:
    """It multiplies the rows of the unweighted prompt, and all of them to keep their mean."""
    clip = load(name)
    ((tensor, options),) = stock(clip, "a dog in the park")
    place = rows(marked(clip, [[tensor, options]], text="a dog in the park"))
    weighted = tensor.clone()
    weighted[:, place[0][1]] *= 1.3
    weighted *= 0.97
    found = marked(clip, [[weighted, options]], text=text)
    assert rows(found) == place
    norm = float(weighted[0, place[0][1]].norm(dim=1).mean())
    assert found[0][1][host.MARK].norms == (pytest.approx(norm),)


def test_a_text_that_another_one_goes_on_from() -> None:
    """Lumina has neither padding nor an end, so that the rows of a text start those of a longer one."""
    clip = load(usable("Lumina"))
    found = marked(clip, stock(clip, PROMPT), text="a photo of a dog\n" + PROMPT)
    assert found[0][1][host.MARK] == own(clip, PROMPT, "dog")
    assert rows(marked(clip, stock(clip, PROMPT), text="a photo of a dog")) == rows(found)


def half_averaged(clip: Any, conditioning: Any) -> Any:
    other = stock(clip, "a cat on a mat")
    return run(
        "ConditioningAverage", conditioning_to=conditioning, conditioning_from=other, conditioning_to_strength=0.5
    )


def test_nodes_that_change_the_rows_are_refused(clip: Any) -> None:
    for change in (
        lambda c: half_averaged(clip, c),
        lambda c: run("ConditioningZeroOut", conditioning=c),
        lambda c: [[t + 0.2 * families.random(*t.shape), o] for t, o in c],
        lambda c: [[-t, o] for t, o in c],
        lambda c: [[t[:, 1:], o] for t, o in c],
        lambda c: [[t.flip(1), o] for t, o in c],
    ):
        with pytest.raises(ElrondError, match=r"put Mark Concept before nodes that change|l read another text"):
            marked(clip, change(stock(clip, PROMPT)))
    # Before it, the mark stays.
    before = marked(clip, stock(clip, PROMPT))
    assert rows(half_averaged(clip, before)) == rows(before)


def test_a_clip_of_another_model_is_refused() -> None:
    with pytest.raises(ElrondError, match=r"rows have 32 numbers and those of this CLIP, SDXL, have 80: connect"):
        marked(load("SDXL"), stock(load("SD1"), PROMPT))
    with pytest.raises(ElrondError, match="CLIP input is empty"):
        marked(None, stock(load("SD1"), PROMPT))


def with_lora(clip: Any) -> Any:
    patched = clip.clone()
    key = next(k for k in patched.patcher.model_state_dict() if k.endswith("mlp.fc1.weight"))
    weight = patched.patcher.model_state_dict()[key]
    patched.add_patches({key: (families.random(*weight.shape, seed=3),)}, 1.0)
    return patched


def test_a_clip_with_a_lora() -> None:
    plain = load("SD1")
    patched = with_lora(plain)
    encoded = stock(patched, PROMPT)
    assert rows(marked(patched, encoded)) == rows(marked(plain, stock(plain, PROMPT)))
    with pytest.raises(ElrondError, match="connect the CLIP that encoded it, with its LoRAs"):
        marked(plain, encoded)
    with pytest.raises(ElrondError, match="connect the CLIP that encoded it, with its LoRAs"):
        marked(patched, stock(plain, PROMPT))


def test_a_clip_that_skips_layers() -> None:
    plain = load("SD1")
    skipped = run("CLIPSetLastLayer", clip=plain, stop_at_clip_layer=-2)
    assert rows(marked(skipped, stock(skipped, PROMPT))) == rows(marked(plain, stock(plain, PROMPT)))
    with pytest.raises(ElrondError, match="connect the CLIP that encoded it"):
        marked(plain, stock(skipped, PROMPT))


def test_a_clip_whose_hooks_have_a_schedule() -> None:
    """It makes an entry for each part of the sampling, with a LoRA of its own strength."""
    plain = load("SD1")
    layer = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    lora = {
        f"text_encoders.{layer}.lora_up.weight": families.random(64, 4, seed=3),
        f"text_encoders.{layer}.lora_down.weight": families.random(4, 32, seed=4),
    }
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 1.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for start, strength in ((0.0, 0.0), (0.5, 1.0)):
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start, guarantee_steps=0))
    hooks.set_keyframes_on_hooks(keyframes)
    hooked = run("SetClipHooks", "nodes_hooks", clip=plain, schedule_clip=True, apply_to_conds=True, hooks=hooks)
    encoded = stock(hooked, PROMPT)
    assert len(encoded) == 2 and not torch.allclose(encoded[0][0], encoded[1][0], rtol=0.1)
    found = marked(hooked, encoded)
    assert rows(found) == rows(found, 1) == rows(marked(plain, stock(plain, PROMPT)))


def test_several_concepts_by_name(clip: Any) -> None:
    found = marked(clip, stock(clip, PROMPT), "park, dog")
    bracketed = own(clip, "a photo of a [dog] in the [park]")
    assert found[0][1][host.MARK].concepts == bracketed.concepts[::-1]
    second = marked(clip, stock(clip, "a dog, a dog"), "dog", "a dog, a dog", 2)
    assert second[0][1][host.MARK] == own(clip, "a dog, a dog", "dog", 2)


@pytest.mark.parametrize(
    ("concept", "text", "sentence"),
    [
        ("", "", "Name the concept: in the concept field, or in"),
        (" , ", "", "Name the concept: in the concept field, or in"),
        ("", PROMPT, "Name the concept: put its word in"),
        ("cat", PROMPT, "'cat' is not in the prompt"),
        ("dog, cat", PROMPT, "'cat' is not in the prompt"),
        ("", "a [dog", "do not match"),
        ("", "a []", "empty brackets"),
        ("dog", "", "No node before Mark Concept holds a text with the concept 'dog'"),
    ],
)
def test_what_can_be_seen_to_be_wrong(concept: str, text: str, sentence: str) -> None:
    if (concept, text) != ("dog", ""):
        answer = MarkConcept.validate_inputs(concept=concept, text=text, occurrence=1)
        assert isinstance(answer, str) and sentence in answer
    with pytest.raises(ElrondError, match=sentence):
        marked(load("SD1"), stock(load("SD1"), PROMPT), concept, text)
    with pytest.raises(ElrondError, match="2 times, so occurrence 3"):
        marked(load("SD1"), stock(load("SD1"), PROMPT), "dog", "a dog, a dog", 3)


@pytest.mark.parametrize(
    ("written", "concept", "text"),
    [
        ("a [dog] in the park", "", "a [dog] in the park"),
        ("a [dog] in the park", "dog", "a dog in the park"),
        ("a big [dog]s, a ([red cat]:1.2)", "", "a big [dog]s, a ([red cat]:1.2)"),
        ("a [dog] in the park", "", "a [cat]\na [dog] in the park"),
    ],
)
def test_a_text_that_was_encoded_with_its_brackets(clip: Any, written: str, concept: str, text: str) -> None:
    with pytest.raises(ElrondError, match=r"encoded with its brackets, as 'a .*\[dog\].*': take the brackets out"):
        marked(clip, stock(clip, written), concept, text)
    # By its name it is found between the brackets.
    found = rows(marked(clip, stock(clip, "a [dog] in the park"), "dog", "a [dog] in the park"))
    assert found == rows(EncodeConcept.execute(clip, "a [dog] in the park", "dog", 1).args[0])


def test_brackets_of_one_of_several_entries_are_named() -> None:
    clip = load("SD1")
    both = [*stock(clip, "a [dog]"), *stock(clip, "a red cat")]
    found, report = MarkConcept.execute(both, clip, "", "a [dog]\na red [cat]", 1).args
    assert rows(found, 1) == [("cat", (3,))] and host.MARK not in found[0][1]
    assert "entry 1 is not marked. The text was encoded with its brackets, as 'a [dog]'" in report


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"concept": 5}, "The concept must be a text, not 5."),
        ({"text": ["a dog"]}, "The text must be a text, not ['a dog']."),
        ({"occurrence": "first"}, "The occurrence must be a whole number from 1 on, not 'first'."),
        ({"occurrence": 0}, "The occurrence must be a whole number from 1 on, not 0."),
    ],
)
def test_values_of_another_type_are_refused(values: dict[str, Any], sentence: str) -> None:
    assert MarkConcept.validate_inputs(**{"concept": "dog", "text": PROMPT, "occurrence": 1, **values}) == sentence


def test_values_that_are_not_known_yet_are_not_refused() -> None:
    assert MarkConcept.validate_inputs(concept="cat", text=None, occurrence=1) is True
    assert MarkConcept.validate_inputs(concept="dog", text=PROMPT, occurrence=1) is True


def test_a_word_without_weight_is_doubted() -> None:
    clip = load("SD1")
    report = MarkConcept.execute(stock(clip, "a (dog:0) here"), clip, "dog", "a (dog:0) here", 1).args[1]
    assert "may have no weight" in report


def graph_node(graph: dict[str, Any]) -> Any:
    """Mark Concept as number 9 of a graph, as the host prepares it."""

    class Prepared(MarkConcept):
        hidden = SimpleNamespace(dynprompt=DynamicPrompt(graph), unique_id="9")

    return Prepared


def test_the_text_is_known_from_the_graph(clip: Any) -> None:
    graph = {
        "1": {"class_type": "LoraLoader", "inputs": {"lora_name": "dog.safetensors", "model": ["0", 0]}},
        "2": {"class_type": "PrimitiveString", "inputs": {"value": PROMPT}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ["2", 0]}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a dog, a cat"}},
        "5": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["3", 0], "conditioning_2": ["4", 0]}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "an unrelated dog"}},
        "9": {"class_type": "ElrondMarkConcept", "inputs": {"conditioning": ["5", 0], "clip": ["1", 1]}},
    }
    combined = stock(clip, PROMPT) + stock(clip, "a dog, a cat")
    found = graph_node(graph).execute(combined, clip, "dog", "", 1).args[0]
    assert [entry[1][host.MARK] for entry in found] == [own(clip, text, "dog") for text in (PROMPT, "a dog, a cat")]
    with pytest.raises(ElrondError, match="No node before Mark Concept holds a text with the concept 'bird'"):
        graph_node(graph).execute(combined, clip, "bird", "", 1)
    with pytest.raises(ElrondError, match="does not have the rows"):
        graph_node(graph).execute(stock(clip, "an unrelated dog"), clip, "dog", "", 1)


def test_both_texts_of_sdxl_are_known_from_the_graph() -> None:
    clip = load("SDXL")
    texts = {"text_g": "a dog", "text_l": "oil on canvas"}
    graph = {
        "3": {"class_type": "CLIPTextEncodeSDXL", "inputs": {**texts, **SDXL_SIZE}},
        "9": {"class_type": "ElrondMarkConcept", "inputs": {"conditioning": ["3", 0]}},
    }
    encoded = run("CLIPTextEncodeSDXL", "nodes_clip_sdxl", clip=clip, **texts, **SDXL_SIZE)
    assert rows(graph_node(graph).execute(encoded, clip, "dog", "", 1).args[0]) == [("dog", (2,))]


def test_the_text_is_known_from_a_mark(clip: Any) -> None:
    before = EncodeConcept.execute(clip, "a [dog] and a cat", "", 1).args[0]
    assert marked(clip, before, "cat", "")[0][1][host.MARK] == own(clip, "a dog and a [cat]")


# Encoders whose rows the small networks of these families take.
GRADIENTS = {
    "SD 1.x": ("SD1", NAMED["SD 1.x"], lambda c: stock(c, PROMPT)),
    "SDXL": (
        "SDXL",
        replace(NAMED["SDXL"], unet={**NAMED["SDXL"].unet, "context_dim": 80, "adm_in_channels": 48 + 6 * 256}),
        lambda c: TestSideBySide.encoded(c, "a dog", "some big dog"),
    ),
    "Flux": (
        "Flux",
        NAMED["Flux dev"],
        lambda c: run("CLIPTextEncodeFlux", "nodes_flux", clip=c, clip_l="a bird", t5xxl=PROMPT, guidance=3.5),
    ),
    "Z-Image, joined": (
        "ZImage",
        NAMED["Z-Image"],
        lambda c: run("ConditioningConcat", conditioning_to=stock(c, "a cat"), conditioning_from=stock(c, PROMPT)),
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_and_steering_of_a_marked_conditioning(name: str) -> None:
    encoder, network, encoded = GRADIENTS[name]
    clip = load(usable(encoder))
    with torch.inference_mode():
        model, plain = families.build(network), encoded(clip)
        positive = marked(clip, plain, text=f"{PROMPT}\na dog\nsome big dog")
    assert error_of(network, model, positive) < 1e-3
    before = picture(network, model, plain)
    count, width = len(positive[0][1][host.MARK].concepts[0].rows), positive[0][0].shape[2]
    change = families.random(count, width, seed=6)
    assert torch.equal(picture(network, model, positive), before)
    assert torch.equal(picture(network, model, steered(positive, 0 * change)), before)
    assert not torch.equal(picture(network, model, steered(positive, change)), before)


def test_one_of_several_rows(clip: Any) -> None:
    text = "a chiaroscuro dog"
    whole = own(clip, text, "chiaroscuro").concepts[0]

    def only(row: int) -> Any:
        return MarkConcept.execute(stock(clip, text), clip, "chiaroscuro", text, 1, row).args[0][0][1][host.MARK]

    for row in range(len(whole.rows)):
        mark = only(row + 1)
        norm = float(stock(clip, text)[0][0][0, whole.rows[row]].norm())
        assert mark.concepts == (whole.only(row),) and mark.norms == (pytest.approx(norm),)
    with pytest.raises(ElrondError, match="and no row 99"):
        only(99)
