"""The other nodes in process: encoding, sampling, steering, files."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import folder_paths
import pytest
import torch
from comfyui_elrond.elrond_core.directions import Directions
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.provenance import Provenance
from comfyui_elrond.nodes import host

# isort: split
sys.path.append(str(Path(__file__).parent))

from sampling import sample


def directions(width: int = 128, family: str = "Demo", count: int = 3) -> Directions:
    vectors = torch.nn.functional.normalize(torch.randn(count, 1, width, generator=torch.manual_seed(0)), dim=2)
    scores = torch.arange(count, 0, -1).float()
    return Directions(vectors, scores, {"name": "test"}, Provenance(family, concept="person"))


def picture(teacher: SimpleNamespace, positive: Any, count: int = 1, **part: Any) -> torch.Tensor:
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1)).repeat(count, 1, 1, 1)
    return sample(teacher.model, positive, noise, 4, **part)


def encode(nodes: dict[str, Any], teacher: SimpleNamespace, prompt: str, concept: str = "", which: int = 1) -> Any:
    return nodes["ElrondEncodeConcept"].execute(teacher.clip, prompt, concept, which).args


def apply(nodes: dict[str, Any], positive: Any, strength: float, **changes: Any) -> Any:
    settings = {"index": 0, "unit": "token norms", "start": 0.0, "end": 1.0, "concept": "", **changes}
    found = settings.pop("directions", None) or directions()
    return (
        nodes["ElrondApplyDirection"]
        .execute(conditioning=positive, directions=found, strength=strength, **settings)
        .args[0]
    )


def test_encode_concept_is_the_stock_conditioning(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    marked, report = encode(nodes, teacher, "a red [lady]")
    stock = host.encode(teacher.clip, "a red lady")
    assert torch.equal(marked[0][0], stock[0][0])
    assert "rows [3]" in report
    # Causal encoder: another noun changes no row before the concept's, and that one most of all.
    other = host.encode(teacher.clip, "a red box")[0][0]
    change = (other - stock[0][0])[0].norm(dim=1)
    assert (change[:3] == 0).all() and change.argmax() == 3


@pytest.mark.parametrize(
    ("prompt", "concept", "which", "rows"),
    [
        ("a chiaroscuro [lady]", "", 1, [6]),
        ("a lady and a lady", "lady", 2, [5]),
        ("a Lady, on a box.", "lady", 1, [2]),
        ("a red ball", "red ball", 1, [2, 3]),
        ("a (lady:1.3) here", "lady", 1, [2]),
    ],
)
def test_rows_of_awkward_words(
    nodes: dict[str, Any], teacher: SimpleNamespace, prompt: str, concept: str, which: int, rows: list[int]
) -> None:
    marked, _ = encode(nodes, teacher, prompt, concept, which)
    assert list(host.marked(marked)[1].concepts[0].rows) == rows


@pytest.mark.parametrize(
    ("prompt", "concept", "sentence"),
    [
        ("a red ball", "dog", "'dog' is not in the prompt 'a red ball'"),
        ("a red ball", "", "Name the concept"),
        ("a [red ball", "", "brackets"),
        ("a [] ball", "", "empty brackets"),
    ],
)
def test_encode_concept_refuses(
    nodes: dict[str, Any], teacher: SimpleNamespace, prompt: str, concept: str, sentence: str
) -> None:
    with pytest.raises(ElrondError, match=sentence):
        encode(nodes, teacher, prompt, concept)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "lcm"])
def test_a_realization_depends_on_seed_and_index_only(
    nodes: dict[str, Any], teacher: SimpleNamespace, sampler: str
) -> None:
    def sample(batch: int) -> torch.Tensor:
        node = nodes["ElrondSampleRealizations"]
        with torch.inference_mode():
            return node.execute(teacher.model, teacher.positive, 64, 64, 5, batch, 3, 4, 1.0, sampler, "simple").args[
                0
            ]["samples"]

    whole, parts = sample(5), sample(2)
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-3)
    assert (whole[0] - whole[1]).abs().max() > 0.1


def test_steering_by_zero_is_bit_identical_and_else_it_is_not(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    plain = picture(teacher, teacher.positive)
    assert torch.equal(picture(teacher, apply(nodes, teacher.positive, 0.0)), plain)
    assert (picture(teacher, apply(nodes, teacher.positive, 0.7)) - plain).abs().max() > 1e-2


def test_steering_moves_the_concepts_rows_only(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    before = teacher.positive[0][0]
    after = apply(nodes, teacher.positive, 0.5)[0][0]
    norm = before[0, 2].norm()
    torch.testing.assert_close(after[0, 2] - before[0, 2], 0.5 * norm * directions().vectors[0, 0], rtol=0, atol=1e-5)
    others = [i for i in range(16) if i != 2]
    assert torch.equal(after[:, others], before[:, others])


def test_directions_chain_and_commute(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    def both(first: int, second: int) -> torch.Tensor:
        once = apply(nodes, teacher.positive, 0.3, index=first)
        return apply(nodes, once, 0.3, index=second)[0][0]

    torch.testing.assert_close(both(0, 1), both(1, 0))


def test_steering_part_of_the_sampling(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    plain = picture(teacher, teacher.positive)
    whole = picture(teacher, apply(nodes, teacher.positive, 0.7))
    early = picture(teacher, apply(nodes, teacher.positive, 0.7, end=0.5))
    late = picture(teacher, apply(nodes, teacher.positive, 0.7, start=0.5))
    for one in (early, late):
        assert (one - plain).abs().max() > 1e-4 and (one - whole).abs().max() > 1e-4
    # Ranges that meet cover the sampling once: steering early, then late by the same amount, is steering throughout.
    halves = apply(nodes, apply(nodes, teacher.positive, 0.7, end=0.5), 0.7, start=0.5)
    torch.testing.assert_close(picture(teacher, halves), whole)


def test_another_direction_for_each_part_of_the_sampling(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    """One chain is what two samplers make that take over from each other half way."""
    early, late = (apply(nodes, teacher.positive, 0.7, index=index) for index in (0, 1))
    chained = apply(nodes, apply(nodes, teacher.positive, 0.7, end=0.4), 0.7, index=1, start=0.4)
    first = picture(teacher, early, end=2)
    torch.testing.assert_close(picture(teacher, chained), picture(teacher, late, start=2, latents=first))


def test_concepts_of_one_prompt_are_steered_independently(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    both, _ = encode(nodes, teacher, "a [lady] a [box] a [lady]")
    norms = both[0][0][0].norm(dim=1)
    steered = apply(nodes, both, 0.5, concept="lady")
    steered = apply(nodes, steered, -0.4, index=1, concept="Box")
    steered = apply(nodes, steered, 0.3, index=2, concept="lady #2")
    moved = (steered[0][0] - both[0][0])[0]
    expected = torch.zeros_like(moved)
    for row, amount, index in ((2, 0.5, 0), (4, -0.4, 1), (6, 0.3, 2)):
        expected[row] = amount * norms[row] * directions().vectors[index, 0]
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)
    assert (picture(teacher, steered) - picture(teacher, both)).abs().max() > 1e-2
    with pytest.raises(ElrondError, match="no marked concept 'lady #3'; it has 'lady', 'box', 'lady'"):
        apply(nodes, both, 0.5, concept="lady #3")


def test_prompts_with_regions_of_their_own_are_diversified_one_by_one(
    nodes: dict[str, Any], teacher: SimpleNamespace
) -> None:
    import nodes as stock

    def beside(left: Any, right: Any) -> Any:
        half = torch.zeros(1, 64, 64)
        half[:, :, :32] = 1
        masked = [
            stock.ConditioningSetMask().append(entries, mask, "default", 1.0)[0]
            for entries, mask in ((left, half), (right, 1 - half))
        ]
        return stock.ConditioningCombine().combine(*masked)[0]

    def estimate(positive: Any) -> torch.Tensor:
        noise = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(1))
        return sample(teacher.model, positive, noise, 1)

    ball, box = (encode(nodes, teacher, f"a [{word}]")[0] for word in ("lady", "box"))
    run = nodes["ElrondDiversify"].execute
    settings = ("token norms", 2, 0, True, 0.0, 1.0, "")
    one, other, both = (
        run(positive, directions(), 3, 1, 0.3, 0.6, *settings).args[0] for positive in (ball, box, beside(ball, box))
    )
    assert len(both) == 2
    found = estimate(both)
    torch.testing.assert_close(found[..., :4], estimate(one)[..., :4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[..., 4:], estimate(other)[..., 4:], rtol=1e-4, atol=1e-4)
    assert (found - estimate(beside(ball, box))).abs().amax((1, 2, 3)).min() > 1e-2


@pytest.mark.parametrize(
    ("how", "mix", "unit"), [("random", 3, "token norms"), ("spread", 1, "absolute"), ("natural", 1, "token norms")]
)
def test_a_batch_may_have_steps_of_one_length(
    nodes: dict[str, Any], teacher: SimpleNamespace, how: str, mix: int, unit: str
) -> None:
    """In the unit that is chosen, along directions that are aslant of each other."""
    slanted = torch.nn.functional.normalize(directions().vectors + 0.5 * directions().vectors[:1], dim=2)
    known = replace(directions(), vectors=slanted, natural_std=(3.0, 2.0, 1.0))
    run = nodes["ElrondDiversify"].execute
    settings = (teacher.positive, known, 6, 5, 0.3, 0.6, unit, mix, 0, True, 0.0, 1.0, "", how)
    drawn, fixed = (run(*settings, total=total).args[0][0][0] for total in (0.0, 0.7))
    row = teacher.positive[0][1]["elrond"].concepts[0].rows[0]
    still = teacher.positive[0][0][0, row]
    lengths = (fixed[:, row] - still).norm(dim=1)
    expected = 0.7 * (still.norm() if unit == "token norms" else 1.0)
    torch.testing.assert_close(
        lengths, expected.expand(6) if how != "spread" else torch.full((6,), 0.7), rtol=1e-3, atol=0
    )
    # The same directions as without: only the length is another.
    cosines = torch.cosine_similarity(fixed[:, row] - still, drawn[:, row] - still)
    torch.testing.assert_close(cosines, torch.ones(6), rtol=1e-4, atol=0)


def test_the_panel_is_sent_what_every_image_got(
    nodes: dict[str, Any], teacher: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = replace(directions(), names=("", "round", ""))
    out = nodes["ElrondDiversify"].execute(
        teacher.positive, known, 3, 5, 0.3, 0.6, "absolute", 2, 0, True, 0.0, 1.0, ""
    )
    lines = [line.partition(": strengths ")[2] for line in out.args[1].splitlines()]
    assert [line.split(" in ")[0] for line in lines] == out.ui["elrond_strengths"]
    assert out.ui["elrond_unit"] == ["absolute"]
    for strengths, summary in zip(out.ui["elrond_strengths"], out.ui["elrond_summaries"], strict=True):
        largest = strengths.partition(":")[0]
        assert summary.startswith({"1": "round "}.get(largest, f"direction {largest} "))
    monkeypatch.setattr(
        sys.modules[nodes["ElrondDiversify"].__module__], "_MOST_SENT", sum(map(len, out.ui["elrond_strengths"][:2]))
    )
    few = nodes["ElrondDiversify"].execute(
        teacher.positive, known, 3, 5, 0.3, 0.6, "absolute", 2, 0, True, 0.0, 1.0, ""
    )
    assert few.ui["elrond_strengths"] == out.ui["elrond_strengths"][:2] and len(few.ui["elrond_summaries"]) == 2


@pytest.mark.parametrize(("how", "mix"), [("random", 1), ("random", 2), ("spread", 1), ("natural", 1)])
def test_the_report_makes_an_image_of_a_batch_again(
    nodes: dict[str, Any], teacher: SimpleNamespace, how: str, mix: int
) -> None:
    known = replace(directions(), natural_std=(3.0, 2.0, 1.0), names=("", "round", ""))
    run = nodes["ElrondDiversify"].execute
    batch, report = run(
        teacher.positive, known, 3, 5, 0.3, 0.6, "token norms", mix, 0, True, 0.0, 1.0, "", how=how
    ).args
    for i, line in enumerate(report.splitlines()):
        found = re.fullmatch(rf"image {i}: strengths (.*) in (token norms|absolute)( \(1 is round\))?", line)
        again = apply(nodes, teacher.positive, 0.0, strengths=found[1], unit=found[2], directions=known)
        torch.testing.assert_close(again[0][0][0], batch[0][0][i], rtol=0, atol=1e-3)
        assert ("1: " in found[1]) == bool(found[3])


def test_diversify_gives_each_image_its_own_step(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    settings = {
        "lowest": 0.3,
        "highest": 0.6,
        "unit": "token norms",
        "mix": 2,
        "leading": 0,
        "both_signs": True,
        "start": 0.0,
        "end": 1.0,
        "concept": "",
    }
    run = nodes["ElrondDiversify"].execute
    four, report = run(conditioning=teacher.positive, directions=directions(), count=4, seed=1, **settings).args
    six, _ = run(conditioning=teacher.positive, directions=directions(), count=6, seed=1, **settings).args
    assert four[0][0].shape == (4, 48, 128) and len(report.splitlines()) == 4
    assert torch.equal(six[0][0][:4], four[0][0])
    moved = (four[0][0] - teacher.positive[0][0])[:, 2].norm(dim=1) / teacher.positive[0][0][0, 2].norm()
    assert (moved > 0.299).all() and (moved < 0.601).all()
    images = picture(teacher, four, count=4)
    assert min(float((images[i] - images[j]).abs().max()) for i in range(4) for j in range(i)) > 1e-2


def test_firing_densities_weigh_what_diversify_draws(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    run, settings = nodes["ElrondDiversify"].execute, ("token norms", 1, 0, True, 0.0, 1.0, "")
    dense = replace(directions(), densities=(0.0, 0.01, 0.0))
    _, report = run(teacher.positive, dense, 8, 1, 0.3, 0.6, *settings, weights="by firing density").args
    assert all(": strengths 1: " in line for line in report.splitlines())
    with pytest.raises(ElrondError, match="no firing densities to weigh them by"):
        run(teacher.positive, directions(), 8, 1, 0.3, 0.6, *settings, weights="by firing density")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"index": 3}, "no direction 3: this set holds 0 to 2"),
        ({"directions": directions(family="SDXL")}, "made for SDXL, but the prompt was encoded for Demo"),
        ({"directions": directions(width=64)}, "64 wide and the conditioning is 128 wide"),
        ({"concept": "dog"}, "no marked concept 'dog'; it has 'person'"),
        ({"start": 0.5, "end": 0.5}, "start before it ends"),
    ],
)
def test_apply_direction_refuses(
    nodes: dict[str, Any], teacher: SimpleNamespace, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ElrondError, match=sentence):
        apply(nodes, teacher.positive, 0.5, **changes)


def test_directions_and_gradients_survive_the_disk(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    saved = nodes["ElrondSaveDirections"].execute(directions(), "animals/cat", False).args[1]
    again = nodes["ElrondSaveDirections"].execute(directions(), "animals/cat", False).args[1]
    assert (saved, again) == ("animals/cat", "animals/cat-2")
    loaded, report = nodes["ElrondLoadDirections"].execute("animals/cat").args
    assert torch.equal(loaded.vectors, directions().vectors) and "person" in report
    assert nodes["ElrondLoadDirections"].validate_inputs("animals/cat") is True
    assert "there are:" in nodes["ElrondLoadDirections"].validate_inputs("animals/dog")
    with pytest.raises(ElrondError):
        nodes["ElrondSaveDirections"].execute(directions(), "../../evil", False)


def test_there_is_a_folder_for_files_once_the_pack_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {"elrond": (["/of/the/user"], set())})
    for _ in range(2):
        importlib.reload(sys.modules["comfyui_elrond.nodes"])
        assert sorted(path.name for path in (tmp_path / "elrond").iterdir()) == ["directions", "gradients"]
    assert host.file_folders()[:2] == [Path("/of/the/user"), tmp_path / "elrond"]


def test_a_models_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = tmp_path / "models"
    full.write_text("")
    monkeypatch.setattr(folder_paths, "models_dir", str(full))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    host.make_folders()
    assert full.read_text() == "" and full / "elrond" in host.file_folders()


def test_the_vae_gives_back_what_it_took(teacher: SimpleNamespace) -> None:
    from demo.portraits import measure
    from demo.portraits.world import compose, draw

    factors = draw(128, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoded = teacher.vae.decode(teacher.vae.encode(compose(factors).movedim(1, -1)))
    measures, images = measure.load(), decoded.clone().movedim(-1, 1)
    assert measures.valid(images).float().mean() >= 0.95
    for name, right in measure.right(factors, measures.measure(images)).items():
        assert right.float().mean() >= 0.95, name


@pytest.mark.parametrize("wrong", [[1], {"a": 1}, 3.5, "text", True], ids=repr)
def test_values_of_another_type_are_no_errors_of_python(nodes: dict[str, Any], wrong: Any) -> None:
    checked = 0
    for node_id, node in nodes.items():
        schema = node.define_schema()
        usual = {entry.id: getattr(entry, "default", None) for entry in schema.inputs}
        names = [name for name in inspect.signature(node.validate_inputs).parameters if name in usual]
        for changed in ([name] for name in names):
            values = {name: wrong if name in changed else usual[name] for name in names}
            answer = node.validate_inputs(**values)
            assert answer is True or (isinstance(answer, str) and answer), (node_id, changed)
            checked += 1
        assert not names or node.validate_inputs(**dict.fromkeys(names, wrong)) is not None
    assert checked > 40


def test_a_new_diversify_works_with_any_directions(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    """Natural steps where they are known, else steps that lie evenly apart, and the report says so."""
    node = nodes["ElrondDiversify"]
    usual = {entry.id: entry.default for entry in node.define_schema().inputs if hasattr(entry, "default")}
    usual = {name: value for name, value in usual.items() if value is not None} | {"count": 8, "seed": 1}
    known = replace(directions(), natural_std=(0.3, 0.2, 0.1))

    def report(given: Directions, **changes: Any) -> list[str]:
        return node.execute(teacher.positive, given, **{**usual, **changes}).args[1].splitlines()

    assert len(report(known)) == 8 and all("in absolute" in line for line in report(known))
    *lines, note = report(directions())
    assert lines == report(directions(), how="spread", lowest=0.3, highest=0.6)
    assert note.startswith("How far the model varies along these directions is not known") and "0.3 to 0.6 long" in note
    # A unit that natural steps did not use does not make the others tiny.
    assert report(directions(), unit="absolute") == [*lines, note]
    assert "0.5 long" in report(directions(), total=0.5)[-1]
