"""Contact sheets of labelled images, and thumbnails."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .errors import ElrondError
from .storage.atomic_write import atomic_write, make_folder, reason, remove_abandoned


def contact_sheet(
    images: torch.Tensor, rows: Sequence[str], columns: Sequence[str], title: str = "", cell: int = 128
) -> np.ndarray:
    """Draw a contact sheet: rows and columns of images with labels.

    Args:
        images: float RGB (R · C, H, W, 3) in [0, 1], row by row.
        rows: R labels, which may have several lines.
        columns: C labels.
        title: text above the columns; one line.
        cell: longer side of a cell in pixels; images are scaled to it.

    Returns:
        float32 (H, W, 3) in [0, 1].

    Raises:
        ElrondError: if there is not one image for each cell.
    """
    if len(images) != len(rows) * len(columns) or not len(images):
        raise ElrondError(f"A sheet of {len(rows)} x {len(columns)} cells cannot hold {len(images)} images.")
    height, width = images.shape[1:3]
    scale = cell / max(height, width)
    across, down = max(1, round(width * scale)), max(1, round(height * scale))
    size = max(11, min(28, cell // 8))
    # Names of directions have arrows, which Pillow's default font lacks.
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
    gap, line = max(2, size // 4), round(1.6 * size)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = round(max(pen.multiline_textbbox((0, 0), label, font=font)[2] for label in rows)) + 2 * size
    top = line * (2 if title else 1) + gap
    picture = Image.new("RGB", (left + len(columns) * (across + gap), top + len(rows) * (down + gap)), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((size, line / 2), title, fill="black", font=font, anchor="lm")
    for column, label in enumerate(columns):
        pen.text((left + column * (across + gap) + across / 2, top - gap - line / 2), label, "black", font, "mm")
    for row, label in enumerate(rows):
        y = top + row * (down + gap)
        pen.multiline_text((size, y + down / 2), label, "black", font, "lm")
        for column in range(len(columns)):
            pixels = images[row * len(columns) + column]
            picture.paste(
                _pillow(pixels).resize((across, down), Image.Resampling.BICUBIC), (left + column * (across + gap), y)
            )
    return np.asarray(picture, dtype=np.float32) / 255


def save_strip(images: torch.Tensor, path: Path, cell: int = 64) -> None:
    """Write images (N, H, W, 3) side by side as a small PNG. A missing folder is made; no partial file is left.

    Raises:
        ElrondError: if the file cannot be written.
    """
    strip = Image.new("RGB", (len(images) * cell, cell))
    for place, pixels in enumerate(images):
        strip.paste(_pillow(pixels).resize((cell, cell), Image.Resampling.BICUBIC), (place * cell, 0))
    content = io.BytesIO()
    strip.save(content, "png")
    try:
        make_folder(path.parent)
        remove_abandoned(path.parent)
        atomic_write(path, content.getvalue())
    except OSError as error:
        raise ElrondError(f"{path.name} could not be written: {reason(error)}.") from error


def _pillow(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray((pixels[..., :3].float().clamp(0, 1) * 255).round().byte().cpu().numpy())
