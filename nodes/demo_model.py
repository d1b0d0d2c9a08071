"""LoadDemoModel: the small model that ships with the pack."""

from __future__ import annotations

from comfy_api.latest import io

from ..demo import host_model as demo
from . import host


class LoadDemoModel(io.ComfyNode):
    """The demo's teacher or student as MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondLoadDemoModel",
            display_name="Load Demo Model (ELROND)",
            category="ELROND",
            description="Loads a tiny model of drawn portraits that needs no GPU. Sample it at 64 x 64 pixels.",
            **host.search_aliases("demo", "example model", "test model"),
            inputs=[
                io.Combo.Input(
                    "name",
                    options=list(demo.MODELS),
                    default="teacher",
                    tooltip="teacher: diverse, about 20 steps. student: distilled to 4 steps, and collapsed by it.",
                )
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A rectified-flow UNet."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder, 8 pixels a latent cell."),
            ],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        """Load."""
        return io.NodeOutput(*demo.load(name))


NODES = [LoadDemoModel]
