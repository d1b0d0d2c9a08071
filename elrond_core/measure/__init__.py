"""Measures of images and of directions: diversity, subspaces, quality of a sample."""
