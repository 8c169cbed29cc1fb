"""Evaluation kind."""

from __future__ import annotations


def name_prefix(metric_prefix: str) -> str:
    """From the prefix of an evaluation to that of its metrics: `"intermediate_eval"` gives `"intermediate_"`."""
    return "evaluation_" if metric_prefix == "evaluation" else metric_prefix.removesuffix("eval")
