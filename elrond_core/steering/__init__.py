"""Applying directions: steering, random draws, composition, labels, masks."""
