"""SampleRealizations: many images of one prompt."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import host
from .jobs import RealizationJob
from .types import check_guidance, first_error, seed_input


class SampleRealizations(io.ComfyNode):
    """MODEL and a prompt to a batch of latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondSampleRealizations",
            display_name="Sample Realizations (ELROND)",
            category="ELROND",
            description="Samples many images of one prompt, as latents. Realization i depends on the seed and i only.",
            **host.search_aliases("variation", "many seeds", "batch of seeds"),
            inputs=[
                io.Model.Input("model", tooltip="The model whose variety you want to study."),
                io.Conditioning.Input("positive", tooltip="The prompt, from Encode Concept or Mark Concept."),
                io.Int.Input("width", default=1024, min=16, max=8192, step=8, tooltip="Image width in pixels."),
                io.Int.Input("height", default=1024, min=16, max=8192, step=8, tooltip="Image height in pixels."),
                io.Int.Input(
                    "count",
                    default=256,
                    min=2,
                    max=100000,
                    tooltip="How many images. The paper uses 10,000; a few hundred already give the main directions.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=1024,
                    tooltip="Images sampled at once. Changes memory and speed, not the images.",
                ),
                seed_input("Fixes all realizations."),
                io.Int.Input("steps", default=4, min=1, max=1000, tooltip="Sampling steps, as you use the model."),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance; 1 for distilled models."
                ),
                io.Combo.Input("sampler_name", options=host.sampler_names(), default="euler", tooltip="Sampler."),
                io.Combo.Input("scheduler", options=host.scheduler_names(), default="simple", tooltip="Scheduler."),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The negative prompt; only used if cfg is not 1."
                ),
            ],
            outputs=[io.Latent.Output(display_name="realizations", tooltip="One latent an image.")],
        )

    @classmethod
    def validate_inputs(cls, cfg: float | None = None, negative: Any = False) -> bool | str:
        """Refuse what can be seen to be wrong before anything is computed; an input that is wired is None."""
        return first_error((check_guidance, cfg, negative is None))

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        width: int,
        height: int,
        count: int,
        batch_size: int,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        negative: Any = None,
    ) -> io.NodeOutput:
        """Sample batch by batch."""
        job = RealizationJob(
            model,
            positive,
            width,
            height,
            count,
            batch_size,
            seed,
            steps,
            cfg,
            sampler_name,
            scheduler,
            negative,
        )
        # Finished batches are kept: sampled again they might differ in the last bit, and an interrupted collection from
        # them could not continue.
        return io.NodeOutput({"samples": job.run(host.open_shards(model, *job.determined_by))})


NODES = [SampleRealizations]
