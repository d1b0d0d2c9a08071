"""Names for directions where the truth is known."""

from __future__ import annotations

import pytest
import torch

from elrond_core.directions import Directions
from elrond_core.errors import ElrondError
from elrond_core.prompt import occurrences
from elrond_core.provenance import Provenance
from elrond_core.steering.labels import Label, label, labelled, put_before

WORDS = ["large", "small", "red", "blue"]


def planted(rows: int = 1) -> tuple[Directions, torch.Tensor, torch.Tensor]:
    """Directions of size and hue in that order, hue turned round; moves of words share a large common part."""
    g = torch.Generator().manual_seed(0)
    size, hue, common = torch.linalg.qr(torch.randn(16 * rows, 3, generator=g)).Q.T.reshape(3, rows, 16)
    bare = torch.randn(rows, 16, generator=g)
    moves = torch.stack([size, -size, hue, -hue]) + 0.05 * torch.randn(4, rows, 16, generator=g)
    vectors = torch.stack([size, -hue])
    directions = Directions(vectors, torch.ones(2), {"name": "test"}, Provenance("Demo"), names=("", "mine"))
    return directions, bare, bare + moves + 5 * common


@pytest.mark.parametrize("rows", [1, 3])
def test_planted_words_are_found(rows: int) -> None:
    first, second = label(*planted(rows)[:1], WORDS, *planted(rows)[1:])
    assert (first.along[0][0], first.against[0][0], first.name) == ("large", "small", "small → large")
    assert (second.along[0][0], second.against[0][0]) == ("blue", "red")
    assert first.best[0] in ("large", "small") and abs(first.best[1]) > 0.9
    assert "large 0.9" in first.line() or "large 1.0" in first.line()


def test_names_that_are_there_stay_unless_asked() -> None:
    directions, bare, moved = planted()
    labels = label(directions, WORDS, bare, moved)
    assert labelled(directions, labels, 0.5, False).names == ("small → large", "mine")
    assert labelled(directions, labels, 0.5, True).names == ("small → large", "red → blue")
    assert labelled(directions, labels, 1.1, True).names == ("", "mine")


def test_one_end_only() -> None:
    assert Label((("red", 0.5),), ()).name == "→ red"
    assert Label((), (("red", 0.5),)).best == ("red", -0.5)
    assert (Label((), ()).name, Label((), ()).best) == ("", ("", 0.0))


def test_words_are_put_before_the_right_concept() -> None:
    for prompt, concept, place, wanted in (
        ("a cat and a Cat", "cat", 1, "a cat and a young Cat"),
        ("a (hot  dog:1.2)", "hot dog", 0, "a (young hot  dog:1.2)"),
        ("1girl, a girl", "girl", 0, "1girl, a young girl"),
    ):
        span = occurrences(prompt, concept)[place]
        text, moved = put_before(prompt, span, "young")
        assert text == wanted and moved.of(text) == span.of(prompt)


def test_encoders_that_do_not_fit() -> None:
    directions, bare, moved = planted(3)
    with pytest.raises(ElrondError, match="3 rows of 16, and this text encoder gives the concept 2 of 16"):
        label(directions, WORDS, bare[:2], moved[:, :2])
    with pytest.raises(ElrondError, match="cannot name directions"):
        label(directions, WORDS, bare, bare.expand(4, -1, -1))
