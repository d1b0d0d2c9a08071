"""The gradient on every model family the host has, and on models as users have them: patched, quantised, guided."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.cldm.cldm
import comfy.cli_args
import comfy.controlnet
import comfy.model_management
import comfy.ops
import comfy.quant_ops
import comfy.sd
import numpy as np
import pytest
import torch
from comfy.ldm.modules import attention
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras import nodes_model_advanced
from comfyui_elrond.elrond_core.collect.collection import CollectionPlan, collect
from comfyui_elrond.elrond_core.collect.differentiate import gradient
from comfyui_elrond.elrond_core.collect.saved import SavedTensors
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.prompt import Concept
from comfyui_elrond.elrond_core.provenance import Provenance
from comfyui_elrond.elrond_core.steering.apply import steer
from comfyui_elrond.nodes import host
from comfyui_elrond.nodes.host import gradient_patches
from comfyui_version import __version__ as HOST_VERSION
from torch.utils._python_dispatch import _get_current_dispatch_mode

# isort: split
sys.path.append(str(Path(__file__).parent))

import families
from families import FAMILIES, HOSTS, KNOWN, Family, build, latents, prompt, random
from precision import DoublePrecision
from sampling import sample

NAMED = {family.name: family for family in FAMILIES}
# Families that this host does not have are skipped by name.
EVERY_FAMILY = pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            family,
            id=family.name,
            marks=pytest.mark.skipif(
                family not in FAMILIES, reason=f"ComfyUI {HOST_VERSION} does not have {family.name}"
            ),
        )
        for family in KNOWN
    ],
)
SD, SDXL, FLUX = NAMED["SD 1.x"], NAMED["SDXL"], NAMED["Flux dev"]
MODELS = Path(__file__).parents[2] / "docs" / "models.md"
FAMILIES_TABLE = "| family | ComfyUI's class | rows of a prompt | ComfyUI |\n| --- | --- | --- | --- |\n" + "".join(
    f"| {family.name} | `{family.config}` | {family.encoder} | {', '.join(family.hosts)} |\n" for family in KNOWN
)


def with_denoiser(family: Family, model: Any, positive: Any, work: Callable[..., Any], negative: Any = None) -> Any:
    return host.with_denoiser(model, positive, negative, 3.0, latents(family), 0, work)


def gradient_of(
    family: Family, model: Any, positive: Any = None, negative: Any = None, level: float = 1.0
) -> torch.Tensor:
    """(R, d): one gradient."""

    def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> torch.Tensor:
        noise = random(*realizations[:1].shape, seed=5)
        sigma = host.sigma_of(model, level)
        return gradient(denoiser, realizations[:1], realizations[1:], noise, sigma)[0][0]

    return with_denoiser(family, model, positive or prompt(family), work, negative)


def derivative(function: Callable[[float], float], step: float, steps: int) -> float:
    """The derivative at zero, by Ridders' method: central differences at steps that halve, extrapolated to step zero.

    How strongly a family curves, and how much rounding hides of it, differs by orders of magnitude. Of all
    extrapolations the one is taken that differs least from the two that it is made of. Begin with a long step: rounding
    in single precision, which differs by machine, hides the change along a short one.
    """
    best, least = math.nan, math.inf
    before: list[float] = []
    for _ in range(steps):
        row = [(function(step) - function(-step)) / (2 * step)]
        for order, coarse in enumerate(before, 1):
            row.append((4**order * row[-1] - coarse) / (4**order - 1))
            error = max(abs(row[-1] - row[-2]), abs(row[-1] - coarse))
            if error < least:
                best, least = row[-1], error
        before, step = row, step / 2
    return best


def error_of(family: Family, model: Any, positive: Any = None, negative: Any = None) -> float:
    """The largest relative difference between the gradient and central finite differences, along two directions."""
    vector = gradient_of(family, model, positive, negative)
    # Rounding hides shorter vectors and the change along shorter steps.
    least, first = (1e-4, 3.2) if vector.dtype == torch.float32 else (1e-8, 0.1)
    assert vector.norm() > least

    def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> float:
        sigma = host.sigma_of(model, 1.0)
        noisy = denoiser.noised(realizations[:1], random(*realizations[:1].shape, seed=5), sigma)

        def loss(rows: torch.Tensor) -> float:
            estimate = denoiser.denoised(noisy, sigma, rows[None].to(noisy))
            return float(((estimate.cpu() - realizations[1:].cpu()).double() ** 2).mean())

        errors = []
        for seed in range(2):
            # Along a random direction the slope may happen to be near zero, so each is tilted towards the gradient.
            direction = torch.nn.functional.normalize(random(*vector.shape, seed=seed), dim=None)
            direction = direction + vector / vector.norm()
            slope = derivative(lambda step, along=direction: loss(denoiser.rows + step * along), first, 6)
            errors.append(abs(slope / float((vector * direction).sum()) - 1))
        return max(errors)

    return with_denoiser(family, model, positive or prompt(family), work, negative)


def double_error_of(family: Family, model: Any, positive: Any) -> float:
    """As `error_of`, of the gradient in single precision from the one in double, which is compared with differences."""
    single = gradient_of(family, model, positive)
    exact = build(family, torch.float64)
    with DoublePrecision():
        assert error_of(family, exact, positive) < 1e-6
        double = gradient_of(family, exact, positive)
    assert double.dtype == torch.float64
    return float((single - double).norm() / double.norm())


def steered(positive: Any, change: torch.Tensor) -> Any:
    return host.steer_conditioning(positive, lambda memory: (memory.concepts[0].rows, change), 0.0, 1.0)


def assert_view_is_the_sampler(family: Family, model: Any, positive: Any, negative: Any = None) -> None:
    """Rows replaced in the differentiable view give what the host makes of a conditioning with these rows."""
    change = random(1, len(families.CONCEPT.rows), families.WIDTH, seed=6)

    def estimate(by: float) -> Callable[..., torch.Tensor]:
        def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> torch.Tensor:
            sigma = host.sigma_of(model, 1.0)
            noisy = denoiser.noised(realizations[:1], random(*realizations[:1].shape, seed=5), sigma)
            return denoiser.denoised(noisy, sigma, (denoiser.rows + by * change).to(noisy))

        return work

    replaced = with_denoiser(family, model, positive, estimate(1.0), negative)
    moved = [[steer(t, families.CONCEPT.rows, change) if host.MARK in o else t, o] for t, o in positive]
    encoded = with_denoiser(family, model, moved, estimate(0.0), negative)
    assert torch.equal(replaced, encoded)
    assert not torch.equal(replaced, with_denoiser(family, model, positive, estimate(0.0), negative))


def assert_samples_of_a_batch_are_apart(family: Family, model: Any, positive: Any) -> None:
    """Every sample of a batch is conditioned on its own rows only."""
    change = random(1, len(families.CONCEPT.rows), families.WIDTH, seed=6)

    def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> None:
        sigma = host.sigma_of(model, 1.0)
        noisy = denoiser.noised(realizations, random(*realizations.shape, seed=5), sigma)
        rows = torch.cat([denoiser.rows[None], denoiser.rows + change]).to(noisy)
        both = denoiser.denoised(noisy, sigma, rows)
        for i in range(2):
            alone = denoiser.denoised(noisy[i : i + 1], sigma, rows[i : i + 1])
            torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))

    with_denoiser(family, model, positive, work)


def picture(family: Family, model: Any, positive: Any) -> torch.Tensor:
    noise = random(1, *family.latent, seed=7)
    return sample(model, positive, noise, 2)


@EVERY_FAMILY
def test_family(family: Family, record_property: Callable[[str, object], None]) -> None:
    with torch.inference_mode():
        # As a loader node makes them, while the executor is in inference mode.
        model, positive = build(family), prompt(family)
    before = picture(family, model, positive)
    error = double_error_of(family, model, positive) if family.curved else error_of(family, model, positive)
    record_property("relative error", error)
    print(f"\n{family.name}: relative error {error:.1e}")
    assert error < 1e-3
    assert_view_is_the_sampler(family, model, positive)
    assert_samples_of_a_batch_are_apart(family, model, positive)
    change = random(len(families.CONCEPT.rows), families.WIDTH, seed=6)
    assert torch.equal(picture(family, model, positive), before)
    assert torch.equal(picture(family, model, steered(positive, 0 * change)), before)
    assert not torch.equal(picture(family, model, steered(positive, change)), before)


@EVERY_FAMILY
def test_other_rows_change_the_gradient_as_the_mathematics_says(family: Family) -> None:
    """Second derivatives are symmetric: another row changes the concept's gradient as the concept changes its own."""
    with torch.inference_mode():
        model, ((encoded, options),) = build(family), prompt(family)
    mine, other = families.CONCEPT, Concept("other", (1,), ("other",))
    along = {c: random(len(c.rows), families.WIDTH, seed=c.rows[0]) / families.WIDTH**0.5 for c in (mine, other)}

    def slope(of: Concept, moved: Concept) -> float:
        """Along the first, of the gradient's part, as the second moves along its own direction."""

        def part(step: float) -> float:
            rows = steer(encoded, moved.rows, step * along[moved])
            there = host.mark([[rows, dict(options)]], family.name, "a dog", [of])
            return float((gradient_of(family, model, there).double() * along[of]).sum())

        return derivative(part, 0.6, 4)

    # HunyuanDiT's rows hardly act together: what its slopes have is below what single precision can tell.
    assert slope(mine, other) == pytest.approx(slope(other, mine), rel=5e-3, abs=1e-7)


def test_rows_that_are_masked_out_do_not_matter() -> None:
    family = NAMED["HunyuanDiT"]
    model, positive = build(family), prompt(family)
    assert positive[0][1]["attention_mask"][0, -1] == 0
    ((encoded, options),) = positive
    masked, seen = (steer(encoded, (row,), torch.ones(1, families.WIDTH)) for row in (families.ROWS - 1, 1))
    before = gradient_of(family, model, positive)
    assert torch.equal(gradient_of(family, model, [[masked, options]]), before)
    assert not torch.allclose(gradient_of(family, model, [[seen, options]]), before, rtol=0.01)


@pytest.mark.parametrize(("name", "cell"), [("SDXL", 8), ("Flux.2", 16), ("HunyuanImage 2.1", 32), ("Qwen-Image", 8)])
def test_empty_latents_have_the_size_asked_for(name: str, cell: int) -> None:
    empty = host.empty_latent(build(NAMED[name]), 512, 256, 3)
    assert empty.shape == (3, NAMED[name].latent[0], *NAMED[name].latent[1:-2], 256 // cell, 512 // cell)


def test_the_models_page_lists_the_families_proven_here() -> None:
    assert FAMILIES_TABLE in MODELS.read_text(encoding="utf-8"), (
        f"Put this table into docs/models.md:\n{FAMILIES_TABLE}"
    )


@pytest.mark.skipif(HOST_VERSION not in HOSTS, reason=f"the table says nothing of ComfyUI {HOST_VERSION}")
def test_the_table_says_which_versions_have_a_family() -> None:
    assert {family.name for family in FAMILIES} == {family.name for family in KNOWN if HOST_VERSION in family.hosts}


@pytest.mark.parametrize(
    ("family", "patch"),
    [
        (SD, lambda model: nodes_model_advanced.ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]),
        (NAMED["SD 3 / 3.5"], lambda model: nodes_model_advanced.ModelSamplingSD3().patch(model, 5.0)[0]),
        (FLUX, lambda model: nodes_model_advanced.ModelSamplingFlux().patch(model, 1.15, 0.5, 512, 512)[0]),
    ],
    ids=["Discrete", "SD3", "Flux"],
)
def test_model_sampling_patches(family: Family, patch: Callable[[Any], Any]) -> None:
    plain = build(family)
    patched = patch(plain)
    assert error_of(family, patched) < 1e-3
    # A flow's highest level is 1 whatever its shift.
    assert not torch.allclose(gradient_of(family, patched, level=0.6), gradient_of(family, plain, level=0.6), rtol=0.1)


def test_weights_that_were_moved_out_of_inference_mode() -> None:
    """A loader makes weights in inference mode; moved to a graphics card outside of it, they have no version."""
    with torch.inference_mode():
        model = build(SD)
    # As a move to another device does.
    model.model.double()
    model.model.float()
    weight = next(model.model.diffusion_model.parameters())
    assert not weight.is_inference()
    with pytest.raises(RuntimeError, match="version counter"):
        weight._version  # noqa: B018
    assert torch.equal(gradient_of(SD, model), gradient_of(SD, build(SD)))


def test_a_lora_counts_as_if_merged() -> None:
    layer = "middle_block.1.transformer_blocks.0.attn2.to_v"
    up, down = random(64, 4, seed=8), random(4, families.WIDTH, seed=9)
    lora = {f"diffusion_model.{layer}.lora_up.weight": up, f"diffusion_model.{layer}.lora_down.weight": down}
    plain = build(SD)
    patched, _ = comfy.sd.load_lora_for_models(plain, None, lora, 0.5, 0.0)
    found = gradient_of(SD, patched)
    merged = build(SD)
    merged.model.diffusion_model.get_submodule(layer).weight.data += 0.5 * up @ down
    torch.testing.assert_close(found, gradient_of(SD, merged), rtol=1e-4, atol=1e-5)
    base = gradient_of(SD, plain)
    assert not torch.allclose(found, base, rtol=0.1)
    assert torch.equal(base, gradient_of(SD, build(SD)))


def rounded(family: Family, dtype: torch.dtype) -> Any:
    """The family in float32 with weights that have been through `dtype`."""
    model = build(family)
    for weight in model.model.diffusion_model.parameters():
        weight.data = weight.to(dtype).float()
    return model


@pytest.mark.parametrize("family", [SDXL, FLUX], ids=lambda family: family.name)
@pytest.mark.parametrize(
    ("stored", "operations"),
    [(torch.bfloat16, None), (torch.float8_e4m3fn, None), (torch.float8_e4m3fn, comfy.ops.fp8_ops)],
    ids=["bf16", "fp8", "fp8 fast"],
)
def test_weights_stored_in_fewer_bits(family: Family, stored: torch.dtype, operations: Any) -> None:
    kernel = comfy.ops.fp8_linear
    found = gradient_of(family, build(family, stored, torch.float32, operations))
    torch.testing.assert_close(found, gradient_of(family, rounded(family, stored)), rtol=1e-4, atol=1e-5)
    assert comfy.ops.fp8_linear is kernel


def test_quantised_layers_count_in_full_precision() -> None:
    def cut(model: Any) -> Any:
        return {k: v.clone() for k, v in model.model.diffusion_model.state_dict().items()}

    layer = "middle_block.1.transformer_blocks.0.attn2.to_v"
    weights = cut(build(SD))
    scale = weights[f"{layer}.weight"].abs().amax() / 448
    quantised = (weights[f"{layer}.weight"] / scale).to(torch.float8_e4m3fn)
    merged = build(SD)
    merged.model.diffusion_model.get_submodule(layer).weight.data = quantised.float() * scale
    stored = {f"{layer}.weight": quantised, f"{layer}.weight_scale": scale, f"{layer}.input_scale": scale}
    kind = {"format": "float8_e4m3fn"}
    if "layer_quant_config" in inspect.signature(comfy.ops.mixed_precision_ops).parameters:
        operations = comfy.ops.mixed_precision_ops({layer: kind}, torch.float32)
    else:
        # Newer hosts keep a layer's format in the state dict.
        operations = comfy.ops.mixed_precision_ops({}, torch.float32)
        stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(kind).encode()), dtype=torch.uint8)
    # Its layers get their weights when a state dict is loaded.
    model = build(SD, operations=operations)
    model.model.diffusion_model.load_state_dict({**weights, **stored})
    for weight in model.model.diffusion_model.parameters():
        weight.requires_grad_(False)
    torch.testing.assert_close(gradient_of(SD, model), gradient_of(SD, merged), rtol=1e-4, atol=1e-4)
    assert model.model.diffusion_model.get_submodule(layer)._full_precision_mm is False


def test_a_patched_attention_kernel_does_not_lose_the_gradient() -> None:
    model = build(SD)
    expected = gradient_of(SD, model)

    def kernel(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return function(*args, **kwargs)

    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = kernel
    assert torch.equal(gradient_of(SD, patched), expected)
    assert patched.model_options["transformer_options"]["optimized_attention_override"] is kernel


@pytest.mark.parametrize("family", [SD, NAMED["HunyuanDiT"]], ids=lambda family: family.name)
def test_an_attention_kernel_of_the_host_does_not_lose_the_gradient(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    expected = gradient_of(family, model)
    usual = attention.optimized_attention

    def attention_sage(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return usual(*args, **kwargs)

    # As the host's own start-up option does it, before its models import the kernel.
    kernel = attention.wrap_attn(attention_sage)
    importers = [m for m in list(sys.modules.values()) if m.__dict__.get("optimized_attention") is usual]
    assert len(importers) > 5
    for module in importers:
        monkeypatch.setattr(module, "optimized_attention", kernel)
    assert torch.equal(gradient_of(family, model), expected)
    assert all(module.optimized_attention is kernel for module in importers)


@pytest.mark.parametrize("family", [SD, FLUX], ids=lambda family: family.name)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.skipif(
    comfy.model_management.get_torch_device().type != "cpu", reason="raw memory is only had on the processor"
)
def test_weights_that_are_lent_in_memory_that_is_used_again(
    family: Family, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As hosts newer than that of the tests do where weights do not fit on the device: one buffer for all layers."""
    model = build(family, operations=comfy.ops.manual_cast)

    def found() -> torch.Tensor:
        def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> torch.Tensor:
            denoiser.checkpointed = checkpointed
            noise = random(*realizations[:1].shape, seed=5)
            return gradient(denoiser, realizations[:1], realizations[1:], noise, 1.0)[0]

        return with_denoiser(family, model, prompt(family), work)

    expected = found()
    cast, lent = comfy.ops.cast_bias_weight, []
    # Raw memory, of which every layer makes tensors of its own: nobody counts how often it is written to.
    memory = np.empty(2**20, dtype=np.float32)

    def lend(layer: Any, *args: Any, **kwargs: Any) -> Any:
        found, place = [], 0
        for weight in cast(layer, *args, **kwargs)[:2]:
            if weight is not None:
                memory[place : place + weight.numel()] = weight.flatten().numpy()
                weight = torch.from_numpy(memory[place : place + weight.numel()]).view(weight.shape)
                place += weight.numel()
            found.append(weight)
        lent.append(layer)
        return (*found, None)

    class Elsewhere:
        """A layer whose own weights are on another device."""

        def __init__(self, layer: Any) -> None:
            self.weight = layer.weight.to("meta")
            self.bias = None if layer.bias is None else layer.bias.to("meta")
            self.layer = layer

    lasting = gradient_patches.lasting_weights
    monkeypatch.setattr(
        comfy.ops, "cast_bias_weight", lambda layer, *a, **k: lend(getattr(layer, "layer", layer), *a, **k)
    )
    monkeypatch.setattr(
        gradient_patches, "lasting_weights", lambda cast, layer, *a, **k: lasting(cast, Elsewhere(layer), *a, **k)
    )
    assert torch.equal(found(), expected)
    assert len(set(lent)) > 20
    # And this is what it takes.
    monkeypatch.setattr(gradient_patches, "lasting_weights", lambda cast, *a, **k: cast(*a, **k))
    assert not torch.allclose(found(), expected, rtol=0.1)


def test_weights_that_are_only_lent_are_not_copied() -> None:
    with torch.inference_mode():
        layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    # Newer hosts mark layers whose weights they lend.
    layers[1]._v = (0, 0, 0)
    given = layers[0].weight, layers[1].weight
    gradient_patches.normal_copies(layers)
    assert not layers[0].weight.is_inference() and torch.equal(layers[0].weight, given[0])
    assert layers[0].weight.requires_grad == given[0].requires_grad
    assert layers[1].weight is given[1]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (comfy.model_management, "in_training"),
        (comfy.cli_args.args, "disable_comfy_compiler"),
        (comfy.cli_args.args, "disable_cuda_graphs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ways_to_compute_without_a_derivative_are_off_for_the_time_being(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(owner, name):
        pytest.skip(f"ComfyUI {HOST_VERSION} has no setting {name}")
    monkeypatch.setattr(owner, name, False)

    def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> None:
        assert getattr(owner, name) is True
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        with_denoiser(SD, build(SD), prompt(SD), work)
    assert getattr(owner, name) is False


class _Keeping(torch.nn.Module):
    """As newer families do with the text: what one call computed serves the next."""

    prefix_cache_enabled = True
    kept: torch.Tensor | None = None

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        if not self.prefix_cache_enabled or self.kept is None:
            self.kept = 2 * text
        return self.kept


def test_what_an_earlier_call_left_is_not_used() -> None:
    network = torch.nn.Sequential(_Keeping())
    network(torch.ones(1))
    with gradient_patches.exact(network):
        assert network(torch.full((1,), 3.0)) == 6
    assert network(torch.full((1,), 4.0)) == 6


def test_a_compiled_model() -> None:
    """As the stock TorchCompileModel node makes it, here of one block and by the back end that needs no C compiler."""
    model = build(SD)
    compiled = model.clone()
    keys = ["diffusion_model.middle_block.1.transformer_blocks.0"]
    set_torch_compile_wrapper(compiled, backend="aot_eager", keys=keys)
    found = gradient_of(SD, compiled)
    torch.testing.assert_close(found, gradient_of(SD, model), rtol=1e-5, atol=1e-6)


def test_settings_that_this_host_does_not_have_stay_away() -> None:
    owner = SimpleNamespace(there=1)
    with (
        gradient_patches.replaced_attribute(owner, "there", 2),
        gradient_patches.replaced_attribute(owner, "not there", 3),
    ):
        assert vars(owner) == {"there": 2}
    assert vars(owner) == {"there": 1}


def test_a_control_model_takes_part() -> None:
    model = build(SD)
    with torch.inference_mode():
        size = {k: v for k, v in model.model.model_config.unet_config.items() if not k.startswith("out_channels")}
        network = comfy.cldm.cldm.ControlNet(**size, hint_channels=3, operations=comfy.ops.disable_weight_init)
        generator = torch.Generator().manual_seed(1)
        for weight in network.state_dict().values():
            weight.copy_(torch.randn(weight.shape, generator=generator) / max(weight[0].numel(), 16) ** 0.5)
        device = comfy.model_management.get_torch_device()
        control = comfy.controlnet.ControlNet(network, load_device=device)
        control.set_cond_hint(random(1, 3, 64, 64, seed=14), 1.0)
        positive = [[t, {**o, "control": control}] for t, o in prompt(SD)]
    flags = [p.requires_grad for p in network.parameters()]
    assert error_of(SD, model, positive) < 1e-3
    assert_view_is_the_sampler(SD, model, positive)
    assert not torch.allclose(gradient_of(SD, model, positive), gradient_of(SD, model), rtol=0.1)
    assert [p.requires_grad for p in network.parameters()] == flags


class _OneWay(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()


def test_what_has_no_derivative_is_named() -> None:
    one_way = build(SDXL).clone()
    one_way.set_model_attn2_output_patch(lambda tensor, options: _OneWay.apply(tensor))
    with pytest.raises(ElrondError, match=r"^SDXL, with its patches, cannot be differentiated: .*\.$"):
        gradient_of(SDXL, one_way)
    cut = build(SDXL).clone()
    cut.set_model_attn2_output_patch(lambda tensor, options: tensor.detach())
    with pytest.raises(ElrondError, match="SDXL cannot be differentiated"):
        gradient_of(SDXL, cut)
    late = [[t, {**o, "start_percent": 0.5}] for t, o in prompt(SDXL)]
    beside = [*late, [random(1, families.ROWS, families.WIDTH, seed=12), dict(SDXL.options)]]
    with pytest.raises(ElrondError, match="at this noise level"):
        gradient_of(SDXL, build(SDXL), beside)
    assert gradient_of(SDXL, build(SDXL), beside, level=0.3).norm() > 1e-4


def test_guidance_and_a_negative() -> None:
    negative = [[random(1, 9, families.WIDTH, seed=11), dict(SDXL.options)]]
    assert error_of(SDXL, build(SDXL), negative=negative) < 1e-3
    assert_view_is_the_sampler(SDXL, build(SDXL), prompt(SDXL), negative)


def test_an_inpainting_model() -> None:
    # Its image and mask are blank, as the host's sampler makes them for a plain latent.
    inpainting = replace(SD, unet={**SD.unet, "in_channels": 9})
    assert error_of(inpainting, build(inpainting)) < 1e-3
    assert_view_is_the_sampler(inpainting, build(inpainting), prompt(inpainting))


AREA = {"area": (4, 8, 0, 0)}


@pytest.mark.parametrize(
    ("mine", "other", "negative"),
    [
        ({}, {}, None),
        (AREA, {}, None),
        ({"mask": (torch.arange(64.0) % 2).view(1, 8, 8), "mask_strength": 0.7}, {}, None),
        ({"strength": 0.3}, {"strength": 0.6}, None),
        ({}, None, AREA),
    ],
    ids=["two entries", "area", "mask", "strength", "area of the negative"],
)
def test_only_the_marked_entry_is_differentiated(mine: Any, other: Any, negative: Any) -> None:
    model = build(SD)
    entries = [[t, {**o, **mine}] for t, o in prompt(SD)]
    if other is not None:
        # First, so that a mix-up of entries shows.
        entries.insert(0, [random(1, families.ROWS, families.WIDTH, seed=12), other])
    against = None if negative is None else [[random(1, families.ROWS, families.WIDTH, seed=13), negative]]
    assert error_of(SD, model, entries, against) < 1e-3
    assert_view_is_the_sampler(SD, model, entries, against)


def test_an_entry_beside_the_marked_one_halves_its_gradient() -> None:
    ((tensor, options),) = prompt(SD)
    beside = [[tensor, options], [tensor.clone(), {}]]
    # Their mean is the estimate of the marked one alone, of which the marked one is half.
    torch.testing.assert_close(gradient_of(SD, build(SD), beside), gradient_of(SD, build(SD)) / 2, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", [SD, FLUX], ids=lambda family: family.name)
def test_two_collections_of_one_model(family: Family) -> None:
    model = build(family)

    def collected(seed: int) -> torch.Tensor:
        def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> torch.Tensor:
            sigma = host.sigma_of(model, 1.0)
            return collect(
                denoiser, realizations, Provenance("test"), CollectionPlan(3, (sigma,), 0, 2, probes=True)
            ).vectors

        return with_denoiser(family, model, prompt(family, seed), work)

    first, second = collected(1), collected(2)
    assert torch.equal(collected(1), first)
    assert not torch.allclose(first, second)


def test_the_remedy_for_writing_in_place_is_gone_after_each_forward_pass() -> None:
    model = build(FLUX)
    modes: list[Any] = []

    def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> None:
        block = denoiser.checkpointing.blocks[0]
        hook = block.register_forward_hook(lambda *_: modes.append(_get_current_dispatch_mode()))
        try:
            gradient(denoiser, realizations[:1], realizations[1:], realizations[:1], 1.0)
        finally:
            hook.remove()
        assert _get_current_dispatch_mode() is None
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        with_denoiser(FLUX, model, prompt(FLUX), work)
    # In the pass by which memory is counted, and in the one for the gradient.
    assert [type(mode) for mode in modes] == [SavedTensors, SavedTensors]
    saved = torch.ones(2, requires_grad=True)
    assert (saved**2).grad_fn._saved_self is saved
