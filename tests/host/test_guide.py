"""Guidance along directions, through the host's own sampling, against Apply Direction and against a plain loop."""

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
from comfyui_elrond.elrond_core.provenance import Provenance
from comfyui_elrond.elrond_core.steering.guidance import LONGEST
from comfyui_elrond.elrond_core.storage.format import load_directions
from comfyui_elrond.nodes import host

sys.path.append(str(Path(__file__).parent))

import comfy_extras.nodes_custom_sampler as custom
import families
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from sampling import sample

import nodes as stock

SHIPPED = Path(__file__).parents[2] / "demo" / "directions" / "demo person.safetensors"
STEPS = 4
# Short enough that guidance takes the whole step.
SHORT = 0.9 * LONGEST


@pytest.fixture(scope="module")
def shipped() -> Directions:
    return load_directions(SHIPPED)


@pytest.fixture
def apply(nodes: dict[str, Any], shipped: Directions) -> Any:
    def run(positive: Any, index: int = 0, strength: float = SHORT, start: float = 0.0, end: float = 1.0) -> Any:
        node = nodes["ElrondApplyDirection"]
        return node.execute(positive, shipped, index, strength, "token norms", start, end, "").args[0]

    return run


@pytest.fixture
def guide(nodes: dict[str, Any], teacher: SimpleNamespace, shipped: Directions) -> Any:
    def run(strength: float = SHORT, local: bool = False, model: Any = None, **settings: Any) -> Any:
        values = {"index": 0, "unit": "token norms", "start": 0.0, "end": 1.0, "concept": "", **settings}
        model = teacher.model if model is None else model
        return nodes["ElrondGuideDirections"].execute(model, shipped, strength=strength, local=local, **values).args[0]

    return run


def random_directions(rows: int, width: int, family: str = "") -> Directions:
    vectors = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(3))
    vectors = vectors / vectors.flatten(1).norm(dim=1)[:, None, None]
    return Directions(vectors, torch.ones(2), {"name": "pca"}, Provenance(family))


def images(model: Any, positive: Any, count: int = 2, steps: int = STEPS, **more: Any) -> Any:
    noise = torch.randn(count, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    return sample(model, positive, noise, steps, **more)


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def differs(found: torch.Tensor, other: torch.Tensor) -> bool:
    return float((found - other).abs().max()) > 1e-3


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_short_steps_everywhere_are_those_of_apply_direction(
    teacher: SimpleNamespace, apply: Any, guide: Any, cfg: float
) -> None:
    settings = {"cfg": cfg, "negative": host.encode(teacher.clip, "a blue lady")}
    found = images(guide(), teacher.positive, **settings)
    check(found, images(teacher.model, apply(teacher.positive), **settings))
    assert differs(found, images(teacher.model, teacher.positive, **settings))


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.3, 0.31), (0.0, 0.3), (0.0, 1.0)])
@pytest.mark.parametrize("shift", [1.0, 1.32, 3.0])
def test_acts_in_the_same_steps_as_apply_direction(
    teacher: SimpleNamespace, apply: Any, guide: Any, window: tuple[float, float], shift: float
) -> None:
    """Shift 1.32 rounds the first noise level of a flow to just above 1; without one, steps fall onto the ends."""
    start, end = window
    model = ModelSamplingSD3().patch(teacher.model, shift)[0]
    for steps in (7, 10):
        found = images(guide(model=model, start=start, end=end), teacher.positive, steps=steps)
        check(found, images(model, apply(teacher.positive, start=start, end=end), steps=steps))


def test_a_direction_has_a_window_of_its_own(teacher: SimpleNamespace, apply: Any, guide: Any) -> None:
    found = images(guide(strengths=f"0: {SHORT} @ 0-0.5"), teacher.positive)
    check(found, images(teacher.model, apply(teacher.positive, end=0.5)))


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_short_steps_are_those_of_apply_direction_on_every_family(nodes: dict[str, Any], family: Any) -> None:
    """The rows of a family reach its model in a way of their own; here they do so twice."""
    model, positive = families.build(family), families.prompt(family)
    latents = families.latents(family)
    marked = positive[0][1][host.MARK]
    found = random_directions(len(marked.concepts[0].rows), positive[0][0].shape[-1], marked.family)
    change = nodes["ElrondApplyDirection"].execute(positive, found, 0, SHORT, "token norms", 0.0, 1.0, "").args[0]
    guided = nodes["ElrondGuideDirections"].execute(model, found, 0, SHORT, "token norms", False, 0.0, 1.0, "").args[0]
    sampled = [sample(m, p, latents, 1) for m, p in ((guided, positive), (model, change), (model, positive))]
    torch.testing.assert_close(sampled[0], sampled[1], rtol=1e-3, atol=1e-4)
    assert not torch.equal(sampled[1], sampled[2])


def by_hand(teacher: SimpleNamespace, shipped: Directions, strengths: dict[int, float]) -> torch.Tensor:
    """The first estimate, guided by a loop over directions, images and cells."""
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))

    def estimate(index: int, strength: float) -> torch.Tensor:
        tensor, options = teacher.positive[0]
        prompt = options[host.MARK]
        rows = tensor.clone()
        rows[:, list(prompt.concepts[0].rows)] += strength * prompt.norms[0] * shipped.pick(index)
        return sample(teacher.model, [[rows, options]], noise, 1)

    plain = estimate(0, 0.0)
    out = plain.clone()
    for index, strength in strengths.items():
        step = LONGEST if strength > 0 else -LONGEST
        change = (estimate(index, step) - plain) * strength / step
        for image in change:
            energies = sorted(float(e) for e in image.square().mean(0).flatten())
            best = max(
                range(1, len(energies)),
                key=lambda n, e=energies: (  # type: ignore[misc]
                    n * (len(e) - n) * (sum(e[:n]) / n - sum(e[n:]) / (len(e) - n)) ** 2
                ),
            )
            image[:, image.square().mean(0) < energies[best]] = 0
        out += change
    return out


def test_each_direction_changes_its_own_part(teacher: SimpleNamespace, shipped: Directions, guide: Any) -> None:
    strengths = {0: 1.5, 1: -2.0}
    text = ", ".join(f"{index}: {strength}" for index, strength in strengths.items())
    found = images(guide(local=True, strengths=text), teacher.positive, steps=1)
    expected = by_hand(teacher, shipped, strengths)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    plain = images(teacher.model, teacher.positive, steps=1)
    unchanged = (found - plain).abs().amax(1) < 1e-6
    assert 0.2 < float(unchanged.float().mean()) < 0.95


def test_changes_are_in_proportion_to_long_strengths(teacher: SimpleNamespace, guide: Any) -> None:
    plain, one, two = (images(guide(strength, True), teacher.positive, steps=1) for strength in (0.0, 1.0, 2.0))
    torch.testing.assert_close(two - plain, 2 * (one - plain), rtol=1e-3, atol=1e-3)
    assert differs(one, plain)


def test_images_of_a_batch_do_not_know_of_each_other(teacher: SimpleNamespace, guide: Any) -> None:
    model = guide(2.0, True)
    check(images(model, teacher.positive, 3)[:2], images(model, teacher.positive, 2))
    assert differs(images(model, teacher.positive, 2), images(teacher.model, teacher.positive, 2))


def test_composes_with_diversify_masks_and_other_guides(
    teacher: SimpleNamespace, nodes: dict[str, Any], shipped: Directions, apply: Any, guide: Any
) -> None:
    settings = {"seed": 1, "lowest": 0.4, "highest": 0.6, "unit": "token norms", "mix": 1, "leading": 3}
    settings |= {"both_signs": True, "start": 0.0, "end": 0.5, "concept": ""}
    diverse = nodes["ElrondDiversify"].execute(teacher.positive, shipped, 2, **settings).args[0]
    masked = stock.ConditioningSetMask().append(teacher.positive, torch.ones(1, 8, 8).triu(), "default", 0.8)[0]
    for positive in (diverse, masked):
        check(images(guide(), positive), images(teacher.model, apply(positive)))
    both = images(guide(model=guide(), index=1), teacher.positive, steps=1)
    one, other, none = (images(m, teacher.positive, steps=1) for m in (guide(), guide(index=1), guide(0.0)))
    check(both - none, one - none + other - none)


def test_works_with_a_guider_of_another_node(teacher: SimpleNamespace, apply: Any, guide: Any) -> None:
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    sigmas = comfy.samplers.calculate_sigmas(teacher.model.get_model_object("model_sampling"), "simple", STEPS)

    def run(model: Any, positive: Any) -> torch.Tensor:
        guider = custom.Guider_Basic(model)
        guider.set_conds(positive)
        return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, seed=1)

    check(run(guide(), teacher.positive), run(teacher.model, apply(teacher.positive)))


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_works_with_a_guider_of_two_prompts(teacher: SimpleNamespace, apply: Any, guide: Any, style: str) -> None:
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    sigmas = comfy.samplers.calculate_sigmas(teacher.model.get_model_object("model_sampling"), "simple", STEPS)
    other, negative = (host.encode(teacher.clip, text) for text in ("a blue lady", "a wall"))

    def run(model: Any, positive: Any) -> torch.Tensor:
        guider = custom.DualCFGGuider.execute(model, positive, other, negative, 2.0, 1.5, style).args[0]
        return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, seed=1)

    found = run(guide(), teacher.positive)
    check(found, run(teacher.model, apply(teacher.positive)))
    assert differs(found, run(teacher.model, teacher.positive))


def test_works_beside_patches_of_the_estimates(teacher: SimpleNamespace, apply: Any, guide: Any) -> None:
    """Adaptive projected guidance changes the prompt's estimate before cfg: that is no part of a direction's change."""
    settings = {"cfg": 3.0, "negative": host.encode(teacher.clip, "a blue lady"), "steps": 1}
    other = APG.execute(teacher.model, 0.7, 2.0, 0.0).args[0]
    plain, steered = (images(teacher.model, p, steps=1) for p in (teacher.positive, apply(teacher.positive)))
    found = images(guide(model=other), teacher.positive, **settings) - images(other, teacher.positive, **settings)
    torch.testing.assert_close(found, 3.0 * (steered - plain), rtol=1e-3, atol=1e-3)
    assert differs(found, torch.zeros_like(found))


def test_changes_what_is_inpainted(teacher: SimpleNamespace, guide: Any) -> None:
    """The largest change is where nothing is sampled; the largest of the rest is made all the same."""
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    original = images(teacher.model, teacher.positive)
    everywhere = images(guide(2.0, True), teacher.positive, steps=1) - images(teacher.model, teacher.positive, steps=1)
    mask = (everywhere.abs().amax((0, 1)) == 0).float()[None, None]
    assert 0 < float(mask.mean()) < 1

    def painted(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            prompts = (teacher.positive, teacher.positive)
            return comfy.sample.sample(
                model,
                noise,
                STEPS,
                1.0,
                "euler",
                "simple",
                *prompts,
                original,
                noise_mask=mask,
                disable_pbar=True,
                seed=0,
            )

    change = (painted(guide(2.0, True)) - painted(teacher.model)).abs()
    assert float((change * mask).max()) > 1e-3
    assert float((change * (1 - mask)).max()) < 1e-4


def test_gradients_and_masks_are_of_the_prompt_as_it_is(teacher: SimpleNamespace, guide: Any) -> None:
    latents = teacher.realizations["samples"][:2]

    def estimate(model: Any) -> torch.Tensor:
        sigma = host.sigma_of(model, 0.5)

        def work(denoiser: host.HostDenoiser, scaled: torch.Tensor) -> torch.Tensor:
            return denoiser.denoised(scaled, sigma, denoiser.rows_at(sigma).expand(2, -1, -1)).detach().clone()

        return host.with_denoiser(model, teacher.positive, None, 1.0, latents, 0, work)

    guided = guide(3.0)
    assert torch.equal(estimate(guided), estimate(teacher.model))
    assert differs(images(guided, teacher.positive), images(teacher.model, teacher.positive))


def test_leaves_the_given_model_alone_and_nothing_behind(teacher: SimpleNamespace, guide: Any) -> None:
    before = images(teacher.model, teacher.positive)
    guided = guide()
    images(guided, teacher.positive)
    assert torch.equal(images(teacher.model, teacher.positive), before)
    ((prepare,),) = guided.wrappers["outer_sample"].values()
    assert prepare.__self__._running == []
    # A sampling that fails leaves nothing behind either.
    failing = guided.clone()
    failing.set_model_sampler_post_cfg_function(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        images(failing, teacher.positive)
    assert prepare.__self__._running == []


def test_nodes_between_it_and_the_sampler_keep_it(teacher: SimpleNamespace, guide: Any) -> None:
    """They clone the model, with deep copies of its options."""
    found = images(guide().clone().clone(), teacher.positive)
    check(found, images(guide(), teacher.positive))
    assert differs(found, images(teacher.model, teacher.positive))


def test_work_with_a_guided_model_goes_on_after_an_interruption(guide: Any) -> None:
    """It is kept under a fingerprint of the model, which is the same when the graph runs again."""

    def fingerprint(model: Any) -> str:
        return host.origin(model)["model"]

    first = fingerprint(guide(1.0, model=guide(index=1)))
    assert fingerprint(guide(1.0, model=guide(index=1))) == first
    assert first not in (fingerprint(guide(1.5, model=guide(index=1))), fingerprint(guide(1.0)))


def test_nothing_to_do_is_the_model_itself(teacher: SimpleNamespace, guide: Any) -> None:
    assert guide(0.0) is teacher.model


def test_refuses_what_does_not_fit(teacher: SimpleNamespace, nodes: dict[str, Any], shipped: Directions) -> None:
    node = nodes["ElrondGuideDirections"]
    settings = {"unit": "token norms", "local": True, "start": 0.0, "end": 1.0, "concept": ""}
    with pytest.raises(ElrondError, match="There is no direction 999"):
        node.execute(teacher.model, shipped, 999, 1.0, **settings)
    with pytest.raises(ElrondError, match="no marked concept 'dog'"):
        images(node.execute(teacher.model, shipped, 0, 1.0, **{**settings, "concept": "dog"}).args[0], teacher.positive)
    with pytest.raises(ElrondError, match="no marked concept: connect one from Encode Concept"):
        images(node.execute(teacher.model, shipped, 0, 1.0, **settings).args[0], host.encode(teacher.clip, "a person"))
    with pytest.raises(ElrondError, match="belong to another model family"):
        images(node.execute(teacher.model, random_directions(1, 8), 0, 1.0, **settings).args[0], teacher.positive)
    assert node.validate_inputs(start=0.6, end=0.5) != True  # noqa: E712
    assert node.validate_inputs(strengths="0: x") != True  # noqa: E712
    assert node.validate_inputs(start=0.0, end=0.5, strengths="0: 1, 2: -3 @ 0.2-0.4") is True
