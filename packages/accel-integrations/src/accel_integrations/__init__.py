"""Adapters of accel-core for timm and transformers, and learning rate schedulers."""
