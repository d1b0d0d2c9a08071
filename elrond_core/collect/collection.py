"""Collecting gradients: equations 1 to 4 of ELROND (arXiv 2602.10216).

Two realizations A and B of one prompt; A is noised to a level, the denoiser estimates the clean image from it, and
the mean squared difference of that estimate to B is back-propagated to the concept's rows. The gradient says how
the word would have to move to turn A's image into B's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ..errors import ElrondError
from ..gradients import Gradients, listed
from ..provenance import Provenance
from ..seeding import normal
from ..storage.shards import Shards
from .differentiate import Denoiser, Differentiator
from .pairs import draw_pairs

# The response is taken once for every so many targets of a noised realization, or part of them.
TARGETS_A_PROBE = 8


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
        raise ElrondError(f"The noise level must be above zero, got {listed(levels) or 'none'}.")
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
