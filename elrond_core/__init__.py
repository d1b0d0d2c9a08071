"""ELROND (arXiv 2602.10216): what a text-to-image model can vary about a word, as directions of its embedding.

Data flows one way: realizations, gradients, directions, conditioning. All of it works without a node graph.
"""

__version__ = "0.1.0"
