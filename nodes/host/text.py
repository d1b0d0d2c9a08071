"""Prompts and text encoders: which rows of a conditioning belong to which words."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import comfy.text_encoders.sd3_clip
import transformers

from ...elrond_core.errors import ElrondError
from ...elrond_core.prompt import Piece
from .conditioning import Conditioning


def family_of(clip: Any) -> str:
    """The model family as its text encoder names it: "SDXL", "Flux", "Demo"."""
    kind = type(clip.cond_stage_model)
    # This one is derived from Qwen-Image's within a function, and has its name.
    if kind.__module__.endswith(".hunyuan_image"):
        return "HunyuanImage"
    name = kind.__name__.rstrip("_")
    for suffix in ("ClipModel", "TEModel", "TextEncoder", "Model"):
        if name.endswith(suffix) and name != suffix:
            return name.removesuffix(suffix)
    return name


# Where several text encoders read the prompt, the first of these makes the rows; others are pooled, or conditionings
# of their own. Those of SDXL are side by side.
_ROWS = ("t5xxl", "hydit_clip", "llama", "qwen25_7b", "g", "l")


def pieces_of(clip: Any, prompt: str) -> tuple[list[Piece], int]:
    """A prompt's tokens with their place in the token sequence, and the length of that sequence.

    Without the words that an encoder's chat template puts around the prompt: a concept is never found there.
    """
    streams = clip.tokenize(prompt, return_word_ids=True)
    encoder = clip.cond_stage_model
    if isinstance(encoder, comfy.text_encoders.sd3_clip.SD3ClipModel):
        # Its CLIP rows, those of L and G side by side, come before its T5 rows; each may be missing.
        names = ["g" if encoder.clip_l is None else "l"] if encoder.clip_l or encoder.clip_g else []
        names += ["t5xxl"] if encoder.t5xxl is not None else []
    else:
        names = [next((name for name in _ROWS if name in streams), next(iter(streams)))]
    pieces, length = [], 0
    for stream, name in enumerate(names):
        pieces += _pieces(clip, name, streams[name], prompt, stream, length)
        length += sum(len(chunk) for chunk in streams[name])
    return pieces, length


def _pieces(clip: Any, name: str, chunks: Any, prompt: str, stream: int, start: int) -> list[Piece]:
    decode = _decoder(clip.tokenizer, name)
    names = re.findall(r"embedding:[^\s():,]+", prompt)
    inversions = {word for token, word, _ in _words(chunks) if not isinstance(token, int)}
    # The host leaves out those it does not find, and then there is no telling which is which.
    named = iter(names if len(names) == len(inversions) else [])
    found: list[Piece] = []
    ids: list[int] = []
    text, waiting, last = "", 0, None
    for token, word, place in _words(chunks):
        if not isinstance(token, int):
            # A vector of a textual inversion; those of one inversion belong to one word.
            found.append(Piece(f" {next(named, '')} " if word != last else "", start + place, stream))
        else:
            ids.append(token)
            # Tokens are decoded together with those before them: byte pieces make no sense alone.
            longer = decode(ids)
            if longer.endswith("\ufffd"):
                longer = text
                waiting += 1
            found.append(Piece(longer[len(text) :], start + place, stream))
            if longer != text and waiting:
                # A letter of several tokens starts at the first of them.
                first = len(found) - 1 - waiting
                found[first], found[-1] = replace(found[first], text=found[-1].text), replace(found[-1], text="")
                waiting = 0
            text = longer
        last = word
    leading, trailing = _template(clip, name, chunks)
    return found[leading : len(found) - trailing]


def _words(chunks: Any) -> Iterator[tuple[Any, int, int]]:
    """Token, word and place of all tokens but the start, end and padding ones."""
    place = 0
    for chunk in chunks:
        for token, _, word in chunk:
            if word:
                yield token, word, place
            place += 1


def _template(clip: Any, name: str, chunks: Any) -> tuple[int, int]:
    """How many tokens a chat template puts before and after the prompt: what two different prompts have in common."""
    one, other, mine = (
        [token for token, _, _ in _words(c)]
        for c in (*(clip.tokenize(probe, return_word_ids=True)[name] for probe in ("dog", "cat")), chunks)
    )
    leading = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    trailing = next((i for i, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=False)) if a != b), 0)
    # A prompt that brings a template of its own is taken as it is.
    return (leading, trailing) if mine[:leading] == one[:leading] else (0, 0)


def _decoder(wrapper: Any, name: str) -> Callable[[list[int]], str]:
    for candidate in (f"clip_{name}", name, getattr(wrapper, "clip", "")):
        tokenizer: Any = getattr(getattr(wrapper, candidate, None), "tokenizer", None) if candidate else None
        # The host has some of its own: a wrapper of a SentencePiece model, and plain ones.
        foreign = isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
        inner: Any = tokenizer if foreign else getattr(tokenizer, "tokenizer", tokenizer)
        if hasattr(inner, "decode"):
            return functools.partial(inner.decode, **{"clean_up_tokenization_spaces": False} if foreign else {})
    raise ElrondError(f"ELROND does not know how this CLIP cuts text ({type(wrapper).__name__}).")


def encode(clip: Any, prompt: str) -> Conditioning:
    """What the stock CLIPTextEncode node returns."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def dropped_rows(length: int, conditioning: Conditioning) -> int:
    """How many of a prompt's `length` tokens, all at its front, have no row in its conditioning.

    An encoder that drops a chat template returns fewer rows than tokens. Rows that one appends move none of the others.
    """
    return max(0, length - conditioning[0][0].shape[1])
