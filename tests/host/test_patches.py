"""Gradients through models with patches: what patches hold, what they remember, and when they act."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import pytest
import torch
from comfy_extras import (
    nodes_apg,
    nodes_easycache,
    nodes_hypernetwork,
    nodes_hypertile,
    nodes_model_patch,
    nodes_tomesd,
)
from comfyui_elrond.elrond_core.collect.collection import CollectionPlan, collect
from comfyui_elrond.elrond_core.collect.differentiate import gradient
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.provenance import Provenance
from comfyui_elrond.nodes import host

# isort: split
sys.path.append(str(Path(__file__).parent))

import families
from families import FAMILIES, build, prompt, random
from test_families import error_of, gradient_of, with_denoiser

NAMED = {family.name: family for family in FAMILIES}
SD, QWEN = NAMED["SD 1.x"], NAMED["Qwen-Image"]
NEGATIVE = [[random(1, families.ROWS, families.WIDTH, seed=11), {}]]
LAYER = "middle_block.1.transformer_blocks.0.attn2.to_v"


def masked(model: Any, folder: Path) -> Any:
    mask = 1 + 0.5 * random(1, 64, 64, seed=3)
    patched = model.clone()
    patched.set_model_attn2_output_patch(lambda tensor, options: tensor * mask[:, : tensor.shape[1]])
    return patched


def hypernetwork(model: Any, folder: Path) -> Any:
    width = 64
    layers = [
        {
            f"linear.{i}.{name}": random(*shape, seed=seed + i) / 8
            for i in (0, 2)
            for name, shape in (("weight", (width, width)), ("bias", (width,)))
        }
        for seed in (4, 14)
    ]
    torch.save({width: layers, "activation_func": "tanh"}, folder / "hypernetwork.pt")
    patch = nodes_hypernetwork.load_hypernetwork_patch(str(folder / "hypernetwork.pt"), 0.5)
    patched = model.clone()
    patched.set_model_attn1_patch(patch)
    patched.set_model_attn2_patch(patch)
    return patched


def diffsynth(model: Any, folder: Path) -> Any:
    network = nodes_model_patch.QwenImageBlockWiseControlNet(2, 64, 0, 64, operations=comfy.ops.manual_cast)
    for seed, weight in enumerate(network.state_dict().values()):
        weight.copy_(random(*weight.shape, seed=seed) / 8)
    device = comfy.model_management.get_torch_device()
    patch = comfy.model_patcher.ModelPatcher(network, load_device=device, offload_device=torch.device("cpu"))
    vae = SimpleNamespace(encode=lambda image: random(1, 16, 1, 8, 8, seed=7), spacial_compression_encode=lambda: 8)
    return nodes_model_patch.QwenImageDiffsynthControlnet().diffsynth_controlnet(
        model, patch, vae, torch.zeros(1, 64, 64, 3), 0.5
    )[0]


@pytest.mark.parametrize(
    ("family", "patch"), [(SD, masked), (SD, hypernetwork), (QWEN, diffsynth)], ids=["mask", "hypernetwork", "control"]
)
def test_what_patches_hold_may_come_from_inference_mode(
    family: families.Family, patch: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    with torch.inference_mode():
        # As the executor runs nodes.
        made_there = patch(build(family), tmp_path)
    found = gradient_of(family, made_there)
    assert torch.equal(found, gradient_of(family, patch(build(family), tmp_path)))
    assert not torch.allclose(found, gradient_of(family, build(family)), rtol=0.1)


def test_writing_into_what_a_patch_holds_is_one_sentence() -> None:
    with torch.inference_mode():
        held = torch.zeros(1)
    patched = build(SD).clone()

    def patch(tensor: torch.Tensor, options: Any) -> torch.Tensor:
        held.add_(1)
        return tensor

    patched.set_model_attn2_output_patch(patch)
    with pytest.raises(ElrondError, match=r"^SD15, with its patches, cannot be differentiated: .*\.$"):
        gradient_of(SD, patched)


def twice(family: families.Family, model: Any, level: float, negative: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The same gradient at the beginning of a visit and after another one at a higher level."""

    def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def one(level: float) -> torch.Tensor:
            noise = random(*realizations[:1].shape, seed=5)
            return gradient(denoiser, realizations[:1], realizations[1:], noise, host.sigma_of(model, level))[0][0]

        first = one(level)
        one(0.9)
        return first, one(level)

    return with_denoiser(family, model, prompt(family), work, negative)


class Momentum:
    """A running average as other packs keep it, in an object."""

    def __init__(self) -> None:
        self.running_average: Any = 0

    def __call__(self, args: dict[str, Any]) -> list[torch.Tensor]:
        cond, uncond = args["conds_out"]
        self.running_average = cond - uncond - 0.5 * self.running_average
        return [uncond + self.running_average, uncond]


def projected(model: Any) -> Any:
    return nodes_apg.APG.execute(model, 1.0, 0.0, -0.5).args[0]


def with_momentum(model: Any) -> Any:
    patched = model.clone()
    patched.set_model_sampler_pre_cfg_function(Momentum())
    return patched


@pytest.mark.parametrize("patch", [projected, with_momentum])
def test_averages_over_the_steps_begin_anew(patch: Callable[[Any], Any], caplog: pytest.LogCaptureFixture) -> None:
    with torch.inference_mode():
        model = patch(build(SD))
    first, second = twice(SD, model, 0.5, NEGATIVE)
    # A sampling that stops early leaves an average of its own.
    noise = random(2, *SD.latent, seed=7)
    with torch.inference_mode():
        comfy.sample.sample(
            model, noise, 4, 3.0, "euler", "simple", prompt(SD), NEGATIVE, noise, last_step=2, disable_pbar=True, seed=0
        )
    third, fourth = twice(SD, model, 0.5, NEGATIVE)
    assert all(torch.equal(each, first) for each in (second, third, fourth))
    assert "begins anew" in caplog.text
    assert error_of(SD, model, negative=NEGATIVE) < 1e-3


def test_sampling_goes_on_with_its_own_average() -> None:
    model = with_momentum(build(SD))
    (patch,) = model.model_options["sampler_pre_cfg_function"]
    patch.running_average = 1.0
    twice(SD, model, 0.5, NEGATIVE)
    assert patch.running_average == 1.0


class TeaCache:
    """A wrapper of the model's call as another pack makes it."""

    def __init__(self) -> None:
        self.last: Any = None

    def __call__(self, apply: Callable[..., Any], given: dict[str, Any]) -> torch.Tensor:
        if self.last is None:
            self.last = apply(given["input"], given["timestep"], **given["c"])
        return self.last


def tea(model: Any) -> Any:
    patched = model.clone()
    patched.set_model_unet_function_wrapper(TeaCache())
    return patched


@pytest.mark.parametrize(
    "patch",
    [
        lambda model: nodes_easycache.EasyCacheNode.execute(model, 3.0, 0.0, 1.0, False).args[0],
        lambda model: nodes_easycache.LazyCacheNode.execute(model, 3.0, 0.0, 1.0, False).args[0],
        tea,
    ],
    ids=["EasyCache", "LazyCache", "TeaCache"],
)
def test_what_reuses_other_steps_is_off_for_the_time_being(
    patch: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = build(SD)
    expected = twice(SD, model, 0.5)
    patched = patch(model)
    before = (patched.model_options.keys(), {kind: dict(each) for kind, each in patched.wrappers.items()})
    found = twice(SD, patched, 0.5)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert (patched.model_options.keys(), patched.wrappers) == before
    assert "cache is off while gradients are taken" in caplog.text.lower()


def result(returned: Any) -> Any:
    """What a node returns, in the form of any version of the host."""
    return returned[0] if isinstance(returned, tuple) else returned.args[0]


@pytest.mark.parametrize(
    "patch",
    [
        lambda model: result(nodes_tomesd.TomePatchModel.execute(model, 0.5)),
        lambda model: result(nodes_hypertile.HyperTile.execute(model, 32, 4, 0, False)),
    ],
    ids=["token merging", "HyperTile"],
)
def test_patches_that_draw_random_numbers_draw_the_same(patch: Callable[[Any], Any]) -> None:
    with torch.inference_mode():
        model = patch(build(SD))

    def collected(seed: int, batch_size: int) -> torch.Tensor:
        def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> torch.Tensor:
            sigma = host.sigma_of(model, 0.6)
            plan = CollectionPlan(4, (sigma,), 0, batch_size)
            return collect(denoiser, realizations, Provenance("test"), plan).vectors

        torch.manual_seed(seed)
        return with_denoiser(SD, model, prompt(SD), work)

    first = collected(1, 2)
    assert torch.equal(collected(2, 2), first)
    torch.testing.assert_close(collected(3, 1), first, rtol=1e-3, atol=1e-5)
    # And those of the process go on as if nothing had been drawn.
    state = torch.get_rng_state()
    assert torch.equal(state, torch.manual_seed(3).get_state())
    # Which tokens are merged has no derivative; that they are shows.
    assert not torch.allclose(gradient_of(SD, model), gradient_of(SD, build(SD)), rtol=0.01)


def hooked(strengths: dict[float, float], guarantee: int = 1) -> Any:
    """The prompt with a LoRA whose strength depends on how far the sampling is."""
    up, down = random(64, 4, seed=8), random(4, families.WIDTH, seed=9)
    lora = {f"diffusion_model.{LAYER}.lora_up.weight": up, f"diffusion_model.{LAYER}.lora_down.weight": down}
    hooks = comfy.hooks.create_hook_lora(lora, 0.5, 0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for start, strength in strengths.items():
        keyframes.add(comfy.hooks.HookKeyframe(strength, start, guarantee))
    hooks.set_keyframes_on_hooks(keyframes)
    return [[tensor, {**options, "hooks": hooks}] for tensor, options in prompt(SD)]


def merged(strength: float) -> Any:
    model = build(SD)
    up, down = random(64, 4, seed=8), random(4, families.WIDTH, seed=9)
    model.model.diffusion_model.get_submodule(LAYER).weight.data += 0.5 * strength * up @ down
    return model


@pytest.mark.parametrize("guarantee", [0, 1, 3])
def test_hooks_have_the_strength_that_they_have_at_that_level(guarantee: int) -> None:
    model, positive = build(SD), hooked({0.0: 1.0, 0.25: 0.6, 0.5: 0.0}, guarantee)

    def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> list[torch.Tensor]:
        noise = random(*realizations[:1].shape, seed=5)
        return [
            gradient(denoiser, realizations[:1], realizations[1:], noise, host.sigma_of(model, level))[0][0]
            for level in levels
        ]

    # In any order, as the levels of a collection take turns.
    levels, strengths = (0.3, 0.9, 0.6, 0.3, 0.9), (0.0, 1.0, 0.6, 0.0, 1.0)
    found = with_denoiser(SD, model, positive, work)
    for one, level, strength in zip(found, levels, strengths, strict=True):
        expected = gradient_of(SD, merged(strength), level=level)
        torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(found[1], gradient_of(SD, model, level=0.9), rtol=0.1)
    # And the model is as it was.
    assert torch.equal(gradient_of(SD, model), gradient_of(SD, build(SD)))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_hooks_of_the_positive_only(checkpointed: bool) -> None:
    """The weights change between the positive's pass and the negative's; the backward pass needs those of each."""
    model, positive = build(SD), hooked({0.0: 1.0})

    def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> torch.Tensor:
        denoiser.checkpointed = checkpointed
        sigma, noise = host.sigma_of(model, 1.0), random(*realizations[:1].shape, seed=5)
        return gradient(denoiser, realizations[:1], realizations[1:], noise, sigma)[0][0]

    found = with_denoiser(SD, model, positive, work, NEGATIVE)

    def slopes(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> float:
        sigma, noise = host.sigma_of(model, 1.0), random(*realizations[:1].shape, seed=5)
        noisy, along = denoiser.noised(realizations[:1], noise, sigma), found / found.norm()

        def loss(step: float) -> float:
            estimate = denoiser.denoised(noisy, sigma, (denoiser.rows + step * along)[None].to(noisy))
            return float(((estimate.cpu() - realizations[1:].cpu()).double() ** 2).mean())

        return (8 * (loss(0.07) - loss(-0.07)) - (loss(0.14) - loss(-0.14))) / (12 * 0.07)

    assert with_denoiser(SD, model, positive, slopes, NEGATIVE) == pytest.approx(float(found.norm()), rel=1e-3)


def timed(first: float, last: float, seed: int) -> list[Any]:
    ((tensor, options),) = prompt(SD, seed)
    return [tensor, {**options, "start_percent": first, "end_percent": last}]


def test_the_prompt_of_that_level_is_differentiated() -> None:
    model = build(SD)
    early, late = timed(0.0, 0.5, 1), timed(0.5001, 1.0, 2)
    for positive in ([early, late], [late, early]):
        for level, seed in ((0.9, 1), (0.3, 2)):
            found = gradient_of(SD, model, positive, level=level)
            assert torch.equal(found, gradient_of(SD, model, prompt(SD, seed), level=level))
    # As the host's text encoders mark the prompts of a schedule.
    scheduled = [
        [
            tensor,
            {"clip_start_percent": o["start_percent"], "clip_end_percent": o["end_percent"], host.MARK: o[host.MARK]},
        ]
        for tensor, o in (early, late)
    ]
    assert torch.equal(gradient_of(SD, model, scheduled, level=0.3), gradient_of(SD, model, prompt(SD, 2), level=0.3))


def test_levels_of_a_collection_have_the_prompt_of_each() -> None:
    model, positive = build(SD), [timed(0.0, 0.5, 1), timed(0.5001, 1.0, 2)]
    levels = tuple(host.sigma_of(model, level) for level in (0.9, 0.3))

    def collected(positive: Any) -> torch.Tensor:
        def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> torch.Tensor:
            plan = CollectionPlan(4, levels, 0, 1)
            return collect(denoiser, realizations, Provenance("test"), plan).vectors

        return with_denoiser(SD, model, positive, work)

    found = collected(positive)
    for level, seed in enumerate((1, 2)):
        assert torch.equal(found[level::2], collected(prompt(SD, seed))[level::2])


def test_a_prompt_that_does_not_act_says_so(nodes: dict[str, Any]) -> None:
    model, plain = build(SD), [random(1, families.ROWS, families.WIDTH, seed=12), {}]
    with pytest.raises(ElrondError, match=r"does not act at this noise level.* 0 to 0\.5\. Choose"):
        gradient_of(SD, model, [timed(0.5, 1.0, 1), plain], level=0.9)
    collect_gradients = nodes["ElrondCollectGradients"].execute
    realizations = {"samples": random(2, *SD.latent, seed=2)}
    with pytest.raises(ElrondError, match="does not act at this noise level"):
        collect_gradients(model, [timed(0.5, 1.0, 1), plain], realizations, 2, 0.3, 1, 0, False, more_levels="0.9")
    gradients = collect_gradients(model, [timed(0.0, 0.5, 1), timed(0.5001, 1.0, 2)], realizations, 2, 0.3, 1, 0, False)
    alone = collect_gradients(model, prompt(SD, 2), realizations, 2, 0.3, 1, 0, False)
    assert torch.equal(gradients.args[0].vectors, alone.args[0].vectors)
