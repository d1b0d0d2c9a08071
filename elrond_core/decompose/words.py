"""Directions between opposite words, such as small → large, ranked by the variance of the images along them.

Images alone do not determine which rotation of a set of components has axes that people have words for (Locatello et
al., 2019, "Challenging common assumptions in the unsupervised learning of disentangled representations"). Words before
the concept do. Factor analysis calls this a target rotation (Browne, 2001). Here the targets are steps of the embedding
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

# Two words are opposites if the cosine of their steps, under the pullback metric, is below this.
_OPPOSED = -0.25


def fit_words(
    gradients: Gradients,
    words: Sequence[str],
    bare_rows: torch.Tensor,
    word_rows: torch.Tensor,
    *,
    significance: float = 1.0,
    limit: int = 64,
    ridge: float | None = None,
) -> Directions:
    """Pair opposite words, greedily, by the variance of the images along the axis between them.

    For the step δ from one word to another, λ = δᵀCδ / (δᵀ(M + ridge)δ + 0.4/n²) is the variance of the images along
    the change that δ causes (`elrond_core.decompose.response`). The term 0.4/n² is a tenth of a unit of change. It
    excludes pairs of words that hardly differ.

    Two words that are no opposites, such as green and small, also span an axis, but it changes two things. So only
    opposites are paired (cosine of their steps below -0.25 under M + ridge), and λ is weighted by (1 - cosine)/2. The
    pair of the largest weighted λ becomes a direction. Its words, and the variance that it explains, are removed before
    the next pair is chosen. The change that it causes is not removed: a pair that shares its change with an earlier one
    comes late.

    Args:
        gradients: gradients with Jacobian probes.
        words: W words, W ≥ 2.
        bare_rows: (R, d) the concept's rows in the prompt without any of the words.
        word_rows: (W, R, d) its rows with each word before it.
        significance: keep directions of λ above this many units of latent variance.
        limit: keep at most this many.
        ridge: as a share of the mean of diag M; chosen by `affordable_ridge` if None.

    Returns:
        Directions (K, R, d) of unit norm, K ≥ 1, with λ as scores, largest first. They are named "word → word", from
        the word that is earlier in the list to the other. `natural_std` is set where the gradients say n.

    Raises:
        ElrondError: as `fit_response` and `word_steps`; or if no two words are opposites, or the images do not vary
            between those that are.
    """
    check_options(significance, limit)
    steps = word_steps(gradients.vectors.shape[1], gradients.vectors.shape[2], bare_rows, word_rows)
    parts = components(gradients, ridge)
    # Inner products of `changes` are those of the words' steps under M + ridge; of `coordinates`, those under C.
    changes = steps @ parts.cholesky
    metric = changes @ changes.T
    coordinates = changes @ parts.cholesky.T @ parts.eigenvectors
    variance = coordinates * parts.eigenvalues @ coordinates.T
    values = gradients.provenance.latent_values
    tenth_of_change = 0.4 / values**2 if values else 0.0
    lengths = metric.diagonal().clamp_min(torch.finfo(metric.dtype).tiny).sqrt()
    cosines = metric / torch.outer(lengths, lengths)
    pairs = torch.combinations(torch.arange(len(words)))
    pairs = pairs[cosines[pairs[:, 0], pairs[:, 1]] < _OPPOSED]
    unpaired = torch.ones(len(words), dtype=torch.bool)
    # Variances below this are rounding errors.
    rounding = 1e-9 * float(parts.eigenvalues[0])
    chosen: list[tuple[int, int]] = []
    scores: list[float] = []
    while len(chosen) < limit:
        first, second = pairs[unpaired[pairs].all(1)].T
        squared = _squared_distances(metric, first, second)
        distinct = squared > 1e-12 * metric.diagonal().max()
        explained = torch.where(
            distinct, _squared_distances(variance, first, second) / (squared + tenth_of_change), 0.0
        )
        explained = torch.where(explained > (significance if chosen else rounding), explained, 0.0)
        if not (explained > 0).any():
            break
        best = int((explained * (1 - cosines[first, second])).argmax())
        a, b = int(first[best]), int(second[best])
        chosen.append((a, b))
        scores.append(float(explained[best]))
        unpaired[[a, b]] = False
        unit = torch.zeros(len(words), dtype=torch.float64)
        unit[a], unit[b] = -1.0, 1.0
        unit = unit / squared[best].sqrt()
        # Deflation: variance along the pair's change is removed from all words' steps.
        covariances, projections = variance @ unit, metric @ unit
        variance = variance - torch.outer(covariances, projections) - torch.outer(projections, covariances)
        variance = variance + float(unit @ covariances) * torch.outer(projections, projections)
    if not chosen:
        raise ElrondError(
            "The images do not vary along the move from any of these words to an opposite one: try other words, "
            "such as small and large."
        )
    order = sorted(range(len(chosen)), key=lambda k: -scores[k])
    chosen, scores = [chosen[k] for k in order], [scores[k] for k in order]
    axes = torch.stack([steps[b] - steps[a] for a, b in chosen])
    change_lengths = torch.stack([(changes[b] - changes[a]).norm() for a, b in chosen])
    lengths = axes.norm(dim=1)
    variances = torch.tensor(scores, dtype=torch.float64)
    # As in `fit_response`.
    natural_std = (lengths / change_lengths * variances.sqrt() * 2 / values).tolist() if values else ()
    return Directions(
        vectors=(axes / lengths[:, None]).reshape(-1, *gradients.vectors.shape[1:]).float(),
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


def word_steps(rows: int, width: int, bare_rows: torch.Tensor, word_rows: torch.Tensor) -> torch.Tensor:
    """The step of the concept's rows that each word causes, minus the mean step of all words.

    The mean is what any additional word causes there.

    Args:
        rows: the concept's R, or 1 for the mean over its rows.
        width: d.
        bare_rows: (R, d) the concept's rows in the prompt without any of the words.
        word_rows: (W, R, d) its rows with each word before it.

    Returns:
        float64 (W, rows · d).

    Raises:
        ElrondError: if the shapes do not fit, or no word changes the rows.
    """
    if word_rows.shape[2] != width or bare_rows.shape != word_rows.shape[1:] or rows not in (1, word_rows.shape[1]):
        raise ElrondError(
            f"The directions are {rows} rows of {width}, and this text encoder gives the concept "
            f"{word_rows.shape[1]} of {word_rows.shape[2]}: use the text encoder they were made with."
        )
    steps = word_rows.double() - bare_rows.double()
    if rows == 1:
        steps = steps.mean(1, keepdim=True)
    steps = (steps - steps.mean(0)).flatten(1)
    if not (steps.norm(dim=1) > 1e-9).any():
        raise ElrondError("No word put before the concept changes its rows: this text encoder cannot name directions.")
    return steps


def _squared_distances(gram: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Squared distances between vectors `first` and `second` whose inner products are `gram`."""
    return gram[first, first] + gram[second, second] - 2 * gram[first, second]
