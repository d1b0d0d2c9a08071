"""Draws the registry's pictures of the pack: `python docs/pictures/draw.py` makes `icon.png` and `banner.png`."""

from __future__ import annotations

import colorsys
from pathlib import Path

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
# The registry shows icons up to 400 by 400 pixels, and banners of 21 to 9.
ICON, BANNER = (400, 400), (1260, 540)
# Drawn larger by this factor, then averaged, so that edges are smooth.
FINE = 4
GROUND, TRACK, TEXT, QUIET = (24, 26, 34), (70, 75, 92), (240, 242, 248), (160, 166, 184)


def colour(hue: float, value: float = 0.95) -> tuple[int, int, int]:
    """RGB of a hue in turns."""
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.72, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def canvas(size: tuple[int, int], corner: float = 0) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A dark picture, transparent outside of its round corners."""
    picture = Image.new("RGBA", (FINE * size[0], FINE * size[1]), (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)
    pen.rounded_rectangle((0, 0, FINE * size[0] - 1, FINE * size[1] - 1), FINE * corner, fill=GROUND)
    return picture, pen


def disc(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple[int, ...]) -> None:
    """A disc about (x, y), in pixels of the result."""
    pen.ellipse([FINE * edge for edge in (x - radius, y - radius, x + radius, y + radius)], fill=fill)


def slider(pen: ImageDraw.ImageDraw, left: float, right: float, y: float, share: float, hue: float) -> None:
    """A slider whose knob stands at a share of its length."""
    knob = left + share * (right - left)
    for end, fill in ((right, TRACK), (knob, colour(hue))):
        box = [FINE * edge for edge in (left, y - 7, end, y + 7)]
        pen.rounded_rectangle(box, 7 * FINE, fill=fill)
    disc(pen, knob, y, 24, colour(hue))
    disc(pen, knob, y, 10, GROUND)


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings."""
    found = font_manager.findfont(
        font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    )
    return ImageFont.truetype(found, FINE * size)


def icon() -> Image.Image:
    """One shape and its variety along three sliders."""
    picture, pen = canvas(ICON, corner=72)
    for place, hue in enumerate((0.0, 0.11, 0.33, 0.5, 0.62, 0.8)):
        disc(pen, 78 + 49 * place, 108, 12 + 2.4 * place, colour(hue))
    for y, share, hue in ((212, 0.72, 0.62), (272, 0.3, 0.11), (332, 0.55, 0.33)):
        slider(pen, 72, 328, y, share, hue)
    return picture.resize(ICON, Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """The name, what it does, and a word with its directions."""
    picture, pen = canvas(BANNER)
    pen.text((FINE * 70, FINE * 80), "ELROND", TEXT, font(96, bold=True))
    pen.text((FINE * 74, FINE * 214), "a photo of a [dog]", colour(0.11), font(36))
    pen.text((FINE * 74, FINE * 290), "what a model can vary about one word,", QUIET, font(25))
    pen.text((FINE * 74, FINE * 328), "as sliders, and as diversity", QUIET, font(25))
    names = (("dark → bright", 0.8, 0.13), ("small → large", 0.35, 0.33), ("red → blue", 0.62, 0.62))
    for place, (name, share, hue) in enumerate(names):
        y = 110 + 90 * place
        pen.text((FINE * 720, FINE * (y - 40)), name, QUIET, font(20))
        slider(pen, 720, 1190, y + 12, share, hue)
    for place in range(9):
        disc(pen, 735 + 55 * place, 436, 9 + 1.9 * place, colour(0.62 * place / 8, 0.55 + 0.05 * place))
    return picture.convert("RGB").resize(BANNER, Image.Resampling.LANCZOS)


if __name__ == "__main__":
    icon().save(HERE / "icon.png", optimize=True)
    banner().quantize(128).save(HERE / "banner.png", optimize=True)
