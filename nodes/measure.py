"""EstimateLID, CompareDirections, MeasureDiversity and MeasureLeak: gradients, directions and images to numbers."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..elrond_core import plots
from ..elrond_core.dimension.report import estimate_lid
from ..elrond_core.directions import Directions
from ..elrond_core.errors import ElrondError
from ..elrond_core.gradients import Gradients
from ..elrond_core.measure import diversity
from ..elrond_core.measure.subspace import compare
from ..elrond_core.steering.locality import measure_leak
from . import host
from .types import DirectionsIO, GradientsIO, first_error, image


class EstimateLID(io.ComfyNode):
    """Gradients to a local intrinsic dimension."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondEstimateLID",
            display_name="Estimate LID (ELROND)",
            category="ELROND",
            description="Estimates a concept's dimension: the number of independent ways the model can vary it.",
            **host.search_aliases("complexity", "intrinsic dimension", "diversity"),
            inputs=[GradientsIO.Input("gradients", tooltip="From Collect Gradients or Load Gradients.")],
            outputs=[
                io.Float.Output(display_name="dimension", tooltip="The estimate."),
                io.String.Output(display_name="report", tooltip="All estimates, and what they assume."),
                io.Image.Output(display_name="plot", tooltip="The spectrum, the noise floor and the cut."),
            ],
        )

    @classmethod
    def execute(cls, gradients: Gradients) -> io.NodeOutput:
        """Estimate and plot."""
        report = estimate_lid(gradients)
        return io.NodeOutput(report.dimension, "\n".join(report.lines()), image(plots.lid_plot(report)))


class CompareDirections(io.ComfyNode):
    """Two sets of directions to a report, a heat map, and the directions that both or only one of them spans."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondCompareDirections",
            display_name="Compare Directions (ELROND)",
            category="ELROND",
            description=(
                "Compares what two sets of directions span: two concepts, two methods, or few gradients against many."
            ),
            **host.search_aliases("similarity", "subspace"),
            inputs=[
                DirectionsIO.Input(
                    "reference", tooltip="A: the set to measure against, such as the one from more data."
                ),
                DirectionsIO.Input("sample", tooltip="B: the set to judge; of the same model family and width."),
                io.Float.Input(
                    "limit",
                    default=45.0,
                    min=0.0,
                    max=90.0,
                    step=1.0,
                    tooltip="Angle in degrees up to which a pair of principal vectors counts as shared.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="Shared and exclusive directions, angles, overlap."),
                io.Image.Output(display_name="plot", tooltip="Cosines of single directions, and principal angles."),
                DirectionsIO.Output(display_name="shared", tooltip="What both span, the most alike first."),
                DirectionsIO.Output(
                    display_name="only_reference", tooltip="What only the reference spans, the most foreign first."
                ),
                DirectionsIO.Output(
                    display_name="only_sample", tooltip="What only the sample spans, the most foreign first."
                ),
            ],
        )

    @classmethod
    def execute(cls, reference: Directions, sample: Directions, limit: float) -> io.NodeOutput:
        """Compare and plot."""
        comparison = compare(reference, sample, limit=limit)
        picture = plots.subspace_heatmap(comparison, ("reference", "sample"))
        return io.NodeOutput(
            "\n".join(comparison.lines()),
            image(picture),
            comparison.shared or host.absent(f"The two sets share no direction up to {limit:g} degrees."),
            comparison.only_a or host.absent(f"The sample spans all of the reference up to {limit:g} degrees."),
            comparison.only_b or host.absent(f"The reference spans all of the sample up to {limit:g} degrees."),
        )


class MeasureDiversity(io.ComfyNode):
    """Images to measures of their diversity, and of their alignment with a text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondMeasureDiversity",
            display_name="Measure Diversity (ELROND)",
            category="ELROND",
            description="Measures how different the images of a batch are, and how well they show what a text says, "
            "to compare settings by numbers.",
            **host.search_aliases("diversity", "Vendi score", "same face", "variation", "CLIP score"),
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
        text_features = host.text_features(clip, text) if text.strip() else None
        if clip_vision is None:
            measured = diversity.of_pixels(images)
        else:
            features = host.image_features(clip_vision, images)
            measured = diversity.of_features(features)
        lines, mean = measured.lines(), 0.0
        if text_features is not None:
            aligned = diversity.alignment(features, text_features)
            lines, mean = lines + aligned.lines(), aligned.mean
        return io.NodeOutput(measured.distance, measured.vendi, images[list(measured.nearest)], "\n".join(lines), mean)


def _check_text(text: str, clip_vision: bool, clip: bool) -> None:
    if text.strip() and not (clip_vision and clip):
        raise ElrondError("A text is compared by the two halves of a CLIP: connect clip_vision and clip, or clear it.")


class MeasureLeak(io.ComfyNode):
    """Images without and with steering to the share of the change that is outside of a mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondMeasureLeak",
            display_name="Measure Leak (ELROND)",
            category="ELROND",
            description="Measures how much of what a direction changes falls outside the concept.",
            **host.search_aliases("locality", "background change"),
            inputs=[
                io.Image.Input("before", tooltip="Images of the prompt as it is."),
                io.Image.Input("after", tooltip="Images of the same seeds, steered."),
                io.Mask.Input("mask", tooltip="Where the concept is before: one mask, or one an image."),
            ],
            outputs=[
                io.Float.Output(
                    display_name="leak", tooltip="0: all change is inside the mask; 1: it is spread evenly."
                ),
                io.String.Output(display_name="report", tooltip="Every image in words."),
            ],
        )

    @classmethod
    def execute(cls, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> io.NodeOutput:
        """Measure."""
        if before.shape != after.shape:
            raise ElrondError(
                f"Images before and after must be as many and of one size, not {_size(before)} and {_size(after)}."
            )
        mask = host.resized(mask if mask.ndim > 2 else mask[None], *before.shape[1:3]).cpu()
        leak = measure_leak(before.cpu().movedim(-1, 1), after.cpu().movedim(-1, 1), mask)
        return io.NodeOutput(leak.mean, "\n".join(leak.lines()))


def _size(images: torch.Tensor) -> str:
    count, height, width = images.shape[:3]
    return f"{count} of {width}×{height}"


NODES = [EstimateLID, CompareDirections, MeasureDiversity, MeasureLeak]
