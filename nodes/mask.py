"""ConceptMask: where in an image a concept is."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..elrond_core.steering.locality import region, sensitivity_maps
from . import host
from .types import seed_input


class ConceptMask(io.ComfyNode):
    """MODEL, concept and sampled images to masks of the concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondConceptMask",
            display_name="Concept Mask (ELROND)",
            category="ELROND",
            description="Finds where in sampled images the concept is: where the model's estimate answers most when "
            "the concept's embedding is moved at random.",
            **host.search_aliases("segment", "where is it", "DiffEdit"),
            inputs=[
                io.Model.Input("model", tooltip="The model that made the images."),
                io.Conditioning.Input("positive", tooltip="The prompt, from Encode Concept or Mark Concept."),
                io.Latent.Input("samples", tooltip="Sampled images of this prompt, as latents."),
                io.Float.Input(
                    "threshold",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of an image's strongest answer above which a cell belongs to the concept. "
                    "0 finds the best division by itself (Otsu's method).",
                ),
                io.Int.Input("grow", default=0, min=0, max=64, tooltip="Latent cells to add on every side."),
                io.Float.Input(
                    "noise_level",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How far the images are noised before the model looks at them. Lower follows edges "
                    "closer; higher also marks where the concept could have been.",
                ),
                io.Int.Input(
                    "draws", default=10, min=1, max=1000, tooltip="Noises and movements to average; two passes each."
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=1024, tooltip="Images at once. Changes memory and speed only."
                ),
                seed_input("Fixes noises and movements."),
                io.String.Input(
                    "concept", default="", tooltip="Which concept of the prompt to find. Empty: the first."
                ),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="1 where the concept is: for Apply Direction, Diversify."),
                io.Mask.Output(display_name="answer", tooltip="How strongly each cell answers; 1 is the strongest."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        samples: dict[str, Any],
        threshold: float,
        grow: int,
        noise_level: float,
        draws: int,
        batch_size: int,
        seed: int,
        concept: str,
    ) -> io.NodeOutput:
        """Measure how the estimate responds to each concept, and compare."""
        sigma = host.sigma_of(model, noise_level)
        prompt = host.marked_at(model, positive, sigma)
        concepts = list(prompt.concepts)
        concepts.insert(0, concepts.pop(prompt.index_of(concept)))
        latents = samples["samples"]
        update = host.progress(len(latents))

        def work(denoiser: host.HostDenoiser, scaled: torch.Tensor) -> torch.Tensor:
            denoiser.rows_at(sigma)
            places = [[denoiser.order.index(row) for row in c.rows] for c in concepts]
            return sensitivity_maps(denoiser, scaled, sigma, seed, places, draws, batch_size, update)

        maps = host.with_denoiser(model, positive, None, 1.0, latents, seed, work, words=True)
        return io.NodeOutput(region(maps, threshold, grow).float(), maps[0] / maps[0].amax((1, 2), keepdim=True))


NODES = [ConceptMask]
