"""Callbacks, which react to the events of a run: their base class, their list, and those of the core."""
