"""Gradients through the host's own model objects, against finite differences and themselves."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.ldm.models.autoencoder
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import latent_preview
import pytest
import torch
from comfyui_elrond.elrond_core.collect.differentiate import gradient
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.nodes import host

# isort: split
sys.path.append(str(Path(__file__).parent))

from sampling import sample

ROOT = Path(__file__).parents[2]


def collect(nodes: dict[str, Any], teacher: SimpleNamespace, **changes: Any) -> Any:
    settings = {"count": 12, "noise_level": 1.0, "batch_size": 4, "seed": 5, "response": True, **changes}
    with torch.inference_mode():
        return (
            nodes["ElrondCollectGradients"]
            .execute(model=teacher.model, positive=teacher.positive, realizations=teacher.realizations, **settings)
            .args[0]
        )


def test_collection_stops_at_the_quality_asked_for(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    def reported(**changes: Any) -> tuple[Any, str]:
        settings = {"count": 160, "noise_level": 1.0, "batch_size": 16, "seed": 5, "response": False, **changes}
        given = {"model": teacher.model, "positive": teacher.positive, "realizations": teacher.realizations}
        with torch.inference_mode():
            return nodes["ElrondCollectGradients"].execute(**given, **settings).args

    easy, said = reported(target_quality=0.1)
    assert len(easy) == 64 and re.fullmatch(r"64 gradients of \d+ realizations; quality .*: 0.\d{4}, 0.1 was .*", said)
    hard, said = reported(target_quality=0.9999)
    assert len(hard) == 160 and said.endswith("collect more gradients, or of more realizations")
    assert torch.equal(hard.vectors[:64], easy.vectors)
    assert reported(count=64)[1] == f"64 gradients of {len(teacher.realizations['samples'])} realizations"


@pytest.mark.parametrize("noise_level", [1.0, 0.6])
def test_gradient_equals_central_finite_differences(teacher: SimpleNamespace, noise_level: float) -> None:
    sigma = host.sigma_of(teacher.model, noise_level)

    def work(denoiser: host.HostDenoiser, latents: torch.Tensor) -> list[tuple[float, float, float]]:
        source, target = latents[:1], latents[1:2]
        noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
        vectors, _ = gradient(denoiser, source, target, noise, sigma)
        noisy = denoiser.noised(source, noise, sigma)

        def loss(rows: torch.Tensor) -> float:
            estimate = denoiser.denoised(noisy, sigma, rows[None].to(noisy)).to(target)
            return float(((estimate - target).double() ** 2).mean())

        found = []
        for seed in range(4):
            direction = torch.randn(denoiser.rows.shape, generator=torch.Generator().manual_seed(seed))
            # Along a random direction the slope may happen to be near zero, so each is tilted towards the gradient.
            direction = direction / direction.norm() + vectors[0] / vectors[0].norm()
            near, far = (
                (loss(denoiser.rows + step * direction) - loss(denoiser.rows - step * direction)) / (2 * step)
                for step in (0.1, 0.2)
            )
            # The error of second order is taken out.
            found.append(((4 * near - far) / 3, float((vectors[0] * direction).sum()), float(vectors[0].norm())))
        return found

    for slope, product, length in host.with_denoiser(
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
        estimates = (denoiser.denoised(noisy, 1.0, rows.to(noisy)).to(target) for rows in (before, after))
        losses = [((estimate - target) ** 2).mean((1, 2, 3)) for estimate in estimates]
        return losses[0], losses[1]

    before, after = host.with_denoiser(
        teacher.model, teacher.positive, None, 1.0, teacher.realizations["samples"], 0, work
    )
    assert (after < before).all()


def test_batch_size_changes_nothing(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    one, three, eight = (collect(nodes, teacher, batch_size=size) for size in (1, 3, 8))
    for other in (three, eight):
        assert torch.equal(one.sources, other.sources) and torch.equal(one.targets, other.targets)
        torch.testing.assert_close(one.vectors, other.vectors, rtol=1e-4, atol=1e-4 * float(one.vectors.abs().max()))
        torch.testing.assert_close(one.probes, other.probes, rtol=1e-4, atol=1e-4 * float(one.probes.abs().max()))
    assert not torch.allclose(one.vectors, collect(nodes, teacher, seed=6).vectors)


def test_several_targets_of_one_realization(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    shared = collect(nodes, teacher, targets_per_realization=3)
    assert (shared.sources.view(4, 3) == shared.sources.view(4, 3)[:, :1]).all() and len(shared.probes) == 4
    again = collect(nodes, teacher, targets_per_realization=3, batch_size=1)
    torch.testing.assert_close(again.vectors, shared.vectors, rtol=1e-4, atol=1e-4 * float(shared.vectors.abs().max()))


def test_provenance_says_where_gradients_come_from(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    origin = collect(nodes, teacher).provenance
    assert (origin.family, origin.concept, origin.prompt, origin.rows) == ("Demo", "person", "a person", (2,))
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
        guided.probes, 2.5 * plain.probes, rtol=1e-3, atol=1e-4 * float(plain.probes.abs().max())
    )


def test_collection_leaves_the_model_as_it_was(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    def picture() -> torch.Tensor:
        noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
        return sample(teacher.model, teacher.positive, noise, 4)

    before = picture()
    flags = [p.requires_grad for p in teacher.model.model.parameters()]
    training = getattr(comfy.model_management, "in_training", None)
    collect(nodes, teacher)
    with pytest.raises(RuntimeError, match="stop here"):
        host.with_denoiser(
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
        stock = host.encode(teacher.clip, "a person")
    with pytest.raises(ElrondError, match="Encode Concept"):
        nodes["ElrondCollectGradients"].execute(teacher.model, stock, teacher.realizations, 4, 1.0, 1, 0, False)
    with pytest.raises(ElrondError, match="negative prompt"):
        collect(nodes, teacher, cfg=4.0)


LATENTS = {"samples": torch.randn(6, 16, 8, 8, generator=torch.Generator().manual_seed(2))}
CRASH = """
import os, signal, sys
import tests.conftest
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
    positive = nodes["ElrondEncodeConcept"].execute(clip, "a [person]", "", 1).args[0]
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
    assert torch.equal(found.vectors, uninterrupted.vectors) and torch.equal(found.probes, uninterrupted.probes)
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
    # Newer hosts put buffers on the device in another type, and keep the original.
    cast, schedule = model.clone(), model.model.model_sampling
    cast.backup_buffers = {"model_sampling.sigmas": schedule.sigmas}
    schedule.sigmas = schedule.sigmas.double()
    try:
        assert fingerprint(cast, teacher.positive, 1.0) == before != fingerprint(model, teacher.positive, 1.0)
    finally:
        schedule.sigmas = cast.backup_buffers["model_sampling.sigmas"]
    assert fingerprint(model, teacher.positive, 1.0) == before

    unknown = model.clone()
    unknown.model_options["transformer_options"]["patch"] = object()
    assert host.open_shards(unknown, teacher.positive, 1.0) is None
    damaged = teacher.model.model.diffusion_model.out[2].bias
    with torch.inference_mode():
        damaged[0] += 1e-6
        assert fingerprint(model, teacher.positive, 1.0) != before
        damaged[0] -= 1e-6


@pytest.fixture(scope="module")
def kl() -> Any:
    """The host's usual autoencoder for 16 channels, two pixels a latent cell, with seeded weights."""
    layers = {"double_z": True, "z_channels": 16, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32}
    layers |= {"ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    config = {"params": {"ddconfig": layers, "embed_dim": 16}}
    g = torch.Generator().manual_seed(0)
    shapes = comfy.ldm.models.autoencoder.AutoencoderKL(**config["params"]).state_dict()
    weights = {key: torch.randn(v.shape, generator=g) * max(v[0].numel(), 1) ** -0.5 for key, v in shapes.items()}
    # Pixels of a range like that of pictures: where they are cut off the loss has kinks.
    weights["decoder.conv_out.weight"] *= 0.4
    return comfy.sd.VAE(sd=weights, config=config, dtype=torch.float32)


@pytest.mark.parametrize("decoder", ["demo", "kl"])
def test_feature_loss_equals_central_finite_differences(
    teacher: SimpleNamespace, encoder: Any, kl: Any, decoder: str
) -> None:
    vae = {"demo": teacher.vae, "kl": kl}[decoder]
    flags = [p.requires_grad for module in (vae.first_stage_model, encoder.model) for p in module.parameters()]

    def work(outer: host.HostDenoiser, latents: torch.Tensor) -> list[tuple[float, float]]:
        with host.through_features(outer, vae, encoder, latents, 2) as (denoiser, compared):
            assert compared.shape == (6, 24, 1, 1)
            # They are what the host's own nodes see, but for the rounding of pixels to 8 bits.
            with torch.inference_mode():
                seen = host.image_features(encoder, host.decode(vae, outer.process_out(latents)))
            expected = torch.nn.functional.normalize(seen)
            torch.testing.assert_close(compared[:, :, 0, 0], expected, rtol=0, atol=0.01)
            noise = torch.randn(latents[1:].shape, generator=torch.Generator().manual_seed(0))
            vectors, _ = gradient(denoiser, latents[:-1], compared[1:], noise, 1.0)
            noisy = denoiser.noised(latents[:-1], noise, 1.0)

            def loss(rows: torch.Tensor) -> float:
                estimate = denoiser.denoised(noisy, 1.0, rows.to(noisy)).to(compared)
                return float(((estimate - compared[1:]).double() ** 2).mean(1).sum())

            def slope(along: torch.Tensor, step: float) -> float:
                return (loss(outer.rows + step * along) - loss(outer.rows - step * along)) / (2 * step)

            found = []
            for seed in range(12):
                along = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed))
                along = sum(v / v.norm(dim=(1, 2), keepdim=True) for v in (along, vectors))
                # Features curve more than latents do: two steps, of which the error of second order is taken out.
                extrapolated = (4 * slope(along, 0.03) - slope(along, 0.06)) / 3
                found.append((extrapolated, float((vectors * along).sum())))
            return found

    latents = teacher.realizations["samples"][:6]
    found = host.with_denoiser(teacher.model, teacher.positive, None, 1.0, latents, 0, work)
    # Summed over the directions: single precision leaves about 1e-3 of a single slope uncertain.
    slopes, products = (sum(each) for each in zip(*found, strict=True))
    assert slopes == pytest.approx(products, rel=1e-3)
    after = [p.requires_grad for module in (vae.first_stage_model, encoder.model) for p in module.parameters()]
    assert after == flags


def test_the_node_compares_features(
    nodes: dict[str, Any], teacher: SimpleNamespace, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, features = collect(nodes, teacher), collect(nodes, teacher, vae=teacher.vae, clip_vision=encoder)
    assert features.provenance.latent_values == 24 and len(features.probes) == 12
    assert torch.equal(latents.targets, features.targets)
    along = torch.nn.functional.cosine_similarity(latents.flat, features.flat)
    assert (along.abs() < 0.999).all()
    with pytest.raises(ElrondError, match="both a vae and a clip_vision"):
        collect(nodes, teacher, vae=teacher.vae)
    monkeypatch.setattr(encoder, "model_type", "siglip2_vision_model", raising=False)
    with pytest.raises(ElrondError, match="take a CLIP, SigLIP or DINO one"):
        collect(nodes, teacher, vae=teacher.vae, clip_vision=encoder, seed=6)


def test_noise_levels_through_the_nodes(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    found = collect(nodes, teacher, more_levels="0.8, 0.5")
    assert found.levels == pytest.approx([host.sigma_of(teacher.model, level) for level in (1.0, 0.8, 0.5)])
    select = nodes["ElrondSelectGradients"].execute
    second, report = select(found, 2, False).args
    assert len(second) == len(second.probes) == 4 and report.count("4 gradients at noise level") == 3
    pooled = select(found, 0, True).args[0]
    assert len(pooled) == 12 and float(pooled.flat.square().sum(1).mean()) == pytest.approx(1)
    with pytest.raises(ElrondError, match="3 noise levels, and no level 4"):
        select(found, 4, True)
    for bad in ("high", "0.5, 0", "1.5"):
        with pytest.raises(ElrondError, match="more_levels is a list of numbers"):
            collect(nodes, teacher, more_levels=bad)
    with pytest.raises(ElrondError, match="once only"):
        collect(nodes, teacher, more_levels="1.0")


def test_what_all_words_have_in_common_is_removed(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    def positive(prompt: str) -> Any:
        with torch.inference_mode():
            return nodes["ElrondEncodeConcept"].execute(teacher.clip, prompt, "", 1).args[0]

    here = SimpleNamespace(**{**vars(teacher), "realizations": LATENTS, "positive": positive("a red [lady]")})
    rest = collect(nodes, here, remove_common=True)
    # Word by word: each as the concept of the same prompt.
    words = [collect(nodes, SimpleNamespace(**{**vars(here), "positive": positive(prompt)})) for prompt in
             ("a red [lady]", "[a] red lady", "a [red] lady")]  # fmt: skip
    for name in ("vectors", "probes"):
        each = torch.stack([getattr(gradients, name) for gradients in words])
        torch.testing.assert_close(getattr(rest, name), each[0] - each.mean(0), rtol=1e-3, atol=1e-6)
    alone = SimpleNamespace(**{**vars(here), "positive": positive("[lady]")})
    with pytest.raises(ElrondError, match="no words beside the concept"):
        collect(nodes, alone, remove_common=True)


def test_rows_of_a_concept_jointly_alike_or_alone(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    def positive(row: int) -> Any:
        with torch.inference_mode():
            return nodes["ElrondEncodeConcept"].execute(teacher.clip, "a [red ball]", "", 1, row).args[0]

    here = SimpleNamespace(**{**vars(teacher), "realizations": LATENTS, "positive": positive(0)})
    select = nodes["ElrondSelectGradients"].execute
    jointly = collect(nodes, here)
    assert jointly.vectors.shape[1] == 2
    assert torch.equal(select(jointly, 0, False).args[0].vectors, jointly.vectors)
    for row in (1, 2):
        alone = collect(nodes, SimpleNamespace(**{**vars(here), "positive": positive(row)}))
        chosen = select(jointly, 0, False, "single", row).args[0]
        assert chosen.provenance.rows == alone.provenance.rows and chosen.provenance.tokens == alone.provenance.tokens
        for name in ("vectors", "probes"):
            torch.testing.assert_close(getattr(chosen, name), getattr(alone, name), rtol=1e-4, atol=1e-7)
    assert torch.equal(select(jointly, 0, False, "mean").args[0].vectors, jointly.vectors.sum(1, keepdim=True))
    with pytest.raises(ElrondError, match="has 2 rows, and no row 3"):
        select(jointly, 0, False, "single", 3)


def test_realizations_that_were_interrupted_go_on(
    nodes: dict[str, Any], teacher: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[int] = []
    usual = host.sample

    def sample(
        model: Any, positive: Any, negative: Any, latents: Any, first: int, *settings: Any, **named: Any
    ) -> torch.Tensor:
        if len(sampled) == 2:
            comfy.model_management.interrupt_current_processing()
        sampled.append(first)
        return usual(model, positive, negative, latents, first, *settings, **named)

    def run(seed: int = 4) -> torch.Tensor:
        with torch.inference_mode():
            settings = (teacher.positive, 64, 64, 7, 2, seed, 2, 1.0, "euler", "simple")
            return nodes["ElrondSampleRealizations"].execute(teacher.model, *settings).args[0]["samples"]

    expected = run()
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(host, "sample", sample)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run()
    found = run()
    assert sampled == [0, 2, 4, 4, 6]
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert torch.equal(run(), expected) and len(sampled) == 5
    assert not torch.allclose(run(seed=5), expected) and len(sampled) == 9


def test_cancelling_stops_between_backward_passes(nodes: dict[str, Any], teacher: SimpleNamespace) -> None:
    layer = teacher.model.model.diffusion_model.out[2]
    passes: list[int] = []

    def watch(_: Any, args: Any, out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(cancel)

    def cancel(_: torch.Tensor) -> None:
        passes.append(1)
        comfy.model_management.interrupt_current_processing()

    handle = layer.register_forward_hook(watch)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            collect(nodes, teacher, seed=79, targets_per_realization=6)
    finally:
        handle.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert len(passes) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_memory_afterwards_is_as_before(nodes: dict[str, Any], teacher: SimpleNamespace, fails: bool) -> None:
    def held() -> int:
        gc.collect()
        # Some objects of the host cannot be asked what they are, and the compiler's tensors have no memory.
        tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def watch(out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(stop)

    def stop(_: torch.Tensor) -> None:
        raise RuntimeError("stop here")

    def run(seed: int) -> None:
        if not fails:
            collect(nodes, teacher, seed=seed)
            return
        layer = teacher.model.model.diffusion_model.out[2]
        handle = layer.register_forward_hook(lambda _, args, out: watch(out))
        try:
            with pytest.raises(RuntimeError, match="stop here"):
                collect(nodes, teacher, seed=seed)
        finally:
            handle.remove()

    # What is made once, such as the factors of checksums.
    run(80 + 2 * fails)
    before = held()
    run(81 + 2 * fails)
    assert held() == before


def test_cancelling_takes_one_call_and_leaves_nothing_behind(
    nodes: dict[str, Any], teacher: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = teacher.model.model.diffusion_model
    calls: list[int] = []

    def cancel(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            comfy.model_management.interrupt_current_processing()

    flags = [p.requires_grad for p in network.parameters()]
    options = str(teacher.model.model_options)
    handle = network.register_forward_pre_hook(cancel)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            collect(nodes, teacher, seed=77, batch_size=1)
    finally:
        handle.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert len(calls) == 3
    assert [p.requires_grad for p in network.parameters()] == flags
    assert str(teacher.model.model_options) == options
    assert not network._forward_pre_hooks and not any("forward" in vars(part) for part in network.modules())
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is host.HostDenoiser]


def test_what_is_collected_is_shown(
    nodes: dict[str, Any], teacher: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    shown: list[Any] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, picture, **_: shown.append(picture))
    collect(nodes, teacher, seed=78)
    assert len(shown) == 3
    assert all(kind == "JPEG" and picture.size == (8, 8) for kind, picture, _ in shown)
