"""ApplyDirection and Diversify: directions to steered conditionings."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from comfy_api.latest import io

from ..elrond_core.directions import Directions
from ..elrond_core.errors import ElrondError
from ..elrond_core.prompt import Concept
from ..elrond_core.steering.apply import acting_together
from ..elrond_core.steering.draws import (
    DENSITY,
    EQUAL,
    METHODS,
    NATURAL,
    RANDOM,
    SCORE,
    SPREAD,
    Draw,
    change_of,
    check_share,
    check_strengths,
    draw_steps,
    parts_of,
)
from . import host
from .types import (
    ABSOLUTE,
    AUTO,
    CONCEPT_INPUT,
    RELATIVE,
    UNIT_INPUT,
    DirectionsIO,
    first_error,
    in_unit,
    seed_input,
)
from .widget_text import STRENGTH_LIMIT, strengths_of, windows_of

# Characters of strengths that are sent to the browser: mixes of thousands of directions are long.
_MOST_SENT = 2**20
# Without natural steps, `highest` is multiplied by this and taken in token norms.
_FURTHER = 2.0
# The choices of Diversify's `weights`, as saved graphs name them.
_WEIGHTS = {"equal": EQUAL, "by score": SCORE, "by firing density": DENSITY}

START = io.Float.Input(
    "start", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="Share of the sampling at which steering starts."
)


def end_input(default: float) -> Any:
    """The input `end` of a node that steers."""
    tooltip = "Share of the sampling at which steering ends."
    return io.Float.Input("end", default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


_MASK = io.Mask.Input(
    "mask",
    optional=True,
    tooltip="Steer only here and leave the rest to the prompt as it was; one mask for all images, or one each. "
    "Concept Mask finds the concept's.",
)


def concept_and_norm(prompt: host.MarkedPrompt, directions: Directions, name: str) -> tuple[Concept, float]:
    """The concept to steer and its token norm.

    Args:
        prompt: the marked prompt.
        directions: name the concept that they were made for.
        name: the concept's name if the user gave one, else empty.

    Raises:
        ElrondError: if the directions were made for another model family, or there is no concept of that name.
    """
    family = directions.provenance.family
    if family and family != prompt.family:
        raise ElrondError(f"These directions were made for {family}, but the prompt was encoded for {prompt.family}.")
    index = prompt.index_of(name, directions.provenance.concept)
    return prompt.concepts[index], prompt.norms[index]


def timed_steps(
    directions: Directions,
    strengths: dict[int, float],
    unit: str,
    windows: dict[int, tuple[float, float]],
    usual: tuple[float, float],
) -> list[tuple[float, float, torch.Tensor]]:
    """Start, end and step of each direction that is to be gone along.

    Args:
        directions: where they are from.
        strengths: by direction, in `unit`.
        unit: one of `types.UNITS`.
        windows: start and end, as shares of the sampling, of the directions that have their own.
        usual: those of the others.

    Returns:
        Steps (R, d) in embedding units if `unit` is `ABSOLUTE`, else in token norms.

    Raises:
        ElrondError: if a direction does not exist, is not calibrated where that is asked for, or ends before it starts.
    """
    timed = []
    for index, amount in in_unit(directions, strengths, unit).items():
        start, end = windows.get(index, usual)
        check_share(start, end)
        timed.append((start, end, amount * directions.pick(index)))
    return timed


class ApplyDirection(io.ComfyNode):
    """Add directions to the concept's rows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondApplyDirection",
            display_name="Apply Direction (ELROND)",
            category="ELROND",
            description="Steers the concept along one direction or several. Chain nodes to combine sets of directions, "
            "concepts or parts of the sampling.",
            **host.search_aliases("slider", "sliders", "concept slider", "steer", "edit prompt", "attribute"),
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="From Encode Concept, Mark Concept or another Apply Direction."
                ),
                DirectionsIO.Input("directions", tooltip="From Fit PCA, Train SAE or Load Directions."),
                io.Int.Input("index", default=0, min=0, max=65535, tooltip="Which direction; 0 is the first."),
                io.Float.Input(
                    "strength",
                    default=0.5,
                    min=-1000.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="How far to go; negative goes the other way, 0 changes nothing.",
                ),
                UNIT_INPUT,
                START,
                end_input(1.0),
                CONCEPT_INPUT,
                io.String.Input(
                    "strengths",
                    default="",
                    optional=True,
                    tooltip="Several directions at once, as in 0: 0.5, 3: -0.2. If there are any, they take the place "
                    "of index and strength. The panel's sliders write here.",
                ),
                _MASK,
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="The steered prompt.")],
        )

    @classmethod
    def validate_inputs(
        cls, start: float | None = None, end: float | None = None, strengths: str | None = None
    ) -> bool | str:
        """Refuse what can be seen to be wrong before anything is computed."""
        return first_error((strengths_of, strengths), (check_share, start, end))

    @classmethod
    def execute(
        cls,
        conditioning: Any,
        directions: Directions,
        index: int,
        strength: float,
        unit: str,
        start: float,
        end: float,
        concept: str,
        strengths: str = "",
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        """Steer the marked entries."""
        timed = timed_steps(
            directions, strengths_of(strengths) or {index: strength}, unit, windows_of(strengths), (start, end)
        )
        steps = torch.stack([step for _, _, step in timed])
        windows = [(first, last) for first, last, _ in timed]
        parts = [(first, last, steps[list(acting)].sum(0)) for first, last, acting in acting_together(windows)]

        def changes(prompt: host.MarkedPrompt) -> tuple[tuple[int, ...], list[tuple[float, float, torch.Tensor]]]:
            target, norm = concept_and_norm(prompt, directions, concept)
            scale = 1.0 if unit == ABSOLUTE else norm
            return target.rows, [(first, last, scale * vector) for first, last, vector in parts]

        return io.NodeOutput(host.steer_over_time(conditioning, changes, mask))


class Diversify(io.ComfyNode):
    """A different random step along the directions for every image of a batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondDiversify",
            display_name="Diversify (ELROND)",
            category="ELROND",
            description="Steers every image of a batch along directions of its own, so that a batch is no longer "
            "variations of one picture. Set the latent's batch size to the same count.",
            **host.search_aliases("diversity", "variation", "same face", "mode collapse", "seed variance"),
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="From Encode Concept or Mark Concept."),
                DirectionsIO.Input("directions", tooltip="From Fit PCA, Train SAE or Load Directions."),
                io.Int.Input(
                    "count", default=16, min=1, max=4096, tooltip="Images in the batch: the latent's batch size."
                ),
                seed_input("Fixes what every image gets; image i depends on the seed and i only."),
                io.Float.Input(
                    "lowest", default=0.3, min=0.0, max=1000.0, step=0.05, tooltip="Strengths are uniform from here …"
                ),
                io.Float.Input("highest", default=0.3, min=0.0, max=1000.0, step=0.05, tooltip="… to here."),
                UNIT_INPUT,
                io.Int.Input(
                    "mix",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Directions an image: one, as in the paper, or the normalised sum of several at random.",
                ),
                io.Int.Input(
                    "leading", default=0, min=0, max=4096, tooltip="Use so many leading directions only; 0 uses all."
                ),
                io.Boolean.Input("both_signs", default=True, tooltip="Go either way along a direction."),
                START,
                end_input(0.3),
                CONCEPT_INPUT,
                io.Combo.Input(
                    "how",
                    options=list(METHODS),
                    default=NATURAL,
                    optional=True,
                    tooltip="random: each image draws on its own, as in the paper. spread: mixes of all leading "
                    "directions that lie evenly apart, so that a small batch covers more. natural: such mixes in the "
                    "proportions in which the model's own images vary; strengths are multiples of that (unit is not "
                    "used). Directions that do not know it, such as those of Fit PCA, are spread over one to two times "
                    "the strengths.",
                ),
                io.Combo.Input(
                    "weights",
                    options=list(_WEIGHTS),
                    default="equal",
                    optional=True,
                    tooltip="equal: all directions alike. by score: those with high scores more often, or with a "
                    "larger part in a mix. by firing density: those of Train SAE that occur in more gradients.",
                ),
                _MASK,
                io.Float.Input(
                    "total",
                    default=0.0,
                    min=0.0,
                    max=STRENGTH_LIMIT,
                    step=0.05,
                    optional=True,
                    tooltip="The length of every image's whole step in unit, however many directions are in it: the "
                    "norm of their sum. It takes the place of lowest and highest; 0 leaves them.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="One entry an image."),
                io.String.Output(display_name="report", tooltip="What every image got, as Apply Direction takes it."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        lowest: float | None = None,
        highest: float | None = None,
        start: float | None = None,
        end: float | None = None,
    ) -> bool | str:
        """Refuse what can be seen to be wrong before anything is computed."""
        return first_error((check_strengths, lowest, highest), (check_share, start, end))

    @classmethod
    def execute(
        cls,
        conditioning: Any,
        directions: Directions,
        count: int,
        seed: int,
        lowest: float,
        highest: float,
        unit: str,
        mix: int,
        leading: int,
        both_signs: bool,
        start: float,
        end: float,
        concept: str,
        how: str = RANDOM,
        weights: str = "equal",
        mask: torch.Tensor | None = None,
        total: float = 0.0,
    ) -> io.NodeOutput:
        """Draw and steer."""
        note = ""
        if how == NATURAL and not directions.natural_std:
            # A graph saved with natural steps may hold any unit, since it was not used.
            how, highest, unit = SPREAD, _FURTHER * highest, unit if total else AUTO
            note = _unknown(lowest, highest, total)
        if how == NATURAL and not total:
            unit = ABSOLUTE
        elif how == NATURAL and unit == AUTO:
            # Calibrated strengths would undo the proportions.
            unit = RELATIVE
        draws = draw_steps(
            directions,
            count,
            seed,
            lowest,
            highest,
            mix,
            leading,
            both_signs,
            how,
            _WEIGHTS[weights],
            total,
        )
        changes = torch.stack([_change(directions, draw, unit) for draw in draws])

        def change(prompt: host.MarkedPrompt) -> tuple[tuple[int, ...], torch.Tensor]:
            target, norm = concept_and_norm(prompt, directions, concept)
            return target.rows, (1.0 if unit == ABSOLUTE else norm) * changes

        texts = [_strengths(directions, draw) for draw in draws]
        names = [_leading_names(directions, draw) for draw in draws]
        report = "\n".join(
            f"image {i}: strengths {text} in {unit}{f' ({name})' if name else ''}"
            for i, (text, name) in enumerate(zip(texts, names, strict=True))
        )
        report += note
        steered = host.steer_conditioning(conditioning, change, start, end, mask)
        # For the panel. The host does not count texts under such names as outputs.
        fitting = sum(size <= _MOST_SENT for size in itertools.accumulate(map(len, texts)))
        summaries = [_summary(directions, draw) for draw in draws[:fitting]]
        shown = {"elrond_strengths": texts[:fitting], "elrond_summaries": summaries, "elrond_unit": [unit]}
        return io.NodeOutput(steered, report, ui=shown)


def _unknown(lowest: float, highest: float, total: float) -> str:
    """The last line of a report on directions along which the model's variety is not known."""
    far = f"{total:g} long" if total else f"{lowest:g} to {highest:g} long"
    return (
        "\nHow far the model varies along these directions is not known, so the steps lie evenly apart and are "
        f"{far}. Fit Response Directions and Fit Word Directions know it."
    )


def _by_size(directions: Directions, draw: Draw) -> list[tuple[int, float]]:
    return sorted(parts_of(directions, draw).items(), key=lambda part: -abs(part[1]))


def _strengths(directions: Directions, draw: Draw) -> str:
    """A draw as text for Apply Direction, its largest strengths first."""
    return ", ".join(f"{k}: {part:.5g}" for k, part in _by_size(directions, draw))


def _leading_names(directions: Directions, draw: Draw) -> str:
    """The names of the three directions that are largest in a draw."""
    return ", ".join(f"{k} is {name}" for k, _ in _by_size(directions, draw)[:3] if (name := directions.names[k]))


def _summary(directions: Directions, draw: Draw) -> str:
    """The three largest strengths of a draw, each with the name of its direction."""
    return ", ".join(
        f"{directions.names[k] or f'direction {k}'} {part:.2g}" for k, part in _by_size(directions, draw)[:3]
    )


def _change(directions: Directions, draw: Draw, unit: str) -> torch.Tensor:
    """The change (R, d) by a draw, in embedding units if `unit` is `ABSOLUTE`, else in token norms."""
    if unit in (RELATIVE, ABSOLUTE) or (unit == AUTO and not directions.stops):
        return change_of(directions, draw)
    steps = in_unit(directions, parts_of(directions, draw), unit)
    return torch.einsum(
        "k,krd->rd", directions.vectors.new_tensor(list(steps.values())), directions.vectors[list(steps)]
    )


NODES = [ApplyDirection, Diversify]
