"""Bytes that the backward pass of a gradient needs kept at full size, by the operation that saves them.

    python -m bench.activations                      all families of bench.families, at 1024²
    python -m bench.activations --family "Z-Image"   one of them, with the lines of the host's code that save most

Nothing is computed and no graphics card is needed: PyTorch's fake tensors follow shapes only. Attention is taken to be
that of FlashAttention, as graphics cards run it. The tally is `footprint`, by which the pack decides what to keep.
"""

from __future__ import annotations

import argparse
import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

from . import families

# isort: split
import comfy.ops
import comfy.supported_models
import torch
from comfyui_elrond.elrond_core.collect.checkpointing import Footprint, blocks_of, footprint
from comfyui_elrond.elrond_core.collect.saved import SavedTensors
from comfyui_elrond.nodes.host.gradient_patches import differentiable, replaced_attribute
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CARD = torch.device("cuda:0")


class Tally(SavedTensors):
    """Counts by the line of the host's code that saves."""

    kinds = (*SavedTensors.kinds, FakeTensor)

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__(weights)
        self.lines: Counter[tuple[str, bool]] = Counter()

    @contextlib.contextmanager
    def counted(self, count: Any) -> Iterator[None]:
        """As the base class does, and for itself."""
        seen: set[Any] = set()

        def both(tensor: torch.Tensor, spared: bool, content: Any) -> None:
            count(tensor, spared, content)
            if tensor.device == CARD and content not in seen and tensor.untyped_storage()._cdata not in self._own:
                seen.add(content)
                frames = [frame for frame in traceback.extract_stack() if "comfy/" in frame.filename]
                line = f"{frames[-1].filename.split('comfy/')[-1]}:{frames[-1].lineno}"
                self.lines[line, spared] += tensor.untyped_storage().nbytes()

        with super().counted(both):
            yield


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return out


def activations(name: str, stored: torch.dtype, size: int, **changes: Any) -> tuple[Footprint, Tally]:
    """What one forward pass of a family saves.

    Args:
        name: of `bench.families`.
        stored: dtype of its weights.
        size: pixels a side.
        changes: of the configuration, such as fewer layers.
    """
    family = families.FAMILIES[name]
    config = getattr(comfy.supported_models, family.config)({**family.unet, **changes})
    config.set_inference_dtype(stored, torch.bfloat16 if stored is not torch.bfloat16 else None)
    attention = replaced_attribute(comfy.ops, "scaled_dot_product_attention", _attention)
    with differentiable(), attention, FakeTensorMode(allow_non_fake_inputs=True):
        model = config.get_model({}, device=CARD).diffusion_model.requires_grad_(False)
        side = size // family.cell
        given: dict[str, Any] = {}
        if family.pooled:
            # SDXL's carries sizes as well.
            width = config.unet_config.get("adm_in_channels") or family.pooled
            given["y"] = torch.empty(1, width, device=CARD, dtype=torch.bfloat16)
        if family.config == "ZImage":
            given["num_tokens"] = family.rows[0]
        if family.config == "Chroma":
            given["guidance"] = torch.zeros(1, device=CARD)
        rows = torch.empty(1, *family.rows, device=CARD, dtype=torch.bfloat16).requires_grad_(True)
        latents = torch.empty(1, *family.latent, side, side, device=CARD, dtype=torch.bfloat16)
        level = torch.ones(1, device=CARD)
        tally = Tally([*model.parameters(), *model.buffers()])
        needs = footprint(
            blocks_of(model),
            lambda: model(latents, level, context=rows, transformer_options={}, **given),
            tally,
            CARD,
        )
        return needs, tally


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=families.FAMILIES)
    parser.add_argument("--size", type=int, default=1024)
    chosen = parser.parse_args()
    print("GiB                       all   without what is cheap   computed twice   overwritten")
    for name in [chosen.family] if chosen.family else families.FAMILIES:
        for storage, stored in families.STORED.items():
            needs, tally = activations(name, stored, chosen.size)
            figures = [size / 2**30 for size in (needs.plain, needs.spared, needs.checkpointed)]
            print(f"{name + ', ' + storage:20} {figures[0]:8.2f} {figures[1]:23.2f} {figures[2]:16.2f}", end="")
            print(f"   {'yes' if needs.overwritten else 'no':>11}", flush=True)
            if chosen.family:
                for (line, spared), count in tally.lines.most_common(12):
                    print(f"    {count / 2**30:8.2f}  {line}{' (computed again)' if spared else ''}")


if __name__ == "__main__":
    main()
