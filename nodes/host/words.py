"""The concept of a prompt with other words before it, as a text encoder sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...elrond_core.errors import ElrondError
from ...elrond_core.prompt import Span, find_word, occurrences
from ...elrond_core.provenance import Provenance
from ...elrond_core.steering.labels import put_before
from .sampling import progress
from .text import EncodedPrompt, family_of


def rows_with_words(clip: Any, origin: Provenance, words: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a concept without and with words before it.

    Args:
        clip: CLIP.
        origin: says the prompt and the concept.
        words: W words.

    Returns:
        float32 (R, d): the concept's rows in the prompt as it is; and (W, R, d): its rows with each word before it.

    Raises:
        ElrondError: if there is no CLIP, or it is of another model family, or the origin names no concept.
    """
    if clip is None:
        raise ElrondError("The CLIP input is empty: this checkpoint has no text encoder; load one separately.")
    family = family_of(clip)
    if origin.family and origin.family != family:
        raise ElrondError(f"These directions were made for {origin.family}, but this text encoder is {family}'s.")
    if not origin.prompt or not origin.concept:
        raise ElrondError("These directions do not say which concept of which prompt they were made for.")
    span = span_of(clip, origin)
    bare_rows = rows_of(clip, origin.prompt, span)
    update = progress(len(words))
    word_rows = []
    for word in words:
        word_rows.append(rows_of(clip, *put_before(origin.prompt, span, word)))
        update(len(word_rows))
    return bare_rows, torch.stack(word_rows)


def rows_of(clip: Any, prompt: str, span: Span) -> torch.Tensor:
    """The rows of the concept at a place in a prompt, float32 (R, d)."""
    encoded = EncodedPrompt(clip, prompt)
    return encoded.conditioning[0][0][0, list(encoded.concept(span).rows)].float().cpu()


def span_of(clip: Any, origin: Provenance) -> Span:
    """The place of the concept in its prompt: the occurrence that has its rows, or else the first."""
    encoded = EncodedPrompt(clip, origin.prompt)
    for span in occurrences(origin.prompt, origin.concept, inside=True):
        # The origin may name only one of the rows of the concept.
        if set(origin.rows) <= set(encoded.concept(span).rows):
            return span
    return find_word(origin.prompt, origin.concept)
