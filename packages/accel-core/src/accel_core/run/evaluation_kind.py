"""Names the kinds of evaluation in the run history."""

from __future__ import annotations

import dataclasses

from .evaluation_sets import prefix_of


@dataclasses.dataclass(frozen=True)
class EvaluationKind:
    """Names an evaluation after an epoch, in the middle of one, of averaged weights, or by `evaluate`.

    It is that of one set, if there are several.
    """

    prefix: str
    """Begins the names of losses: `"eval"`, `"intermediate_eval"`, `"ema_model_eval"`, `"evaluation"`."""
    is_intermediate: bool = False
    """Whether it happens between two updates of an epoch."""
    set_name: str = ""
    """The evaluation set, whose name comes before those of its metrics."""

    def of_set(self, name: str) -> EvaluationKind:
        """Return the same kind of evaluation of the set `name`."""
        return self if name == self.set_name else dataclasses.replace(self, set_name=name)

    @property
    def full_prefix(self) -> str:
        """Return what begins the names of losses in the run history: `"eval"`, `"shifted_eval"`."""
        return f"{prefix_of(self.set_name)}{self.prefix}"

    @property
    def suffix(self) -> str:
        """Return the end of the names of losses: they are those of an epoch, but for `evaluate`."""
        return "" if self.prefix == "evaluation" else "_epoch"

    @property
    def metric_prefix(self) -> str:
        """Return the beginning of the names of other metrics.

        `"intermediate_eval"` gives `"intermediate_"`, `"eval"` nothing, of a set `"shifted"` `"shifted_"`.
        """
        own = "evaluation_" if self.prefix == "evaluation" else self.prefix.removesuffix("eval")
        return f"{prefix_of(self.set_name)}{own}"

    @property
    def completes_epoch(self) -> bool:
        """Whether it is the evaluation that belongs to the end of an epoch."""
        # Averaged weights are evaluated after an epoch too, which does not complete it.
        return self.prefix == "eval" and not self.is_intermediate
