"""The concept of a prompt with other words in it, as a text encoder sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import comfy.model_management
import torch

from ...elrond_core.decompose.contrasts import PhraseRows
from ...elrond_core.decompose.phrasings import phrasings
from ...elrond_core.errors import ElrondError
from ...elrond_core.prompt import Span, find_word, occurrences
from ...elrond_core.provenance import Provenance
from ...elrond_core.steering.labels import put_before
from .conditioning import Conditioning
from .sampling import progress
from .text import EncodedPrompt, encode, family_of

# Prompts that are encoded at a time. More hardly save time: so many fill the processors of a graphics card.
_BATCH = 16
# A row of a batch may differ from the same row encoded alone by so much of its length: rounding of half precision.
_ROUNDING = 0.01

# What an encoder may raise that does not expect chunks of several prompts.
_UNEXPECTED = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class _Text(NamedTuple):
    prompt: str
    span: Span


# What a CLIP made of prompts: the concept's rows by patches, prompt and place; None where it does not read the concept.
_known: WeakKeyDictionary[Any, dict[tuple[Any, _Text], torch.Tensor | None]] = WeakKeyDictionary()


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
    bare = _bare(clip, origin)
    texts = [_Text(*put_before(bare.prompt, bare.span, word)) for word in words]
    rows = _rows_of_all(clip, [bare, *texts])
    for word, found in zip(words, rows[1:], strict=True):
        if found is None or found.shape != rows[0].shape:
            raise _unread(word)
    return rows[0], torch.stack(rows[1:])


def rows_with_phrases(clip: Any, origin: Provenance, phrases: Sequence[str]) -> PhraseRows:
    """The rows of a concept without and with phrases in its prompt, each put there in several ways.

    Args:
        clip: CLIP.
        origin: says the prompt and the concept.
        phrases: such as "dark" and "in red clothes".

    Returns:
        its rows, by phrase and phrasing. A phrasing in which the concept has another number of tokens is left out.

    Raises:
        ElrondError: as `rows_with_words`; or if no phrasing of a phrase is left.
    """
    bare = _bare(clip, origin)
    ways = {phrase: phrasings(bare.prompt, bare.span, phrase) for phrase in dict.fromkeys(phrases)}
    texts = [_Text(*phrasing) for by_name in ways.values() for phrasing in by_name.values()]
    first, *others = _rows_of_all(clip, [bare, *texts])
    rows = iter(others)
    phrased: dict[str, dict[str, torch.Tensor]] = {}
    for phrase, by_name in ways.items():
        found = {name: next(rows) for name in by_name}
        phrased[phrase] = {name: each for name, each in found.items() if each is not None and each.shape == first.shape}
        if not phrased[phrase]:
            raise _unread(phrase)
    return PhraseRows(first, phrased)


def _unread(phrase: str) -> ElrondError:
    return ElrondError(
        f"With {phrase!r} in the prompt, the text encoder reads the concept in other tokens, or not at all: take "
        f"{phrase!r} out of the list, or shorten the prompt."
    )


def _bare(clip: Any, origin: Provenance) -> _Text:
    """The prompt of an origin and its concept's place, if this CLIP can read it."""
    if clip is None:
        raise ElrondError("The CLIP input is empty: this checkpoint has no text encoder; load one separately.")
    family = family_of(clip)
    if origin.family and origin.family != family:
        raise ElrondError(f"These directions were made for {origin.family}, but this text encoder is {family}'s.")
    if not origin.prompt or not origin.concept:
        raise ElrondError("These directions do not say which concept of which prompt they were made for.")
    return _Text(origin.prompt, span_of(clip, origin))


def rows_of(clip: Any, prompt: str, span: Span) -> torch.Tensor:
    """The rows of the concept at a place in a prompt, float32 (R, d)."""
    return _rows(EncodedPrompt(clip, prompt), span)


def _rows(encoded: EncodedPrompt, span: Span) -> torch.Tensor:
    return encoded.conditioning[0][0][0, list(encoded.concept(span).rows)].float().cpu().clone()


def _rows_of_all(clip: Any, texts: Sequence[_Text]) -> list[Any]:
    """`rows_of` each of some texts, or None where the concept is not read; the first text must be.

    What was encoded is kept as long as the CLIP is, so that an interruption or another list loses nothing.
    """
    known = _known.setdefault(clip, {})
    state = getattr(clip.patcher, "patches_uuid", None), getattr(clip, "layer_idx", None)
    update = progress(len(texts))
    if (state, texts[0]) not in known:
        known[state, texts[0]] = rows_of(clip, *texts[0])
    wanted = [text for text in dict.fromkeys(texts) if (state, text) not in known]
    done = len(texts) - len(wanted)
    update(done)
    for batch in _encoded(clip, list(dict.fromkeys(text.prompt for text in wanted))):
        for prompt, conditioning in batch:
            encoded = EncodedPrompt(clip, prompt, conditioning)
            for text in wanted:
                if text.prompt == prompt:
                    known[state, text] = _rows_or_none(encoded, text.span)
                    done += 1
        # A cancel raises here, once the whole batch is kept.
        update(done)
    return [known[state, text] for text in texts]


def _rows_or_none(encoded: EncodedPrompt, span: Span) -> torch.Tensor | None:
    try:
        return _rows(encoded, span)
    except ElrondError:
        return None


def _encoded(clip: Any, prompts: Sequence[str]) -> Iterator[list[tuple[str, Conditioning]]]:
    """Batches of prompts and their conditionings, of several prompts each if the encoder allows.

    The host encodes a long prompt in chunks, side by side, and returns the rows of one after those of the other. So
    chunks of different prompts can be encoded as if they were one prompt's. Encoders that put a template or a mask
    around the prompt do not allow this: the first two prompts of each kind show it.
    """
    waiting: dict[Any, list[tuple[str, Any]]] = {}
    for prompt in prompts:
        tokens = clip.tokenize(prompt)
        shape = tuple((name, tuple(len(chunk) for chunk in chunks)) for name, chunks in tokens.items())
        waiting.setdefault(shape, []).append((prompt, tokens))
    for members in waiting.values():
        start, size = 0, 1
        if len(members) > 2:
            alone = [encode(clip, prompt) for prompt, _ in members[:2]]
            with contextlib.suppress(*_UNEXPECTED):
                size = _BATCH if _agree(alone, _joined(clip, [tokens for _, tokens in members[:2]])) else 1
            yield [(prompt, each) for (prompt, _), each in zip(members, alone, strict=False)]
            start = 2
        while start < len(members):
            batch = members[start : start + size]
            try:
                found = _joined(clip, [tokens for _, tokens in batch]) if size > 1 else None
            except comfy.model_management.OOM_EXCEPTION:
                size = 1
                continue
            found = [encode(clip, prompt) for prompt, _ in batch] if found is None else found
            yield [(prompt, each) for (prompt, _), each in zip(batch, found, strict=True)]
            start += len(batch)


def _joined(clip: Any, tokens: Sequence[dict[str, Any]]) -> list[Conditioning] | None:
    """Conditionings of prompts of equally long chunks, encoded as one prompt; None if they cannot be told apart."""
    whole = {name: [chunk for each in tokens for chunk in each[name]] for name in tokens[0]}
    rows = clip.encode_from_tokens_scheduled(whole)[0][0]
    if rows.shape[1] % len(tokens):
        return None
    return [[[part, {}]] for part in rows.chunk(len(tokens), dim=1)]


def _agree(alone: Sequence[Conditioning], joined: Sequence[Conditioning] | None) -> bool:
    """Whether prompts encoded as one have the rows that each has alone."""
    if joined is None:
        return False
    for one, other in zip(alone, joined, strict=True):
        if one[0][0].shape != other[0][0].shape:
            return False
        difference = (one[0][0].float() - other[0][0].float()).norm(dim=-1)
        if (difference > _ROUNDING * one[0][0].float().norm(dim=-1).clamp_min(1e-9)).any():
            return False
    return True


def span_of(clip: Any, origin: Provenance) -> Span:
    """The place of the concept in its prompt: the occurrence that has its rows, or else the first."""
    encoded = EncodedPrompt(clip, origin.prompt)
    for span in occurrences(origin.prompt, origin.concept, inside=True):
        # The origin may name only one of the rows of the concept.
        if set(origin.rows) <= set(encoded.concept(span).rows):
            return span
    return find_word(origin.prompt, origin.concept)
