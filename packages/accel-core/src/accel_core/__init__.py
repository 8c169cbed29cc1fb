"""A readable training loop for PyTorch."""
