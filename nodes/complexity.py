"""EstimateLID: how many ways a concept can vary."""

from __future__ import annotations

from comfy_api.latest import io

from ..elrond_core import plots
from ..elrond_core.dimension.report import estimate_lid
from ..elrond_core.gradients import Gradients
from .types import GradientsIO, image


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


NODES = [EstimateLID]
