"""Directions between words: axes that the text encoder spells out, ranked by how much the images vary along them.

Which rotation of a set of components is the one whose axes people have words for cannot be told from the images alone
(Locatello et al., 2019, "Challenging common assumptions in the unsupervised learning of disentangled
representations"). Words put before the concept tell. Factor analysis calls it a target rotation (Browne, 2001), with
the targets' places in the embedding in the place of loadings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..directions import Directions
from ..errors import ElrondError
from ..gradients import Gradients
from ..steering.labels import word_moves
from .pca import check_options
from .response import components

# Cosine of two words' moves, in the model's response, above which they do not oppose each other.
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

    For the move δ from one word to another, λ = δᵀCδ / (δᵀ(M + ridge)δ + 0.4/n²) is the variance of the images along
    the change that δ causes (`elrond_core.decompose.response`), with a tenth of a unit of change added, so that two
    words which hardly differ do not make a pair. Two words that say different things, such as green and small, span an
    axis as well, but one that moves both; so only words whose own moves change the image in opposite ways make a pair
    (cosine below -0.25 under M + ridge), and λ counts by (1 - cosine)/2. The pair of the largest becomes a direction;
    its words and the variance it explains are taken away, and so on. What an axis shares with those before it thus
    counts for nothing, while it still counts as change: a pair that also moves what a louder one moves comes late.

    Args:
        gradients: gradients with their response.
        words: W words, W ≥ 2.
        bare: (R, d) the concept's rows without any of them.
        moved: (W, R, d) the concept's rows with each put before it.
        significance: keep directions of λ above this many units of latent variance.
        limit: keep at most this many.
        ridge: as a share of the mean response; chosen by `affordable_ridge` if None.

    Returns:
        Directions (K, R, d) of unit norm, K ≥ 1, from the word that comes first in the list to the other, with the
        names "word → word", λ as scores, largest first, and their reach where the gradients tell it.

    Raises:
        ElrondError: as `fit_response` and `label`; or if no two words oppose each other, or the images do not vary
            between those that do.
    """
    check_options(significance, limit)
    moves = word_moves(gradients.vectors.shape[1], gradients.vectors.shape[2], bare, moved)
    parts = components(gradients, ridge)
    # Inner products of these are those of the moves under M + ridge, and their parts along the components are C's.
    changes = moves @ parts.factor
    change = changes @ changes.T
    coordinates = changes @ parts.factor.T @ parts.moves
    variance = coordinates * parts.eigenvalues @ coordinates.T
    values = gradients.provenance.latent_values
    tenth_of_change = 0.4 / values**2 if values else 0.0
    lengths = change.diagonal().clamp_min(torch.finfo(change.dtype).tiny).sqrt()
    cosines = change / torch.outer(lengths, lengths)
    places = torch.combinations(torch.arange(len(words)))
    places = places[cosines[places[:, 0], places[:, 1]] < _OPPOSED]
    free = torch.ones(len(words), dtype=torch.bool)
    # What rounding leaves of no variance is none.
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
    found = torch.tensor(scores, dtype=torch.float64)
    # As in `fit_response`.
    reach = (lengths / sizes * found.sqrt() * 2 / values).tolist() if values else ()
    return Directions(
        vectors=(steps / lengths[:, None]).reshape(-1, *gradients.vectors.shape[1:]).float(),
        scores=found.float(),
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
        reach=tuple(reach),
    )


def _between(gram: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Squared lengths of the differences of vectors whose inner products are `gram`."""
    return gram[first, first] + gram[second, second] - 2 * gram[first, second]
