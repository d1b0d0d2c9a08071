"""Sweeping, composing, labelling and measuring, with the host's own objects."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
import numpy as np
import pytest
import torch
from comfyui_elrond.elrond_core.directions import Directions
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.gradients import Gradients
from comfyui_elrond.elrond_core.provenance import Provenance
from comfyui_elrond.elrond_core.storage.format import load_directions
from comfyui_elrond.nodes import host, routes
from PIL import Image

SHIPPED = Path(__file__).parents[2] / "demo" / "directions" / "demo person.safetensors"


@pytest.fixture(scope="module")
def shipped() -> Directions:
    return load_directions(SHIPPED)


def sweep(nodes: dict[str, Any], teacher: SimpleNamespace, directions: Directions, **changes: Any) -> Any:
    settings = {
        "which": "0, 1",
        "lowest": -0.5,
        "highest": 0.5,
        "columns": 3,
        "unit": "token norms",
        "width": 64,
        "height": 64,
        "seed": 3,
        "steps": 2,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "batch_size": 3,
        "cell": 64,
        "concept": "",
        "thumbnails": False,
        **changes,
    }
    with torch.inference_mode():
        node = nodes["ElrondDirectionSweep"]
        return node.execute(
            model=teacher.model, positive=teacher.positive, directions=directions, vae=teacher.vae, **settings
        ).args


def test_a_sweep_starts_every_image_from_the_same_noise(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions
) -> None:
    sheet, images = sweep(nodes, teacher, shipped, thumbnails=True)
    assert images.shape == (6, 64, 64, 3) and sheet.shape[0] == 1 and sheet.shape[2] > 3 * 64
    # The middle column is the plain prompt in both rows; it is what Sample Realizations makes of this seed.
    with torch.inference_mode():
        plain = nodes["ElrondSampleRealizations"].execute(
            teacher.model, teacher.positive, 64, 64, 2, 2, 3, 2, 1.0, "euler", "simple"
        )
        expected = teacher.vae.decode(plain.args[0]["samples"][:1])[0]
    for middle in (images[1], images[4]):
        assert (middle - expected).abs().max() < 1e-3
    assert (images[0] - images[2]).abs().max() > 0.05
    one_by_one, few = sweep(nodes, teacher, shipped, batch_size=1)[1], sweep(nodes, teacher, shipped, which="1")[1]
    assert (one_by_one - images).abs().max() < 1e-2
    assert (few - images[3:]).abs().max() < 1e-2
    with Image.open(routes.thumbnail(shipped.digest(0))) as strip:
        assert strip.size == (192, 64)
        first = np.asarray(strip)[:, :64].astype(np.float32) / 255
    assert np.abs(first - images[0].numpy()).max() < 0.01


def test_a_thumbnail_that_cannot_be_written_does_not_end_the_sweep(
    nodes: dict[str, Any],
    teacher: SimpleNamespace,
    shipped: Directions,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert len(sweep(nodes, teacher, shipped, which="1", thumbnails=True)[1]) == 3
    assert "lack a thumbnail" in caplog.text and "the disk is full" in caplog.text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"which": "0-99"}, "There are no directions 0-99"),
        ({"cfg": 5.0}, "needs a negative prompt"),
        ({"concept": "dog"}, "no marked concept 'dog'"),
    ],
)
def test_sweeps_that_cannot_be(
    nodes: dict[str, Any],
    teacher: SimpleNamespace,
    shipped: Directions,
    changes: dict[str, Any],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "sample", lambda *_, **__: pytest.fail("it sampled before it looked"))
    with pytest.raises(ElrondError, match=sentence):
        sweep(nodes, teacher, shipped, **changes)


def test_impossible_ranges_are_refused_before_the_graph_runs(nodes: dict[str, Any]) -> None:
    for name, bad, sentence in (
        ("DirectionSweep", {"lowest": 1.0, "highest": 1.0}, "from low to high"),
        ("Diversify", {"lowest": 1.0, "highest": 0.5}, "lowest strength 1.0 is above the highest 0.5"),
        ("Diversify", {"start": 0.5, "end": 0.5}, "start before it ends"),
        ("ApplyDirection", {"start": 0.9, "end": 0.5}, "start before it ends"),
        ("ApplyDirection", {"strengths": "red"}, "'red' is not a direction and its strength"),
        ("ComposeDirections", {"weights": "1, x"}, "'x' is not a number"),
        ("ComposeDirections", {"which": "0, 0"}, "Direction 0 is listed twice"),
        ("DirectionSweep", {"which": "first"}, "'first' is not a direction"),
        ("EncodeConcept", {"prompt": "a [person", "concept": ""}, "do not match"),
        ("EncodeConcept", {"prompt": "a person", "concept": " "}, "Name the concept"),
        ("TrainSAE", {"lowest_density": -1.0, "highest_density": -2.0}, "densities must go from low to high"),
        ("LabelDirections", {"words": "red"}, "at least two words"),
        ("FitWords", {"words": "red"}, "at least two words"),
    ):
        check = nodes[f"Elrond{name}"].validate_inputs
        assert sentence in check(**bad), name
        # A value that comes over a wire is not known yet.
        assert check(**dict.fromkeys(bad)) is True


def test_several_strengths_are_a_chain_of_single_ones(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions
) -> None:
    node = nodes["ElrondApplyDirection"]

    def apply(positive: Any, index: int, strength: float, strengths: str = "") -> Any:
        return node.execute(positive, shipped, index, strength, "token norms", 0.0, 1.0, "", strengths).args[0]

    chained = apply(apply(teacher.positive, 0, 0.4), 2, -0.3)
    torch.testing.assert_close(apply(teacher.positive, 7, 9.0, "2: -0.3, 0: 0.4")[0][0], chained[0][0])
    assert torch.equal(apply(teacher.positive, 0, 0.9, "0: 0")[0][0], teacher.positive[0][0])
    with pytest.raises(ElrondError, match="no direction 99"):
        apply(teacher.positive, 0, 0.5, "99: 1")


def test_compose(nodes: dict[str, Any], shipped: Directions) -> None:
    run = nodes["ElrondComposeDirections"].execute
    mixed, report = run(shipped, "weighted sum", "1, 0", "2, 1", "both").args
    assert len(mixed) == 1 and report.startswith("0: both")
    expected = 2 * shipped.vectors[1] + shipped.vectors[0]
    torch.testing.assert_close(mixed.vectors[0], expected / expected.norm())
    some, _ = run(shipped, "subset", "2", "", "", mixed).args
    assert torch.equal(some.vectors[0], shipped.vectors[2])
    straight, _ = run(shipped, "orthogonalise", "0-2", "", "\nsecond").args
    assert straight.names[1] == "second"
    with pytest.raises(ElrondError, match="Weights belong to a weighted sum, not to subset"):
        run(shipped, "subset", "", "1", "")


def rows_with(teacher: SimpleNamespace, word: str) -> torch.Tensor:
    return host.encode(teacher.clip, f"a {word} person")[0][0][0, 3]


def test_labels_of_directions_that_words_make(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    """Directions planted in the demo's own text encoder get their words back."""
    words = ["red", "blue", "large", "small", "left", "right", "dark", "bright"]
    with torch.inference_mode():
        rows = torch.stack([rows_with(teacher, word) for word in words]).clone()
    moves = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)[:, None]
    origin = Provenance("Demo", "a person", "person", ("person",), (2,))
    planted = Directions(moves, torch.ones(8), {"name": "test"}, origin, names=("", "mine", *[""] * 6))
    with torch.inference_mode():
        run = nodes["ElrondLabelDirections"].execute
        named, report = run(teacher.clip, planted, ", ".join(words), 0.1, False, "\n\n\ntiny").args
    lines = report.splitlines()
    for i, word in enumerate(words):
        assert f"+ {word} 1.00" in lines[i]
    assert named.names[0].endswith("→ red") and named.names[1] == "mine" and named.names[3] == "tiny"
    with pytest.raises(ElrondError, match="made for SDXL, but this text encoder is Demo's"):
        run(teacher.clip, replace(planted, provenance=Provenance("SDXL")), "a, b", 0.1, False, "")
    with pytest.raises(ElrondError, match="do not say which concept"):
        run(teacher.clip, replace(planted, provenance=Provenance("Demo")), "a, b", 0.1, False, "")
    with pytest.raises(ElrondError, match="2 names for 1 directions"):
        one = Directions(moves[:1], torch.ones(1), {}, origin)
        run(teacher.clip, one, "a, b", 0.1, False, "x\ny")


@pytest.mark.parametrize(
    ("rows", "place"), [((2, 3), 0), ((6, 7), 1), ((2,), 0), ((6,), 1), ((7,), 1), ((3, 7), 0), ((), 0)]
)
def test_labels_look_at_the_occurrence_the_directions_are_for(
    teacher: SimpleNamespace, rows: tuple[int, ...], place: int
) -> None:
    """All rows of it, or a single one; the first where that is unclear."""
    origin = Provenance("Demo", "a red person and a red person", "red person", rows=rows)
    with torch.inference_mode():
        assert host.span_of(teacher.clip, origin) == ((2, 12), (19, 29))[place]


def test_rows_that_an_encoder_appends_move_no_concept(
    nodes: dict[str, Any], teacher: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> tuple[Any, ...]:
        with torch.inference_mode():
            marked = nodes["ElrondEncodeConcept"].execute(teacher.clip, "a person and a [person]", "", 1).args[0]
            memory = host.marked(marked)[1]
            origin = Provenance("Demo", "a person and a person", "person", rows=memory.concepts[0].rows)
            span = host.span_of(teacher.clip, origin)
            return memory.concepts, memory.words, span, host.rows_of(teacher.clip, origin.prompt, span).tolist()

    expected, usual = found(), teacher.clip.encode_from_tokens_scheduled

    def longer(tokens: Any) -> Any:
        return [[torch.nn.functional.pad(rows, (0, 0, 0, 3)), options] for rows, options in usual(tokens)]

    monkeypatch.setattr(teacher.clip, "encode_from_tokens_scheduled", longer)
    assert found() == expected and expected[2] == (15, 21)


@pytest.fixture(scope="module")
def gradients(nodes: dict[str, Any], teacher: SimpleNamespace) -> Gradients:
    with torch.inference_mode():
        run = nodes["ElrondCollectGradients"].execute
        settings = {"count": 24, "noise_level": 1.0, "batch_size": 8, "seed": 5, "response": True}
        return run(teacher.model, teacher.positive, teacher.realizations, **settings).args[0]


def test_directions_between_words_are_kept_and_steer(
    nodes: dict[str, Any], teacher: SimpleNamespace, gradients: Gradients
) -> None:
    words = [
        "pale",
        "fair",
        "tan",
        "bald",
        "bearded",
        "shaven",
        "smiling",
        "frowning",
        "winking",
        "sleeping",
        "blond",
        "ginger",
    ]
    with torch.inference_mode():
        found, report = nodes["ElrondFitWords"].execute(gradients, teacher.clip, ", ".join(words), 0.0, 3).args
    ends = [name.split(" → ") for name in found.names]
    assert 1 <= len(found) <= 3 and {len(pair) for pair in ends} == {2}
    used = [word for pair in ends for word in pair]
    assert set(used) <= set(words) and len(set(used)) == len(used)
    assert all(words.index(first) < words.index(second) for first, second in ends)
    assert [line.split("  ")[0] for line in report.splitlines()] == [f"{i}: {n}" for i, n in enumerate(found.names)]

    saved = nodes["ElrondSaveDirections"].execute(found, "words", True).args[1]
    loaded = nodes["ElrondLoadDirections"].execute(saved).args[0]
    assert loaded.names == found.names and loaded.natural_std == found.natural_std
    torch.testing.assert_close(loaded.vectors, found.vectors)

    row, plain = teacher.positive[0][1][host.MARK].concepts[0].rows[0], teacher.positive[0][0][0]
    steered = nodes["ElrondApplyDirection"].execute(teacher.positive, loaded, 0, 2.0, "absolute", 0.0, 1.0, "").args[0]
    torch.testing.assert_close(steered[0][0][0, row] - plain[row], 2 * found.vectors[0, 0], rtol=0, atol=1e-5)
    settings = ("token norms", 1, 0, True, 0.0, 1.0, "")
    run = nodes["ElrondDiversify"].execute
    batch, said = run(teacher.positive, loaded, 4, 1, 0.3, 0.6, *settings, how="natural").args
    assert ((batch[0][0][:, row] - plain[row]).norm(dim=1) > 0).all()
    assert all(" in absolute (" in line and found.names[0] in line for line in said.splitlines())


def test_directions_between_words_need_a_response_and_a_text_encoder(
    nodes: dict[str, Any], teacher: SimpleNamespace, gradients: Gradients
) -> None:
    run = nodes["ElrondFitWords"].execute
    with torch.inference_mode():
        with pytest.raises(ElrondError, match="without the model's response"):
            run(replace(gradients, probes=gradients.probes[:0]), teacher.clip, "red, blue", 0.0, 3)
        with pytest.raises(ElrondError, match="The CLIP input is empty"):
            run(gradients, None, "red, blue", 0.0, 3)
        with pytest.raises(ElrondError, match="at least two words"):
            run(gradients, teacher.clip, "red", 0.0, 3)


def test_measure_diversity(nodes: dict[str, Any], encoder: Any) -> None:
    run = nodes["ElrondMeasureDiversity"].execute
    images = torch.rand(5, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    images[4] = images[1] * 0.98
    with torch.inference_mode():
        for vision, how in ((None, "their pixels"), (encoder, "image encoder")):
            distance, vendi, nearest, report, _ = run(images, vision).args
            assert distance > 0 and 1 < vendi < 5 and how in report
            assert torch.equal(nearest, images[[1, 4]])
            same = run(images[:1].repeat(5, 1, 1, 1), vision).args
            assert same[0] == pytest.approx(0, abs=1e-6) and same[1] == pytest.approx(1, abs=1e-5)
    with pytest.raises(ElrondError, match="at least two images in the batch, got 1"):
        run(images[:1])


VISION = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_channels": 3, "patch_size": 14}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "dinov2", "image_size": 518, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False},
        {
            "model_type": "siglip_vision_model",
            "image_size": 28,
            "intermediate_size": 64,
            "hidden_act": "gelu_pytorch_tanh",
        },
    ],
    ids=["DINOv2", "SigLIP"],
)
def test_diversity_by_other_image_encoders(nodes: dict[str, Any], tmp_path: Path, config: dict[str, Any]) -> None:
    import comfy.clip_vision

    path = tmp_path / "config.json"
    path.write_text(json.dumps(VISION | config))
    encoder = comfy.clip_vision.ClipVisionModel(str(path))
    g = torch.Generator().manual_seed(0)
    encoder.load_sd({k: 0.2 * torch.randn(v.shape, generator=g) for k, v in encoder.get_sd().items()})
    images = torch.rand(4, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    images[3] = images[1] * 0.99
    with torch.inference_mode():
        assert host.image_features(encoder, images, batch_size=3).shape == (4, 32)
        distance, vendi, nearest, report, alignment = nodes["ElrondMeasureDiversity"].execute(images, encoder).args
    assert distance > 0 and 1 < vendi < 4 and alignment == 0
    assert torch.equal(nearest, images[[1, 3]]) and "image encoder" in report


def test_alignment_with_a_text(nodes: dict[str, Any], encoder: Any) -> None:
    """Images are measured against a text whose features are planted to be those of the first."""
    node = nodes["ElrondMeasureDiversity"]
    images = torch.rand(5, 32, 32, 3, generator=torch.Generator().manual_seed(0))

    def clip(features: Any) -> SimpleNamespace:
        encoded = [[torch.zeros(1, 4, 24), {"pooled_output": features}]]
        return SimpleNamespace(tokenize=lambda text: text, encode_from_tokens_scheduled=lambda tokens: encoded)

    with torch.inference_mode():
        seen = host.image_features(encoder, images)
        *_, report, alignment = node.execute(images, encoder, "a dog", clip(3 * seen[:1])).args
        cosines = torch.nn.functional.cosine_similarity(seen, seen[:1])
        assert alignment == pytest.approx(float(cosines.mean()), abs=1e-6)
        assert f"least aligned: image {int(cosines.argmin())}, " in report
        for text, vision, made, sentence in (
            ("a dog", encoder, clip(None), "says nothing of a text as a whole"),
            ("a dog", encoder, clip(torch.ones(1, 7)), "makes 24 numbers and the text encoder 7"),
            ("a dog", None, clip(seen[:1]), "connect clip_vision and clip"),
            ("a dog", encoder, None, "connect clip_vision and clip"),
        ):
            with pytest.raises(ElrondError, match=sentence):
                node.execute(images, vision, text, made)
        assert node.execute(images, encoder, " ", None).args[4] == 0
    assert "connect clip_vision and clip" in node.validate_inputs("a dog", None)
    assert node.validate_inputs("a dog", None, None) is True
    assert node.validate_inputs("") is True


def test_guidance_and_pairs_of_inputs_are_checked_before_the_graph_runs(nodes: dict[str, Any]) -> None:
    """To a check an input that is wired is None, and one that is not is left out."""
    for name in ("SampleRealizations", "CollectGradients", "DirectionSweep"):
        check = nodes[f"Elrond{name}"].validate_inputs
        assert "A cfg of 7.0 needs a negative prompt" in check(cfg=7.0)
        assert "between 0 and 100" in check(cfg=-1.0, negative=None)
        assert check(cfg=7.0, negative=None) is check(cfg=1.0) is check(cfg=None) is True
    check = nodes["ElrondCollectGradients"].validate_inputs
    assert "needs both a vae and a clip_vision" in check(vae=None)
    assert check(vae=None, clip_vision=None) is check(more_levels="0.8, 0.6") is True
    assert "more_levels is a list of numbers" in check(more_levels="high")


def test_a_sweep_shows_what_it_samples_and_can_be_cancelled(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    shown: list[Any] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, picture, **_: shown.append(picture))
    sweep(nodes, teacher, shipped)
    assert sum(picture is not None for picture in shown) >= 4
    calls = []

    def stop(done: int, total: int, picture: Any, **_: Any) -> None:
        calls.append(done)
        comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sweep(nodes, teacher, shipped)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["sweep", "realizations"])
def test_one_bar_goes_from_the_first_step_to_the_last_image(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    told: list[tuple[float, float, Any]] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *now, **_: told.append(now))
    if kind == "sweep":
        sweep(nodes, teacher, shipped, batch_size=2)
        per_batch = [2, 1, 2, 1]
    else:
        run = nodes["ElrondSampleRealizations"].execute
        with torch.inference_mode():
            run(teacher.model, teacher.positive, 64, 64, 5, 2, 91, 2, 1.0, "euler", "simple")
        per_batch = [2, 2, 1]
    expected, done = [], 0
    for some in per_batch:
        expected += [done + some / 2, done + some, done + some]
        done += some
    assert [now for now, _, _ in told] == expected and {total for _, total, _ in told} == {done}
    # Both steps of a batch show a picture, and its end does not.
    assert [picture is not None for _, _, picture in told] == [True, True, False] * len(per_batch)


def test_what_the_panel_is_told_and_changes(nodes: dict[str, Any], shipped: Directions) -> None:
    nodes["ElrondSaveDirections"].execute(shipped, "animals/panel", True)
    routes.change("animals/panel", 1, " round ", None)
    routes.change("animals/panel", 0, None, True)
    told = routes.describe("animals/panel")["directions"]
    assert [entry["label"] for entry in told[:2]] == [shipped.names[0], "round"]
    assert [entry["star"] for entry in told[:2]] == [True, False]
    for name, index, label, sentence in (
        ("../../evil", 0, "x", "cannot be a file name"),
        ("no such", 0, "x", "There is no directions file"),
        ("animals/panel", 99, "x", "There is no direction 99"),
        ("animals/panel", 0, "x" * 101, "at most 100"),
        ("animals/panel", 0, "a\nb", "printable"),
    ):
        with pytest.raises(ElrondError, match=sentence):
            routes.change(name, index, label, None)
    with pytest.raises(ElrondError, match="24 hexadecimal"):
        routes.thumbnail("../../../secret")


@pytest.mark.parametrize("label", ["👩‍🚀 astronaut", "❤️‍🔥", "می‌خواهم", "ක්‍ෂ"])
def test_names_may_be_joined(nodes: dict[str, Any], shipped: Directions, label: str) -> None:
    """Emoji and scripts that need a joiner."""
    nodes["ElrondSaveDirections"].execute(shipped, "joined", True)
    routes.change("joined", 0, label, None)
    assert routes.describe("joined")["directions"][0]["label"] == label


@pytest.mark.parametrize("label", ["\u200d", "a \u200db", "a\u200d\u200db", "\u202egpj", "a\u2066b"])
def test_names_that_cannot_be_seen_are_refused(nodes: dict[str, Any], shipped: Directions, label: str) -> None:
    nodes["ElrondSaveDirections"].execute(shipped, "joined", True)
    with pytest.raises(ElrondError, match="joiners may stand behind others"):
        routes.change("joined", 0, label, None)


def test_the_length_of_a_step_is_that_of_its_sum(nodes: dict[str, Any], shipped: Directions) -> None:
    nodes["ElrondSaveDirections"].execute(shipped, "long", True)
    expected = float((0.5 * shipped.vectors[0] - 0.25 * shipped.vectors[1]).norm())
    assert routes.length("long", "0: 0.5, 1: -0.25 @ 0-0.5") == pytest.approx(expected)
    assert routes.length("long", "0: -0.5") == pytest.approx(0.5)
    assert routes.length("long", "") == 0
    for text, sentence in (("99: 1", "no direction 99"), ("red", "'red' is not a direction")):
        with pytest.raises(ElrondError, match=sentence):
            routes.length("long", text)


def test_a_shipped_file_is_copied_before_it_is_changed(nodes: dict[str, Any]) -> None:
    before = SHIPPED.read_bytes()
    routes.change("demo person", 0, "mine", None)
    assert SHIPPED.read_bytes() == before
    assert routes.describe("demo person")["directions"][0]["label"] == "mine"
    (host.output_folder() / "directions" / "demo person.safetensors").unlink()


def test_diversify_leaves_masks_and_other_prompts_alone(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions
) -> None:
    tensor, options = teacher.positive[0]
    mask = torch.ones(1, 64, 64)
    stock = [torch.zeros_like(tensor), {"pooled_output": None}]
    settings = {"lowest": 0.2, "highest": 0.4, "unit": "token norms", "mix": 1, "leading": 3, "both_signs": True}
    out, report = (
        nodes["ElrondDiversify"]
        .execute(
            conditioning=[[tensor, {**options, "mask": mask, "strength": 0.7}], stock],
            directions=shipped,
            count=4,
            seed=1,
            **settings,
            start=0.0,
            end=0.3,
            concept="",
            how="spread",
            weights="by score",
        )
        .args
    )
    early, late, other = out
    assert other is stock or (torch.equal(other[0], stock[0]) and other[1] == stock[1])
    for rows, kept in (early, late):
        assert len(rows) == 4 and kept["mask"] is mask and kept["strength"] == 0.7
    assert early[1]["end_percent"] == 0.3 and late[1]["start_percent"] == pytest.approx(0.3, abs=1e-4)
    assert not torch.equal(early[0][0], early[0][1]) and torch.equal(late[0], tensor.expand(4, -1, -1))
    assert [line.count(": ") for line in report.splitlines()] == [4] * 4
