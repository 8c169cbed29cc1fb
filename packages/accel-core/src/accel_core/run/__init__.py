"""What one call of `train`, `evaluate` or `predict` asked for, has built, and where it stands."""
