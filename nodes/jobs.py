"""The two long pieces of work, realizations and gradients, as batches that can be made one by one, on any machine."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from ..elrond_core.collect.collection import (
    TARGETS_A_PROBE,
    BatchStore,
    CollectionPlan,
    collect,
    collect_batches,
)
from ..elrond_core.collect.differentiate import Denoiser
from ..elrond_core.collect.pairs import check_targets
from ..elrond_core.errors import ElrondError
from ..elrond_core.gradients import Gradients
from ..elrond_core.measure.quality import StopAtQuality
from ..elrond_core.provenance import Provenance
from . import host
from .types import check_guidance

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class RealizationJob:
    """Realizations of one prompt; attributes are the inputs of Sample Realizations.

    Raises:
        ElrondError: if the prompt has no concept, or guidance has no negative prompt.
    """

    model: Any
    positive: Any
    width: int
    height: int
    count: int
    batch_size: int
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    negative: Any = None

    def __post_init__(self) -> None:
        # Collect Gradients needs a marked prompt. It is refused here, before any image is sampled.
        host.marked(self.positive)
        check_guidance(self.cfg, self.negative is not None)

    @property
    def determined_by(self) -> tuple[Any, ...]:
        """Everything beside the model that determines the latents."""
        settings = (self.width, self.height, self.count, self.batch_size, self.seed, self.steps, self.cfg)
        return self.positive, self.negative, "realizations", (*settings, self.sampler_name, self.scheduler)

    def sizes(self) -> list[int]:
        """Number of images of each batch."""
        return [min(self.batch_size, self.count - first) for first in range(0, self.count, self.batch_size)]

    def batches(self, numbers: Collection[int]) -> dict[int, Batch]:
        """The batches of these numbers, by number, as they are kept."""
        sizes = self.sizes()
        update = host.progress(sum(sizes[number] for number in numbers), self.model)
        made: dict[int, Batch] = {}
        done = 0
        for number in sorted(numbers):
            made[number] = self._batch(number, sizes[number], update, done)
            done += sizes[number]
            update(done)
        return made

    def run(self, store: BatchStore | None) -> torch.Tensor:
        """All latents, on the CPU; batches that are kept are not sampled again."""
        update = host.progress(self.count, self.model)
        batches = []
        done = 0
        for number, size in enumerate(self.sizes()):
            batch = store.get(number) if store is not None else None
            if batch is None:
                batch = self._batch(number, size, update, done)
                if store is not None:
                    store.put(number, batch)
            batches.append(batch["samples"])
            done += size
            update(done)
        return torch.cat(batches)

    def _batch(self, number: int, size: int, update: Callable[..., None], done: int) -> Batch:
        latents = host.sample(
            self.model,
            self.positive,
            self.negative,
            host.empty_latent(self.model, self.width, self.height, size),
            number * self.batch_size,
            self.seed,
            self.steps,
            self.cfg,
            self.sampler_name,
            self.scheduler,
            on_step=lambda images, preview: update(done + images, preview),
        )
        return {"samples": latents.cpu().contiguous()}


class GradientJob:
    """Gradients of the realizations of one prompt; arguments are the inputs of Collect Gradients.

    Raises:
        ElrondError: if an input is out of range, or does not go with another.
    """

    def __init__(
        self,
        model: Any,
        positive: Any,
        realizations: dict[str, Any],
        count: int,
        noise_level: float,
        batch_size: int,
        seed: int,
        response: bool,
        cfg: float = 1.0,
        negative: Any = None,
        targets_per_realization: int = 1,
        more_levels: str = "",
        remove_common: bool = False,
        target_quality: float = 0.0,
        vae: Any = None,
        clip_vision: Any = None,
    ) -> None:
        self._model, self._positive, self._negative, self._cfg = model, positive, negative, cfg
        self._samples = realizations["samples"]
        check_targets(len(self._samples), targets_per_realization)
        check_guidance(cfg, negative is not None)
        self._stop = StopAtQuality(target_quality, count) if target_quality else None
        check_features(vae is not None, clip_vision is not None)
        self._features = (vae, clip_vision)
        sigma = [host.sigma_of(model, level) for level in [noise_level, *levels(more_levels)]]
        if len(set(sigma)) < len(sigma):
            raise ElrondError("Each noise level can be named once only: change noise_level or more_levels.")
        prompt = _prompt_at(model, positive, sigma)
        concept = prompt.concepts[0]
        if remove_common and not set(prompt.words) - set(concept.rows):
            raise ElrondError("The prompt has no words beside the concept: switch remove_common off, or add some.")
        self._remove_common = remove_common
        self._provenance = Provenance(
            family=prompt.family,
            prompt=prompt.prompt,
            concept=concept.word,
            tokens=concept.tokens,
            rows=concept.rows,
            host=host.HOST,
        )
        self.plan = CollectionPlan(
            count=count,
            sigma=tuple(sigma),
            seed=seed,
            batch_size=batch_size,
            probes=response,
            targets=targets_per_realization,
        )

    @property
    def determined_by(self) -> tuple[Any, ...]:
        """Everything beside the model that determines the gradients, to the last bit."""
        plan = self.plan
        # The batch size changes last bits.
        settings = (
            self._provenance,
            plan.count,
            plan.sigma,
            plan.seed,
            plan.batch_size,
            plan.targets,
            plan.probes and TARGETS_A_PROBE,
            self._remove_common,
            self._cfg if self._negative is not None else 1.0,
            *self._features,
        )
        return self._positive, self._negative, self._samples, settings

    def sizes(self) -> list[int]:
        """Number of gradients of each batch."""
        return [int((self.plan.places(items) < self.plan.count).sum()) for _, items in self.plan.batches()]

    def batches(self, numbers: Collection[int]) -> dict[int, Batch]:
        """The batches of these numbers, by number, as they are kept."""
        sizes = self.sizes()
        total = sum(sizes[number] for number in numbers)

        def work(denoiser: Denoiser, latents: torch.Tensor, plan: CollectionPlan, report: Any, **more: Any) -> Any:
            return collect_batches(denoiser, latents, plan, numbers, on_batch=report, **more)

        made: dict[int, Batch] = self._with_denoiser(total, work)
        return made

    def run(self, store: BatchStore | None) -> tuple[Gradients, str]:
        """All gradients, and a report; batches that are kept are not computed again."""

        def work(denoiser: Denoiser, latents: torch.Tensor, plan: CollectionPlan, report: Any, **more: Any) -> Any:
            return collect(
                denoiser, latents, self._provenance, plan, store=store, on_batch=report, stop=self._stop, **more
            )

        gradients: Gradients = self._with_denoiser(self.plan.count, work)
        line = f"{len(gradients)} gradients of {len(self._samples)} realizations"
        return gradients, f"{line}; {self._stop.line()}" if self._stop else line

    def _with_denoiser(self, total: int, work: Callable[..., Any]) -> Any:
        """Run `work(denoiser, latents, plan, report, references=…)`; `report` shows how many of `total` are done."""
        update = host.progress(total, self._model)
        vae, clip_vision = self._features

        def prepared(denoiser: host.HostDenoiser, latents: torch.Tensor) -> Any:
            # The number of other rows is that of the prompt at this level.
            denoiser.rows_at(self.plan.sigma[0])
            plan = self.plan.with_other_rows(denoiser.other_rows)

            def report(done: int) -> None:
                update(done, denoiser.latest)

            if vae is None:
                return work(denoiser, latents, plan, report)
            with host.through_features(denoiser, vae, clip_vision, latents, plan.batch_size) as (through, references):
                return work(through, latents, plan, report, references=references)

        return host.with_denoiser(
            self._model,
            self._positive,
            self._negative,
            self._cfg,
            self._samples,
            self.plan.seed,
            prepared,
            words=self._remove_common,
        )


def _prompt_at(model: Any, positive: Any, sigma: list[float]) -> host.MarkedPrompt:
    """The marked prompt at the first noise level.

    Raises:
        ElrondError: if none acts at a level, or the concept has another number of rows there.
    """
    prompts = [host.marked_at(model, positive, level) for level in sigma]
    if len({len(prompt.concepts[0].rows) for prompt in prompts}) > 1:
        raise ElrondError(
            "The prompt changes between these noise levels, and with it the number of the concept's tokens: "
            "collect at one level at a time."
        )
    return prompts[0]


def check_features(vae: bool, clip_vision: bool) -> None:
    """Refuse one of the two without the other.

    Raises:
        ElrondError: if it is so.
    """
    if vae != clip_vision:
        raise ElrondError("Comparing image features needs both a vae and a clip_vision: connect both or neither.")


def levels(text: str) -> list[float]:
    """Noise levels of a text such as "0.8, 0.6".

    Raises:
        ElrondError: if it is no list of numbers above 0 and up to 1.
    """
    try:
        numbers = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        numbers = [-1.0]
    if not all(0 < number <= 1 for number in numbers):
        raise ElrondError(f"more_levels is a list of numbers above 0 and up to 1, such as 0.8, 0.6; not {text!r}.")
    return numbers
