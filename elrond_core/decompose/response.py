"""Directions normalised by the model's response: natural variation per unit of the change that a movement causes.

Gradients are g = (2/n) Jᵀ(x̂0 - x_B), n the number of latent values and J the Jacobian of the estimate with respect
to the concept's rows; responses are (2/n) Jᵀw with white noise w. So, over pairs and noise,

    C = cov(g) = (4/n²) Jᵀ Σ J    and    M = E[response responseᵀ] = (4/n²) JᵀJ,

Σ being the covariance of the differences between images. For C v = λ M v then λ = (Jv)ᵀ Σ (Jv) / |Jv|²: the variance
of the images along the change that moving the rows by v causes. PCA of C instead weighs every change by how
strongly the model answers to it, twice, and one loud factor leaks into all components.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning

from ..directions import Directions, fix_signs
from ..errors import ElrondError
from ..gradients import Gradients
from ..provenance import Provenance
from .moments import BLOCK, Moments, filled, first_not_finite
from .pca import Spectrum, check_options, cut, descending

_RIDGES = torch.logspace(-6, 1, 57, dtype=torch.float64)
_SAME = "All gradients or all responses are the same, so there is nothing to decompose."


def fit_response(
    gradients: Gradients,
    *,
    significance: float = 1.0,
    limit: int = 64,
    ridge: float | None = None,
    rotate: bool = False,
    seed: int = 0,
) -> tuple[Directions, Spectrum]:
    """Solve C v = λ (M + ridge · mean(diag M) · I) v; the steering directions are the v themselves.

    v lives where the rows live: moving them by v changes the image by Jv, and the Jv of different v are the principal
    components of the images within what the model can change. M v, the other candidate, lives where gradients live;
    moving the rows by it changes the image by J Jᵀ(Jv), which mixes components again wherever the model answers
    unevenly. The ridge is what makes v affordable: a movement that hardly changes anything would need a strength
    beyond the linear regime. As the ridge grows the directions become those of PCA.

    Principal components of the images still mix factors of about equal variance, such as x and y. Factors vary
    independently, which principal components do not ask for: a rotation does, by independent component analysis
    (FastICA, Hyvärinen, 1999) of the gradients' coordinates along the components kept.

    Args:
        gradients: gradients with their response, collected at the same points.
        significance: keep components of λ above this many units of latent variance. Models' latents are scaled to a
            variance of about 1 a value, so that λ = 1 is what a single latent value varies by.
        limit: keep at most this many.
        ridge: as a share of the mean response; chosen by `affordable_ridge` if None.
        rotate: turn the components kept so that they vary independently.
        seed: fixes the rotation.

    Returns:
        Directions (K, R, d) of unit norm, best first, K ≥ 1, with scores: λ, or after a rotation the latent variance
        that each explains; and the spectrum of all λ, with the ridge.

    Raises:
        ElrondError: if the response was not collected, there are fewer than two gradients or responses, one is not
            finite, all gradients or responses are zero, or an option is out of range.
    """
    check_options(significance, limit)
    parts = components(gradients, ridge)
    size = len(parts.moves)
    spectrum = replace(
        cut(parts.eigenvalues, significance, limit, len(gradients), size),
        name="latent variance per unit of change",
        ridge=parts.ridge,
    )
    moves, scores = parts.moves[:, : spectrum.kept], parts.eigenvalues[: spectrum.kept]
    turned = rotate and spectrum.kept > 1
    if turned:
        deviations = scores.sqrt()
        values = torch.empty(len(gradients), spectrum.kept, dtype=torch.float64)
        values = filled(values, (block.double() @ moves for block in gradients.flat.split(BLOCK)))
        turn = _independent((values - values.mean(0)) / deviations, seed)
        moves, scores = moves * deviations @ turn.T, turn.square() @ scores
        order = scores.argsort(descending=True)
        moves, scores = moves[:, order], scores[order]
    lengths = moves.norm(dim=0)
    # A step δ changes the image by Jδ, and Jδ = Δ is solved by (2/n)(M + ridge)⁻¹ (2/n)JᵀΔ: in components, each with
    # the deviation √λ, and in the images' units by the n that gradients were divided by.
    size_of_latent = gradients.provenance.latent_values
    reach = lengths * (1 if turned else scores.sqrt()) * 2 / size_of_latent if size_of_latent else torch.empty(0)
    moves = (moves / lengths).T.reshape(-1, *gradients.vectors.shape[1:]).float()
    method = {
        "name": "response",
        "significance": f"{significance:g}",
        "ridge": f"{parts.ridge:.3g}",
        "limit": str(limit),
    }
    directions = Directions(
        vectors=fix_signs(moves),
        scores=scores.float(),
        method={**method, "rotated": str(rotate).lower()},
        provenance=gradients.provenance,
        score_name=spectrum.name,
        reach=tuple(reach.tolist()),
    )
    return directions, spectrum


@dataclass(frozen=True)
class Components:
    """The solved problem.

    Attributes:
        eigenvalues: float64, (P,): λ, descending, P = min(N, R·d).
        moves: float64, (R·d, P): v as columns, scaled so that vᵀ(M + ridge)v = 1.
        ridge: as a share of the mean response.
        factor: float64, (R·d, R·d): lower triangle L with L Lᵀ = M + ridge.
    """

    eigenvalues: torch.Tensor
    moves: torch.Tensor
    ridge: float
    factor: torch.Tensor


def components(gradients: Gradients, ridge: float | None = None) -> Components:
    """All components of `fit_response`, which says what is refused."""
    if ridge is not None and not ridge > 0:
        raise ElrondError(f"The ridge must be above zero, got {ridge}.")
    factor, ridge = _factor(gradients, ridge)
    # Matrices this large are let go of as soon as they have been used.
    white = torch.linalg.solve_triangular(factor, Moments.of(gradients).covariance(), upper=False)
    if not white.any():
        raise ElrondError(_SAME)
    white = torch.linalg.solve_triangular(factor, white.T, upper=False)
    eigenvalues, vectors = descending(white)
    count = min(len(gradients), len(white))
    moves = torch.linalg.solve_triangular(factor.T, vectors[:, :count], upper=True)
    return Components(eigenvalues[:count], moves, ridge, factor)


def _factor(gradients: Gradients, ridge: float | None) -> tuple[torch.Tensor, float]:
    """`Components.factor`, and the ridge."""
    check_response(gradients)
    even, odd = halved(gradients.response)
    share_of_odd = (len(gradients.response) // 2) / len(gradients.response)
    mean_response = float(even.diagonal().lerp(odd.diagonal(), share_of_odd).mean())
    if mean_response == 0:
        raise ElrondError(_SAME)
    ridge = affordable_ridge(even, odd, mean_response, gradients.provenance) if ridge is None else ridge
    metric = even.lerp_(odd, share_of_odd)
    metric.diagonal().add_(ridge * mean_response)
    return torch.linalg.cholesky(metric), ridge


def check_response(gradients: Gradients) -> None:
    """Refuse a response that nothing can be told from.

    Raises:
        ElrondError: if it was not collected, is of fewer than two points, or is not finite.
    """
    if not len(gradients.response):
        raise ElrondError("These gradients came without the model's response; collect them again with it.")
    if len(gradients.response) < 2:
        raise ElrondError("A response needs at least 2 samples, got 1.")
    bad = first_not_finite(gradients.response)
    if bad is not None:
        raise ElrondError(f"The response is not finite (NaN or infinity) in row {bad}; collect the gradients again.")


def halved(response: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments of either half of a response (M, …), M ≥ 2: of the first, third, … and of the second, fourth, ….

    Returns:
        float64 (D, D) each, D being the values of one response.
    """
    return _second_moment(response[0::2].flatten(1)), _second_moment(response[1::2].flatten(1))


def _second_moment(vectors: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(vectors.shape[1], vectors.shape[1], dtype=torch.float64)
    for block in vectors.split(BLOCK):
        values = block.double()
        total.addmm_(values.T, values)
    return total.div_(len(vectors))


def _independent(white: torch.Tensor, seed: int) -> torch.Tensor:
    """The rotation (K, K), float64, that makes uncorrelated coordinates (N, K) of unit variance independent."""
    analysis = FastICA(whiten=False, random_state=seed % 2**32, max_iter=1000, tol=1e-4)
    with warnings.catch_warnings():
        # Where coordinates are Gaussian any rotation is as good, and the search does not settle.
        warnings.simplefilter("ignore", ConvergenceWarning)
        analysis.fit(white.numpy())
    # Orthogonal to rounding only, and scores are sums over its squares.
    left, _, right = torch.linalg.svd(torch.from_numpy(analysis.components_))
    return left @ right


def affordable_ridge(even: torch.Tensor, odd: torch.Tensor, mean_response: float, provenance: Provenance) -> float:
    """The ridge that leaves out what a token norm does not change.

    A movement of one token norm that changes the image by less than one latent value's own variation could steer
    nothing, so the ridge is the response of such a movement: 4 / (n² norm²) on the gradients' scale. Below the error
    of the response itself (`choose_ridge`) it would only fit noise, and is not lowered further.

    Args:
        even: float64 (D, D), of one half of the responses (`halved`).
        odd: the same of the other half.
        mean_response: mean square of all responses' values.
        provenance: says n and the norm.

    Returns:
        The ridge as a share of the mean response; `choose_ridge` alone where n or the norm is not known.
    """
    likely = choose_ridge(even, odd)
    values, norm = provenance.latent_values, provenance.token_norm
    if not values or not norm:
        return likely
    return max(likely, 4 / (values * norm) ** 2 / mean_response)


def choose_ridge(even: torch.Tensor, odd: torch.Tensor) -> float:
    """The ridge under which responses held out are most likely.

    The second moment of either half of the responses, float64 (D, D) as from `halved`, with the ridge added, is the
    covariance of a Gaussian under which the other half has a likelihood. Too small a ridge trusts directions in which
    a half answers little by chance, too large a one forgets that the model answers unevenly.

    Returns:
        The ridge as a share of the mean response.
    """
    return float(_RIDGES[(_unlikelihoods(even, odd) + _unlikelihoods(odd, even)).argmin()])


def _unlikelihoods(known: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Twice the negative log-likelihood of a half given the other, up to a constant, under each of the ridges."""
    values, vectors = descending(known)
    spread = (other @ vectors).mul_(vectors).sum(0)
    damped = values[:, None] + _RIDGES * values.mean().clamp_min(1e-300)
    return (damped.log() + spread[:, None] / damped).sum(0)
