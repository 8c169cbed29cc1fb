"""The data of a run: its kinds, the order of the samples, and the shard of each process."""
