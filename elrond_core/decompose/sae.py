"""A TopK sparse autoencoder of gradients: step 6 of ELROND (arXiv 2602.10216).

The TopK activation, the unit decoder, the removal of its gradients' parallel component and the AuxK loss for dead
latents follow Gao et al., "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..directions import Directions
from ..errors import ElrondError
from ..gradients import Gradients
from ..seeding import generator
from ..storage import tensors as tensor_files
from ..storage.atomic_write import atomic_write, make_folder, reason, remove_abandoned
from .moments import require_finite

OnStep = Callable[[int, int, float], None]
Check = Callable[[], None]

_STEPS = 3000
_WARM_UP = 0.03
_COOL_DOWN = 0.4
_AUX_WEIGHT = 1 / 32
# Gradients of a batch that AuxK looks at: it normalises by what they leave, so that fewer cost time but not weight.
_AUX_ROWS = 128
# What is done between two checks for a cancel, at most: numbers that are looked at, and, of the gradients that the
# finished autoencoder is tried on, how many and how many multiplications.
_VALUES = 2**22
_CHUNK = 4096
_WORK = 2**32
_SAME = "All gradients are the same, so there is nothing to learn."


@dataclass(frozen=True)
class SAEReport:
    """What the training of an autoencoder came to.

    Attributes:
        fvu: fraction of the gradients' variance that the reconstruction leaves unexplained, over the whole set.
        dead: share of latents that no gradient activates.
        log_densities: float32, (latents,): log10 of the share of gradients that activate each; -inf for dead ones.
        kept: int64, (K,): the latents that became directions, in their order.
        density_range: the open range of log10 densities that was kept.
        losses: float32, (steps,): FVU of each training batch.
        latents: number of latents.
        k: latents active at once.
        stopped: whether the training was cut short because FVU had stalled.
    """

    fvu: float
    dead: float
    log_densities: torch.Tensor
    kept: torch.Tensor
    density_range: tuple[float, float]
    losses: torch.Tensor
    latents: int
    k: int
    stopped: bool

    def lines(self) -> list[str]:
        """The report as text, one fact a line."""
        low, high = self.density_range
        return [
            f"{self.latents} latents, {self.k} active at once",
            f"unexplained variance (FVU): {self.fvu:.3f}",
            f"dead latents: {self.dead:.1%}",
            f"directions: {len(self.kept)} of log10 density in ({low:g}, {high:g})",
            f"{len(self.losses)} steps" + (", stopped early because FVU had stalled" if self.stopped else ""),
        ]


def train_sae(
    gradients: Gradients,
    *,
    latents: int | None = None,
    k: int | None = None,
    epochs: int | None = None,
    learning_rate: float = 1e-3,
    batch_size: int = 512,
    density_range: tuple[float, float] = (-5.0, 0.0),
    seed: int = 0,
    patience: int = 5,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    on_step: OnStep | None = None,
    check: Check = lambda: None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> tuple[Directions, SAEReport]:
    """Learn a sparse dictionary of the gradients; its atoms are the directions.

    z = TopK(ReLU(W_enc (g - b_dec) + b_enc)), ĝ = W_dec z + b_dec, over gradients divided by their median norm, so
    that the learning rate depends neither on the model nor on the noise level. The rate warms up, stays, and falls to
    zero over the last 40 % of the steps; when FVU stalls, the fall begins at once.

    Args:
        gradients: at least two of them; (N, R, d) are N vectors of R·d.
        latents: size of the dictionary; R·d if None (the published expansion of 1).
        k: latents active at once; if None, a twenty-fourth of the latents, at most 32: the published 32 from SD1.x's
            width of 768 on, and fewer where 32 would be so dense that nothing had to be sparse.
        epochs: passes over the gradients; if None, as many as make 3,000 steps, whatever N.
        learning_rate: peak rate of Adam.
        batch_size: gradients a step.
        density_range: open range of log10 firing densities within which a latent becomes a direction.
        seed: fixes the start and the order of the gradients.
        patience: windows (an epoch, at least 100 steps) without better FVU (by 0.5 % and 0.001) that count as a stall;
            0 for never.
        device: where to train; the result is on the CPU.
        checkpoint: file that training resumes from if it exists and fits the gradients and settings; written ten
            times, and when anything raises, and removed at the end. The resumed training is the same training. Its
            folder is made if need be.
        on_step: called after each step with (step, steps, FVU of the batch); may raise to cancel. There are fewer
            steps once FVU has stalled.
        check: called between pieces of work that take well under a second at the published size; may raise to cancel.
        warn: told, in one sentence and once a cause, that the checkpoint cannot be written; the training goes on.

    Returns:
        Directions (K, R, d), unit norm, ranked by the share of the gradients' energy Σ‖g - b_dec‖² that each latent
        puts into the reconstruction (rank by density alone would favour latents that fire always and weakly); and the
        report. Signs are as learned: activations are never negative, so that +v is a direction gradients take.

    Raises:
        ElrondError: if there are fewer than two gradients, one is not finite, all are the same, an option is out of
            range, all latents die, or no latent's density lies in the range.
    """
    vectors = gradients.flat
    if len(vectors) < 2:
        raise ElrondError(f"A sparse autoencoder needs at least 2 gradients, got {len(vectors)}.")
    size = vectors.shape[1]
    latents = size if latents is None else latents
    if latents < 1:
        raise ElrondError(f"The number of latents must be at least 1, got {latents}.")
    k = min(32, max(1, latents // 24)) if k is None else k
    _check(latents, k, epochs, learning_rate, batch_size, density_range)

    data = _Scaled(vectors, device, check)
    mean = _mean(data, check)
    variance = float(torch.cat([(piece - mean).square().sum(1) for piece in _pieces(data, check)]).mean())
    if variance <= 1e-12:
        raise ElrondError(_SAME)

    trainer = _Trainer(data, variance, latents, k, epochs, learning_rate, batch_size, seed, patience, check)
    identity = ""
    if checkpoint is not None:
        settings = (latents, k, epochs, learning_rate, batch_size, seed, patience)
        identity = json.dumps([*data.shape, _digest(vectors, check), *settings])
        trainer.resume(checkpoint, identity)

    complaints: set[str] = set()

    def keep() -> None:
        if checkpoint is None:
            return
        try:
            trainer.save(checkpoint, identity)
        except Exception as error:
            # The training is worth more than its copy, and whoever cancels it is to see that it is cancelled.
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
                keep()
            if on_step:
                on_step(trainer.step, trainer.end, fvu)
        found = _finish(trainer, gradients, density_range)
    except BaseException:
        keep()
        raise
    if checkpoint is not None:
        with contextlib.suppress(OSError):
            checkpoint.unlink(missing_ok=True)
    return found


def memory(gradients: Gradients, latents: int | None = None, batch_size: int = 512) -> int:
    """Bytes that `train_sae` takes on its device: gradients, Adam's parameters, and a batch's activations."""
    count, size = gradients.flat.shape
    latents = size if latents is None else latents
    # All gradients and pieces of them; weights, their gradients and two moments of encoder and decoder.
    return 4 * (count * size + 4 * _VALUES + 10 * latents * size + 8 * batch_size * (latents + size))


class _Scaled:
    """Gradients divided by their median norm, (N, D), on a device; a part at a time, so that there is no second copy.

    Zero gradients (a realization compared with its like) do not make the scale zero.
    """

    def __init__(self, vectors: torch.Tensor, device: torch.device | str, check: Check) -> None:
        norms, first = [], 0
        for piece in _pieces(vectors, check):
            require_finite(piece, first)
            first += len(piece)
            norms.append(piece.double().norm(dim=1))
        typical = torch.cat(norms)
        typical = typical[typical > 0]
        if not len(typical):
            raise ElrondError(_SAME)
        self.vectors = vectors.to(device)
        self.shape, self.dtype, self.device = vectors.shape, vectors.dtype, self.vectors.device
        # By powers of two first, which rounds nothing: what is squared from here on is near one, whatever the scale.
        # One power alone need not be a float32.
        power = math.frexp(float(typical.median()))[1]
        self._powers = 2.0 ** -(power // 2), 2.0 ** -(power - power // 2)
        self._length = 1.0
        lengths = torch.cat([piece.norm(dim=1) for piece in _pieces(self, check)])
        self._length = float(lengths[lengths > 0].median())

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._scale(self.vectors[rows])

    def split(self, rows: int) -> Iterator[torch.Tensor]:
        """All of it, so many rows at a time."""
        return (self._scale(piece) for piece in self.vectors.split(rows))

    def _scale(self, rows: torch.Tensor) -> torch.Tensor:
        once, again = self._powers
        return (rows * once).mul_(again).div_(self._length)


def geometric_median(points: torch.Tensor | _Scaled, iterations: int = 50, check: Check = lambda: None) -> torch.Tensor:
    """The point of least summed distance to `points` (N, D), by Weiszfeld's algorithm; (D,).

    `check` is called between pieces of the work and may raise to cancel.
    """
    median = _mean(points, check)
    for _ in range(iterations):
        pulled, weights = torch.zeros_like(median), torch.zeros_like(median[0])
        for piece in _pieces(points, check):
            weight = 1 / (piece - median).norm(dim=1).clamp_min(1e-6)
            pulled += weight @ piece
            weights += weight.sum()
        previous, median = median, pulled / weights
        if (median - previous).norm() <= 1e-5 * median.norm():
            break
    return median


def _mean(points: torch.Tensor | _Scaled, check: Check) -> torch.Tensor:
    return torch.stack([piece.sum(0) for piece in _pieces(points, check)]).sum(0) / len(points)


def _pieces(vectors: torch.Tensor | _Scaled, check: Check) -> Iterator[torch.Tensor]:
    """All rows of (N, D), a bounded number of values at once, with a check before each."""
    for piece in vectors.split(max(1, _VALUES // vectors.shape[1])):
        check()
        yield piece


def _digest(vectors: torch.Tensor, check: Check) -> str:
    summed = hashlib.blake2b(digest_size=32)
    for piece in _pieces(vectors, check):
        summed.update(piece.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return summed.hexdigest()


class _Trainer:
    """The state of one training and its next step."""

    def __init__(
        self,
        data: torch.Tensor | _Scaled,
        variance: float,
        latents: int,
        k: int,
        epochs: int | None,
        learning_rate: float,
        batch_size: int,
        seed: int,
        patience: int,
        check: Check = lambda: None,
    ) -> None:
        self.data, self.variance, self.k, self.check = data, variance, k, check
        self.learning_rate, self.batch_size, self.seed, self.patience = learning_rate, batch_size, seed, patience
        count, size = data.shape
        self.per_epoch = math.ceil(count / batch_size)
        self.steps = _STEPS if epochs is None else epochs * self.per_epoch
        self.cool_down = max(1, round(_COOL_DOWN * self.steps))
        self.window = max(100, self.per_epoch)

        decoder = torch.randn(latents, size, generator=generator(seed, "sae decoder")).to(data.device, data.dtype)
        check()
        decoder /= decoder.norm(dim=1, keepdim=True)
        # The encoder starts tied to the decoder, as published.
        parameters = (decoder.clone(), torch.zeros_like(decoder[:, 0]), decoder, geometric_median(data, check=check))
        self.parameters = [value.requires_grad_(True) for value in parameters]
        self.encoder, self.encoder_bias, self.decoder, self.decoder_bias = self.parameters
        check()
        self.adam = torch.optim.Adam(self.parameters, lr=learning_rate, fused=True)
        check()
        self.step, self.end = 0, self.steps
        # False within the part of a step that changes the state: what an exception leaves then is no step's.
        self.whole = True
        self.losses: list[float] = []
        self.idle = torch.zeros(latents, dtype=torch.int64, device=data.device)  # Steps since a latent last fired.
        self.order: tuple[int, torch.Tensor] | None = None

    def before(self, batch: torch.Tensor) -> torch.Tensor:
        """What the encoder makes of a batch (B, D) before TopK: W_enc (g - b_dec) + b_enc, (B, latents)."""
        # The biases together, so that no gradient has to be taken for the whole batch to reach the decoder's.
        bias = self.encoder_bias - self.encoder @ self.decoder_bias
        return torch.addmm(bias, batch, self.encoder.T)

    def decode(self, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The reconstruction (B, D) by the latents at `places`, active by `values`, both (B, k)."""
        # Only the atoms that are active are looked at: with few of many that is much less than a product with all.
        return torch.nn.functional.embedding_bag(places, self.decoder, per_sample_weights=values, mode="sum")

    def loss(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The FVU of a batch (B, D), what is minimised (that and AuxK), and `idle` as it is after this batch."""
        before = self.before(batch)
        # In the backward pass, this is before the encoder's part of it.
        before.register_hook(lambda _: self.check())
        self.check()
        values, places = _top(before, self.k)
        self.check()
        rest = batch - self.decoder_bias - self.decode(values, places)
        fvu = rest.square().sum() / (len(batch) * self.variance)

        idle = self.idle + 1
        idle[places[values > 0]] = 0
        dead = (idle >= self.window).nonzero().squeeze(1)
        if not len(dead):
            return fvu, fvu, idle
        self.check()
        # AuxK: what the living leave, reconstructed by the dead alone.
        wanted = rest[:_AUX_ROWS].detach()
        before = before[:_AUX_ROWS].index_select(1, dead)
        values, places = _top(before, min(len(dead), max(1, batch.shape[1] // 2)))
        # Here so many are active that a product with all is the faster one.
        found = torch.zeros_like(before).scatter(1, places, values) @ self.decoder.index_select(0, dead)
        auxiliary = (wanted - found).square().sum() / wanted.square().sum().clamp_min(1e-12)
        return fvu, fvu + _AUX_WEIGHT * auxiliary, idle

    def advance(self) -> float:
        """One step of Adam; returns the batch's FVU. A check that raises leaves the state as it was."""
        fvu, loss, idle = self.loss(self._batch())
        self.check()
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate * self._rate()
        self.adam.zero_grad()
        loss.backward()
        self.check()
        with torch.no_grad():
            pull = self.decoder.grad
            assert pull is not None
            # Along an atom a step would only change its norm, which is then set to one.
            pull -= (pull * self.decoder).sum(1, keepdim=True) * self.decoder
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.check()
        self.whole = False
        self.adam.step()
        with torch.no_grad():
            self.decoder /= self.decoder.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self.step, self.idle = self.step + 1, idle
        self.losses.append(float(fvu.detach()))
        if self._stalled():
            self.end = self.step + self.cool_down
        self.whole = True
        return self.losses[-1]

    def _batch(self) -> torch.Tensor:
        epoch, place = divmod(self.step, self.per_epoch)
        if self.order is None or self.order[0] != epoch:
            order = torch.randperm(len(self.data), generator=generator(self.seed, "sae epoch", epoch))
            self.order = epoch, order.to(self.data.device)
        return self.data[self.order[1][place * self.batch_size : (place + 1) * self.batch_size]]

    def _rate(self) -> float:
        warm = (self.step + 1) / max(1.0, _WARM_UP * self.steps)
        return min(1.0, warm, (self.end - self.step) / self.cool_down)

    def _stalled(self) -> bool:
        """Whether the last `patience` windows lowered FVU by less than 0.5 % and 0.001 of the best before."""
        cooling = self.step > self.end - self.cool_down
        windows = self.step // self.window
        if cooling or not self.patience or self.step % self.window or windows <= self.patience:
            return False
        means = torch.tensor(self.losses).reshape(windows, self.window).mean(1)
        return bool(means[-self.patience :].min() > 0.995 * means[: -self.patience].min() - 1e-3)

    def save(self, path: Path, identity: str) -> None:
        """Write the state, whole or not at all, unless there is nothing that could be continued."""
        if not self.step or not self.whole:
            return
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64), "idle": self.idle}
        for i, value in enumerate(self.parameters):
            state = self.adam.state[value]
            tensors |= {f"parameter{i}": value.detach(), f"first{i}": state["exp_avg"]}
            tensors[f"second{i}"] = state["exp_avg_sq"]
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
        layout = {"losses": ((step,), torch.float64), "idle": (tuple(self.idle.shape), torch.int64)}
        for i, value in enumerate(self.parameters):
            layout |= {f"{kind}{i}": (tuple(value.shape), value.dtype) for kind in ("parameter", "first", "second")}
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if not 0 < step <= end <= self.steps or found != layout:
            return
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            return
        self.step, self.end = step, end
        self.losses, self.idle = tensors["losses"].tolist(), tensors["idle"].to(self.idle.device)
        with torch.no_grad():
            for i, value in enumerate(self.parameters):
                value.copy_(tensors[f"parameter{i}"])
                self.adam.state[value] = {
                    "step": torch.tensor(float(step), device=value.device),
                    "exp_avg": tensors[f"first{i}"].to(value),
                    "exp_avg_sq": tensors[f"second{i}"].to(value),
                }


def _top(before: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """TopK(ReLU(before)), values and places (B, k); ReLU after TopK is the same, and k values are fewer than all."""
    values, places = before.topk(k, dim=1, sorted=False)
    return values.relu(), places


@torch.no_grad()
def _finish(
    trainer: _Trainer, gradients: Gradients, density_range: tuple[float, float]
) -> tuple[Directions, SAEReport]:
    """Densities and energies over the whole set, and the latents in range as directions."""
    count, latents = len(trainer.data), len(trainer.decoder)
    fired = torch.zeros(latents, dtype=torch.float64)
    energy, rest, total = torch.zeros(latents, dtype=torch.float64), 0.0, 0.0
    for batch in trainer.data.split(min(_CHUNK, max(1, _WORK // trainer.decoder.numel()))):
        trainer.check()
        values, places = _top(trainer.before(batch), trainer.k)
        centred = batch - trainer.decoder_bias
        rest += float((centred - trainer.decode(values, places)).double().square().sum())
        total += float(centred.double().square().sum())
        values, places = values.flatten().cpu(), places.flatten().cpu()
        fired += places[values > 0].bincount(minlength=latents)
        energy += places.bincount(values.double().square(), minlength=latents)
    if not fired.any():
        raise ElrondError(
            f"All {latents} latents are dead, and there is no direction: lower the learning rate "
            f"({trainer.learning_rate:g})."
        )
    log_densities = (fired / count).log10()
    low, high = density_range
    kept = ((log_densities > low) & (log_densities < high)).nonzero().squeeze(1)
    if not len(kept):
        raise ElrondError(f"No latent has a log10 firing density between {low:g} and {high:g}; widen the range.")
    kept = kept[energy[kept].argsort(descending=True, stable=True)]
    vectors = trainer.decoder.detach().cpu()[kept]
    method = {
        "name": "sae",
        "latents": str(latents),
        "k": str(trainer.k),
        "steps": str(trainer.step),
        "learning_rate": f"{trainer.learning_rate:g}",
        "batch_size": str(trainer.batch_size),
        "density_range": f"{low:g} to {high:g}",
        "seed": str(trainer.seed),
    }
    directions = Directions(
        vectors=vectors.reshape(-1, *gradients.vectors.shape[1:]),
        scores=(energy[kept] / total).float(),
        method=method,
        provenance=gradients.provenance,
        score_name="share of gradient energy",
        densities=tuple((fired[kept] / count).tolist()),
    )
    report = SAEReport(
        fvu=rest / (trainer.variance * count),
        dead=float((fired == 0).double().mean()),
        log_densities=log_densities.float(),
        kept=kept,
        density_range=density_range,
        losses=torch.tensor(trainer.losses),
        latents=latents,
        k=trainer.k,
        stopped=trainer.step < trainer.steps,
    )
    return directions, report


def _check(
    latents: int, k: int, epochs: int | None, learning_rate: float, batch_size: int, density_range: tuple[float, float]
) -> None:
    if not 1 <= k <= latents:
        raise ElrondError(f"k must be between 1 and the number of latents ({latents}), got {k}.")
    if epochs is not None and epochs < 1:
        raise ElrondError(f"The number of epochs must be at least 1, got {epochs}.")
    if not 0 < learning_rate < math.inf:
        raise ElrondError(f"The learning rate must be above zero, got {learning_rate}.")
    if batch_size < 1:
        raise ElrondError(f"The batch size must be at least 1, got {batch_size}.")
    if not density_range[0] < density_range[1]:
        raise ElrondError(f"The range of log10 densities must go from low to high, got {density_range}.")
