"""CollectGradients, MergeGradients and SelectGradients: realizations to gradients."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..elrond_core.collect.merge import merge_gradients, merge_lines
from ..elrond_core.errors import ElrondError
from ..elrond_core.gradients import Gradients
from . import host
from .jobs import GradientJob, check_features, levels
from .types import GradientsIO, check_guidance, first_error, seed_input


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
            **host.search_aliases("find directions", "variation", "sliders"),
            inputs=[
                io.Model.Input("model", tooltip="The model that made the realizations."),
                io.Conditioning.Input("positive", tooltip="The prompt, from Encode Concept or Mark Concept."),
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
                    "makes a gradient faster, but gradients of one realization resemble each other. Estimate LID wants "
                    "all the others: the number of realizations less one.",
                ),
                io.String.Input(
                    "more_levels",
                    default="",
                    optional=True,
                    tooltip="Further noise levels, such as 0.8, 0.6: gradients are shared out among all. "
                    "Select Gradients tells them apart again.",
                ),
                io.Boolean.Input(
                    "remove_common",
                    default=False,
                    optional=True,
                    tooltip="Subtract the mean gradient of all words of the prompt: what is left is the concept's own.",
                ),
                io.Float.Input(
                    "target_quality",
                    default=0.0,
                    min=0.0,
                    max=0.9999,
                    step=0.001,
                    optional=True,
                    tooltip="Stop as soon as this share of what Fit PCA's significant directions span is right, by an "
                    "estimate from the gradients themselves; count is then the most. 0 collects all of count.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="With clip_vision: compare what an image encoder sees in the images instead of their "
                    "latents.",
                ),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="The image encoder; it needs the model's vae, too."
                ),
            ],
            outputs=[
                GradientsIO.Output(display_name="gradients", tooltip="For Fit PCA, Train SAE, Estimate LID."),
                io.String.Output(display_name="report", tooltip="How many gradients, and how good they are."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        cfg: float | None = None,
        more_levels: str | None = None,
        negative: Any = False,
        vae: Any = False,
        clip_vision: Any = False,
    ) -> bool | str:
        """Refuse what can be seen to be wrong before anything is computed; an input that is wired is None."""
        return first_error(
            (check_guidance, cfg, negative is None),
            (levels, more_levels),
            (check_features, vae is None, clip_vision is None),
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
        more_levels: str = "",
        remove_common: bool = False,
        target_quality: float = 0.0,
        vae: Any = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Collect under the host's model management."""
        job = GradientJob(
            model,
            positive,
            realizations,
            count,
            noise_level,
            batch_size,
            seed,
            response,
            cfg,
            negative,
            targets_per_realization,
            more_levels,
            remove_common,
            target_quality,
            vae,
            clip_vision,
        )
        return io.NodeOutput(*job.run(host.open_shards(model, *job.determined_by)))


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
            **host.search_aliases("combine gradients"),
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
        collections = [gradients for gradients in (first, second, third, fourth) if gradients is not None]
        merged = merge_gradients(collections)
        return io.NodeOutput(merged, "\n".join(merge_lines(collections, merged)))


_JOINTLY, _MEAN, _SINGLE = "jointly", "mean", "single"


class SelectGradients(io.ComfyNode):
    """Gradients of one noise level, or of all with equal weight; of all rows, their mean, or one row."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondSelectGradients",
            display_name="Select Gradients (ELROND)",
            category="ELROND",
            description="Takes the gradients of one noise level out of several, or gives every level the same say; of "
            "a concept of several tokens, takes all rows, their mean, or one.",
            **host.search_aliases("filter gradients"),
            inputs=[
                GradientsIO.Input("gradients", tooltip="From Collect Gradients or Load Gradients."),
                io.Int.Input(
                    "level",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Which noise level to keep: 1 is the highest, 2 the next; 0 keeps all.",
                ),
                io.Boolean.Input(
                    "normalise",
                    default=True,
                    tooltip="Divide each level's gradients by their root mean square length. Without it the highest "
                    "level decides the pooled directions, because its gradients are the longest.",
                ),
                io.Combo.Input(
                    "rows",
                    options=[_JOINTLY, _MEAN, _SINGLE],
                    default=_JOINTLY,
                    optional=True,
                    tooltip="For words of several tokens. jointly: a direction moves each row its own way. mean: it "
                    "moves all rows alike. single: it moves one row, that of the next field.",
                ),
                io.Int.Input("row", default=1, min=1, max=1000, optional=True, tooltip="With single: which row."),
            ],
            outputs=[
                GradientsIO.Output(display_name="gradients", tooltip="For Fit PCA, Train SAE, Estimate LID."),
                io.String.Output(display_name="report", tooltip="The noise levels and how many gradients of each."),
            ],
        )

    @classmethod
    def execute(
        cls, gradients: Gradients, level: int, normalise: bool, rows: str = _JOINTLY, row: int = 1
    ) -> io.NodeOutput:
        """Select."""
        if rows == _MEAN:
            gradients = gradients.summed_over_rows()
        elif rows == _SINGLE:
            gradients = gradients.of_row(row - 1)
        levels = gradients.levels
        if level > len(levels):
            raise ElrondError(f"There are {len(levels)} noise levels, and no level {level}.")
        selected = gradients.at_levels(levels[level - 1 : level]) if level else gradients
        return io.NodeOutput(selected.normalised() if normalise else selected, "\n".join(gradients.level_lines()))


NODES = [CollectGradients, MergeGradients, SelectGradients]
