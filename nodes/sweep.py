"""DirectionSweep: what directions do, at several strengths, as one picture."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_api.latest import io

from ..elrond_core.directions import Directions
from ..elrond_core.errors import ElrondError
from ..elrond_core.sheets import contact_sheet, save_strip
from . import host
from .steering import concept_and_norm
from .types import (
    ABSOLUTE,
    CONCEPT_INPUT,
    UNIT_INPUT,
    DirectionsIO,
    check_guidance,
    first_error,
    image,
    in_unit,
    seed_input,
)
from .widget_text import ANY_COUNT, indices_of

# Directions that are shown unless the user lists some.
_DEFAULT_COUNT = 8


class DirectionSweep(io.ComfyNode):
    """Directions times strengths to a contact sheet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondDirectionSweep",
            display_name="Direction Sweep (ELROND)",
            category="ELROND",
            description="Shows what directions do: a row a direction, a column a strength, the same seed throughout.",
            **host.search_aliases("contact sheet", "XY plot", "grid", "compare strengths"),
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                io.Conditioning.Input("positive", tooltip="The prompt, from Encode Concept or Mark Concept."),
                DirectionsIO.Input("directions", tooltip="From a fit or Load Directions."),
                io.Vae.Input("vae", tooltip="Decodes the images."),
                io.String.Input(
                    "which",
                    default="",
                    tooltip=f"Directions to show, as in 0, 2, 5-7. Empty: the first {_DEFAULT_COUNT}.",
                ),
                io.Float.Input(
                    "lowest", default=-0.8, min=-1000.0, max=1000.0, step=0.05, tooltip="Strength of the first column."
                ),
                io.Float.Input(
                    "highest", default=0.8, min=-1000.0, max=1000.0, step=0.05, tooltip="Strength of the last column."
                ),
                io.Int.Input(
                    "columns",
                    default=5,
                    min=2,
                    max=33,
                    tooltip="Strengths from lowest to highest, evenly apart. An odd number shows 0 in the middle.",
                ),
                UNIT_INPUT,
                io.Int.Input("width", default=1024, min=16, max=8192, step=8, tooltip="Image width in pixels."),
                io.Int.Input("height", default=1024, min=16, max=8192, step=8, tooltip="Image height in pixels."),
                seed_input("The noise that every image starts from."),
                io.Int.Input("steps", default=4, min=1, max=1000, tooltip="Sampling steps, as you use the model."),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance; 1 for distilled models."
                ),
                io.Combo.Input("sampler_name", options=host.sampler_names(), default="euler", tooltip="Sampler."),
                io.Combo.Input("scheduler", options=host.scheduler_names(), default="simple", tooltip="Scheduler."),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=33,
                    tooltip="Images sampled at once. Changes memory and speed, not the images.",
                ),
                io.Int.Input(
                    "cell", default=160, min=32, max=1024, step=8, tooltip="Size of an image on the sheet in pixels."
                ),
                CONCEPT_INPUT,
                io.Boolean.Input(
                    "thumbnails",
                    default=True,
                    tooltip="Keep the first, middle and last image of each row for the panel's list of directions.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The negative prompt; only used if cfg is not 1."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="The contact sheet, with labels."),
                io.Image.Output(display_name="images", tooltip="Its images in full size, row by row."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        lowest: float | None = None,
        highest: float | None = None,
        which: str | None = None,
        cfg: float | None = None,
        negative: Any = False,
    ) -> bool | str:
        """Refuse what can be seen to be wrong before anything is computed; an input that is wired is None."""
        return first_error(
            (_check_range, lowest, highest), (indices_of, which, ANY_COUNT), (check_guidance, cfg, negative is None)
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        directions: Directions,
        vae: Any,
        which: str,
        lowest: float,
        highest: float,
        columns: int,
        unit: str,
        width: int,
        height: int,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        batch_size: int,
        cell: int,
        concept: str,
        thumbnails: bool,
        negative: Any = None,
    ) -> io.NodeOutput:
        """Sample row by row."""
        indices = (
            indices_of(which, len(directions)) if which.strip() else list(range(min(_DEFAULT_COUNT, len(directions))))
        )
        check_guidance(cfg, negative is not None)
        strengths = torch.linspace(lowest, highest, columns)
        host.check_one_image(positive)
        # All rows are steered before the first is sampled, so that errors come before the slow part.
        batches = strengths.split(batch_size)
        steered = [[_steered(positive, directions, i, b, unit, concept) for b in batches] for i in indices]
        word = concept_and_norm(host.marked(positive)[1], directions, concept)[0].word
        update = host.progress(len(indices) * columns, model)
        images: list[torch.Tensor] = []
        for index, row in zip(indices, steered, strict=True):
            first = len(images)
            for conditioning, batch in zip(row, batches, strict=True):
                empty = host.empty_latent(model, width, height, len(batch))
                latents = host.sample(
                    model,
                    conditioning,
                    negative,
                    empty,
                    0,
                    seed,
                    steps,
                    cfg,
                    sampler_name,
                    scheduler,
                    same_noise=True,
                    on_step=lambda done, preview: update(len(images) + done, preview),
                )
                images.extend(host.decode(vae, latents).cpu())
                update(len(images))
            if thumbnails:
                ends = [images[first], images[(first + len(images) - 1) // 2], images[-1]]
                _save_thumbnail(torch.stack(ends), directions.digest(index))
        pictures = torch.stack(images)
        rows = [
            f"{i} {directions.names[i]}".rstrip() + f"\n{directions.score_name} {float(directions.scores[i]):.3g}"
            for i in indices
        ]
        sheet = contact_sheet(
            pictures,
            rows,
            [f"{s:+.2f}" for s in strengths.tolist()],
            f"{word!r}: strength ({unit}), seed {seed}",
            cell,
        )
        return io.NodeOutput(image(sheet), pictures)


def _save_thumbnail(images: torch.Tensor, digest: str) -> None:
    """Save a thumbnail for the panel; a disk that refuses it must not end the sweep, so it is reported in the log."""
    try:
        save_strip(images, host.output_folder() / "thumbnails" / f"{digest}.png")
    except ElrondError as error:
        logging.warning(f"ELROND: the panel will lack a thumbnail: {error}")


def _check_range(lowest: float, highest: float) -> None:
    if not -1000 <= lowest < highest <= 1000:
        raise ElrondError(f"The strengths must go from low to high within ±1000, not from {lowest} to {highest}.")


def _steered(
    positive: Any, directions: Directions, index: int, strengths: torch.Tensor, unit: str, concept: str
) -> Any:
    """The prompt, steered along one direction by one strength an image."""
    steps = torch.tensor([in_unit(directions, {index: strength}, unit)[index] for strength in strengths.tolist()])

    def change(prompt: host.MarkedPrompt) -> tuple[tuple[int, ...], torch.Tensor]:
        target, norm = concept_and_norm(prompt, directions, concept)
        scale = 1.0 if unit == ABSOLUTE else norm
        return target.rows, scale * steps[:, None, None] * directions.pick(index)

    return host.steer_conditioning(positive, change, 0.0, 1.0)


NODES = [DirectionSweep]
