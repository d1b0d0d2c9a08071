"""CollectGradients: how the concept would have to move to turn one image into another, many times."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..elrond_core.errors import ElrondError
from ..elrond_core.gradients import Gradients, check_targets, collect
from ..elrond_core.provenance import Provenance
from . import host
from .types import GradientsIO, seed_input


class CollectGradients(io.ComfyNode):
    """MODEL, concept and realizations to gradients."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondCollectGradients",
            display_name="Collect Gradients (ELROND)",
            category="ELROND",
            description=(
                "Back-propagates differences between realizations to the concept's embedding. "
                "The slow step: one forward and one backward pass a gradient."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that made the realizations."),
                io.Conditioning.Input("positive", tooltip="The prompt, from Encode Concept."),
                io.Latent.Input("realizations", tooltip="At least two images of this prompt, as latents."),
                io.Int.Input(
                    "count",
                    default=1000,
                    min=2,
                    max=1000000,
                    tooltip="Number of gradients. The paper uses 30,000; the leading directions need far fewer.",
                ),
                io.Float.Input(
                    "noise_level",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the schedule gradients are taken. 1, the highest, is about meaning; "
                    "lower levels are about structure, then texture.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=1024,
                    tooltip="Noised realizations at once. Changes memory and speed only; what does not fit is halved.",
                ),
                seed_input("Fixes the pairs and their noise."),
                io.Boolean.Input(
                    "response",
                    default=True,
                    tooltip="Also measure how strongly the image answers each movement of the word (one more backward "
                    "pass a gradient). Fit Response Directions needs it.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="The negative prompt, if you use guidance."),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance of the clean estimate; 1 for distilled models. Needs a negative prompt.",
                ),
                io.Int.Input(
                    "targets_per_realization",
                    default=1,
                    min=1,
                    max=1024,
                    optional=True,
                    tooltip="Others that each noised realization is compared with. More share one forward pass, which "
                    "makes a gradient faster, but gradients of one realization resemble each other.",
                ),
            ],
            outputs=[GradientsIO.Output(display_name="gradients", tooltip="For Fit PCA, Train SAE, Estimate LID.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        realizations: dict[str, Any],
        count: int,
        noise_level: float,
        batch_size: int,
        seed: int,
        response: bool,
        cfg: float = 1.0,
        negative: Any = None,
        targets_per_realization: int = 1,
    ) -> io.NodeOutput:
        """Collect under the host's model management."""
        samples = realizations["samples"]
        check_targets(len(samples), targets_per_realization)
        if negative is None and cfg not in (0.0, 1.0):
            raise ElrondError(f"A cfg of {cfg} needs a negative prompt: connect one, or set cfg to 1.")
        _, memory = host.marked(positive)
        concept = memory["concepts"][0]
        provenance = Provenance(
            family=memory["family"],
            prompt=memory["prompt"],
            concept=concept.word,
            tokens=concept.tokens,
            rows=concept.rows,
            host=host.HOST,
        )
        sigma = host.sigma_of(model, noise_level)
        update = host.progress(count)

        def work(denoiser: host.HostDenoiser, latents: Any) -> Gradients:
            return collect(
                denoiser,
                latents,
                provenance,
                count,
                sigma,
                seed,
                batch_size,
                response=response,
                on_batch=update,
                targets=targets_per_realization,
            )

        return io.NodeOutput(host.visit(model, positive, negative, cfg, samples, seed, work))


NODES = [CollectGradients]
