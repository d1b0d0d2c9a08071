"""Directions along opposites, on a linear model x̂0 = J c in which the truth about every contrast is known.

Step k of an orthonormal basis of the rows moves image k of another one, by the model's response to it.
"""

from dataclasses import replace

import builders
import pytest
import torch

from elrond_core.decompose import contrasts as module
from elrond_core.decompose.contrasts import Contrast, fit_contrasts
from elrond_core.directions import Directions
from elrond_core.errors import ElrondError
from elrond_core.gradients import Gradients
from elrond_core.provenance import Provenance
from elrond_core.steering.labels import label_by_contrasts, labelled, metric_samples

WIDTH, LATENTS, COUNT = 40, 90, 3000
DARK, SMALL, LEFT = Contrast("bright", "dark"), Contrast("large", "small"), Contrast("right", "left")
FURRY, CURLY = Contrast("furry"), Contrast("straight", "curly")
GRAY, YOUNG = Contrast("colorful", "gray"), Contrast("old", "young")
# The factors' variances are not in the order of the model's responses to them.
VARIANCES = {0: 50.0, 1: 9.0, 2: 4.0}
RESPONSES = torch.tensor([1.0, 0.5, 3.0, *[1.0] * (WIDTH - 3)], dtype=torch.float64)
NOISE = 0.05
# How far each contrast moves the rows along each step.
MOVES = {
    DARK: {0: 2.0},
    SMALL: {1: 3.0},
    LEFT: {2: 0.5},
    # The images do not vary in what these say.
    FURRY: {3: 1.0},
    # This one shares a part of its change with brightness, and by that varies more than left → right.
    CURLY: {4: 1.0, 0: 0.35},
    # This one is nearly dark → bright.
    GRAY: {0: 1.0, 5: 0.3},
    YOUNG: {6: 1.0, 7: -1.0},
}


def basis(rows: int, columns: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=g, dtype=torch.float64))[0]


ROWS = basis(WIDTH, WIDTH, 1)
JACOBIAN = basis(LATENTS, WIDTH, 0) * RESPONSES @ ROWS.T


def gradients(variances: dict[int, float] = VARIANCES, noise: float = NOISE, seed: int = 2) -> Gradients:
    g = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(COUNT, LATENTS, generator=g, dtype=torch.float64)

    images = noise**0.5 * draw()
    for k, variance in variances.items():
        images += (variance - noise) ** 0.5 * draw()[:, :1] * basis(LATENTS, WIDTH, 0)[:, k]
    return builders.gradients(
        (2 / LATENTS * images @ JACOBIAN).float(),
        probes=(2 / LATENTS * draw() @ JACOBIAN).float(),
        sources=torch.arange(COUNT),
        targets=torch.arange(COUNT),
        provenance=Provenance("linear", "a thing", "thing", latent_values=LATENTS, token_norm=10.0),
    )


def steps(contrasts: list[Contrast]) -> torch.Tensor:
    return torch.stack([sum(far * ROWS[:, k] for k, far in MOVES[contrast].items()) for contrast in contrasts])


def fit(told: list[Contrast], data: Gradients | None = None, **options: float) -> tuple[Directions, list[str]]:
    return fit_contrasts(data or gradients(), told, steps(told), ridge=1e-6, **options)


TOLD = [CURLY, LEFT, GRAY, FURRY, DARK, YOUNG, SMALL]


def test_what_the_images_vary_along_is_found_in_the_order_of_how_far() -> None:
    found, _ = fit(TOLD)
    assert found.names == ("dark → bright", "small → large", "left → right")
    assert found.scores.tolist() == pytest.approx(list(VARIANCES.values()), rel=0.1)
    torch.testing.assert_close(found.vectors[:, 0].double(), ROWS[:, :3].T, atol=1e-6, rtol=0)


def test_a_natural_step_changes_the_image_as_far_as_the_images_vary() -> None:
    found, report = fit(TOLD)
    expected = torch.tensor(list(VARIANCES.values())).sqrt() / RESPONSES[:3].float()
    torch.testing.assert_close(torch.tensor(found.natural_std), expected, rtol=0.08, atol=0)
    told = [float(line.split("a natural step is ")[1].split()[0]) for line in report[:3]]
    torch.testing.assert_close(torch.tensor(told), expected / 10, rtol=0.08, atol=0.005)
    unknown = gradients()
    unknown = replace(unknown, provenance=unknown.provenance.with_(latent_values=0))
    assert fit(TOLD, unknown)[0].natural_std == () and "natural" not in fit(TOLD, unknown)[1][0]


def test_every_contrast_that_is_left_out_is_named_with_the_reason() -> None:
    _, report = fit(TOLD)
    assert len(report) == len(TOLD)
    rest = {line.split(": ")[1]: line for line in report[3:]}
    assert set(rest) == {contrast.name for contrast in (FURRY, CURLY, GRAY, YOUNG)}
    for contrast in (FURRY, CURLY, YOUNG):
        assert "the images vary along it by 0.0" in rest[contrast.name]
    assert "changes the images mostly as dark → bright does" in rest["gray → colorful"]


def test_of_two_that_say_the_same_the_one_along_which_more_varies_is_taken() -> None:
    assert fit([GRAY, DARK])[0].names == ("dark → bright",)
    assert fit([GRAY, SMALL])[0].names == ("gray → colorful", "small → large")


def test_all_may_be_left_out() -> None:
    with pytest.raises(ElrondError, match="The images vary along none of these 3 contrasts more than along random"):
        fit([FURRY, YOUNG, CURLY], gradients({1: 9.0}))
    with pytest.raises(ElrondError, match="along none of these 7 contrasts"):
        fit(TOLD, gradients({}))


def test_chance_finds_something_in_one_of_twenty_lists() -> None:
    """Sixty contrasts that mean nothing, on images that vary: lists of which some pass."""
    data, lists, passed = gradients(), 120, 0
    told = [Contrast(f"word {k}") for k in range(60)]
    for seed in range(lists):
        drawn = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        # Uniform in what they change.
        try:
            fit_contrasts(data, told, drawn / RESPONSES @ ROWS.T, ridge=1e-6)
            passed += 1
        except ElrondError:
            pass
    # 95 % of 120 binomial draws at 5 % lie below 11; the gamma distribution is an approximation.
    assert passed <= 14


def test_limit_and_significance() -> None:
    found, report = fit(TOLD, limit=2)
    assert found.names == ("dark → bright", "small → large")
    assert "left out: left → right: there are 2 directions already" in report
    assert len(fit(TOLD, significance=0.0)[0]) == len(TOLD)
    with pytest.raises(ElrondError, match="lower the significance"):
        fit(TOLD, significance=100.0)


def test_gradients_without_a_response_are_refused() -> None:
    with pytest.raises(ElrondError, match="came without the model's response"):
        fit(TOLD, replace(gradients(), probes=torch.empty(0, 1, WIDTH)))


def directions(*moves: dict[int, float]) -> Directions:
    vectors = torch.stack([sum(far * ROWS[:, k] for k, far in move.items()) for move in moves])
    unit = torch.nn.functional.normalize(vectors, dim=1).float()[:, None]
    return Directions(unit, torch.ones(len(moves)), {"name": "test"}, gradients().provenance)


def test_a_label_is_the_contrast_that_changes_the_image_alike() -> None:
    found = directions({0: 1.0}, {1: -1.0}, {1: 1.0, 2: 0.5}, {20: 1.0}, {3: -1.0, 30: 0.2})
    told = [LEFT, SMALL, DARK, FURRY]
    samples = metric_samples(found, gradients())
    names = [label.best[0] for label in label_by_contrasts(found, told, steps(told), samples)]
    # The model responds to the third's half step to the right more than to its step of size.
    assert names == ["dark → bright", "large → small", "left → right", "", "← furry"]
    plain = label_by_contrasts(found, told, steps(told))
    assert [label.best[0] for label in plain] == ["dark → bright", "large → small", "small → large", "", "← furry"]
    assert plain[0].best[1] == pytest.approx(1) and plain[2].best[1] == pytest.approx(0.8**0.5)
    assert plain[3].line().count(" → ") >= 2 and plain[3].line().endswith(f"(chance: {plain[3].chance:.2f})")
    named = labelled(found, plain, 0.92, True)
    assert named.names == ("dark → bright", "large → small", "", "", "← furry")


def test_without_probes_the_gradients_weigh_changes_by_how_far_the_images_vary() -> None:
    found, told = directions({2: 1.0, 0: 0.8}), [LEFT, DARK]
    data = gradients({0: 50.0, 2: 0.1})
    names = []
    for source in (data, replace(data, probes=torch.empty(0, 1, WIDTH))):
        names.append(label_by_contrasts(found, told, steps(told), metric_samples(found, source))[0].best[0])
    assert names == ["left → right", "dark → bright"]


def test_random_changes_get_a_label_at_the_level_of_chance() -> None:
    """Under any metric: a random change is uniform in what it changes."""
    drawn = torch.randn(2000, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    told = [DARK, SMALL, LEFT, FURRY, YOUNG]
    loud = torch.ones(WIDTH, dtype=torch.float64)
    loud[0] = 50
    for scale, samples in ((1.0, None), (loud, (loud * ROWS).T.float())):
        unit = torch.nn.functional.normalize(drawn / scale @ ROWS.T, dim=1).float()[:, None]
        found = Directions(unit, torch.ones(2000), {"name": "test"}, gradients().provenance)
        labels = label_by_contrasts(found, told, steps(told), samples)
        # Contrasts that do not overlap: 95 % of none. The standard error is 0.5 %.
        assert 0.03 < sum(label.best[0] != "" for label in labels) / 2000 < 0.07


def test_labels_need_the_gradients_of_the_same_concept() -> None:
    found = directions({0: 1.0})
    other = gradients()
    with pytest.raises(ElrondError, match="the gradients of 'dog' in 'a thing'"):
        metric_samples(found, replace(other, provenance=other.provenance.with_(concept="dog")))
    one = other.select(torch.arange(COUNT) < 1, torch.zeros(COUNT, dtype=torch.bool))
    with pytest.raises(ElrondError, match="needs at least 2 gradients, got 1"):
        metric_samples(found, one)


def test_directions_over_one_row_are_compared_with_gradients_of_all() -> None:
    wide = gradients()
    both = replace(wide, vectors=wide.vectors.repeat(1, 2, 1), probes=wide.probes.repeat(1, 2, 1))
    torch.testing.assert_close(metric_samples(directions({0: 1.0}), both), 2 * wide.probes[:, 0])


def test_the_level_is_shared_among_contrasts() -> None:
    assert module.level_of_one(1) == pytest.approx(module.LEVEL)
    assert (1 - module.level_of_one(60)) ** 60 == pytest.approx(1 - module.LEVEL)
