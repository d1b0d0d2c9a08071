"""Training of the sparse autoencoder (`elrond_core.decompose.sae`): optimiser, schedule, dead latents, checkpoints.

As in Gao et al. (arXiv 2406.04093), atoms stay at unit norm, the component of the decoder's gradient along each atom is
removed, and dead latents are revived by the AuxK loss. The learning rate warms up, stays, and falls to zero.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from ..directions import Directions
from ..errors import ElrondError
from ..gradients import Gradients
from ..seeding import generator
from ..storage import tensors as tensor_files
from ..storage.atomic_write import atomic_write, make_folder, reason, remove_abandoned
from .sae import TopKSAE, top_activations
from .sae_data import ALL_SAME, PIECE_VALUES, Check, ScaledGradients, digest, geometric_median, mean_of, pieces
from .sae_report import SAEReport, usage_of

OnStep = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training.

    Attributes:
        latents: size of the dictionary; R·d if None (the published expansion of 1).
        k: latents active at once; if None, a twenty-fourth of the latents, at most 32: the published 32 from SD1.x's
            width of 768 on, fewer where 32 would not be sparse.
        epochs: passes over the gradients; if None, as many as make `steps`.
        learning_rate: peak rate of Adam.
        batch_size: gradients a step.
        density_range: open range of log10 firing densities within which a latent becomes a direction.
        seed: fixes the first dictionary and the order of the gradients.
        patience: windows (an epoch, at least `window` steps) without better FVU (by 0.5 % and 0.001) after which the
            training has stalled; 0 for never.
        steps: number of steps, if `epochs` is None.
        warm_up: share of the steps over which the learning rate rises.
        cool_down: share of the steps over which it falls to zero; after a stall the fall begins at once.
        window: fewest steps of a window; also the steps without firing after which a latent is dead.
        auxk_weight: weight of the AuxK loss (α of Gao et al.).
        auxk_rows: gradients of a batch that AuxK is computed on. AuxK is relative to their residual, so that fewer
            rows save time and do not change its weight.
    """

    latents: int | None = None
    k: int | None = None
    epochs: int | None = None
    learning_rate: float = 1e-3
    batch_size: int = 512
    density_range: tuple[float, float] = (-5.0, 0.0)
    seed: int = 0
    patience: int = 5
    steps: int = 3000
    warm_up: float = 0.03
    cool_down: float = 0.4
    window: int = 100
    auxk_weight: float = 1 / 32
    auxk_rows: int = 128

    def for_size(self, size: int) -> tuple[int, int]:
        """Latents and k for gradients of `size` values, once all settings are found to be in range.

        Raises:
            ElrondError: if one is not.
        """
        latents = size if self.latents is None else self.latents
        if latents < 1:
            raise ElrondError(f"The number of latents must be at least 1, got {latents}.")
        k = min(32, max(1, latents // 24)) if self.k is None else self.k
        if not 1 <= k <= latents:
            raise ElrondError(f"k must be between 1 and the number of latents ({latents}), got {k}.")
        if self.epochs is not None and self.epochs < 1:
            raise ElrondError(f"The number of epochs must be at least 1, got {self.epochs}.")
        if not 0 < self.learning_rate < math.inf:
            raise ElrondError(f"The learning rate must be above zero, got {self.learning_rate}.")
        if self.batch_size < 1:
            raise ElrondError(f"The batch size must be at least 1, got {self.batch_size}.")
        if not self.density_range[0] < self.density_range[1]:
            raise ElrondError(f"The range of log10 densities must go from low to high, got {self.density_range}.")
        return latents, k


_DEFAULTS = TrainConfig()


class TrainedSAE(NamedTuple):
    """What a training returns.

    Attributes:
        directions: atoms in the range of densities, (K, R, d), of unit norm, ranked by the share of the gradients'
            energy Σ‖g - b_dec‖² that each latent contributes to the reconstruction. Rank by density alone would favour
            latents that fire always and weakly. Signs are as learned: activations are never negative, so that +v is a
            direction that gradients take.
        report: how good the reconstruction is.
        model: the whole autoencoder, on the CPU; `model.encode` takes any gradients of this shape.
    """

    directions: Directions
    report: SAEReport
    model: TopKSAE


def train_sae(
    gradients: Gradients,
    config: TrainConfig = _DEFAULTS,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    on_step: OnStep | None = None,
    check: Check = lambda: None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> TrainedSAE:
    """Learn a sparse dictionary of the gradients; its atoms are the directions.

    Args:
        gradients: at least two of them; (N, R, d) are N vectors of R·d.
        config: all settings that change the result.
        device: where to train; the result is on the CPU.
        checkpoint: file that training resumes from if it exists and fits the gradients and settings; written ten
            times, and when anything raises, and removed at the end. The resumed training is the same training. Its
            folder is made if need be.
        on_step: called after each step with (step, steps, FVU of the batch); may raise to cancel. There are fewer
            steps once FVU has stalled.
        check: called between pieces of work that take well under a second at the published size; may raise to cancel.
        warn: told, in one sentence and once a cause, that the checkpoint cannot be written; the training goes on.

    Raises:
        ElrondError: if there are fewer than two gradients, one is not finite, all are the same, a setting is out of
            range, all latents die, or no latent's density lies in the range.
    """
    vectors = gradients.flat
    if len(vectors) < 2:
        raise ElrondError(f"A sparse autoencoder needs at least 2 gradients, got {len(vectors)}.")
    latents, k = config.for_size(vectors.shape[1])
    config = replace(config, latents=latents, k=k)

    data = ScaledGradients(vectors, device, check)
    mean = mean_of(data, check)
    variance = float(torch.cat([(piece - mean).square().sum(1) for piece in pieces(data, check)]).mean())
    if variance <= 1e-12:
        raise ElrondError(ALL_SAME)
    rows, width = gradients.vectors.shape[1:]
    model = TopKSAE(
        rows, width, latents, k, scale=data.scale, seed=config.seed, device=data.device, dtype=vectors.dtype
    )
    check()
    with torch.no_grad():
        model.b_dec.copy_(geometric_median(data, check=check))
    check()
    trainer = SAETrainer(model, data, variance, config, check)
    check()

    identity = ""
    if checkpoint is not None:
        settings = {name: value for name, value in asdict(config).items() if name != "density_range"}
        identity = json.dumps([*data.shape, digest(vectors, check), settings])
        trainer.resume(checkpoint, identity)
    complaints: set[str] = set()

    def save_checkpoint() -> None:
        if checkpoint is None:
            return
        try:
            trainer.save(checkpoint, identity)
        except Exception as error:
            # A checkpoint that cannot be written must not end the training, nor hide that it was cancelled.
            why = reason(error) if isinstance(error, OSError) else str(error)
            if why not in complaints:
                warn(
                    f"The training cannot be kept in {checkpoint.parent} ({why}): it goes on, but if it is "
                    "interrupted it starts from what was kept last."
                )
            complaints.add(why)

    try:
        while trainer.step < trainer.end:
            fvu = trainer.advance()
            if trainer.step % max(1, trainer.steps // 10) == 0:
                save_checkpoint()
            if on_step:
                on_step(trainer.step, trainer.end, fvu)
        directions, report = _result(trainer, gradients)
    except BaseException:
        save_checkpoint()
        raise
    if checkpoint is not None:
        with contextlib.suppress(OSError):
            checkpoint.unlink(missing_ok=True)
    return TrainedSAE(directions, report, model.cpu().requires_grad_(False))


def memory(gradients: Gradients, config: TrainConfig = _DEFAULTS) -> int:
    """Bytes that `train_sae` takes on its device: gradients, Adam's parameters, and a batch's activations."""
    count, size = gradients.flat.shape
    latents = size if config.latents is None else config.latents
    # All gradients and pieces of them; weights, their gradients and two moments of encoder and decoder.
    return 4 * (count * size + 4 * PIECE_VALUES + 10 * latents * size + 8 * config.batch_size * (latents + size))


class SAETrainer:
    """The state of one training and its next step.

    Args:
        model: the autoencoder; it is trained in place.
        data: gradients (N, R·d) divided by the model's scale.
        variance: mean squared distance of the data from their mean, which FVU is relative to.
        config: settings.
        check: called between pieces of a step; may raise to cancel.

    Attributes:
        step: steps done.
        end: steps in all; falls when FVU stalls.
        losses: FVU of each batch.
        steps_since_fired: int64, (latents,).
    """

    def __init__(
        self,
        model: TopKSAE,
        data: torch.Tensor | ScaledGradients,
        variance: float,
        config: TrainConfig,
        check: Check = lambda: None,
    ) -> None:
        self.model, self.data, self.variance, self.config, self.check = model, data, variance, config, check
        self.per_epoch = math.ceil(len(data) / config.batch_size)
        self.steps = config.steps if config.epochs is None else config.epochs * self.per_epoch
        self.cool_down = max(1, round(config.cool_down * self.steps))
        self.window = max(config.window, self.per_epoch)
        self.step, self.end = 0, self.steps
        self.losses: list[float] = []
        self.steps_since_fired = torch.zeros(model.latents, dtype=torch.int64, device=data.device)
        self.adam = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, self._rate)
        # False while a step changes the state: an exception then leaves a state that belongs to no step.
        self._consistent = True
        self._order: tuple[int, torch.Tensor] | None = None

    def loss(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """FVU of a batch (B, R·d), the loss (FVU and AuxK), and `steps_since_fired` after this batch."""
        model, config = self.model, self.config
        pre_activations = model.pre_activations(batch)
        # The hook is called in the backward pass, before the encoder's part of it.
        pre_activations.register_hook(lambda _: self.check())
        self.check()
        top_acts, top_indices = top_activations(pre_activations, model.k)
        self.check()
        residual = batch - model.b_dec - model.weighted_atoms(top_acts, top_indices)
        fvu = residual.square().sum() / (len(batch) * self.variance)

        steps_since_fired = self.steps_since_fired + 1
        steps_since_fired[top_indices[top_acts > 0]] = 0
        dead = (steps_since_fired >= self.window).nonzero().squeeze(1)
        if not len(dead):
            return fvu, fvu, steps_since_fired
        self.check()
        # AuxK: the residual, reconstructed by dead latents alone.
        residual = residual[: config.auxk_rows].detach()
        pre_activations = pre_activations[: config.auxk_rows].index_select(1, dead)
        auxk_acts, auxk_indices = top_activations(pre_activations, min(len(dead), max(1, batch.shape[1] // 2)))
        # So many latents are active here that a product with all atoms is faster than a lookup.
        codes = torch.zeros_like(pre_activations).scatter(1, auxk_indices, auxk_acts)
        reconstruction = codes @ model.W_dec.index_select(0, dead)
        auxk = (residual - reconstruction).square().sum() / residual.square().sum().clamp_min(1e-12)
        return fvu, fvu + config.auxk_weight * auxk, steps_since_fired

    def advance(self) -> float:
        """One step of Adam; returns the batch's FVU. A check that raises leaves the state as it was."""
        decoder = self.model.W_dec
        fvu, loss, steps_since_fired = self.loss(self._batch())
        self.check()
        self.adam.zero_grad()
        loss.backward()
        self.check()
        with torch.no_grad():
            decoder_gradient = decoder.grad
            assert decoder_gradient is not None
            # Along an atom a step would only change its norm, which is set to one afterwards.
            decoder_gradient -= (decoder_gradient * decoder).sum(1, keepdim=True) * decoder
        torch.nn.utils.clip_grad_norm_(list(self.model.parameters()), 1.0)
        self.check()
        self._consistent = False
        self.adam.step()
        with torch.no_grad():
            decoder.div_(decoder.norm(dim=1, keepdim=True).clamp_min(1e-12))
        self.step, self.steps_since_fired = self.step + 1, steps_since_fired
        self.losses.append(float(fvu.detach()))
        if self._stalled():
            self.end = self.step + self.cool_down
        self.schedule.step()
        self._consistent = True
        return self.losses[-1]

    def _batch(self) -> torch.Tensor:
        epoch, place = divmod(self.step, self.per_epoch)
        size = self.config.batch_size
        if self._order is None or self._order[0] != epoch:
            order = torch.randperm(len(self.data), generator=generator(self.config.seed, "sae epoch", epoch))
            self._order = epoch, order.to(self.data.device)
        return self.data[self._order[1][place * size : (place + 1) * size]]

    def _rate(self, step: int) -> float:
        """The learning rate of a step, as a share of its peak."""
        warm_up = (step + 1) / max(1.0, self.config.warm_up * self.steps)
        return min(1.0, warm_up, (self.end - step) / self.cool_down)

    def _stalled(self) -> bool:
        """Whether the last `patience` windows lowered FVU by less than 0.5 % and 0.001 of the best before."""
        patience = self.config.patience
        cooling = self.step > self.end - self.cool_down
        windows = self.step // self.window
        if cooling or not patience or self.step % self.window or windows <= patience:
            return False
        means = torch.tensor(self.losses).reshape(windows, self.window).mean(1)
        return bool(means[-patience:].min() > 0.995 * means[:-patience].min() - 1e-3)

    def save(self, path: Path, identity: str) -> None:
        """Write the state, whole or not at all, unless there is nothing that could be continued."""
        if not self.step or not self._consistent:
            return
        tensors = {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "steps_since_fired": self.steps_since_fired,
        }
        for name, parameter in self.model.named_parameters():
            state = self.adam.state[parameter]
            tensors |= {name: parameter.detach(), f"{name}.exp_avg": state["exp_avg"]}
            tensors[f"{name}.exp_avg_sq"] = state["exp_avg_sq"]
        metadata = {"identity": identity, "step": str(self.step), "end": str(self.end)}
        make_folder(path.parent)
        remove_abandoned(path.parent)
        atomic_write(path, tensor_files.encode(tensors, metadata))

    def resume(self, path: Path, identity: str) -> None:
        """Continue from a checkpoint, or start afresh if there is no sound one of these gradients and settings."""
        try:
            tensors, metadata = tensor_files.read(path)
            if metadata.get("identity") != identity:
                return
            step, end = int(metadata["step"]), int(metadata["end"])
        except (OSError, ValueError, KeyError):
            return
        layout = {
            "losses": ((step,), torch.float64),
            "steps_since_fired": (tuple(self.steps_since_fired.shape), torch.int64),
        }
        for name, parameter in self.model.named_parameters():
            entry = tuple(parameter.shape), parameter.dtype
            layout |= {name: entry, f"{name}.exp_avg": entry, f"{name}.exp_avg_sq": entry}
        if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} != layout:
            return
        if not 0 < step <= end <= self.steps or not all(tensor.isfinite().all() for tensor in tensors.values()):
            return
        self.step, self.end = step, end
        self.losses = tensors["losses"].tolist()
        self.steps_since_fired = tensors["steps_since_fired"].to(self.steps_since_fired.device)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[name])
                self.adam.state[parameter] = {
                    "step": torch.tensor(float(step), device=parameter.device),
                    "exp_avg": tensors[f"{name}.exp_avg"].to(parameter),
                    "exp_avg_sq": tensors[f"{name}.exp_avg_sq"].to(parameter),
                }
        # One step back, since a schedule takes its first step when it is made.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, self._rate, last_epoch=step - 1)


def _result(trainer: SAETrainer, gradients: Gradients) -> tuple[Directions, SAEReport]:
    """The latents in the range of densities as directions, and the report."""
    model, config = trainer.model, trainer.config
    count = len(trainer.data)
    usage = usage_of(model, trainer.data, trainer.check)
    if not usage.fired.any():
        raise ElrondError(
            f"All {model.latents} latents are dead, and there is no direction: lower the learning rate "
            f"({config.learning_rate:g})."
        )
    log_densities = (usage.fired / count).log10()
    low, high = config.density_range
    selected = ((log_densities > low) & (log_densities < high)).nonzero().squeeze(1)
    if not len(selected):
        raise ElrondError(f"No latent has a log10 firing density between {low:g} and {high:g}; widen the range.")
    selected = selected[usage.energy[selected].argsort(descending=True, stable=True)]
    method = {
        "name": "sae",
        "latents": str(model.latents),
        "k": str(model.k),
        "steps": str(trainer.step),
        "learning_rate": f"{config.learning_rate:g}",
        "batch_size": str(config.batch_size),
        "density_range": f"{low:g} to {high:g}",
        "seed": str(config.seed),
    }
    directions = Directions(
        vectors=model.dictionary.detach().cpu()[selected],
        scores=(usage.energy[selected] / usage.total).float(),
        method=method,
        provenance=gradients.provenance,
        score_name="share of gradient energy",
        densities=tuple((usage.fired[selected] / count).tolist()),
    )
    report = SAEReport(
        fvu=usage.unexplained / (trainer.variance * count),
        dead=float((usage.fired == 0).double().mean()),
        log_densities=log_densities.float(),
        selected=selected,
        density_range=config.density_range,
        losses=torch.tensor(trainer.losses),
        latents=model.latents,
        k=model.k,
        stopped=trainer.step < trainer.steps,
    )
    return directions, report
