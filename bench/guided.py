"""Draws the same seeds, steered by Apply Direction and by Guide Along Directions: `python -m bench.guided`.

Of the shipped directions of *demo person*, those of the workflow *steer*, at its strengths; guided twice as far, which
changes about as much (bench/directions.py). The picture goes to docs/pictures/guided.png.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import portraits
from .portraits import NODES, demo_of

from comfyui_elrond.elrond_core.sheets import contact_sheet  # isort: skip
from comfyui_elrond.elrond_core.storage.format import load_directions  # isort: skip

ROOT = Path(__file__).parents[1]
FILE, PICTURE = ROOT / "demo" / "directions" / "demo person.safetensors", ROOT / "docs" / "pictures" / "guided.png"
MODEL, PROMPT = "teacher", "a [person]"
INDICES, STRENGTH, SEEDS, SEED = (1, 2), 2.0, 6, 5


def main() -> None:
    """Draw."""
    demo, directions = demo_of(MODEL), load_directions(FILE)
    prompt = portraits.encoded(demo, PROMPT)
    apply, guide = (NODES[f"Elrond{name}"].execute for name in ("ApplyDirection", "GuideDirections"))

    def images(model: object, positive: object) -> torch.Tensor:
        return demo.decode(portraits.guided(MODEL, model, positive, SEEDS, SEED)).movedim(1, -1)

    rows, titles = [images(demo.model, prompt)], ["as it is"]
    for index in INDICES:
        for sign in (-1, 1):
            strength = sign * STRENGTH
            steered = apply(prompt, directions, index, strength, "token norms", 0.0, 1.0, "").args[0]
            model = guide(demo.model, directions, index, 2 * strength, "token norms", True, 0.0, 1.0, "").args[0]
            rows += [images(demo.model, steered), images(model, prompt)]
            name = directions.names[index].split(" → ")[-1 if sign > 0 else 0] or f"direction {index}"
            titles += [f"{name}\nApply {strength:+g}", f"{name}\nGuide {2 * strength:+g}"]
    columns = [f"image {i}" for i in range(SEEDS)]
    sheet = contact_sheet(torch.cat(rows), titles, columns, "'person': the same images, steered by two nodes", 96)
    Image.fromarray((np.asarray(sheet) * 255).round().astype(np.uint8)).save(PICTURE)


if __name__ == "__main__":
    main()
