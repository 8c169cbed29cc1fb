"""Holds what reacts to the events of a run: the base class, the list, and the callbacks of the core."""
