"""Steering that acts in a part of the sampling, of the image or of the batch, behind the host's own nodes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_elrond.elrond_core.directions import Directions
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.storage.format import load_directions
from comfyui_elrond.nodes import host
from comfyui_elrond.nodes.host.schedule import acts_at

sys.path.append(str(Path(__file__).parent))

import comfy.sampler_helpers
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_hooks as hooks
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from comfy_extras.nodes_rebatch import LatentRebatch
from sampling import sample

import nodes as stock

SHIPPED = Path(__file__).parents[2] / "demo" / "directions" / "demo person.safetensors"
STEPS, COUNT = 4, 5
LEFT, TOP = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
LEFT[:, :, :3] = 1
TOP[:, :5] = 1
Change = Callable[[Any], Any]


@pytest.fixture(scope="module")
def shipped() -> Directions:
    return load_directions(SHIPPED)


@pytest.fixture
def apply(nodes: dict[str, Any], shipped: Directions) -> Any:
    def run(positive: Any, start: float = 0.0, end: float = 1.0, mask: Any = None, index: int = 0) -> Any:
        node = nodes["ElrondApplyDirection"]
        return node.execute(positive, shipped, index, 0.7, "token norms", start, end, "", "", mask).args[0]

    return run


@pytest.fixture
def diversify(nodes: dict[str, Any], shipped: Directions) -> Any:
    def run(positive: Any, count: int = COUNT, start: float = 0.0, end: float = 1.0, mask: Any = None) -> Any:
        settings = {"seed": 1, "lowest": 0.4, "highest": 0.6, "unit": "token norms", "mix": 1, "leading": 3}
        settings |= {"both_signs": True, "start": start, "end": end, "concept": "", "mask": mask}
        return nodes["ElrondDiversify"].execute(positive, shipped, count, **settings).args[0]

    return run


@pytest.fixture(scope="module")
def ball(teacher: SimpleNamespace) -> Any:
    """Another prompt, which acts everywhere and always."""
    return host.encode(teacher.clip, "a blue lady")


def images(teacher: SimpleNamespace, positive: Any, count: int = 2, steps: int = STEPS) -> torch.Tensor:
    noise = torch.randn(count, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    return sample(teacher.model, positive, noise, steps)


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def differs(found: torch.Tensor, other: torch.Tensor) -> bool:
    return float((found - other).abs().max()) > 1e-3


def latents_after(teacher: SimpleNamespace, positive: Any, steps: int) -> torch.Tensor:
    """Noisy latents after the first of `STEPS` steps."""
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    return sample(teacher.model, positive, noise, STEPS, 0, steps)


@pytest.mark.parametrize("shift", [1.0, 1.15, 3.0, 5.7])
def test_one_entry_acts_at_every_step(teacher: SimpleNamespace, apply: Any, shift: float) -> None:
    """Also where a step lies on the end of a part, or next to it by rounding: there, no entry acted once."""
    model = ModelSamplingSD3().patch(teacher.model, shift)[0]
    sampling = model.get_model_object("model_sampling")
    network = SimpleNamespace(model_sampling=sampling)
    noise = torch.zeros(1, 16, 8, 8)
    for start, end in [(0.0, 0.3), (0.1, 0.7), (0.25, 0.5), (0.05, 0.95), (0.2, 1.0)]:
        entries = comfy.sampler_helpers.convert_cond(apply(teacher.positive, start, end))
        found = comfy.samplers.process_conds(network, noise, {"positive": entries}, "cpu")["positive"]
        assert len(found) == 1 + (start > 0) + (end < 1)
        for steps in (*range(4, 31), 40, 50, 100):
            for sigma in comfy.samplers.calculate_sigmas(sampling, "simple", steps)[:-1]:
                acting = [e for e in found if comfy.samplers.get_area_and_mult(e, noise, sigma[None])]
                assert len(acting) == 1, (start, end, steps, float(sigma))
                options = [o for _, o in apply(teacher.positive, start, end)]
                assert sum(acts_at(sampling, o, float(sigma)) for o in options) == 1


def test_a_part_starts_where_later_nodes_and_schedules_say(teacher: SimpleNamespace, apply: Any) -> None:
    """Of two parts that meet at 0.3 the second may be made to start later; then the gap is none of the steering."""
    sampling = teacher.model.get_model_object("model_sampling")
    network = SimpleNamespace(model_sampling=sampling)
    late = apply(teacher.positive, 0.0, 0.3)[1:]
    assert late[0][1]["start_percent"] > 0.3
    ranged = stock.ConditioningSetTimestepRange().set_range(late, 0.6, 1.0)[0]
    scheduled = [[tensor, {**options, "clip_start_percent": 0.6, "clip_end_percent": 1.0}] for tensor, options in late]
    for positive in (ranged, scheduled):
        entries = comfy.sampler_helpers.convert_cond(positive)
        (entry,) = comfy.samplers.process_conds(network, torch.zeros(1, 16, 8, 8), {"positive": entries}, "cpu")[
            "positive"
        ]
        assert entry["timestep_start"] == sampling.percent_to_sigma(0.6)
        for share, acts in ((0.5, False), (0.59, False), (0.61, True)):
            assert acts_at(sampling, positive[0][1], float(sampling.percent_to_sigma(share))) == acts


def pair(positive: Any, run: Callable[..., Any], *args: Any) -> Any:
    return run(positive, positive, *args)[0]


MASK = torch.nn.functional.pad(TOP[:, :, 1:], (1, 0))
# What a user may say of a whole conditioning behind the node that steers a part of it.
LIMITS: dict[str, Change] = {
    "timestep range": lambda p: stock.ConditioningSetTimestepRange().set_range(p, 0.2, 0.6)[0],
    "range within the part": lambda p: stock.ConditioningSetTimestepRange().set_range(p, 0.0, 0.3)[0],
    "range beside the part": lambda p: stock.ConditioningSetTimestepRange().set_range(p, 0.75, 1.0)[0],
    "mask": lambda p: stock.ConditioningSetMask().append(p, MASK, "default", 0.8)[0],
    "mask bounds": lambda p: stock.ConditioningSetMask().append(p, MASK, "mask bounds", 1.0)[0],
    "area": lambda p: stock.ConditioningSetArea().append(p, 48, 40, 16, 8, 1.0)[0],
    "percentage": lambda p: stock.ConditioningSetAreaPercentage().append(p, 0.75, 0.5, 0.25, 0.0, 0.9)[0],
    "strength": lambda p: stock.ConditioningSetAreaStrength().append(p, 0.5)[0],
    "properties": lambda p: hooks.ConditioningSetProperties().set_properties(
        p, 1.0, "default", mask=MASK, timesteps=(0.3, 1.0)
    )[0],
    "pair": lambda p: pair(
        p, hooks.PairConditioningSetProperties().set_properties, 0.7, "mask bounds", MASK, None, (0.0, 0.6)
    ),
    "combined": lambda p: hooks.ConditioningSetPropertiesAndCombine().set_properties(
        [], p, 1.0, "default", mask=MASK, timesteps=(0.1, 0.7)
    )[0],
    "default": lambda p: hooks.ConditioningSetDefaultAndCombine().set_default_and_combine([], p)[0],
    "range and mask": lambda p: LIMITS["mask"](LIMITS["timestep range"](p)),
    "copied as a plain dictionary": lambda p: LIMITS["range and mask"]([[t, {**o}] for t, o in p]),
    "copied deeply": lambda p: LIMITS["range and mask"](copy.deepcopy(p)),
}
PARTS: dict[str, dict[str, Any]] = {
    "end": {"end": 0.5},
    "middle": {"start": 0.3, "end": 0.7},
    "mask": {"mask": LEFT},
    "end and mask": {"end": 0.5, "mask": 0.8 * LEFT},
}


def test_every_direction_acts_in_its_own_part(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions
) -> None:
    """What has not started yet, or has ended, changes no bit of the latents."""

    def steered(strengths: str, positive: Any = teacher.positive, mask: Any = None, start: float = 0.0) -> Any:
        node = nodes["ElrondApplyDirection"]
        out = node.execute(positive, shipped, 0, 9.0, "token norms", start, 1.0, "", strengths, mask)
        return out.args[0]

    late, none = steered("1: 0.7 @ 0.5-1"), teacher.positive
    half = STEPS // 2
    assert torch.equal(latents_after(teacher, late, half), latents_after(teacher, none, half))
    assert differs(images(teacher, late), images(teacher, none))
    both, first = steered("0: 0.4, 1: 0.7 @ 0.5-1"), steered("0: 0.4")
    assert torch.equal(latents_after(teacher, both, half), latents_after(teacher, first, half))
    assert differs(images(teacher, both), images(teacher, first))
    # A list of parts is the chain of nodes with these starts and ends, under a mask too.
    chained = steered("1: -0.5 @ 0.25-0.75", steered("0: 0.4", start=0.5))
    check(images(teacher, steered("0: 0.4, 1: -0.5 @ 0.25-0.75", start=0.5)), images(teacher, chained))
    masked = steered("1: -0.5 @ 0.25-0.75", steered("0: 0.4 @ 0-0.5", mask=LEFT), LEFT)
    check(images(teacher, steered("0: 0.4 @ 0-0.5, 1: -0.5 @ 0.25-0.75", mask=LEFT)), images(teacher, masked))
    # Between two parts the prompt is as it was: it asks the model once a step.
    gap = steered("0: 0.4 @ 0-0.25, 1: 0.4 @ 0.75-1")
    assert [(o.get("start_percent", 0) > 0, o.get("end_percent", 1) < 1) for _, o in gap] == [
        (False, True),
        (True, True),
        (True, False),
    ]
    assert torch.equal(gap[1][0], teacher.positive[0][0])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("limit", LIMITS)
def test_what_a_node_says_behind_is_what_it_says_before(
    teacher: SimpleNamespace, ball: Any, apply: Any, limit: str, part: str
) -> None:
    limited, steered = LIMITS[limit], apply(teacher.positive, **PARTS[part])
    if limit == "default" and "mask" in part:
        with pytest.raises(ElrondError, match="A default conditioning acts where the others leave room"):
            images(teacher, limited(steered))
        return
    found = images(teacher, ball + limited(steered))
    check(found, images(teacher, ball + apply(limited(teacher.positive), **PARTS[part])))


@pytest.mark.parametrize("limit", ["timestep range", "mask", "properties"])
def test_parts_of_a_batch_survive(teacher: SimpleNamespace, ball: Any, diversify: Any, limit: str) -> None:
    plain = LIMITS[limit](teacher.positive)
    for part in ({"end": 0.5}, {"mask": LEFT}, {"start": 0.3, "mask": torch.cat([LEFT, TOP, LEFT, TOP, 1 - TOP])}):
        found = images(teacher, ball + LIMITS[limit](diversify(teacher.positive, **part)), COUNT)
        check(found, images(teacher, ball + diversify(plain, **part), COUNT))
        assert differs(found, images(teacher, ball + plain, COUNT))


def test_chains_survive(teacher: SimpleNamespace, ball: Any, apply: Any, diversify: Any) -> None:
    def chain(positive: Any) -> Any:
        early = apply(positive, end=0.6, mask=LEFT)
        return diversify(apply(early, start=0.3, mask=TOP, index=1), 2, 0.5)

    for limit in ("timestep range", "mask bounds", "properties"):
        found = images(teacher, ball + LIMITS[limit](chain(teacher.positive)))
        check(found, images(teacher, ball + chain(LIMITS[limit](teacher.positive))))


def test_the_last_node_decides(teacher: SimpleNamespace, ball: Any, apply: Any) -> None:
    """A range or a mask that is replaced by a wider one leaves no gap."""
    narrow = stock.ConditioningSetTimestepRange().set_range(teacher.positive, 0.0, 0.3)[0]
    steered = apply(narrow, 0.1, 0.6)
    check(images(teacher, ball + steered), images(teacher, ball + apply(narrow, 0.1, 1.0)))
    wide = stock.ConditioningSetTimestepRange().set_range(steered, 0.0, 1.0)[0]
    check(images(teacher, ball + wide), images(teacher, ball + apply(teacher.positive, 0.1, 0.6)))
    masked = stock.ConditioningSetMask().append(teacher.positive, 1 - LEFT, "default", 1.0)[0]
    moved = stock.ConditioningSetMask().append(apply(masked, mask=LEFT), TOP, "default", 1.0)[0]
    again = stock.ConditioningSetMask().append(teacher.positive, TOP, "default", 1.0)[0]
    check(images(teacher, ball + moved), images(teacher, ball + apply(again, mask=LEFT)))


def test_an_area_fades_at_its_edges_as_before(teacher: SimpleNamespace, ball: Any, apply: Any) -> None:
    def estimate(positive: Any) -> torch.Tensor:
        noise = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
        return sample(teacher.model, ball + area(positive, 96, 80, 32, 16, 1.0)[0], noise, 1)

    area, cells = stock.ConditioningSetArea().append, torch.zeros(1, 16, 16)
    cells[:, :6] = 1
    plain, steered = (estimate(p) for p in (teacher.positive, apply(teacher.positive)))
    check(estimate(apply(teacher.positive, mask=cells)), plain + cells * (steered - plain))


def ksampler(teacher: SimpleNamespace, positive: Any, latent: dict[str, Any]) -> torch.Tensor:
    """The stock node."""
    with torch.inference_mode():
        out = stock.KSampler().sample(teacher.model, 7, STEPS, 1.0, "euler", "simple", positive, positive, latent)
    return out[0]["samples"]


def advanced(teacher: SimpleNamespace, positive: Any, latent: dict[str, Any], noise: Any = None) -> torch.Tensor:
    """The stock node with a guider and a noise of its own."""
    guider = comfy.samplers.CFGGuider(teacher.model)
    guider.set_conds(positive, positive)
    sigmas = comfy.samplers.calculate_sigmas(teacher.model.get_model_object("model_sampling"), "simple", STEPS)
    noise = noise or custom.Noise_RandomNoise(7)
    with torch.inference_mode():
        node = custom.SamplerCustomAdvanced
        out = node.execute(noise, guider, comfy.samplers.sampler_object("euler"), sigmas, latent)
    return out.args[0]["samples"]


@pytest.fixture
def batch() -> dict[str, Any]:
    return {"samples": torch.zeros(COUNT, 16, 8, 8)}


@pytest.mark.parametrize("sampler", [ksampler, advanced])
def test_an_image_has_its_own_step_in_any_part_of_its_batch(
    teacher: SimpleNamespace, diversify: Any, apply: Any, batch: dict[str, Any], sampler: Any
) -> None:
    masks = torch.stack([LEFT[0], TOP[0], 1 - LEFT[0], 1 - TOP[0], LEFT[0]])
    for positive in (
        diversify(teacher.positive),
        diversify(teacher.positive, end=0.6, mask=masks),
        apply(teacher.positive, mask=masks),
        diversify(teacher.positive, 3),
    ):
        whole = sampler(teacher, positive, batch)
        assert all(differs(whole[i], whole[j]) for i in range(COUNT) for j in range(i))
        for first, length in ((0, 2), (2, 2), (4, 1)):
            part = stock.LatentFromBatch().frombatch(batch, first, length)[0]
            check(sampler(teacher, positive, part), whole[first : first + length])
        parts = LatentRebatch.execute([batch], [2]).args[0]
        check(torch.cat([sampler(teacher, positive, part) for part in parts]), whole)
        mixed = {"samples": torch.zeros(3, 16, 8, 8), "batch_index": [4, 1, 4]}
        check(sampler(teacher, positive, mixed), whole[[4, 1, 4]])


def test_a_later_pass_over_a_part_of_a_batch(teacher: SimpleNamespace, diversify: Any, batch: dict[str, Any]) -> None:
    """Sampled images of which one is picked and sampled again."""
    positive = diversify(teacher.positive)
    first = {**batch, "samples": ksampler(teacher, positive, batch)}
    one = stock.LatentFromBatch().frombatch(first, 3, 1)[0]
    check(ksampler(teacher, positive, one), ksampler(teacher, positive, first)[3:4])


def test_images_that_cannot_be_recognised(teacher: SimpleNamespace, diversify: Any, batch: dict[str, Any]) -> None:
    """With a noise of its own, a whole batch is taken in order, and another number of images is refused."""
    positive, zero = diversify(teacher.positive), custom.Noise_EmptyNoise()
    latent = {"samples": torch.randn(COUNT, 16, 8, 8, generator=torch.Generator().manual_seed(0))}
    whole = advanced(teacher, positive, latent, zero)
    alone = [[positive[0][0].as_subclass(torch.Tensor)[2:3], positive[0][1]]]
    single = {"samples": latent["samples"][2:3]}
    check(whole[2:3], advanced(teacher, alone, single, zero))
    with pytest.raises(ElrondError, match=r"steps or masks for 5 images, and which of them these 1 are .*\.$"):
        advanced(teacher, positive, stock.LatentFromBatch().frombatch(latent, 2, 1)[0], zero)


def test_the_batch_size_of_realizations_changes_nothing(
    nodes: dict[str, Any], teacher: SimpleNamespace, diversify: Any
) -> None:
    def realizations(batch_size: int) -> torch.Tensor:
        positive = diversify(teacher.positive, end=0.6, mask=torch.cat([LEFT, TOP]))
        node = nodes["ElrondSampleRealizations"]
        with torch.inference_mode():
            out = node.execute(teacher.model, positive, 64, 64, 7, batch_size, 3, 4, 1.0, "euler", "simple")
        return out.args[0]["samples"]

    whole = realizations(7)
    for batch_size in (1, 3):
        torch.testing.assert_close(realizations(batch_size), whole, rtol=1e-3, atol=1e-3)


def test_a_diversified_prompt_is_joined_with_others(
    teacher: SimpleNamespace, ball: Any, diversify: Any, batch: dict[str, Any]
) -> None:
    """Every image gets what its own prompt alone would be joined to."""
    positive = diversify(teacher.positive)
    alone = [[[positive[0][0].as_subclass(torch.Tensor)[i : i + 1], positive[0][1]]] for i in range(COUNT)]
    concat, average = stock.ConditioningConcat().concat, stock.ConditioningAverage().addWeighted
    short = [[ball[0][0][:, :8], ball[0][1]]]
    for join in (
        lambda p: concat(p, ball)[0],
        lambda p: concat(ball, p)[0],
        lambda p: average(p, ball, 0.6)[0],
        lambda p: average(ball, p, 0.4)[0],
        lambda p: average(p, short, 0.6)[0],
        lambda p: concat(p, p)[0],
        lambda p: stock.ConditioningZeroOut().zero_out(p)[0],
    ):
        found = ksampler(teacher, join(positive), batch)
        for i in (1, 4):
            part = stock.LatentFromBatch().frombatch(batch, i, 1)[0]
            check(ksampler(teacher, join(alone[i]), part), found[i : i + 1])
            check(ksampler(teacher, join(positive), part), found[i : i + 1])


def test_steps_for_different_numbers_of_images_do_not_fit(teacher: SimpleNamespace, diversify: Any) -> None:
    five, three = diversify(teacher.positive), diversify(teacher.positive, 3)
    sentence = r"^One conditioning is for 3 images and the other for 5: set Diversify to the same count for both\.$"
    for join in (
        lambda: stock.ConditioningConcat().concat(five, three),
        lambda: stock.ConditioningAverage().addWeighted(three, five, 0.5),
    ):
        with pytest.raises(ElrondError, match=sentence):
            join()
    with pytest.raises(ElrondError, match=r"already has steps for 3 images, and these are for 5: make as many, .*\.$"):
        diversify(three, 5)
    row = host.marked(teacher.positive)[1].concepts[0].rows[0]
    twice = diversify(five, COUNT)
    once, still = five[0][0][:, row], teacher.positive[0][0][:, row]
    torch.testing.assert_close((twice[0][0][:, row] - still).norm(dim=1), 2 * (once - still).norm(dim=1))


@pytest.mark.parametrize("node", ["DirectionSweep", "CollectGradients", "ConceptMask"])
def test_nodes_that_look_at_one_prompt_refuse_one_for_each_image(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions, diversify: Any, apply: Any, node: str
) -> None:
    masks = torch.cat([LEFT, TOP])
    for positive, count in ((diversify(teacher.positive), COUNT), (apply(teacher.positive, mask=masks), 2)):
        with pytest.raises(ElrondError, match=rf"another one for each of {count} images: connect the one from before"):
            look(nodes, teacher, shipped, node, positive, teacher.realizations["samples"][:2])


@pytest.mark.parametrize("node", ["CollectGradients", "ConceptMask"])
def test_latents_of_another_family_are_refused(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions, node: str
) -> None:
    with pytest.raises(
        ElrondError, match=r"^These latents have 24 channels and this model's have 16: sample them .*\.$"
    ):
        look(nodes, teacher, shipped, node, teacher.positive, torch.ones(2, 24, 8, 8))


def look(
    nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions, node: str, positive: Any, latents: Any
) -> Any:
    samples = {"samples": latents}
    with torch.inference_mode():
        if node == "CollectGradients":
            return nodes["ElrondCollectGradients"].execute(
                teacher.model, positive, samples, count=2, noise_level=1.0, batch_size=2, seed=0, response=False
            )
        if node == "ConceptMask":
            return nodes["ElrondConceptMask"].execute(teacher.model, positive, samples, 0.0, 0, 0.5, 1, 1, 0, "")
        settings = ("0", -0.5, 0.5, 2, "token norms", 64, 64, 0, 1, 1.0, "euler", "simple", 1, 64, "", False)
        return nodes["ElrondDirectionSweep"].execute(teacher.model, positive, shipped, teacher.vae, *settings)
