"""Merging gradients: all of them, apart where they must be, and refused where they do not belong together."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from elrond_core.collect.merge import merge_gradients, merge_lines
from elrond_core.decompose.moments import Moments
from elrond_core.errors import ElrondError
from elrond_core.gradients import Gradients
from elrond_core.provenance import Provenance

HERE = Provenance(family="SDXL", prompt="a dog", concept="dog", tokens=("dog",), rows=(2,), token_norm=27.9, seed=1)


def collection(seed: int, count: int = 6, level: float = 14.61, heard: int = 3, **changes: Any) -> Gradients:
    g = torch.Generator().manual_seed(seed)
    pairs = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(count)])
    vectors = torch.randn(count + heard, 1, 8, generator=g)
    provenance = HERE.with_(seed=seed, sigma=(level,), count=count, **changes)
    levels = torch.full((count,), level)
    return Gradients(vectors[:count], levels, pairs[:, 0], pairs[:, 1], provenance, vectors[count:])


def test_nothing_is_lost_and_realizations_stay_apart() -> None:
    parts = [collection(1), collection(2, count=4, heard=0), collection(3)]
    whole = merge_gradients(parts)
    assert torch.equal(whole.vectors, torch.cat([part.vectors for part in parts]))
    assert torch.equal(whole.probes, torch.cat([part.probes for part in parts]))
    assert whole.probe_sigma is None and whole.levels == parts[0].levels
    assert whole.provenance == HERE.with_(sigma=(14.61,), count=16, seeds=(1, 2, 3))
    start, seen = 0, set()
    for part in parts:
        here = slice(start, start + len(part))
        found = torch.cat([whole.sources[here], whole.targets[here]])
        theirs = torch.cat([part.sources, part.targets])
        # The same pairs, counted on; and no realization of another collection.
        assert len((found - theirs).unique()) == 1 and not seen & set(found.tolist())
        seen |= set(found.tolist())
        start += len(part)


def test_merging_is_what_merging_the_moments_is() -> None:
    one, other = collection(1), collection(2)
    moments = Moments.of(one)
    moments.merge(Moments.of(other))
    whole = Moments.of(merge_gradients([one, other]))
    assert torch.allclose(moments.scatter, whole.scatter) and moments.provenance == whole.provenance


def test_levels_of_responses_are_known_afterwards() -> None:
    whole = merge_gradients([collection(1), collection(2, level=7.5)])
    assert whole.probe_sigma.tolist() == pytest.approx([14.61] * 3 + [7.5] * 3)
    again = merge_gradients([whole, collection(3, level=3.0)])
    assert again.provenance.sigma == (14.61, 7.5, 3.0) and again.provenance.seeds == (1, 2, 3)
    assert torch.equal(again.at_levels([7.5]).vectors, collection(2, level=7.5).vectors)
    assert torch.equal(again.at_levels([7.5]).probes, collection(2, level=7.5).probes)
    assert merge_gradients([collection(1, heard=0), collection(2, level=7.5, heard=0)]).probe_sigma is None


def said_to_be_of_seed(seed: int, one: Gradients) -> Gradients:
    return replace(one, provenance=one.provenance.with_(seed=seed))


def long(factor: float) -> Gradients:
    one = collection(2)
    return replace(one, vectors=one.vectors * factor)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (collection(2, prompt="a cat"), "the prompt of one is 'a dog', of the other 'a cat'"),
        (collection(2, family="Flux"), "the model family of one is 'SDXL', of the other 'Flux'"),
        (collection(2, latent_values=64), "the number of values in a latent of one is 0, of the other 64"),
        (replace(collection(2), vectors=torch.ones(6, 2, 4), probes=torch.ones(3, 2, 4)), "1 x 8 values.* 2 x 4"),
        (long(1e-3), "at noise level 14.61 gradients of one have a root mean square length of"),
        (long(1e3), "merge them before they are normalised"),
        (collection(1), "Of 6 gradients of seed 1, 6 are already among those of seed 1"),
        (said_to_be_of_seed(5, collection(1)), "Of 6 gradients of seed 5, 6 are already among those of seed 1"),
    ],
)
def test_what_is_refused(other: Gradients, sentence: str) -> None:
    with pytest.raises(ElrondError, match=sentence):
        merge_gradients([collection(1), other])


def test_a_part_that_is_there_already_is_refused_later_too() -> None:
    whole = merge_gradients([collection(1), collection(2)])
    with pytest.raises(ElrondError, match="Of 6 gradients of seed 2, 6 are already among those of seed 1, 2"):
        merge_gradients([whole, collection(2)])


def test_gradients_of_no_length_are_no_repetition() -> None:
    one, other = (replace(collection(seed), vectors=torch.zeros(6, 1, 8)) for seed in (1, 2))
    assert len(merge_gradients([one, other])) == 12


def lines(*parts: Gradients) -> list[str]:
    return merge_lines(parts, merge_gradients(parts))


def test_the_report() -> None:
    one, other = collection(1), collection(2, count=4, level=7.5)
    length = float(one.flat.norm(dim=1).square().mean().sqrt())
    found = lines(one, other)
    assert len(found) == 3
    said = f"noise level 14.61 (root mean square length {length:.3g})"
    assert found[0] == f"1: 6 gradients and 3 responses of seed 1, {said}"
    assert found[1].startswith("2: 4 gradients and 3 responses of seed 2, noise level 7.5 (root mean square length ")
    assert found[2].startswith("The noise levels have other shares of the responses than of the gradients")
    assert len(lines(one, collection(2, level=7.5))) == 2


def test_the_report_says_what_may_be_there_twice() -> None:
    # As another machine computes the same: nearly.
    again = replace(collection(2), vectors=collection(2).vectors * (1 + 1e-5))
    whole = merge_gradients([collection(1), collection(2)])
    sentence = (
        "both have gradients of seed 2: if their realizations are the same too, they count the same gradients twice."
    )
    assert lines(collection(2), collection(1), again)[3:] == [f"1 and 3 {sentence}"]
    assert lines(whole, again)[2:] == [f"1 and 2 {sentence}"]
    # Levels of one collection that were taken apart.
    assert len(lines(collection(2), replace(collection(2, level=7.5), vectors=collection(3).vectors))) == 2
