"""The demo's text encoder: the host's CLIP tokenizer and a small CLIP text transformer."""

from __future__ import annotations

from typing import Any

import comfy.clip_model
import comfy.ops
import comfy.sd1_clip
import torch

TOKEN_WIDTH = 128
MAX_TOKENS = 16
VOCABULARY = 49408
END_TOKEN = 49407
TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"

TEXT_CONFIG: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": TOKEN_WIDTH,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": MAX_TOKENS,
    "eos_token_id": END_TOKEN,
}


class DemoTokenizer(comfy.sd1_clip.SD1Tokenizer):
    """The host's CLIP tokenizer with chunks of 16 tokens."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        data = {**(tokenizer_data or {}), "l_max_length": MAX_TOKENS}
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=data, tokenizer=_Tokenizer)


class _Tokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, **kwargs: Any) -> None:
        kwargs.update(max_length=MAX_TOKENS, embedding_size=TOKEN_WIDTH)
        super().__init__(**kwargs)


class DemoTextModel(comfy.sd1_clip.SDClipModel):
    """A causal CLIP text transformer; rows after the end token are zero."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        super().__init__(
            device=device,
            max_length=MAX_TOKENS,
            layer="last",
            textmodel_json_config=dict(TEXT_CONFIG),
            dtype=dtype,
            special_tokens={"start": 49406, "end": END_TOKEN, "pad": END_TOKEN},
            zero_out_masked=True,
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class DemoTextEncoder(comfy.sd1_clip.SD1ClipModel):
    """The wrapper the host's CLIP object expects."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=DemoTextModel)


def token_table() -> torch.Tensor:
    """The seeded initial token table, (49408, 128) float32."""
    generator = torch.Generator().manual_seed(2602)
    return torch.randn(VOCABULARY, TOKEN_WIDTH, generator=generator) * 0.5


def new_text_transformer() -> torch.nn.Module:
    """The text transformer alone, weights not set yet."""
    return comfy.clip_model.CLIPTextModel(dict(TEXT_CONFIG), torch.float32, "cpu", comfy.ops.manual_cast)
