"""Lists of opposites as people type them, and those that come with the pack."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import pytest
import torch
from comfyui_elrond.elrond_core.decompose.contrasts import displacements
from comfyui_elrond.elrond_core.decompose.phrasings import phrasings
from comfyui_elrond.elrond_core.directions import Directions
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.gradients import Gradients
from comfyui_elrond.elrond_core.provenance import Provenance
from comfyui_elrond.nodes import host
from comfyui_elrond.nodes.contrasts import BUILT_IN, contrasts_of, guessable, reference


def read(text: str, built_in: str = "when empty") -> list[tuple[str, str]]:
    return [(contrast.negative, contrast.positive) for contrast in contrasts_of(text, built_in)]


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("dark - bright, narrow-waisted -  wide", [("dark", "bright"), ("narrow-waisted", "wide")]),
        ("dark -bright\nnarrow- wide", [("dark", "bright"), ("narrow", "wide")]),
        ("in  red clothes \u2013 in blue\tclothes; furry,,", [("in red clothes", "in blue clothes"), ("", "furry")]),
        ("dark \u2192 bright, a->b", [("dark", "bright"), ("a", "b")]),
        ("dark - bright, Dark - Bright, furry, furry", [("dark", "bright"), ("", "furry")]),
    ],
)
def test_lists_of_opposites(text: str, pairs: list[tuple[str, str]]) -> None:
    assert read(text) == pairs


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("dark - bright - grey", "'dark - bright - grey' has more than two sides; write opposites as in dark - bright"),
        ("dark -", "'dark -' has a side without a word"),
        ("- bright", "'- bright' has a side without a word"),
        ("furry, !", "'!' has a side without a word"),
        ("dark - Dark", "'dark - Dark' has the same words on both sides"),
        ("dark - bright, bright - dark", "dark - bright and bright - dark, which is the same the other way round"),
        ("dark\0 - bright", "a character that is no text"),
    ],
)
def test_lines_that_say_nothing_clear(text: str, sentence: str) -> None:
    with pytest.raises(ElrondError, match=sentence):
        contrasts_of(text)


def test_the_packs_own_opposites() -> None:
    """About sixty, in four groups; each is there once, and has two sides."""
    assert list(BUILT_IN) == ["people", "things", "places", "pictures"]
    everything = reference()
    assert 50 <= len(everything) <= 70 and all(contrast.negative for contrast in everything)
    assert (
        contrasts_of("", "all")
        == contrasts_of(" \n", "when empty")
        == contrasts_of("")
        == list(dict.fromkeys(everything))
    )
    people = contrasts_of("", "people")
    assert 10 <= len(people) < 20 and people == everything[: len(people)]
    assert read("furry", "places")[0] == ("", "furry") and len(read("furry", "places")) > 10
    assert read("furry") == [("", "furry")]


def test_words_whose_opposites_are_guessed() -> None:
    assert guessable("dark - bright, long-haired") == ["dark", "bright", "long-haired"]
    assert len(guessable("")) > 60
    with pytest.raises(ElrondError, match="at least two words"):
        guessable("red")


ORIGIN = Provenance("Demo", "a thing", "thing", ("thing",), (2,), latent_values=1024)
TOLD = "red - blue, small - large, left - right, dark - bright"
PHRASES = [phrase for contrast in contrasts_of(TOLD) for phrase in contrast.phrases]


@pytest.fixture
def clip(teacher: SimpleNamespace) -> Any:
    """A text encoder that has read nothing yet."""
    return teacher.clip.clone()


def counted(monkeypatch: pytest.MonkeyPatch, clip: Any) -> list[int]:
    """How many chunks the encoder has encoded each time."""
    calls: list[int] = []
    encode = clip.encode_from_tokens_scheduled

    def count(tokens: Any) -> Any:
        encoded = encode(tokens)
        calls.append(len(next(iter(tokens.values()))))
        return encoded

    monkeypatch.setattr(clip, "encode_from_tokens_scheduled", count)
    return calls


def alone(clip: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The rows of every phrasing, encoded by itself."""
    span = host.span_of(clip, ORIGIN)
    return {
        phrase: {
            name: host.rows_of(clip, *phrasing) for name, phrasing in phrasings(ORIGIN.prompt, span, phrase).items()
        }
        for phrase in PHRASES
    }


@torch.inference_mode()
def test_phrasings_are_encoded_together_once(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(clip)
    calls = counted(monkeypatch, clip)
    rows = host.rows_with_phrases(clip, ORIGIN, PHRASES)
    assert rows.phrased.keys() == expected.keys()
    for phrase, by_name in expected.items():
        assert list(rows.phrased[phrase]) == list(by_name)
        for name, row in by_name.items():
            torch.testing.assert_close(rows.phrased[phrase][name], row, rtol=1e-4, atol=1e-5)
    assert sum(calls) >= 5 * len(PHRASES) and len(calls) < 5 * len(PHRASES) / 2
    calls.clear()
    again = host.rows_with_phrases(clip, ORIGIN, PHRASES[::-1])
    # To find the concept's place, the prompt is encoded.
    assert calls == [1] and torch.equal(again.phrased["red"]["noun"], rows.phrased["red"]["noun"])


@torch.inference_mode()
def test_an_encoder_that_takes_one_prompt_at_a_time_gives_the_same(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(clip)
    encode = clip.encode_from_tokens_scheduled

    def one(tokens: Any) -> Any:
        if len(next(iter(tokens.values()))) > 1:
            raise IndexError("one prompt only")
        return encode(tokens)

    def mixed(tokens: Any) -> Any:
        rows = encode(tokens)
        # As an encoder whose prompts see each other.
        rows[0][0] = rows[0][0] + (len(next(iter(tokens.values()))) > 1)
        return rows

    for way in (one, mixed):
        fresh = clip.clone()
        monkeypatch.setattr(fresh, "encode_from_tokens_scheduled", way)
        rows = host.rows_with_phrases(fresh, ORIGIN, PHRASES)
        for phrase, by_name in expected.items():
            for name, row in by_name.items():
                assert torch.equal(rows.phrased[phrase][name], row)


@torch.inference_mode()
def test_cancelling_loses_nothing_that_was_encoded(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = counted(monkeypatch, clip)
    host.rows_with_phrases(clip, ORIGIN, PHRASES)
    fresh = clip.clone()
    calls = counted(monkeypatch, fresh)

    class CancelledError(Exception):
        pass

    def cancelled() -> None:
        if sum(calls) > 20:
            raise CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", cancelled)
        with pytest.raises(CancelledError):
            host.rows_with_phrases(fresh, ORIGIN, PHRASES)
    assert 20 < sum(calls) < sum(whole)
    host.rows_with_phrases(fresh, ORIGIN, PHRASES)
    # Beside what was left: the prompt, and two prompts to see that they can be joined.
    assert sum(calls) < sum(whole) + 6


@pytest.fixture(scope="module")
def gradients(nodes: dict[str, Any], teacher: SimpleNamespace) -> Gradients:
    with torch.inference_mode():
        run = nodes["ElrondCollectGradients"].execute
        settings = {"count": 24, "noise_level": 1.0, "batch_size": 8, "seed": 5, "response": True}
        return run(teacher.model, teacher.positive, teacher.realizations, **settings).args[0]


@torch.inference_mode()
def test_opposites_that_are_told_become_directions_that_steer(
    nodes: dict[str, Any], teacher: SimpleNamespace, gradients: Gradients
) -> None:
    run = nodes["ElrondFitWords"].execute
    found, report = run(gradients, teacher.clip, TOLD, 0.0, 3, "told", "when empty").args
    names = [contrast.name for contrast in contrasts_of(TOLD)]
    assert len(found) == 3 and set(found.names) < set(names) and len(found.natural_std) == 3
    lines = report.splitlines()
    assert len(lines) == 4 and all(name in line for name, line in zip(found.names, lines, strict=False))
    missing = next(name for name in names if name not in found.names)
    assert lines[3] == f"left out: {missing}: there are 3 directions already"

    place = found.names.index("red → blue") if "red → blue" in found.names else 0
    negative, positive = found.names[place].split(" → ")
    bare = host.rows_with_phrases(teacher.clip, gradients.provenance, [negative, positive])
    step = bare.phrased[positive]["noun"][0] - bare.phrased[negative]["noun"][0]
    assert torch.nn.functional.cosine_similarity(step, found.vectors[place, 0], dim=0) > 0.3

    saved = nodes["ElrondSaveDirections"].execute(found, "contrasts", True).args[1]
    loaded = nodes["ElrondLoadDirections"].execute(saved).args[0]
    assert (loaded.names, loaded.natural_std, loaded.method) == (found.names, found.natural_std, found.method)
    row, plain = teacher.positive[0][1][host.MARK].concepts[0].rows[0], teacher.positive[0][0][0]
    steered = nodes["ElrondApplyDirection"].execute(teacher.positive, loaded, 0, 2.0, "absolute", 0.0, 1.0, "").args[0]
    torch.testing.assert_close(steered[0][0][0, row] - plain[row], 2 * found.vectors[0, 0], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_what_cannot_be_fitted_is_refused_before_anything_is_encoded(
    nodes: dict[str, Any], clip: Any, gradients: Gradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch, clip)
    run = nodes["ElrondFitWords"].execute
    told = ("told", "when empty")
    with pytest.raises(ElrondError, match="without the model's response"):
        run(replace(gradients, probes=gradients.probes[:0]), clip, TOLD, 1.0, 3, *told)
    with pytest.raises(ElrondError, match="a side without a word"):
        run(gradients, clip, "dark -", 1.0, 3, *told)
    with pytest.raises(ElrondError, match="The CLIP input is empty"):
        run(gradients, None, TOLD, 1.0, 3, *told)
    assert calls == []
    for name in ("FitWords", "LabelDirections"):
        check = nodes[f"Elrond{name}"].validate_inputs
        assert "a side without a word" in check("dark -", "told", "when empty")
        assert check("dark", "told", "when empty") is check("", "told", "people") is True
        # A value that comes over a wire is not known yet.
        assert check(None, "told", None) is check("dark -", None, "all") is True


@torch.inference_mode()
def test_directions_are_labelled_by_the_opposites_they_follow(
    nodes: dict[str, Any], teacher: SimpleNamespace, gradients: Gradients
) -> None:
    """Directions planted in the demo's own text encoder get their opposites back, whatever the metric."""
    run = nodes["ElrondLabelDirections"].execute
    contrasts = contrasts_of(TOLD)
    rows = host.rows_with_phrases(teacher.clip, gradients.provenance, PHRASES)
    moves = displacements(rows, contrasts, (1, gradients.vectors.shape[2])).float()
    unit = torch.nn.functional.normalize(moves, dim=1)[:, None]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None]
    planted = Directions(
        unit * signs, torch.ones(4), {"name": "test"}, gradients.provenance, names=("", "mine", "", "")
    )
    expected = ("red → blue", "large → small", "left → right", "bright → dark")
    for metric in (None, gradients, replace(gradients, probes=gradients.probes[:0])):
        labelled, report = run(teacher.clip, planted, TOLD, 0.1, True, "\n\n\ntiny", "told", "when empty", metric).args
        assert labelled.names == (*expected[:3], "tiny")
        assert all(f"{name} 1.00" in line for name, line in zip(expected, report.splitlines(), strict=True))
    kept = run(teacher.clip, planted, TOLD, 0.1, False, "", "told", "when empty").args[0]
    assert kept.names == (expected[0], "mine", *expected[2:])
    with pytest.raises(ElrondError, match="connect the gradients that the directions are of"):
        other = replace(gradients, provenance=gradients.provenance.with_(prompt="a red thing"))
        run(teacher.clip, planted, TOLD, 0.1, True, "", "told", "when empty", other)


@torch.inference_mode()
def test_words_alone_need_no_opposite(nodes: dict[str, Any], teacher: SimpleNamespace, gradients: Gradients) -> None:
    run = nodes["ElrondFitWords"].execute
    found, _ = run(gradients, teacher.clip, "red, square", 0.0, 3, "told").args
    assert set(found.names) == {"→ red", "→ square"}
    guessed, _ = run(gradients, teacher.clip, "red, blue, small, large", 0.0, 1).args
    assert len(guessed.names[0].split(" → ")) == 2 and guessed.method["name"] == "words"
