"""Where gradients and directions come from: what a file must say so that somebody else can use it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from .errors import ElrondError

# Of one text encoder; what two machines' arithmetic makes of one embedding differs by far less.
_SAME_NORM = 0.01


@dataclass(frozen=True)
class Provenance:
    """What produced a set of gradients or directions.

    Attributes:
        family: model family, the host's class name ("SDXL", "Flux"); directions only fit their own family.
        prompt: the prompt as written, without the concept's brackets.
        concept: the concept word or words.
        tokens: the concept's tokens as the encoder cut them, in order.
        rows: rows of the conditioning that the concept occupies.
        token_norm: mean Euclidean norm of those rows; relative strengths are multiples of it.
        sigma: noise levels the gradients were taken at, in the model's own units.
        count: number of gradients.
        seed: the seed of the collection; of several that were merged, the first's.
        latent_values: numbers in one realization's latent, the n of the gradients' scale; 0 if not known.
        host: host version, such as "ComfyUI 0.3.75".
        seeds: the seeds of all collections that were merged; empty where there is one collection only.
        extra: further metadata, kept as it came through a save and a load.
    """

    family: str
    prompt: str = ""
    concept: str = ""
    tokens: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    token_norm: float = 1.0
    sigma: tuple[float, ...] = ()
    count: int = 0
    seed: int = 0
    latent_values: int = 0
    host: str = ""
    seeds: tuple[int, ...] = ()
    extra: dict[str, str] = field(default_factory=dict)

    def with_(self, **changes: object) -> Provenance:
        """A copy with some attributes replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of all collections that are in this one."""
        return self.seeds or (self.seed,)

    def united(self, other: Provenance) -> Provenance:
        """The provenance of what two collections hold together: one concept, the noise levels and seeds of both.

        Raises:
            ElrondError: if the two are of different concepts or models, with both named.
        """
        for what, one, two in (
            ("the model family", self.family, other.family),
            ("the prompt", self.prompt, other.prompt),
            ("the concept", self.concept, other.concept),
            ("the tokens", list(self.tokens), list(other.tokens)),
            ("the rows", list(self.rows), list(other.rows)),
            ("the number of values in a latent", self.latent_values, other.latent_values),
        ):
            if one != two:
                raise ElrondError(f"These cannot be merged: {what} of one is {one!r}, of the other {two!r}.")
        norms = self.token_norm, other.token_norm
        if max(norms) - min(norms) > _SAME_NORM * max(norms):
            raise ElrondError(
                f"These cannot be merged: the concept's norm is {norms[0]:.4g} in one and {norms[1]:.4g} in the other, "
                "so they come from different text encoders."
            )
        seeds = tuple(dict.fromkeys(self.all_seeds + other.all_seeds))
        hosts = dict.fromkeys(filter(None, [*self.host.split(", "), *other.host.split(", ")]))
        # A level that was rounded to float32 on its way is the same level.
        levels = {rounded(level): level for level in other.sigma + self.sigma}
        return self.with_(
            sigma=tuple(sorted(levels.values(), reverse=True)),
            count=self.count + other.count,
            seeds=seeds if len(seeds) > 1 else (),
            host=", ".join(hosts),
            extra={**other.extra, **self.extra},
        )


def rounded(level: float) -> float:
    """A noise level as float32 tensors hold it."""
    return torch.tensor(level, dtype=torch.float32).item()
