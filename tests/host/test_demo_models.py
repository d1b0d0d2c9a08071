"""The portraits' models: host objects, trainings that resume to the bit, and what is measured of known factors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from demo import host  # noqa: F401  # puts ComfyUI on the path

# isort: split
import safetensors.torch
from safetensors import safe_open

from demo import measures
from demo.evaluate import FIGURES
from demo.host_model import checkpoint as portraits
from demo.host_model.text import TEXT_LENGTH, TEXT_WIDTH
from demo.portraits.captions import EVERYTHING, Captions
from demo.portraits.world import FACTORS, compose
from demo.train import take_shipped
from demo.training import student, teacher, vae
from demo.training.bank import captioned, make_bank
from demo.training.optimizer import Muon, orthogonalise
from demo.training.progress import Progress, digest_of_file, generator_of, rate_at
from demo.training.text import TextEncoder, Tokens

STAGES: dict[str, ModuleType] = {"vae": vae, "teacher": teacher, "student": student}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has done its few steps."""
    folder = tmp_path_factory.mktemp("trained")
    for stage in STAGES.values():
        stage.train(folder, stage.SMALL)
    return folder


@pytest.fixture(scope="module")
def models(trained: Path) -> dict[str, portraits.Portraits]:
    return {name: portraits.load(name, trained) for name in portraits.MODELS}


@pytest.mark.parametrize("name", STAGES)
def test_an_interrupted_training_makes_the_same_weights(name: str, trained: Path, tmp_path: Path) -> None:
    for before in ("vae", "teacher"):
        (tmp_path / portraits.file_of(before).name).write_bytes(portraits.file_of(before, trained).read_bytes())
    portraits.file_of(name, tmp_path).unlink(missing_ok=True)
    stage = STAGES[name]
    stage.train(tmp_path, stage.SMALL, steps=2)
    again = safetensors.torch.load_file(stage.train(tmp_path, stage.SMALL))
    for key, value in safetensors.torch.load_file(portraits.file_of(name, trained)).items():
        assert torch.equal(value, again[key]), key


@pytest.mark.parametrize("name", STAGES)
def test_steps_change_the_weights_that_are_kept(name: str, trained: Path, tmp_path: Path) -> None:
    for before in ("vae", "teacher"):
        (tmp_path / portraits.file_of(before).name).write_bytes(portraits.file_of(before, trained).read_bytes())
    portraits.file_of(name, tmp_path).unlink(missing_ok=True)
    stage = STAGES[name]
    if name == "teacher":
        shorter: Any = (*teacher.SMALL[:-1], dataclasses.replace(teacher.SMALL[-1], steps=2))
    else:
        shorter = dataclasses.replace(stage.SMALL, **{"iterations" if name == "student" else "steps": 2})
    early = safetensors.torch.load_file(stage.train(tmp_path, shorter))
    late = safetensors.torch.load_file(portraits.file_of(name, trained))
    floats = [key for key, value in late.items() if value.is_floating_point()]
    assert sum(not torch.equal(early[key], late[key]) for key in floats) > len(floats) / 4


@pytest.mark.parametrize("name", STAGES)
def test_weights_are_small_and_say_where_they_come_from(name: str, trained: Path) -> None:
    path = portraits.file_of(name, trained)
    assert path.stat().st_size < 12e6
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert "Draftbit" in about["credit"] and "CC BY 4.0" in about["credit"]
    assert about["seed"] and about["recipe"] and len(about["recipe_sha256"]) == 64


def test_a_checkpoint_of_another_recipe_is_refused(trained: Path) -> None:
    other = dataclasses.replace(vae.SMALL, rate=1.0)
    with pytest.raises(ValueError, match="another recipe"):
        Progress(trained, "vae", other, {})


def test_the_clip_object_encodes_what_training_saw(trained: Path, models: dict[str, portraits.Portraits]) -> None:
    tokens = Tokens()
    encoder = TextEncoder(tokens, torch.Generator().manual_seed(0))
    encoder.load(portraits.unpack_text(portraits.read_weights(portraits.file_of("teacher", trained))))
    texts, _ = Captions(5).batch(40, share=0.6)
    texts.append("")
    clip = models["teacher"].clip
    for text, ids in zip(texts, tokens.encode(texts), strict=True):
        assert [token for token, _ in clip.tokenize(text)["l"][0]] == ids.tolist(), text
    with torch.no_grad():
        rows = encoder(tokens.encode(texts))
    for i, text in enumerate(texts):
        row = clip.encode(text)
        assert row.shape == (1, TEXT_LENGTH, TEXT_WIDTH)
        torch.testing.assert_close(row[0], rows[i], atol=1e-4, rtol=1e-4)
    assert float((clip.encode(texts[0]) - clip.encode(texts[1])).abs().max()) > 0.01


def test_rows_do_not_depend_on_the_other_captions_of_a_batch() -> None:
    tokens = Tokens()
    encoder = TextEncoder(tokens, torch.Generator().manual_seed(0))
    texts, _ = Captions(6).batch(8, share=0.6)
    with torch.no_grad():
        together, alone = encoder(tokens.encode(texts)), encoder(tokens.encode(texts[:1]))
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-5)


def test_words_that_no_caption_has_are_refused() -> None:
    with pytest.raises(ValueError, match="captions' words"):
        Tokens().encode(["portrait of a spaceship"])


@pytest.mark.parametrize("name, sampler, steps", [("teacher", "euler", 3), ("student", "euler", 2)])
def test_stock_nodes_sample_decode_and_encode(
    name: str, sampler: str, steps: int, models: dict[str, portraits.Portraits]
) -> None:
    import nodes as stock

    model, clip, autoencoder = models[name]
    (positive,) = stock.CLIPTextEncode().encode(clip, "portrait of a bearded man in a red shirt")
    (negative,) = stock.CLIPTextEncode().encode(clip, "")
    noise = {"samples": torch.zeros(2, 16, 8, 8)}
    made = [
        stock.KSampler().sample(model, seed, steps, 2.0, sampler, "simple", positive, negative, noise)[0]
        for seed in (1, 1, 2)
    ]
    assert made[0]["samples"].shape == (2, 16, 8, 8)
    assert torch.equal(made[0]["samples"], made[1]["samples"])
    assert not torch.equal(made[0]["samples"], made[2]["samples"])
    (images,) = stock.VAEDecode().decode(autoencoder, made[0])
    assert images.shape == (2, 64, 64, 3) and bool(images.isfinite().all())
    (latents,) = stock.VAEEncode().encode(autoencoder, images)
    assert latents["samples"].shape == (2, 16, 8, 8)


def test_the_vae_object_is_the_trained_module(trained: Path, models: dict[str, portraits.Portraits]) -> None:
    module = portraits.load_vae(portraits.file_of("vae", trained))
    pixels = vae.pictures(8, generator_of("test", 0), "cpu")
    latents = module.encode(pixels)
    autoencoder = models["teacher"].vae
    images = (pixels / 2 + 0.5).movedim(1, -1)
    torch.testing.assert_close(autoencoder.encode(images), latents, atol=1e-4, rtol=1e-4)
    decoded = (module.decode(latents) / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(autoencoder.decode(latents), decoded, atol=1e-4, rtol=1e-4)


def test_latents_are_normalised_per_channel(trained: Path) -> None:
    module = portraits.load_vae(portraits.file_of("vae", trained))
    # The pictures that a small recipe takes its statistics from.
    latents = module.encode(vae.pictures(8, generator_of("vae statistics", 0), "cpu"))
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(16), atol=0.02, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(16), atol=0.02, rtol=0)


def test_missing_weights_and_unknown_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="teacher"):
        portraits.load("teacher", tmp_path)
    with pytest.raises(ValueError, match="teacher, student"):
        portraits.load("shapes", tmp_path)


def test_a_bank_is_read_again_and_holds_the_captions_pictures(trained: Path, tmp_path: Path) -> None:
    module = portraits.load_vae(portraits.file_of("vae", trained))
    first = make_bank(module, 6, tmp_path)
    times = [file.stat().st_mtime_ns for file in tmp_path.iterdir()]
    again = make_bank(module, 6, tmp_path)
    assert times == [file.stat().st_mtime_ns for file in tmp_path.iterdir()]
    assert torch.equal(first.latents, again.latents) and torch.equal(first.tokens, again.tokens)
    tokens, factors = captioned(0, 6)
    assert torch.equal(tokens, first.tokens)
    torch.testing.assert_close(module.encode(compose(factors) * 2 - 1), first.latents.float(), atol=0.02, rtol=0.01)


def test_stages_that_are_not_run_take_the_shipped_weights(trained: Path, tmp_path: Path) -> None:
    take_shipped(tmp_path / "all", ["vae", "teacher"], trained)
    assert not list((tmp_path / "all").iterdir())
    take_shipped(tmp_path / "student", ["student"], trained)
    for name in ("vae", "teacher"):
        shipped = portraits.file_of(name, trained).read_bytes()
        assert portraits.file_of(name, tmp_path / "student").read_bytes() == shipped


def test_levels_are_shifted_and_some_are_the_highest() -> None:
    levels = teacher.draw_levels(20000, 1.0, 0.05, torch.Generator().manual_seed(0))
    assert float((levels == 1).float().mean()) == pytest.approx(0.05, abs=0.01)
    # The median of the logit-normal is 1/2, which a shift of two takes to 2/3; the highest levels move it a little.
    assert float(levels.median()) == pytest.approx(2 / 3, abs=0.03)
    assert float(levels.min()) > 0


def test_the_students_levels_are_those_of_the_hosts_schedule(models: dict[str, portraits.Portraits]) -> None:
    import comfy.samplers

    sampling = models["student"].model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", student.STEPS)
    torch.testing.assert_close(student.levels_of("cpu"), sigmas[:-1], atol=1e-3, rtol=0)


def test_rates_rise_stay_and_fall() -> None:
    rates = [rate_at(step, 100, 2.0, 10, 0.5) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[40] == 2.0
    assert rates[75] == pytest.approx(1.0) and 0 < rates[99] < 0.05


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 20, 60, generator=torch.Generator().manual_seed(0))
    for batch in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalise(batch))
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3


@pytest.mark.parametrize("shape", [(12, 30), (8, 6, 3, 3)])
def test_muon_finds_the_least_squares_solution(shape: tuple[int, ...]) -> None:
    target = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix, vector = torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.zeros(5))
    optimizer = Muon([matrix], [vector], 0.1)
    for step in range(200):
        optimizer.param_groups[0]["rate"] = optimizer.param_groups[1]["rate"] = rate_at(step, 200, 0.1, 1, 0.8)
        loss = (matrix - target).square().mean() + (vector - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float((matrix - target).square().mean()) < 0.01
    assert float((vector - 1).abs().max()) < 0.1


def test_true_factors_align_are_uniform_and_diverse() -> None:
    texts, factors = Captions(3).batch(300, share=0.5)
    assert all(share == 1 for share in measures.alignment(texts, factors).values())
    _, factors = Captions(4).batch(3000, noun="person", share=0.0)
    for name in FACTORS:
        allowed = EVERYTHING[name]
        assert measures.marginal_error(allowed, factors[name]) < 0.05, name
        assert measures.spread(allowed, factors[name]) == pytest.approx(1, abs=0.05), name


def test_wrong_factors_do_not_align_and_one_value_is_not_diverse() -> None:
    texts, factors = Captions(3).batch(300, share=0.6)
    mixed: dict[str, Any] = {name: values.roll(1) for name, values in factors.items()}
    aligned = measures.alignment(texts, mixed)
    assert all(share < 0.9 for share in aligned.values()), aligned
    for name in FACTORS:
        constant = factors[name][:1].repeat(200)
        assert measures.spread(EVERYTHING[name], constant) == pytest.approx(0, abs=1e-6)
        assert measures.marginal_error(EVERYTHING[name], constant) > 0.4, name


def test_the_shipped_autoencoder_keeps_fresh_pictures() -> None:
    module = portraits.load_vae()
    pixels = vae.pictures(64, generator_of("test", 1), "cpu")
    assert float(vae.psnr(module.decode(module.encode(pixels)), pixels).mean()) > 32


@pytest.mark.parametrize("name", ["vae", "teacher", "student"])
def test_the_kept_figures_are_of_the_shipped_weights(name: str) -> None:
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))[name]
    assert figures["sha256"] == digest_of_file(portraits.file_of(name))
