"""MeasureDiversity: how different the images of a batch are, and whether they show what they should."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..elrond_core.errors import ElrondError
from ..elrond_core.measure import diversity
from . import host
from .types import first_error


class MeasureDiversity(io.ComfyNode):
    """Images to numbers that say how different they are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondMeasureDiversity",
            display_name="Measure Diversity (ELROND)",
            category="ELROND",
            description="Measures how different the images of a batch are, and how well they show what a text says, "
            "to compare settings by numbers.",
            inputs=[
                io.Image.Input("images", tooltip="A batch of at least two images of one prompt."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="An image encoder (CLIP, SigLIP, DINOv2), which compares what images show. "
                    "Without one their pixels are compared.",
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="What the images should show, to measure if they do. Needs clip_vision and clip.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="For the text: the text encoder that was trained together with clip_vision.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="distance", tooltip="Mean distance over all pairs; 0 if all are the same."
                ),
                io.Float.Output(
                    display_name="vendi", tooltip="Vendi score: how many different images there seem to be."
                ),
                io.Image.Output(display_name="nearest", tooltip="The two images that are most alike."),
                io.String.Output(display_name="report", tooltip="All of it in words."),
                io.Float.Output(
                    display_name="alignment", tooltip="Mean cosine of the images with the text; 0 without a text."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, text: str | None = None, clip_vision: Any = False, clip: Any = False) -> bool | str:
        """Refuse what can be seen to be wrong before anything is computed; an input that is wired is None."""
        return first_error((_check_text, text, clip_vision is None, clip is None))

    @classmethod
    def execute(cls, images: torch.Tensor, clip_vision: Any = None, text: str = "", clip: Any = None) -> io.NodeOutput:
        """Measure."""
        if len(images) < 2:
            raise ElrondError(f"Diversity needs at least two images in the batch, got {len(images)}.")
        _check_text(text, clip_vision is not None, clip is not None)
        wanted = _sentence_features(clip, text) if text.strip() else None
        if clip_vision is None:
            found = diversity.of_pixels(images)
        else:
            features = host.image_features(clip_vision, images)
            found = diversity.of_features(features)
        lines, mean = found.lines(), 0.0
        if wanted is not None:
            aligned = diversity.alignment(features, wanted)
            lines, mean = lines + aligned.lines(), aligned.mean
        return io.NodeOutput(found.distance, found.vendi, images[list(found.nearest)], "\n".join(lines), mean)


def _check_text(text: str, clip_vision: bool, clip: bool) -> None:
    if text.strip() and not (clip_vision and clip):
        raise ElrondError("A text is compared by the two halves of a CLIP: connect clip_vision and clip, or clear it.")


def _sentence_features(clip: Any, text: str) -> torch.Tensor:
    pooled = host.encode(clip, text)[0][1].get("pooled_output")
    if pooled is None:
        raise ElrondError("This text encoder says nothing of a text as a whole: connect a CLIP's, or clear the text.")
    return pooled[0].float().cpu()


NODES = [MeasureDiversity]
