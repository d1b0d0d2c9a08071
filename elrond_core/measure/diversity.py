"""Diversity of a batch of images (mean pairwise distance, Vendi score), and its alignment with a text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ElrondError

# Pixels a side to which images are reduced before their pixels are compared: details and noise do not count.
_GRID = 32
# Width of the Gaussian similarity of images, as a root mean square difference of pixels in [0, 1]. At this difference
# two images have the similarity 0.6.
_PIXEL_SCALE = 0.15
# What distances are of, for reports.
OF_FEATURES = "the cosine of an image encoder's features"
OF_PIXELS = f"their pixels at {_GRID} x {_GRID}"


@dataclass(frozen=True)
class Diversity:
    """The diversity of a batch of images.

    Attributes:
        count: number of images N.
        distance: mean distance over all pairs.
        vendi: Vendi score, from 1 (all images equal) to N (no two similar): the effective number of different images.
        nearest: indices of the two most similar images.
        nearest_distance: the distance between them.
        measure: what distances are of, for reports.
    """

    count: int
    distance: float
    vendi: float
    nearest: tuple[int, int]
    nearest_distance: float
    measure: str

    def lines(self) -> list[str]:
        """A report."""
        first, second = self.nearest
        return [
            f"{self.count} images, compared by {self.measure}",
            f"mean pairwise distance {self.distance:.4f}",
            f"Vendi score {self.vendi:.2f} of {self.count}",
            f"most alike: images {first} and {second}, distance {self.nearest_distance:.4f}",
        ]


@dataclass(frozen=True)
class Alignment:
    """Alignment of images with a text: the CLIP score (Hessel et al., arXiv 2104.08718) without its factor of 2.5.

    Attributes:
        cosines: float64 (N,), one an image; higher is better. Usual values depend on the encoders.
    """

    cosines: torch.Tensor

    @property
    def mean(self) -> float:
        """Mean cosine over all images."""
        return float(self.cosines.mean())

    def lines(self) -> list[str]:
        """A report."""
        least = int(self.cosines.argmin())
        return [
            f"alignment with the text {self.mean:.4f}",
            f"least aligned: image {least}, {float(self.cosines[least]):.4f}",
        ]


def alignment(features: torch.Tensor, text: torch.Tensor) -> Alignment:
    """Cosines between features of images and of a text, by two encoders that were trained together.

    Args:
        features: (N, F) of the images, any float dtype.
        text: (F,) of the text.

    Raises:
        ElrondError: if the two have different widths, or one is zero or not finite.
    """
    if features.shape[1:] != text.shape:
        raise ElrondError(
            f"The image encoder makes {features.shape[1]} numbers and the text encoder {len(text)}: use the two halves "
            "of one CLIP."
        )
    if not (torch.isfinite(text).all() and text.abs().max() > 0):
        raise ElrondError("The text has no features to compare: they are all zero, or not finite.")
    return Alignment(_unit(features) @ torch.nn.functional.normalize(text.double(), dim=0))


def of_features(features: torch.Tensor) -> Diversity:
    """Diversity by the features of an image encoder; a distance is 1 - cosine.

    Args:
        features: (N, F), any float dtype.

    Raises:
        ElrondError: if there are fewer than two, or one is zero or not finite.
    """
    _check_count(features)
    unit = _unit(features)
    similarity = unit @ unit.T
    return _measure(1 - similarity, similarity, OF_FEATURES)


def of_pixels(images: torch.Tensor) -> Diversity:
    """Diversity by pixels, for which no model is needed: images are reduced, and their similarity is Gaussian.

    Args:
        images: float RGB (N, H, W, 3) in [0, 1].

    Raises:
        ElrondError: if there are fewer than two images, or one is not finite.
    """
    _check_count(images)
    _check_finite(images)
    reduced = _reduced(images)
    distances = torch.cdist(reduced, reduced, compute_mode="donot_use_mm_for_euclid_dist") / reduced.shape[1] ** 0.5
    similarity = torch.exp(-0.5 * (distances / _PIXEL_SCALE) ** 2)
    return _measure(distances, similarity, OF_PIXELS)


def points_of_features(features: torch.Tensor) -> torch.Tensor:
    """Features (N, F) as points whose Euclidean distance is that of `of_features`, but for a root: √(2 · (1 - cosine)).

    Unlike 1 - cosine, it grows in proportion to a small change. Features that are zero or not finite give NaN.

    Returns:
        float32 (N, F).
    """
    return (features.double() / features.double().norm(dim=1, keepdim=True)).float()


def points_of_pixels(images: torch.Tensor) -> torch.Tensor:
    """Images (N, H, W, 3) in [0, 1] as points whose Euclidean distance is that of `of_pixels`.

    Returns:
        float32 (N, F).
    """
    reduced = _reduced(images)
    return (reduced / reduced.shape[1] ** 0.5).float()


def vendi_score(similarity: torch.Tensor) -> float:
    """Exponential of the entropy of the eigenvalues of a similarity matrix / N (Friedman and Dieng, arXiv 2210.02410).

    Args:
        similarity: (N, N), symmetric, positive semidefinite, with ones on its diagonal.
    """
    values = torch.linalg.eigvalsh(similarity.double() / len(similarity)).clamp_min(0)
    return float(torch.exp(torch.special.entr(values / values.sum()).sum()))


def _reduced(images: torch.Tensor) -> torch.Tensor:
    """Pixels of images (N, H, W, 3) at `_GRID` × `_GRID`: float64 (N, F)."""
    return torch.nn.functional.adaptive_avg_pool2d(images[..., :3].movedim(-1, 1).double(), _GRID).flatten(1)


def _check_count(items: torch.Tensor) -> None:
    if len(items) < 2:
        raise ElrondError(f"Diversity needs at least two images, got {len(items)}.")


def _unit(features: torch.Tensor) -> torch.Tensor:
    _check_finite(features)
    norms = features.double().norm(dim=1, keepdim=True)
    if not (norms > 0).all():
        raise ElrondError(f"Image {int((norms[:, 0] == 0).long().argmax())} has no features to compare.")
    return features.double() / norms


def _check_finite(items: torch.Tensor) -> None:
    finite = torch.isfinite(items.flatten(1)).all(1)
    if not finite.all():
        raise ElrondError(f"Image {int(finite.long().argmin())} holds numbers that are not finite.")


def _measure(distances: torch.Tensor, similarity: torch.Tensor, measure: str) -> Diversity:
    count = len(distances)
    first, second = torch.triu_indices(count, count, 1)
    pairs = distances[first, second].clamp_min(0)
    nearest = int(pairs.argmin())
    return Diversity(
        count=count,
        distance=float(pairs.mean()),
        vendi=vendi_score(similarity),
        nearest=(int(first[nearest]), int(second[nearest])),
        nearest_distance=float(pairs[nearest]),
        measure=measure,
    )
