"""Names the kinds of evaluation in the run history."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class EvaluationKind:
    """Names an evaluation after an epoch, in the middle of one, of averaged weights, or by `evaluate`."""

    prefix: str
    """Begins the names of losses: `"eval"`, `"intermediate_eval"`, `"ema_model_eval"`, `"evaluation"`."""
    is_intermediate: bool = False
    """Whether it happens between two updates of an epoch."""

    @property
    def suffix(self) -> str:
        """Return the end of the names of losses: they are those of an epoch, but for `evaluate`."""
        return "" if self.prefix == "evaluation" else "_epoch"

    @property
    def metric_prefix(self) -> str:
        """Return the beginning of the names of other metrics.

        `"intermediate_eval"` gives `"intermediate_"`, `"eval"` nothing.
        """
        return "evaluation_" if self.prefix == "evaluation" else self.prefix.removesuffix("eval")

    @property
    def completes_epoch(self) -> bool:
        """Whether it is the evaluation that belongs to the end of an epoch."""
        # Averaged weights are evaluated after an epoch too, which does not complete it.
        return self.prefix == "eval" and not self.is_intermediate
