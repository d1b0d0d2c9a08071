"""Collecting gradients: equations 1 to 4 of ELROND (arXiv 2602.10216).

Two realizations A and B of one prompt; A is noised to a level, the denoiser estimates the clean image from it, and
the mean squared difference of that estimate to B is back-propagated to the concept's rows. The gradient says how
the word would have to move to turn A's image into B's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from .errors import ElrondError
from .provenance import Provenance
from .seeding import generator, normal
from .shards import Shards

# The response is taken once for every so many targets of a noised realization, or part of them.
TARGETS_A_PROBE = 8


class Denoiser(Protocol):
    """The model as the core sees it: one conditioning, whose concept rows can be replaced."""

    @property
    def rows(self) -> torch.Tensor:
        """The rows to differentiate, as encoded, float32, (R, d): the concept's, then others of the prompt if any."""

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """Equation 1: latents at noise level `sigma`, all (B, …)."""

    def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        """Equation 2: the clean estimate (B, …), differentiable in `rows` (B, R, d), sample by sample."""

    def spare(self) -> bool:
        """Need less memory from now on, at the cost of time; False if there is no way left to."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of one concept.

    Attributes:
        vectors: float32, (N, R, d): gradient i with respect to the concept's R rows.
        sigma: float32, (N,): noise level of each.
        sources: int64, (N,): realization that was noised (A).
        targets: int64, (N,): realization the estimate was compared with (B).
        provenance: where they come from.
        response: float32, (M, R, d): back-propagated white noise at the same points, scaled like the gradients, so
            that its second moment estimates the response JᵀJ; M is 0 where it was not collected.
        response_sigma: float32, (M,): noise level of each response, where there are several levels; else None.
    """

    vectors: torch.Tensor
    sigma: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    provenance: Provenance
    response: torch.Tensor
    response_sigma: torch.Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.vectors)
        if self.vectors.ndim != 3 or self.response.ndim != 3 or self.response.shape[1:] != self.vectors.shape[1:]:
            raise ElrondError(
                f"Gradients must be (N, rows, d), got {tuple(self.vectors.shape)} with a response of "
                f"{tuple(self.response.shape)}."
            )
        if not len(self.sigma) == len(self.sources) == len(self.targets) == count:
            raise ElrondError(f"{count} gradients need as many noise levels, sources and targets.")
        if self.response_sigma is not None and len(self.response_sigma) != len(self.response):
            raise ElrondError(f"{len(self.response)} responses need as many noise levels.")

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def flat(self) -> torch.Tensor:
        """(N, R·d): the rows of a concept as one long vector, which is how they are decomposed."""
        return self.vectors.flatten(1)

    @property
    def levels(self) -> list[float]:
        """The noise levels, in the model's units, highest first."""
        return sorted(self.sigma.unique().tolist(), reverse=True)

    def at_levels(self, levels: Sequence[float]) -> Gradients:
        """Only the gradients, and responses, of these noise levels.

        Raises:
            ElrondError: if there are none.
        """
        some = torch.tensor(list(levels), dtype=torch.float32)
        kept, heard = torch.isin(self.sigma, some), torch.isin(self.response_levels(), some)
        if not kept.any():
            raise ElrondError(f"There are no gradients of that noise level, only of {_listed(self.levels)}.")
        return Gradients(
            vectors=self.vectors[kept],
            sigma=self.sigma[kept],
            sources=self.sources[kept],
            targets=self.targets[kept],
            provenance=replace(self.provenance, sigma=tuple(self.sigma[kept].unique().tolist()), count=int(kept.sum())),
            response=self.response[heard],
            response_sigma=None if self.response_sigma is None else self.response_sigma[heard],
        )

    def of_row(self, row: int) -> Gradients:
        """Only the gradients, and responses, of one of the concept's rows, (N, 1, d); 0 is the first.

        Raises:
            ElrondError: if there is no such row.
        """
        count = self.vectors.shape[1]
        if not 0 <= row < count:
            raise ElrondError(f"The concept has {count} rows, and no row {row + 1}.")
        here = slice(row, row + 1)
        return replace(
            self,
            vectors=self.vectors[:, here],
            response=self.response[:, here],
            provenance=self.provenance.with_(rows=self.provenance.rows[here], tokens=self.provenance.tokens[here]),
        )

    def of_rows_alike(self) -> Gradients:
        """Gradients, and responses, of moving all rows of the concept alike, (N, 1, d).

        They are the sums over the rows, and so point where the means do; a direction over one row moves several alike.
        """
        return replace(self, vectors=self.vectors.sum(1, keepdim=True), response=self.response.sum(1, keepdim=True))

    def normalised(self) -> Gradients:
        """Gradients, and responses, divided by the root mean square length of their noise level's gradients.

        Every level then has the same say in pooled directions; both are divided by the same length, so that a level's
        response directions do not change.
        """
        scale, heard = torch.ones(len(self)), torch.ones(len(self.response))
        for level in self.levels:
            here = self.sigma == level
            length = self.flat[here].double().square().sum(1).mean().sqrt().float()
            if length > 0:
                scale[here], heard[self.response_levels() == level] = 1 / length, 1 / length
        return replace(self, vectors=self.vectors * scale[:, None, None], response=self.response * heard[:, None, None])

    def response_levels(self) -> torch.Tensor:
        """Noise level of each response, float32, (M,).

        Raises:
            ElrondError: if there are several levels and the gradients do not say.
        """
        if self.response_sigma is not None:
            return self.response_sigma
        if len(self.levels) > 1 and len(self.response):
            raise ElrondError("These gradients do not say which noise level their responses are of.")
        return self.sigma[:1].expand(len(self.response))


def check_targets(realizations: int, targets: int) -> None:
    """Whether each of so many realizations can be compared with `targets` others.

    Raises:
        ElrondError: if there are fewer than two realizations, or not one for every target.
    """
    if realizations < 2:
        raise ElrondError(f"Gradients need at least two realizations to compare, and there is {realizations}.")
    if not 1 <= targets < realizations:
        raise ElrondError(
            f"Of {realizations} realizations each can be compared with 1 to {realizations - 1} others, not {targets}."
        )


def draw_pairs(count: int, realizations: int, seed: int, targets: int = 1) -> torch.Tensor:
    """`count` random pairs of distinct realizations, (count, 2) int64; pair i depends on the seed and i only.

    Each source is drawn for `targets` pairs in a row, whose targets differ.

    Raises:
        ElrondError: as `check_targets`.
    """
    check_targets(realizations, targets)
    pairs = torch.empty(count, 2, dtype=torch.int64)
    for i in range(0, count, targets):
        g = generator(seed, "pair", i // targets)
        source = torch.randint(realizations, (1,), generator=g)
        # Counting up from the source by 1 … n-1 keeps the two distinct and every pair equally likely.
        steps: dict[int, None] = {}
        while len(steps) < targets:
            steps[int(torch.randint(1, realizations, (1,), generator=g))] = None
        pairs[i : i + targets, 0] = source
        pairs[i : i + targets, 1] = (source + torch.tensor(list(steps))[: count - i]) % realizations
    return pairs


def gradient(
    denoiser: Denoiser,
    source: torch.Tensor,
    target: torch.Tensor,
    noise: torch.Tensor,
    sigma: float,
    probe: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of a batch of pairs, and the response to white noise if asked for, from one forward pass.

    Args:
        denoiser: the model.
        source: latents A, (B, …).
        target: latents B, as they are, (B, …); or (T, B, …) for T targets of each source.
        noise: standard normal, (B, …).
        sigma: noise level.
        probe: standard normal white noise to back-propagate as well, (B, …), or (P, B, …) for P of each source; or
            None.

    Returns:
        float32 on the CPU: the gradient of mean((x̂0 - B)²) for each sample, whatever the batch, (B, R, d), or
        (T, B, R, d) for T targets; and 2/n·Jᵀ·probe (B, R, d), or (P, B, R, d), n the number of latent values, on the
        same scale.
    """
    rows = denoiser.rows.expand(len(source), *denoiser.rows.shape).clone().requires_grad_(True)
    noisy = denoiser.noised(source, noise, sigma)
    with torch.enable_grad():
        estimate = denoiser.denoised(noisy, sigma, rows)
    if not estimate.requires_grad:
        raise ElrondError("The model's output does not depend on the concept's rows in a differentiable way.")
    # Summed over the batch, averaged within a sample: gradient length must not depend on the batch size.
    scale = 2.0 / estimate[0].numel()
    several = target.ndim > source.ndim
    # The Jacobian is the same for all: what differs is the vector that is back-propagated.
    probed = probe is not None and probe.ndim > source.ndim
    targets = target if several else target[None]
    probes: Sequence[torch.Tensor] = [] if probe is None else list(probe) if probed else [probe]
    left = len(targets) + len(probes)

    def back(cotangent: torch.Tensor) -> torch.Tensor:
        nonlocal left
        left -= 1
        (vectors,) = torch.autograd.grad(estimate, rows, scale * cotangent, retain_graph=left > 0)
        return vectors.float().cpu()

    found = torch.stack([back(estimate.detach() - one.to(estimate)) for one in targets])
    heard = torch.stack([back(one.to(estimate)) for one in probes]) if probe is not None else None
    gradients = found if several else found[0]
    response = heard if probed or heard is None else heard[0]
    if not torch.isfinite(gradients).all():
        raise ElrondError(
            "The model returned gradients that are not finite; load it in bfloat16 or float32 rather than float16."
        )
    return gradients, response


class Differentiator:
    """`gradient` of one denoiser, for batches of any size: one that does not fit into memory is halved.

    Later batches are run in parts of the size that did fit. When a single sample does not, the denoiser is asked to
    spare memory.

    Raises:
        ElrondError: if a single sample does not fit, however much is spared.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._limit: int | None = None

    def __call__(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        noise: torch.Tensor,
        sigma: float,
        probe: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `gradient`."""
        found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        start, size = 0, self._limit or len(source)
        while start < len(source):
            part = slice(start, start + size)
            try:
                found.append(
                    gradient(
                        self._denoiser,
                        source[part],
                        target[:, part] if target.ndim > source.ndim else target[part],
                        noise[part],
                        sigma,
                        None if probe is None else probe[:, part] if probe.ndim > source.ndim else probe[part],
                    )
                )
                start += size
                continue
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
            # Only here has the failed attempt, which the error refers to, let go of its tensors.
            if size > 1:
                size = self._limit = min(size, len(source) - start) // 2 or 1
            elif not self._denoiser.spare():
                raise ElrondError(
                    "There is too little memory for a single gradient of images this large: sample smaller "
                    "realizations, or close other programs that use the same device."
                )
        vectors, responses = zip(*found, strict=True)
        joined = None if probe is None else torch.cat(responses, dim=probe.ndim - source.ndim)
        return torch.cat(vectors, dim=target.ndim - source.ndim), joined


def _out_of_memory(error: RuntimeError) -> bool:
    # Not every device has a class of its own for this.
    return isinstance(error, torch.cuda.OutOfMemoryError) or bool(
        re.search(r"out of memory|can't allocate memory|not enough memory", str(error))
    )


def collect(
    denoiser: Denoiser,
    realizations: torch.Tensor,
    provenance: Provenance,
    count: int,
    sigma: float | Sequence[float],
    seed: int,
    batch_size: int = 8,
    response: bool = False,
    on_batch: Callable[[int], None] | None = None,
    targets: int = 1,
    others: int = 0,
    compared: torch.Tensor | None = None,
    shards: Shards | None = None,
    enough: Callable[[Gradients, bool], bool] | None = None,
) -> Gradients:
    """Collect gradients of random pairs of realizations.

    Args:
        denoiser: the model.
        realizations: latents of one prompt, float, (n, …), n ≥ 2.
        provenance: family, prompt, concept and rows; the rest is filled in here.
        count: number of gradients; at most, with `enough`.
        sigma: noise level in the model's units, or several, which take turns.
        seed: fixes pairs and noise; gradient i depends on (seed, i) and the levels only.
        batch_size: noised realizations a forward pass; fewer where they do not fit into memory.
        response: also back-propagate white noise at every point.
        on_batch: called with the number of gradients so far; may raise to stop.
        targets: others that each noised realization is compared with: gradients a forward pass. The response is
            taken once for every `TARGETS_A_PROBE` of them, or part of so many.
        others: how many of the denoiser's last rows are not the concept's. The mean gradient of all its rows is then
            subtracted from the concept's.
        compared: what the denoiser's output is compared with, (n, …) in the order of the realizations and of as many
            dimensions; these themselves unless it returns something else than latents, such as image features.
        shards: keeps every batch as soon as it is done, and gives back those of an earlier run.
        enough: asked after every batch, or every turn of the levels, whether the gradients so far will do; its second
            argument tells whether there are no more.

    Raises:
        ElrondError: if count < 1, sigma ≤ 0, there are too few realizations, or too little memory for one gradient.
    """
    levels = [float(level) for level in ([sigma] if isinstance(sigma, (int, float)) else sigma)]
    if count < 1:
        raise ElrondError(f"The number of gradients must be at least 1, got {count}.")
    if not levels or min(levels) <= 0:
        raise ElrondError(f"The noise level must be above zero, got {_listed(levels) or 'none'}.")
    pairs = draw_pairs(count, len(realizations), seed, targets)
    compared = realizations if compared is None else compared
    shape = tuple(compared.shape[1:])
    differentiate = Differentiator(denoiser)
    own = len(denoiser.rows) - others
    sources = -(-count // targets)
    probes = -(-targets // TARGETS_A_PROBE) if response else 0
    vectors = torch.empty(sources * targets, own, denoiser.rows.shape[1])
    responses = vectors.new_empty(sources, probes, *vectors.shape[1:])
    turns = torch.tensor(levels)[torch.arange(sources) % len(levels)]
    token_norm = float(denoiser.rows[:own].float().norm(dim=-1).mean())

    def first(found: int) -> Gradients:
        heard = -(-found // targets)
        return Gradients(
            vectors=vectors[:found],
            sigma=turns.repeat_interleave(targets)[:found],
            sources=pairs[:found, 0],
            targets=pairs[:found, 1],
            provenance=provenance.with_(
                token_norm=token_norm,
                sigma=tuple(levels),
                count=found,
                seed=seed,
                latent_values=compared[0].numel(),
            ),
            response=responses[:heard].flatten(0, 1),
            response_sigma=turns[:heard].repeat_interleave(probes) if response and len(levels) > 1 else None,
        )

    done = 0
    for number, (level, indices) in enumerate(_batches(sources, batch_size, len(levels))):
        # The last source may have fewer targets; it is compared with one of them again, and the surplus is dropped.
        places = torch.tensor(indices) * targets + torch.arange(targets)[:, None]
        drawn = places.clamp(max=count - 1)
        answer = None
        kept = shards.get(number) if shards is not None else None
        if kept is not None:
            found, answer = kept["vectors"], kept.get("response")
        else:
            numbers = [item * probes + k for k in range(probes) for item in indices]
            each, answer = differentiate(
                realizations[pairs[drawn[0], 0]],
                compared[pairs[drawn, 1]],
                normal(tuple(realizations.shape[1:]), seed, "noise", indices),
                levels[level],
                normal(shape, seed, "probe", numbers).unflatten(0, (probes, -1)) if response else None,
            )
            found = _without_common(each, others).transpose(0, 1).flatten(0, 1).contiguous()
            answer = (
                None if answer is None else _without_common(answer, others).transpose(0, 1).flatten(0, 1).contiguous()
            )
            if shards is not None:
                shards.put(number, {"vectors": found} | ({} if answer is None else {"response": answer}))
        vectors[places.T.flatten()] = found
        if answer is not None:
            responses[indices] = answer.unflatten(0, (-1, probes))
        done += int((places < count).sum())
        if on_batch:
            on_batch(done)
        # Between turns, some levels are ahead of others.
        if enough and ((number + 1) % len(levels) == 0 or done == count) and enough(first(done), done == count):
            break
    return first(done)


def _without_common(gradients: torch.Tensor, others: int) -> torch.Tensor:
    if not others:
        return gradients
    return gradients[..., : gradients.shape[-2] - others, :] - gradients.mean(-2, keepdim=True)


def _batches(count: int, size: int, levels: int) -> Iterator[tuple[int, list[int]]]:
    """The level and the items of every batch; item i is of level i modulo their number."""
    size = max(1, size)
    for start in range(0, count, size * levels):
        for level in range(levels):
            items = list(range(start + level, min(count, start + size * levels), levels))
            if items:
                yield level, items


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.4g}" for number in numbers)
