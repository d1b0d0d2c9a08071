"""What a piece of work depends on, and the folders in which its finished parts are kept."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from ...elrond_core import __version__
from ...elrond_core.errors import ElrondError
from ...elrond_core.storage.fingerprint import NoFingerprintError, fingerprint
from ...elrond_core.storage.shards import Shards, prune
from .paths import output_folder

try:
    from comfyui_version import __version__ as _version
except ImportError:
    _version = "unknown"
HOST = f"ComfyUI {_version}"


def open_shards(model: Any, *values: Any) -> Shards | None:
    """The kept batches of the work that a MODEL and everything else that determines it make, in the output folder.

    Patches and weights that nodes of other packs make may have no content that could be compared; then nothing is
    kept, and the log says so.
    """
    try:
        name = work_name(origin(model), *values)
    except ElrondError as error:
        logging.warning(f"ELROND: this work cannot be continued after an interruption, since {error}")
        return None
    root = output_folder() / "collections"
    prune(root, name)
    return shards_in(root, name)


def shards_in(root: Path, name: str) -> Shards:
    """The kept batches of the work of a name; what is wrong with them goes to the log."""
    return Shards(root, name, lambda sentence: logging.warning(f"ELROND: {sentence}"))


def origin(model: Any) -> dict[str, str]:
    """What decides the last bit of results, beside inputs: a text each for pack, host, torch, device and model.

    Raises:
        ElrondError: if the model's patches or weights have no content that could be compared.
    """
    device = comfy.model_management.get_torch_device_name(model.load_device)
    if torch.device(model.load_device).type == "cpu":
        # Kernels differ between instruction sets, and sums are divided between threads.
        device = f"{device} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    attention = comfy.ldm.modules.attention.optimized_attention
    return {
        "pack": __version__,
        "host": HOST,
        "torch": str(torch.__version__),
        "device": device,
        "model": _fingerprint(attention, model),
    }


def work_name(made_by: dict[str, str], *values: Any) -> str:
    """The name of the work that an `origin` and everything else that determines its result make.

    Raises:
        ElrondError: as `origin`.
    """
    return _fingerprint(made_by, values)


def _fingerprint(*values: Any) -> str:
    try:
        return fingerprint(*values, content=_content)
    except NoFingerprintError as error:
        raise ElrondError(f"a {error}") from error
    # Reading weights runs code of the pack that made them, which may raise anything.
    except Exception as error:
        raise ElrondError(f"its model cannot be read: {type(error).__name__}: {error}") from error


def training_device(size: int) -> torch.device:
    """Where to train what takes `size` bytes: a CUDA device, if it has room once models gave way, or the processor."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        comfy.model_management.free_memory(size, device)
        if comfy.model_management.get_free_memory(device) >= size:
            return device
    return torch.device("cpu")


@contextlib.contextmanager
def kept_training(*values: Any) -> Iterator[Path]:
    """A file in the output folder for the state of a training that everything in `values` determines.

    It is removed with its folder when the block ends, and stays for the next attempt when the block raises.
    """
    root = output_folder() / "trainings"
    name = fingerprint(__version__, torch.__version__, values)
    prune(root, name)
    yield root / name / "training.safetensors"
    shutil.rmtree(root / name, ignore_errors=True)


# Attributes of a patcher that change what its model computes, as far as the host has them.
_PATCHES = (
    "patches",
    "model_options",
    "object_patches",
    "weight_wrapper_patches",
    "attachments",
    "additional_models",
    "callbacks",
    "wrappers",
    "injections",
    "hook_patches",
    "forced_hooks",
    "force_cast_weights",
    "load_device",
)


def _content(value: Any) -> Any:
    """What a patcher's model computes, whether it is loaded and patched at the moment or not."""
    if isinstance(value, comfy.sd.VAE):
        return value.patcher, value.vae_dtype
    if isinstance(value, comfy.clip_vision.ClipVisionModel):
        return value.patcher, value.dtype, value.image_size, value.image_mean, value.image_std
    if not isinstance(value, comfy.model_patcher.ModelPatcher):
        return value
    weights = _weights(value.model)
    for key, backup in value.backup.items():
        weights[key] = backup.weight.detach()
    for key, backup in value.hook_backup.items():
        weights[key] = backup[0].detach()
    weights |= getattr(value, "backup_buffers", {})
    for name in {*value.object_patches, *value.object_patches_backup}:
        weights = {key: weight for key, weight in weights.items() if not key.startswith(f"{name}.")}
        if name not in value.object_patches:
            original = value.object_patches_backup[name]
            if isinstance(original, torch.nn.Module):
                weights |= {f"{name}.{key}": weight for key, weight in original.state_dict().items()}
    config = getattr(value.model, "model_config", None)
    return {
        "class": type(value.model),
        "weights": {key: _unpatched(weight) for key, weight in sorted(weights.items())},
        "config": (getattr(config, "unet_config", None), getattr(config, "sampling_settings", None)),
        "dtype": (value.model_dtype(), getattr(value.model, "manual_cast_dtype", None)),
        "patches": {name: getattr(value, name, None) for name in _PATCHES},
    }


def _weights(model: torch.nn.Module) -> dict[str, Any]:
    """The state dict of a model, with the weights themselves where it holds descriptions of them, as GGUF layers do."""
    held, modules = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_modules())
    weights = {}
    for key, weight in model.state_dict().items():
        described = torch.is_tensor(weight) and weight.is_meta
        # The description of a weight that no layer has is an estimate of memory.
        if not described or key.rpartition(".")[0] in modules:
            weights[key] = held.get(key, weight) if described else weight
    return weights


def _unpatched(weight: Any) -> Any:
    """What a weight of a loader's own class holds, apart from the patches that it carries while they are applied."""
    if type(weight) in (torch.Tensor, torch.nn.Parameter) or hasattr(weight, "__tensor_flatten__"):
        return weight
    attributes = {name: value for name, value in getattr(weight, "__dict__", {}).items() if name != "patches"}
    return type(weight), weight.as_subclass(torch.Tensor), attributes
