"""Gradients through weights as other loaders hold them: packed tensors of a class of their own, and few bits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import pytest
import torch
from comfyui_elrond.elrond_core.collect.differentiate import gradient
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.nodes import host

# isort: split
sys.path.append(str(Path(__file__).parent))

from families import FAMILIES, Family, build, prompt, random
from test_families import error_of, gradient_of, with_denoiser

NAMED = {family.name: family for family in FAMILIES}
SD, FLUX = NAMED["SD 1.x"], NAMED["Flux dev"]
# One step of the packed weights, which are whole numbers of 8 bits.
STEP = 1 / 64


class Packed(torch.Tensor):
    """A weight as loaders of GGUF files hold it: raw bytes, with the shape that they unpack to.

    As theirs, it takes keywords, answers `clone` and `detach` with itself, and says the unpacked shape.
    """

    def __new__(cls, raw: torch.Tensor, *, packed: bool, unpacked: Any) -> Packed:
        return super().__new__(cls, raw)

    def __init__(self, raw: torch.Tensor, *, packed: bool, unpacked: Any) -> None:
        super().__init__()
        self.packed, self.unpacked, self.patches = packed, unpacked, []

    def clone(self, *args: Any, **kwargs: Any) -> Packed:
        return self

    def detach(self) -> Packed:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Packed:
        moved = super().to(*args, **kwargs)
        moved.packed, moved.unpacked, moved.patches = self.packed, self.shape, self.patches
        return moved

    @property
    def shape(self) -> Any:
        return getattr(self, "unpacked", self.size())


class PackedOps(comfy.ops.manual_cast):
    """Layers that unpack their weights on every use."""

    class Linear(comfy.ops.manual_cast.Linear):
        def __init__(self, columns: int, rows: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features, self.weight, self.bias = columns, rows, None, None

        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
            self.weight = torch.nn.Parameter(state[f"{prefix}weight"], requires_grad=False)
            if f"{prefix}bias" in state:
                self.bias = torch.nn.Parameter(state[f"{prefix}bias"], requires_grad=False)

        def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
            # A description, from which memory is estimated, and an estimate of what unpacking takes.
            destination[f"{prefix}weight"] = torch.zeros_like(self.weight, device="meta")
            destination[f"{prefix}temp.weight"] = torch.empty(*self.weight.shape, device="meta")
            if self.bias is not None:
                destination[f"{prefix}bias"] = torch.zeros_like(self.bias, device="meta")

        def forward_comfy_cast_weights(self, tensor: torch.Tensor) -> torch.Tensor:
            if not self.weight.packed:
                return torch.Tensor(super().forward_comfy_cast_weights(tensor))

            def unpack(weight: Packed) -> torch.Tensor:
                moved = weight.to(tensor.device)
                return unpacked(moved).to(tensor.dtype) if weight.packed else torch.Tensor(moved)

            bias = None if self.bias is None else unpack(self.bias)
            return torch.nn.functional.linear(tensor, unpack(self.weight), bias)


def unpacked(weight: Packed) -> torch.Tensor:
    return torch.Tensor(weight.data).view(torch.int8).reshape(weight.shape).float() * STEP


def packed(family: Family) -> tuple[Any, Any]:
    """A family with packed weights, made in inference mode as the executor does, and the same model unpacked."""
    plain = build(family)
    with torch.inference_mode():
        weights = {name: weight.clone() for name, weight in plain.model.diffusion_model.state_dict().items()}
        for number, (part_name, part) in enumerate(plain.model.diffusion_model.named_modules()):
            if isinstance(part, torch.nn.Linear):
                for name in [f"{part_name}.{each}" for each, _ in part.named_parameters()]:
                    weight = weights[name]
                    # Some stay as they are, of the same class, as in files.
                    whole = weight.ndim == 2 and number % 3 > 0
                    raw = weight
                    if whole:
                        raw = (weight / STEP).round().clamp(-128, 127).to(torch.int8).view(torch.uint8).flatten()
                    weights[name] = Packed(raw, packed=whole, unpacked=weight.shape)
        config = build(family).model.model_config
        config.custom_operations = PackedOps
        made = config.get_model(dict(family.detected), device=torch.device("cpu")).eval()
        made.diffusion_model.load_state_dict(weights)
    for name, weight in weights.items():
        if isinstance(weight, Packed) and weight.packed:
            plain.model.diffusion_model.get_parameter(name).data = unpacked(weight).clone()
    return comfy.model_patcher.ModelPatcher(made, plain.load_device, plain.offload_device), plain


@pytest.mark.parametrize("checkpointed", [False, True])
# The last three write into their hidden states.
@pytest.mark.parametrize("name", ["SD 1.x", "Qwen-Image", "Flux dev", "Chroma", "HunyuanImage 2.1"])
def test_packed_weights_count_as_what_they_unpack_to(name: str, checkpointed: bool) -> None:
    family = NAMED[name]
    model, plain = packed(family)

    def work(denoiser: host.HostDenoiser, realizations: torch.Tensor) -> torch.Tensor:
        denoiser.checkpointed = checkpointed
        noise = random(*realizations[:1].shape, seed=5)
        vectors = gradient(denoiser, realizations[:1], realizations[1:], noise, host.sigma_of(model, 1.0))[0]
        assert type(vectors) is torch.Tensor and type(denoiser.latest) is torch.Tensor
        return vectors

    found, expected = (with_denoiser(family, each, prompt(family), work) for each in (model, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, with_denoiser(family, build(family), prompt(family), work), rtol=1e-3)


def test_packed_weights_have_a_fingerprint(nodes: dict[str, Any]) -> None:
    model, positive = packed(SD)[0], prompt(SD)
    name = host.open_shards(model, positive)._fingerprint

    def weight() -> Packed:
        return next(each for each in model.model.parameters() if isinstance(each, Packed) and each.packed)

    # As a loader does while a LoRA is applied.
    weight().patches = [("a LoRA", "its key")]
    assert host.open_shards(model, positive)._fingerprint == name
    gradient_of(SD, model)
    assert host.open_shards(model, positive)._fingerprint == name
    with torch.inference_mode():
        weight().as_subclass(torch.Tensor)[0] ^= 1
    assert host.open_shards(model, positive)._fingerprint != name


def unreadable() -> Callable[[torch.Tensor, Any], torch.Tensor]:
    """A patch one of whose variables is gone."""
    gone = None

    def patch(tensor: torch.Tensor, options: Any) -> torch.Tensor:
        return tensor if options else gone  # noqa: F821

    del gone
    return patch


def test_what_cannot_be_fingerprinted_is_collected_all_the_same(
    nodes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = build(SD)
    model.set_model_attn2_output_patch(unreadable())
    realizations = {"samples": random(2, *SD.latent, seed=2)}
    found = nodes["ElrondCollectGradients"].execute(model, prompt(SD), realizations, 2, 1.0, 1, 0, False)
    assert "cannot be continued after an interruption" in caplog.text
    expected = nodes["ElrondCollectGradients"].execute(build(SD), prompt(SD), realizations, 2, 1.0, 1, 0, False)
    assert torch.equal(found.args[0].vectors, expected.args[0].vectors)
    described = build(SD)
    described.model.further = torch.nn.Linear(2, 2, device="meta")
    caplog.clear()
    assert host.open_shards(described, prompt(SD)) is None
    assert "described only" in caplog.text


def test_weights_without_a_derivative_are_refused_by_name() -> None:
    outside = type("SVDQW4A4Linear", (torch.nn.Linear,), {"__module__": "nunchaku.models.linear"})
    model = build(SD)
    model.model.diffusion_model.out[2].further = outside(2, 2)
    with pytest.raises(
        ElrondError, match=r"^Weights quantised for Nunchaku \(SVDQuant, SVDQW4A4Linear\).*fp8 or GGUF\.$"
    ):
        gradient_of(SD, model)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("float8_e4m3fn", {}),
        ("mxfp8", {}),
        ("nvfp4", {}),
        ("int8_tensorwise", {}),
        ("int8_tensorwise", {"convrot": True, "per_channel": True}),
        ("convrot_w4a4", {}),
        ("asym_w4a8_int8", {}),
    ],
)
def test_quantised_formats_count_in_full_precision(form: str, options: dict[str, Any]) -> None:
    """The gradient is that of the weights as they unpack, whatever the layers multiply in when sampling."""
    algorithm = getattr(comfy.quant_ops, "QUANT_ALGOS", {}).get(form)
    if algorithm is None or not hasattr(comfy.quant_ops, "get_layout_class"):
        pytest.skip(f"this host has no layers of the format {form}")
    layer = "middle_block.1.transformer_blocks.0.ff.net.2"
    weights = {name: weight.clone() for name, weight in build(SD).model.diffusion_model.state_dict().items()}
    quantised = comfy.quant_ops.QuantizedTensor.from_float(
        weights[f"{layer}.weight"], algorithm["comfy_tensor_layout"], **options
    )
    merged = build(SD)
    merged.model.diffusion_model.get_submodule(layer).weight.data = quantised.dequantize()
    kind = torch.tensor(list(json.dumps({"format": form, **options}).encode()), dtype=torch.uint8)
    stored = {**weights, **quantised.state_dict(f"{layer}.weight"), f"{layer}.comfy_quant": kind}
    model = build(SD, operations=comfy.ops.mixed_precision_ops({}, torch.float32))
    with torch.inference_mode():
        model.model.diffusion_model.load_state_dict({name: weight.clone() for name, weight in stored.items()})
    for weight in model.model.diffusion_model.parameters():
        weight.requires_grad_(False)
    assert isinstance(model.model.diffusion_model.get_submodule(layer).weight, comfy.quant_ops.QuantizedTensor)
    found = gradient_of(SD, model)
    torch.testing.assert_close(found, gradient_of(SD, merged), rtol=1e-3, atol=1e-4 * float(found.abs().max()))
    assert error_of(SD, model) < 1e-3
