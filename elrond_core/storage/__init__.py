"""Files: the format of directions and gradients, atomic writes, resumable collections."""
