"""Directions between words, such as small → large, ranked by how much the images vary along them.

Images alone cannot tell which rotation of a set of components has axes that people have words for (Locatello et al.,
2019, "Challenging common assumptions in the unsupervised learning of disentangled representations"). Words before the
concept can. Factor analysis calls this a target rotation (Browne, 2001); the targets are steps of the embedding here
instead of loadings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..directions import Directions
from ..errors import ElrondError
from ..gradients import Gradients
from .pca import check_options
from .response import components

# Largest cosine of two words' steps, under the pullback metric, at which the words count as opposites.
_OPPOSED = -0.25


def fit_words(
    gradients: Gradients,
    words: Sequence[str],
    bare: torch.Tensor,
    moved: torch.Tensor,
    *,
    significance: float = 1.0,
    limit: int = 64,
    ridge: float | None = None,
) -> Directions:
    """Pair words up, each with an opposite, by how much the images vary along the axis between them.

    For the step δ from one word to another, λ = δᵀCδ / (δᵀ(M + ridge)δ + 0.4/n²) is the variance of the images along
    the change that δ causes (`elrond_core.decompose.response`). The term 0.4/n² is a tenth of a unit of change, so that
    two words which hardly differ are no pair. Words of different meaning, such as green and small, also span an axis,
    but it changes both; so only opposites are paired (cosine of their steps below -0.25 under M + ridge), and λ is
    weighted by (1 - cosine)/2. The pair of the largest becomes a direction. Its words, and the variance that it
    explains, are removed, and the next is chosen. Variance that an axis shares with earlier ones does not count for it,
    but the change does: a pair that also changes what a louder pair changes comes late.

    Args:
        gradients: gradients with Jacobian probes.
        words: W words, W ≥ 2.
        bare: (R, d) the concept's rows without any of them.
        moved: (W, R, d) the concept's rows with each put before it.
        significance: keep directions of λ above this many units of latent variance.
        limit: keep at most this many.
        ridge: as a share of the mean response; chosen by `affordable_ridge` if None.

    Returns:
        Directions (K, R, d) of unit norm, K ≥ 1, from the word that comes first in the list to the other, with the
        names "word → word", λ as scores, largest first, and natural_std where the gradients give it.

    Raises:
        ElrondError: as `fit_response` and `label`; or if no two words oppose each other, or the images do not vary
            between those that do.
    """
    check_options(significance, limit)
    moves = word_moves(gradients.vectors.shape[1], gradients.vectors.shape[2], bare, moved)
    parts = components(gradients, ridge)
    # Inner products of `changes` are those of the words' steps under M + ridge; of `coordinates`, those under C.
    changes = moves @ parts.cholesky
    change = changes @ changes.T
    coordinates = changes @ parts.cholesky.T @ parts.eigenvectors
    variance = coordinates * parts.eigenvalues @ coordinates.T
    values = gradients.provenance.latent_values
    tenth_of_change = 0.4 / values**2 if values else 0.0
    lengths = change.diagonal().clamp_min(torch.finfo(change.dtype).tiny).sqrt()
    cosines = change / torch.outer(lengths, lengths)
    places = torch.combinations(torch.arange(len(words)))
    places = places[cosines[places[:, 0], places[:, 1]] < _OPPOSED]
    free = torch.ones(len(words), dtype=torch.bool)
    # A smaller variance is a rounding error.
    least = 1e-9 * float(parts.eigenvalues[0])
    chosen: list[tuple[int, int]] = []
    scores: list[float] = []
    while len(chosen) < limit:
        first, second = places[free[places].all(1)].T
        size = _between(change, first, second)
        moving = size > 1e-12 * change.diagonal().max()
        explained = torch.where(moving, _between(variance, first, second) / (size + tenth_of_change), 0.0)
        explained = torch.where(explained > (significance if chosen else least), explained, 0.0)
        if not (explained > 0).any():
            break
        best = int((explained * (1 - cosines[first, second])).argmax())
        a, b = int(first[best]), int(second[best])
        chosen.append((a, b))
        scores.append(float(explained[best]))
        free[[a, b]] = False
        unit = torch.zeros(len(words), dtype=torch.float64)
        unit[a], unit[b] = -1.0, 1.0
        unit = unit / size[best].sqrt()
        along, shared = variance @ unit, change @ unit
        variance = variance - torch.outer(along, shared) - torch.outer(shared, along)
        variance = variance + float(unit @ along) * torch.outer(shared, shared)
    if not chosen:
        raise ElrondError(
            "The images do not vary along the move from any of these words to an opposite one: try other words, "
            "such as small and large."
        )
    order = sorted(range(len(chosen)), key=lambda k: -scores[k])
    chosen, scores = [chosen[k] for k in order], [scores[k] for k in order]
    steps = torch.stack([moves[b] - moves[a] for a, b in chosen])
    sizes = torch.stack([(changes[b] - changes[a]).norm() for a, b in chosen])
    lengths = steps.norm(dim=1)
    variances = torch.tensor(scores, dtype=torch.float64)
    # As in `fit_response`.
    natural_std = (lengths / sizes * variances.sqrt() * 2 / values).tolist() if values else ()
    return Directions(
        vectors=(steps / lengths[:, None]).reshape(-1, *gradients.vectors.shape[1:]).float(),
        scores=variances.float(),
        method={
            "name": "words",
            "significance": f"{significance:g}",
            "ridge": f"{parts.ridge:.3g}",
            "limit": str(limit),
            "words": str(len(words)),
        },
        provenance=gradients.provenance,
        names=tuple(f"{words[a]} → {words[b]}" for a, b in chosen),
        score_name="latent variance per unit of change",
        natural_std=tuple(natural_std),
    )


def word_moves(rows: int, width: int, bare: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """The step of the concept's rows that each word causes, less the mean step of all words.

    Args:
        rows: 1, or the concept's R; with 1, a step is the mean over its rows.
        width: d.
        bare: (R, d) the concept's rows without any of them.
        moved: (W, R, d) the concept's rows with each put before it.

    Returns:
        float64 (W, rows · d).

    Raises:
        ElrondError: if the shapes do not fit, or no word changes the rows.
    """
    if moved.shape[2] != width or bare.shape != moved.shape[1:] or rows not in (1, moved.shape[1]):
        raise ElrondError(
            f"The directions are {rows} rows of {width}, and this text encoder gives the concept "
            f"{moved.shape[1]} of {moved.shape[2]}: use the text encoder they were made with."
        )
    moves = moved.double() - bare.double()
    if rows == 1:
        moves = moves.mean(1, keepdim=True)
    moves = (moves - moves.mean(0)).flatten(1)
    if not (moves.norm(dim=1) > 1e-9).any():
        raise ElrondError("No word put before the concept changes its rows: this text encoder cannot name directions.")
    return moves


def _between(gram: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Squared lengths of the differences of vectors whose inner products are `gram`."""
    return gram[first, first] + gram[second, second] - 2 * gram[first, second]
