"""What runs a step: a single process, or one of the ways in which several share the work."""
