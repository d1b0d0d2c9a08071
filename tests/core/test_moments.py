"""Moments: streaming and merging give what one pass over everything gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import gradients

from elrond_core.decompose.moments import Moments
from elrond_core.decompose.response import check_probes
from elrond_core.errors import ElrondError
from elrond_core.provenance import Provenance

ROOT = Path(__file__).parents[2]
HERE = Provenance(
    family="SDXL",
    prompt="a dog",
    concept="dog",
    tokens=("dog",),
    rows=(2, 3),
    token_norm=27.9,
    sigma=(14.61, 7.5),
    seed=1,
    latent_values=64,
    host="ComfyUI 0.3.75",
    extra={"author": "one"},
)


def _sample(count: int = 501, rows: int = 2, width: int = 9) -> torch.Tensor:
    # A mean far from zero is what naive sums of squares get wrong.
    return torch.randn(count, rows, width, generator=torch.Generator().manual_seed(0)) + 1000.0


def _moments(*batches: torch.Tensor) -> Moments:
    moments = Moments.empty(2, 9, HERE)
    for batch in batches:
        moments.add(batch)
    return moments


@pytest.mark.parametrize("step", [1, 7, 250, 501])
def test_batches_give_the_whole(step: int) -> None:
    sample = _sample()
    moments = _moments(*sample.split(step))
    flat = sample.flatten(1).double()
    assert moments.count == moments.provenance.count == 501
    assert torch.allclose(moments.mean, flat.mean(0), rtol=1e-12)
    assert torch.allclose(moments.covariance(), flat.T.cov(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("first", [0, 1, 200, 501])
def test_two_halves_give_the_whole(first: int) -> None:
    sample = _sample()
    whole, left, right = _moments(sample), _moments(sample[:first]), _moments(sample[first:])
    left.merge(right)
    assert left.count == whole.count
    assert torch.allclose(left.mean, whole.mean, rtol=1e-13)
    assert torch.allclose(left.scatter, whole.scatter, rtol=1e-9, atol=1e-9)


def test_merging_leaves_the_other_alone() -> None:
    sample = _sample()
    left, right = _moments(sample[:3]), _moments(sample[3:])
    before = right.scatter.clone()
    left.merge(right)
    left.add(sample)
    assert torch.equal(right.scatter, before) and right.count == 498


def test_merging_unites_where_they_come_from() -> None:
    # As a level that went through a float32 tensor comes back.
    rounded = float(torch.tensor(14.61))
    there = HERE.with_(
        seed=2, sigma=(rounded, 3.0), token_norm=27.8, host="ComfyUI 0.3.80", extra={"author": "two", "note": "kept"}
    )
    left, right = _moments(_sample(5)), Moments.empty(2, 9, there)
    right.add(_sample(7))
    left.merge(right)
    assert left.provenance == HERE.with_(
        sigma=(14.61, 7.5, 3.0),
        count=12,
        seeds=(1, 2),
        host="ComfyUI 0.3.75, ComfyUI 0.3.80",
        extra={"author": "one", "note": "kept"},
    )
    left.merge(right)
    assert left.provenance.seeds == (1, 2) and left.provenance.count == 19


def test_merging_into_none_or_with_none_keeps_the_one_there_is() -> None:
    other = Moments.empty(2, 9, HERE.with_(seed=2, sigma=(3.0,)))
    other.add(_sample(5))
    whole = Moments.empty(2, 9, HERE)
    whole.merge(other)
    whole.merge(Moments.empty(2, 9, HERE))
    assert whole.provenance == HERE.with_(seed=2, sigma=(3.0,), count=5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"family": "Flux"}, "the model family of one is 'SDXL', of the other 'Flux'"),
        ({"prompt": "a cat"}, "the prompt of one is 'a dog', of the other 'a cat'"),
        ({"concept": "cat"}, "the concept of one is 'dog', of the other 'cat'"),
        ({"tokens": ("do", "g")}, r"the tokens of one is \['dog'\], of the other \['do', 'g'\]"),
        ({"rows": (4, 5)}, r"the rows of one is \[2, 3\], of the other \[4, 5\]"),
        ({"latent_values": 256}, "the number of values in a latent of one is 64, of the other 256"),
        ({"token_norm": 24.0}, "norm is 27.9 in one and 24 in the other"),
    ],
)
def test_what_does_not_belong_together_is_not_merged(changes: dict, sentence: str) -> None:
    left, right = _moments(_sample(5)), Moments.empty(2, 9, HERE.with_(**changes))
    right.add(_sample(5))
    with pytest.raises(ElrondError, match=f"^These cannot be merged: .*{sentence}"):
        left.merge(right)
    assert left.count == 5 and left.provenance == HERE.with_(count=5)


def test_a_bad_row_is_named_by_its_place_among_all() -> None:
    moments = _moments(_sample(10))
    bad = _sample(5)
    bad[3, 1, 2] = torch.nan
    with pytest.raises(ElrondError, match="Gradient 13 is not finite"):
        moments.add(bad)
    assert moments.count == 10


@pytest.mark.parametrize("name", ["mean", "scatter"])
def test_moments_that_are_not_finite_have_no_covariance(name: str) -> None:
    moments = _moments(_sample(5))
    getattr(moments, name).view(-1)[4] = torch.nan
    with pytest.raises(ElrondError, match="These moments are not finite"):
        moments.covariance()


def test_a_response_that_is_not_finite_is_named() -> None:
    response = torch.ones(9, 2, 9)
    response[6, 1, 0] = torch.nan
    numbers = torch.arange(5)
    source = gradients(_sample(5), sources=numbers, targets=numbers + 1, probes=response)
    with pytest.raises(ElrondError, match=r"The response is not finite \(NaN or infinity\) in row 6;"):
        check_probes(source)


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda m: m.add(torch.zeros(18)), r"A batch must be vectors, .* and has \(18,\)"),
        (lambda m: m.add(torch.zeros(())), r"A batch must be vectors, .* and has \(\)"),
        (lambda m: Moments.empty(0, 9, HERE), "at least 1 x 1 values, and these would have 0 x 9"),
        (lambda m: Moments.empty(2, 0, HERE), "at least 1 x 1 values, and these would have 2 x 0"),
        (lambda m: m.add(torch.zeros(3, 4)), "vectors of 18 values, and the batch has 4"),
        (lambda m: m.merge(Moments.empty(1, 9, HERE)), "2 x 9 values cannot be merged with 1 x 9"),
        (lambda m: m.covariance(), "at least 2 gradients, got 0"),
    ],
)
def test_what_is_refused(act, sentence: str) -> None:
    with pytest.raises(ElrondError, match=sentence):
        act(_moments())


MEMORY = """
import resource, sys
sys.path.insert(0, "")
import torch
from elrond_core.decompose import sae_data
from elrond_core.decompose.sae_training import TrainConfig, train_sae
from elrond_core.gradients import Gradients
from elrond_core.dimension.report import estimate_lid
from elrond_core.decompose.pca import fit_pca
from elrond_core.provenance import Provenance
from elrond_core.decompose.response import fit_response

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def work(gradients):
    fit_pca(gradients)
    fit_response(gradients, rotate=True, limit=2)
    estimate_lid(gradients)
    train_sae(gradients, TrainConfig(latents=9, epochs=1))

def made(vectors, response):
    numbers = torch.arange(len(vectors))
    pairs = numbers % 97, (7 * numbers + 1) % 100
    return Gradients(vectors, torch.ones(len(vectors)), *pairs, Provenance("SDXL", latent_values=64), response)

sae_data.PIECE_VALUES = 2**16
vectors, response = (torch.randn(60000, 1, 256, generator=torch.Generator().manual_seed(i)) for i in range(2))
# Whatever is loaded and set up the first time.
work(made(vectors[:5000], response[:5000]))
before = peak()
work(made(vectors, response))
print(peak() - before, 8 * vectors.numel())
"""


@pytest.mark.skipif(os.name != "posix", reason="peak memory as POSIX tells it")
def test_no_copy_of_all_vectors_is_made() -> None:
    """What is decomposed takes no memory that grows with the number of vectors, beyond the vectors themselves."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # What is let go of goes back at once, whatever holes the allocator would otherwise leave.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    grown, copy = map(int, done.stdout.split())
    assert grown < copy / 8
