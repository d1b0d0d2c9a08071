"""Where gradients and directions come from: what a file must say so that somebody else can use it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


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
        seed: the seed of the collection.
        latent_values: numbers in one realization's latent, the n of the gradients' scale; 0 if not known.
        host: host version, such as "ComfyUI 0.3.75".
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
    extra: dict[str, str] = field(default_factory=dict)

    def with_(self, **changes: object) -> Provenance:
        """A copy with some attributes replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]
