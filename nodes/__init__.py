"""The nodes: each reads its inputs, calls one thing in `elrond_core`, and wraps the result."""

from . import (
    compare,
    complexity,
    compose,
    concept,
    decompose,
    demo_model,
    diversity,
    files,
    gradients,
    host,
    labels,
    locality,
    mark,
    merge,
    realizations,
    steering,
    sweep,
)

NODES = [
    *concept.NODES,
    *mark.NODES,
    *realizations.NODES,
    *gradients.NODES,
    *merge.NODES,
    *decompose.NODES,
    *steering.NODES,
    *sweep.NODES,
    *compose.NODES,
    *labels.NODES,
    *locality.NODES,
    *diversity.NODES,
    *complexity.NODES,
    *compare.NODES,
    *files.NODES,
    *demo_model.NODES,
]

host.make_folders()
