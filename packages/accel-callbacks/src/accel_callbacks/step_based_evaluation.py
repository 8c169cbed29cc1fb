"""StepBasedEvaluationCallback: evaluations in the middle of an epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from accel_core import ConfigurationError, TrainerCallback
from accel_core.extending import check_eval_dataset

from .periodic import Periodic

if TYPE_CHECKING:
    from accel_core import Trainer


class StepBasedEvaluationCallback(TrainerCallback):
    """Evaluate every n updates, wherever the epoch stands, on the `eval_dataset` of the run or on another.

    Metrics are recorded as `intermediate_eval_loss_epoch` and `intermediate_accuracy`, in addition to those
    of the evaluations at the end of the epochs. Training is bit-identical with and without this callback:
    it evaluates between two updates, and modes and random state are put back. Updates are counted from the
    beginning of the run, so a resumed run continues in the same rhythm.
    """

    argument_sources: ClassVar[dict[str, str]] = {"eval_every_n_updates": "periodic.updates"}

    order = 30
    """After averages of weights, which may be evaluated too, and before callbacks that log, watch or save."""

    def __init__(self, eval_every_n_updates: int, eval_dataset: Any = None) -> None:
        """Hold period and data.

        Args:
            eval_every_n_updates: the period in updates.
            eval_dataset: data or a ready loader, or several by name, that are evaluated in mid-epoch only;
                None takes that of `train`. It is read again for each evaluation, like that of `train`.

        Raises:
            ConfigurationError: the period is no whole number of at least 1, or the data cannot be read.
        """
        # For Periodic None means never, but a callback that does nothing is a mistake.
        if eval_every_n_updates is None:
            raise ConfigurationError(
                "eval_every_n_updates is None, but must be a whole number of at least 1. Leave the callback "
                "out to evaluate only after each epoch."
            )
        self.periodic = Periodic("eval", updates=eval_every_n_updates)
        check_eval_dataset("eval_dataset", eval_dataset)
        self.eval_dataset = eval_dataset

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Raise `ConfigurationError` if there is nothing to evaluate on."""
        if trainer.eval_dataloader is None and self.eval_dataset is None:
            raise ConfigurationError(
                "StepBasedEvaluationCallback has nothing to evaluate on, since train got no eval_dataset. "
                "Pass an eval_dataset to train or to the callback, or leave the callback out."
            )

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Evaluate if it is due."""
        if self.periodic.is_due_after_update(trainer):
            trainer.run_eval_epoch(self.eval_dataset, metric_prefix="intermediate_eval", is_intermediate=True)
