"""A CLIP that encodes texts as a node does that reads images beside them, with the node's instruction and images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import comfy.model_management

from ...elrond_core.errors import ElrondError
from .upstream import HOST_NODES, ImageNode


class ImageClip:
    """A CLIP as one node uses it.

    The node itself says what it makes of a text: it is run until it asks its CLIP for tokens.

    Args:
        clip: the CLIP that the node encodes with.
        node: the node.
        images: its images, float (N, H, W, 3), by the name of the input.

    Attributes:
        cond_stage_model: the encoder.
        tokenizer: the host's tokenizer.
        plain: the CLIP that the node encodes with, as it encodes texts alone.
    """

    def __init__(self, clip: Any, node: ImageNode, images: dict[str, Any]) -> None:
        self.cond_stage_model, self.tokenizer = clip.cond_stage_model, clip.tokenizer
        self.plain, self._node = clip, node
        self._inputs: dict[str, Any] = {}
        for name, value in {**node.values, **images}.items():
            group, _, socket = name.partition(".")
            if socket:
                self._inputs.setdefault(group, {})[socket] = value
            else:
                self._inputs[name] = value

    def tokenize(self, text: str, return_word_ids: bool = False) -> Any:
        """The tokens that the node makes of a text.

        Raises:
            ElrondError: if the node fails before it asks for tokens, or asks for none.
        """
        kind = HOST_NODES.NODE_CLASS_MAPPINGS[self._node.kind]
        # Newer nodes are classes with a method of the class, older ones are made for each run.
        run = kind.execute if hasattr(kind, "define_schema") else getattr(kind(), kind.FUNCTION)
        listener = _Listener(self.plain, return_word_ids)
        try:
            run(**{**self._inputs, self._node.clip: listener, self._node.text: text})
        except _AskedError as asked:
            return asked.tokens
        except (comfy.model_management.InterruptProcessingException, comfy.model_management.OOM_EXCEPTION):
            raise
        except Exception as error:
            raise ElrondError(f"{self._node.kind} could not be asked for its tokens: {error}.") from error
        raise ElrondError(f"{self._node.kind} encoded its text without asking the CLIP for tokens.")

    def encode_from_tokens_scheduled(self, tokens: Any) -> Any:
        """As the CLIP does."""
        return self.plain.encode_from_tokens_scheduled(tokens)


class _AskedError(Exception):
    """Ends a node's run, with the tokens that it asked for."""

    def __init__(self, tokens: Any) -> None:
        super().__init__()
        self.tokens = tokens


class _Listener:
    def __init__(self, clip: Any, return_word_ids: bool) -> None:
        self._clip, self._return_word_ids = clip, return_word_ids

    def __getattr__(self, name: str) -> Any:
        # A node may name what it encodes with before it asks for tokens: clip.encode(clip.tokenize(text)).
        return getattr(self._clip, name)

    def tokenize(self, text: str, **options: Any) -> Any:
        raise _AskedError(self._clip.tokenize(text, return_word_ids=self._return_word_ids, **options))


@contextlib.contextmanager
def counted_images(encoder: Any) -> Iterator[list[int]]:
    """How many rows each image takes that an encoder reads meanwhile, in the order of the tokens.

    Args:
        encoder: a CLIP's `cond_stage_model`.
    """
    counts: list[int] = []
    readers = [part for part in encoder.modules() if hasattr(part, "preprocess_embed")]

    def counting(read: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            rows, extra = read(*arguments, **options)
            # The host leaves out what the encoder cannot read.
            counts.append(0 if rows is None else rows.numel() // rows.shape[-1])
            return rows, extra

        return wrapped

    for part in readers:
        part.preprocess_embed = counting(part.preprocess_embed)
    try:
        yield counts
    finally:
        for part in readers:
            # The method of its class.
            del part.preprocess_embed
