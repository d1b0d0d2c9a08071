"""Make the portraits' models from a seed: `python -m demo.train`.

The stages follow each other: the autoencoder, the network that measures pictures, the teacher, the student. Each
resumes from its checkpoint, and a stage whose steps are done is passed over. On processor cores the same command on the
same machine makes the same weights, interrupted or not.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import host

# isort: split
import torch

from .host_model.checkpoint import WEIGHTS, file_of, load_vae
from .portraits import measure
from .training import student, teacher, vae

OUT = Path(__file__).parent / "training" / "out"


def recipe_of(stage: Any, small: bool) -> Any:
    """A stage's recipe: the one of what ships, or the one for tests."""
    return stage.SMALL if small else stage.RECIPE


def take_shipped(out: Path, stages: list[str], weights: Path = WEIGHTS) -> None:
    """Copy shipped weights of stages that are not run into a folder that lacks them, for the stages after them."""
    out.mkdir(parents=True, exist_ok=True)
    for stage in ("vae", "teacher"):
        if stage not in stages and file_of(stage, weights).is_file() and not file_of(stage, out).is_file():
            shutil.copyfile(file_of(stage, weights), file_of(stage, out))


def train_measures(out: Path, small: bool, device: str) -> None:
    """Train the measuring network on pictures as they are and as the autoencoder decodes them."""
    module = load_vae(file_of("vae", out)).to(device)

    def decoded(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return (module.decode(module.encode(images.to(device) * 2 - 1)) / 2 + 0.5).clamp(0, 1).to(images.device)

    path = out / measure.WEIGHTS.name
    if path.is_file():
        return
    checkpoint = out / "measure.pt"
    if small:
        measure.train_measures(decoded, path, checkpoint, device=device, steps=2, judged=16)
    else:
        measure.train_measures(decoded, path, checkpoint, device=device)


def train(out: Path, stages: list[str], small: bool = False) -> None:
    """Run stages in a folder.

    Args:
        out: where checkpoints, logs and weights go.
        stages: names in `STAGES`.
        small: a few steps of everything, to try the code.

    Raises:
        FileNotFoundError: if a stage needs the weights of one that was not run and does not ship.
    """
    device = "cuda" if host.on_gpu() else "cpu"
    # On a card, products of single precision may round to TF32, which is precise enough here and several times faster.
    torch.set_float32_matmul_precision("high")
    runs: dict[str, Callable[[], object]] = {
        "vae": lambda: vae.train(out, recipe_of(vae, small), device),
        "measure": lambda: train_measures(out, small, device),
        "teacher": lambda: teacher.train(out, recipe_of(teacher, small), device),
        "student": lambda: student.train(out, recipe_of(student, small), device),
    }
    take_shipped(out, stages)
    for stage in stages:
        print(f"stage: {stage}", flush=True)
        runs[stage]()


STAGES = ("vae", "measure", "teacher", "student")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--out", type=Path, default=OUT, help="folder of checkpoints, logs and weights")
    parser.add_argument("--small", action="store_true", help="a few steps of everything, to try the code")
    arguments = parser.parse_args()
    train(arguments.out, [stage for stage in STAGES if stage in arguments.stages], arguments.small)
