"""Where concepts are in a prompt, and which tokens change with them."""

from __future__ import annotations

import pytest

from elrond_core.errors import ElrondError
from elrond_core.prompt import Span, bracketed, changed_tokens, find_word, occurrences, replacements


@pytest.mark.parametrize(
    ("prompt", "plain", "places"),
    [
        ("1girl, solo, a [girl] smiling", "1girl, solo, a girl smiling", [(15, 19)]),
        ("a [red  dog] and a [cat]", "a red  dog and a cat", [(2, 10), (17, 20)]),
        ("[dog]s and a dog", "dogs and a dog", [(0, 4)]),
        ("the [dog]'s tail, [2]nd", "the dog's tail, 2nd", [(4, 7), (16, 17)]),
        ("公园里的[狗]在跑", "公园里的狗在跑", [(4, 5)]),
        ("(masterpiece:1.2), [2] dogs", "(masterpiece:1.2), 2 dogs", [(19, 20)]),
        ("a [ dog ]", "a  dog ", [(3, 6)]),
        ("a [((big dog):1.2)]", "a ((big dog):1.2)", [(4, 11)]),
        ("a [(big) (dog)]", "a (big) (dog)", [(2, 13)]),
        (r"a [\(dog\)]", r"a \(dog\)", [(2, 9)]),
        ("by [embedding:mine]", "by embedding:mine", [(3, 17)]),
        ("none", "none", []),
    ],
)
def test_brackets_are_places(prompt: str, plain: str, places: list[tuple[int, int]]) -> None:
    assert bracketed(prompt) == (plain, places)


@pytest.mark.parametrize(
    "prompt",
    ["[blurry:0.5], [thing]", "[cat:dog:0.5]", "a [cat|dog]", "[[thing]]", "a [thing", "a thing]", "[a [b] c]"],
)
def test_brackets_that_mean_something_else(prompt: str) -> None:
    with pytest.raises(ElrondError, match=r": brackets name the concept, as in a \[dog\], and weights are written"):
        bracketed(prompt)


def test_empty_brackets() -> None:
    with pytest.raises(ElrondError, match="empty brackets"):
        bracketed("a [ ]")


@pytest.mark.parametrize(
    ("prompt", "word", "places"),
    [
        ("一只狗在跑", "狗", [(2, 3)]),
        ("ภาพของแมวสีดำ", "แมว", [(6, 9)]),
        ("hot dogs, dog", "dog", [(10, 13)]),
        ("Dogs and a DOG", "dog", [(11, 14)]),
        ("a hot \n dog", "Hot dog", [(2, 11)]),
        # Free-standing words first.
        ("1girl, a girl", "girl", [(9, 13), (1, 5)]),
        ("long_hair, red hair", "hair", [(15, 19), (5, 9)]),
        ("wolf-dog, the dog's", "dog", [(14, 17), (5, 8)]),
        ("1.2 and 2, 3", "2", [(8, 9), (2, 3)]),
        # Neither in names nor in weights.
        ("embedding:bad-hands, hands", "hands", [(21, 26)]),
        ("by embedding:mine2 and embedding:mine", "embedding:mine", [(23, 37)]),
        ("(masterpiece:1.2), 2 dogs", "2", [(19, 20)]),
        # However letters are coded, and no part of one.
        ("cafe\u0301, café, cafe", "café", [(0, 5), (7, 11)]),
        ("cafe\u0301, café, cafe", "cafe\u0301", [(0, 5), (7, 11)]),
        ("cafe\u0301, café, cafe", "cafe", [(13, 17)]),
        ("a \ufb01sh", "fish", [(2, 5)]),
        ("a \ufb01sh", "f", []),
        ("각 가", "가", [(2, 3)]),
        ("ＤＯＧ", "dog", [(0, 3)]),
    ],
)
def test_occurrences(prompt: str, word: str, places: list[tuple[int, int]]) -> None:
    assert occurrences(prompt, word) == places


def test_occurrences_inside_words_come_last_and_only_if_wanted() -> None:
    assert occurrences("underdogs, 1dog, dog", "dog", inside=True) == [(17, 20), (12, 15), (5, 8)]


def test_a_word_that_is_not_there() -> None:
    with pytest.raises(ElrondError, match="'cat' is not in the prompt 'a dog'"):
        find_word("a dog", "cat")
    with pytest.raises(ElrondError, match="has 'dog' 1 times, so occurrence 2 is not there"):
        find_word("a dog", "dog", 1)
    with pytest.raises(ElrondError, match="Name the concept"):
        find_word("a dog", " ")
    assert find_word("a dog, a dog", "dog", 1) == (9, 12)


@pytest.mark.parametrize("word", ["dog", "cat", "Zebra", "sun", "7", "\u9f98", "old cat", "embedding:big", "été"])
def test_other_words_start_and_end_otherwise(word: str) -> None:
    others = replacements(word)
    assert len(others) > 3
    for other in others:
        assert other.encode()[0] != word.lower().encode()[0] and other.encode()[-1] != word.lower().encode()[-1]


def pairs(text: str) -> list[str]:
    """A tokenizer that joins letters two by two from the start of every word, with the space before it."""
    tokens: list[str] = []
    for word in text.replace(" ", " _").split():
        tokens += [word[i : i + 2] for i in range(0, len(word), 2)]
    return tokens


@pytest.mark.parametrize(
    ("prompt", "span", "tokens"),
    [
        ("an old dog runs", Span(7, 10), ["_d", "og"]),
        ("dog dog dog", Span(4, 7), ["_d", "og"]),
        # A token that holds part of the word and of its neighbour is the word's.
        ("an underdogs run", Span(8, 11), ["do", "gs"]),
        ("an overdog runs", Span(7, 10), ["rd", "og"]),
        ("dog", Span(0, 3), ["do", "g"]),
    ],
)
def test_tokens_that_change_with_the_word(prompt: str, span: Span, tokens: list[str]) -> None:
    others = [pairs(prompt[: span.start] + other + prompt[span.stop :]) for other in replacements(span.of(prompt))]
    cut = pairs(prompt)
    assert [cut[i] for i in changed_tokens(cut, others)] == tokens


def test_no_token_changes_where_none_stands_for_the_word() -> None:
    assert list(changed_tokens(["a", "?"], [["a", "?"], ["a", "?", "b", "?"]])) == []
