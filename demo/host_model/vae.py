"""The portraits' autoencoder: the host's convolutional encoder and decoder, at half the picture's resolution.

A pixel of theirs is a block of 2 × 2 of the picture, so that the widest layers work on 32 × 32 places.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.models.autoencoder import AutoencodingEngine

LATENT_CHANNELS = 16
# Pixels of a block, to a side.
_BLOCK = 2
_CONFIG: dict[str, Any] = {
    "ch": 64,
    "ch_mult": (1, 1, 2),
    "resolution": 64 // _BLOCK,
    "in_channels": 3 * _BLOCK**2,
    "out_ch": 3 * _BLOCK**2,
    "attn_resolutions": [],
    "z_channels": LATENT_CHANNELS,
    "double_z": False,
}
_MODULES = "comfy.ldm.modules.diffusionmodules.model"


class Autoencoder(AutoencodingEngine):
    """Pictures (N, 3, 64, 64) in [-1, 1] to latents (N, 16, 8, 8), and back.

    Over the world's pictures every channel of the latents has mean 0 and variance 1.
    """

    def __init__(self) -> None:
        super().__init__(
            encoder_config={"target": f"{_MODULES}.Encoder", "params": {**_CONFIG, "num_res_blocks": 1}},
            decoder_config={"target": f"{_MODULES}.Decoder", "params": {**_CONFIG, "num_res_blocks": 0}},
            regularizer_config={"target": "comfy.ldm.models.autoencoder.EmptyRegularizer"},
        )

    def encode(self, pixels: torch.Tensor, **_: Any) -> torch.Tensor:
        """(N, 3, 64, 64) in [-1, 1] to (N, 16, 8, 8)."""
        return self.encoder(torch.nn.functional.pixel_unshuffle(pixels, _BLOCK))

    def decode(self, latents: torch.Tensor, **_: Any) -> torch.Tensor:
        """(N, 16, 8, 8) to (N, 3, 64, 64), about in [-1, 1]."""
        return torch.nn.functional.pixel_shuffle(self.decoder(latents), _BLOCK)

    @torch.no_grad()
    def normalise(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Fold a mean and a standard deviation (16,) into the encoder's last layer, so that its latents lose them."""
        last = self.encoder.conv_out
        last.weight.div_(std[:, None, None, None])
        last.bias.sub_(mean).div_(std)

    @torch.no_grad()
    def rgb_factors(self) -> tuple[list[list[float]], list[float]]:
        """A linear map (16, 3) from a latent cell to its mean colour, and its bias (3,), for the host's previews.

        Least squares over random latents as the decoder draws them.
        """
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(16, LATENT_CHANNELS, 8, 8, generator=generator)
        device = self.decoder.conv_in.weight.device
        colours = torch.nn.functional.avg_pool2d(self.decode(latents.to(device)).float().cpu(), 8)
        cells = torch.cat([latents, torch.ones_like(latents[:, :1])], 1).movedim(1, -1).flatten(0, 2)
        solution = torch.linalg.lstsq(cells, colours.movedim(1, -1).flatten(0, 2)).solution
        return solution[:-1].tolist(), solution[-1].tolist()
