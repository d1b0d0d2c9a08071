"""Collecting gradients: equations 1 to 4 of ELROND (arXiv 2602.10216).

Two realizations A and B of one prompt; A is noised to a level, the denoiser estimates the clean image from it, and
the mean squared difference of that estimate to B is back-propagated to the concept's rows. The gradient says how
the word would have to move to turn A's image into B's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ..errors import ElrondError
from ..gradients import Gradients, listed
from ..provenance import Provenance
from ..seeding import normal
from .differentiate import Denoiser, Differentiator
from .pairs import draw_pairs

# Targets of a noised realization for each Jacobian probe. A probe costs a backward pass, as a target does.
TARGETS_A_PROBE = 8


class BatchStore(Protocol):
    """Keeps finished batches by number, such as on the disk, so that an interrupted collection continues."""

    def get(self, number: int) -> dict[str, torch.Tensor] | None:
        """The tensors of batch `number`, or None if it is not finished."""

    def put(self, number: int, batch: dict[str, torch.Tensor]) -> None:
        """Keep a finished batch."""


@dataclass(frozen=True)
class CollectionPlan:
    """What is collected; it determines the result for one model and one set of realizations.

    Attributes:
        count: number of gradients.
        sigma: noise levels in the model's units; noised realizations take them in turn.
        seed: fixes pairs and noise; gradient i depends on (seed, i) and the levels only.
        batch_size: noised realizations a forward pass; fewer where they do not fit into memory.
        probes: also collect Jacobian probes: back-propagate white noise, once for every `TARGETS_A_PROBE` targets of a
            noised realization or part of them.
        targets: realizations that each noised realization is compared with: gradients a forward pass.
        other_rows: how many of the denoiser's last rows are not the concept's. The mean gradient of all its rows is
            then subtracted from the concept's.

    Raises:
        ElrondError: if the count, or a noise level, is out of range.
    """

    count: int
    sigma: tuple[float, ...]
    seed: int
    batch_size: int = 8
    probes: bool = False
    targets: int = 1
    other_rows: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ElrondError(f"The number of gradients must be at least 1, got {self.count}.")
        if not self.sigma or min(self.sigma) <= 0:
            raise ElrondError(f"The noise level must be above zero, got {listed(self.sigma) or 'none'}.")

    @property
    def sources(self) -> int:
        """Number of noised realizations."""
        return -(-self.count // self.targets)

    @property
    def probes_per_source(self) -> int:
        """Jacobian probes of each noised realization."""
        return -(-self.targets // TARGETS_A_PROBE) if self.probes else 0

    def batches(self) -> Iterator[tuple[float, list[int]]]:
        """Noise level and noised realizations of every batch; realization i has level i modulo their number."""
        size, levels = max(1, self.batch_size), len(self.sigma)
        for start in range(0, self.sources, size * levels):
            for level, sigma in enumerate(self.sigma):
                items = list(range(start + level, min(self.sources, start + size * levels), levels))
                if items:
                    yield sigma, items

    def with_other_rows(self, count: int) -> CollectionPlan:
        """The same plan for a denoiser whose last `count` rows are not the concept's."""
        return replace(self, other_rows=count)

    def places(self, items: list[int]) -> torch.Tensor:
        """Which gradients a batch of noised realizations makes, (targets, items) int64.

        The last realization may have fewer targets. Its last pair is then computed several times; places from `count`
        on are dropped.
        """
        return torch.tensor(items) * self.targets + torch.arange(self.targets)[:, None]


def collect(
    denoiser: Denoiser,
    realizations: torch.Tensor,
    provenance: Provenance,
    plan: CollectionPlan,
    *,
    references: torch.Tensor | None = None,
    store: BatchStore | None = None,
    on_batch: Callable[[int], None] | None = None,
    stop: Callable[[Gradients, bool], bool] | None = None,
) -> Gradients:
    """Collect gradients of random pairs of realizations.

    Args:
        denoiser: the model.
        realizations: latents of one prompt, float, (n, …), n ≥ 2.
        provenance: family, prompt, concept and rows; the rest is filled in here.
        plan: what is collected.
        references: what the denoiser's output is compared with, (n, …) in the order of the realizations and of as many
            dimensions; the realizations unless the denoiser returns something else than latents, such as features.
        store: keeps every batch as soon as it is done, and returns those of an earlier run.
        on_batch: called with the number of gradients so far; may raise to cancel.
        stop: called after every batch, or every turn of the levels, with the gradients so far and whether they are the
            last; returns True to stop there.

    Raises:
        ElrondError: if there are too few realizations, or too little memory for one gradient.
    """
    computation = _Computation(denoiser, realizations, references, plan)
    results = _Results.empty(plan, denoiser.rows_at(plan.sigma[0]))

    def first(count: int) -> Gradients:
        values = computation.references[0].numel()
        return results.first(count, computation.pairs, provenance.with_(latent_values=values))

    done = 0
    for number, (sigma, items) in enumerate(plan.batches()):
        batch = store.get(number) if store is not None else None
        if batch is None:
            batch = computation.batch(sigma, items)
            if store is not None:
                store.put(number, batch)
        places = plan.places(items)
        results.put(places, items, batch)
        done += int((places < plan.count).sum())
        if on_batch:
            on_batch(done)
        # Within a turn, some levels have more gradients than others.
        turn_ends = (number + 1) % len(plan.sigma) == 0 or done == plan.count
        if stop and turn_ends and stop(first(done), done == plan.count):
            break
    return first(done)


def collect_batches(
    denoiser: Denoiser,
    realizations: torch.Tensor,
    plan: CollectionPlan,
    numbers: Collection[int],
    *,
    references: torch.Tensor | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> dict[int, dict[str, torch.Tensor]]:
    """Only the batches of these numbers, by number, as a `BatchStore` keeps them.

    A batch does not depend on which others are made before it or on which machine, so that several machines share a
    collection, and `collect` puts it together. Arguments and errors are those of `collect`; numbers beyond the last
    batch are left out.
    """
    computation = _Computation(denoiser, realizations, references, plan)
    made: dict[int, dict[str, torch.Tensor]] = {}
    done = 0
    for number, (sigma, items) in enumerate(plan.batches()):
        if number in numbers:
            made[number] = computation.batch(sigma, items)
            done += int((plan.places(items) < plan.count).sum())
            if on_batch:
                on_batch(done)
    return made


class _Computation:
    """Batches of one plan, each from its number alone.

    Attributes:
        pairs: (count, 2).
        references: what the denoiser's output is compared with.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        realizations: torch.Tensor,
        references: torch.Tensor | None,
        plan: CollectionPlan,
    ) -> None:
        self.pairs = draw_pairs(plan.count, len(realizations), plan.seed, plan.targets)
        self.references = realizations if references is None else references
        self._realizations = realizations
        self._plan = plan
        self._differentiate = Differentiator(denoiser)

    def batch(self, sigma: float, items: list[int]) -> dict[str, torch.Tensor]:
        """Gradients of these sources as `vectors`, and Jacobian probes as `response`, source by source."""
        plan = self._plan
        pairs = self.pairs[plan.places(items).clamp(max=plan.count - 1)]
        probe_numbers = [item * plan.probes_per_source + k for k in range(plan.probes_per_source) for item in items]
        probes = None
        if plan.probes:
            probes = normal(tuple(self.references.shape[1:]), plan.seed, "probe", probe_numbers)
            probes = probes.unflatten(0, (plan.probes_per_source, -1))
        vectors, response = self._differentiate(
            self._realizations[pairs[0, :, 0]],
            self.references[pairs[:, :, 1]],
            normal(tuple(self._realizations.shape[1:]), plan.seed, "noise", items),
            sigma,
            probes,
        )
        batch = {"vectors": _by_source(vectors, plan)}
        return batch if response is None else batch | {"response": _by_source(response, plan)}


def _by_source(vectors: torch.Tensor, plan: CollectionPlan) -> torch.Tensor:
    """(T, B, rows, d) without the common gradient, as (B · T, R, d): all of one source, then those of the next."""
    if plan.other_rows:
        own_rows = vectors[..., : vectors.shape[-2] - plan.other_rows, :]
        vectors = own_rows - vectors.mean(-2, keepdim=True)
    return vectors.transpose(0, 1).flatten(0, 1).contiguous()


@dataclass(frozen=True)
class _Results:
    """Gradients and probes of a whole plan, filled batch by batch.

    Attributes:
        plan: the plan.
        vectors: float32, (sources · targets, R, d).
        probes: float32, (sources, probes, R, d).
        token_norm: mean norm of the concept's rows.
    """

    plan: CollectionPlan
    vectors: torch.Tensor
    probes: torch.Tensor
    token_norm: float

    @classmethod
    def empty(cls, plan: CollectionPlan, rows: torch.Tensor) -> _Results:
        concept = rows[: len(rows) - plan.other_rows]
        return cls(
            plan,
            torch.empty(plan.sources * plan.targets, *concept.shape),
            torch.empty(plan.sources, plan.probes_per_source, *concept.shape),
            float(concept.float().norm(dim=-1).mean()),
        )

    def put(self, places: torch.Tensor, items: list[int], batch: dict[str, torch.Tensor]) -> None:
        """Put a batch in its place; places are (targets, items)."""
        self.vectors[places.T.flatten()] = batch["vectors"]
        if "response" in batch:
            self.probes[items] = batch["response"].unflatten(0, (-1, self.plan.probes_per_source))

    def first(self, count: int, pairs: torch.Tensor, provenance: Provenance) -> Gradients:
        """The first `count` gradients, and the probes of their sources."""
        plan = self.plan
        sources = -(-count // plan.targets)
        levels = torch.tensor(plan.sigma)[torch.arange(plan.sources) % len(plan.sigma)]
        several = plan.probes and len(plan.sigma) > 1
        return Gradients(
            vectors=self.vectors[:count],
            sigma=levels.repeat_interleave(plan.targets)[:count],
            sources=pairs[:count, 0],
            targets=pairs[:count, 1],
            provenance=provenance.with_(token_norm=self.token_norm, sigma=plan.sigma, count=count, seed=plan.seed),
            probes=self.probes[:sources].flatten(0, 1),
            probe_sigma=levels[:sources].repeat_interleave(plan.probes_per_source) if several else None,
        )
