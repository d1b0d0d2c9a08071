"""Phrases in prompts, and what they do to a concept's rows."""

import pytest
import torch

from elrond_core.decompose.contrasts import Contrast, PhraseRows, displacements
from elrond_core.decompose.phrasings import phrasings
from elrond_core.errors import ElrondError
from elrond_core.prompt import find_word

NAMES = ["noun", "first", "mention", "clause", "last"]


@pytest.mark.parametrize(
    ("phrase", "texts"),
    [
        (
            "very old",
            [
                "a (very old hot dog:1.2), a cat",
                "very old, a (hot dog:1.2), a cat",
                "very old hot dog, a (hot dog:1.2), a cat",
                "a (hot dog that is very old:1.2), a cat",
                "a (hot dog:1.2), a cat, very old",
            ],
        ),
        (
            "in the snow",
            [
                "a (hot dog in the snow:1.2), a cat",
                "in the snow, a (hot dog:1.2), a cat",
                "hot dog in the snow, a (hot dog:1.2), a cat",
                "a (hot dog, in the snow,:1.2), a cat",
                "a (hot dog:1.2), a cat, in the snow",
            ],
        ),
    ],
)
def test_phrases_stand_where_grammar_has_them(phrase: str, texts: list[str]) -> None:
    prompt = "a (hot dog:1.2), a cat"
    found = phrasings(prompt, find_word(prompt, "hot dog"), phrase)
    assert list(found) == NAMES
    assert [each.text for each in found.values()] == texts
    assert all(each.span.of(each.text) == "hot dog" for each in found.values())
    # The concept that is steered, and not its mention.
    assert found["mention"].span.start == texts[2].rindex("hot dog")


def rows(**phrased: dict[str, list[list[float]]]) -> PhraseRows:
    """Rows of two tokens of width 3, without a phrase at zero."""
    return PhraseRows(
        torch.zeros(2, 3),
        {phrase: {name: torch.tensor(row) for name, row in by_name.items()} for phrase, by_name in phrased.items()},
    )


X, Y, Z = torch.eye(3).tolist()
NOTHING = [0.0, 0.0, 0.0]


def test_what_a_phrasing_does_cancels_and_the_rest_is_averaged() -> None:
    """In "first" every phrase adds Z; "last" does not reach the concept; "clause" is known of one side only."""
    both = rows(
        dark={"noun": [X, NOTHING], "first": [Z, Z], "last": [NOTHING] * 2, "clause": [Z, Z]},
        bright={"noun": [NOTHING, Y], "first": [Z, [0.0, 1.0, 1.0]], "last": [NOTHING] * 2},
    )
    moved = displacements(both, [Contrast("bright", "dark")], (2, 3))
    # noun: (-X, Y), first: (0, Y).
    assert moved.tolist() == [[-0.5, 0.0, 0.0, 0.0, 1.0, 0.0]]
    assert displacements(both, [Contrast("bright", "dark")], (1, 3)).tolist() == [[-0.25, 0.5, 0.0]]


def test_a_phrase_alone_is_compared_with_none_without_what_any_phrase_does() -> None:
    three = rows(
        dark={"noun": [[1.0, -1.0, 0.0]] * 2},
        bright={"noun": [[1.0, 1.0, 0.0]] * 2},
        furry={"noun": [[1.0, 0.0, 1.0]] * 2},
    )
    pair = Contrast("bright", "dark")
    assert displacements(three, [Contrast("furry"), pair], (1, 3)).tolist() == [Z, [0.0, 2.0, 0.0]]
    assert displacements(three, [Contrast("furry")], (1, 3), [pair]).tolist() == [Z]
    assert displacements(three, [Contrast("furry")], (1, 3)).tolist() == [[1.0, 0.0, 1.0]]


def test_what_cannot_be_compared_is_refused() -> None:
    apart = rows(dark={"noun": [X, X]}, bright={"last": [X, X]})
    with pytest.raises(ElrondError, match="No phrasing holds both sides of 'dark → bright'"):
        displacements(apart, [Contrast("bright", "dark")], (2, 3))
    with pytest.raises(ElrondError, match="3 rows of 3, and this text encoder gives the concept 2 of 3"):
        displacements(apart, [Contrast("bright")], (3, 3))
    with pytest.raises(ElrondError, match="2 rows of 4, and this text encoder"):
        displacements(apart, [Contrast("bright")], (2, 4))
    still = rows(dark={"noun": [NOTHING] * 2}, bright={"noun": [NOTHING] * 2})
    with pytest.raises(ElrondError, match="No phrase changes the concept's rows"):
        displacements(still, [Contrast("bright", "dark")], (2, 3))


def test_names_lead_from_negative_to_positive() -> None:
    assert Contrast("bright", "dark").name == "dark → bright" and Contrast("furry").name == "→ furry"
