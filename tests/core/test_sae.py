"""The sparse autoencoder: recovers a known dictionary, repeats itself, resumes exactly, and refuses bad input."""

import math
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import gradients

from elrond_core.decompose import sae_data, sae_report, sae_training
from elrond_core.decompose.sae import TopKSAE
from elrond_core.decompose.sae_data import geometric_median
from elrond_core.decompose.sae_training import SAETrainer, TrainConfig, TrainedSAE
from elrond_core.errors import ElrondError
from elrond_core.gradients import Gradients
from elrond_core.storage import tensors as tensor_files


def train_sae(source: Gradients, *, checkpoint: Path | None = None, **options: Any) -> TrainedSAE:
    """Train with settings of `TrainConfig`, and whatever else `sae_training.train_sae` takes, by name."""
    others = {name: options.pop(name) for name in ("on_step", "check", "warn", "device") if name in options}
    return sae_training.train_sae(source, TrainConfig(**options), checkpoint=checkpoint, **others)


def trainer_of(data: torch.Tensor, variance: float, latents: int, k: int, **settings: Any) -> SAETrainer:
    """A trainer of data (N, D) as they are, before its first step."""
    model = TopKSAE(1, data.shape[1], latents, k, dtype=data.dtype)
    with torch.no_grad():
        model.b_dec.copy_(geometric_median(data))
    return SAETrainer(model, data, variance, TrainConfig(latents=latents, k=k, **settings))


def sparse(atoms: int = 40, width: int = 16, count: int = 4000, active: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """A dictionary (atoms, 2·width) and gradients (count, 2, width) made of `active` of its atoms each."""
    g = torch.Generator().manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(atoms, 2 * width, generator=g), dim=1)
    places = torch.rand(count, atoms, generator=g).topk(active, dim=1).indices
    values = torch.zeros(count, atoms).scatter(1, places, 0.5 + torch.rand(count, active, generator=g))
    noise = 0.02 * torch.randn(count, 2 * width, generator=g) / (2 * width) ** 0.5
    return dictionary, (values @ dictionary + noise).reshape(count, 2, width)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])
def test_recovers_a_known_dictionary_at_any_scale(scale: float) -> None:
    dictionary, vectors = sparse()
    directions, report, _ = train_sae(gradients(vectors * scale), latents=80, k=2, epochs=100, learning_rate=3e-3)
    similarity = dictionary @ directions.vectors.flatten(1).T
    assert (similarity.amax(1) > 0.95).float().mean() >= 0.98
    assert report.fvu < 0.05
    assert len(report.losses) <= 100 * 8


def test_no_scale_is_too_small_or_too_large() -> None:
    # By a power of two nothing is rounded.
    _, vectors = sparse(count=300)
    one, report, _ = train_sae(gradients(vectors), epochs=5)
    for power in (-100, 85):
        other, same, _ = train_sae(gradients(vectors * 2.0**power), epochs=5)
        assert torch.equal(one.vectors, other.vectors) and torch.equal(report.losses, same.losses)


def trainers(monkeypatch: pytest.MonkeyPatch, ready: Callable[[SAETrainer], None]) -> None:
    """Show `ready` every trainer before its first step."""

    class Shown(SAETrainer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            ready(self)

    monkeypatch.setattr(sae_training, "SAETrainer", Shown)


def before_each_update(trainer: SAETrainer, look: Callable[[], None]) -> None:
    """Call `look` whenever the gradients are final and the parameters not yet changed."""
    trainer.adam.register_step_pre_hook(lambda *_: look())


def test_starts_from_the_geometric_median_of_gradients_of_median_norm_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, vectors = sparse(count=300)
    vectors = 7 * vectors + 3
    vectors[:40] *= 1000
    vectors[-9:] = 0
    seen: list[torch.Tensor] = []
    trainers(
        monkeypatch,
        lambda trainer: seen.extend((trainer.data[torch.arange(300)], trainer.model.b_dec.detach().clone())),
    )
    train_sae(gradients(vectors), epochs=1)
    data, bias = seen
    norms = data.norm(dim=1)
    assert float(norms[:-9].median()) == pytest.approx(1, rel=1e-6)
    assert norms.mean() > 10
    torch.testing.assert_close(data * vectors.flatten(1).norm(dim=1)[:-9].median(), vectors.flatten(1))
    assert torch.equal(bias, geometric_median(data))
    assert bias.norm() > 0.5 and (data.mean(0) - bias).norm() > 10


def test_decoder_gradients_are_at_right_angles_to_the_atoms_and_all_are_clipped() -> None:
    # A variance that small makes a loss, and so gradients, that must be clipped.
    trainer = trainer_of(sparse(count=300)[1].flatten(1), 1e-3, 40, 3, batch_size=300)
    norms: list[float] = []

    def look() -> None:
        pull = trainer.model.W_dec.grad
        along = (pull * trainer.model.W_dec).sum(1).abs()
        assert (along <= 1e-5 * pull.norm(dim=1) + 1e-9).all()
        norms.append(math.sqrt(sum(float(value.grad.double().square().sum()) for value in trainer.model.parameters())))

    before_each_update(trainer, look)
    for _ in range(3):
        trainer.advance()
        assert torch.allclose(trainer.model.W_dec.norm(dim=1), torch.ones(40))
    assert norms == pytest.approx([1, 1, 1], rel=1e-3)


def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Where the learning rates of all steps will be."""
    seen: list[float] = []

    def ready(trainer: SAETrainer) -> None:
        before_each_update(trainer, lambda: seen.append(trainer.adam.param_groups[0]["lr"]))

    trainers(monkeypatch, ready)
    return seen


def test_the_rate_warms_up_and_falls_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates(monkeypatch)
    train_sae(gradients(sparse(count=300)[1]), epochs=200, learning_rate=0.01)
    seen = torch.tensor(found)
    assert len(seen) == 200
    # Six steps up, 114 at the peak, and 80 down, after which the next would be zero.
    assert torch.allclose(seen[:6], 0.01 * torch.arange(1, 7) / 6)
    assert (seen[6:120] == 0.01).all()
    assert torch.allclose(seen[120:], 0.01 * torch.arange(80, 0, -1) / 80)


@pytest.mark.parametrize(("chunk", "work"), [(64, 2**40), (4096, 64 * 60 * 32)])
def test_the_report_is_over_all_gradients(chunk: int, work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # No part of them resembles the whole.
    _, vectors = sparse(count=1500)
    vectors = vectors[vectors.flatten(1)[:, 0].argsort()] * torch.linspace(0.2, 2, 1500)[:, None, None]
    monkeypatch.setattr(sae_report, "MOST_ENCODED", chunk)
    monkeypatch.setattr(sae_report, "MOST_PRODUCTS", work)
    found: list[SAETrainer] = []
    trainers(monkeypatch, found.append)
    directions, report, _ = train_sae(gradients(vectors), latents=60, k=3, epochs=10)
    (trainer,) = found
    encoder, encoder_bias, decoder, decoder_bias = (value.detach().double() for value in trainer.model.parameters())
    centred = vectors.flatten(1).double() / vectors.flatten(1).norm(dim=1).median() - decoder_bias
    values, places = (centred @ encoder.T + encoder_bias).relu().topk(3, dim=1)
    active = torch.zeros(1500, 60, dtype=torch.float64).scatter(1, places, values)
    rest = (centred - active @ decoder).square().sum() / (centred - centred.mean(0)).square().sum()
    assert report.fvu == pytest.approx(float(rest), rel=1e-4)
    assert torch.allclose(10**report.log_densities, (active > 0).double().mean(0).float(), atol=1.1 / 1500)
    energy = active.square().sum(0) / centred.square().sum()
    assert torch.allclose(directions.scores, energy[report.selected].float(), rtol=1e-3, atol=1e-5)


def test_report_and_directions_agree() -> None:
    _, vectors = sparse(count=600)
    directions, report, _ = train_sae(gradients(vectors), latents=60, k=3, epochs=40, density_range=(-2.0, -0.5))
    assert directions.vectors.shape == (len(report.selected), 2, 16)
    assert torch.allclose(directions.vectors.flatten(1).norm(dim=1), torch.ones(len(directions)), atol=1e-5)
    assert (directions.scores.diff() <= 0).all()
    density = report.log_densities[report.selected]
    assert ((density > -2.0) & (density < -0.5)).all()
    torch.testing.assert_close(torch.tensor(directions.densities), 10**density)
    outside = torch.ones(60, dtype=torch.bool)
    outside[report.selected] = False
    assert not ((report.log_densities > -2.0) & (report.log_densities < -0.5))[outside].any()
    assert report.dead == pytest.approx(float(torch.isinf(report.log_densities).float().mean()))
    # At most k of the latents are active at once.
    assert float((10**report.log_densities).sum()) <= 3 + 1e-3
    assert any("60 latents, 3 active" in line for line in report.lines())


def test_new_gradients_are_encoded_and_decoded(tmp_path: Path) -> None:
    _, vectors = sparse(count=2000)
    vectors = vectors * 1e-4
    directions, report, model = train_sae(gradients(vectors[:1600]), latents=80, k=2, epochs=60, learning_rate=3e-3)
    new = vectors[1600:]
    top_acts, top_indices = model.encode(new)
    assert top_acts.shape == top_indices.shape == (400, 2) and (top_acts >= 0).all()
    reconstruction = model.decode(top_acts, top_indices)
    assert reconstruction.shape == new.shape and torch.equal(model(new), reconstruction)
    # As well as those that it was trained on, to within their noise.
    fvu = float((new - reconstruction).square().sum() / (new - new.mean(0)).square().sum())
    assert fvu < 2 * report.fvu < 0.5
    # The code in plain formulas, and atoms that are the directions.
    codes = torch.zeros(400, 80).scatter(1, top_indices, top_acts)
    pre_activations = (new.flatten(1) / model.scale.float() - model.b_dec) @ model.W_enc.T + model.b_enc
    torch.testing.assert_close(codes.sum(1), pre_activations.relu().topk(2, dim=1).values.sum(1))
    torch.testing.assert_close(
        reconstruction.flatten(1), (codes @ model.dictionary.flatten(1) + model.b_dec) * model.scale.float()
    )
    assert torch.equal(model.dictionary[report.selected], directions.vectors)
    with pytest.raises(ElrondError, match=r"of gradients of 2 x 16 values, and these have \(32,\)"):
        model.encode(new.flatten(1))

    model.save(tmp_path / "made" / "sae.safetensors")
    again = TopKSAE.load(tmp_path / "made" / "sae.safetensors")
    assert torch.equal(again(new), reconstruction)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda tensors, metadata: metadata.update(kind="directions"), "does not hold an autoencoder"),
        (lambda tensors, metadata: metadata.update(format_version="2"), "does not hold an autoencoder"),
        (lambda tensors, metadata: metadata.pop("k"), "its tensors are not those"),
        (lambda tensors, metadata: metadata.update(rows="3"), "its tensors are not those"),
        (lambda tensors, metadata: metadata.update(rows="-2", width="-16"), "its tensors are not those"),
        (lambda tensors, metadata: metadata.update(k="0"), "its tensors are not those"),
        (lambda tensors, metadata: metadata.update(k="41"), "its tensors are not those"),
        (lambda tensors, metadata: tensors.pop("b_enc"), "its tensors are not those"),
        (lambda tensors, metadata: tensors.update(W_enc=tensors["W_enc"][:-1]), "its tensors are not those"),
    ],
)
def test_a_file_that_holds_no_autoencoder_is_refused(
    damage: Callable[[dict, dict], Any], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "sae.safetensors"
    TopKSAE(2, 16, 40, 3).save(path)
    tensors, metadata = tensor_files.read(path)
    damage(tensors, metadata)
    path.write_bytes(tensor_files.encode(tensors, metadata))
    with pytest.raises(ElrondError, match=sentence):
        TopKSAE.load(path)
    with pytest.raises(ElrondError, match="a file stands where a folder is needed"):
        TopKSAE(2, 16, 40, 3).save(path / "sae")


def test_the_seed_decides() -> None:
    source = gradients(sparse(count=300)[1])
    one, two, other = (train_sae(source, epochs=5, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one.vectors, two.vectors)
    assert one.vectors.shape != other.vectors.shape or not torch.allclose(one.vectors, other.vectors)


def cancel(*_: object) -> None:
    raise KeyboardInterrupt


class Cancel:
    """A check that counts its calls and cancels at one of them."""

    def __init__(self, at: int = 0) -> None:
        self.calls, self.at = 0, at

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 7, 20])
def test_a_cancelled_training_resumes_exactly(at: int, tmp_path: Path) -> None:
    source, path = gradients(sparse(count=300)[1]), tmp_path / "sae.safetensors"

    def cancel(step: int, _steps: int, _fvu: float) -> None:
        if step == at:
            raise KeyboardInterrupt

    options = {"latents": 48, "k": 4, "epochs": 20, "batch_size": 128}
    with pytest.raises(KeyboardInterrupt):
        train_sae(source, **options, checkpoint=path, on_step=cancel)
    seen: list[int] = []
    resumed, report, _ = train_sae(source, **options, checkpoint=path, on_step=lambda step, *_: seen.append(step))
    whole, expected, _ = train_sae(source, **options)
    assert seen[0] == at + 1 and seen[-1] == 60
    assert torch.equal(resumed.vectors, whole.vectors)
    assert torch.equal(report.losses, expected.losses)
    assert not list(tmp_path.iterdir())


def test_a_cancel_is_noticed_between_pieces_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    source = gradients(sparse(count=300)[1])
    monkeypatch.setattr(sae_data, "PIECE_VALUES", 30 * 32)
    monkeypatch.setattr(sae_report, "MOST_PRODUCTS", 20 * 48 * 32)
    check, at_steps = Cancel(), []
    median = Cancel()
    geometric_median(source.flat, 1, check=median)
    assert median.calls == 20

    train_sae(source, latents=48, epochs=5, on_step=lambda *_: at_steps.append(check.calls), check=check)
    # The set-up goes through the ten pieces to look for what is not finite, for the scale, the mean and the variance;
    # and several times for the median.
    assert at_steps[0] >= 70
    # After the encoder, TopK, the decoder, the backward pass and its first part, and the clipping.
    assert all(later - earlier >= 6 for earlier, later in pairwise(at_steps))
    # The fifteen pieces of the report.
    assert check.calls - at_steps[-1] == 15
    before = Cancel()
    with pytest.raises(KeyboardInterrupt):
        train_sae(source, latents=48, epochs=5, on_step=cancel, check=before)
    kept = Cancel()
    with pytest.raises(KeyboardInterrupt):
        train_sae(source, latents=48, epochs=5, on_step=cancel, check=kept, checkpoint=Path("/dev/null/sae"))
    assert kept.calls - before.calls == 10


def test_a_gradient_that_is_not_finite_is_named_whatever_the_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = sparse(count=300)[1]
    vectors[217, 1, 3] = torch.inf
    monkeypatch.setattr(sae_data, "PIECE_VALUES", 30 * 32)
    with pytest.raises(ElrondError, match="Gradient 217 is not finite"):
        train_sae(gradients(vectors))


def test_a_training_cancelled_anywhere_resumes_exactly(tmp_path: Path) -> None:
    # Few gradients for many latents: some die, so that their count of steps matters.
    source, path = gradients(sparse(count=40)[1]), tmp_path / "sae.safetensors"
    options = {"latents": 200, "k": 2, "epochs": 120, "learning_rate": 0.02}
    counted = Cancel()
    whole, expected, _ = train_sae(source, **options, checkpoint=path, check=counted)
    assert expected.dead > 0.1
    for at in (1, 4, *range(counted.calls // 3, counted.calls // 3 + 8), *range(counted.calls - 12, counted.calls + 1)):
        with pytest.raises(KeyboardInterrupt):
            train_sae(source, **options, checkpoint=path, check=Cancel(at))
        resumed, report, _ = train_sae(source, **options, checkpoint=path)
        assert torch.equal(resumed.vectors, whole.vectors)
        assert torch.equal(report.losses, expected.losses) and report.fvu == expected.fvu


def test_what_breaks_off_an_update_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, path = gradients(sparse(count=300)[1]), tmp_path / "sae.safetensors"
    whole = train_sae(source, epochs=20)[0]

    def ready(trainer: SAETrainer) -> None:
        trainer.adam.register_step_post_hook(lambda *_: trainer.step != 13 or cancel())

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        trainers(patch, ready)
        train_sae(source, epochs=20, checkpoint=path)
    seen: list[int] = []
    resumed = train_sae(source, epochs=20, checkpoint=path, on_step=lambda step, *_: seen.append(step))[0]
    # From the last of those that are written regularly.
    assert seen[0] == 13 and torch.equal(resumed.vectors, whole.vectors)


def test_a_checkpoint_is_written_ten_times(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on demand" / "sae.safetensors"
    seen = []

    def look(step: int, *_: object) -> None:
        if step >= 6:
            seen.append(int(tensor_files.read(path)[1]["step"]))

    train_sae(gradients(sparse(count=300)[1]), epochs=60, checkpoint=path, on_step=look)
    assert seen == [step // 6 * 6 for step in range(6, 61)]
    assert not list(path.parent.iterdir())


def test_another_range_of_densities_needs_no_training(tmp_path: Path) -> None:
    source, path = gradients(sparse(count=300)[1]), tmp_path / "sae.safetensors"
    with pytest.raises(ElrondError, match="widen the range"):
        train_sae(source, epochs=25, density_range=(-9.0, -8.0), checkpoint=path)
    seen: list[int] = []
    found = train_sae(source, epochs=25, checkpoint=path, on_step=lambda step, *_: seen.append(step))[0]
    assert not seen
    assert torch.equal(found.vectors, train_sae(source, epochs=25)[0].vectors)
    assert not list(tmp_path.iterdir())


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("full", [False, True])
def test_what_cannot_be_kept_stops_nothing(full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = gradients(sparse(count=300)[1])
    whole = train_sae(source, epochs=30)[0]
    folder = tmp_path / "folder"
    if full:
        monkeypatch.setattr(os, "fsync", full_disk)
    else:
        folder.write_text("a file")
    said: list[str] = []
    found = train_sae(source, epochs=30, checkpoint=folder / "sae", warn=said.append)[0]
    assert torch.equal(found.vectors, whole.vectors)
    (sentence,) = said
    assert str(folder) in sentence and "it goes on" in sentence
    assert ("the disk is full" in sentence) == full
    with pytest.raises(KeyboardInterrupt):
        train_sae(source, epochs=30, checkpoint=folder / "sae", on_step=cancel)
    assert not full or not list(folder.iterdir())


def test_what_was_kept_stays_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, path = gradients(sparse(count=300)[1]), tmp_path / "sae.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_sae(source, epochs=9, checkpoint=path, on_step=lambda step, *_: step < 4 or cancel())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", full_disk)
        train_sae(source, epochs=9, checkpoint=path, on_step=lambda step, *_: step < 7 or cancel())
    seen: list[int] = []
    train_sae(source, epochs=9, checkpoint=path, on_step=lambda step, *_: seen.append(step))
    assert seen == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, metadata: tensors.pop("steps_since_fired"),
        lambda tensors, metadata: tensors.pop("b_dec.exp_avg_sq"),
        lambda tensors, metadata: tensors.update(more=torch.zeros(1)),
        lambda tensors, metadata: tensors.update(**{"W_enc.exp_avg": tensors["W_enc.exp_avg"][:-1].clone()}),
        lambda tensors, metadata: tensors.update(b_enc=tensors["b_enc"].double()),
        lambda tensors, metadata: tensors["W_dec"].view(-1)[3:].fill_(torch.nan),
        lambda tensors, metadata: tensors.update(losses=tensors["losses"][1:].clone()),
        lambda tensors, metadata: metadata.pop("step"),
        lambda tensors, metadata: metadata.update(step="four"),
        lambda tensors, metadata: metadata.update(end="3"),
        lambda tensors, metadata: metadata.update(end="10"),
        lambda tensors, metadata: metadata.pop("identity"),
    ],
)
def test_a_damaged_checkpoint_counts_as_none(damage: Callable[[dict, dict], Any], tmp_path: Path) -> None:
    source, path = gradients(sparse(count=300)[1]), tmp_path / "sae.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_sae(source, epochs=9, checkpoint=path, on_step=lambda step, *_: step < 4 or cancel())
    tensors, metadata = tensor_files.read(path)
    damage(tensors, metadata)
    path.write_bytes(tensor_files.encode(tensors, metadata))
    seen: list[int] = []
    train_sae(source, epochs=9, checkpoint=path, on_step=lambda step, *_: seen.append(step))
    assert seen == list(range(1, 10))


def test_no_flipped_bit_of_a_checkpoint_changes_the_directions(tmp_path: Path) -> None:
    """Of twenty flipped bits all over the file, none is trained on."""
    source, path = gradients(sparse(count=300)[1]), tmp_path / "sae.safetensors"
    whole = train_sae(source, epochs=9)[0]
    with pytest.raises(KeyboardInterrupt):
        train_sae(source, epochs=9, checkpoint=path, on_step=lambda step, *_: step < 4 or cancel())
    content = path.read_bytes()
    for place in torch.linspace(9, len(content) - 1, 20).long().tolist():
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        seen: list[int] = []
        found = train_sae(source, epochs=9, checkpoint=path, on_step=lambda step, *_: seen.append(step))[0]  # noqa: B023
        assert torch.equal(found.vectors, whole.vectors) and seen[0] == 1, place


@pytest.mark.parametrize("change", [torch.neg, lambda vectors: vectors.flip(0)])
def test_a_checkpoint_of_gradients_with_the_same_sum_is_not_continued(
    change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    vectors, path = sparse(count=300)[1], tmp_path / "sae.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_sae(gradients(vectors), epochs=9, checkpoint=path, on_step=lambda step, *_: step < 4 or cancel())
    seen: list[int] = []
    train_sae(gradients(change(vectors)), epochs=9, checkpoint=path, on_step=lambda step, *_: seen.append(step))
    assert seen[0] == 1


def test_a_checkpoint_of_something_else_is_not_continued(tmp_path: Path) -> None:
    source, path = gradients(sparse(count=300)[1]), tmp_path / "sae.safetensors"

    for content in (b"rubbish", None):
        if content:
            path.write_bytes(content)
        else:
            with pytest.raises(KeyboardInterrupt):
                train_sae(source, epochs=3, seed=1, checkpoint=path, on_step=cancel)
        again = train_sae(source, epochs=3, seed=2, checkpoint=path)[0]
        assert torch.equal(again.vectors, train_sae(source, epochs=3, seed=2)[0].vectors)


def test_stops_when_nothing_improves(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.randn(64, 1, 8, generator=torch.Generator().manual_seed(0))
    # As many active latents as dimensions explain everything soon.
    options = {"latents": 32, "k": 16, "batch_size": 64}
    seen: list[tuple[int, int]] = []
    rate = rates(monkeypatch)
    _, report, _ = train_sae(
        gradients(noise),
        **options,
        epochs=3000,
        patience=2,
        on_step=lambda step, steps, _: seen.append((step, steps)),
    )
    steps = len(report.losses)
    assert report.stopped and steps < 3000
    assert "stopped early" in report.lines()[-1]
    # Whoever shows progress learns where it ends.
    assert seen[0] == (1, 3000) and seen[-1] == (steps, steps)
    # The rate falls as soon as FVU has stalled, over as many steps as ever.
    assert all(each == 1e-3 for each in rate[90:-1200])
    assert torch.allclose(torch.tensor(rate[-1200:]), 1e-3 * torch.arange(1200, 0, -1) / 1200)
    _, patient, _ = train_sae(gradients(noise), **options, epochs=500, patience=0)
    assert not patient.stopped and len(patient.losses) == 500


def test_losses_and_their_gradients_are_those_of_the_plain_formulas() -> None:
    batch = sparse(count=300)[1].flatten(1).double()
    trainer = trainer_of(batch, 0.7, 40, 3, batch_size=300)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
    trainer.steps_since_fired[5:30] = 10_000

    def top(before: torch.Tensor, k: int) -> torch.Tensor:
        values, places = before.relu().topk(k, dim=1)
        return torch.zeros_like(before).scatter(1, places, values)

    encoder, encoder_bias, decoder, decoder_bias = (
        value.detach().clone().requires_grad_() for value in trainer.model.parameters()
    )
    before = (batch - decoder_bias) @ encoder.T + encoder_bias
    active = top(before, 3)
    rest = batch - (active @ decoder + decoder_bias)
    plain = rest.square().sum(1).mean() / 0.7
    dead = torch.zeros(40, dtype=torch.bool)
    dead[5:30] = True
    dead &= ~(active > 0).any(0)
    wanted = rest[: trainer.config.auxk_rows].detach()
    found = top(before[: trainer.config.auxk_rows, dead], min(int(dead.sum()), 16)) @ decoder[dead]
    whole = plain + trainer.config.auxk_weight * (wanted - found).square().sum() / wanted.square().sum()
    whole.backward()

    fvu, loss, steps_since_fired = trainer.loss(batch)
    loss.backward()
    assert dead.any() and torch.equal(steps_since_fired > 9999, dead)
    assert torch.allclose(fvu, plain) and torch.allclose(loss, whole)
    for parameter, other in zip(
        trainer.model.parameters(), (encoder, encoder_bias, decoder, decoder_bias), strict=True
    ):
        assert torch.allclose(parameter.grad, other.grad)


def test_geometric_median_shrugs_off_outliers() -> None:
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    points[:40] += 1000
    median = geometric_median(points)
    assert median.norm() < 1
    # No point nearby has a smaller summed distance.
    best = (points - median).norm(dim=1).sum()
    for step in 0.05 * torch.cat([torch.eye(3), -torch.eye(3)]):
        assert (points - median - step).norm(dim=1).sum() >= best


def test_pieces_make_the_same_median_and_the_same_training(monkeypatch: pytest.MonkeyPatch) -> None:
    source = gradients(sparse(count=300)[1])
    options = {"latents": 48, "epochs": 5}
    median, (whole, expected, _) = geometric_median(source.flat), train_sae(source, **options)
    monkeypatch.setattr(sae_data, "PIECE_VALUES", 30 * 32)
    torch.testing.assert_close(geometric_median(source.flat), median)
    directions, report, _ = train_sae(source, **options)
    torch.testing.assert_close(directions.vectors, whole.vectors, rtol=0, atol=1e-4)
    assert report.fvu == pytest.approx(expected.fvu, rel=1e-4)


@pytest.mark.parametrize(
    ("vectors", "options", "sentence"),
    [
        (torch.ones(1, 1, 4), {}, "needs at least 2 gradients, got 1"),
        (torch.tensor([[[1.0]], [[torch.nan]]]), {}, "Gradient 1 is not finite"),
        (torch.ones(9, 1, 4), {}, "All gradients are the same"),
        (torch.zeros(9, 1, 4), {}, "All gradients are the same"),
        (torch.eye(4)[:, None], {"latents": 0}, "number of latents must be at least 1, got 0"),
        (torch.eye(4)[:, None], {"k": 5}, r"k must be between 1 and the number of latents \(4\), got 5"),
        (torch.eye(4)[:, None], {"epochs": 0}, "number of epochs must be at least 1, got 0"),
        (torch.eye(4)[:, None], {"learning_rate": 0.0}, "learning rate must be above zero"),
        (torch.eye(4)[:, None], {"batch_size": 0}, "batch size must be at least 1"),
        (torch.eye(4)[:, None], {"density_range": (0.0, -5.0)}, "must go from low to high"),
        (torch.eye(4)[:, None], {"epochs": 1, "density_range": (-9.0, -8.0)}, "widen the range"),
        (
            sparse(count=300)[1],
            {"epochs": 200, "learning_rate": 1.0},
            "All 32 latents are dead.* lower the learning rate",
        ),
    ],
)
def test_what_is_refused(vectors: torch.Tensor, options: dict, sentence: str) -> None:
    with pytest.raises(ElrondError, match=sentence):
        train_sae(gradients(vectors), **options)
