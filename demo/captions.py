"""The captions of the demo world: concept nouns, the factors each leaves open, and the words that name a value.

A caption is "a", any number of attribute words in any order, and a noun. The noun fixes some factors and leaves
others open; an attribute word names a window of an open factor, and an open factor nobody names is uniform. So the
number of factors a noun leaves open is the true complexity of its concept.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from .world import CONTINUOUS, FACTORS, SHAPES

# Windows leave gaps, so that a drawn value is well inside its word; a measured value belongs to the nearest window.
WORDS: dict[str, dict[str, tuple[float, float]]] = {
    "shape": {"round": (0, 0), "square": (1, 1), "pointed": (2, 2)},
    "hue": {"red": (0.0, 0.13), "yellow": (0.22, 0.31), "green": (0.41, 0.60), "blue": (0.72, 1.0)},
    "size": {"small": (0.0, 0.35), "large": (0.65, 1.0)},
    "x": {"left": (0.0, 0.26), "central": (0.37, 0.63), "right": (0.74, 1.0)},
    "y": {"top": (0.0, 0.26), "middle": (0.37, 0.63), "bottom": (0.74, 1.0)},
    "background": {"dark": (0.0, 0.26), "gray": (0.37, 0.63), "bright": (0.74, 1.0)},
}

# What each noun fixes; every other factor is open.
NOUNS: dict[str, dict[str, float]] = {
    "sun": {"shape": 0, "hue": 0.25, "size": 0.9, "x": 0.5, "y": 0.15},
    "lift": {"shape": 1, "hue": 0.9, "size": 0.5, "x": 0.2, "background": 0.7},
    "moon": {"shape": 0, "hue": 0.3, "size": 0.4, "y": 0.2},
    "frog": {"shape": 2, "hue": 0.5, "y": 0.9, "background": 0.4},
    "bird": {"shape": 2, "size": 0.2, "background": 0.8},
    "house": {"shape": 1, "x": 0.6, "y": 0.7},
    "ball": {"shape": 0, "background": 0.5},
    "tree": {"hue": 0.45, "y": 0.6},
    "box": {"shape": 1},
    "sign": {"size": 0.6},
    "thing": {},
}


def open_factors(noun: str) -> tuple[str, ...]:
    """The factors a concept leaves open, in the order of `FACTORS`."""
    return tuple(name for name in FACTORS if name not in NOUNS[noun])


def word_of(factor: str, values: torch.Tensor) -> list[str]:
    """The word whose window is nearest to each value (ties to the lower); any real value is allowed."""
    words = WORDS[factor]
    centres = torch.tensor([[low, high] for low, high in words.values()], dtype=torch.float32)
    value = values.float()[:, None]
    distance = torch.clamp(torch.maximum(centres[:, 0] - value, value - centres[:, 1]), min=0)
    names = list(words)
    return [names[index] for index in distance.argmin(dim=1).tolist()]


@dataclass
class Caption:
    """A caption and what it promises.

    Attributes:
        text: what the text encoder reads.
        bare: the same with the attributes left out.
        noun: the concept word.
        named: factor to attribute word.
        share: factor to how far its word holds, above 0; 1 is wholly, and at 2 the window has shrunk to its end. A
            factor that is not here holds wholly.
        across: whether words hold by moving away from their opposites rather than from no word.
    """

    text: str
    bare: str
    noun: str
    named: dict[str, str]
    share: dict[str, float] = field(default_factory=dict)
    across: bool = False


def compose(noun: str, words: list[str]) -> Caption:
    """The caption of a noun with attribute words before it.

    Raises:
        KeyError: for a word the world does not know.
    """
    factor_of = {word: factor for factor, words_ in WORDS.items() for word in words_}
    named = {factor_of[word]: word for word in words}
    return Caption(" ".join(["a", *words, noun]), f"a {noun}", noun, named)


def draw_caption(generator: torch.Generator) -> Caption:
    """A random caption: noun by the number of its open factors, number of named attributes uniform, order random."""
    nouns = list(NOUNS)
    weights = torch.tensor([float(len(open_factors(noun))) for noun in nouns])
    noun = nouns[int(torch.multinomial(weights, 1, generator=generator))]
    free = open_factors(noun)
    count = int(torch.randint(len(free) + 1, (1,), generator=generator))
    chosen = [free[i] for i in torch.randperm(len(free), generator=generator)[:count].tolist()]
    words = []
    for factor in chosen:
        options = list(WORDS[factor])
        words.append(options[int(torch.randint(len(options), (1,), generator=generator))])
    return compose(noun, words)


def draw_shaded_caption(generator: torch.Generator) -> Caption:
    """A random caption whose words hold in part only, from hardly to nearly wholly."""
    caption = draw_caption(generator)
    shares = torch.rand(len(caption.named), generator=generator).tolist()
    return replace(caption, share=dict(zip(caption.named, shares, strict=True)))


def opposite(factor: str, word: str) -> str | None:
    """The word at the other end of a continuous factor; None for one that is not at an end, and for shapes."""
    words = list(WORDS[factor])
    ends = {words[0]: words[-1], words[-1]: words[0]}
    return None if factor == "shape" else ends.get(word)


def draw_slid_caption(generator: torch.Generator) -> Caption:
    """A random caption whose words lie on a line with their opposites, from hardly there to beyond wholly."""
    caption = draw_caption(generator)
    while any(opposite(factor, word) is None for factor, word in caption.named.items()):
        caption = draw_caption(generator)
    shares = (2 * torch.rand(len(caption.named), generator=generator)).tolist()
    return replace(caption, share=dict(zip(caption.named, shares, strict=True)), across=True)


def window(caption: Caption, factor: str) -> tuple[float, float]:
    """The interval a continuous factor is uniform on.

    A point if the noun fixes it, [0, 1] if nobody names it, the word's own if it is named; where the word holds in
    part, its ends lie in proportion between, and where it more than holds, between its own and the end of the range.
    """
    if factor in NOUNS[caption.noun]:
        return (NOUNS[caption.noun][factor],) * 2
    if factor not in caption.named:
        return 0.0, 1.0
    share = caption.share.get(factor, 1.0)
    low, high = WORDS[factor][caption.named[factor]]
    if share > 1:
        return (low + (share - 1) * (1 - low), high) if high == 1 else (low, (2 - share) * high)
    return share * low, 1 + share * (high - 1)


def draw_shape(caption: Caption, generator: torch.Generator) -> int:
    """A shape that fulfils a caption; a word that holds in part, with that probability."""
    drawn = int(torch.randint(len(SHAPES), (1,), generator=generator))
    holds = float(torch.rand(1, generator=generator)) < caption.share.get("shape", 1.0)
    if "shape" in NOUNS[caption.noun]:
        return int(NOUNS[caption.noun]["shape"])
    return int(WORDS["shape"][caption.named["shape"]][0]) if "shape" in caption.named and holds else drawn


def draw_factors(captions: list[Caption], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Factors that fulfil captions, one image each; shapes and dtypes as `world.render` takes them."""
    out = {"shape": torch.tensor([draw_shape(caption, generator) for caption in captions])}
    for name in CONTINUOUS:
        low, high = torch.tensor([window(caption, name) for caption in captions]).unbind(1)
        out[name] = low + (high - low) * torch.rand(len(captions), generator=generator)
    return out
