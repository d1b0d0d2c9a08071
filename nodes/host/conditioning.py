"""Conditionings that carry their concepts, and conditionings that differ between the images of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from node_helpers import conditioning_set_values

from ...elrond_core.errors import ElrondError
from ...elrond_core.prompt import Concept

# Keys of an entry's options. The host and its nodes pass unknown keys through.
MARK = "elrond"  # a `MarkedPrompt`
PART = "elrond_part"  # a `parts.Part`, if steering has divided the entry
AFTER = "elrond_after"  # share of the sampling at which the part before this one ends, and it starts
IMAGES = "elrond_images"  # numbers of the images of a batch that the pack samples
Conditioning = list[list[Any]]
# Gap between two entries, as a share of the sampling: a hundredth of one of a thousand timesteps. Two entries that meet
# at a step would both act there, and be averaged. A step may lie within the gap, so `at_sampling` closes it.
GAP = 1e-5


@dataclass(frozen=True)
class MarkedPrompt:
    """The prompt of a conditioning entry, and its concepts.

    Attributes:
        family: the model family, as the text encoder names it.
        prompt: the encoded text.
        concepts: the marked concepts, in order; at least one.
        norms: for each concept the mean norm of its rows before any steering. Relative strengths are multiples of it,
            so that the order of several steps does not matter.
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
    """A conditioning whose entries carry a `MarkedPrompt`.

    Args:
        conditioning: an encoded prompt.
        family: the model family.
        prompt: its text.
        concepts: its concepts, with their rows.
        words: the rows of all its words.
    """
    rows = conditioning[0][0][0].float()
    norms = tuple(float(rows[list(c.rows)].norm(dim=-1).mean()) for c in concepts)
    marked_conditioning: Conditioning = conditioning_set_values(
        conditioning, {MARK: MarkedPrompt(family, prompt, tuple(concepts), norms, words)}
    )
    return marked_conditioning


def marked(conditioning: Conditioning) -> tuple[torch.Tensor, MarkedPrompt]:
    """The first marked entry: its tensor (1, T, d) and its `MarkedPrompt`.

    Raises:
        ElrondError: if no entry is marked.
    """
    for tensor, options in conditioning:
        if MARK in options:
            return tensor, options[MARK]
    raise ElrondError(
        "This conditioning does not know its concept: put Mark Concept behind the node that encoded it, or encode it "
        "with Encode Concept; Concat and Average keep the mark of conditioning_to only."
    )


class PerImage(torch.Tensor):
    """A conditioning (N, T, d) whose item i is for image i, whichever images are sampled together.

    Results of arithmetic have this type too, so that the host's nodes can average it, or append another prompt to it.
    `at_sampling` takes the items of the sampled images and hands the model an ordinary tensor.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Broadcast a tensor of one item in concatenations along the tokens, as torch does in sums."""
        kwargs = kwargs or {}
        if func is torch.cat and 1 in (*args[1:], kwargs.get("dim")):
            count = max(len(part) for part in args[0])
            args = ([part.expand(count, -1, -1) if len(part) == 1 else part for part in args[0]], *args[1:])
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except RuntimeError as error:
            operands = args[0] if func is torch.cat else args
            counts = {len(part) for part in operands if isinstance(part, torch.Tensor) and part.ndim == 3} - {1}
            if len(counts) < 2:
                raise
            few, many = min(counts), max(counts)
            raise ElrondError(
                f"One conditioning is for {few} images and the other for {many}: set Diversify to the same count for "
                "both."
            ) from error


def end_before(options: dict[str, Any]) -> float | None:
    """The share of the sampling at which the part before an entry's ends, if the entry starts right after it.

    None if it starts otherwise: a later node may have set another start.
    """
    share: float | None = options.get(AFTER)
    return share if share is not None and options.get("start_percent") == share + GAP else None


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as an ordinary tensor."""
    return tensor.as_subclass(torch.Tensor) if isinstance(tensor, PerImage) else tensor


def check_one_image(conditioning: Conditioning) -> None:
    """Refuse a conditioning that differs between images.

    Raises:
        ElrondError: if an entry does.
    """
    for tensor, options in conditioning:
        count = len(tensor) if isinstance(tensor, PerImage) else options[PART].masks if PART in options else 1
        if count > 1:
            raise ElrondError(
                f"This conditioning is another one for each of {count} images: connect the one from before Diversify, "
                "or from before a batch of masks."
            )
