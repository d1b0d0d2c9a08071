"""The demo model as genuine ComfyUI objects: a UNet, a CLIP text encoder and its tokenizer, a linear VAE.

Beside `nodes/host` the only code that touches ComfyUI's internals.
"""

from .checkpoint import MODELS, WEIGHTS, load, load_file, pack, unpack
from .text import END_TOKEN, MAX_TOKENS, TOKEN_TABLE, TOKEN_WIDTH, VOCABULARY, new_text_transformer, token_table
from .unet import SAMPLING, new_unet
from .vae import LATENT_CHANNELS, PatchVAE

__all__ = [
    "END_TOKEN",
    "LATENT_CHANNELS",
    "MAX_TOKENS",
    "MODELS",
    "SAMPLING",
    "TOKEN_TABLE",
    "TOKEN_WIDTH",
    "VOCABULARY",
    "WEIGHTS",
    "PatchVAE",
    "load",
    "load_file",
    "new_text_transformer",
    "new_unet",
    "pack",
    "token_table",
    "unpack",
]
