"""CalibrateDirections: the strengths at which each direction is usable, and stops at equal perceived change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

from ..elrond_core.directions import Directions
from ..elrond_core.errors import ElrondError
from ..elrond_core.measure import diversity
from ..elrond_core.sheets import contact_sheet
from ..elrond_core.steering.calibration import (
    LEAST_REFERENCES,
    Calibration,
    CalibrationPlan,
    Unsteered,
    calibrate,
    calibrated,
    calibration_lines,
)
from ..elrond_core.storage.shards import Shards
from . import host
from .steering import concept_and_norm
from .types import CONCEPT_INPUT, DirectionsIO, check_guidance, first_error, image, seed_input
from .widget_text import ANY_COUNT, indices_of

# Directions that are calibrated unless the user lists some: those that Direction Sweep shows.
_DEFAULT_COUNT = 8


class CalibrateDirections(io.ComfyNode):
    """Directions to the same directions with the strengths at which they are usable."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondCalibrateDirections",
            display_name="Calibrate Directions (ELROND)",
            category="ELROND",
            description="Finds how far each direction can go, and places strengths of equal change between. "
            "Samples a few images along each.",
            **host.search_aliases("slider range", "strength", "normalise strengths"),
            inputs=[
                io.Model.Input("model", tooltip="The model that will be steered."),
                io.Conditioning.Input("positive", tooltip="The prompt, from Encode Concept or Mark Concept."),
                DirectionsIO.Input("directions", tooltip="From a fit or Load Directions."),
                io.Vae.Input("vae", tooltip="Decodes the images."),
                io.String.Input(
                    "which",
                    default="",
                    tooltip=f"Directions to calibrate, as in 0, 2, 5-7. Empty: the first {_DEFAULT_COUNT}.",
                ),
                io.Int.Input("seeds", default=4, min=1, max=64, tooltip="Images at each strength, one a seed."),
                io.Int.Input(
                    "samples", default=32, min=16, max=200, tooltip="The most strengths to try for one direction."
                ),
                io.Int.Input(
                    "references",
                    default=32,
                    min=LEAST_REFERENCES,
                    max=1024,
                    tooltip="Further images of the plain prompt, which tell how different valid images are.",
                ),
                io.Float.Input(
                    "furthest",
                    default=2.0,
                    min=0.01,
                    max=100.0,
                    step=0.1,
                    tooltip="The largest strength to try, in token norms.",
                ),
                io.Int.Input("width", default=1024, min=16, max=8192, step=8, tooltip="Image width in pixels."),
                io.Int.Input("height", default=1024, min=16, max=8192, step=8, tooltip="Image height in pixels."),
                seed_input("Fixes the noise of all images."),
                io.Int.Input("steps", default=4, min=1, max=1000, tooltip="Sampling steps, as you use the model."),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance; 1 for distilled models."
                ),
                io.Combo.Input("sampler_name", options=host.sampler_names(), default="euler", tooltip="Sampler."),
                io.Combo.Input("scheduler", options=host.scheduler_names(), default="simple", tooltip="Scheduler."),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Images sampled at once. Changes memory and speed, and of the images the last digits only.",
                ),
                io.Int.Input(
                    "cell", default=160, min=32, max=1024, step=8, tooltip="Size of an image on the sheet in pixels."
                ),
                CONCEPT_INPUT,
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The negative prompt; only used if cfg is not 1."
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="An image encoder (CLIP, SigLIP, DINOv2), which compares what images show. "
                    "Without one their pixels are compared.",
                ),
                io.Latent.Input(
                    "realizations",
                    optional=True,
                    tooltip="Images that tell how different valid images are, in the place of references: for a "
                    "distilled model, its teacher's.",
                ),
            ],
            outputs=[
                DirectionsIO.Output(display_name="directions", tooltip="The same directions, calibrated."),
                io.Image.Output(display_name="sheet", tooltip="Every direction at its stops, from the first seed."),
                io.String.Output(display_name="report", tooltip="How far each direction goes, and what ends it."),
            ],
        )

    @classmethod
    def validate_inputs(cls, which: str | None = None, cfg: float | None = None, negative: Any = False) -> bool | str:
        """Refuse what can be seen to be wrong before anything is computed; an input that is wired is None."""
        return first_error((indices_of, which, ANY_COUNT), (check_guidance, cfg, negative is None))

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        directions: Directions,
        vae: Any,
        which: str,
        seeds: int,
        samples: int,
        references: int,
        furthest: float,
        width: int,
        height: int,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        batch_size: int,
        cell: int,
        concept: str,
        negative: Any = None,
        clip_vision: Any = None,
        realizations: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        """Calibrate direction by direction."""
        indices = (
            indices_of(which, len(directions)) if which.strip() else list(range(min(_DEFAULT_COUNT, len(directions))))
        )
        plan = CalibrationPlan(furthest, samples)
        check_guidance(cfg, negative is not None)
        host.check_one_image(positive)
        # Directions that do not fit the prompt are refused before the first image is sampled.
        for index in indices:
            _steered(positive, directions, index, 0.0, concept)
        word = concept_and_norm(host.marked(positive)[1], directions, concept)[0].word
        others = None if realizations is None else _checked(model, realizations["samples"], width, height)

        size = host.empty_latent(model, width, height, 1)
        settings = (model, negative, size, seed, steps, cfg, sampler_name, scheduler, batch_size, vae, clip_vision)
        shards = host.open_shards(
            model, positive, directions.vectors, concept, others, seeds, references, plan, settings[1:]
        )
        count_of_stops = 2 * plan.stops + 1
        first_images = seeds + (references if others is None else len(others))
        a_direction = samples * seeds + count_of_stops
        images = _Images(*settings, shards, host.progress(first_images + len(indices) * a_direction, model))

        unsteered = Unsteered(
            images.points(0, lambda: images.sampled(positive, 0, seeds)),
            images.points(
                1,
                lambda: images.sampled(positive, seeds, references) if others is None else images.decoded(others),
            ),
        )
        found: dict[int, Calibration] = {}
        pictures = []
        for place, index in enumerate(indices, 1):
            numbers = itertools.count(2 + index * samples)

            def look(index: int, strength: float, numbers: Iterator[int] = numbers) -> torch.Tensor:
                steered = _steered(positive, directions, index, strength, concept)
                return images.points(next(numbers), lambda: images.sampled(steered, 0, seeds))

            found[index] = calibrate(look, index, unsteered, plan)
            # Few directions take all the samples that they may.
            images.done = first_images + place * a_direction - count_of_stops
            for strength in found[index].stops:
                steered = _steered(positive, directions, index, strength, concept)
                pictures.append(images.sampled(steered, 0, 1)[0])
        measure = diversity.OF_PIXELS if clip_vision is None else diversity.OF_FEATURES
        how = f"{seeds} seeds of {word!r}, {steps} steps of {sampler_name}, {scheduler}, cfg {cfg:g}; by {measure}"
        result = calibrated(directions, found, how)
        rows = [
            f"{i} {directions.names[i]}".rstrip() + f"\n{one.interval[0]:.2f} … {one.interval[1]:.2f}"
            for i, one in found.items()
        ]
        columns = [f"{n / plan.stops:+.2g}" for n in range(-plan.stops, plan.stops + 1)]
        sheet = contact_sheet(torch.stack(pictures), rows, columns, f"{word!r}: calibrated strength, seed {seed}", cell)
        lines = [f"Images of {how}.", *calibration_lines(result, found, unsteered.reach)]
        return io.NodeOutput(result, image(sheet), "\n".join(lines))


@dataclass
class _Images:
    """Makes images, and keeps their points, so that an interrupted calibration goes on.

    Attributes:
        model: MODEL.
        negative: the negative prompt, or None.
        size: an empty latent (1, …) of the images' size.
        seed: fixes their noise.
        steps: sampling steps.
        cfg: guidance.
        sampler: name of a sampler.
        scheduler: name of a scheduler.
        batch_size: images at once.
        vae: VAE.
        clip_vision: CLIP_VISION, or None to compare pixels.
        shards: where points are kept, or None.
        update: the progress bar.
        done: images that are done.
    """

    model: Any
    negative: Any
    size: torch.Tensor
    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    batch_size: int
    vae: Any
    clip_vision: Any
    shards: Shards | None
    update: Callable[..., None]
    done: int = 0

    def sampled(self, conditioning: Any, first: int, count: int) -> torch.Tensor:
        """Images (count, H, W, 3) of the realizations from `first` on."""
        images = []
        for start in range(first, first + count, self.batch_size):
            batch = min(self.batch_size, first + count - start)
            latents = host.sample(
                self.model,
                conditioning,
                self.negative,
                self.size.repeat(batch, *[1] * (self.size.ndim - 1)),
                start,
                self.seed,
                self.steps,
                self.cfg,
                self.sampler,
                self.scheduler,
                on_step=lambda images, preview: self.update(self.done + images, preview),
            )
            images.append(host.decode(self.vae, latents).cpu())
            self._finished(batch)
        return torch.cat(images)

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of latents."""
        images = []
        for batch in latents.split(self.batch_size):
            images.append(host.decode(self.vae, batch).cpu())
            self._finished(len(batch))
        return torch.cat(images)

    def points(self, number: int, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Points of images: those that were kept under a number, or of the images that are made now."""
        kept = self.shards.get(number) if self.shards is not None else None
        if kept is not None:
            self._finished(len(kept["points"]))
            return kept["points"]
        images = make()
        if self.clip_vision is None:
            points = diversity.points_of_pixels(images)
        else:
            features = host.image_features(self.clip_vision, images, update=lambda _: host.stop_if_cancelled())
            points = diversity.points_of_features(features)
        if self.shards is not None:
            self.shards.put(number, {"points": points.contiguous()})
        return points

    def _finished(self, count: int) -> None:
        self.done += count
        self.update(self.done)


def _checked(model: Any, samples: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Realizations in the model's shape.

    Raises:
        ElrondError: if they are too few, or of another size than the images to be.
    """
    latents = host.own_latents(model, samples)
    if len(latents) < LEAST_REFERENCES:
        raise ElrondError(f"Connect at least {LEAST_REFERENCES} realizations, not {len(latents)}.")
    if latents.shape[-2:] != host.empty_latent(model, width, height, 1).shape[-2:]:
        raise ElrondError("The realizations are of another size: set width and height to theirs.")
    return latents


def _steered(positive: Any, directions: Directions, index: int, strength: float, concept: str) -> Any:
    """The prompt, steered along one direction by a strength in token norms."""

    def change(prompt: host.MarkedPrompt) -> tuple[tuple[int, ...], torch.Tensor]:
        target, norm = concept_and_norm(prompt, directions, concept)
        return target.rows, norm * strength * directions.pick(index)

    return host.steer_conditioning(positive, change, 0.0, 1.0)


NODES = [CalibrateDirections]
