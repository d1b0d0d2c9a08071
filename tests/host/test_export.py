"""An exported direction in diffusers makes the image that the pack makes in ComfyUI.

Both get one small random SDXL. Without diffusers this is skipped: it is no requirement of the pack or of its tests.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.sample
import comfy.utils
import pytest
import torch
from comfyui_elrond.elrond_core.directions import Directions
from comfyui_elrond.elrond_core.errors import ElrondError
from comfyui_elrond.nodes import host
from comfyui_elrond.nodes.concept import EncodeConcept
from comfyui_elrond.nodes.files import ExportDirection
from comfyui_elrond.nodes.steering import ApplyDirection
from safetensors import safe_open

from demo import host as demo_host

# isort: split
sys.path.append(str(Path(__file__).parent))

import families
from test_tokenizers import load

SCRIPT = re.search(
    r"## A direction without ELROND.*?```python\n(.*?)```",
    (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8"),
    re.DOTALL,
)
PROMPT, NEGATIVE = "a photo of a [chiaroscuro] dog", "blurry"
STEPS, CFG, SIZE = 4, 3.0, 64
# Of one encoder, and of both side by side.
SMALL, LARGE = 32, 48
WIDTH = SMALL + LARGE
# The network in the host's words, and in diffusers'.
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": WIDTH,
    "num_head_channels": 64,
    "num_heads": -1,
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
    "image_size": 32,
    "num_classes": "sequential",
    "adm_in_channels": LARGE + 6 * 256,
}
DIFFUSERS_UNET = {
    "sample_size": SIZE // 8,
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": LARGE + 6 * 256,
}


def random_like(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    value = torch.randn(weight.shape, generator=generator)
    return value / weight[0].numel() ** 0.5 if weight.ndim > 1 else 1 + 0.1 * value


@pytest.fixture(scope="module")
def ours() -> SimpleNamespace:
    """The network and the text encoders as the host's objects."""
    model = families.build(families.Family("SDXL", "", "SDXL", UNET))
    clip = load.__wrapped__("SDXL")
    generator = torch.Generator().manual_seed(5)
    for weight in clip.cond_stage_model.parameters():
        weight.data = random_like(weight, generator)
    return SimpleNamespace(model=model, clip=clip)


@pytest.fixture(scope="module")
def theirs(ours: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The same weights as a pipeline of diffusers, saved to a folder, and the decoder of its images."""
    diffusers = pytest.importorskip("diffusers", reason="Exported directions are tested with diffusers: install it.")
    import transformers

    unet = diffusers.UNet2DConditionModel(**DIFFUSERS_UNET)
    weights = ours.model.model.diffusion_model.state_dict()
    names = comfy.utils.unet_to_diffusers(UNET)
    unet.load_state_dict({name: weights[names[name]] for name in unet.state_dict()})

    def encoder(kind: Any, part: str, width: int, act: str) -> Any:
        config = transformers.CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=width,
            hidden_act=act,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=1,
        )
        made = kind(config)
        found = getattr(ours.clip.cond_stage_model, part).transformer.state_dict()
        mine = {name.removeprefix("text_model."): weight for name, weight in found.items()}
        made.load_state_dict({name: mine[name.removeprefix("text_model.")] for name in made.state_dict()})
        return made

    vocabulary = str(demo_host.path() / "comfy" / "sd1_tokenizer")
    second = transformers.CLIPTokenizer.from_pretrained(vocabulary, pad_token="!", model_max_length=77)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        scaling_factor=0.13025,
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae,
        encoder(transformers.CLIPTextModel, "clip_l", SMALL, "quick_gelu"),
        encoder(transformers.CLIPTextModelWithProjection, "clip_g", LARGE, "gelu"),
        transformers.CLIPTokenizer.from_pretrained(vocabulary, model_max_length=77),
        second,
        unet,
        diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
        ),
        add_watermarker=False,
    )
    folder = tmp_path_factory.mktemp("diffusers")
    pipe.save_pretrained(folder)
    return folder, vae


def directions(prompt: Any) -> Directions:
    """Two random directions of a prompt's concept."""
    from comfyui_elrond.elrond_core.provenance import Provenance

    mark = prompt[0][1][host.MARK]
    concept = mark.concepts[0]
    vectors = families.random(2, len(concept.rows), WIDTH, seed=9)
    vectors = vectors / vectors.flatten(1).norm(dim=1)[:, None, None]
    origin = Provenance(mark.family, mark.prompt, concept.word, concept.tokens, concept.rows, mark.norms[0], (1.0,), 9)
    return Directions(vectors, torch.ones(2), {"name": "pca"}, origin, ("older", ""))


def exported(found: Directions, **changes: Any) -> Path:
    settings = {"index": 0, "strength": 1.0, "unit": "token norms", "name": "test/older", "overwrite": True, **changes}
    name = ExportDirection.execute(found, **settings).args[0]
    return host.output_folder() / "exports" / f"{name}.safetensors"


@torch.inference_mode()
def test_the_tensor_is_what_apply_direction_adds(ours: SimpleNamespace) -> None:
    plain = EncodeConcept.execute(ours.clip, PROMPT, "", 1).args[0]
    found = directions(plain)
    rows = found.provenance.rows
    assert len(rows) > 1
    for index, strength, unit in ((0, 1.0, "token norms"), (1, -2.5, "absolute")):
        with safe_open(exported(found, index=index, strength=strength, unit=unit), "pt") as file:
            delta, about = file.get_tensor("delta"), file.metadata()
        steered = ApplyDirection.execute(plain, found, index, strength, unit, 0.0, 1.0, "").args[0]
        change = steered[0][0][0] - plain[0][0][0]
        assert torch.allclose(change[list(rows)], delta, atol=1e-5)
        assert delta.norm() > 0.5 and tuple(json.loads(about["rows"])) == rows
        assert about["prompt"] == PROMPT.replace("[", "").replace("]", "")
        assert about["name"] == found.names[index]
        assert abs(float(about["strength"])) == pytest.approx(float(delta.norm()), rel=1e-5)
        assert (float(about["strength"]) < 0) == (strength < 0)


def test_what_cannot_be_exported(ours: SimpleNamespace) -> None:
    found = directions(EncodeConcept.execute(ours.clip, PROMPT, "", 1).args[0])
    assert "other than 0" in str(ExportDirection.validate_inputs("fine", 0.0))
    assert "cannot be a file name" in str(ExportDirection.validate_inputs("../outside", 1.0))
    assert ExportDirection.validate_inputs("fine", 1.0) is True
    for changes, pattern in (
        ({"strength": 0.0}, "other than 0"),
        ({"strength": float("nan")}, "other than 0"),
        ({"index": 2}, "There is no direction 2"),
        ({"name": "a:b"}, "cannot be a file name"),
    ):
        with pytest.raises(ElrondError, match=pattern):
            exported(found, **changes)


@torch.inference_mode()
def sampled(ours: SimpleNamespace, positive: Any, noise: torch.Tensor) -> torch.Tensor:
    negative = host.encode(ours.clip, NEGATIVE)
    return comfy.sample.sample(
        ours.model,
        noise,
        STEPS,
        CFG,
        "euler",
        "simple",
        positive,
        negative,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )


@torch.inference_mode()
def test_the_script_of_the_docs_makes_the_same_image(
    ours: SimpleNamespace, theirs: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, vae = theirs
    plain = EncodeConcept.execute(ours.clip, PROMPT, "", 1).args[0]
    found = directions(plain)
    file = exported(found, strength=2.0)
    steered = ApplyDirection.execute(plain, found, 0, 1.0, "token norms", 0.0, 1.0, "").args[0]
    noise = families.random(1, 4, SIZE // 8, SIZE // 8, seed=11)

    def image(latents: torch.Tensor) -> torch.Tensor:
        decoded = vae.decode(latents.float(), return_dict=False)[0]
        return (decoded / 2 + 0.5).clamp(0, 1)[0].movedim(0, -1)

    expected, without = (image(sampled(ours, positive, noise)) for positive in (steered, plain))

    assert SCRIPT is not None
    script = SCRIPT[1]
    import diffusers

    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(STEPS)
    # The host starts from the variance of noise and image together, this scheduler from that of the noise.
    start = noise * (1 + scheduler.sigmas[0] ** 2) ** 0.5 / scheduler.init_noise_sigma
    settings = f"num_inference_steps={STEPS}, guidance_scale={CFG}, height={SIZE}, width={SIZE}, output_type='np'"
    for old, new in (
        ("my direction.safetensors", str(file)),
        ("stabilityai/stable-diffusion-xl-base-1.0", str(folder)),
        ("generator=torch.manual_seed(1)", f"latents=start, {settings}"),
        ('image.save("steered.png")\n', ""),
    ):
        assert old in script
        script = script.replace(old, new)
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    made = torch.from_numpy(runpy.run_path(str(tmp_path / "script.py"), {"start": start})["image"])
    print(f"largest difference: {float((made - expected).abs().max()):.2g}")
    assert made.shape == expected.shape == (SIZE, SIZE, 3)
    assert (without - expected).abs().max() > 0.02
    assert (made - expected).abs().max() < 1e-3


def test_the_script_is_short() -> None:
    assert SCRIPT is not None and len(SCRIPT[1].strip().splitlines()) <= 15
