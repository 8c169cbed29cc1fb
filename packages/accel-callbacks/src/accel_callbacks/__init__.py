"""Callbacks for the trainer of accel-core."""
