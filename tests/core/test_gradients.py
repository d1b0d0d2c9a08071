"""Collecting gradients, on a small network: against finite differences, over batch sizes, seeds, and in use."""

from dataclasses import replace

import pytest
import torch

from elrond_core.collect.collection import CollectionPlan, collect
from elrond_core.collect.differentiate import gradient
from elrond_core.collect.pairs import draw_pairs
from elrond_core.errors import ElrondError
from elrond_core.gradients import Gradients
from elrond_core.provenance import Provenance
from elrond_core.seeding import normal

SHAPE, ROWS, WIDTH = (2, 4, 4), 2, 5
HERE = Provenance("toy", concept="thing")


class Network:
    """A denoiser of 32 latent values, conditioned on two rows of five; its weights are in double precision."""

    def __init__(self, scale: float = 1.0) -> None:
        g = torch.Generator().manual_seed(0)
        self.rows = torch.randn(ROWS, WIDTH, generator=g)
        self.first = torch.randn(32 + ROWS * WIDTH, 24, generator=g, dtype=torch.float64) / 6
        self.second = torch.randn(24, 32, generator=g, dtype=torch.float64) * scale / 5
        self.sizes: list[int] = []

    def rows_at(self, sigma: float) -> torch.Tensor:
        return self.rows

    def reduce_memory(self) -> bool:
        return False

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        return (1 - sigma) * latents + sigma * noise

    def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(noisy))
        inputs = torch.cat([noisy.flatten(1).double() * sigma, rows.flatten(1).double()], dim=1)
        return (torch.tanh(inputs @ self.first) @ self.second).reshape(-1, *SHAPE)


@pytest.fixture(scope="module")
def realizations() -> torch.Tensor:
    return torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(1))


def run(
    realizations: torch.Tensor, count: int = 12, model: Network | None = None, calls: dict | None = None, **settings
) -> Gradients:
    """Collect with a plan of these settings; `calls` are the other arguments of `collect`."""
    plan = CollectionPlan(**{"count": count, "sigma": (0.7,), "seed": 3, "probes": True, **settings})
    return collect(model or Network(), realizations, HERE, plan, **calls or {})


def loss(rows: torch.Tensor, noisy: torch.Tensor, target: torch.Tensor) -> float:
    return float((Network().denoised(noisy, 0.7, rows) - target).square().mean())


def test_central_differences(realizations: torch.Tensor) -> None:
    found = run(realizations)
    model = Network()
    noise = normal(SHAPE, 3, "noise", list(range(12)))
    probes = normal(SHAPE, 3, "probe", list(range(12)))
    step = 1e-4
    for i in (0, 5, 11):
        noisy = model.noised(realizations[found.sources[i]][None], noise[i : i + 1], 0.7)
        target = realizations[found.targets[i]][None].double()
        for row in range(ROWS):
            for column in range(WIDTH):
                nudge = torch.zeros(1, ROWS, WIDTH, dtype=torch.float64)
                nudge[0, row, column] = step
                up, down = model.rows.double() + nudge, model.rows.double() - nudge
                slope = (loss(up, noisy, target) - loss(down, noisy, target)) / (2 * step)
                assert float(found.vectors[i, row, column]) == pytest.approx(slope, rel=1e-4, abs=1e-8)
                change = model.denoised(noisy, 0.7, up) - model.denoised(noisy, 0.7, down)
                answer = 2 / 32 * float((change * probes[i]).sum()) / (2 * step)
                assert float(found.probes[i, row, column]) == pytest.approx(answer, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_size_does_not_matter(realizations: torch.Tensor, batch_size: int) -> None:
    one, other = run(realizations), run(realizations, batch_size=batch_size)
    assert torch.equal(one.sources, other.sources) and torch.equal(one.targets, other.targets)
    assert torch.allclose(one.vectors, other.vectors, rtol=1e-5, atol=1e-9)
    assert torch.allclose(one.probes, other.probes, rtol=1e-5, atol=1e-9)


def test_a_longer_collection_starts_with_the_shorter(realizations: torch.Tensor) -> None:
    short, long = run(realizations, count=5), run(realizations, count=12)
    assert torch.allclose(short.vectors, long.vectors[:5], rtol=1e-5, atol=1e-9)


def test_the_seed_decides(realizations: torch.Tensor) -> None:
    one, same, other = (run(realizations, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.vectors, same.vectors)
    assert not torch.allclose(one.vectors, other.vectors)


def test_following_the_gradient_turns_a_into_b(realizations: torch.Tensor) -> None:
    found, model = run(realizations), Network()
    noise = normal(SHAPE, 3, "noise", list(range(12)))
    for i in range(12):
        noisy = model.noised(realizations[found.sources[i]][None], noise[i : i + 1], 0.7)
        target = realizations[found.targets[i]][None].double()
        g = found.vectors[i][None].double()
        before = loss(model.rows.double()[None], noisy, target)
        after = loss(model.rows.double()[None] - 0.01 * g / g.norm(), noisy, target)
        # The slope is what the gradient's length promises.
        assert (before - after) / 0.01 == pytest.approx(float(g.norm()), rel=0.05)


def test_what_is_recorded(realizations: torch.Tensor) -> None:
    progress: list[int] = []
    found = run(realizations, batch_size=5, calls={"on_batch": progress.append})
    assert progress == [5, 10, 12]
    assert found.vectors.shape == found.probes.shape == (12, ROWS, WIDTH)
    assert found.vectors.dtype == torch.float32 and found.flat.shape == (12, ROWS * WIDTH)
    here = found.provenance
    assert (here.count, here.seed, here.sigma, here.concept) == (12, 3, (0.7,), "thing")
    assert here.token_norm == pytest.approx(float(Network().rows.norm(dim=1).mean()))
    assert len(run(realizations, probes=False).probes) == 0


def test_cancelling(realizations: torch.Tensor) -> None:
    def cancel(done: int) -> None:
        raise InterruptedError(done)

    with pytest.raises(InterruptedError, match="2"):
        run(realizations, batch_size=2, calls={"on_batch": cancel})


@pytest.mark.parametrize("targets", [2, 5])
def test_one_forward_pass_serves_several_targets(realizations: torch.Tensor, targets: int) -> None:
    model = Network()
    found = run(realizations, model=model, batch_size=2, targets=targets)
    sources = -(-12 // targets)
    assert sum(model.sizes) == sources and len(found) == 12 and len(found.probes) == sources
    noise = normal(SHAPE, 3, "noise", list(range(sources)))
    probes = normal(SHAPE, 3, "probe", list(range(sources)))
    for i in range(12):
        a, b = realizations[found.sources[i]][None], realizations[found.targets[i]][None]
        k = slice(i // targets, i // targets + 1)
        alone, answer = gradient(model, a, b, noise[k], 0.7, probes[k])
        assert torch.allclose(found.vectors[i], alone[0], rtol=1e-5, atol=1e-9)
        assert torch.allclose(found.probes[k], answer, rtol=1e-5, atol=1e-9)
    for k in range(0, 12, targets):
        group = slice(k, k + targets)
        assert len(set(found.targets[group].tolist())) == len(found.targets[group])


@pytest.mark.parametrize("levels", [(0.7,), (0.7, 0.4)])
@pytest.mark.parametrize("limit", [0, 1])
def test_many_targets_take_several_probes(levels: tuple[float, ...], limit: int) -> None:
    realizations = torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(1))
    model = Small(limit) if limit else Network()
    # Three probes for every seventeen targets, and all of them although the last source has one target.
    found = run(realizations, 35, model, sigma=levels, batch_size=2, targets=17)
    assert len(found) == 35 and len(found.probes) == 9
    expected = [0.7] * 9 if levels == (0.7,) else [0.7] * 3 + [0.4] * 3 + [0.7] * 3
    if found.probe_sigma is not None:
        assert found.probe_sigma.tolist() == pytest.approx(expected)
    noise, probes = normal(SHAPE, 3, "noise", list(range(3))), normal(SHAPE, 3, "probe", list(range(9)))
    for k in range(9):
        source = realizations[found.sources[17 * (k // 3)]][None]
        _, answer = gradient(Network(), source, source, noise[k // 3][None], expected[k], probes[k][None])
        assert torch.allclose(found.probes[k], answer[0], rtol=1e-5, atol=1e-9)


class Small(Network):
    """Has memory for some samples only, and for more once it spares; runs out in the forward or the backward pass."""

    def __init__(self, limit: int, spared: int = 0, backward: bool = False) -> None:
        super().__init__()
        self.limit, self.spared, self.backward = limit, spared, backward

    def reduce_memory(self) -> bool:
        before, self.limit = self.limit, max(self.limit, self.spared)
        return self.limit > before

    def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        estimate = super().denoised(noisy, sigma, rows)
        if self.backward:
            estimate.register_hook(lambda _: self.check(len(noisy)))
        else:
            self.check(len(noisy))
        return estimate

    def check(self, size: int) -> None:
        if size > self.limit:
            raise torch.cuda.OutOfMemoryError("Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("backward", [False, True])
def test_a_batch_that_does_not_fit_is_halved(realizations: torch.Tensor, backward: bool) -> None:
    model = Small(limit=2, backward=backward)
    options = {"batch_size": 7, "targets": 2}
    found = run(realizations, 20, model, **options)
    expected = run(realizations, 20, **options)
    # Seven and three do not fit; what comes after that does not try again.
    assert model.sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert torch.allclose(found.vectors, expected.vectors, rtol=1e-5, atol=1e-9)
    assert torch.allclose(found.probes, expected.probes, rtol=1e-5, atol=1e-9)


def test_memory_is_spared_when_a_single_sample_does_not_fit(realizations: torch.Tensor) -> None:
    found = run(realizations, 5, Small(limit=0, spared=1), batch_size=2, probes=False)
    expected = run(realizations, 5, batch_size=2, probes=False)
    assert torch.allclose(found.vectors, expected.vectors, rtol=1e-5, atol=1e-9)
    with pytest.raises(ElrondError, match="too little memory for a single gradient"):
        run(realizations, 5, Small(limit=0), batch_size=2, probes=False)


def test_other_faults_of_the_model_are_not_taken_for_a_lack_of_memory(realizations: torch.Tensor) -> None:
    class Faulty(Network):
        def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
            return super().denoised(noisy[:, :1], sigma, rows)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(realizations, 5, Faulty(), probes=False)


def test_pairs() -> None:
    pairs = draw_pairs(4000, 5, 0)
    assert (pairs[:, 0] != pairs[:, 1]).all() and pairs.min() == 0 and pairs.max() == 4
    assert torch.equal(pairs[:100], draw_pairs(100, 5, 0))
    counts = torch.bincount(pairs[:, 0] * 5 + pairs[:, 1], minlength=25).reshape(5, 5)
    # 200 expected of each of the twenty ordered pairs; five standard deviations are 69.
    assert (counts.fill_diagonal_(200) - 200).abs().max() < 69
    shared = draw_pairs(4000, 5, 0, targets=4).view(1000, 4, 2)
    assert (shared[:, :, 0] == shared[:, :1, 0]).all()
    assert (shared.sum(1)[:, 1] + shared[:, 0, 0] == 0 + 1 + 2 + 3 + 4).all()
    assert torch.equal(shared.flatten(0, 1)[:99], draw_pairs(99, 5, 0, targets=4))


class Detached(Network):
    def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        return noisy


def test_what_is_refused(realizations: torch.Tensor) -> None:
    with pytest.raises(ElrondError, match="number of gradients must be at least 1, got 0"):
        run(realizations, count=0)
    with pytest.raises(ElrondError, match="noise level must be above zero, got 0"):
        run(realizations, sigma=(0.0,))
    with pytest.raises(ElrondError, match="two realizations to compare, and there is 1"):
        run(realizations[:1])
    with pytest.raises(ElrondError, match="each can be compared with 1 to 5 others, not 6"):
        run(realizations, targets=6)
    a = realizations[:1]
    with pytest.raises(ElrondError, match="does not depend on the concept's rows"):
        gradient(Detached(), a, a, a, 0.5)
    with pytest.raises(ElrondError, match="not finite; load it in bfloat16 or float32"):
        gradient(Network(scale=torch.inf), a, a, a, 0.5)
    with pytest.raises(ElrondError, match=r"Gradients must be \(N, rows, d\), got \(3, 4\)"):
        Gradients(torch.ones(3, 4), torch.ones(3), a, a, HERE, torch.ones(0, 4))
    with pytest.raises(ElrondError, match="3 gradients need as many noise levels"):
        Gradients(torch.ones(3, 1, 4), torch.ones(2), torch.ones(3), torch.ones(3), HERE, torch.ones(0, 1, 4))


def levels(realizations: torch.Tensor, **options) -> Gradients:
    return run(realizations, count=23, sigma=(0.9, 0.4, 0.2), batch_size=2, targets=2, **options)


def test_noise_levels_take_turns(realizations: torch.Tensor) -> None:
    found, model = levels(realizations), Network()
    assert found.provenance.sigma == (0.9, 0.4, 0.2) and found.levels == pytest.approx([0.9, 0.4, 0.2])
    noise, probes = (normal(SHAPE, 3, purpose, list(range(12))) for purpose in ("noise", "probe"))
    for i in range(23):
        k = i // 2
        level = (0.9, 0.4, 0.2)[k % 3]
        a, b = realizations[found.sources[i]][None], realizations[found.targets[i]][None]
        alone, answer = gradient(model, a, b, noise[k : k + 1], level, probes[k : k + 1])
        assert float(found.sigma[i]) == float(found.probe_sigma[k]) == pytest.approx(level)
        assert torch.allclose(found.vectors[i], alone[0], rtol=1e-5, atol=1e-9)
        assert torch.allclose(found.probes[k], answer[0], rtol=1e-5, atol=1e-9)
    assert run(realizations, sigma=(0.7,)).probe_sigma is None


def test_selected_gradients_keep_what_belongs_to_them(realizations: torch.Tensor) -> None:
    found = levels(realizations)
    mask = found.sources == found.sources[0]
    part = found.select(mask)
    for name in ("vectors", "sigma", "sources", "targets"):
        assert torch.equal(getattr(part, name), getattr(found, name)[mask])
    assert torch.equal(part.probes, found.probes) and torch.equal(part.probe_sigma, found.probe_sigma)
    assert (part.provenance.count, part.provenance.sigma) == (int(mask.sum()), tuple(part.sigma.unique().tolist()))
    none = found.select(mask, torch.zeros(len(found.probes), dtype=torch.bool))
    assert len(none.probes) == len(none.probe_sigma) == 0 and len(none) == len(part)


def test_levels_apart_and_together(realizations: torch.Tensor) -> None:
    found = levels(realizations)
    second = found.at_levels([found.levels[1]])
    assert torch.equal(second.vectors, found.vectors[[2, 3, 8, 9, 14, 15, 20, 21]])
    assert torch.equal(second.probes, found.probes[[1, 4, 7, 10]])
    assert (second.provenance.count, second.levels) == (8, [found.levels[1]])
    assert torch.equal(found.at_levels(found.levels).vectors, found.vectors)
    even = found.normalised()
    for level in found.levels:
        one, other = found.at_levels([level]), even.at_levels([level])
        length = float(one.flat.norm(dim=1).square().mean().sqrt())
        assert torch.allclose(other.vectors * length, one.vectors, rtol=1e-5)
        assert torch.allclose(other.probes * length, one.probes, rtol=1e-5)
        assert float(other.flat.square().sum(1).mean()) == pytest.approx(1)
    with pytest.raises(ElrondError, match=r"no gradients of that noise level, only of 0\.9, 0\.4, 0\.2"):
        found.at_levels([0.5])
    nothing = levels(realizations, probes=False)
    assert len(nothing.at_levels([nothing.levels[0]]).probes) == len(nothing.normalised().probes) == 0


def test_rows_by_themselves_and_all_alike(realizations: torch.Tensor) -> None:
    found, model, step = levels(realizations), Network(), 1e-4
    found = replace(found, provenance=found.provenance.with_(rows=(4, 5), tokens=("chiaro", "scuro")))
    second, alike = found.of_row(1), found.summed_over_rows()
    assert torch.equal(second.vectors, found.vectors[:, 1:]) and torch.equal(second.probes, found.probes[:, 1:])
    assert (second.provenance.rows, second.provenance.tokens) == ((5,), ("scuro",))
    assert alike.provenance == found.provenance and alike.vectors.shape == (23, 1, WIDTH)
    noise, probe = (normal(SHAPE, 3, purpose, [0]) for purpose in ("noise", "probe"))
    noisy = model.noised(realizations[found.sources[0]][None], noise, 0.9)
    target = realizations[found.targets[0]][None].double()
    for column in range(WIDTH):
        # Every row takes the same step.
        nudge = torch.zeros(1, 1, WIDTH, dtype=torch.float64)
        nudge[..., column] = step
        up, down = (model.denoised(noisy, 0.9, model.rows.double() + sign * nudge) for sign in (1, -1))
        slope = float((up - target).square().mean() - (down - target).square().mean()) / (2 * step)
        assert float(alike.vectors[0, 0, column]) == pytest.approx(slope, rel=1e-4, abs=1e-8)
        answer = 2 / 32 * float(((up - down) * probe).sum()) / (2 * step)
        assert float(alike.probes[0, 0, column]) == pytest.approx(answer, rel=1e-4, abs=1e-8)
    for row in (2, -1):
        with pytest.raises(ElrondError, match="has 2 rows, and no row"):
            found.of_row(row)


def test_the_common_gradient_is_removed(realizations: torch.Tensor) -> None:
    whole, rest = run(realizations), run(realizations, other_rows=1)
    assert torch.allclose(rest.vectors, whole.vectors[:, :1] - whole.vectors.mean(1, keepdim=True), atol=1e-9)
    assert torch.allclose(rest.probes, whole.probes[:, :1] - whole.probes.mean(1, keepdim=True), atol=1e-9)
    assert rest.provenance.token_norm == pytest.approx(float(Network().rows[0].norm()))


class Features(Network):
    """What comes out is three features of the estimate."""

    def denoised(self, noisy: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        return features(super().denoised(noisy, sigma, rows))


def features(latents: torch.Tensor) -> torch.Tensor:
    return torch.stack([latents.double().flatten(1).pow(k).mean(1) for k in (1, 2, 3)], dim=1)[..., None, None]


def test_the_loss_may_be_of_features(realizations: torch.Tensor) -> None:
    model, noise = Features(), normal(SHAPE, 3, "noise", list(range(12)))
    found = run(realizations, model=model, calls={"references": features(realizations)})
    assert found.provenance.latent_values == 3
    step = 1e-4
    for i in (0, 7):
        noisy = model.noised(realizations[found.sources[i]][None], noise[i : i + 1], 0.7)
        target = features(realizations[found.targets[i]][None])
        along = found.vectors[i].double() / found.vectors[i].norm()
        losses = [
            float((model.denoised(noisy, 0.7, (model.rows + s * along)[None]) - target).square().mean())
            for s in (step, -step)
        ]
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(found.vectors[i].norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("levels", "targets", "expected"), [((0.7,), 1, [3, 6]), ((0.7, 0.4), 1, [6]), ((0.7, 0.4), 2, [12])]
)
def test_collecting_stops_when_it_is_enough(
    realizations: torch.Tensor, levels: tuple[float, ...], targets: int, expected: list[int]
) -> None:
    asked: list[int] = []

    def enough(found: Gradients, last: bool) -> bool:
        asked.append(len(found))
        assert not last
        return len(found) > 4

    options = {"sigma": levels, "targets": targets, "batch_size": 3}
    short = run(realizations, 20, calls={"stop": enough}, **options)
    long = run(realizations, 20, **options)
    assert asked == expected and len(short) == short.provenance.count == asked[-1]
    part, heard = slice(asked[-1]), slice(asked[-1] // targets)
    assert torch.equal(short.vectors, long.vectors[part]) and torch.equal(short.sigma, long.sigma[part])
    assert torch.equal(short.targets, long.targets[part]) and torch.equal(short.sources, long.sources[part])
    assert torch.equal(short.probes, long.probes[heard])
    assert (short.probe_sigma is None) == (len(levels) == 1)


def test_the_last_batch_is_said_to_be_the_last(realizations: torch.Tensor) -> None:
    asked: list[tuple[int, bool]] = []
    calls = {"stop": lambda gradients, last: bool(asked.append((len(gradients), last)))}
    found = run(realizations, count=7, batch_size=3, calls=calls)
    assert asked == [(3, False), (6, False), (7, True)] and len(found) == 7
