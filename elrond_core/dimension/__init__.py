"""How many independent ways a concept can vary: its local intrinsic dimension (LID)."""
