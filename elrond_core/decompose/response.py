"""Response directions: principal components relative to the pullback metric.

Gradients are g = (2/n) Jᵀ(x̂0 - x_B), n the number of latent values and J the Jacobian of the estimate with respect to
the concept's rows. Jacobian probes are (2/n) Jᵀw with white noise w. So, over pairs and noise,

    C = cov(g) = (4/n²) Jᵀ Σ J    and    M = E[probe probeᵀ] = (4/n²) JᵀJ,

where Σ is the covariance of the differences between images. JᵀJ is the pullback metric: it measures the length of a
step of the rows by the change of the image. If C v = λ M v, then λ = (Jv)ᵀ Σ (Jv) / |Jv|²: the variance of the images
along the change that the step v causes. PCA of C instead weights each change by the square of the model's response to
it, so that a factor with a strong response contributes to all components.
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

# Ridges that `choose_ridge` compares, as shares of the mean of diag M: eight a decade.
_RIDGES = torch.logspace(-6, 1, 57, dtype=torch.float64)
_ZERO = "All gradients or all responses are the same, so there is nothing to decompose."


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

    A step v of the rows changes the image by Jv. The Jv of the eigenvectors are the principal components of the images,
    within the changes that the model can make. (M v is a gradient and no step. As a step it would change the image by
    J Jᵀ(Jv), a mixture of components unless the response is even.) The ridge suppresses steps that hardly change the
    image and would need strengths beyond the linear regime. As it grows, the directions become those of PCA.

    Principal components mix factors of about equal variance, such as x and y. Independent component analysis of the
    gradients' coordinates (FastICA, Hyvärinen, 1999) finds the rotation that separates independent factors.

    Args:
        gradients: gradients with Jacobian probes of the same points.
        significance: keep components of λ above this many units of latent variance. Models' latents are scaled to a
            variance of about 1 a value, so that λ = 1 is the variance of a single latent value.
        limit: keep at most this many.
        ridge: as a share of the mean of diag M; chosen by `affordable_ridge` if None.
        rotate: rotate the components to be independent.
        seed: fixes the rotation.

    Returns:
        Directions (K, R, d) of unit norm, best first, K ≥ 1. Their scores are λ, or after a rotation the latent
        variance that each explains. And the spectrum of all λ, with the ridge.

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
    steps, scores = parts.eigenvectors[:, : spectrum.n_components], parts.eigenvalues[: spectrum.n_components]
    rotated = rotate and spectrum.n_components > 1
    if rotated:
        deviations = scores.sqrt()
        coordinates = torch.empty(len(gradients), spectrum.n_components, dtype=torch.float64)
        coordinates = filled(coordinates, (block.double() @ steps for block in gradients.flat.split(BLOCK)))
        rotation = _ica_rotation((coordinates - coordinates.mean(0)) / deviations, seed)
        steps, scores = steps * deviations @ rotation.T, rotation.square() @ scores
        order = scores.argsort(descending=True)
        steps, scores = steps[:, order], scores[order]
    lengths = steps.norm(dim=0)
    # The step for a change Δ of the image is (2/n)(M + ridge)⁻¹ (2/n)JᵀΔ. Its coordinates along the eigenvectors have
    # standard deviations √λ, in units of 2/n of the images'.
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
        ridge: as a share of the mean of diag M.
        cholesky: float64, (R·d, R·d): lower triangle L with L Lᵀ = M + ridge.
    """

    eigenvalues: torch.Tensor
    eigenvectors: torch.Tensor
    ridge: float
    cholesky: torch.Tensor


def components(gradients: Gradients, ridge: float | None = None) -> Components:
    """All components of `fit_response`, which see for the arguments and errors."""
    if ridge is not None and not ridge > 0:
        raise ElrondError(f"The ridge must be above zero, got {ridge}.")
    cholesky, ridge = _cholesky(gradients, ridge)
    # `scipy.linalg.eigh(a, b)` would take two more matrices of this size, and `words.py` needs the Cholesky factor.
    # Each matrix is released as soon as it has been used.
    whitened = torch.linalg.solve_triangular(cholesky, Moments.of(gradients).covariance(), upper=False)
    if not whitened.any():
        raise ElrondError(_ZERO)
    whitened = torch.linalg.solve_triangular(cholesky, whitened.T, upper=False)
    eigenvalues, vectors = descending(whitened)
    count = min(len(gradients), len(whitened))
    eigenvectors = torch.linalg.solve_triangular(cholesky.T, vectors[:, :count], upper=True)
    return Components(eigenvalues[:count], eigenvectors, ridge, cholesky)


def _cholesky(gradients: Gradients, ridge: float | None) -> tuple[torch.Tensor, float]:
    """The Cholesky factor of M + ridge (see `Components`), and the ridge."""
    check_probes(gradients)
    even, odd = halved_metric(gradients.probes)
    share_of_odd = (len(gradients.probes) // 2) / len(gradients.probes)
    mean_diagonal = float(even.diagonal().lerp(odd.diagonal(), share_of_odd).mean())
    if mean_diagonal == 0:
        raise ElrondError(_ZERO)
    ridge = affordable_ridge(even, odd, mean_diagonal, gradients.provenance) if ridge is None else ridge
    metric = even.lerp_(odd, share_of_odd)
    metric.diagonal().add_(ridge * mean_diagonal)
    return torch.linalg.cholesky(metric), ridge


def check_probes(gradients: Gradients) -> None:
    """Refuse Jacobian probes that give no metric.

    Raises:
        ElrondError: if there are fewer than two, or one is not finite.
    """
    if not len(gradients.probes):
        raise ElrondError("These gradients came without the model's response; collect them again with it.")
    if len(gradients.probes) < 2:
        raise ElrondError("A response needs at least 2 samples, got 1.")
    bad = first_not_finite(gradients.probes)
    if bad is not None:
        raise ElrondError(f"The response is not finite (NaN or infinity) in row {bad}; collect the gradients again.")


def halved_metric(probes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pullback metric, estimated from each half of the probes (M, …), M ≥ 2.

    Returns:
        float64 (D, D) of the even-numbered probes and of the odd-numbered ones; D is the number of values of a probe.
    """
    return _second_moment(probes[0::2].flatten(1)), _second_moment(probes[1::2].flatten(1))


def _second_moment(vectors: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(vectors.shape[1], vectors.shape[1], dtype=torch.float64)
    for block in vectors.split(BLOCK):
        values = block.double()
        total.addmm_(values.T, values)
    return total.div_(len(vectors))


def _ica_rotation(white: torch.Tensor, seed: int) -> torch.Tensor:
    """The rotation (K, K), float64, that makes whitened coordinates (N, K) most independent."""
    analysis = FastICA(whiten=False, random_state=seed % 2**32, max_iter=1000, tol=1e-4)
    with warnings.catch_warnings():
        # FastICA does not converge on Gaussian coordinates, for which all rotations are equally good.
        warnings.simplefilter("ignore", ConvergenceWarning)
        analysis.fit(white.numpy())
    # FastICA's result is orthogonal up to rounding only. Scores need rows and columns of unit norm.
    left, _, right = torch.linalg.svd(torch.from_numpy(analysis.components_))
    return left @ right


def affordable_ridge(even: torch.Tensor, odd: torch.Tensor, mean_diagonal: float, provenance: Provenance) -> float:
    """The ridge that suppresses directions too weak for a step of one token norm.

    A step of one token norm has no use if it changes the image by less than the standard deviation of one latent value.
    The ridge is the squared response of such a step, 4 / (n² norm²) on the gradients' scale, or that of `choose_ridge`
    if it is larger.

    Args:
        even: float64 (D, D), the metric by one half of the probes (`halved_metric`).
        odd: the same by the other half.
        mean_diagonal: mean of diag M.
        provenance: says n and the token norm.

    Returns:
        The ridge as a share of `mean_diagonal`; that of `choose_ridge` if n or the norm is not known.
    """
    likely = choose_ridge(even, odd)
    values, norm = provenance.latent_values, provenance.token_norm
    if not values or not norm:
        return likely
    return max(likely, 4 / (values * norm) ** 2 / mean_diagonal)


def choose_ridge(even: torch.Tensor, odd: torch.Tensor) -> float:
    """The ridge of highest cross-validated likelihood.

    The metric by one half of the probes, plus the ridge, is the covariance of a Gaussian, and the other half has a
    likelihood under it. With too small a ridge, responses that are small by chance count as small. With too large a
    one, the metric loses its structure.

    Args:
        even: float64 (D, D), as from `halved_metric`.
        odd: the same.

    Returns:
        The ridge as a share of the mean of diag M.
    """
    return float(_RIDGES[(_negative_log_likelihoods(even, odd) + _negative_log_likelihoods(odd, even)).argmin()])


def _negative_log_likelihoods(known: torch.Tensor, held_out: torch.Tensor) -> torch.Tensor:
    """Twice the negative log-likelihood of one half given the other, up to a constant, for each of `_RIDGES`."""
    values, vectors = descending(known)
    variances = (held_out @ vectors).mul_(vectors).sum(0)
    damped = values[:, None] + _RIDGES * values.mean().clamp_min(1e-300)
    return (damped.log() + variances[:, None] / damped).sum(0)
