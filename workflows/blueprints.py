"""Writes the subgraph blueprints: `python -m workflows.blueprints`. Each is one node for what takes several.

They are written into `subgraphs/`. The host lists them among its nodes, and they can be opened and changed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo.server import Server

from .examples import AS_VARIED
from .frontend import Sheet

FOLDER = Path(__file__).parents[1] / "subgraphs"
CATEGORY = "ELROND"


def find_directions(known: dict[str, Any]) -> dict[str, Any]:
    """Model, text encoder and prompt to directions, which are saved as well."""
    sheet = Sheet("Find Directions (ELROND)", known)
    model, clip = sheet.inlet("model", "MODEL"), sheet.inlet("clip", "CLIP")
    prompt, size = sheet.inlet("prompt", "STRING", "a photo of a [dog]"), sheet.inlet("size", "INT", 1024)
    steps, name = sheet.inlet("steps", "INT", 4), sheet.inlet("name", "STRING", "my directions")
    sheet.group("Find")
    sheet.column()
    marked, _ = sheet.add("ElrondEncodeConcept", clip=clip, prompt=prompt)
    sampled = sheet.add("ElrondSampleRealizations", model=model, positive=marked, width=size, height=size, steps=steps)
    sheet.column()
    gradients = sheet.add(
        "ElrondCollectGradients",
        model=model,
        positive=marked,
        realizations=sampled[0],
        targets_per_realization=4,
    )
    sheet.column()
    directions, plot = sheet.add("ElrondFitResponse", gradients=gradients[0])
    sheet.add("ElrondSaveDirections", directions=directions, name=name)
    return sheet.subgraph(
        CATEGORY,
        "Finds what a model can vary about the word in [brackets], for models that sample without guidance. It takes "
        "minutes, and goes on where it stopped.",
        {"directions": directions, "plot": plot},
    )


def diversify(known: dict[str, Any]) -> dict[str, Any]:
    """An encoded prompt, its word and directions to a conditioning for a batch of different images."""
    sheet = Sheet("Diversify a Batch (ELROND)", known)
    conditioning, clip = sheet.inlet("conditioning", "CONDITIONING"), sheet.inlet("clip", "CLIP")
    directions = sheet.inlet("directions", "ELROND_DIRECTIONS")
    concept, count = sheet.inlet("concept", "STRING", "dog"), sheet.inlet("count", "INT", 4)
    seed = sheet.inlet("seed", "INT", 0)
    sheet.group("Diversify")
    sheet.column()
    marked, _ = sheet.add("ElrondMarkConcept", conditioning=conditioning, clip=clip, concept=concept)
    sheet.column()
    diverse = sheet.add(
        "ElrondDiversify", conditioning=marked, directions=directions, count=count, seed=seed, **AS_VARIED
    )
    return sheet.subgraph(
        CATEGORY,
        "Gives every image of a batch a step of its own along the directions of a word, from Find "
        "Directions. The count is the latent's batch size.",
        {"conditioning": diverse[0], "report": diverse[1]},
    )


def steer(known: dict[str, Any]) -> dict[str, Any]:
    """An encoded prompt, its word and a file of directions to a steered conditioning."""
    sheet = Sheet("Steer with Sliders (ELROND)", known)
    conditioning, clip = sheet.inlet("conditioning", "CONDITIONING"), sheet.inlet("clip", "CLIP")
    concept, file = sheet.inlet("concept", "STRING", "dog"), sheet.inlet("file", "COMBO", "demo person words")
    strengths = sheet.inlet("strengths", "STRING", "")
    sheet.group("Steer")
    sheet.column()
    marked, _ = sheet.add("ElrondMarkConcept", conditioning=conditioning, clip=clip, concept=concept)
    directions, _ = sheet.add("ElrondLoadDirections", name=file)
    sheet.column()
    steered = sheet.add(
        "ElrondApplyDirection", conditioning=marked, directions=directions, strength=0.0, strengths=strengths
    )
    return sheet.subgraph(
        CATEGORY,
        "Steers a word of a prompt along the directions of a file. Open it to move a slider for each direction.",
        {"conditioning": steered[0]},
    )


BLUEPRINTS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (find_directions, diversify, steer)


def main() -> None:
    """Write all of them."""
    with tempfile.TemporaryDirectory() as output, Server(Path(output)) as server:
        known = server.object_info()
    FOLDER.mkdir(exist_ok=True)
    for write in BLUEPRINTS:
        graph = write(known)
        name = graph["nodes"][0]["title"]
        (FOLDER / f"{name}.json").write_text(json.dumps(graph, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
