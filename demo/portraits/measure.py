"""Reads the factors of portraits back from pictures, and says whether a picture is one of this world's.

A small network names the categories and the position. Given these, a picture is linear in its colours, so the colours
are fitted by least squares along their paths; where the network is unsure, the category whose fit is closest wins. A
picture is valid if the portrait of the factors read from it is close to it, as a whole and in every part.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .world import (
    CATEGORICAL,
    CONTINUOUS,
    FACTORS,
    IMAGE_SIZE,
    REACH,
    Factors,
    colour,
    compose,
    draw,
    load_atlas,
    role_colours,
    role_shares,
)

WEIGHTS = Path(__file__).resolve().parents[1] / "weights" / "measure.safetensors"
# A continuous factor is right within this distance, of a range of one.
TOLERANCE = 0.05

# Colours, in the order of the roles' colours in the world; the background comes last.
_COLOURS = ("skin", "hair_colour", "clothes_hue", "background")
# Places tried along each path of colours.
_PLACES = 201
# Passes over the four colours: each is fitted while the others stay.
_PASSES = 3
# A second category this probable is tried as well.
_UNSURE = 0.003
# Steps of a quarter pixel that the position moves from the network's at most.
_FURTHEST = 8
# Local errors are means over windows of this many pixels each way, about a mouth's height.
_WINDOW = 5
# Share of true pictures, sent through the autoencoder, that count as valid.
_VALID_SHARE = 0.995
_BATCH = 256


class Measures(nn.Module):
    """Reads factors from pictures.

    Attributes:
        limits: (2,) largest errors of a valid picture: over the whole, and in the worst window.
    """

    limits: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.positions = 2 * REACH * load_atlas().phases + 1
        self.sizes = [len(values) for values in CATEGORICAL.values()] + [self.positions]
        widths = (3, 32, 64, 96, 128)
        strides = (2, 2, 2, 1)
        blocks: list[nn.Module] = []
        for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            blocks += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        blocks += [nn.Conv2d(128, 12, 1), nn.Flatten(), nn.Linear(12 * 64, 192), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*blocks)
        self.logits = nn.Linear(192, sum(self.sizes))
        self.colours = nn.Linear(192, len(_COLOURS))
        self.register_buffer("limits", torch.zeros(2))

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Logits of each categorical factor and of the position, and first guesses of the four colours (N, 4)."""
        features = self.features((images * 2 - 1).contiguous(memory_format=torch.channels_last))
        return list(self.logits(features).split(self.sizes, dim=1)), self.colours(features)

    @torch.no_grad()
    def measure(self, images: torch.Tensor) -> Factors:
        """Read factors.

        Args:
            images: float (N, 3, 64, 64) RGB in [0, 1]; values beyond are clipped, those that are no number are black.

        Returns:
            factors as `compose` takes them: shape (N,), float32 in [0, 1] or int64, on the images' device.

        Raises:
            ValueError: if the images have another shape.
        """
        shape = (3, IMAGE_SIZE, IMAGE_SIZE)
        if images.ndim != 4 or images.shape[1:] != shape:
            raise ValueError(f"images must be (N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), got {tuple(images.shape)}.")
        images = torch.nan_to_num(images.float()).clamp(0, 1)
        parts = [self._measure(images[start : start + _BATCH]) for start in range(0, max(len(images), 1), _BATCH)]
        return {name: torch.cat([part[name] for part in parts]) for name in FACTORS}

    def _measure(self, images: torch.Tensor) -> Factors:
        logits, guesses = self(images)
        scores = [part.softmax(dim=1) for part in logits]
        steps = torch.arange(self.positions, device=images.device)
        factors: Factors = {name: guesses[:, i].clamp(0, 1) for i, name in enumerate(_COLOURS)}
        factors["position"] = (scores[-1] @ steps.float()).round() / (self.positions - 1)
        for name, part in zip(CATEGORICAL, scores, strict=False):
            factors[name] = part.argmax(dim=1)
        factors, errors = fit_colours(images, factors)
        for step in (-1, 1):
            rows = torch.arange(len(images), device=images.device)
            # Pictures that a step brings closer go on in its direction.
            for _ in range(_FURTHEST):
                moved = (factors["position"][rows] + step / (self.positions - 1)).clamp(0, 1)
                rows = self._try(images, factors, errors, rows, {"position": moved})
        for name, part in zip(CATEGORICAL, scores, strict=False):
            second = part.topk(2, dim=1)
            rows = (second.values[:, 1] > _UNSURE).nonzero().flatten()
            self._try(images, factors, errors, rows, {name: second.indices[rows, 1]})
        return factors

    @staticmethod
    def _try(
        images: torch.Tensor, factors: Factors, errors: torch.Tensor, rows: torch.Tensor, changes: Factors
    ) -> torch.Tensor:
        """Take changes of some pictures' factors, in place, where they fit better; those rows."""
        if not len(rows):
            return rows
        tried, error = fit_colours(images[rows], {**{name: factors[name][rows] for name in FACTORS}, **changes})
        better = error < errors[rows]
        errors[rows[better]] = error[better]
        for name in FACTORS:
            factors[name][rows[better]] = tried[name][better]
        return rows[better]

    def valid(self, images: torch.Tensor) -> torch.Tensor:
        """Whether pictures, as `measure` takes them, are portraits of this world: (N,) bool."""
        return (distances(images, self.measure(images)) <= self.limits).all(dim=1)


def _paths(device: torch.device) -> list[torch.Tensor]:
    """For each colour, its roles' colours at places along its path: (places, roles, 3)."""
    places = torch.linspace(0, 1, _PLACES, device=device)
    roles = role_colours(dict.fromkeys(_COLOURS, places))
    return [*(roles[:, 3 * i : 3 * i + 3] for i in range(3)), colour("background", places)[:, None]]


def fit_colours(images: torch.Tensor, factors: Factors) -> tuple[Factors, torch.Tensor]:
    """Fit the four colours, given the categories and positions.

    The squared error is quadratic in the colours of the roles, so its minimum along each path is found from the
    shares' Gram matrix alone, without composing a picture.

    Args:
        images: float32 (N, 3, 64, 64).
        factors: first guesses; those of colours are where the search starts.

    Returns:
        factors with the best colours, and squared errors (N,), a constant of each picture apart.
    """
    shares, base = role_shares(factors)
    shares = shares.flatten(2)
    gram = shares @ shares.transpose(1, 2)
    target = shares @ (images - base).flatten(2).transpose(1, 2)
    # The error's part that is no product of shares still differs between categories: what the base alone leaves.
    rest = (images - base).square().sum((1, 2, 3))
    paths = _paths(images.device)
    groups = [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]
    places = [(factors[name] * (_PLACES - 1)).round().long() for name in _COLOURS]
    colours = torch.cat([path[place] for path, place in zip(paths, places, strict=True)], dim=1)
    errors = rest
    for _ in range(_PASSES):
        for i, (path, group) in enumerate(zip(paths, groups, strict=True)):
            others = colours.clone()
            others[:, group] = 0
            pull = target[:, group] - gram[:, group] @ others
            products = torch.einsum("pac,pbc->pab", path, path).flatten(1)
            cost = gram[:, group, group].flatten(1) @ products.T - 2 * pull.flatten(1) @ path.flatten(1).T
            places[i] = cost.argmin(dim=1)
            colours[:, group] = path[places[i]]
    errors = rest + (colours * (gram @ colours - 2 * target)).sum((1, 2))
    fitted = {name: place.float() / (_PLACES - 1) for name, place in zip(_COLOURS, places, strict=True)}
    return {**factors, **fitted}, errors


def distances(images: torch.Tensor, factors: Factors) -> torch.Tensor:
    """How far pictures are from the portraits of factors.

    Returns:
        (N, 2) root-mean-square errors: over the whole picture, and in the worst window.
    """
    error = (
        (torch.nan_to_num(images.float()).clamp(0, 1) - compose(factors, images.device)).square().mean(1, keepdim=True)
    )
    local = F.avg_pool2d(error, _WINDOW, stride=1)
    return torch.stack([error.mean((1, 2, 3)), local.amax((1, 2, 3))], dim=1).sqrt()


def right(factors: Factors, read: Factors) -> dict[str, torch.Tensor]:
    """For each factor, which of the values read are right: (N,) bool."""
    within = {name: (factors[name] - read[name]).abs() <= TOLERANCE for name in CONTINUOUS}
    return {**within, **{name: factors[name] == read[name] for name in CATEGORICAL}}


def load(path: Path = WEIGHTS, device: str | torch.device = "cpu") -> Measures:
    """The measuring network that ships.

    Raises:
        FileNotFoundError: if there are no weights at `path`.
        ValueError: if the file does not hold this network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No weights in {path}: `python -m demo.train --stages measure` makes them.")
    measures = Measures()
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        counters = {name: value for name, value in measures.state_dict().items() if name.endswith("_tracked")}
        measures.load_state_dict({**counters, **state})
    except Exception as error:
        raise ValueError(f"{path} does not hold this network; make it again with `python -m demo.train`.") from error
    return measures.float().to(device).to(memory_format=torch.channels_last).eval()


def accuracy(
    measures: Measures, decoded: Callable[[torch.Tensor], torch.Tensor] | None, seed: int, count: int
) -> dict[str, float]:
    """Shares of fresh pictures whose factors are read right.

    Args:
        measures: the network.
        decoded: what the pictures go through before they are measured, if anything.
        seed: where the pictures' random numbers start.
        count: number of pictures.

    Returns:
        a share for each factor, and `valid`.
    """
    device = measures.limits.device
    factors = draw(count, torch.Generator().manual_seed(seed), device)
    images = _through(decoded, compose(factors, device))
    shares = {name: float(part.float().mean()) for name, part in right(factors, measures.measure(images)).items()}
    return {**shares, "valid": float(measures.valid(images).float().mean())}


# Recipe of the network: batches, pictures in each, top learning rate, and weight decay.
_STEPS, _PICTURES, _RATE, _DECAY = 400, 128, 3e-3, 0.02
# Batches until the learning rate is full, and between checkpoints.
_WARM, _EVERY = 60, 50
# Pictures for the limits of valid ones and for the accuracies; their seeds differ from the training's.
_JUDGED = 4000
_TRAINING_SEED, _LIMITS_SEED, _ACCURACY_SEED = 1_000_000, 1, 2


def train_measures(
    decoded: Callable[[torch.Tensor], torch.Tensor] | None = None,
    out: Path = WEIGHTS,
    checkpoint: Path | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    steps: int = _STEPS,
    judged: int = _JUDGED,
    say: Callable[[str], Any] = print,
) -> dict[str, dict[str, float]]:
    """Train the network, find the limits of valid pictures, write the weights.

    A third of the pictures is as drawn, a third blurred and noisy, a third sent through the autoencoder. Each batch has
    a seed of its own, so that a resumed run gives the same weights.

    Args:
        decoded: sends pictures (N, 3, 64, 64) in [0, 1] through the autoencoder; without it, blur and noise stand in.
        out: file to write, in half precision.
        checkpoint: file to resume from, if it exists and is of this recipe, and to write on the way.
        seed: of the weights and the pictures.
        device: where to train.
        steps: number of batches.
        judged: number of fresh pictures for the limits and the accuracies.
        say: told about progress.

    Returns:
        accuracies on fresh pictures, `true` and `decoded`; also in the file's metadata.
    """
    torch.manual_seed(seed)
    measures = Measures().to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(measures.parameters(), lr=_RATE, weight_decay=_DECAY)
    done = 0
    recipe = f"{seed} {steps} {_PICTURES} {_RATE} {_DECAY} {'blur' if decoded is None else 'autoencoder'}"
    if checkpoint is not None and checkpoint.is_file():
        kept = torch.load(checkpoint, map_location=device, weights_only=True)
        # A checkpoint of another recipe would give weights that no command repeats.
        if kept["recipe"] == recipe:
            measures.load_state_dict(kept["weights"])
            optimizer.load_state_dict(kept["optimizer"])
            done = kept["step"]
    measures.train()
    for step in range(done, steps):
        images, factors = _training_batch(decoded, seed, step, device)
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1.0, (step + 1) / _WARM) * (0.01 + 0.99 * (1 - step / steps))
        loss = _loss(measures, images, factors)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % _EVERY == 0 or step + 1 == steps:
            say(f"measuring network: batch {step + 1} of {steps}, loss {float(loss.detach()):.3f}")
            if checkpoint is not None:
                _write_checkpoint(checkpoint, measures, optimizer, step + 1, recipe)
    measures.eval()
    # What ships is what is judged.
    measures.load_state_dict({name: _halved(value) for name, value in measures.state_dict().items()})
    factors = draw(judged, torch.Generator().manual_seed(_LIMITS_SEED), device)
    images = _through(decoded or _softened, compose(factors, device))
    measures.limits = distances(images, measures.measure(images)).quantile(_VALID_SHARE, dim=0)
    figures = {
        "true": accuracy(measures, None, _ACCURACY_SEED, judged),
        "decoded": accuracy(measures, decoded or _softened, _ACCURACY_SEED, judged),
    }
    about = {"art": "Personas by Draftbit, CC BY 4.0", "seed": str(seed), "batches": str(steps)}
    about |= {"judged_after": "blur and noise" if decoded is None else "autoencoder", "accuracy": json.dumps(figures)}
    state = {
        name: value.half().contiguous() if value.is_floating_point() and name != "limits" else value
        for name, value in measures.cpu().to(memory_format=torch.contiguous_format).state_dict().items()
        if not name.endswith("_tracked")
    }
    _replace(out, lambda part: save_file(state, part, metadata=about))
    return figures


def _write_checkpoint(path: Path, measures: Measures, optimizer: torch.optim.Optimizer, step: int, recipe: str) -> None:
    kept = {"weights": measures.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "recipe": recipe}
    _replace(path, lambda part: torch.save(kept, part))


def _halved(value: torch.Tensor) -> torch.Tensor:
    return value.half().to(value.dtype) if value.is_floating_point() else value


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that a crash leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


def _through(decoded: Callable[[torch.Tensor], torch.Tensor] | None, images: torch.Tensor) -> torch.Tensor:
    """Pictures sent through the autoencoder, some at a time, or as they are."""
    if decoded is None:
        return images
    return torch.cat([decoded(part).float().clamp(0, 1) for part in images.split(_BATCH)])


def _blurred(images: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Gaussian blur with a standard deviation (1,) in pixels."""
    reach = torch.arange(-3, 4, device=images.device)
    kernel = torch.softmax(-(reach**2) / (2 * width**2), dim=0)
    kernel = (kernel[:, None] * kernel).expand(3, 1, 7, 7)
    return F.conv2d(F.pad(images, (3, 3, 3, 3), mode="replicate"), kernel, groups=3)


def _softened(images: torch.Tensor) -> torch.Tensor:
    """Stands in for the autoencoder: a blur of half a pixel, and noise of 0.02, always the same."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    return (_blurred(images, torch.full((1,), 0.5, device=images.device)) + 0.02 * noise).clamp(0, 1)


def _training_batch(
    decoded: Callable[[torch.Tensor], torch.Tensor] | None, seed: int, step: int, device: str | torch.device
) -> tuple[torch.Tensor, Factors]:
    """Pictures and their factors."""
    generator = torch.Generator().manual_seed(_TRAINING_SEED * (seed + 1) + step)
    factors = draw(_PICTURES, generator, device)
    images = compose(factors, device)
    third = _PICTURES // 3
    strength = torch.rand(2, generator=generator).to(device)
    soft = _blurred(images[:third], 0.3 + 0.7 * strength[:1])
    soft = soft + 0.08 * strength[1] * torch.randn(soft.shape, generator=generator).to(device)
    middle = images[third : 2 * third]
    with torch.no_grad():
        middle = _through(decoded, middle) if decoded else _blurred(middle, 0.3 + 0.4 * strength[1:])
    return torch.cat([soft.clamp(0, 1), middle, images[2 * third :]]), factors


def _loss(measures: Measures, images: torch.Tensor, factors: Factors) -> torch.Tensor:
    """Cross entropies, and the distance of first guesses of colours."""
    logits, guesses = measures(images)
    loss = sum(F.cross_entropy(part, factors[name]) for name, part in zip(CATEGORICAL, logits, strict=False))
    # Neighbouring positions look alike, so they share the target.
    steps = torch.arange(measures.positions, device=images.device)
    place = factors["position"][:, None] * (measures.positions - 1)
    loss = loss + 0.5 * F.cross_entropy(logits[-1], torch.softmax(-((steps - place) ** 2) / 2, dim=1))
    truth = torch.stack([factors[name] for name in _COLOURS], dim=1)
    return loss + 10 * F.mse_loss(guesses, truth)
