"""Data that several tests build in the same way."""

from __future__ import annotations

from typing import Any

import torch

from elrond_core import gradients as core_gradients
from elrond_core import provenance as core_provenance

HERE = core_provenance.Provenance("SDXL")


def gradients(
    vectors: torch.Tensor,
    *,
    targets: torch.Tensor | None = None,
    sources: torch.Tensor | None = None,
    probes: torch.Tensor | None = None,
    provenance: Any = HERE,
    kind: type = core_gradients.Gradients,
) -> Any:
    """Gradients (N, d) or (N, R, d) of one noise level.

    By default, none of them has probes or tells which realization it belongs to. Tests of the nodes pass `kind` and
    `provenance` of the package that the host imported, whose classes are not those of `elrond_core`.
    """
    vectors, probes = (part[:, None] if part is not None and part.ndim == 2 else part for part in (vectors, probes))
    count = len(vectors)
    zeros = torch.zeros(count, dtype=torch.int64)
    return kind(
        vectors,
        torch.ones(count),
        zeros if sources is None else sources,
        zeros if targets is None else targets,
        provenance,
        vectors[:0] if probes is None else probes,
    )
