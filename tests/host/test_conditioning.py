"""What a conditioning remembers, and what becomes of it behind other nodes."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.prompt import Concept
from comfyui_elrond.nodes import host


def test_a_marked_prompt_names_its_concepts_and_cannot_change(teacher: SimpleNamespace) -> None:
    tensor, prompt = host.marked(teacher.positive)
    (concept,) = prompt.concepts
    assert (prompt.family, prompt.prompt, concept.word) == ("Demo", "a person", "person")
    assert set(concept.rows) < set(prompt.words)
    assert prompt.norms == (float(tensor[0, list(concept.rows)].norm(dim=-1).mean()),)
    with pytest.raises(FrozenInstanceError):
        prompt.family = "SDXL"  # type: ignore[misc]


def test_concepts_are_found_by_name() -> None:
    concepts = tuple(Concept(word, (row,), (word,)) for row, word in enumerate(("cat", "dog", "cat", "Red car")))
    prompt = host.MarkedPrompt("Demo", "", concepts, (1.0,) * 4)
    for name, default, index in (
        ("", "", 0),
        ("dog", "cat", 1),
        ("", "dog", 1),
        ("", "bird", 0),
        (" CAT #2 ", "", 2),
        ("red car", "", 3),
    ):
        assert prompt.index_of(name, default) == index
    with pytest.raises(ElrondError, match=r"no marked concept 'bird'; it has 'cat', 'dog', 'cat', 'Red car'\."):
        prompt.index_of("bird")
