"""Collecting gradients: pairs of realizations, back-propagation, batches, checkpointing of activations."""
