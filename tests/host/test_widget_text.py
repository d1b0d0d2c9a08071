"""Lists that people type."""

from __future__ import annotations

import pytest
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.nodes.widget_text import ANY_COUNT, indices_of, numbers_of, strengths_of, windows_of, words_of


@pytest.mark.parametrize(
    ("text", "found"), [("", [0, 1, 2, 3]), ("2", [2]), (" 3, 0 - 1 ", [3, 0, 1]), ("1;2\n0", [1, 2, 0])]
)
def test_indices(text: str, found: list[int]) -> None:
    assert indices_of(text, 4) == found


def test_indices_of_a_set_that_is_not_known_yet() -> None:
    assert len(indices_of("0-999999", ANY_COUNT)) == ANY_COUNT
    with pytest.raises(ElrondError, match="'x' is not a direction"):
        indices_of("0, x", ANY_COUNT)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a", "'a' is not a direction"),
        ("-1", "'-1' is not a direction"),
        ("4", "no directions 4: this set holds 0 to 3"),
        ("2-1", "2-1 runs backwards"),
        ("0-9999999", "is not a direction"),
        ("1, 0-2", "Direction 1 is listed twice"),
    ],
)
def test_indices_that_cannot_be(text: str, sentence: str) -> None:
    with pytest.raises(ElrondError, match=sentence):
        indices_of(text, 4)


def test_numbers_and_strengths() -> None:
    assert numbers_of("1, -0.5\n2e-1") == [1.0, -0.5, 0.2]
    assert strengths_of(" 0: 0.5, 3=-.25;\n7: +1 ") == {0: 0.5, 3: -0.25, 7: 1.0}
    assert strengths_of("") == {}
    with pytest.raises(ElrondError, match="'x' is not a number"):
        numbers_of("1, x")
    for text, sentence in (("0.5", "is not a direction and its strength"), ("1: 2, 1: 3", "listed twice")):
        with pytest.raises(ElrondError, match=sentence):
            strengths_of(text)


def test_a_direction_may_have_a_part_of_the_sampling_of_its_own() -> None:
    text = "0: 0.5 @ 0-0.4, 3=-2e-1@.25 - 1; 7: +1"
    assert strengths_of(text) == {0: 0.5, 3: -0.2, 7: 1.0}
    assert windows_of(text) == {0: (0.0, 0.4), 3: (0.25, 1.0)}
    assert windows_of("") == windows_of("0: 0.5, 3: -0.2") == {}
    for bad, sentence in (
        ("0: 1 @ 0.5-0.5", "must start before it ends, between 0 and 1, not from 0.5 to 0.5"),
        ("0: 1 @ 0-2", "not from 0.0 to 2.0"),
        ("0: 1 @ 0.5", "is not a direction and its strength"),
        ("0: 1 0-0.5", "is not a direction and its strength"),
        ("0: 1 @ -1-0.5", "is not a direction and its strength"),
    ):
        for read in (strengths_of, windows_of):
            with pytest.raises(ElrondError, match=sentence):
                read(bad)


def test_lists_of_words() -> None:
    assert words_of("red, blue\n very  dark,red,") == ["red", "blue", "very dark"]
    with pytest.raises(ElrondError, match="at least two words"):
        words_of("red, red")


@pytest.mark.parametrize("text", ["0: 1e999", "0: 1e38", "0: 0.5, 1: -1000.1"])
def test_strengths_that_overflow_are_refused(text: str) -> None:
    with pytest.raises(ElrondError, match="A strength lies between -1000 and 1000"):
        strengths_of(text)
    assert strengths_of("0: 1000, 1: -1e3") == {0: 1000.0, 1: -1000.0}


@pytest.mark.parametrize("text", ["nan", "1, inf", "-1e999"])
def test_numbers_are_finite(text: str) -> None:
    with pytest.raises(ElrondError, match="is not a number"):
        numbers_of(text)


@pytest.mark.parametrize("count", [4, ANY_COUNT])
def test_a_range_that_runs_backwards_says_so(count: int) -> None:
    with pytest.raises(ElrondError, match=r"3-1 runs backwards; write 1-3\."):
        indices_of("3-1", count)
