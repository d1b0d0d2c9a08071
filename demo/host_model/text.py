"""The portraits' text encoder: the host's CLIP tokenizer and a small causal CLIP text transformer."""

from __future__ import annotations

from typing import Any

import comfy.clip_model
import comfy.ops
import comfy.sd1_clip
import torch

TEXT_WIDTH = 128
# Rows of a prompt. The longest captions have 42 tokens.
TEXT_LENGTH = 48
VOCABULARY = 49408
START_TOKEN, END_TOKEN = 49406, 49407
TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"

_CONFIG: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": TEXT_WIDTH,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": TEXT_LENGTH,
    "eos_token_id": END_TOKEN,
}


class DemoTokenizer(comfy.sd1_clip.SD1Tokenizer):
    """The host's CLIP tokenizer with chunks of 48 tokens."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        data = {**(tokenizer_data or {}), "l_max_length": TEXT_LENGTH}
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=data, tokenizer=_Tokenizer)


class _Tokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, **kwargs: Any) -> None:
        kwargs.update(max_length=TEXT_LENGTH, embedding_size=TEXT_WIDTH)
        super().__init__(**kwargs)


class DemoTextModel(comfy.sd1_clip.SDClipModel):
    """A causal CLIP text transformer; rows after the end token are zero."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        super().__init__(
            device=device,
            max_length=TEXT_LENGTH,
            layer="last",
            textmodel_json_config=dict(_CONFIG),
            dtype=dtype,
            special_tokens={"start": START_TOKEN, "end": END_TOKEN, "pad": END_TOKEN},
            zero_out_masked=True,
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class DemoTextEncoder(comfy.sd1_clip.SD1ClipModel):
    """The wrapper that the host's CLIP object expects."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=DemoTextModel)


def token_table() -> torch.Tensor:
    """The seeded initial token table, (49408, 128) float32: what words have that no caption uses."""
    generator = torch.Generator().manual_seed(2602)
    return torch.randn(VOCABULARY, TEXT_WIDTH, generator=generator) * 0.5


def new_text_transformer() -> torch.nn.Module:
    """The text transformer alone, weights not set yet."""
    return comfy.clip_model.CLIPTextModel(dict(_CONFIG), torch.float32, "cpu", comfy.ops.manual_cast)
