"""What is kept for the backward pass: contents that are overwritten, and those that are computed again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from elrond_core.collect import saved as subject
from elrond_core.collect.saved import SavedTensors

COUNT = 512


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "SMALL", 64)


def kept(saved: SavedTensors, work: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The gradient of what `work` makes of a tensor, and the bytes that are kept for it beside that tensor's."""
    x = torch.randn(COUNT, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    sizes: dict[int, int] = {}
    holders: list[subject.Saved] = []

    def pack(tensor: torch.Tensor) -> subject.Saved:
        holders.append(saved.pack(tensor))
        return holders[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, saved.unpack), saved.recording():
        y = work(x)
    for holder in holders:
        tensor = holder._part.content.kept if holder._part else holder._tensor
        if tensor is not None and tensor.untyped_storage()._cdata != x.untyped_storage()._cdata:
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return gradient, sum(sizes.values())


def sparing(weights: list[torch.Tensor] | None = None) -> SavedTensors:
    saved = SavedTensors(weights or [])
    saved.sparing = True
    return saved


WEIGHT = torch.randn(COUNT, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)


def activation(x: torch.Tensor) -> torch.Tensor:
    """Saves x, and silu(x) and the other factor for the product."""
    y = x.exp()
    return torch.nn.functional.silu(y) * y.tanh()


def cast(x: torch.Tensor) -> torch.Tensor:
    """Saves the weight in float32."""
    return x * WEIGHT.float()


def rotary(x: torch.Tensor) -> torch.Tensor:
    """Written in place on the way, as rotary embeddings are; saves the result."""
    y = x.exp()
    halves = y.double().unflatten(0, (-1, 2))
    turned = 0.6 * halves[:, 0]
    turned.add_(halves[:, 1], alpha=0.8)
    turned = turned.float()
    return turned * turned


@pytest.mark.parametrize(
    ("work", "plain", "spared"),
    [
        # The exponential is kept: from it, by one operation each, the rest.
        (activation, 3 * 4 * COUNT, 4 * COUNT),
        (cast, 4 * COUNT, 0),
        (rotary, 4 * COUNT + 4 * COUNT // 2, 4 * COUNT),
    ],
)
def test_what_is_cheap_is_not_kept(work: Callable[[torch.Tensor], torch.Tensor], plain: int, spared: int) -> None:
    expected, size = kept(SavedTensors(), work)
    assert size == plain
    found, size = kept(sparing([WEIGHT]), work)
    assert size == spared
    assert torch.equal(found, expected)


def test_random_numbers_are_not_drawn_again() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.dropout(x.exp(), 0.5)
        return y * y

    torch.manual_seed(0)
    expected, size = kept(SavedTensors(), work)
    torch.manual_seed(0)
    found, spared = kept(sparing(), work)
    assert torch.equal(found, expected) and (found == 0).sum() > COUNT // 4
    # The mask stays.
    assert 0 < spared < size


def test_a_long_way_is_cut() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4 * subject.LONGEST):
            x = x.sin()
        return x

    expected, size = kept(SavedTensors(), work)
    found, spared = kept(sparing(), work)
    assert torch.equal(found, expected)
    # Between two that are kept, so many are not.
    tensor = 4 * COUNT
    assert spared == size // tensor // (subject.LONGEST + 1) * tensor


@pytest.mark.parametrize("spares", [False, True])
def test_what_is_overwritten_is_kept_as_it_was(spares: bool) -> None:
    def in_place(x: torch.Tensor) -> torch.Tensor:
        whole = x.exp()
        part = whole[3:].square().sum()
        whole += 1
        whole[:5] *= 2
        other = whole.sin()
        whole.zero_()
        return other * part

    def plainly(x: torch.Tensor) -> torch.Tensor:
        whole = x.exp()
        after = whole + 1
        return torch.cat([after[:5] * 2, after[5:]]).sin() * whole[3:].square().sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept(SavedTensors(), in_place)
    saved = SavedTensors()
    saved.overwritten, saved.sparing = True, spares
    torch.testing.assert_close(kept(saved, in_place)[0], kept(SavedTensors(), plainly)[0])


def test_overwriting_is_seen_beforehand() -> None:
    def counted(work: Callable[[torch.Tensor], object]) -> bool:
        saved, x = SavedTensors(), torch.ones(COUNT, requires_grad=True)
        with saved.counted(lambda *_: None):
            work(x)
        return saved.overwritten

    def harmless(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y += 1
        return y.square()

    def harmful(x: torch.Tensor) -> None:
        y = x * 2
        y.square()
        y += 1

    assert not counted(harmless) and counted(harmful)


def test_classes_of_weights_pass_through() -> None:
    """A loader's tensor class whose methods do something else, as those of packed weights do."""

    class Packed(torch.Tensor):
        def detach(self) -> torch.Tensor:
            raise AssertionError("not to be called")

        clone = detach  # type: ignore[assignment]

    weight = torch.arange(float(COUNT)).as_subclass(Packed)

    def work(x: torch.Tensor) -> torch.Tensor:
        return (x * weight.cos()).as_subclass(torch.Tensor)

    for saved in (SavedTensors(), sparing(), sparing([weight])):
        found, _ = kept(saved, work)
        assert torch.equal(found.as_subclass(torch.Tensor), torch.arange(float(COUNT)).cos())
