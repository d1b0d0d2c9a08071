"""Activation checkpointing on small stacks of blocks, whose saved bytes are known and whose gradients are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from elrond_core.collect.checkpointing import Checkpointing, blocks_of, footprint
from elrond_core.collect.saved import SavedTensors

WIDTH, SAMPLES = 8, 3


class Block(torch.nn.Module):
    """Saves the output of its tanh, and the input that it squares."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: torch.Tensor, options: dict[str, int]) -> torch.Tensor:
        return torch.tanh(self.layer(x)) * (1 + options["place"]) + x.square()


class InPlace(Block):
    """Overwrites its input, which the block before may have saved, and a tensor that it has saved itself."""

    def forward(self, x: torch.Tensor, options: dict[str, int]) -> torch.Tensor:
        x += super().forward(x, options)
        y = x.sin()
        x *= 2
        return x + y


class Dropping(Block):
    def forward(self, x: torch.Tensor, options: dict[str, int]) -> torch.Tensor:
        return torch.nn.functional.dropout(super().forward(x, options), 0.5)


class Stack(torch.nn.Module):
    def __init__(self, block: Callable[[], Block]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList([block() for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # As models do, one dictionary is handed to all blocks and changed in between.
        options = {"place": 0}
        for place, block in enumerate(self.blocks):
            options["place"] = place
            x = block(x, options)
        return x


def inputs() -> torch.Tensor:
    return torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_(True)


def gradients(model: Stack, checkpointing: Checkpointing | None, times: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(2)
    x = inputs()
    if checkpointing is None:
        y = model(x * 1)
    else:
        with checkpointing.active(), checkpointing.saved.recording():
            y = model(x * 1)
    return [torch.autograd.grad(y, x, y.detach(), retain_graph=True)[0] for _ in range(times)]


@pytest.mark.parametrize("block", [Block, Dropping])
def test_gradients_are_those_without(block: Callable[[], Block]) -> None:
    model = Stack(block)
    (expected,) = gradients(model, None)
    for found in gradients(model, Checkpointing(blocks_of(model), SavedTensors()), times=3):
        assert torch.equal(found, expected)


def test_writing_in_place() -> None:
    model, saved = Stack(InPlace), SavedTensors()
    checkpointing = Checkpointing(blocks_of(model), saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model, checkpointing)
    saved.overwritten = True
    found = gradients(model, checkpointing, times=3)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        (expected,) = gradients(model, None)
    for one in found:
        assert torch.equal(one, expected)


def test_a_block_that_will_run_again_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """How its cheap operations could be repeated is noted in the run that the backward pass needs, and only there."""
    model, noted = Stack(Block), 0
    record = SavedTensors._recorded

    def counted(*given: Any) -> Any:
        nonlocal noted
        noted += 1
        return record(*given)

    monkeypatch.setattr(SavedTensors, "_recorded", counted)
    saved = SavedTensors(list(model.parameters()))
    saved.sparing = True
    checkpointing = Checkpointing(blocks_of(model), saved)
    x = inputs()
    with checkpointing.active(), saved.recording():
        y = model(x)
    assert noted == 0
    (found,) = torch.autograd.grad(y, x, y.detach())
    assert noted > 0
    x = inputs()
    y = model(x)
    assert torch.equal(found, torch.autograd.grad(y, x, y.detach())[0])


@pytest.mark.parametrize("late", [False, True])
def test_nothing_is_left_behind(late: bool) -> None:
    model = Stack(Block)
    checkpointing = Checkpointing(blocks_of(model), SavedTensors())
    # A forward of its own, as other packs give to a block, is put back.
    own = model.blocks[0].forward
    model.blocks[0].forward = own
    before = [dict(vars(block)) for block in model.blocks]
    with pytest.raises(KeyError, match="place" if late else "nothing"), checkpointing.active():
        model.blocks[-1](inputs(), {}) if late else model({}["nothing"])
    assert [dict(vars(block)) for block in model.blocks] == before


def test_what_is_counted() -> None:
    model = Stack(Block)
    saved = SavedTensors(list(model.parameters()))
    found = footprint(blocks_of(model), lambda: model(inputs()), saved, torch.device("cpu"))
    activation = SAMPLES * WIDTH * 4
    # Of each block its input and the output of its tanh; or of all blocks the inputs, and of one block both.
    assert found.plain == 8 * activation
    assert found.checkpointed == 4 * activation + 2 * activation
    elsewhere = footprint(blocks_of(model), lambda: model(inputs()), saved, torch.device("meta"))
    assert elsewhere.plain == elsewhere.checkpointed == 0
    assert not found.overwritten
    overwriting = Stack(InPlace)
    saved = SavedTensors(list(overwriting.parameters()))
    found = footprint(blocks_of(overwriting), lambda: overwriting(inputs() * 1), saved, torch.device("cpu"))
    # What is overwritten is another tensor afterwards: the input of each square and of each sine, the output of tanh.
    assert found.overwritten and found.plain == 4 * 3 * activation


def test_what_is_kept() -> None:
    model = Stack(Block)
    checkpointing = Checkpointing(blocks_of(model), SavedTensors())
    kept: list[torch.Tensor] = []
    with (
        checkpointing.active(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        model(inputs())
    # Whatever the blocks save goes to their own hooks, which keep a number.
    assert kept == []


def test_without_gradients_blocks_run_as_they_are() -> None:
    model = Stack(Dropping)
    with torch.no_grad():
        torch.manual_seed(2)
        expected = model(inputs())
        torch.manual_seed(2)
        with Checkpointing(blocks_of(model), SavedTensors()).active():
            assert torch.equal(model(inputs()), expected)


def test_blocks_are_found_at_the_coarsest_level_that_is_one_block() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_out = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Dropout()])
            self.experts = torch.nn.ModuleList([Block(), Block()])

    class Transformer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

    class Spatial(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer_blocks = torch.nn.ModuleList([Transformer(), Transformer()])

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SiLU())
            self.input_blocks = torch.nn.ModuleList([torch.nn.Sequential(Block(), Spatial())])
            self.middle_block = torch.nn.Sequential(Block(), Spatial(), Block())
            self.layers = torch.nn.ModuleList([Transformer()])

    network = Network()
    down, middle = network.input_blocks[0], network.middle_block
    assert blocks_of(network) == [
        down[0],
        *down[1].transformer_blocks,
        middle[0],
        *middle[1].transformer_blocks,
        middle[2],
        network.layers[0],
    ]
