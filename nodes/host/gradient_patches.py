"""What is changed in the host while gradients are taken, and put back afterwards.

The executor runs nodes under `torch.inference_mode()`; weights and conditionings made there cannot take part in a
backward pass, so they are replaced by normal copies. Weights that are not on the device all the time are lent to a
layer for one multiplication, by newer hosts in memory that the next layer's overwrite; the backward pass needs copies.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import comfy.cli_args
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import torch

from .conditioning import Conditioning

# Other kernels return values without a graph, and the gradient through them would silently be lost.
_DIFFERENTIABLE = (
    "attention_basic",
    "attention_split",
    "attention_sub_quad",
    "attention_xformers",
    "attention_pytorch",
)


def differentiable_attention(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stands in for patches of the attention kernel as well, because there is no telling which have a derivative."""
    if getattr(function, "__name__", "") not in _DIFFERENTIABLE:
        function = comfy.ldm.modules.attention.attention_pytorch
    return function(*args, **kwargs)


@contextlib.contextmanager
def replaced_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """For the time being, an attribute has another value; one that this host does not have is left alone."""
    if not hasattr(owner, name):
        yield
        return
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """For the time being, the host computes in ways that have a derivative."""
    attention = comfy.ldm.modules.attention
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.no_grad())
        # Turns fused kernels off.
        undo.enter_context(replaced_attribute(comfy.model_management, "in_training", True))
        # Replays recorded kernels in recorded memory, without a graph for the backward pass.
        undo.enter_context(replaced_attribute(comfy.cli_args.args, "disable_comfy_compiler", True))
        lasting = functools.partial(_lasting, comfy.ops.cast_bias_weight)
        undo.enter_context(replaced_attribute(comfy.ops, "cast_bias_weight", lasting))
        kernel = attention.optimized_attention
        if getattr(kernel, "__name__", "") not in _DIFFERENTIABLE:
            # Some models do not ask for overrides.
            for module in list(sys.modules.values()):
                for name in ("optimized_attention", "optimized_attention_masked"):
                    if getattr(module, "__dict__", {}).get(name) is kernel:
                        undo.enter_context(replaced_attribute(module, name, attention.attention_pytorch))
        yield


def _lasting(cast: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    """The host's `cast_bias_weight`; what it lends from another device's weights stays as it is for a backward pass."""
    weight, bias, *rest = cast(layer, *args, **kwargs)

    def kept(lent: Any, stored: Any) -> Any:
        plain = type(lent) in (torch.Tensor, torch.nn.Parameter)
        return lent.clone() if plain and lent.device != stored.device else lent

    if torch.is_grad_enabled():
        weight, bias = kept(weight, layer.weight), kept(bias, layer.bias)
    return weight, bias, *rest


@contextlib.contextmanager
def exact(module: torch.nn.Module) -> Iterator[None]:
    """For the time being, layers do not multiply in 8 bits, and use nothing that an earlier call has left.

    The first has no derivative, and what is left of another call does not depend on this one's rows.
    """
    with contextlib.ExitStack() as undo:
        for part in module.modules():
            if getattr(part, "_full_precision_mm", True) is False:
                undo.enter_context(replaced_attribute(part, "_full_precision_mm", True))
            if hasattr(part, "prefix_cache_enabled"):
                undo.enter_context(replaced_attribute(part, "prefix_cache_enabled", False))
        # The host takes "no result" for "not in 8 bits".
        undo.enter_context(replaced_attribute(comfy.ops, "fp8_linear", lambda layer, tensor: None))
        yield


def normal_clone(conditioning: Conditioning) -> Conditioning:
    """The same conditioning, its inference tensors as normal copies."""

    def copy(value: Any) -> Any:
        return value.clone() if torch.is_tensor(value) and value.is_inference() else value

    return [[copy(tensor), {k: copy(v) for k, v in options.items()}] for tensor, options in conditioning]


def normal_conditioning(entry: dict[str, Any]) -> None:
    """Replace the inference tensors among an entry's `model_conds` by normal copies."""
    for key, value in entry["model_conds"].items():
        tensor = getattr(value, "cond", None)
        if torch.is_tensor(tensor) and tensor.is_inference():
            entry["model_conds"][key] = value._copy_with(tensor.clone())


def normal_copies(module: torch.nn.Module) -> None:
    """Replace weights that were created in inference mode, one at a time so that memory holds one extra at most."""
    for part in module.modules():
        # Newer hosts leave these where the file has them, and only ever lend them.
        lent = ("weight", "bias") if hasattr(part, "_v") else ()
        for name, parameter in part._parameters.items():
            if parameter is not None and _of_inference(parameter) and name not in lent:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and _of_inference(buffer):
                part._buffers[name] = buffer.clone()


def _of_inference(weight: torch.Tensor) -> bool:
    """Whether a weight was created in inference mode, also if it was moved to another device outside of it.

    Moved so, it says that it is a normal tensor, and yet has no version, which a backward pass asks for.
    """
    if weight.is_inference():
        return True
    try:
        return weight._version < 0
    except RuntimeError:
        return True


@contextlib.contextmanager
def frozen(module: torch.nn.Module) -> Iterator[None]:
    """No gradients for weights: only the conditioning's are wanted, and weights' would cost memory."""
    changed = [p for p in module.parameters() if p.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)
