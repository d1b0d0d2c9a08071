"""The demo model as genuine ComfyUI objects: a UNet, a CLIP text encoder and its tokenizer, an autoencoder.

Beside `nodes/host` the only code that touches ComfyUI's internals.
"""

from .checkpoint import MODELS, WEIGHTS, Portraits, file_of, load, load_vae
from .text import TEXT_LENGTH, TEXT_WIDTH
from .vae import LATENT_CHANNELS, Autoencoder

__all__ = [
    "LATENT_CHANNELS",
    "MODELS",
    "TEXT_LENGTH",
    "TEXT_WIDTH",
    "WEIGHTS",
    "Autoencoder",
    "Portraits",
    "file_of",
    "load",
    "load_vae",
]
