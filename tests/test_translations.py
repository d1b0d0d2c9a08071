"""Every language has a text for every node, input and output, and none for what is no longer there."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest
import translations

ALL = (translations.ENGLISH, *translations.LANGUAGES)


@pytest.fixture(scope="module")
def wanted(pack: ModuleType) -> dict[str, Any]:
    return translations.english(pack.NODES)


def test_english_is_what_the_schemas_say(wanted: dict[str, Any]) -> None:
    assert translations.read("en") == wanted, "run python tests/translations.py"


@pytest.mark.parametrize("language", translations.LANGUAGES)
def test_nothing_is_missing_and_nothing_stale(language: str, wanted: dict[str, Any]) -> None:
    assert translations.differences(wanted, translations.read(language)) == [], "run python tests/translations.py"
    main = translations.read("en", "main")
    assert translations.differences(main, translations.read(language, "main")) == []


def test_the_languages_are_those_of_the_folder() -> None:
    assert {path.name for path in translations.LOCALES.iterdir()} == set(ALL)
    for language in ALL:
        assert {path.name for path in (translations.LOCALES / language).iterdir()} == {"main.json", "nodeDefs.json"}


@pytest.mark.parametrize("language", translations.LANGUAGES)
def test_texts_are_translated(language: str, wanted: dict[str, Any]) -> None:
    """No tooltip is the English one, and those of Chinese and Japanese are in their scripts."""
    texts = translations.flat(translations.read(language))
    english = translations.flat(wanted)
    for path, text in texts.items():
        if path.endswith(("tooltip", "description")):
            assert text != english[path], path
        if language in ("zh", "ja") and path.endswith(("tooltip", "description", "display_name")):
            assert re.search("[\u3040-\u30ff\u4e00-\u9fff]", text), path


@pytest.mark.parametrize("language", ALL)
def test_texts_are_plain_for_the_page(language: str) -> None:
    """ComfyUI's page reads { } as a place for a value, @ as a link to another text and | as a plural."""
    for path, text in translations.flat(translations.read(language)).items():
        assert not re.search(r"[{}@|]", text), path
        if path.endswith("display_name"):
            assert text.endswith(" (ELROND)"), path
        if path.endswith("tooltip") or path.endswith("description"):
            assert text.rstrip()[-1] in ".。…?？", path


@pytest.mark.parametrize("language", translations.LANGUAGES)
def test_numbers_choices_and_examples_survive(language: str, wanted: dict[str, Any]) -> None:
    """Digits, and choices of a widget that stand in a tooltip before a colon, are the same in every language."""
    texts = translations.flat(translations.read(language))
    for path, english in translations.flat(wanted).items():
        for choice in re.findall(r"(?:^|\. )([a-z][a-z ]{2,18}): ", english):
            assert choice in texts[path], (path, choice)
        digits = [re.sub(r"\D", "", number) for number in re.findall(r"\d[\d.,]*\d|\d", english)]
        found = re.sub(r"(?<=\d)[.,\s\u202f\u00a0](?=\d)", "", texts[path])
        assert [number for number in digits if number not in re.findall(r"\d+", found)] == [], path


def test_what_is_missing_is_named(wanted: dict[str, Any]) -> None:
    node = next(iter(wanted))
    found = {**wanted, "Gone": {"display_name": "x"}, node: {**wanted[node], "description": ""}}
    assert translations.differences(wanted, found) == [f"missing: {node}.description", "stale: Gone.display_name"]
