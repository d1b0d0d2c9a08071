"""Draws the panel's thumbnails of the demo's directions: `python -m demo.thumbnails`, about a minute on two cores.

Each shows the lowest, the middle and the highest strength of *Direction Sweep*. It is in `demo/thumbnails`, named by
the numbers of its direction. The panel shows it where the user's output folder has none.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from elrond_core.storage.format import load_directions

from .server import Server, progress_bar

FOLDER = Path(__file__).parent


def sweep(file: str, count: int) -> dict[str, Any]:
    """A graph that makes thumbnails of all the directions of a file, which holds so many."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}

    settings = {
        "which": f"0-{count - 1}",
        "lowest": -0.8,
        "highest": 0.8,
        "columns": 3,
        "unit": "token norms",
        "seed": 1,
    }
    settings |= {"width": 64, "height": 64, "steps": 20, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    settings |= {"batch_size": 3, "cell": 96, "concept": "", "thumbnails": True}
    wires = {"model": ["1", 0], "positive": ["2", 0], "directions": ["3", 0], "vae": ["1", 2]}
    return {
        "1": node("ElrondLoadDemoModel", name="teacher"),
        "2": node("ElrondEncodeConcept", clip=["1", 1], prompt="a [person]", concept="", occurrence=1),
        "3": node("ElrondLoadDirections", name=file),
        "4": node("ElrondDirectionSweep", **wires, **settings),
        "5": node("PreviewImage", images=["4", 0]),
    }


def main() -> None:
    """Draw all, in the place of those that are there."""
    with tempfile.TemporaryDirectory() as output:
        with Server(Path(output)) as server:
            for path in sorted((FOLDER / "directions").glob("*.safetensors")):
                server.run(sweep(path.stem, len(load_directions(path))), progress_bar(sys.stdout))
        shutil.rmtree(FOLDER / "thumbnails", ignore_errors=True)
        shutil.copytree(Path(output) / "elrond" / "thumbnails", FOLDER / "thumbnails")


if __name__ == "__main__":
    main()
