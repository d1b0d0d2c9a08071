"""Reading portraits: factors of true pictures, and which pictures are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from demo.portraits import measure
from demo.portraits.measure import Measures, distances, fit_colours, load, right, train_measures
from demo.portraits.world import (
    CATEGORICAL,
    FACTORS,
    IMAGE_SIZE,
    REACH,
    Factors,
    colour,
    compose,
    draw,
    role_colours,
    role_shares,
)

COLOURS = ("skin", "hair_colour", "clothes_hue", "background")
COUNT = 500


def portraits(count: int, seed: int) -> Factors:
    return draw(count, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def measures() -> Measures:
    if not measure.WEIGHTS.is_file():
        pytest.skip("the measuring network's weights are not made yet: `python -m demo.train`")
    return load()


@pytest.fixture(scope="module")
def factors() -> Factors:
    return portraits(COUNT, 100)


@pytest.fixture(scope="module")
def images(factors: Factors) -> torch.Tensor:
    return compose(factors)


@pytest.fixture(scope="module")
def others() -> torch.Tensor:
    return compose(portraits(COUNT, 101))


def test_shares_put_a_picture_together() -> None:
    factors = portraits(50, 0)
    shares, base = role_shares(factors)
    colours = torch.cat([role_colours(factors), colour("background", factors["background"])[:, None]], dim=1)
    torch.testing.assert_close(torch.einsum("nrhw,nrc->nchw", shares, colours) + base, compose(factors))


def test_colours_are_fitted_from_anywhere() -> None:
    factors = portraits(100, 1)
    start = {**factors, **dict.fromkeys(COLOURS, torch.full((100,), 0.5))}
    fitted, errors = fit_colours(compose(factors), start)
    for name in COLOURS:
        assert (fitted[name] - factors[name]).abs().max() < 0.01, name
    # The best of a wrong category is worse.
    wrong, worse = fit_colours(compose(factors), {**start, "garment": (factors["garment"] + 1) % 6})
    assert (worse > errors).all() and not torch.equal(wrong["garment"], fitted["garment"])


def test_true_pictures_are_read(measures: Measures, factors: Factors, images: torch.Tensor) -> None:
    for name, part in right(factors, measures.measure(images)).items():
        assert part.float().mean() >= 0.98, name
    assert measures.valid(images).float().mean() >= 0.98


def test_one_picture_is_read_as_in_a_batch(measures: Measures, images: torch.Tensor) -> None:
    together = measures.measure(images[:20])
    for i in range(20):
        alone = measures.measure(images[i : i + 1])
        for name in FACTORS:
            assert float((alone[name][0] - together[name][i]).abs()) < 1e-2, name


def test_every_value_of_every_factor_is_read(measures: Measures) -> None:
    for name, values in CATEGORICAL.items():
        for value in range(len(values)):
            factors = {**portraits(40, 7), name: torch.full((40,), value)}
            read = measures.measure(compose(factors))[name]
            assert (read == value).float().mean() >= 0.9, (name, values[value])


def painted(factors: Factors, images: torch.Tensor, box: tuple[int, int, int, int], like: torch.Tensor) -> torch.Tensor:
    """Pictures with a box, given as in a portrait in the middle, painted in a colour (N, 3)."""
    images = images.clone()
    shift = ((factors["position"] * 2 - 1) * REACH).round().long()
    top, bottom, left, right_ = box
    for i, by in enumerate(shift.tolist()):
        images[i, :, top:bottom, max(left + by, 0) : right_ + by] = like[i, :, None, None]
    return images


def broken(kind: str, factors: Factors, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Pictures that are none of this world."""
    ground = images[:, :, 0, 0]
    shaven = {**factors, "beard": torch.zeros(COUNT, dtype=torch.int64)}
    skin = role_colours(factors)
    face = skin[:, 0] + 0.36 * (skin[:, 1] - skin[:, 0])
    if kind == "noise":
        return torch.rand(COUNT, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    if kind == "grey":
        return torch.full_like(images, 0.5)
    if kind == "two blended":
        return (images + others) / 2
    if kind == "one shines through":
        return 0.75 * images + 0.25 * others
    if kind == "left and right of two":
        return torch.cat([images[..., :32], others[..., 32:]], dim=3)
    if kind == "upside down":
        return images.flip(2)
    if kind == "blurred":
        return measure._blurred(images, torch.tensor([1.5]))
    if kind == "no head":
        return painted(factors, images, (0, 44, 0, 64), ground)
    if kind == "no clothes":
        return painted(factors, images, (52, 64, 0, 64), ground)
    if kind == "no mouth":
        return painted(shaven, compose(shaven), (38, 48, 24, 40), face)
    if kind == "one eye":
        return painted(shaven, compose(shaven), (24, 33, 21, 30), face)
    raise ValueError(kind)


KINDS = (
    "noise",
    "grey",
    "two blended",
    "one shines through",
    "left and right of two",
    "upside down",
    "blurred",
    "no head",
    "no clothes",
    "no mouth",
    "one eye",
)


@pytest.mark.parametrize("kind", KINDS)
def test_broken_pictures_are_not_valid(
    kind: str, measures: Measures, factors: Factors, images: torch.Tensor, others: torch.Tensor
) -> None:
    # On some skins a face without a mouth is as near to one with lips as the autoencoder's pictures are to true ones.
    passed = 0.1 if kind == "no mouth" else 0.03
    assert measures.valid(broken(kind, factors, images, others)).float().mean() <= passed


def test_distances_see_the_worst_place(factors: Factors, images: torch.Tensor) -> None:
    spotted = images.clone()
    spotted[:, :, 10:15, 2:7] = 1 - spotted[:, :, 10:15, 2:7]
    whole, worst = distances(spotted, factors).T
    assert (distances(images, factors) < 1e-5).all()
    assert (worst > 8 * whole).all()


def test_images_of_another_shape_are_refused(measures: Measures) -> None:
    with pytest.raises(ValueError, match="64"):
        measures.measure(torch.zeros(1, 64, 64, 3))
    assert not measures.valid(torch.full((2, 3, 64, 64), float("nan"))).any()
    assert all(len(values) == 0 for values in measures.measure(torch.zeros(0, 3, 64, 64)).values())


def test_training_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_EVERY", 2)
    monkeypatch.setattr(measure, "_PICTURES", 12)
    said: list[str] = []
    options = {"judged": 20, "say": said.append}
    figures = train_measures(out=tmp_path / "whole.safetensors", steps=4, **options)
    assert set(figures) == {"true", "decoded"} and set(figures["true"]) == {*FACTORS, "valid"}

    class CrashError(Exception):
        pass

    def crash(text: str) -> None:
        said.append(text)
        if "batch 4" in text:
            raise CrashError

    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(CrashError):
        train_measures(out=tmp_path / "resumed.safetensors", checkpoint=checkpoint, steps=4, judged=20, say=crash)
    assert not (tmp_path / "resumed.safetensors").exists()
    left = torch.load(checkpoint, weights_only=True)
    train_measures(out=tmp_path / "resumed.safetensors", checkpoint=checkpoint, steps=4, **options)
    whole, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    # A checkpoint of another recipe is not used.
    torch.save({**left, "recipe": "another", "weights": {}}, checkpoint)
    train_measures(out=tmp_path / "anew.safetensors", checkpoint=checkpoint, steps=4, **options)
    anew = load_file(tmp_path / "anew.safetensors")
    assert all(torch.equal(value, anew[name]) for name, value in whole.items())


def test_training_uses_the_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_PICTURES", 12)
    seen: list[int] = []

    def decoded(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return images * 0.9

    out = tmp_path / "measure.safetensors"
    train_measures(decoded, out=out, steps=2, judged=20, say=lambda _: None)
    # A third of each batch, then the pictures for the limits and for the accuracies.
    assert seen == [4, 4, 20, 20]
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["judged_after"] == "autoencoder" and "CC BY 4.0" in file.metadata()["art"]


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"demo\.train"):
        load(tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    save_file({"limits": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("broken", "other"):
        with pytest.raises(ValueError, match=name):
            load(tmp_path / f"{name}.safetensors")


def test_the_network_is_small() -> None:
    # In half precision, a MiB.
    assert 2 * sum(value.numel() for value in Measures().state_dict().values()) <= 2**20
