"""Finding a concept in images and steering it there only, through the host's own sampling."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfyui_elrond.elrond_core.directions import Directions
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.storage.format import load_directions
from comfyui_elrond.nodes import host

from demo.portraits import measure
from demo.portraits.world import compose

# isort: split
sys.path.append(str(Path(__file__).parent))

import families
from sampling import sample

SHIPPED = Path(__file__).parents[2] / "demo" / "directions" / "demo person.safetensors"
IMAGES = 8
LEFT, TOP = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
LEFT[:, :, :3] = 1
TOP[:, :4] = 1


@pytest.fixture(scope="module")
def shipped() -> Directions:
    return load_directions(SHIPPED)


@pytest.fixture
def apply(nodes: dict[str, Any], shipped: Directions) -> Any:
    def run(positive: Any, index: int, strength: float, mask: Any, start: float = 0.0, end: float = 1.0) -> Any:
        node = nodes["ElrondApplyDirection"]
        return node.execute(positive, shipped, index, strength, "token norms", start, end, "", "", mask).args[0]

    return run


def estimate(teacher: SimpleNamespace, positive: Any, count: int = 2) -> torch.Tensor:
    """One step from pure noise to the end of the schedule: the clean estimate there, as the host combines entries."""
    noise = torch.randn(count, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    return sample(teacher.model, positive, noise, 1)


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_inside_is_steered_and_outside_is_not(teacher: SimpleNamespace, apply: Any) -> None:
    positive = teacher.positive
    plain, steered = (estimate(teacher, p) for p in (positive, apply(positive, 0, 0.5, None)))
    # The expectations below tell nothing unless the direction does something on both sides.
    difference = (steered - plain).abs()
    assert min(float(difference[..., :3].max()), float(difference[..., 3:].max())) > 0.01
    soft = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(2))
    for mask in (LEFT, soft, LEFT[0], LEFT.repeat_interleave(4, 1).repeat_interleave(4, 2)):
        cells = (mask if mask.ndim > 2 else mask[None])[:, None]
        cells = cells if cells.shape[-1] == 8 else cells[..., ::4, ::4]
        check(estimate(teacher, apply(positive, 0, 0.5, mask)), plain + cells * (steered - plain))


def test_masks_compose_with_chains_other_masks_and_entries(teacher: SimpleNamespace, apply: Any) -> None:
    positive = teacher.positive
    plain = estimate(teacher, positive)
    first, second = apply(positive, 0, 0.5, None), apply(positive, 1, -0.4, None)
    both = apply(first, 1, -0.4, None)
    one, other, two = (estimate(teacher, p) for p in (first, second, both))
    left, top = LEFT[:, None], TOP[:, None]
    corners = left * top * two + left * (1 - top) * one + (1 - left) * top * other + (1 - left) * (1 - top) * plain
    check(estimate(teacher, apply(apply(positive, 0, 0.5, LEFT), 1, -0.4, TOP)), corners)
    # Two entries of which each has a mask of its own, of another size; the first is weaker where both act.
    (tensor, options), wide = positive[0], TOP.repeat_interleave(2, 1).repeat_interleave(2, 2)
    stock = host.encode(teacher.clip, "a blue lady")[0]
    everywhere = torch.ones(1, 8, 8)
    entries = [
        [tensor, {**options, "mask": wide, "mask_strength": 0.5}],
        [stock[0], {**stock[1], "mask": everywhere}],
    ]
    other = estimate(teacher, [stock])
    blend = left * one + (1 - left) * plain
    check(estimate(teacher, apply(entries, 0, 0.5, LEFT)), (0.5 * top * blend + other) / (0.5 * top + 1))
    marked = [[tensor, {**options, "mask": TOP}], [tensor * 0.9, {**options, "mask": 1 - TOP}]]
    steered, still = (estimate(teacher, p) for p in (apply(marked, 0, 0.5, None), marked))
    check(estimate(teacher, apply(marked, 0, 0.5, LEFT)), left * steered + (1 - left) * still)


def test_masks_of_a_batch(teacher: SimpleNamespace, nodes: dict[str, Any], shipped: Directions) -> None:
    settings = {"lowest": 0.3, "highest": 0.5, "unit": "token norms", "mix": 1, "leading": 3, "both_signs": True}

    def diversified(positive: Any, mask: Any) -> Any:
        node = nodes["ElrondDiversify"]
        return node.execute(positive, shipped, 4, 1, **settings, start=0.0, end=1.0, concept="", mask=mask).args[0]

    plain = estimate(teacher, teacher.positive, 4)
    steered = estimate(teacher, diversified(teacher.positive, None), 4)
    mask = torch.cat([LEFT, 1 - LEFT])
    cells = mask.repeat(2, 1, 1)[:, None]
    check(estimate(teacher, diversified(teacher.positive, mask), 4), cells * steered + (1 - cells) * plain)
    # An entry with masks of its own, as many as there are images.
    (tensor, options), own = teacher.positive[0], torch.cat([TOP, 1 - TOP, TOP, TOP])
    out = diversified([[tensor, {**options, "mask": own}]], mask)
    assert [entry["mask"].shape for _, entry in out] == [(4, 8, 8)] * 2
    assert torch.equal(out[0][1]["mask"] + out[1][1]["mask"], own)


def test_masks_and_parts_of_the_sampling(teacher: SimpleNamespace, apply: Any) -> None:
    before, outside, inside, after = apply(teacher.positive, 0, 0.5, LEFT, 0.2, 0.6)
    assert "mask" not in before[1] and "mask" not in after[1]
    assert torch.equal(inside[1]["mask"], LEFT) and torch.equal(outside[1]["mask"], 1 - LEFT)
    for _, options in (outside, inside):
        assert options["start_percent"] == pytest.approx(0.2, abs=1e-4) and options["end_percent"] == 0.6
    assert torch.equal(outside[0], teacher.positive[0][0]) and not torch.equal(inside[0], outside[0])


def test_masks_that_change_nothing(teacher: SimpleNamespace, apply: Any) -> None:
    (tensor, options) = teacher.positive[0]
    for own in ({}, {"mask": TOP}):
        positive = [[tensor, {**options, **own}]]
        for mask, strength, plain in ((torch.ones(1, 64, 64), 0.5, False), (LEFT, 0.0, True), (LEFT * 0, 0.5, True)):
            ((rows, kept),) = apply(positive, 0, strength, mask)
            expected = positive if plain else apply(positive, 0, strength, None)
            assert torch.equal(rows, expected[0][0]) and kept.get("mask") is own.get("mask")
    # An entry that acts nowhere still does, and the host is given no more than one of it.
    nowhere = [[tensor, {**options, "mask": TOP * 0}]]
    other = host.encode(teacher.clip, "a blue lady")
    assert torch.equal(estimate(teacher, apply(nowhere, 0, 0.5, LEFT) + other), estimate(teacher, other))
    check(estimate(teacher, apply(nowhere, 0, 0.5, LEFT)), estimate(teacher, nowhere))


def test_an_entry_is_cropped_to_its_own_mask_still(teacher: SimpleNamespace, apply: Any) -> None:
    tensor, options = teacher.positive[0]
    entry = [tensor, {**options, "mask": torch.nn.functional.pad(TOP[:, :, :-1], (0, 1)), "set_area_to_bounds": True}]
    resolved = [dict(entry[1]), *(dict(kept) for _, kept in apply([entry], 0, 0.5, LEFT))]
    comfy.samplers.resolve_areas_and_cond_masks_multidim(resolved, (8, 8), "cpu")
    assert len(resolved) == 3 and len({each["area"] for each in resolved}) == 1
    with pytest.raises(ElrondError, match="default conditioning acts where the others leave room"):
        apply([[tensor, {**options, "default": True}]], 0, 0.5, LEFT)


@pytest.mark.parametrize("name", ["SDXL", "Flux dev", "Qwen-Image"])
def test_other_families(nodes: dict[str, Any], name: str) -> None:
    """Latents of some have a dimension for frames."""
    family = next(each for each in families.FAMILIES if each.name == name)
    model, positive, latents = families.build(family), families.prompt(family), families.latents(family)
    change = families.random(1, len(families.CONCEPT.rows), families.WIDTH, seed=6)

    def estimate(mask: Any, amount: float) -> torch.Tensor:
        entries = host.steer_conditioning(positive, lambda memory: (families.CONCEPT.rows, amount * change), 0, 1, mask)
        noise = families.random(*latents.shape, seed=5)
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, 1, 1.0, "euler", "simple", entries, entries, latents * 0, disable_pbar=True, seed=0
            )

    plain, steered = estimate(None, 0.0), estimate(None, 1.0)
    assert not torch.allclose(plain, steered, rtol=1e-2, atol=1e-3)
    check(estimate(LEFT, 1.0), plain + LEFT * (steered - plain))
    settings = {"threshold": 0.0, "grow": 0, "noise_level": 0.5, "draws": 2, "batch_size": 2, "seed": 0, "concept": ""}
    with torch.inference_mode():
        node = nodes["ElrondConceptMask"]
        mask, _ = node.execute(model=model, positive=positive, samples={"samples": latents}, **settings).args
    assert mask.shape == (len(latents), *latents.shape[-2:]) and 0 < mask.mean() < 1


def find(nodes: dict[str, Any], teacher: SimpleNamespace, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    settings = {"threshold": 0.0, "grow": 0, "noise_level": 0.5, "draws": 10, "batch_size": IMAGES, "seed": 0}
    settings |= {"positive": teacher.positive, "concept": "", **changes}
    with torch.inference_mode():
        samples = {"samples": teacher.realizations["samples"][:IMAGES]}
        return nodes["ElrondConceptMask"].execute(model=teacher.model, samples=samples, **settings).args


@pytest.fixture(scope="module")
def found(nodes: dict[str, Any], teacher: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    return find(nodes, teacher)


def people(teacher: SimpleNamespace) -> torch.Tensor:
    """The share of each latent cell that the person covers, (N, 8, 8), as the world draws what is measured."""
    with torch.inference_mode():
        images = teacher.vae.decode(teacher.realizations["samples"][:IMAGES]).clone()
    factors = measure.load().measure(images.movedim(-1, 1))
    # Before two walls, only the person looks the same.
    first, second = (compose({**factors, "background": torch.full((IMAGES,), place)}) for place in (0.0, 1.0))
    behind = (first - second).abs().mean(1)
    covered = 1 - behind / behind.amax((1, 2), keepdim=True)
    return torch.nn.functional.avg_pool2d(covered[:, None], 8)[:, 0]


def test_the_concept_is_where_the_person_is(
    nodes: dict[str, Any], teacher: SimpleNamespace, found: tuple[torch.Tensor, torch.Tensor]
) -> None:
    mask, answer = found
    cover = people(teacher)
    assert mask.shape == answer.shape == (IMAGES, 8, 8) and set(mask.unique().tolist()) == {0, 1}
    assert torch.equal(answer.amax((1, 2)), torch.ones(IMAGES))
    # Of two cells, one in the person and one beside it, the model answers more in the person.
    ranks = [(a[c > 0.5][:, None] > a[c == 0][None]).float().mean() for a, c in zip(answer, cover, strict=True)]
    assert float(torch.stack(ranks).mean()) > 0.95
    assert (mask[cover > 0.5]).mean() > 0.8 and (mask[cover == 0]).mean() < 0.15
    torch.testing.assert_close(find(nodes, teacher, batch_size=3)[1], answer, rtol=1e-3, atol=1e-3)


def test_settings_of_the_mask(
    nodes: dict[str, Any], teacher: SimpleNamespace, found: tuple[torch.Tensor, torch.Tensor]
) -> None:
    strict, answer = find(nodes, teacher, threshold=0.5)
    assert torch.equal(strict, (answer > 0.5).float()) and torch.equal(answer, found[1])
    grown, _ = find(nodes, teacher, grow=1)
    assert torch.equal(grown, torch.nn.functional.max_pool2d(found[0], 3, 1, 1))
    assert not torch.equal(find(nodes, teacher, seed=1)[1], answer)
    with pytest.raises(ElrondError, match="no marked concept 'dog'; it has 'person'"):
        find(nodes, teacher, concept="dog")
    with pytest.raises(ElrondError, match="does not know its concept"):
        find(nodes, teacher, positive=host.encode(teacher.clip, "a person"))


def test_concepts_of_one_prompt_share_out_the_image(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    two = nodes["ElrondEncodeConcept"].execute(teacher.clip, "a [lady] [person]", "", 1).args[0]
    lady, person = (find(nodes, teacher, positive=two, concept=word, threshold=0.01)[0] for word in ("lady", "person"))
    assert lady.any() and person.any() and not (lady * person).any()


def test_a_mask_keeps_a_direction_local(
    nodes: dict[str, Any], teacher: SimpleNamespace, apply: Any, found: tuple[torch.Tensor, torch.Tensor]
) -> None:
    def images(positive: Any) -> torch.Tensor:
        with torch.inference_mode():
            node = nodes["ElrondSampleRealizations"]
            sampled = node.execute(teacher.model, positive, 64, 64, IMAGES, 24, 3, 8, 1.0, "euler", "simple").args[0]
            return teacher.vae.decode(sampled["samples"])

    before, leaks = images(teacher.positive), []
    for index in range(3):
        for mask in (None, found[0]):
            after = images(apply(teacher.positive, index, 0.5, mask))
            leak, report = nodes["ElrondMeasureLeak"].execute(before, after, found[0]).args
            assert len(report.splitlines()) == IMAGES + 1 and report.startswith(f"mean leak {leak:.3f}")
            leaks.append(leak)
    free, kept = sum(leaks[::2]), sum(leaks[1::2])
    assert kept < 0.75 * free


def test_leaks_as_the_node_says_them(nodes: dict[str, Any]) -> None:
    run = nodes["ElrondMeasureLeak"].execute
    before, after = torch.zeros(2, 16, 16, 3), torch.zeros(2, 16, 16, 3)
    after[0, :, :6] = 0.5
    leak, report = run(before, after, LEFT[0]).args
    assert leak == pytest.approx(0) and report.splitlines()[1:] == [
        "image 0: leak 0.000 (root mean square change 0.5000 inside, 0.0000 outside)",
        "image 1: no change (root mean square change 0.0000 inside, 0.0000 outside)",
    ]
    with pytest.raises(ElrondError, match="one size, not 2 of 16×16 and 1 of 16×8"):
        run(before, after[:1, :8], LEFT)
