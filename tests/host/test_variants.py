"""Gradients and steering of models as ComfyUI's templates use them: editing, control by images, video."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# isort: split
sys.path.append(str(Path(__file__).parent))

import families
from families import Family, build, prompt, random
from test_families import assert_view_is_the_sampler, error_of, picture, steered
from variants import VARIANTS


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_variant(variant: Family, record_property: Callable[[str, object], None]) -> None:
    if not variant.exists():
        pytest.skip(f"this host has no {variant.name}")
    with torch.inference_mode():
        model, positive = build(variant), prompt(variant)
    before = picture(variant, model, positive)
    error = error_of(variant, model, positive)
    record_property("relative error", error)
    print(f"\n{variant.name}: relative error {error:.1e}")
    assert error < 1e-3
    assert_view_is_the_sampler(variant, model, positive)
    change = random(len(families.CONCEPT.rows), families.WIDTH, seed=6)
    assert torch.equal(picture(variant, model, steered(positive, 0 * change)), before)
    assert not torch.equal(picture(variant, model, steered(positive, change)), before)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_what_is_beside_the_prompt_takes_part(variant: Family) -> None:
    """Without it the model makes another picture: the options are those that the host reads."""
    plain = {"pooled_output", "guidance", "attention_mask", "frame_rate", "conditioning_llama3", "width", "height"}
    beside = variant.options.keys() - plain
    if not variant.exists() or not beside:
        pytest.skip(f"this host has no {variant.name}, or it has nothing beside its prompt")
    with torch.inference_mode():
        model = build(variant)
    before = picture(variant, model, prompt(variant))
    for name in beside - {"concat_mask", "concat_mask_index", "vace_mask", "vace_strength"}:
        ((tensor, options),) = prompt(variant)
        without = [[tensor, {key: value for key, value in options.items() if key != name}]]
        assert not torch.allclose(picture(variant, model, without), before, rtol=1e-3), name
