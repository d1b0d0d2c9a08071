"""Draws what each workflow makes, for ComfyUI's template browser and for README.md: `python -m workflows.pictures`.

Runs every workflow on the real server (about two minutes on two cores) and writes `<name>.jpg` beside it.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from demo.server import Server, progress_bar
from elrond_core.sheets import contact_sheet

FOLDER = Path(__file__).parent


class Run:
    """One workflow, run: what its nodes show, by their titles."""

    def __init__(self, server: Server, name: str) -> None:
        self._server = server
        self._graph = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
        self._outputs = server.run(self._graph, progress_bar(sys.stdout))

    def images(self, title: str) -> torch.Tensor:
        """The images a node saved or previewed, float32 (N, H, W, 3)."""
        files = [Image.open(io.BytesIO(self._server.view(image))) for image in self._of(title)["images"]]
        return torch.from_numpy(np.stack([np.asarray(f.convert("RGB"), dtype=np.float32) / 255 for f in files]))

    def text(self, title: str) -> str:
        """What a node previews as text."""
        return self._of(title)["text"][0]

    def _of(self, title: str) -> dict[str, Any]:
        (node,) = (i for i, node in self._graph.items() if node["_meta"]["title"] == title and i in self._outputs)
        return self._outputs[node]


def discover(run: Run) -> np.ndarray:
    """Sample images over both spectra."""
    images = contact_sheet(run.images("Save Image"), ["", ""], [""] * 8, "images of “a thing”", cell=96)
    plots = torch.cat([run.images("PCA: explained variance"), run.images("Response: variance per change")])
    spectra = contact_sheet(plots, [""], ["PCA of their gradients", "normalised by the response"], cell=640)
    return np.concatenate([images, _narrowed(spectra, images.shape[1])])


def steer(run: Run) -> np.ndarray:
    """A row a setting."""
    rows = ["as it is", "against direction 0", "along direction 0", "along 0 and 1"]
    return contact_sheet(run.images("Four rows of four"), rows, [""] * 4, "the same noise in every row", cell=112)


def diversify(run: Run) -> np.ndarray:
    """Before and after."""
    images = torch.cat([run.images("Student"), run.images("Student, diversified")])
    rows = ["distilled", "", "diversified", ""]
    return contact_sheet(images, rows, [""] * 8, "sixteen images of “a thing”", cell=96)


def complexity(run: Run) -> np.ndarray:
    """Both spectra under their estimates."""
    words = ["sun", "thing"]
    titles = [f"a {word}: about {float(run.text(f'Dimension: {word}')):.1f} ways to vary" for word in words]
    plots = torch.cat([run.images(f"Plot: {word}") for word in words])
    return _narrowed(contact_sheet(plots, [""], titles, cell=640), 900)


def _narrowed(picture: np.ndarray, width: int) -> np.ndarray:
    small = Image.fromarray((picture * 255).round().astype(np.uint8)).resize(
        (width, round(width * picture.shape[0] / picture.shape[1])), Image.Resampling.LANCZOS
    )
    return np.asarray(small, dtype=np.float32) / 255


def main() -> None:
    """Run and draw all, the one that others load directions of first."""
    with tempfile.TemporaryDirectory() as output, Server(Path(output)) as server:
        for draw in (discover, steer, diversify, complexity):
            print(draw.__name__)
            picture = draw(Run(server, draw.__name__))
            Image.fromarray((picture * 255).round().astype(np.uint8)).save(
                FOLDER / f"{draw.__name__}.jpg", quality=88, optimize=True
            )


if __name__ == "__main__":
    main()
