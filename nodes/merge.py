"""MergeGradients: gradients of one concept that were collected apart."""

from __future__ import annotations

from comfy_api.latest import io

from ..elrond_core.collect.merge import merge_gradients, merge_lines
from ..elrond_core.gradients import Gradients
from .types import GradientsIO


class MergeGradients(io.ComfyNode):
    """Two to four collections to one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondMergeGradients",
            display_name="Merge Gradients (ELROND)",
            category="ELROND",
            description="Puts gradients of one concept together that were collected apart: with other seeds, on other "
            "machines, or at other noise levels.",
            inputs=[
                GradientsIO.Input("first", tooltip="Gradients from Collect Gradients or Load Gradients."),
                GradientsIO.Input(
                    "second", tooltip="More of the same prompt and concept, collected with another seed."
                ),
                GradientsIO.Input("third", optional=True, tooltip="More of them. For more than four, chain this node."),
                GradientsIO.Input("fourth", optional=True, tooltip="More of them."),
            ],
            outputs=[
                GradientsIO.Output(display_name="gradients", tooltip="All of them, for Fit PCA, Train SAE and so on."),
                io.String.Output(
                    display_name="report", tooltip="What each brings, and whether any may be there twice."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, first: Gradients, second: Gradients, third: Gradients | None = None, fourth: Gradients | None = None
    ) -> io.NodeOutput:
        """Merge."""
        collections = [each for each in (first, second, third, fourth) if each is not None]
        merged = merge_gradients(collections)
        return io.NodeOutput(merged, "\n".join(merge_lines(collections, merged)))


NODES = [MergeGradients]
