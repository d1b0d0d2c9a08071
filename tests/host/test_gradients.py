"""Gradients through the host's own model objects, against finite differences and themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import folder_paths
import pytest
import torch
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.elrond_core.gradients import gradient
from comfyui_elrond.nodes import host

ROOT = Path(__file__).parents[2]


def collect(nodes: dict[str, Any], teacher: SimpleNamespace, **changes: Any) -> Any:
    settings = {"count": 12, "noise_level": 1.0, "batch_size": 4, "seed": 5, "response": True, **changes}
    with torch.inference_mode():
        return (
            nodes["ElrondCollectGradients"]
            .execute(model=teacher.model, positive=teacher.positive, realizations=teacher.realizations, **settings)
            .args[0]
        )


@pytest.mark.parametrize("noise_level", [1.0, 0.6])
def test_gradient_equals_central_finite_differences(teacher: SimpleNamespace, noise_level: float) -> None:
    sigma = host.sigma_of(teacher.model, noise_level)

    def work(denoiser: host.HostDenoiser, latents: torch.Tensor) -> list[tuple[float, float, float]]:
        source, target = latents[:1], latents[1:2]
        noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
        vectors, _ = gradient(denoiser, source, target, noise, sigma)
        noisy = denoiser.noised(source, noise, sigma)

        def loss(rows: torch.Tensor) -> float:
            return float(((denoiser.denoised(noisy, sigma, rows[None]) - target).double() ** 2).mean())

        found = []
        for seed in range(4):
            direction = torch.randn(denoiser.rows.shape, generator=torch.Generator().manual_seed(seed))
            # Along a random direction the slope may happen to be near zero, so each is tilted towards the gradient.
            direction = direction / direction.norm() + vectors[0] / vectors[0].norm()
            step = 0.02
            slope = (loss(denoiser.rows + step * direction) - loss(denoiser.rows - step * direction)) / (2 * step)
            found.append((slope, float((vectors[0] * direction).sum()), float(vectors[0].norm())))
        return found

    for slope, product, length in host.visit(
        teacher.model, teacher.positive, None, 1.0, teacher.realizations["samples"], 0, work
    ):
        assert length > 1e-5
        assert slope == pytest.approx(product, rel=1e-3)


def test_step_against_the_gradient_lowers_the_loss(teacher: SimpleNamespace) -> None:
    def work(denoiser: host.HostDenoiser, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        source, target = latents[:8], latents[8:16]
        noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
        vectors, _ = gradient(denoiser, source, target, noise, 1.0)
        noisy = denoiser.noised(source, noise, 1.0)
        before = denoiser.rows.expand(8, -1, -1)
        after = before - 0.1 * vectors / vectors.norm(dim=(1, 2), keepdim=True)
        losses = [((denoiser.denoised(noisy, 1.0, r) - target) ** 2).mean((1, 2, 3)) for r in (before, after)]
        return losses[0], losses[1]

    before, after = host.visit(teacher.model, teacher.positive, None, 1.0, teacher.realizations["samples"], 0, work)
    assert (after < before).all()


def test_batch_size_changes_nothing(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    one, three, eight = (collect(nodes, teacher, batch_size=size) for size in (1, 3, 8))
    for other in (three, eight):
        assert torch.equal(one.sources, other.sources) and torch.equal(one.targets, other.targets)
        torch.testing.assert_close(one.vectors, other.vectors, rtol=1e-4, atol=1e-4 * float(one.vectors.abs().max()))
        torch.testing.assert_close(one.response, other.response, rtol=1e-4, atol=1e-4 * float(one.response.abs().max()))
    assert not torch.allclose(one.vectors, collect(nodes, teacher, seed=6).vectors)


def test_several_targets_of_one_realization(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    shared = collect(nodes, teacher, targets_per_realization=3)
    assert (shared.sources.view(4, 3) == shared.sources.view(4, 3)[:, :1]).all() and len(shared.response) == 4
    again = collect(nodes, teacher, targets_per_realization=3, batch_size=1)
    torch.testing.assert_close(again.vectors, shared.vectors, rtol=1e-4, atol=1e-4 * float(shared.vectors.abs().max()))


def test_provenance_says_where_gradients_come_from(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    origin = collect(nodes, teacher).provenance
    assert (origin.family, origin.concept, origin.prompt, origin.rows) == ("Demo", "thing", "a thing", (2,))
    assert origin.count == 12 and origin.seed == 5 and origin.sigma == (1.0,)
    assert origin.token_norm == pytest.approx(float(teacher.positive[0][0][0, 2].norm()), rel=1e-5)


def test_guidance_keeps_the_gradient_of_the_guided_estimate(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    # The guided estimate is u + w(c - u) and only c depends on the concept, so its Jacobian is w times the plain one,
    # and so is the response to the same white noise.
    with torch.inference_mode():
        negative = host.encode(teacher.clip, "")
    plain = collect(nodes, teacher)
    guided = collect(nodes, teacher, negative=negative, cfg=2.5)
    torch.testing.assert_close(
        guided.response, 2.5 * plain.response, rtol=1e-3, atol=1e-4 * float(plain.response.abs().max())
    )


def test_collection_leaves_the_model_as_it_was(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    def picture() -> torch.Tensor:
        noise = torch.randn(2, 24, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            return comfy.sample.sample(
                teacher.model,
                noise,
                4,
                1.0,
                "euler",
                "simple",
                teacher.positive,
                teacher.positive,
                torch.zeros_like(noise),
                disable_pbar=True,
                seed=0,
            )

    before = picture()
    flags = [p.requires_grad for p in teacher.model.model.parameters()]
    training = getattr(comfy.model_management, "in_training", None)
    collect(nodes, teacher)
    with pytest.raises(RuntimeError, match="stop here"):
        host.visit(
            teacher.model,
            teacher.positive,
            None,
            1.0,
            teacher.realizations["samples"],
            0,
            lambda denoiser, latents: (_ for _ in ()).throw(RuntimeError("stop here")),
        )
    assert [p.requires_grad for p in teacher.model.model.parameters()] == flags
    assert getattr(comfy.model_management, "in_training", None) == training
    assert torch.is_inference_mode_enabled() is False
    assert torch.equal(picture(), before)


def test_bad_input_is_one_sentence(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    one = {"samples": teacher.realizations["samples"][:1]}
    with pytest.raises(ElrondError, match="at least two realizations"):
        nodes["ElrondCollectGradients"].execute(teacher.model, teacher.positive, one, 4, 1.0, 1, 0, False)
    with pytest.raises(ElrondError, match="1 to 23 others, not 24"):
        collect(nodes, teacher, targets_per_realization=24)
    with torch.inference_mode():
        stock = host.encode(teacher.clip, "a thing")
    with pytest.raises(ElrondError, match="Encode Concept"):
        nodes["ElrondCollectGradients"].execute(teacher.model, stock, teacher.realizations, 4, 1.0, 1, 0, False)
    with pytest.raises(ElrondError, match="negative prompt"):
        collect(nodes, teacher, cfg=4.0)


LATENTS = {"samples": torch.randn(6, 24, 8, 8, generator=torch.Generator().manual_seed(2))}
CRASH = """
import os, signal, sys
from demo import host
host.pack()
import folder_paths, torch
from comfyui_elrond.nodes import NODES
sys.path.insert(0, "tests/host")
from test_gradients import LATENTS, SimpleNamespace, collect

folder_paths.set_output_directory(sys.argv[1])
left = 4

def kill(event, args):
    global left
    if event == "os.rename" and ".tmp" in str(args[0]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

nodes = {node.define_schema().node_id: node for node in NODES}
with torch.inference_mode():
    model, clip, vae = nodes["ElrondLoadDemoModel"].execute("teacher").args
    positive = nodes["ElrondEncodeConcept"].execute(clip, "a [thing]", "", 1).args[0]
sys.addaudithook(kill)
collect(nodes, SimpleNamespace(model=model, positive=positive, realizations=LATENTS), batch_size=2)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_collection_that_was_killed_goes_on(
    nodes: dict[str, Any], teacher: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    here = SimpleNamespace(**{**vars(teacher), "realizations": LATENTS})
    uninterrupted = collect(nodes, here, batch_size=2)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    shown: list[int] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, *_, **__: shown.append(value))
    estimates: list[int] = []
    handle = teacher.model.model.diffusion_model.register_forward_pre_hook(lambda *_: estimates.append(len(shown)))
    found = collect(nodes, here, batch_size=2)
    handle.remove()
    # The first estimate is asked for when the bar has come to the fourth batch.
    assert estimates[0] == 3
    assert torch.equal(found.vectors, uninterrupted.vectors) and torch.equal(found.response, uninterrupted.response)
    assert shown == [2, 4, 6, 8, 10, 12]


def test_what_determines_gradients_is_in_the_fingerprint(teacher: SimpleNamespace) -> None:
    def fingerprint(model: Any, *values: Any) -> str:
        return host.open_shards(model, *values)._fingerprint

    model = teacher.model
    before = fingerprint(model, teacher.positive, 1.0)
    assert fingerprint(model.clone(), teacher.positive, 1.0) == before
    assert fingerprint(model, teacher.positive, 1.1) != before
    positive = [[tensor.clone(), dict(options)] for tensor, options in teacher.positive]
    assert fingerprint(model, positive, 1.0) == before
    positive[0][0][0, 5, 7] += 1e-6
    assert fingerprint(model, positive, 1.0) != before

    key = "diffusion_model.out.2.weight"
    weight = model.model.state_dict()[key]
    patches = [torch.full_like(weight, value) for value in (0.01, 0.02)]
    patched = []
    for patch in patches:
        patched.append(model.clone())
        patched[-1].add_patches({key: ("diff", (patch,))})
    one, two = (fingerprint(each, teacher.positive, 1.0) for each in patched)
    assert len({before, one, two}) == 3
    for each in patched:
        # Loaded: the weights in memory are the patched ones.
        comfy.model_management.load_models_gpu([each])
        assert not torch.equal(model.model.state_dict()[key], weight.clone()) or each.backup
        assert fingerprint(model, teacher.positive, 1.0) == before
        assert fingerprint(patched[0], teacher.positive, 1.0) == one
        assert fingerprint(patched[1], teacher.positive, 1.0) == two

    sampling = model.clone()
    sampling.add_object_patch("model_sampling", type(model.model.model_sampling)(model.model.model_config))
    other = fingerprint(sampling, teacher.positive, 1.0)
    comfy.model_management.load_models_gpu([sampling])
    assert fingerprint(sampling, teacher.positive, 1.0) == other != before
    assert fingerprint(model, teacher.positive, 1.0) == before
    comfy.model_management.load_models_gpu([model])

    hooked = model.clone()
    hooked.set_model_unet_function_wrapper(lambda apply, given: apply(given["input"], given["timestep"], **given["c"]))
    assert fingerprint(hooked, teacher.positive, 1.0) != before
    unknown = model.clone()
    unknown.model_options["transformer_options"]["patch"] = object()
    assert host.open_shards(unknown, teacher.positive, 1.0) is None
    damaged = teacher.model.model.diffusion_model.out[2].bias
    with torch.inference_mode():
        damaged[0] += 1e-6
        assert fingerprint(model, teacher.positive, 1.0) != before
        damaged[0] -= 1e-6
