"""Estimated dimensions of the portraits' concepts beside the number of their open factors, which is known.

    python -m bench.complexity             teacher and student, three seeds, about an hour on two cores
    python -m bench.complexity --seeds 1   one seed

Each concept's images are sampled and compared by the nodes at the settings that Estimate LID asks for. Beside the
pack's estimate: the published ones, FLIPD (arXiv 2406.03537) on the same model, and the nearest-neighbour estimators of
scikit-dimension on the images. Figures go to bench/results/complexity.json; a second run goes on where the first
stopped.
"""
