"""Local intrinsic dimension (LID) of a concept: the number of independent ways its images can vary."""
