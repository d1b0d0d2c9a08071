"""CompareDirections: what two sets of directions have in common."""

from __future__ import annotations

from comfy_api.latest import io

from ..elrond_core import plots
from ..elrond_core.directions import Directions
from ..elrond_core.measure.subspace import compare
from . import host
from .types import DirectionsIO, image


class CompareDirections(io.ComfyNode):
    """Two sets of directions to a report, a heat map, and what they share or have alone."""

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
        found = compare(reference, sample, limit=limit)
        picture = plots.subspace_heatmap(found, ("reference", "sample"))
        return io.NodeOutput(
            "\n".join(found.lines()),
            image(picture),
            found.shared or host.absent(f"The two sets share no direction up to {limit:g} degrees."),
            found.only_a or host.absent(f"The sample spans all of the reference up to {limit:g} degrees."),
            found.only_b or host.absent(f"The reference spans all of the sample up to {limit:g} degrees."),
        )


NODES = [CompareDirections]
