"""Mark Concept and Encode Concept with further encoders that ComfyUI's templates load, at small random weights."""

from __future__ import annotations

import base64
import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.text_encoders.qwen_image
import pytest
import torch
import transformers
from comfyui_elrond.nodes import host

# isort: split
sys.path.append(str(Path(__file__).parent))

from test_mark import PROMPT, marked, own, rows, stock
from test_tokenizers import (  # noqa: F401  (fixture)
    ENCODERS,
    Encoder,
    _each_vocabulary_is_read_once,
    clip,
    llama,
    load,
    t5,
)

# Tokens of the stand-in vocabulary for Mistral's, after its special ones.
TOKENS, SPECIAL = 20000, 1000


@functools.cache
def tekken() -> torch.Tensor:
    """Mistral's vocabularies come with their checkpoints; the most frequent part of Qwen's stands in for them."""
    folder = Path(comfy.text_encoders.qwen_image.__file__).parent / "qwen25_tokenizer"
    spelled = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    # Byte-level vocabularies write each byte as a letter that can be printed.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in printable)}
    tokens = sorted(spelled, key=spelled.__getitem__)[:TOKENS]
    words = [bytes([byte]) for byte in range(256)]
    words += [word for word in (bytes(letters[c] for c in token) for token in tokens) if len(word) > 1]
    words = words[:TOKENS]
    names = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 11: "<pad>", 17: "[SYSTEM_PROMPT]"}
    names |= {18: "[/SYSTEM_PROMPT]"}
    pattern = r"'s|'t|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    content = {
        "config": {
            "pattern": pattern,
            "num_vocab_tokens": len(words),
            "default_vocab_size": len(words) + SPECIAL,
            "default_num_special_tokens": SPECIAL,
            "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": word.decode(errors="replace")}
            for rank, word in enumerate(words)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": names.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
            for rank in range(SPECIAL)
        ],
    }
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


def _made(
    module: str, tokenizer: str, model: str, sizes: dict[str, Any], made: bool = True, **more: Any
) -> Callable[[], Encoder]:
    def make() -> Encoder:
        name, _, other = module.partition(":")
        source = importlib.import_module(f"comfy.text_encoders.{name}")
        found = getattr(importlib.import_module(f"comfy.text_encoders.{other or name}"), model)
        data = {"tekken_model": tekken()} if more.get("tekken") else {}
        return Encoder("", getattr(source, tokenizer), found() if made else found, sizes, data)

    return make


MISTRAL = llama(TOKENS + SPECIAL)
# By the names that bench.users has for them.
FURTHER = {
    "SD2": _made("sd2_clip", "SD2Tokenizer", "SD2ClipModel", {"clip_h": clip()}, made=False),
    "Mochi": _made("genmo", "MochiT5Tokenizer", "mochi_te", {"t5xxl": t5()}),
    "LTXV": _made("lt", "LTXVT5Tokenizer", "ltxv_te", {"t5xxl": t5()}),
    "HunyuanVideo15": _made(
        "hunyuan_video:hunyuan_image", "HunyuanVideo15Tokenizer", "te", {"qwen25_7b": llama(152064)}
    ),
    "Flux2, Mistral": _made(
        "flux", "Flux2Tokenizer", "flux2_te", {"mistral3_24b": {**MISTRAL, "num_hidden_layers": 31}}, tekken=True
    ),
    "Ernie": _made("ernie", "ErnieTokenizer", "te", {"ministral3_3b": MISTRAL}, tekken=True),
}


@pytest.fixture(params=FURTHER)
def further(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One of them, as a CLIP."""
    try:
        encoder = FURTHER[request.param]()
    except (ImportError, AttributeError):
        pytest.skip(f"this host has no {request.param}")
    monkeypatch.setitem(ENCODERS, request.param, encoder)
    try:
        return load(request.param)
    except TypeError as error:
        if "MistralConverter" not in str(error):
            raise
        pytest.skip(f"with transformers {transformers.__version__} this host cannot read Mistral's vocabulary")


@pytest.mark.parametrize("prompt", ["a photo of a [dog] in the park", "a [chiaroscuro] dog, a [red] cat"])
def test_the_mark_is_encode_concepts_own(further: Any, prompt: str) -> None:
    found = marked(further, stock(further, prompt.replace("[", "").replace("]", "")), "", prompt)
    assert found[0][1][host.MARK] == own(further, prompt)


def test_another_word_changes_the_concepts_rows_most(further: Any) -> None:
    conditioning = stock(further, PROMPT)
    (_, place), *others = rows(marked(further, conditioning))
    assert not others
    change = (conditioning[0][0] - stock(further, PROMPT.replace("dog", "cat"))[0][0])[0].norm(dim=1)
    assert sorted(change.topk(len(place)).indices.tolist()) == list(place)
