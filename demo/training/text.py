"""The text encoder as training needs it: captions to token ids, and only the used rows of the token table."""

from __future__ import annotations

import math

from .. import host

# isort: split
import torch
from comfy.ldm.modules.attention import attention_pytorch
from transformers import CLIPTokenizer

from ..host_model.text import (
    END_TOKEN,
    START_TOKEN,
    TEXT_LENGTH,
    TOKEN_TABLE,
    VOCABULARY,
    new_text_transformer,
    token_table,
)
from ..portraits.captions import WORDS

# Standard deviation of the initial position embeddings: a fifth of the token table's.
_POSITIONS = 0.1


class Tokens:
    """Captions to token ids, word by word: what the host's tokenizer makes of them, and faster.

    Attributes:
        used: all token ids that captions have, sorted.
    """

    def __init__(self) -> None:
        tokenizer = CLIPTokenizer.from_pretrained(host.path() / "comfy" / "sd1_tokenizer")
        self._pieces = {word: tokenizer(word)["input_ids"][1:-1] for word in (*WORDS, ",")}
        self.used = sorted({START_TOKEN, END_TOKEN, *(i for pieces in self._pieces.values() for i in pieces)})

    def encode(self, captions: list[str]) -> torch.Tensor:
        """Token ids (N, 48), int64: start, the words' pieces, end tokens to fill.

        Raises:
            ValueError: if a caption is too long or has a word that no caption of the world has.
        """
        rows = []
        for caption in captions:
            words = caption.replace(",", " , ").split()
            unknown = [word for word in words if word not in self._pieces]
            ids = [START_TOKEN, *(i for word in words for i in self._pieces.get(word, []))]
            if unknown or len(ids) >= TEXT_LENGTH:
                raise ValueError(
                    f"{caption!r} cannot be encoded: use the captions' words, and at most {TEXT_LENGTH - 2} tokens."
                )
            rows.append(ids + [END_TOKEN] * (TEXT_LENGTH - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).view(-1, TEXT_LENGTH)


class TextEncoder(torch.nn.Module):
    """The host's text transformer with a table of the used tokens only, differentiable throughout.

    Args:
        tokens: gives the used tokens.
        generator: draws the initial weights.
    """

    index: torch.Tensor

    def __init__(self, tokens: Tokens, generator: torch.Generator) -> None:
        super().__init__()
        self.transformer = new_text_transformer()
        self.used = tokens.used
        self.rows = torch.nn.Parameter(token_table()[self.used])
        index = torch.zeros(VOCABULARY, dtype=torch.int64)
        index[self.used] = torch.arange(len(self.used))
        self.register_buffer("index", index, persistent=False)
        embeddings = self.transformer.text_model.embeddings
        # The host's table has a row for each of 49,408 tokens: training keeps it out of the module.
        embeddings.token_embedding = torch.nn.Identity()
        with torch.no_grad():
            for module in self.transformer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.normal_(std=1 / math.sqrt(module.in_features), generator=generator)
                    if module.bias is not None:
                        module.bias.zero_()
                elif isinstance(module, torch.nn.LayerNorm):
                    module.weight.fill_(1)
                    module.bias.zero_()
            embeddings.position_embedding.weight.normal_(std=_POSITIONS, generator=generator)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (N, 48) to rows (N, 48, 128), zero after the end token: what the host's CLIP object returns."""
        # Rows after the longest caption's end are zero in any case, and need no computing.
        # On a card all batches have one shape, and nothing waits for the card.
        length = TEXT_LENGTH if tokens.is_cuda else int((tokens != END_TOKEN).sum(1).max()) + 1
        tokens = tokens[:, :length]
        model = self.transformer.text_model
        x = self.rows[self.index[tokens]] + model.embeddings.position_embedding.weight[:length]
        mask = torch.full((length, length), -torch.inf, device=x.device).triu_(1)
        for layer in model.encoder.layers:
            x = x + layer.self_attn(layer.layer_norm1(x), mask, attention_pytorch)
            x = x + layer.mlp(layer.layer_norm2(x))
        seen = torch.cumsum(tokens == END_TOKEN, 1) <= 1
        rows = model.final_layer_norm(x) * seen[..., None]
        return torch.nn.functional.pad(rows, (0, 0, 0, TEXT_LENGTH - length))

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Take a transformer's state dict, as `weights` returns it."""
        with torch.no_grad():
            self.rows.copy_(weights[TOKEN_TABLE][self.used])
        self.transformer.load_state_dict({name: value for name, value in weights.items() if name != TOKEN_TABLE})

    def weights(self) -> dict[str, torch.Tensor]:
        """The transformer's state dict with the whole token table."""
        table = token_table()
        table[self.used] = self.rows.detach().float().cpu()
        return {**self.transformer.state_dict(), TOKEN_TABLE: table}


def empty_rows(encoder: TextEncoder) -> torch.Tensor:
    """The rows of the empty caption, (1, 48, 128)."""
    tokens = torch.full((1, TEXT_LENGTH), END_TOKEN, device=encoder.index.device)
    tokens[:, 0] = START_TOKEN
    return encoder(tokens)
