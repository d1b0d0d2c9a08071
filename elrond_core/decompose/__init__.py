"""Gradients to directions: PCA, pullback metric, word contrasts, sparse autoencoder."""
