"""The nodes: each reads its inputs, calls one thing in `elrond_core`, and wraps the result."""

from . import complexity, concept, decompose, demo_model, files, gradients, realizations, steering

NODES = [
    *concept.NODES,
    *realizations.NODES,
    *gradients.NODES,
    *decompose.NODES,
    *steering.NODES,
    *complexity.NODES,
    *files.NODES,
    *demo_model.NODES,
]
