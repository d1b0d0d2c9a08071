"""Names for directions: the opposites, or the words, that change the concept's rows in the same direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.stats import beta

from ..decompose.contrasts import Contrast, level_of_one
from ..decompose.moments import require_finite
from ..decompose.response import check_probes
from ..decompose.words import word_steps
from ..directions import Directions
from ..errors import ElrondError
from ..gradients import Gradients
from ..prompt import Span


@dataclass(frozen=True)
class Label:
    """The words closest to one direction.

    Attributes:
        along: (word, cosine) of the words closest to the direction, best first. All cosines are positive.
        against: the same for the opposite of the direction.
    """

    along: tuple[tuple[str, float], ...]
    against: tuple[tuple[str, float], ...]

    @property
    def best(self) -> tuple[str, float]:
        """The closest word of both ends and its signed cosine; ("", 0) if there are no words."""
        ends = [(word, sign * score) for sign, side in ((1, self.along), (-1, self.against)) for word, score in side]
        return max(ends, key=lambda end: abs(end[1]), default=("", 0.0))

    @property
    def name(self) -> str:
        """The closest words as "word → word", from negative to positive strengths."""
        ends = [side[0][0] for side in (self.against, self.along) if side]
        if len(ends) == 2:
            return f"{ends[0]} → {ends[1]}"
        return ("→ " if self.along else "← ") + ends[0] if ends else ""

    def clear(self, least: float) -> tuple[str, float]:
        """The name by words of at least this cosine, and the largest cosine."""
        sides = (tuple(end for end in side if end[1] >= least) for side in (self.along, self.against))
        return Label(*sides).name, abs(self.best[1])

    def line(self) -> str:
        """All words with their cosines."""
        sides = [", ".join(f"{word} {score:.2f}" for word, score in side) or "-" for side in (self.along, self.against)]
        return f"+ {sides[0]}   − {sides[1]}"


def put_before(prompt: str, span: Span, word: str) -> tuple[str, Span]:
    """Insert a word before a place in the prompt; returns the new prompt, and the place in it."""
    prefix = f"{word} "
    text = prompt[: span.start] + prefix + prompt[span.start :]
    return text, Span(span.start + len(prefix), span.stop + len(prefix))


def label(
    directions: Directions, words: Sequence[str], bare_rows: torch.Tensor, word_rows: torch.Tensor, top: int = 3
) -> list[Label]:
    """Compare directions with the steps of the rows that words cause (`elrond_core.decompose.words.word_steps`).

    Args:
        directions: K directions over (R, d).
        words: W words.
        bare_rows: (R, d) the concept's rows in the prompt without any of the words.
        word_rows: (W, R, d) its rows with each word before it.
        top: number of words for each end, at most.

    Returns:
        One label a direction.

    Raises:
        ElrondError: if the shapes do not fit, or no word changes the rows.
    """
    steps = word_steps(directions.vectors.shape[1], directions.width, bare_rows, word_rows)
    norms = steps.norm(dim=1, keepdim=True)
    cosines = directions.vectors.double().flatten(1) @ (steps / norms.clamp_min(1e-9)).T
    labels = []
    for row in cosines:
        sides = []
        for signed in (row, -row):
            best = signed.argsort(descending=True)[:top].tolist()
            sides.append(tuple((words[i], float(signed[i])) for i in best if signed[i] > 0))
        labels.append(Label(*sides))
    return labels


@dataclass(frozen=True)
class ContrastLabel:
    """The contrasts closest to one direction.

    Attributes:
        closest: (contrast, cosine), best first. A cosine is negative if the direction leads from the positive side to
            the negative one.
        chance: a cosine of less than this in size may be chance.
    """

    closest: tuple[tuple[Contrast, float], ...]
    chance: float

    @property
    def best(self) -> tuple[str, float]:
        """Name and cosine of the best contrast, if the direction follows it better than chance; else ("", 0)."""
        return self.clear(0.0)

    def clear(self, least: float) -> tuple[str, float]:
        """`best`, if its cosine has at least this size; else ("", 0)."""
        for contrast, cosine in self.closest:
            if abs(cosine) >= max(self.chance, least):
                return _name(contrast, cosine), abs(cosine)
        return "", 0.0

    def line(self) -> str:
        """The closest contrasts with their cosines, and what chance reaches."""
        found = ", ".join(f"{_name(contrast, cosine)} {abs(cosine):.2f}" for contrast, cosine in self.closest)
        return f"{found} (chance: {self.chance:.2f})"


def _name(contrast: Contrast, cosine: float) -> str:
    return contrast.name if cosine > 0 else contrast.reversed_name


def label_by_contrasts(
    directions: Directions,
    contrasts: Sequence[Contrast],
    steps: torch.Tensor,
    samples: torch.Tensor | None = None,
    top: int = 3,
) -> list[ContrastLabel]:
    """The contrasts that each direction follows best.

    Two steps of the rows agree as far as they change the image alike: by their cosine under the metric E[s sᵀ] of
    samples s. Jacobian probes give the pullback metric, and centred gradients their covariance, which weights a change
    by how much the images vary along it. Without samples the cosine is that of the embedding.

    A direction of no meaning makes a random change. If that is uniform on the sphere of all changes, of D dimensions,
    the square of its cosine with a contrast has the distribution Beta(1/2, (D - 1)/2). A direction follows a contrast
    better than chance if their cosine is above what that exceeds at a level of `LEVEL` for all contrasts together
    (`elrond_core.decompose.contrasts`). D is the number of values of the rows, or that of the samples if it is smaller.

    Args:
        directions: K directions over (R, d).
        contrasts: W contrasts.
        steps: float64 (W, R · d), how the rows move along each (`elrond_core.decompose.contrasts.displacements`).
        samples: float32 (S, R · d), for the metric (`metric_samples`); None for the embedding's.
        top: number of contrasts of a label, at most.

    Returns:
        One label a direction.
    """
    vectors = directions.vectors.flatten(1)
    size = vectors.shape[1] if samples is None else min(samples.shape)
    chance = float(beta.isf(level_of_one(len(contrasts)), 0.5, max(size - 1, 1) / 2)) ** 0.5
    labels = []
    for row in _cosines(_through(vectors, samples), _through(steps.float(), samples)):
        order = row.abs().argsort(descending=True)[:top].tolist()
        labels.append(ContrastLabel(tuple((contrasts[k], float(row[k])) for k in order), chance))
    return labels


def metric_samples(directions: Directions, gradients: Gradients) -> torch.Tensor:
    """Samples of the metric under which steps of directions are compared.

    Args:
        directions: K directions over (R, d).
        gradients: gradients of the same concept.

    Returns:
        float32 (S, R · d): Jacobian probes; or the centred gradients where they came without.

    Raises:
        ElrondError: if the gradients are of another concept, or fewer than two.
    """
    one, other = directions.provenance, gradients.provenance
    if directions.vectors.shape[1] == 1 < gradients.vectors.shape[1]:
        gradients = gradients.summed_over_rows()
    if (one.family, one.prompt, one.concept, directions.vectors.shape[1:]) != (
        other.family,
        other.prompt,
        other.concept,
        gradients.vectors.shape[1:],
    ):
        raise ElrondError(
            f"The directions are of {one.concept!r} in {one.prompt!r} ({one.family}), and the gradients of "
            f"{other.concept!r} in {other.prompt!r} ({other.family}): connect the gradients that the directions are "
            "of, or none."
        )
    if len(gradients.probes) > 1:
        check_probes(gradients)
        return gradients.probes.flatten(1)
    require_finite(gradients.flat)
    if len(gradients) < 2:
        raise ElrondError(f"A covariance needs at least 2 gradients, got {len(gradients)}.")
    return gradients.flat - gradients.flat.mean(0)


def _through(steps: torch.Tensor, samples: torch.Tensor | None) -> torch.Tensor:
    """Vectors whose inner products are those of the steps (N, D) under the metric."""
    return steps if samples is None else steps @ samples.T


def _cosines(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Cosines of two sets of vectors, (N, …) and (W, …): (N, W); 0 where one has no length."""
    return torch.nn.functional.normalize(first, dim=1) @ torch.nn.functional.normalize(second, dim=1).T


def labelled(
    directions: Directions, labels: Sequence[Label | ContrastLabel], min_score: float, replace_old: bool
) -> Directions:
    """Directions named by their labels.

    Args:
        directions: K directions.
        labels: one label each.
        min_score: words of a lower cosine are no part of a name.
        replace_old: also rename directions that have a name.
    """
    names = []
    for old, entry in zip(directions.names, labels, strict=True):
        names.append(old if old and not replace_old else entry.clear(min_score)[0] or old)
    return replace(directions, names=tuple(names))


def label_lines(directions: Directions, labels: Sequence[Label | ContrastLabel]) -> list[str]:
    """A line a direction: its name, and the closest words with their cosines."""
    return [
        f"{i}: {name or '(no name)'}   {entry.line()}"
        for i, (name, entry) in enumerate(zip(directions.names, labels, strict=True))
    ]
