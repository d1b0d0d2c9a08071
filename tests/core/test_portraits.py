"""The portraits: the atlas, what captions mean, and what is drawn for them."""

from __future__ import annotations

import pytest
import torch

from demo.portraits import captions, world
from demo.portraits.captions import EVERYTHING, NOUNS, OPEN, WORDS, Captions, allows, named
from demo.portraits.world import CATEGORICAL, CONTINUOUS, FACTORS, IMAGE_SIZE, compose, draw, load_atlas


def one(**changes: float) -> world.Factors:
    """A portrait in the middle of everything, with changes."""
    factors = {name: torch.tensor([float(changes.get(name, 0.5))]) for name in CONTINUOUS}
    return {**factors, **{name: torch.tensor([int(changes.get(name, 0))]) for name in CATEGORICAL}}


def test_pictures_are_in_range_and_repeat() -> None:
    factors = draw(40, torch.Generator().manual_seed(0))
    images = compose(factors)
    assert images.shape == (40, 3, IMAGE_SIZE, IMAGE_SIZE) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    # Alone or in a batch, a portrait is the same.
    alone = torch.cat([compose({name: values[i : i + 1] for name, values in factors.items()}) for i in range(40)])
    torch.testing.assert_close(images, alone)
    assert compose({name: values[:0] for name, values in factors.items()}).shape == (0, 3, IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize("factor", CATEGORICAL)
def test_every_value_looks_different(factor: str) -> None:
    images = torch.cat([compose(one(**{factor: value})) for value in range(len(CATEGORICAL[factor]))])
    distance = torch.cdist(images.flatten(1), images.flatten(1)) + 10 * torch.eye(len(images))
    # Two levels of 255 over the whole picture would be 0.9.
    assert distance.min() > 1.5, factor


@pytest.mark.parametrize("factor", CONTINUOUS)
def test_continuous_factors_change_the_picture_all_the_way(factor: str) -> None:
    images = torch.cat([compose(one(**{factor: value / 20})) for value in range(21)])
    assert (images[1:] - images[:-1]).flatten(1).norm(dim=1).min() > 0.3, factor


def test_nobody_is_cut_off_at_either_side() -> None:
    ground = world.colour("background", torch.zeros(1)).view(1, 3, 1)
    for position in (0.0, 1.0):
        for hair in range(len(CATEGORICAL["hair"])):
            for garment in range(len(CATEGORICAL["garment"])):
                image = compose(one(position=position, hair=hair, garment=garment, background=0))
                torch.testing.assert_close(image[..., [0, -1]], ground[..., None].expand(1, 3, IMAGE_SIZE, 2))


def test_position_moves_the_person_by_whole_pixels() -> None:
    left, right = compose(one(position=0.0)), compose(one(position=1.0))
    torch.testing.assert_close(left[..., : -2 * world.REACH], right[..., 2 * world.REACH :])


def test_missing_factors_are_refused() -> None:
    factors = one()
    del factors["beard"]
    with pytest.raises(ValueError, match="beard"):
        compose(factors)
    with pytest.raises(ValueError, match="same length"):
        compose({**one(), "skin": torch.zeros(2)})


def test_an_altered_atlas_is_refused(tmp_path, monkeypatch) -> None:
    for name in ("atlas.json", "atlas.xz"):
        (tmp_path / name).write_bytes((world._FOLDER / name).read_bytes())
    monkeypatch.setattr(world, "_FOLDER", tmp_path)
    text = (tmp_path / "atlas.json").read_text(encoding="utf-8")
    (tmp_path / "atlas.json").write_text(text.replace('"sha256": "', '"sha256": "0'), encoding="utf-8")
    load_atlas.cache_clear()
    with pytest.raises(ValueError, match=r"atlas\.mjs"):
        load_atlas()
    load_atlas.cache_clear()


def test_nouns_leave_from_one_to_all_factors_open() -> None:
    counts = {len(factors) for factors in OPEN.values()}
    assert len(NOUNS) >= 16 and min(counts) == 1 and max(counts) == len(FACTORS) and len(counts) >= 8


@pytest.mark.parametrize("noun", NOUNS)
def test_open_factors_vary_and_the_others_do_not(noun: str) -> None:
    texts, factors = Captions(0).batch(300, noun=noun, share=0.0)
    assert all(noun in text.split() for text in texts)
    varying = tuple(name for name in FACTORS if len(factors[name].unique()) > 1)
    assert varying == OPEN[noun]


def test_what_is_drawn_is_what_the_text_allows() -> None:
    texts, factors = Captions(1).batch(4000)
    for i, text in enumerate(texts):
        for factor, allowed in named(text).items():
            assert allows(allowed, factors[factor][i : i + 1], slack=1e-6).all(), (text, factor)


@pytest.mark.parametrize(("share", "noun"), [(0.0, "person"), (0.35, "person"), (0.6, "man"), (0.35, "woman")])
def test_what_nobody_names_is_uniform(share: float, noun: str) -> None:
    texts, factors = Captions(2).batch(6000, noun=noun, share=share)
    said = [named(text) for text in texts]
    for factor in FACTORS:
        allowed = NOUNS[noun].get(factor, EVERYTHING[factor])
        free = torch.tensor([meaning.get(factor, EVERYTHING[factor]) == allowed for meaning in said])
        values = factors[factor][free].double().sort().values
        assert len(values) > 1000
        if factor in CATEGORICAL:
            counts = torch.tensor([float((values == value).sum()) for value in sorted(allowed)])
            assert (counts / len(values) - 1 / len(counts)).abs().max() < 0.04, factor
        else:
            steps = (torch.arange(len(values)) + 0.5) / len(values)
            assert (values - steps).abs().max() < 0.05, factor


def test_values_are_uniform_over_a_word() -> None:
    meaning = named("a person with dark hair in a shirt")
    factors = captions.draw_factors([meaning] * 5000, torch.Generator().manual_seed(0))
    low, high = meaning["hair_colour"]
    assert abs(float(factors["hair_colour"].mean()) - (low + high) / 2) < 0.01
    assert abs(float((factors["garment"] == 0).float().mean()) - 1 / len(meaning["garment"])) < 0.03


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("a person", {}),
        ("a photo of a [person]", {}),
        ("a person with glasses and a full beard", {"eyes": {3}, "beard": {3}}),
        ("person in a striped shirt", {"garment": {2}}),
        ("a very pale person with very long hair", {"skin": (0.0, 0.1), "hair": {6}}),
        ("a person on the far left", {"position": (0.0, 0.12)}),
        ("a person, dark blue sky", {"background": (11 / 18, 13 / 18)}),
    ],
)
def test_meanings(text: str, meaning: dict) -> None:
    read = named(text)
    assert set(read) == set(meaning)
    for factor, allowed in meaning.items():
        if isinstance(allowed, set):
            assert read[factor] == allowed
        else:
            assert read[factor] == pytest.approx(allowed)


@pytest.mark.parametrize("text", ["a robot", "a striped person", "a man in a dress", "a red"])
def test_texts_without_a_meaning_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        named(text)


def test_captions_repeat_use_every_word_and_differ() -> None:
    texts, factors = Captions(3).batch(30000)
    again, same = Captions(3).batch(30000)
    assert texts == again and all(torch.equal(factors[name], same[name]) for name in FACTORS)
    used = {word for text in texts for word in text.replace(",", " ").split()}
    assert used <= set(WORDS)
    # "image" is for prompts that people write.
    assert set(WORDS) - used <= {"image"}
    assert len(set(texts)) > 15000
