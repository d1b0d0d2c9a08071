"""What every stage of the training shares: seeds, learning rates, and checkpoints that a run resumes from.

A step draws all its random numbers from a generator that is seeded by the stage and the number of the step. So a
resumed run makes the same weights as one that was not interrupted.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

SEED = 2602
CREDIT = "Personas by Draftbit, CC BY 4.0"


def generator_of(stage: str, step: int) -> torch.Generator:
    """The random numbers of a step, on the CPU."""
    return torch.Generator().manual_seed(number_of(stage, step))


def number_of(stage: str, step: int) -> int:
    """A seed for a step of a stage: 63 bits of a digest, so that no two steps share one."""
    return int.from_bytes(hashlib.sha256(f"{SEED} {stage} {step}".encode()).digest()[:8], "big") >> 1


def rate_at(step: int, steps: int, rate: float, warm_up: int, decay: float) -> float:
    """A linear warm-up of `warm_up` steps, a plateau, and a linear way to zero over the last share `decay`."""
    return rate * min(1.0, (step + 1) / warm_up, (steps - step) / (steps * decay))


def digest(recipe: Any) -> str:
    """SHA-256 of a recipe's numbers, in hexadecimal."""
    return hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Progress:
    """A stage's checkpoint and log in a folder.

    Args:
        folder: where `NAME.pt` and `NAME.log` are kept.
        name: the stage.
        recipe: a dataclass of numbers; a checkpoint of another recipe is refused.
        parts: modules and optimizers by name; those of a checkpoint are loaded into them.

    Attributes:
        step: the next step.
        seconds: what the steps before took.
    """

    def __init__(self, folder: Path, name: str, recipe: Any, parts: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._log = folder / f"{name}.pt", folder / f"{name}.log"
        self._recipe, self._parts = digest(recipe), parts
        self.step, before = 0, 0.0
        if self._file.is_file():
            state = torch.load(self._file, map_location="cpu", weights_only=True)
            if state["recipe"] != self._recipe:
                raise ValueError(f"{self._file} is of another recipe; remove it, or train in another folder.")
            for part, module in parts.items():
                module.load_state_dict(state[part])
            self.step, before = state["step"], state["seconds"]
        self._began = time.monotonic() - before

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all runs."""
        return time.monotonic() - self._began

    def log(self, **values: float) -> None:
        """Write a line of values to the log and the screen."""
        line = json.dumps(
            {"step": self.step, "seconds": round(self.seconds), **{k: round(v, 5) for k, v in values.items()}}
        )
        print(line, flush=True)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def save(self) -> None:
        """Write the checkpoint so that a crash leaves the old one or the new one."""
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {"recipe": self._recipe, "step": self.step, "seconds": self.seconds}
        fresh = self._file.with_suffix(".tmp")
        torch.save(state, fresh)
        fresh.replace(self._file)


def save_weights(weights: dict[str, torch.Tensor], path: Path, recipe: Any, **about: str) -> None:
    """Weights in half precision as a safetensors file, with credit, seed and recipe in its metadata."""
    half = {
        name: (value.detach().to("cpu", torch.float16) if value.is_floating_point() else value.cpu()).contiguous()
        for name, value in weights.items()
    }
    metadata = {
        "credit": CREDIT,
        "seed": str(SEED),
        "recipe": json.dumps(asdict(recipe), sort_keys=True),
        "recipe_sha256": digest(recipe),
        **about,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    safetensors.torch.save_file(half, fresh, metadata)
    fresh.replace(path)
