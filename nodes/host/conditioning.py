"""Conditionings that remember their concept, and those that differ between the images of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...elrond_core.errors import ElrondError
from ...elrond_core.prompt import Concept

# Keys of an entry; the host and its nodes pass unknown keys through.
MARK = "elrond"  # its `MarkedPrompt`
PART = "elrond_part"  # its `parts.Part`, if steering divided it
IMAGES = "elrond_images"  # the numbers of the images that are sampled together, where the pack samples them
Conditioning = list[list[Any]]


@dataclass(frozen=True)
class MarkedPrompt:
    """What a conditioning entry remembers about its prompt.

    Attributes:
        family: the model family, as the text encoder names it.
        prompt: the encoded text.
        concepts: the marked concepts, in order; at least one.
        norms: for each concept the mean norm of its rows before any steering. Relative strengths are multiples of it,
            whatever the order of steps.
        words: the rows of all the prompt's words, those of the concepts included.
    """

    family: str
    prompt: str
    concepts: tuple[Concept, ...]
    norms: tuple[float, ...]
    words: tuple[int, ...] = ()

    def index_of(self, name: str, default: str = "") -> int:
        """The number of the concept with this name; without a name, of the default one, or else of the first.

        The second of two equal words is named "word #2".

        Raises:
            ElrondError: if the prompt has no concept of this name.
        """
        name = name.strip()
        names: list[str] = []
        for concept in self.concepts:
            word = concept.word.lower()
            names += [word, f"{word} #{names.count(word) + 1}"]
        if (name or default).lower() in names:
            return names.index((name or default).lower()) // 2
        if name:
            marked = ", ".join(repr(c.word) for c in self.concepts)
            raise ElrondError(f"The prompt has no marked concept {name!r}; it has {marked}.")
        return 0


def mark(
    conditioning: Conditioning, family: str, prompt: str, concepts: list[Concept], words: tuple[int, ...] = ()
) -> Conditioning:
    """A conditioning that remembers which rows are its concepts', and which are the prompt's words'."""
    rows = conditioning[0][0][0].float()
    norms = tuple(float(rows[list(c.rows)].norm(dim=-1).mean()) for c in concepts)
    prompt_mark = MarkedPrompt(family, prompt, tuple(concepts), norms, words)
    return [[tensor, {**options, MARK: prompt_mark}] for tensor, options in conditioning]


def marked(conditioning: Conditioning) -> tuple[torch.Tensor, MarkedPrompt]:
    """The first entry that remembers a concept: its tensor (1, T, d) and its marked prompt.

    Raises:
        ElrondError: if none does.
    """
    for tensor, options in conditioning:
        if MARK in options:
            return tensor, options[MARK]
    raise ElrondError(
        "This conditioning does not know its concept: put Mark Concept behind the node that encoded it, or encode it "
        "with Encode Concept; Concat and Average keep the mark of conditioning_to only."
    )


class PerImage(torch.Tensor):
    """A conditioning (N, T, d) whose item i belongs to image i, whichever images are sampled together.

    The type outlasts arithmetic, so that the host's nodes may average it, or append another prompt to it.
    `at_sampling` takes the items of the images that are sampled and hands the model an ordinary tensor.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let one tensor stand for all images where prompts are put one after another, as it does in sums."""
        kwargs = kwargs or {}
        if func is torch.cat and 1 in (*args[1:], kwargs.get("dim")):
            count = max(len(each) for each in args[0])
            args = ([each.expand(count, -1, -1) if len(each) == 1 else each for each in args[0]], *args[1:])
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except RuntimeError as error:
            operands = args[0] if func is torch.cat else args
            counts = {len(each) for each in operands if isinstance(each, torch.Tensor) and each.ndim == 3} - {1}
            if len(counts) < 2:
                raise
            few, many = min(counts), max(counts)
            raise ElrondError(
                f"One conditioning is for {few} images and the other for {many}: set Diversify to the same count for "
                "both."
            ) from error


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers as an ordinary tensor."""
    return tensor.as_subclass(torch.Tensor) if isinstance(tensor, PerImage) else tensor


def check_one_image(conditioning: Conditioning) -> None:
    """Refuse a conditioning whose entries differ between images, where one prompt is looked at.

    Raises:
        ElrondError: if one does.
    """
    for tensor, options in conditioning:
        count = len(tensor) if isinstance(tensor, PerImage) else options[PART].masks if PART in options else 1
        if count > 1:
            raise ElrondError(
                f"This conditioning is another one for each of {count} images: connect the one from before Diversify, "
                "or from before a batch of masks."
            )
