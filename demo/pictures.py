"""Contact sheets and charts of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

_CELL, _GAP, _LEFT, _TOP = 96, 4, 250, 28


def sheet(path: Path, rows: list[tuple[str, torch.Tensor]], columns: list[str] | None = None, title: str = "") -> None:
    """A labelled contact sheet.

    Args:
        path: a PNG file to write.
        rows: a label and float images (N, H, W, 3) in [0, 1] for each row.
        columns: a label a column, if any.
        title: a line at the top, if any.
    """
    # Pillow's own font lacks arrows.
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 12)
    widest = max(len(images) for _, images in rows)
    top = (_TOP if title else 0) + (_TOP if columns else 0)
    size = (_LEFT + widest * (_CELL + _GAP), top + len(rows) * (_CELL + _GAP))
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((8, 6), title, fill="black", font=font)
    for column, label in enumerate(columns or []):
        place = (_LEFT + column * (_CELL + _GAP) + _CELL / 2, top - _TOP / 2)
        draw.text(place, label, fill="black", font=font, anchor="mm")
    for row, (label, images) in enumerate(rows):
        y = top + row * (_CELL + _GAP)
        draw.multiline_text((8, y + _CELL / 2), label, fill="black", font=font, anchor="lm")
        for column, pixels in enumerate(images):
            small = Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())
            picture.paste(small.resize((_CELL, _CELL), Image.Resampling.BICUBIC), (_LEFT + column * (_CELL + _GAP), y))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def complexity_chart(path: Path, rows: list[dict[str, Any]]) -> None:
    """Estimated against true complexity, one labelled point a concept."""
    figure = Figure(figsize=(7, 5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row in rows:
        axes.plot(row["true"], row["estimate"], "o", color="#2563eb")
        axes.annotate(str(row["concept"]), (row["true"], row["estimate"]), xytext=(6, 4), textcoords="offset points")
    axes.set_xlabel("open factors of the concept (true)")
    axes.set_ylabel("estimated dimension")
    axes.set_xlim(0.5, 11.2)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(str(path))
