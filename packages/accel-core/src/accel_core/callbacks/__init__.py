"""What reacts to the events of a run: the base class, the list of a trainer, and the few callbacks of the core."""
