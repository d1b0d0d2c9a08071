"""A world of small images whose every factor is known.

An image shows one coloured shape on a grey ground. Six factors describe it; the five continuous ones
live on [0, 1] and are uniform unless a caption says otherwise:

========== ==================== =============================================
factor     values               what it sets
========== ==================== =============================================
shape      circle, square,      outline; equal areas at equal size
           triangle
hue        0 red … 1 blue       hue angle, 240° times the value
size       0 … 1                radius of the circle of equal area, 3 … 6 px
x          0 left … 1 right     centroid column, 9.5 … 22.5 px
y          0 top … 1 bottom     centroid row, 9.5 … 22.5 px
background 0 dark … 1 bright    grey level, 0.15 … 0.85
========== ==================== =============================================

`render` draws factors, `measure` reads them back from any image, and is used on what a model makes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

IMAGE_SIZE = 32
SHAPES = ("circle", "square", "triangle")
CONTINUOUS = ("hue", "size", "x", "y", "background")
FACTORS = ("shape", *CONTINUOUS)

_SATURATION, _VALUE = 0.9, 0.95
_CHROMA = _SATURATION * _VALUE
_RADIUS = (3.0, 6.0)
_CENTRE = (9.5, 22.5)
_GREY = (0.15, 0.85)
_COVERED = 0.3
# A triangle's corners lie 1.56 radii of the circle of equal area from its centroid.
_REACH = 1.75


def _scale(value: torch.Tensor, span: tuple[float, float]) -> torch.Tensor:
    return span[0] + value * (span[1] - span[0])


def _unscale(value: torch.Tensor, span: tuple[float, float]) -> torch.Tensor:
    return (value - span[0]) / (span[1] - span[0])


def _hue_to_rgb(hue: torch.Tensor) -> torch.Tensor:
    """(N,) factor values to (N, 3) RGB at the world's fixed saturation and value."""
    sextant = hue * 4.0
    offsets = torch.tensor([5.0, 3.0, 1.0], device=hue.device, dtype=hue.dtype)
    k = (offsets + sextant[:, None]) % 6
    return _VALUE - _VALUE * _SATURATION * torch.clamp(torch.minimum(k, 4 - k), 0, 1)


def _coverage(shape: torch.Tensor, radius: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Share of each pixel that a shape covers: (N,) parameters in pixels to (N, 32, 32)."""
    grid = torch.arange(IMAGE_SIZE, device=x.device, dtype=x.dtype) + 0.5
    dx = grid[None, None, :] - x[:, None, None]
    dy = grid[None, :, None] - y[:, None, None]
    r = radius[:, None, None]
    circle = torch.sqrt(dx**2 + dy**2) - r
    square = torch.maximum(dx.abs(), dy.abs()) - r * math.sqrt(math.pi) / 2
    inradius = r * math.sqrt(math.pi / (3 * math.sqrt(3)))
    slope = math.sqrt(3) / 2
    triangle = torch.maximum(dy.expand_as(circle), slope * dx.abs() - 0.5 * dy) - inradius
    distance = torch.stack([circle, square.expand_as(circle), triangle], dim=1)
    return torch.clamp(0.5 - distance, 0, 1)[torch.arange(len(shape)), shape]


def render(factors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Draw images.

    Args:
        factors: for every name in `FACTORS` a tensor of shape (N,); `shape` holds indices into `SHAPES` (int64),
            the others float32 values in [0, 1].

    Returns:
        float32 RGB images in [0, 1], shape (N, 32, 32, 3).
    """
    alpha = _coverage(
        factors["shape"],
        _scale(factors["size"], _RADIUS),
        _scale(factors["x"], _CENTRE),
        _scale(factors["y"], _CENTRE),
    )[..., None]
    colour = _hue_to_rgb(factors["hue"])[:, None, None, :]
    ground = _scale(factors["background"], _GREY)[:, None, None, None]
    return (1 - alpha) * ground + alpha * colour


@dataclass
class Measurement:
    """Factors read from images.

    Attributes:
        factors: as `render` takes them; values are not clipped to [0, 1], so that a drift out of the world shows.
        error: (N,) root-mean-square difference between each image and the world's nearest image of those factors.
    """

    factors: dict[str, torch.Tensor]
    error: torch.Tensor

    @property
    def valid(self) -> torch.Tensor:
        """(N,) bool: the image is one of the world's, to a root-mean-square error of `VALID_ERROR`."""
        return self.error < VALID_ERROR


VALID_ERROR = 0.06


def measure(images: torch.Tensor) -> Measurement:
    """Read the factors back from images.

    The ground is grey, so a pixel's chroma is the share of it that the shape covers, whatever the ground's level.
    A first pass finds the colour and a rough place from the well-covered pixels; a second projects every pixel near
    that place on the colour, which keeps noise from counting as area. Centroid and area follow; the outline is the
    one whose drawing comes nearest.

    Args:
        images: float RGB in [0, 1], shape (N, 32, 32, 3), or (N, 32k, 32k, 3) for a whole k (averaged down).

    Raises:
        ValueError: if the images have another shape.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.shape[1] != images.shape[2] or images.shape[1] % IMAGE_SIZE:
        raise ValueError(f"images must be (N, 32k, 32k, 3), got {tuple(images.shape)}.")
    images = images.float()
    if images.shape[1] != IMAGE_SIZE:
        step = images.shape[1] // IMAGE_SIZE
        images = torch.nn.functional.avg_pool2d(images.movedim(-1, 1), step).movedim(1, -1)
    count = len(images)
    border = torch.cat([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], dim=1)
    ground = border.mean(dim=-1).median(dim=1).values

    grid = torch.arange(IMAGE_SIZE, device=images.device) + 0.5
    chroma = ((images.amax(-1) - images.amin(-1)) / _CHROMA).clamp(0, 1)
    rough = torch.where(chroma < _COVERED, torch.zeros_like(chroma), chroma)
    hue = _measure_hue((images * rough[..., None]).sum((1, 2)))
    area, x, y = _extent(rough, grid)
    reach = _REACH * torch.sqrt(area / math.pi) + 1.5
    near = (grid[None, None, :] - x[:, None, None]) ** 2 + (grid[None, :, None] - y[:, None, None]) ** 2
    near = near <= reach[:, None, None] ** 2

    colour = _hue_to_rgb(hue.clamp(0, 1))
    tint = colour - colour.mean(-1, keepdim=True)
    tint = tint / (tint**2).sum(-1, keepdim=True)
    alpha = ((images - images.mean(-1, keepdim=True)) * tint[:, None, None, :]).sum(-1)
    area, x, y = _extent(torch.where(near, alpha, torch.zeros_like(alpha)), grid)
    radius = torch.sqrt(area / math.pi)

    factors = {
        "hue": hue,
        "size": _unscale(radius, _RADIUS),
        "x": _unscale(x, _CENTRE),
        "y": _unscale(y, _CENTRE),
        "background": _unscale(ground, _GREY),
    }
    errors = []
    for index in range(len(SHAPES)):
        drawn = render({"shape": torch.full((count,), index, device=images.device), **factors})
        errors.append(((drawn - images) ** 2).mean((1, 2, 3)).sqrt())
    best = torch.stack(errors, dim=1).min(dim=1)
    return Measurement({"shape": best.indices, **factors}, best.values)


def _extent(alpha: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Area in pixels and centroid column and row of (N, 32, 32) coverages."""
    area = alpha.sum((1, 2)).clamp_min(1e-3)
    return area, (alpha.sum(1) * grid).sum(1) / area, (alpha.sum(2) * grid).sum(1) / area


def _measure_hue(colour: torch.Tensor) -> torch.Tensor:
    """(N, 3) RGB sums to hues on the world's scale; beyond either end of it, to -0.25 and 1.25 at most."""
    high, low = colour.amax(-1), colour.amin(-1)
    chroma = (high - low).clamp_min(1e-6)
    red, green, blue = colour.unbind(-1)
    sextant = torch.where(
        high == red,
        (green - blue) / chroma,
        torch.where(high == green, 2 + (blue - red) / chroma, 4 + (red - green) / chroma),
    )
    # The world's hues fill 0 to 4 of the circle's 6 sextants; purples belong to whichever end is nearer.
    sextant = torch.where(sextant > 5, sextant - 6, sextant)
    return (sextant / 4).clamp(-0.25, 1.25)
