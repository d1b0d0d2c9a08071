"""What is changed in the host while gradients are taken, and put back afterwards.

The executor runs nodes under `torch.inference_mode()`; weights and conditionings made there cannot take part in a
backward pass, so they are replaced by normal copies. Weights that are not on the device all the time are lent to a
layer for one multiplication, by newer hosts in memory that the next layer's overwrite; the backward pass needs copies.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import comfy.cli_args
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import comfy.quant_ops
import comfy.utils
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from ...elrond_core.errors import ElrondError
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
        # Both replay recorded kernels in recorded memory, without a graph for the backward pass.
        for option in ("disable_comfy_compiler", "disable_cuda_graphs"):
            undo.enter_context(replaced_attribute(comfy.cli_args.args, option, True))
        lasting = functools.partial(lasting_weights, comfy.ops.cast_bias_weight)
        undo.enter_context(replaced_attribute(comfy.ops, "cast_bias_weight", lasting))
        # Hooks give the model other weights from one pass to the next; the backward pass needs those of each.
        undo.enter_context(replaced_attribute(comfy.utils, "copy_to_param", comfy.utils.set_attr_param))
        kernel = attention.optimized_attention
        if getattr(kernel, "__name__", "") not in _DIFFERENTIABLE:
            # Some models do not ask for overrides.
            for module in list(sys.modules.values()):
                for name in ("optimized_attention", "optimized_attention_masked"):
                    if getattr(module, "__dict__", {}).get(name) is kernel:
                        undo.enter_context(replaced_attribute(module, name, attention.attention_pytorch))
        yield


def lasting_weights(cast: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    """The host's `cast_bias_weight`; what it lends from another device's weights stays as it is for a backward pass.

    Weights of a loader's own class are handed on as plain tensors, or every hidden state would become one of its kind.
    """
    weight, bias, *rest = cast(layer, *args, **kwargs)

    def lasting_copy(lent: Any, stored: Any) -> Any:
        if lent is not None and has_own_class(lent):
            lent = lent.as_subclass(torch.Tensor)
        plain = type(lent) in (torch.Tensor, torch.nn.Parameter)
        return lent.clone() if plain and lent.device != stored.device else lent

    if _multiplies_in_few_bits(layer, weight):
        weight = weight.dequantize()
    if torch.is_grad_enabled():
        weight, bias = lasting_copy(weight, layer.weight), lasting_copy(bias, layer.bias)
    return weight, bias, *rest


def _multiplies_in_few_bits(layer: Any, weight: Any) -> bool:
    """Whether a layer quantises its input to multiply it with this weight, as those of INT8 files do."""
    formats = getattr(comfy.quant_ops, "QUANT_ALGOS", {})
    # Other formats take an input that is not quantised for the wish to multiply in full precision.
    quantises = not formats.get(getattr(layer, "quant_format", None), {}).get("quantize_input", True)
    return quantises and weight.ndim == 2 and hasattr(weight, "dequantize") and has_parts(weight)


def has_parts(tensor: torch.Tensor) -> bool:
    """Whether a tensor is made of others, as quantised weights of the host are, and has no memory of its own."""
    return hasattr(tensor, "__tensor_flatten__")


def has_own_class(tensor: torch.Tensor) -> bool:
    """Whether a tensor's class is a loader's, which may answer `clone`, `detach` and `shape` in its own way."""
    return type(tensor) not in (torch.Tensor, torch.nn.Parameter) and not has_parts(tensor)


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
                part._parameters[name] = _normal_parameter(parameter)
        for name, buffer in part._buffers.items():
            if buffer is not None and _of_inference(buffer):
                part._buffers[name] = buffer.clone()


def _normal_parameter(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    if not has_own_class(parameter):
        return torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    copy = parameter.as_subclass(torch.Tensor).detach().clone().as_subclass(type(parameter))
    vars(copy).update(vars(parameter))
    return copy


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


class NormalTensors(TorchFunctionMode):
    """Gives operations that a backward pass goes through normal copies of inference tensors.

    Nodes run in inference mode, and patches may hold what they make there in any way: masks, images, small networks.
    """

    def __init__(self) -> None:
        super().__init__()
        self._copies = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            if any(tensor.requires_grad for tensor in tensors) and any(map(_of_inference, tensors)):
                args, kwargs = tree_map_only(torch.Tensor, self._normal, (args, kwargs))
        return func(*args, **kwargs)

    def _normal(self, tensor: torch.Tensor) -> torch.Tensor:
        if not _of_inference(tensor):
            return tensor
        if tensor not in self._copies:
            self._copies[tensor] = tensor.clone()
        copy: torch.Tensor = self._copies[tensor]
        return copy


# Layers that are known to compute outside of PyTorch: what their packs are called.
_OPAQUE = re.compile(r"(?:^|\W)nunchaku\.")


def refuse_opaque(module: torch.nn.Module) -> None:
    """Refuse a model whose layers compute where no derivative can be had.

    Raises:
        ElrondError: naming the layers' class.
    """
    for part in module.modules():
        if _OPAQUE.search(f"{type(part).__module__}."):
            raise ElrondError(
                f"Weights quantised for Nunchaku (SVDQuant, {type(part).__name__}) have no derivative: load this model "
                "from another file, such as fp8 or GGUF."
            )


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
