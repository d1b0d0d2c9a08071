"""The sparse autoencoder: recovers a known dictionary, repeats itself, resumes exactly, and refuses bad input."""

from pathlib import Path

import pytest
import torch

from elrond_core.errors import ElrondError
from elrond_core.gradients import Gradients
from elrond_core.provenance import Provenance
from elrond_core.sae import _AUX_ROWS, _AUX_WEIGHT, _Trainer, geometric_median, train_sae


def gradients(vectors: torch.Tensor) -> Gradients:
    count = len(vectors)
    zeros = torch.zeros(count, dtype=torch.int64)
    return Gradients(vectors, torch.ones(count), zeros, zeros, Provenance("SDXL"), torch.empty(0, *vectors.shape[1:]))


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
    directions, report = train_sae(gradients(vectors * scale), latents=80, k=2, epochs=100, learning_rate=3e-3)
    similarity = dictionary @ directions.vectors.flatten(1).T
    assert (similarity.amax(1) > 0.95).float().mean() >= 0.98
    assert report.fvu < 0.05
    assert len(report.losses) <= 100 * 8


def test_report_and_directions_agree() -> None:
    _, vectors = sparse(count=600)
    directions, report = train_sae(gradients(vectors), latents=60, k=3, epochs=40, density_range=(-2.0, -0.5))
    assert directions.vectors.shape == (len(report.kept), 2, 16)
    assert torch.allclose(directions.vectors.flatten(1).norm(dim=1), torch.ones(len(directions)), atol=1e-5)
    assert (directions.scores.diff() <= 0).all()
    density = report.log_densities[report.kept]
    assert ((density > -2.0) & (density < -0.5)).all()
    torch.testing.assert_close(torch.tensor(directions.densities), 10**density)
    outside = torch.ones(60, dtype=torch.bool)
    outside[report.kept] = False
    assert not ((report.log_densities > -2.0) & (report.log_densities < -0.5))[outside].any()
    assert report.dead == pytest.approx(float(torch.isinf(report.log_densities).float().mean()))
    # At most k of the latents are active at once.
    assert float((10**report.log_densities).sum()) <= 3 + 1e-3
    assert any("60 latents, 3 active" in line for line in report.lines())


def test_the_seed_decides() -> None:
    source = gradients(sparse(count=300)[1])
    one, two, other = (train_sae(source, epochs=5, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one.vectors, two.vectors)
    assert one.vectors.shape != other.vectors.shape or not torch.allclose(one.vectors, other.vectors)


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
    resumed, report = train_sae(source, **options, checkpoint=path, on_step=lambda step, *_: seen.append(step))
    whole, expected = train_sae(source, **options)
    assert seen[0] == at + 1 and seen[-1] == 60
    assert torch.equal(resumed.vectors, whole.vectors)
    assert torch.equal(report.losses, expected.losses)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_something_else_is_not_continued(tmp_path: Path) -> None:
    source, path = gradients(sparse(count=300)[1]), tmp_path / "sae.safetensors"

    def cancel(*_: object) -> None:
        raise KeyboardInterrupt

    for content in (b"rubbish", None):
        if content:
            path.write_bytes(content)
        else:
            with pytest.raises(KeyboardInterrupt):
                train_sae(source, epochs=3, seed=1, checkpoint=path, on_step=cancel)
        again = train_sae(source, epochs=3, seed=2, checkpoint=path)[0]
        assert torch.equal(again.vectors, train_sae(source, epochs=3, seed=2)[0].vectors)


def test_stops_when_nothing_improves() -> None:
    noise = torch.randn(64, 1, 8, generator=torch.Generator().manual_seed(0))
    # As many active latents as dimensions explain everything soon.
    _, report = train_sae(gradients(noise), latents=32, k=16, epochs=3000, batch_size=64, patience=2)
    assert report.stopped and len(report.losses) < 3000
    assert "stopped early" in report.lines()[-1]
    _, patient = train_sae(gradients(noise), latents=32, k=16, epochs=500, batch_size=64, patience=0)
    assert not patient.stopped and len(patient.losses) == 500


def test_losses_and_their_gradients_are_those_of_the_plain_formulas() -> None:
    batch = sparse(count=300)[1].flatten(1).double()
    trainer = _Trainer(batch, 0.7, 40, 3, None, 1e-3, 300, 0, 5)
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
    trainer.idle[5:30] = 10_000

    def top(before: torch.Tensor, k: int) -> torch.Tensor:
        values, places = before.relu().topk(k, dim=1)
        return torch.zeros_like(before).scatter(1, places, values)

    encoder, encoder_bias, decoder, decoder_bias = (
        value.detach().clone().requires_grad_() for value in trainer.parameters
    )
    before = (batch - decoder_bias) @ encoder.T + encoder_bias
    active = top(before, 3)
    rest = batch - (active @ decoder + decoder_bias)
    plain = rest.square().sum(1).mean() / 0.7
    dead = torch.zeros(40, dtype=torch.bool)
    dead[5:30] = True
    dead &= ~(active > 0).any(0)
    wanted = rest[:_AUX_ROWS].detach()
    found = top(before[:_AUX_ROWS, dead], min(int(dead.sum()), 16)) @ decoder[dead]
    whole = plain + _AUX_WEIGHT * (wanted - found).square().sum() / wanted.square().sum()
    whole.backward()

    fvu, loss = trainer.loss(batch)
    loss.backward()
    assert dead.any() and torch.equal(trainer.idle > 9999, dead)
    assert torch.allclose(fvu, plain) and torch.allclose(loss, whole)
    for parameter, other in zip(trainer.parameters, (encoder, encoder_bias, decoder, decoder_bias), strict=True):
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
    ],
)
def test_what_is_refused(vectors: torch.Tensor, options: dict, sentence: str) -> None:
    with pytest.raises(ElrondError, match=sentence):
        train_sae(gradients(vectors), **options)
