"""The demo's autoencoder: linear, with the channels of its latents."""

from __future__ import annotations

import torch

LATENT_CHANNELS = 24
PATCH = 4


class PatchVAE(torch.nn.Module):
    """A linear autoencoder: principal components of the world's 4x4 patches, each scaled by its std^-1/2.

    Decoded images are 64x64, every pixel doubled, so that a latent cell is 8x8 pixels as in Stable Diffusion.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        size = 3 * PATCH * PATCH
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.zeros(LATENT_CHANNELS, size))
        self.register_buffer("scale", torch.ones(LATENT_CHANNELS))

    @torch.no_grad()
    def fit(self, images: torch.Tensor) -> None:
        """Learn the components from (N, 3, 32, 32) images in [-1, 1]."""
        patches = torch.nn.functional.pixel_unshuffle(images, PATCH).movedim(1, -1).flatten(0, 2).double()
        self.mean.copy_(patches.mean(0))
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))
        top = vectors.flip(1)[:, :LATENT_CHANNELS].T
        top = top * torch.sign(top.gather(1, top.abs().argmax(1, keepdim=True)))
        self.basis.copy_(top)
        self.scale.copy_(values.flip(0)[:LATENT_CHANNELS] ** -0.25)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, 64, 64) in [-1, 1] to (N, 24, 8, 8)."""
        return self.encode_small(torch.nn.functional.avg_pool2d(pixels, 2))

    def encode_small(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, 32, 32) in [-1, 1] to (N, 24, 8, 8)."""
        patches = torch.nn.functional.pixel_unshuffle(pixels, PATCH) - self.mean[:, None, None]
        return torch.einsum("cp,nphw->nchw", self.basis * self.scale[:, None], patches)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, 24, 8, 8) to (N, 3, 64, 64) in [-1, 1]."""
        return torch.nn.functional.interpolate(self.decode_small(latents), scale_factor=2, mode="nearest")

    def decode_small(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, 24, 8, 8) to (N, 3, 32, 32) in [-1, 1]."""
        patches = torch.einsum("cp,nchw->nphw", self.basis / self.scale[:, None], latents)
        return torch.nn.functional.pixel_shuffle(patches + self.mean[:, None, None], PATCH)

    def rgb_factors(self) -> tuple[list[list[float]], list[float]]:
        """The linear map from a latent cell to its mean colour, for the host's previews."""
        decode = (self.basis / self.scale[:, None]).reshape(LATENT_CHANNELS, 3, -1).mean(-1)
        return decode.tolist(), self.mean.reshape(3, -1).mean(-1).tolist()
