"""Directions by natural variation per change of the image: PCA relative to the pullback metric.

Gradients are g = (2/n) Jᵀ(x̂0 - x_B), n the number of latent values and J the Jacobian of the estimate with respect to
the concept's rows. Jacobian probes are (2/n) Jᵀw with white noise w. So, over pairs and noise,

    C = cov(g) = (4/n²) Jᵀ Σ J    and    M = E[probe probeᵀ] = (4/n²) JᵀJ,

Σ being the covariance of the differences between images, and JᵀJ the pullback metric: the length of a step of the rows,
measured by the change of the image. For C v = λ M v then λ = (Jv)ᵀ Σ (Jv) / |Jv|²: the variance of the images along the
change that the step v causes. PCA of C instead weights each change by the square of the model's response to it, so that
one loud factor leaks into all components.
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

# Ridges that are tried, as shares of the mean response: eight a decade.
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
    """Solve C v = λ (M + ridge · mean(diag M) · I) v; the eigenvectors v are the steering directions.

    A step v of the rows changes the image by Jv, and the Jv of different v are the principal components of the images,
    within what the model can change. The dual M v is a gradient, not a step: as a step it would change the image by
    J Jᵀ(Jv), which mixes components wherever the response is uneven. Without a ridge, steps that hardly change the
    image would need strengths beyond the linear regime. As the ridge grows, the directions become those of PCA.

    Principal components mix factors of about equal variance, such as x and y. Factors are independent: a rotation by
    independent component analysis (FastICA, Hyvärinen, 1999) of the gradients' coordinates separates them.

    Args:
        gradients: gradients with Jacobian probes of the same points.
        significance: keep components of λ above this many units of latent variance. Models' latents are scaled to a
            variance of about 1 a value, so that λ = 1 is the variance of a single latent value.
        limit: keep at most this many.
        ridge: as a share of the mean response; chosen by `affordable_ridge` if None.
        rotate: rotate the components that are kept to be independent.
        seed: fixes the rotation.

    Returns:
        Directions (K, R, d) of unit norm, best first, K ≥ 1, with scores: λ, or after a rotation the latent variance
        that each explains; and the spectrum of all λ, with the ridge.

    Raises:
        ElrondError: if there are no Jacobian probes, fewer than two gradients or probes, one is not finite, all
            gradients or probes are zero, or an option is out of range.
    """
    check_options(significance, limit)
    parts = components(gradients, ridge)
    spectrum = replace(
        cut(parts.eigenvalues, significance, limit, len(gradients), len(parts.eigenvectors)),
        name="latent variance per unit of change",
        ridge=parts.ridge,
    )
    steps, scores = parts.eigenvectors[:, : spectrum.kept], parts.eigenvalues[: spectrum.kept]
    rotated = rotate and spectrum.kept > 1
    if rotated:
        deviations = scores.sqrt()
        coordinates = torch.empty(len(gradients), spectrum.kept, dtype=torch.float64)
        coordinates = filled(coordinates, (block.double() @ steps for block in gradients.flat.split(BLOCK)))
        rotation = _independent((coordinates - coordinates.mean(0)) / deviations, seed)
        steps, scores = steps * deviations @ rotation.T, rotation.square() @ scores
        order = scores.argsort(descending=True)
        steps, scores = steps[:, order], scores[order]
    lengths = steps.norm(dim=0)
    # A step δ changes the image by Jδ. The step for a change Δ is (2/n)(M + ridge)⁻¹ (2/n)JᵀΔ; its coordinates along
    # the components have the standard deviations √λ, in units of the images' 2/n.
    latent_values = gradients.provenance.latent_values
    natural_std = lengths * (1 if rotated else scores.sqrt()) * 2 / latent_values if latent_values else torch.empty(0)
    vectors = (steps / lengths).T.reshape(-1, *gradients.vectors.shape[1:]).float()
    method = {
        "name": "response",
        "significance": f"{significance:g}",
        "ridge": f"{parts.ridge:.3g}",
        "limit": str(limit),
    }
    directions = Directions(
        vectors=fix_signs(vectors),
        scores=scores.float(),
        method={**method, "rotated": str(rotate).lower()},
        provenance=gradients.provenance,
        score_name=spectrum.name,
        natural_std=tuple(natural_std.tolist()),
    )
    return directions, spectrum


@dataclass(frozen=True)
class Components:
    """Solution of C v = λ (M + ridge) v.

    Attributes:
        eigenvalues: float64, (P,): λ, descending, P = min(N, R·d).
        eigenvectors: float64, (R·d, P): v as columns, scaled so that vᵀ(M + ridge)v = 1.
        ridge: as a share of the mean response.
        cholesky: float64, (R·d, R·d): lower triangle L with L Lᵀ = M + ridge.
    """

    eigenvalues: torch.Tensor
    eigenvectors: torch.Tensor
    ridge: float
    cholesky: torch.Tensor


def components(gradients: Gradients, ridge: float | None = None) -> Components:
    """All components of `fit_response`, which says what is refused."""
    if ridge is not None and not ridge > 0:
        raise ElrondError(f"The ridge must be above zero, got {ridge}.")
    cholesky, ridge = _cholesky(gradients, ridge)
    # `scipy.linalg.eigh(a, b)` solves the same problem with two more matrices of this size, and `words.py` needs the
    # Cholesky factor. Each matrix is released as soon as it has been used.
    whitened = torch.linalg.solve_triangular(cholesky, Moments.of(gradients).covariance(), upper=False)
    if not whitened.any():
        raise ElrondError(_SAME)
    whitened = torch.linalg.solve_triangular(cholesky, whitened.T, upper=False)
    eigenvalues, vectors = descending(whitened)
    count = min(len(gradients), len(whitened))
    eigenvectors = torch.linalg.solve_triangular(cholesky.T, vectors[:, :count], upper=True)
    return Components(eigenvalues[:count], eigenvectors, ridge, cholesky)


def _cholesky(gradients: Gradients, ridge: float | None) -> tuple[torch.Tensor, float]:
    """`Components.cholesky`, and the ridge."""
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
    """Refuse Jacobian probes that give no metric.

    Raises:
        ElrondError: if they were not collected, are fewer than two, or are not finite.
    """
    if not len(gradients.response):
        raise ElrondError("These gradients came without the model's response; collect them again with it.")
    if len(gradients.response) < 2:
        raise ElrondError("A response needs at least 2 samples, got 1.")
    bad = first_not_finite(gradients.response)
    if bad is not None:
        raise ElrondError(f"The response is not finite (NaN or infinity) in row {bad}; collect the gradients again.")


def halved(response: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments of both halves of the probes (M, …), M ≥ 2: of the first, third, … and the second, fourth, ….

    Returns:
        float64 (D, D) each, D being the values of one probe.
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
    """The ridge that removes directions which a step of one token norm cannot use.

    A step of one token norm that changes the image by less than the standard deviation of one latent value steers
    nothing. The ridge is the squared response of such a step: 4 / (n² norm²) on the gradients' scale. It is not lower
    than `choose_ridge`, below which noise would be fitted.

    Args:
        even: float64 (D, D), second moment of one half of the probes (`halved`).
        odd: the same of the other half.
        mean_response: mean square of all probes' values.
        provenance: gives n and the norm.

    Returns:
        The ridge as a share of the mean response; `choose_ridge` alone where n or the norm is not known.
    """
    likely = choose_ridge(even, odd)
    values, norm = provenance.latent_values, provenance.token_norm
    if not values or not norm:
        return likely
    return max(likely, 4 / (values * norm) ** 2 / mean_response)


def choose_ridge(even: torch.Tensor, odd: torch.Tensor) -> float:
    """The ridge of highest cross-validated likelihood.

    The second moment of one half of the probes, with the ridge added, is the covariance of a Gaussian, under which the
    other half has a likelihood. A small ridge trusts directions that one half hardly responds to by chance; a large one
    ignores that the response is uneven.

    Args:
        even: float64 (D, D), as from `halved`.
        odd: the same.

    Returns:
        The ridge as a share of the mean response.
    """
    return float(_RIDGES[(_negative_log_likelihoods(even, odd) + _negative_log_likelihoods(odd, even)).argmin()])


def _negative_log_likelihoods(known: torch.Tensor, held_out: torch.Tensor) -> torch.Tensor:
    """Twice the negative log-likelihood of one half given the other, up to a constant, for each of the ridges."""
    values, vectors = descending(known)
    variances = (held_out @ vectors).mul_(vectors).sum(0)
    damped = values[:, None] + _RIDGES * values.mean().clamp_min(1e-300)
    return (damped.log() + variances[:, None] / damped).sum(0)
