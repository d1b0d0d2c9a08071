"""FitPCA, FitResponse, FitWords and TrainSAE: gradients to directions."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_api.latest import io

from ..elrond_core import plots
from ..elrond_core.decompose.contrasts import fit_contrasts
from ..elrond_core.decompose.pca import fit_pca
from ..elrond_core.decompose.response import check_probes, fit_response
from ..elrond_core.decompose.sae_training import TrainConfig, memory, train_sae
from ..elrond_core.decompose.words import fit_words
from ..elrond_core.errors import ElrondError
from ..elrond_core.gradients import Gradients
from . import host
from .contrasts import (
    BUILT_IN_INPUT,
    GUESSED,
    PAIRS_INPUT,
    WHEN_EMPTY,
    check_opposites,
    contrasts_of,
    displaced,
    guessable,
    opposites_input,
)
from .types import DirectionsIO, GradientsIO, first_error, image, seed_input

_SIGNIFICANCE = io.Float.Input(
    "significance",
    default=2.5,
    min=0.0,
    max=1000.0,
    step=0.1,
    tooltip="Keep components that explain more than so many times the average; 2.5 in the paper.",
)
# Length of the progress bar of a training, in bar units: the number of steps is not known beforehand.
_PROGRESS = 1000
_LIMIT = io.Int.Input("most", default=64, min=1, max=4096, tooltip="Keep no more directions than this.")


class FitPCA(io.ComfyNode):
    """Gradients to their principal components."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondFitPCA",
            display_name="Fit PCA (ELROND)",
            category="ELROND",
            description="Finds the principal components of the gradients: the paper's plain method, done in a moment.",
            **host.search_aliases("principal components", "find directions", "sliders"),
            inputs=[
                GradientsIO.Input("gradients", tooltip="From Collect Gradients or Load Gradients."),
                _SIGNIFICANCE,
                _LIMIT,
                io.Combo.Input(
                    "average_over",
                    options=["width", "samples"],
                    default="width",
                    tooltip="What the average is taken over: the embedding's width d, or min(number of gradients, d).",
                ),
            ],
            outputs=[
                DirectionsIO.Output(display_name="directions", tooltip="Unit directions, the strongest first."),
                io.Image.Output(display_name="plot", tooltip="Explained variance, and where the cut is."),
            ],
        )

    @classmethod
    def execute(cls, gradients: Gradients, significance: float, most: int, average_over: Any) -> io.NodeOutput:
        """Fit and plot."""
        directions, spectrum = fit_pca(gradients, significance=significance, rule=average_over, limit=most)
        return io.NodeOutput(directions, image(plots.scree(spectrum)))


class FitResponse(io.ComfyNode):
    """Gradients and Jacobian probes to principal components relative to the pullback metric."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondFitResponse",
            display_name="Fit Response Directions (ELROND)",
            category="ELROND",
            description=(
                "Finds the movements that explain most natural variation per change they cause, so that one loud "
                "factor does not take every direction. Needs gradients with a response."
            ),
            **host.search_aliases("find directions", "sliders", "pullback metric"),
            inputs=[
                GradientsIO.Input("gradients", tooltip="From Collect Gradients with response on."),
                io.Float.Input(
                    "significance",
                    default=1.0,
                    min=0.0,
                    max=1e6,
                    step=0.1,
                    tooltip="Keep movements whose change of the image varies naturally by more than this, in units of "
                    "the variance of one latent value.",
                ),
                _LIMIT,
                io.Boolean.Input(
                    "rotate",
                    default=True,
                    tooltip="Turn the movements kept so that they vary independently of one another (ICA): meant for "
                    "factors that vary about equally much, such as left-right and up-down.",
                ),
            ],
            outputs=[
                DirectionsIO.Output(display_name="directions", tooltip="Unit directions, the strongest first."),
                io.Image.Output(display_name="plot", tooltip="Variation per response, and where the cut is."),
            ],
        )

    @classmethod
    def execute(cls, gradients: Gradients, significance: float, most: int, rotate: bool = True) -> io.NodeOutput:
        """Fit and plot."""
        directions, spectrum = fit_response(gradients, significance=significance, limit=most, rotate=rotate)
        return io.NodeOutput(directions, image(plots.scree(spectrum)))


class FitWords(io.ComfyNode):
    """Gradients and CLIP to directions between opposites."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondFitWords",
            display_name="Fit Word Directions (ELROND)",
            category="ELROND",
            description="Finds along which opposites the images vary, and how far, as directions with names: dark → "
            "bright. Needs gradients with a response.",
            **host.search_aliases("concept slider", "slider", "opposite words", "attributes"),
            inputs=[
                GradientsIO.Input("gradients", tooltip="From Collect Gradients with response on."),
                io.Clip.Input("clip", tooltip="The text encoder that the prompt was encoded with."),
                opposites_input("that could describe the concept"),
                io.Float.Input(
                    "significance",
                    default=1.0,
                    min=0.0,
                    max=1e6,
                    step=0.1,
                    tooltip="Keep opposites along which the images vary more than so many times as much as along "
                    "random changes. If the pairs are guessed: more than so many times the variance of a latent value.",
                ),
                io.Int.Input("most", default=16, min=1, max=4096, tooltip="Keep no more directions than this."),
                PAIRS_INPUT,
                BUILT_IN_INPUT,
            ],
            outputs=[
                DirectionsIO.Output(display_name="directions", tooltip="Named unit directions, the strongest first."),
                io.String.Output(
                    display_name="report",
                    tooltip="How far the images vary along each of the opposites, and which were left out, and why.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, words: str | None = None, pairs: str | None = GUESSED, built_in: str | None = WHEN_EMPTY
    ) -> bool | str:
        """Refuse what can be seen to be wrong before anything is computed."""
        return first_error((check_opposites, words, pairs, built_in))

    @classmethod
    def execute(
        cls,
        gradients: Gradients,
        clip: Any,
        words: str,
        significance: float,
        most: int,
        # Graphs that were exported before these inputs were there hold a list of single words.
        pairs: str = GUESSED,
        built_in: str = WHEN_EMPTY,
    ) -> io.NodeOutput:
        """Encode the concept with the phrases, and fit."""
        check_opposites(words, pairs, built_in)
        # Encoding is slow: what would fail afterwards is refused before.
        check_probes(gradients)
        if pairs == GUESSED:
            listed = guessable(words)
            rows = host.rows_with_words(clip, gradients.provenance, listed)
            directions = fit_words(gradients, listed, *rows, significance=significance, limit=most)
            return io.NodeOutput(directions, "\n".join(directions.lines()))
        contrasts = contrasts_of(words, built_in)
        steps = displaced(clip, gradients.provenance, contrasts, gradients.vectors.shape[1:])
        directions, report = fit_contrasts(gradients, contrasts, steps, significance=significance, limit=most)
        return io.NodeOutput(directions, "\n".join(report))


class TrainSAE(io.ComfyNode):
    """Gradients to the dictionary of a TopK sparse autoencoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondTrainSAE",
            display_name="Train SAE (ELROND)",
            category="ELROND",
            description="Trains a TopK sparse autoencoder on the gradients; its dictionary holds the directions.",
            **host.search_aliases("sparse autoencoder", "dictionary learning", "find directions"),
            inputs=[
                GradientsIO.Input("gradients", tooltip="From Collect Gradients or Load Gradients; thousands help."),
                io.Int.Input(
                    "latents", default=0, min=0, max=65536, tooltip="Size of the dictionary; 0 takes the width d."
                ),
                io.Int.Input(
                    "k",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Dictionary entries that explain one gradient; 0 takes 32, or less for a small dictionary.",
                ),
                io.Int.Input(
                    "epochs", default=0, min=0, max=10000, tooltip="Passes over the gradients; 0: as many as it needs."
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-3,
                    min=1e-6,
                    max=1.0,
                    step=1e-5,
                    round=False,
                    tooltip="Gradients are brought to length one first, so this rarely needs a change.",
                ),
                io.Float.Input(
                    "lowest_density",
                    default=-5.0,
                    min=-20.0,
                    max=0.0,
                    step=0.1,
                    tooltip="Keep entries that fire on more than this share of gradients (log10).",
                ),
                io.Float.Input(
                    "highest_density",
                    default=0.0,
                    min=-20.0,
                    max=0.0,
                    step=0.1,
                    tooltip="Keep entries that fire on less than this share of gradients (log10).",
                ),
                seed_input("Fixes the training."),
            ],
            outputs=[
                DirectionsIO.Output(display_name="directions", tooltip="The dictionary's entries, best first."),
                io.Image.Output(display_name="plot", tooltip="Loss curve and firing densities."),
                io.String.Output(display_name="report", tooltip="Unexplained variance, dead entries, settings."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lowest_density: float | None = None, highest_density: float | None = None) -> bool | str:
        """Refuse what can be seen to be wrong before anything is computed."""
        return first_error((_check_densities, lowest_density, highest_density))

    @classmethod
    def execute(
        cls,
        gradients: Gradients,
        latents: int,
        k: int,
        epochs: int,
        learning_rate: float,
        lowest_density: float,
        highest_density: float,
        seed: int,
    ) -> io.NodeOutput:
        """Train with the host's progress bar."""
        update = host.progress(_PROGRESS)
        config = TrainConfig(
            latents=latents or None,
            k=k or None,
            epochs=epochs or None,
            learning_rate=learning_rate,
            density_range=(lowest_density, highest_density),
            seed=seed,
        )
        device = host.training_device(memory(gradients, config))
        # The range of densities is not among them: it does not change the training, and a kept one is used again.
        settings = (latents, k, epochs, learning_rate, seed, device.type)
        # The executor's inference mode forbids training.
        with (
            host.kept_training(gradients.vectors, settings) as checkpoint,
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            directions, report, _ = train_sae(
                gradients,
                config,
                device=device,
                checkpoint=checkpoint,
                # The number of steps falls when FVU stalls, but the length of the bar is fixed.
                on_step=lambda step, steps, _: update(_PROGRESS * step / steps),
                check=host.stop_if_cancelled,
                warn=lambda sentence: logging.warning(f"ELROND: {sentence}"),
            )
        return io.NodeOutput(directions, image(plots.sae_report(report)), "\n".join(report.lines()))


def _check_densities(lowest: float, highest: float) -> None:
    if not -20 <= lowest < highest <= 0:
        raise ElrondError(f"The densities must go from low to high within -20 and 0, not from {lowest} to {highest}.")


NODES = [FitPCA, FitResponse, FitWords, TrainSAE]
