"""The door `python -m accel_core.compare`."""
