"""One collection on many cards and machines, with Ray (docs/many-machines.md)."""
