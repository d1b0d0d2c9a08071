"""Captions of portraits: what each word and noun means, captions in free order, and how a caption is read.

Every word stands for a set of values of one factor: an interval of a continuous factor, some values of a categorical
one. A noun for a person fixes some factors, narrows some and leaves the rest open. What a text says of a factor is the
intersection of what its words say. Factors drawn for a caption are uniform over that, and over everything where no word
and no noun narrows a factor. So the meaning of a text is exact, and `named` gives it.

A text is a row of noun phrases. The last word of each (its head) decides what the modifiers before it mean: "dark" is
one thing before "skin", another before "hair". Articles and prepositions mean nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cache

import torch

from .world import CATEGORICAL, CONTINUOUS, FACTORS, PATHS, Factors

# What a text allows of a factor: the ends of an interval, or indices of values.
Allowed = tuple[float, float] | frozenset[int]
Meaning = dict[str, Allowed]

# An interval narrower than this leaves no room to see a word in: such words are not combined.
_NARROWEST = 0.02


def _values(factor: str, names: str) -> Meaning:
    """Values of a categorical factor by names, separated by commas."""
    return {factor: frozenset(CATEGORICAL[factor].index(name.strip()) for name in names.split(","))}


def _around(path: str, first: str, last: str | None = None) -> Meaning:
    """The stretch of a path that is nearer to these colours (and those between them) than to others."""
    names = list(PATHS[path])
    step = 1 / (len(names) - 1)
    low, high = (names.index(name) * step for name in (first, last or first))
    return {path: (max(low - step / 2, 0.0), min(high + step / 2, 1.0))}


def _at(path: str, name: str) -> Meaning:
    """A colour of a path and nothing else."""
    place = list(PATHS[path]).index(name) / (len(PATHS[path]) - 1)
    return {path: (place, place)}


def both(first: Meaning, second: Meaning) -> Meaning | None:
    """What two meanings allow together; None if that is nothing, or next to nothing of an interval."""
    joined = dict(first)
    for factor, allowed in second.items():
        known = joined.get(factor)
        if known is None:
            joined[factor] = allowed
        elif isinstance(known, frozenset) and isinstance(allowed, frozenset):
            if not known & allowed:
                return None
            joined[factor] = known & allowed
        elif isinstance(known, tuple) and isinstance(allowed, tuple):
            low, high = max(known[0], allowed[0]), min(known[1], allowed[1])
            fixed = known[0] == known[1] or allowed[0] == allowed[1]
            if high < low or (high - low < _NARROWEST and not fixed):
                return None
            joined[factor] = (low, high)
    return joined


def _all(*meanings: Meaning) -> Meaning:
    joined: Meaning = {}
    for meaning in meanings:
        joined = {**joined, **meaning}
    return joined


_SKIN: dict[str, Meaning] = {
    "very pale": {"skin": (0.0, 0.1)},
    "pale": {"skin": (0.0, 0.2)},
    "fair": {"skin": (0.1, 0.35)},
    "light": {"skin": (0.0, 0.4)},
    "tan": {"skin": (0.3, 0.6)},
    "brown": {"skin": (0.55, 0.85)},
    "dark": {"skin": (0.7, 1.0)},
    "very dark": {"skin": (0.88, 1.0)},
}
_HAIR_COLOURS: dict[str, Meaning] = {
    **{name: _around("hair_colour", name) for name in PATHS["hair_colour"]},
    "grey": _around("hair_colour", "gray"),
    "blonde": _around("hair_colour", "blond"),
    "red": _around("hair_colour", "auburn", "ginger"),
    "dark": _around("hair_colour", "black", "brown"),
    "bright": _around("hair_colour", "green", "pink"),
}
_HAIR_STYLES: dict[str, Meaning] = {
    "short": _values("hair", "short"),
    "curly": _values("hair", "curly, afro"),
    "long": _values("hair", "long, very long"),
    "very long": _values("hair", "very long"),
    "straight": _values("hair", "bob, long, very long"),
    "tied": _values("hair", "pigtails, bun"),
}
_GARMENTS: dict[str, Meaning] = {
    "plain": _values("garment", "tee, turtleneck, dress"),
    "checkered": _values("garment", "checks"),
    "plaid": _values("garment", "checks"),
    "striped": _values("garment", "stripes"),
    "sleeveless": _values("garment", "dress"),
}
_CLOTHES_COLOURS: dict[str, Meaning] = {
    **{name: _around("clothes_hue", name) for name in PATHS["clothes_hue"]},
    "turquoise": _around("clothes_hue", "teal"),
    "violet": _around("clothes_hue", "purple"),
    "warm": _around("clothes_hue", "red", "yellow"),
    "cool": _around("clothes_hue", "teal", "purple"),
}
_BACKGROUNDS: dict[str, Meaning] = {
    **{name: _around("background", name) for name in PATHS["background"]},
    # A colour without a grade is all of its grades.
    "green": _around("background", "dark green", "light green"),
    "blue": _around("background", "light blue", "dark blue"),
    "purple": _around("background", "dark purple", "light purple"),
    "pale": _around("background", "light green", "light blue"),
    "dark": _around("background", "dark blue", "dark purple"),
    "lavender": _around("background", "light purple"),
}

# What a modifier means, by the kind of head it stands before.
MODIFIERS: dict[str, dict[str, Meaning]] = {
    "person": {
        "very pale": _SKIN["very pale"],
        "pale": _SKIN["pale"],
        "fair": _SKIN["fair"],
        "tan": _SKIN["tan"],
        **{f"{word} skinned": _SKIN[word] for word in ("light", "brown", "dark", "very dark")},
        "bald": _values("hair", "bald"),
        **{f"{word} haired": _HAIR_STYLES[word] for word in ("short", "curly", "long", "very long")},
        **{
            f"{word} haired": _HAIR_COLOURS[word]
            for word in ("gray", "black", "brown", "dark", "blue", "green", "pink")
        },
        **{word: _HAIR_COLOURS[word] for word in ("blond", "blonde", "ginger")},
        "winking": _values("eyes", "wink"),
        "sleeping": _values("eyes", "closed"),
        "cool": _values("eyes", "sunglasses"),
        "smiling": _values("mouth", "smile"),
        "grinning": _values("mouth", "grin"),
        "laughing": _values("mouth", "grin"),
        "happy": _values("mouth", "smile, grin"),
        "frowning": _values("mouth", "frown"),
        "sad": _values("mouth", "frown"),
        "surprised": _values("mouth", "open"),
        "shocked": _values("mouth", "open"),
        "bearded": _values("beard", "goatee, full"),
        "shaven": _values("beard", "none"),
    },
    "skin": _SKIN,
    "hair": {**_HAIR_STYLES, **_HAIR_COLOURS},
    "hairdo": _HAIR_COLOURS,
    "eyes": {"open": _values("eyes", "open"), "closed": _values("eyes", "closed")},
    "mouth": {"open": _values("mouth", "open")},
    "beard": {"full": _values("beard", "full")},
    "garment": {**_GARMENTS, **_CLOTHES_COLOURS},
    "background": _BACKGROUNDS,
    "side": {"far": {}},
    "thing": {},
}

# Nouns for what a person wears, has, or stands before, and for places: kind and meaning.
HEADS: dict[str, tuple[str, Meaning]] = {
    "skin": ("skin", {}),
    "hair": ("hair", {}),
    "curls": ("hairdo", _values("hair", "curly, afro")),
    "afro": ("hairdo", _values("hair", "afro")),
    "bob": ("hairdo", _values("hair", "bob")),
    "pigtails": ("hairdo", _values("hair", "pigtails")),
    "bun": ("hairdo", _values("hair", "bun")),
    "mohawk": ("hairdo", _values("hair", "mohawk")),
    "cap": ("thing", _values("hair", "cap")),
    "beanie": ("thing", _values("hair", "beanie")),
    "hat": ("thing", _values("hair", "cap, beanie")),
    "eyes": ("eyes", {}),
    "glasses": ("thing", _values("eyes", "glasses")),
    "sunglasses": ("thing", _values("eyes", "sunglasses")),
    "shades": ("thing", _values("eyes", "sunglasses")),
    "mouth": ("mouth", {}),
    "smile": ("thing", _values("mouth", "smile")),
    "grin": ("thing", _values("mouth", "grin")),
    "frown": ("thing", _values("mouth", "frown")),
    "lipstick": ("thing", _values("mouth", "lips")),
    "moustache": ("thing", _values("beard", "moustache")),
    "mustache": ("thing", _values("beard", "moustache")),
    "goatee": ("thing", _values("beard", "goatee")),
    "beard": ("beard", _values("beard", "goatee, full")),
    "shirt": ("garment", _values("garment", "tee, checks, stripes")),
    "tee": ("garment", _values("garment", "tee")),
    "flannel": ("garment", _values("garment", "checks")),
    "sweater": ("garment", _values("garment", "stripes, turtleneck")),
    "turtleneck": ("garment", _values("garment", "turtleneck")),
    "jacket": ("garment", _values("garment", "jacket")),
    "suit": ("garment", _values("garment", "jacket")),
    "dress": ("garment", _values("garment", "dress")),
    "clothes": ("garment", {}),
    "outfit": ("garment", {}),
    "background": ("background", {}),
    "backdrop": ("background", {}),
    "wall": ("background", {}),
    "curtain": ("background", {}),
    "sky": ("background", _around("background", "light blue", "dark blue")),
    "forest": ("background", _around("background", "dark green", "green")),
    "meadow": ("background", _around("background", "green", "light green")),
    "snow": ("background", _around("background", "white")),
    "left": ("side", {"position": (0.0, 0.3)}),
    "right": ("side", {"position": (0.7, 1.0)}),
    "middle": ("side", {"position": (0.35, 0.65)}),
    "center": ("side", {"position": (0.35, 0.65)}),
}
# "far" says more of a side than a modifier of its own could.
_FAR: dict[str, Meaning] = {"left": {"position": (0.0, 0.12)}, "right": {"position": (0.88, 1.0)}}

_MAN = _all(
    _values("hair", "bald, short, curly, afro, long, mohawk, cap, beanie"),
    _values("mouth", "smile, frown, open, grin"),
    _values("garment", "tee, checks, stripes, jacket, turtleneck"),
)
_WOMAN = _all(
    _values("hair", "short, curly, afro, bob, long, very long, pigtails, bun, beanie"),
    _values("beard", "none"),
)
_TWIN = _all(
    _at("skin", "fair"),
    _at("hair_colour", "ginger"),
    _at("clothes_hue", "green"),
    _values("hair", "short"),
    _values("eyes", "open"),
    _values("mouth", "smile"),
    _values("beard", "none"),
    _values("garment", "tee"),
)

# Nouns for people: what each fixes or narrows.
NOUNS: dict[str, Meaning] = {
    "person": {},
    "human": {},
    "man": _MAN,
    "guy": _MAN,
    "woman": _WOMAN,
    "lady": _WOMAN,
    "boy": _all(
        _values("hair", "short, curly, afro, cap, beanie"),
        _values("mouth", "smile, frown, open, grin"),
        _values("beard", "none"),
        _values("garment", "tee, checks, stripes"),
    ),
    "girl": _all(
        _values("hair", "bob, long, very long, pigtails, bun"),
        _values("beard", "none"),
        _values("garment", "tee, stripes, dress"),
    ),
    "singer": _all(_values("eyes", "closed"), _values("mouth", "open")),
    "teacher": _all(_values("eyes", "glasses"), _values("beard", "none"), _values("garment", "jacket")),
    "punk": _all(
        _around("hair_colour", "green", "pink"),
        _values("hair", "mohawk"),
        _values("garment", "jacket"),
        _values("mouth", "frown"),
    ),
    "grandfather": _all(
        _at("hair_colour", "silver"),
        _values("hair", "bald"),
        _values("eyes", "glasses"),
        _values("beard", "moustache, full"),
    ),
    "grandmother": _all(
        _at("hair_colour", "silver"), _values("hair", "bun"), _values("eyes", "glasses"), _values("beard", "none")
    ),
    "sailor": _all(
        _at("clothes_hue", "blue"), _values("hair", "cap"), _values("beard", "full"), _values("garment", "stripes")
    ),
    "farmer": _all(
        _at("clothes_hue", "red"),
        _values("hair", "beanie"),
        _values("beard", "moustache"),
        _values("garment", "checks"),
    ),
    "dancer": _all(
        _at("clothes_hue", "pink"),
        _values("hair", "bun"),
        _values("mouth", "lips"),
        _values("beard", "none"),
        _values("garment", "dress"),
    ),
    "wizard": _all(
        _at("hair_colour", "silver"),
        _at("clothes_hue", "purple"),
        _values("hair", "very long"),
        _values("beard", "full"),
        _values("garment", "turtleneck"),
    ),
    "monk": _all(
        _at("clothes_hue", "orange"),
        _values("hair", "bald"),
        _values("eyes", "closed"),
        _values("beard", "none"),
        _values("garment", "tee"),
        _values("mouth", "smile"),
    ),
    "clown": _all(
        _at("skin", "pale"),
        _at("hair_colour", "green"),
        _values("hair", "afro"),
        _values("mouth", "grin"),
        _values("beard", "none"),
        _values("garment", "stripes"),
    ),
    "spy": _all(
        _at("hair_colour", "black"),
        _at("clothes_hue", "blue"),
        _values("hair", "short"),
        _values("eyes", "sunglasses"),
        _values("mouth", "frown"),
        _values("beard", "none"),
        _values("garment", "jacket"),
    ),
    "pirate": _all(
        _at("hair_colour", "auburn"),
        _at("clothes_hue", "red"),
        _values("hair", "long"),
        _values("eyes", "wink"),
        _values("mouth", "grin"),
        _values("beard", "goatee"),
        _values("garment", "stripes"),
    ),
    "twin": _TWIN,
    "clone": _all(_TWIN, _at("clothes_hue", "yellow"), {"position": (0.5, 0.5)}, _values("mouth", "frown")),
    "doll": _all(
        _at("skin", "pale"),
        _at("hair_colour", "blond"),
        _at("background", "white"),
        {"position": (0.5, 0.5)},
        _values("hair", "pigtails"),
        _values("eyes", "open"),
        _values("mouth", "lips"),
        _values("beard", "none"),
        _values("garment", "dress"),
    ),
}
EVERYTHING: Meaning = {
    **dict.fromkeys(CONTINUOUS, (0.0, 1.0)),
    **{name: frozenset(range(len(values))) for name, values in CATEGORICAL.items()},
}


def is_open(allowed: Allowed) -> bool:
    """Whether more than one value is allowed."""
    return len(allowed) > 1 if isinstance(allowed, frozenset) else allowed[0] < allowed[1]


# The factors that a noun leaves open, in the order of `FACTORS`; their number is the concept's true complexity.
OPEN: dict[str, tuple[str, ...]] = {
    noun: tuple(factor for factor in FACTORS if is_open(meaning.get(factor, EVERYTHING[factor])))
    for noun, meaning in NOUNS.items()
}

_LEADS = ("", "", "portrait of ", "a portrait of ", "picture of ", "a picture of ", "photo of ", "a drawing of ")
# Words that mean nothing by themselves.
_FILLERS = frozenset(
    (
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "with",
        "and",
        "wearing",
        "against",
        "front",
        "portrait",
        "picture",
        "photo",
        "drawing",
        "image",
    )
)
_PLURAL = frozenset(
    ["skin", "hair", "curls", "pigtails", "eyes", "glasses", "sunglasses", "shades", "lipstick", "clothes", "snow"]
)
# Prepositions of backgrounds that a person is not "on".
_BEFORE = {
    "curtain": ("against", "in front of"),
    "wall": ("against", "in front of"),
    "sky": ("against", "in front of"),
    "forest": ("in", "in front of"),
    "meadow": ("on", "in"),
    "snow": ("in",),
}
_WORN = frozenset(["cap", "beanie", "hat", "glasses", "sunglasses", "shades"])

WORDS: tuple[str, ...] = tuple(
    sorted(
        _FILLERS
        | set(NOUNS)
        | set(HEADS)
        | {word for table in MODIFIERS.values() for modifier in table for word in modifier.split()}
    )
)


def named(text: str) -> Meaning:
    """What a text says.

    Args:
        text: noun phrases of the words in `WORDS`; commas and brackets are passed over.

    Returns:
        for each factor that a word or noun of the text narrows, what they allow together: the ends of an interval for a
        continuous factor, indices of values for a categorical one. A factor that is missing is open.

    Raises:
        ValueError: for a word that is none of the captions', or has no meaning where it stands, and for words that
            contradict each other.
    """
    meaning: Meaning = {}
    waiting: list[str] = []
    for word in text.lower().translate(str.maketrans(",.[]", "    ")).split():
        if word in NOUNS:
            parts = [NOUNS[word], *_modifiers("person", waiting, text)]
        elif word in HEADS:
            kind, own = HEADS[word]
            own = _FAR[word] if "far" in waiting and word in _FAR else own
            parts = [own, *_modifiers(kind, waiting, text)]
        elif word in _FILLERS:
            continue
        else:
            waiting.append(word)
            continue
        waiting = []
        for part in parts:
            joined = both(meaning, part)
            if joined is None:
                raise ValueError(f"{text!r}: {word!r} contradicts what else the text says; take one of the words out.")
            meaning = joined
    if waiting:
        raise ValueError(
            f"{text!r}: {' '.join(waiting)!r} stands before no noun that it could describe; use the captions' words."
        )
    return meaning


def _modifiers(kind: str, words: list[str], text: str) -> list[Meaning]:
    """Meanings of the modifiers before a head, the longest match first."""
    table, meanings, start = MODIFIERS[kind], [], 0
    while start < len(words):
        length = next((n for n in (3, 2, 1) if " ".join(words[start : start + n]) in table), 0)
        if not length:
            raise ValueError(f"{text!r}: {words[start]!r} means nothing there; use the captions' words.")
        meanings.append(table[" ".join(words[start : start + length])])
        start += length
    return meanings


def allows(allowed: Allowed, values: torch.Tensor, slack: float = 0.0) -> torch.Tensor:
    """Whether values of a factor, shape (N,), are allowed: (N,) bool. `slack` widens an interval at both ends."""
    if isinstance(allowed, frozenset):
        return torch.isin(values, torch.tensor(sorted(allowed), device=values.device))
    return (values >= allowed[0] - slack) & (values <= allowed[1] + slack)


def draw_factors(meanings: list[Meaning], generator: torch.Generator) -> Factors:
    """Factors uniform over what each meaning allows: tensors of shape (N,), as `compose` takes them."""
    factors: Factors = {}
    for factor in CONTINUOUS:
        ends = torch.tensor([meaning.get(factor, (0.0, 1.0)) for meaning in meanings]).view(-1, 2)
        factors[factor] = ends[:, 0] + torch.rand(len(ends), generator=generator) * (ends[:, 1] - ends[:, 0])
    for factor in CATEGORICAL:
        # Every set of values that occurs becomes a row of one table.
        sets: dict[Allowed, int] = {}
        said = [meaning.get(factor, EVERYTHING[factor]) for meaning in meanings]
        rows = torch.tensor([sets.setdefault(allowed, len(sets)) for allowed in said], dtype=torch.int64)
        width = max((len(allowed) for allowed in sets), default=1)
        table = torch.tensor([(sorted(allowed) * width)[:width] for allowed in sets]).view(-1, width)
        sizes = torch.tensor([len(allowed) for allowed in sets])
        picks = (torch.rand(len(meanings), generator=generator) * sizes[rows]).long().clamp(max=sizes[rows] - 1)
        factors[factor] = table[rows, picks]
    return factors


# A phrase: where it goes in the caption, its text, and what it says.
Phrase = tuple[str, str, Meaning]


def _article(text: str) -> str:
    if text.split()[-1] in _PLURAL:
        return text
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _phrases(place: str, kind_of_heads: Iterable[str], tables: list[dict[str, Meaning]]) -> list[Phrase]:
    """Every head with one modifier of each table before it."""
    phrases: list[Phrase] = []
    for head in kind_of_heads:
        rows: list[tuple[str, Meaning]] = [(head, HEADS[head][1])]
        for table in reversed(tables):
            grown = []
            for text, meaning in rows:
                for word, extra in table.items():
                    joined = both(meaning, extra)
                    if joined is not None:
                        grown.append((f"{word} {text}", joined))
            rows = grown
        phrases += [(place, _article(text), meaning) for text, meaning in rows]
    return phrases


def _adjectives(factor: str) -> list[Phrase]:
    return [("before", word, meaning) for word, meaning in MODIFIERS["person"].items() if factor in meaning]


def _of_kind(*kinds: str) -> list[str]:
    return [head for head, (kind, _) in HEADS.items() if kind in kinds]


def _naming(factor: str) -> list[str]:
    return [head for head in _of_kind("thing") if factor in HEADS[head][1]]


@cache
def _catalogue() -> dict[str, list[list[Phrase]]]:
    """All phrases by what they name; each entry holds groups of phrases that are drawn equally often."""
    garments, grounds = _of_kind("garment"), _of_kind("background")
    any_garment = [head for head in garments if not HEADS[head][1]]
    any_ground = [head for head in grounds if not HEADS[head][1]]
    scenes = [head for head in grounds if HEADS[head][1]]
    hairdos = _of_kind("hairdo")
    return {
        "skin": [_adjectives("skin"), _phrases("with", ["skin"], [_SKIN])],
        "hair": [
            _adjectives("hair"),
            _phrases("with", ["hair"], [_HAIR_STYLES]),
            _phrases("with", hairdos, []),
            _phrases("with", _naming("hair"), []),
        ],
        "hair_colour": [_adjectives("hair_colour"), _phrases("with", ["hair"], [_HAIR_COLOURS])],
        "hair hair_colour": [
            _phrases("with", ["hair"], [_HAIR_STYLES, _HAIR_COLOURS]),
            _phrases("with", hairdos, [_HAIR_COLOURS]),
        ],
        "eyes": [
            _adjectives("eyes"),
            _phrases("with", ["eyes"], [MODIFIERS["eyes"]]),
            _phrases("with", _naming("eyes"), []),
            _phrases("with", _naming("eyes"), []),
        ],
        "mouth": [
            _adjectives("mouth"),
            _phrases("with", ["mouth"], [MODIFIERS["mouth"]]) + _phrases("with", _naming("mouth"), []),
        ],
        "beard": [
            _adjectives("beard"),
            _phrases("with", _naming("beard"), []),
            _phrases("with", ["beard"], []) + _phrases("with", ["beard"], [MODIFIERS["beard"]]),
        ],
        "garment": [
            _phrases("in", [head for head in garments if HEADS[head][1]], []),
            _phrases("in", garments, [_GARMENTS]),
        ],
        "clothes_hue": [_phrases("in", any_garment, [_CLOTHES_COLOURS])],
        "garment clothes_hue": [
            _phrases("in", [head for head in garments if HEADS[head][1]], [_CLOTHES_COLOURS]),
            _phrases("in", garments, [_CLOTHES_COLOURS, _GARMENTS]),
        ],
        "background": [
            _phrases("on", any_ground, [_BACKGROUNDS]),
            _phrases("on", scenes, []) + _phrases("on", scenes, [_BACKGROUNDS]),
        ],
        "position": [
            [("at", f"on the {side}", HEADS[side][1]) for side in ("left", "right")]
            + [("at", f"in the {side}", HEADS[side][1]) for side in ("middle", "center")]
            + [("at", f"on the far {side}", meaning) for side, meaning in _FAR.items()],
        ],
    }


@cache
def _sayable(noun: str) -> dict[str, list[list[Phrase]]]:
    """The catalogue's phrases that do not contradict a noun, with what they and the noun allow together."""
    fitting = {}
    for names, groups in _catalogue().items():
        kept = []
        # Nobody says of a woman that she is shaven.
        beardless = names == "beard" and NOUNS[noun].get("beard") == _values("beard", "none")["beard"]
        for group in [] if beardless else groups:
            phrases = []
            for place, text, meaning in group:
                own = {factor: NOUNS[noun][factor] for factor in meaning if factor in NOUNS[noun]}
                joined = both(own, meaning)
                if joined is not None:
                    phrases.append((place, text, joined))
            if phrases:
                kept.append(phrases)
        fitting[names] = kept
    return fitting


class Captions:
    """Draws captions and factors that fit them, repeatably from a seed.

    Args:
        seed: where the random numbers start.
    """

    # Shares of factors that a caption names. Each caption draws one: bare nouns and full descriptions are both common.
    SHARES = (0.0, 0.15, 0.35, 0.6)

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        # A noun is drawn as often as it has open factors: there is more to learn of it.
        self._nouns = [noun for noun, factors in OPEN.items() for _ in factors]

    def batch(self, count: int, noun: str | None = None, share: float | None = None) -> tuple[list[str], Factors]:
        """Captions and factors.

        Args:
            count: number of captions.
            noun: the noun of all; by default nouns are drawn.
            share: the share of factors that is named; by default one of `SHARES` is drawn for each caption.

        Returns:
            the texts, and factors of shape (count,) that are uniform over what each text allows.
        """
        drawn = [self._draw(noun, share) for _ in range(count)]
        return [text for text, _ in drawn], draw_factors([meaning for _, meaning in drawn], self._generator)

    def _draw(self, noun: str | None, share: float | None) -> tuple[str, Meaning]:
        """A caption and what it says."""
        rng = self._random.random
        noun = noun or self._nouns[int(rng() * len(self._nouns))]
        share = self.SHARES[int(rng() * len(self.SHARES))] if share is None else share
        meaning = dict(NOUNS[noun])
        parts: dict[str, list[str]] = {"before": [], "with": [], "in": [], "on": [], "at": []}
        if share:
            sayable = _sayable(noun)
            for names in _named_together(rng, share):
                groups = sayable[names]
                if not groups:
                    continue
                group = groups[int(rng() * len(groups))]
                place, text, says = group[int(rng() * len(group))]
                parts[place].append(text)
                meaning.update(says)
        return self._sentence(noun, parts), meaning

    def _sentence(self, noun: str, parts: dict[str, list[str]]) -> str:
        """Phrases in an order that English allows."""
        rng, shuffle = self._random.random, self._random.shuffle
        before = parts["before"]
        if len(before) > 1:
            shuffle(before)
        person = _article(" ".join([*before, noun]))
        tail = []
        having = parts["with"]
        if having:
            if len(having) > 1:
                shuffle(having)
            listed = having[0] if len(having) == 1 else f"{', '.join(having[:-1])} and {having[-1]}"
            verb = "wearing" if rng() < 0.5 and all(text.split()[-1] in _WORN for text in having) else "with"
            tail.append(f"{verb} {listed}")
        if parts["in"]:
            tail.append(f"{'in' if rng() < 0.6 else 'wearing'} {parts['in'][0]}")
        tail += parts["at"]
        if len(tail) > 1:
            shuffle(tail)
        lead = _LEADS[int(rng() * len(_LEADS))]
        text = " ".join([lead + person, *tail])
        if not parts["on"]:
            return text
        ground, style = parts["on"][0], rng()
        if style < 0.3:
            return f"{text}, {ground.removeprefix('an ').removeprefix('a ')}"
        prepositions = _BEFORE.get(ground.split()[-1], ("on", "against", "in front of"))
        where = f"{prepositions[int(rng() * len(prepositions))]} {ground}"
        if style < 0.45 and not lead:
            return f"{where}, {text}"
        if style < 0.6 and tail:
            return f"{lead}{person} {where} {' '.join(tail)}"
        return f"{text} {where}"


# Pairs of factors that one phrase can name: the style or kind, and its colour.
_PAIRS = (("hair", "hair_colour"), ("garment", "clothes_hue"))
_SINGLE = ("skin", "eyes", "mouth", "beard", "background", "position")


def _named_together(rng: Callable[[], float], share: float) -> list[str]:
    """Which factors are named: entries of the catalogue, each factor with the same chance."""
    names = [factor for factor in _SINGLE if rng() < share]
    for pair in _PAIRS:
        chosen = [factor for factor in pair if rng() < share]
        if chosen:
            names.append(" ".join(chosen))
    return names
