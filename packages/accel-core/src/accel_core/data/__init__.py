"""The data of a run: its kinds, the order of the samples, and the share of each process."""
