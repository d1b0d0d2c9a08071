"""The nodes: each reads its inputs, calls one thing in `elrond_core`, and wraps the result."""

from . import (
    calibrate,
    concept,
    decompose,
    demo_model,
    directions,
    files,
    gradients,
    guide,
    host,
    mark,
    mask,
    measure,
    ranges,
    realizations,
    steering,
    sweep,
)

NODES = [
    *concept.NODES,
    *mark.NODES,
    *realizations.NODES,
    *gradients.NODES,
    *decompose.NODES,
    *steering.NODES,
    *guide.NODES,
    *sweep.NODES,
    *calibrate.NODES,
    *directions.NODES,
    *mask.NODES,
    *measure.NODES,
    *files.NODES,
    *demo_model.NODES,
    *ranges.NODES,
]

host.make_folders()
