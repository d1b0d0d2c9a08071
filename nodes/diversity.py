"""MeasureDiversity: how different the images of a batch are."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..elrond_core import diversity
from ..elrond_core.errors import ElrondError
from . import host


class MeasureDiversity(io.ComfyNode):
    """Images to numbers that say how different they are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondMeasureDiversity",
            display_name="Measure Diversity (ELROND)",
            category="ELROND",
            description="Measures how different the images of a batch are, to compare settings by numbers.",
            inputs=[
                io.Image.Input("images", tooltip="A batch of at least two images of one prompt."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="An image encoder (CLIP, SigLIP, DINOv2), which compares what images show. "
                    "Without one their pixels are compared.",
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
            ],
        )

    @classmethod
    def execute(cls, images: torch.Tensor, clip_vision: Any = None) -> io.NodeOutput:
        """Measure."""
        if len(images) < 2:
            raise ElrondError(f"Diversity needs at least two images in the batch, got {len(images)}.")
        if clip_vision is None:
            found = diversity.of_pixels(images)
        else:
            found = diversity.of_features(host.image_features(clip_vision, images))
        return io.NodeOutput(found.distance, found.vendi, images[list(found.nearest)], "\n".join(found.lines()))


NODES = [MeasureDiversity]
