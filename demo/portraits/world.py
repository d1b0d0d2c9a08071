"""Portraits of 64 × 64 pixels, put together from drawn layers.

A portrait is set by ten factors. Five are continuous, on [0, 1]:

============ ===================== ==========================================================================
factor       from 0 to 1           what it sets
============ ===================== ==========================================================================
skin         pale to dark          a place on a ramp of six colours
hair_colour  silver to pink        a place on a path: grey, black, brown, auburn, ginger, blond, dyed colours
clothes_hue  red to pink           a place on a path around the colour circle
background   dark green to lilac   a place on a path of hue and lightness: green, white, blue, purple
position     left to right         where the person is, -7 … 7 pixels from the middle, in quarters of a pixel
============ ===================== ==========================================================================

and five are categorical: `CATEGORICAL` lists their values. The layers lie in `atlas.xz`, which `atlas.mjs` drew; the
art is "Personas" by Draftbit, CC BY 4.0.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

IMAGE_SIZE = 64
CONTINUOUS = ("skin", "hair_colour", "clothes_hue", "background", "position")
CATEGORICAL: dict[str, tuple[str, ...]] = {
    "hair": (
        "bald",
        "short",
        "curly",
        "afro",
        "bob",
        "long",
        "very long",
        "pigtails",
        "bun",
        "mohawk",
        "cap",
        "beanie",
    ),
    "eyes": ("open", "closed", "wink", "glasses", "sunglasses"),
    "mouth": ("smile", "frown", "open", "grin", "lips"),
    "beard": ("none", "moustache", "goatee", "full"),
    "garment": ("tee", "checks", "stripes", "jacket", "turtleneck", "dress"),
}
FACTORS = (*CONTINUOUS, *CATEGORICAL)
Factors = dict[str, torch.Tensor]

# Colours at equal distances along each path, as hexadecimal RGB. Hair keeps a distance from faces, so that beards show.
PATHS: dict[str, dict[str, str]] = {
    "skin": {
        "pale": "f6cdb8",
        "fair": "e9ac8b",
        "tan": "d08a64",
        "bronze": "a9683f",
        "brown": "835039",
        "dark": "5f3a2e",
    },
    "hair_colour": {
        "silver": "a9b2c6",
        "gray": "666c7c",
        "black": "1d1a26",
        "brown": "4a2618",
        "auburn": "a03a16",
        "ginger": "e5651a",
        "blond": "f2c53d",
        "green": "7bc043",
        "teal": "0fa39a",
        "blue": "2f55d8",
        "purple": "7a3fd0",
        "pink": "ec4f97",
    },
    "clothes_hue": {
        "red": "d93a46",
        "orange": "f0832f",
        "yellow": "f2c23a",
        "green": "57b356",
        "teal": "2bbfae",
        "blue": "3d68ea",
        "purple": "7a50c8",
        "pink": "ee5f9e",
    },
    "background": {
        "dark green": "17463a",
        "green": "2f8f6a",
        "light green": "b4e2bc",
        "white": "f4f4f2",
        "light blue": "b5daf5",
        "blue": "6fa3e0",
        "dark blue": "1c2f5e",
        "dark purple": "45296a",
        "purple": "9a86c4",
        "light purple": "dccff5",
    },
}

# The person's way to either side of the middle, in pixels: the widest hair style stays inside the picture.
REACH = 7
# Draw order. `head` has one layer, and a beard of "none" has none.
_ORDER = ("head", "garment", "beard", "mouth", "eyes", "hair")
# The head's gloss in the original art: its opacity decides how light a face is, and so how dark its shade.
_GLOSS = 0.36
# Pictures composed at a time: bounds memory at about 200 KiB a picture.
_BATCH = 512
_FOLDER = Path(__file__).parent


class Layers(NamedTuple):
    """The layers of one group, cut to the box that holds them all.

    Attributes:
        shares: float32 (values × phases, roles, height × width), the share of each role's colour in a pixel.
        base: float32 (values × phases, 3, height × width), colours of no role, premultiplied.
        clear: float32 (values × phases, 1, height × width), what is seen of what lies below.
        roles: places of these roles in the atlas's list of roles.
        box: top, bottom, left and right in pixels.
    """

    shares: torch.Tensor
    base: torch.Tensor
    clear: torch.Tensor
    roles: list[int]
    box: tuple[int, int, int, int]


class Atlas(NamedTuple):
    """All layers: names of roles, number of drawn shifts a pixel, and the layers of each group."""

    roles: list[str]
    phases: int
    groups: dict[str, Layers]


@cache
def load_atlas(device: str = "cpu") -> Atlas:
    """The atlas on a device.

    Raises:
        ValueError: if the atlas is not the one that `atlas.json` describes.
    """
    about = json.loads((_FOLDER / "atlas.json").read_text(encoding="utf-8"))
    data = lzma.decompress((_FOLDER / "atlas.xz").read_bytes())
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise ValueError("atlas.xz is not the one that atlas.json describes; run atlas.mjs again or restore both.")
    roles, phases, names = about["roles"], about["phases"], about["layers"]
    planes = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(
        len(names), phases, len(roles) + 4, IMAGE_SIZE, IMAGE_SIZE
    )
    groups = {}
    for group in _ORDER:
        values = [value for value in CATEGORICAL.get(group, ("head",)) if (group, value) != ("beard", "none")]
        layers = planes[[names.index(f"{group}/{value}") for value in values]].float() / 255
        if group == "beard":
            layers = torch.cat([torch.zeros_like(layers[:1]), layers])
        covered = layers[:, :, -1].amax((0, 1)) > 0
        rows, columns = covered.any(1).nonzero().flatten(), covered.any(0).nonzero().flatten()
        box = (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
        layers = layers[..., box[0] : box[1], box[2] : box[3]].flatten(0, 1).flatten(2).to(device)
        used = [place for place in range(len(roles)) if bool(layers[:, place].any())]
        base, clear = layers[:, -4:-1].contiguous(), 1 - layers[:, -1:]
        groups[group] = Layers(layers[:, used].contiguous(), base, clear, used, box)
    return Atlas(roles, phases, groups)


def colour(path: str, values: torch.Tensor) -> torch.Tensor:
    """Places on a path of `PATHS`, any shape (…) in [0, 1], to RGB (…, 3) in [0, 1]."""
    codes = PATHS[path].values()
    knots = torch.tensor([[int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)] for code in codes], device=values.device)
    place = values.clamp(0, 1) * (len(knots) - 1)
    low = place.floor().clamp(max=len(knots) - 2)
    part = (place - low)[..., None]
    index = low.long()
    return knots[index] * (1 - part) + knots[index + 1] * part


def place_of(path: str, name: str) -> float:
    """Where a named colour of `PATHS` lies on its path, in [0, 1]."""
    names = list(PATHS[path])
    return names.index(name) / (len(names) - 1)


def role_colours(factors: Factors) -> torch.Tensor:
    """Colours of the atlas's roles: (N, 9, 3), in the order skin, hair, cloth, each plain, with glow and with shade.

    Glow is the colour under an overlay of white, shade under an overlay of black, as SVG's blend modes define them.
    """
    rows = []
    for path in ("skin", "hair_colour", "clothes_hue"):
        plain = colour(path, factors[path].float())
        glow = (2 * plain).clamp(max=1)
        # The nose is the only shade on skin, and lies on the face's gloss.
        below = plain + _GLOSS * (glow - plain) if path == "skin" else plain
        rows += [plain, glow, (2 * below - 1).clamp(min=0)]
    return torch.stack(rows, dim=1)


def shift_of(position: torch.Tensor, phases: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions in [0, 1] as whole pixels to the right and drawn shares of a pixel, both int64."""
    steps = ((position.clamp(0, 1) * 2 - 1) * REACH * phases).round().long()
    return steps.div(phases, rounding_mode="floor"), steps % phases


def compose(factors: Factors, device: str | torch.device = "cpu") -> torch.Tensor:
    """Draw portraits.

    Args:
        factors: for every name in `FACTORS` a tensor of shape (N,): `CONTINUOUS` in [0, 1], `CATEGORICAL` as int64
            indices of their values.
        device: where to draw.

    Returns:
        float32 (N, 3, 64, 64) RGB in [0, 1] on that device.

    Raises:
        ValueError: if a factor is missing or the factors' lengths differ.
    """
    missing = [name for name in FACTORS if name not in factors]
    if missing or len({len(factors[name]) for name in FACTORS}) > 1:
        raise ValueError(f"Every factor needs a tensor of the same length; missing: {', '.join(missing) or 'none'}.")
    device = torch.device(device)
    atlas = load_atlas(str(device))
    moved = {name: factors[name].to(device) for name in FACTORS}
    batches = [
        _compose({name: values[start : start + _BATCH] for name, values in moved.items()}, atlas)
        for start in range(0, max(len(moved["skin"]), 1), _BATCH)
    ]
    return torch.cat(batches)


def _compose(factors: Factors, atlas: Atlas) -> torch.Tensor:
    """One batch of `compose`."""
    colours = role_colours(factors).transpose(1, 2)

    def paint(below: torch.Tensor, layers: Layers, index: torch.Tensor) -> None:
        painted = layers.base[index].baddbmm_(colours[:, :, layers.roles], layers.shares[index])
        below += painted.unflatten(2, below.shape[2:])

    figure = _stack(factors, atlas, 3, paint)
    ground = colour("background", factors["background"].float())
    return (figure[:, :3] + figure[:, 3:] * ground[:, :, None, None]).clamp(0, 1)


def role_shares(factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """What colours do to portraits: a picture is its base plus the sum over roles of share times colour.

    Args:
        factors: as `compose` takes them; `skin`, `hair_colour`, `clothes_hue` and `background` are not used.

    Returns:
        shares (N, 10, 64, 64) of the roles of `role_colours` and, last, of the background; base (N, 3, 64, 64).
    """
    device = factors["position"].device
    atlas = load_atlas(str(device))
    roles = len(atlas.roles)

    def paint(below: torch.Tensor, layers: Layers, index: torch.Tensor) -> None:
        for place, role in enumerate(layers.roles):
            below[:, role] += layers.shares[index, place].unflatten(1, below.shape[2:])
        below[:, roles:] += layers.base[index].unflatten(2, below.shape[2:])

    figure = _stack(factors, atlas, roles + 3, paint)
    return torch.cat([figure[:, :roles], figure[:, -1:]], dim=1), figure[:, roles:-1]


def _stack(
    factors: Factors, atlas: Atlas, channels: int, paint: Callable[[torch.Tensor, Layers, torch.Tensor], None]
) -> torch.Tensor:
    """Layers put on each other and moved to their position.

    Args:
        factors: categorical factors and positions, tensors of shape (N,) on the atlas's device.
        atlas: the layers.
        channels: number of channels that are painted.
        paint: adds to the part of the channels (N, channels, height, width) below a group what the group's layers of
            indices (N,) paint.

    Returns:
        (N, channels + 1, 64, 64); the last channel is what is seen of the background.
    """
    device, count = factors["position"].device, len(factors["position"])
    whole, phase = shift_of(factors["position"], atlas.phases)
    figure = torch.zeros(count, channels + 1, IMAGE_SIZE, IMAGE_SIZE, device=device)
    figure[:, -1] = 1
    for group in _ORDER:
        layers = atlas.groups[group]
        value = factors[group] if group in CATEGORICAL else torch.zeros_like(phase)
        index = value * atlas.phases + phase
        top, bottom, left, right = layers.box
        shape = (bottom - top, right - left)
        below = figure[:, :, top:bottom, left:right]
        below *= layers.clear[index].unflatten(2, shape)
        paint(below[:, :-1], layers, index)
    # No layer reaches the border at any shift, so columns that come around are empty.
    columns = (torch.arange(IMAGE_SIZE, device=device) - whole[:, None]) % IMAGE_SIZE
    return figure.gather(3, columns[:, None, None, :].expand_as(figure))


def draw(count: int, generator: torch.Generator, device: str | torch.device = "cpu") -> Factors:
    """Factors of `count` portraits, every factor uniform: for the autoencoder, which needs no captions.

    Args:
        count: number of portraits.
        generator: a generator on the CPU.
        device: where the tensors go.
    """
    factors = {name: torch.rand(count, generator=generator) for name in CONTINUOUS}
    for name, values in CATEGORICAL.items():
        factors[name] = torch.randint(len(values), (count,), generator=generator)
    return {name: values.to(device) for name, values in factors.items()}
