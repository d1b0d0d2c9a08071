"""Writes the example workflows for models that people use: `python -m workflows.examples`.

Loaders and settings are those of ComfyUI's own templates of these models. They are written into `example_workflows/`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from demo.server import Server

from .frontend import Output, Sheet

FOLDER = Path(__file__).parents[1] / "example_workflows"
PROMPT, CONCEPT = "a photo of a dog in a park", "dog"
IMAGES = 4
# The panel's presets "as varied as the base model" and "new composition", for directions of Fit Response Directions.
AS_VARIED: dict[str, Any] = {"how": "natural", "lowest": 0.3, "highest": 0.3, "end": 0.3}


class Use(NamedTuple):
    """How a model is used.

    Attributes:
        title: the model's name.
        model: what samples the images.
        teacher: what directions are found on.
        clip: the text encoder.
        vae: the image decoder.
        size: pixels a side.
        latent: the node that makes an empty latent.
        sampling: steps, guidance and sampler of the images.
        finding: the same of the realizations.
        negative: whether the guidance needs a negative prompt while directions are found.
    """

    title: str
    model: Output
    teacher: Output
    clip: Output
    vae: Output
    size: int
    latent: str
    sampling: dict[str, Any]
    finding: dict[str, Any]
    negative: bool = False


def _settings(steps: int, cfg: float, sampler: str, scheduler: str) -> dict[str, Any]:
    return {"steps": steps, "cfg": cfg, "sampler_name": sampler, "scheduler": scheduler}


def sdxl_dmd2(sheet: Sheet) -> Use:
    """Four steps by a LoRA; directions are found without it, where images differ more."""
    model, clip, vae = sheet.add("CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    (fast,) = sheet.add("LoraLoaderModelOnly", model=model, lora_name="dmd2_sdxl_4step_lora.safetensors")
    fast_settings = _settings(4, 1.0, "lcm", "simple")
    finding = _settings(25, 5.0, "euler", "normal")
    return Use("SDXL with DMD2", fast, model, clip, vae, 1024, "EmptyLatentImage", fast_settings, finding, True)


def sdxl_turbo(sheet: Sheet) -> Use:
    """One step."""
    model, clip, vae = sheet.add("CheckpointLoaderSimple", ckpt_name="sd_xl_turbo_1.0_fp16.safetensors")
    settings = _settings(1, 1.0, "euler", "simple")
    return Use("SDXL-Turbo", model, model, clip, vae, 512, "EmptyLatentImage", settings, settings)


def flux_schnell(sheet: Sheet) -> Use:
    """Four steps."""
    (model,) = sheet.add("UNETLoader", unet_name="flux1-schnell.safetensors", weight_dtype="default")
    (clip,) = sheet.add(
        "DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="t5xxl_fp16.safetensors", type="flux"
    )
    (vae,) = sheet.add("VAELoader", vae_name="ae.safetensors")
    settings = _settings(4, 1.0, "euler", "simple")
    return Use("Flux schnell", model, model, clip, vae, 1024, "EmptySD3LatentImage", settings, settings)


def z_image_turbo(sheet: Sheet) -> Use:
    """Nine steps."""
    (loaded,) = sheet.add("UNETLoader", unet_name="z_image_turbo_bf16.safetensors", weight_dtype="default")
    (clip,) = sheet.add("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2")
    (vae,) = sheet.add("VAELoader", vae_name="ae.safetensors")
    (model,) = sheet.add("ModelSamplingAuraFlow", model=loaded, shift=3.0)
    settings = _settings(9, 1.0, "res_multistep", "simple")
    return Use("Z-Image Turbo", model, model, clip, vae, 1024, "EmptySD3LatentImage", settings, settings)


def qwen_image(sheet: Sheet) -> Use:
    """Eight steps by a LoRA."""
    (loaded,) = sheet.add("UNETLoader", unet_name="qwen_image_fp8_e4m3fn.safetensors", weight_dtype="default")
    (clip,) = sheet.add("CLIPLoader", clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors", type="qwen_image")
    (vae,) = sheet.add("VAELoader", vae_name="qwen_image_vae.safetensors")
    (fast,) = sheet.add("LoraLoaderModelOnly", model=loaded, lora_name="Qwen-Image-Lightning-8steps-V1.0.safetensors")
    (model,) = sheet.add("ModelSamplingAuraFlow", model=fast, shift=3.1)
    settings = _settings(8, 1.0, "euler", "simple")
    return Use("Qwen-Image", model, model, clip, vae, 1328, "EmptySD3LatentImage", settings, settings)


def encode(sheet: Sheet, use: Use) -> Output:
    """The prompt's conditioning, as the model's own template makes it."""
    if use.title.startswith("Flux"):
        return sheet.add("CLIPTextEncodeFlux", clip=use.clip, clip_l=PROMPT, t5xxl=PROMPT, guidance=3.5)[0]
    return sheet.add("CLIPTextEncode", "Prompt", clip=use.clip, text=PROMPT)[0]


def write(name: str, load: Callable[[Sheet], Use], known: dict[str, Any]) -> dict[str, Any]:
    """The workflow of a model: find directions of a word, and diversify a batch with them."""
    sheet = Sheet(name, known)
    sheet.group("1. Model")
    sheet.column()
    use = load(sheet)
    sheet.group("2. Prompt and concept")
    sheet.column()
    prompt = encode(sheet, use)
    marked, _ = sheet.add("ElrondMarkConcept", conditioning=prompt, clip=use.clip, concept=CONCEPT)
    if use.negative:
        (negative,) = sheet.add("CLIPTextEncode", "Negative prompt", clip=use.clip, text="text, watermark")
    else:
        (negative,) = sheet.add("ConditioningZeroOut", conditioning=prompt)
    sheet.group("3. Find directions: slow, once")
    sheet.column()
    guided = {"negative": negative} if use.negative else {}
    size = {"width": use.size, "height": use.size}
    sampled = sheet.add("ElrondSampleRealizations", model=use.teacher, positive=marked, **size, **use.finding, **guided)
    gradients = sheet.add(
        "ElrondCollectGradients",
        model=use.teacher,
        positive=marked,
        realizations=sampled[0],
        cfg=use.finding["cfg"],
        targets_per_realization=4,
        **guided,
    )
    sheet.column()
    directions, _ = sheet.add("ElrondFitResponse", gradients=gradients[0])
    sheet.add("ElrondSaveDirections", directions=directions, name=f"{CONCEPT} {use.title}", overwrite=True)
    sheet.group("4. A batch as it is, and a diversified one")
    sheet.column()
    (latent,) = sheet.add(use.latent, **size, batch_size=IMAGES)
    diverse = sheet.add("ElrondDiversify", conditioning=marked, directions=directions, count=IMAGES, **AS_VARIED)
    for title, positive in (("As it is", prompt), ("Diversified", diverse[0])):
        sheet.column()
        (samples,) = sheet.add(
            "KSampler",
            title,
            model=use.model,
            positive=positive,
            negative=negative,
            latent_image=latent,
            seed=1,
            **use.sampling,
        )
        (images,) = sheet.add("VAEDecode", samples=samples, vae=use.vae)
        sheet.add("SaveImage", title, images=images, filename_prefix=f"elrond/{name} {title.lower()}")
    sheet.note(_note(use))
    return sheet.graph()


def _note(use: Use) -> str:
    found = (
        "They are found on the model without its LoRA, where images differ more, and used with it."
        if use.teacher is not use.model
        else ""
    )
    return (
        f"# {use.title}: find what a word can vary, and diversify a batch\n\n"
        "1. **Model.** Choose your files.\n"
        f"2. **Prompt and concept.** Write your prompt, and the word in *Mark Concept*. Here it is “{CONCEPT}”.\n"
        "3. **Find directions.** 256 images and 1000 gradients: go and have a coffee. If it is interrupted, queue "
        f"again and it goes on. {found}\n"
        "4. **Use them.** The same noise twice: as it is, and with a step of its own for every image. For more or "
        "less, choose at the foot of *Diversify* how much the images differ.\n\n"
        "Afterwards the directions are in *Load Directions*: delete group 3 and connect that node. *Apply Direction* "
        "in the place of *Diversify* has a slider for each."
    )


EXAMPLES: tuple[Callable[[Sheet], Use], ...] = (sdxl_dmd2, sdxl_turbo, flux_schnell, z_image_turbo, qwen_image)


def main() -> None:
    """Write all of them."""
    with tempfile.TemporaryDirectory() as output, Server(Path(output)) as server:
        known = server.object_info()
    for load in EXAMPLES:
        text = json.dumps(write(load.__name__, load, known), ensure_ascii=False, indent=1)
        (FOLDER / f"{load.__name__}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
