"""The events of a run. Each is a method of `TrainerCallback`; this is when they fire:

    Trainer(...)                                   on_init_end
    train(...)
        about to prepare                           on_prepare_start
        all is prepared, run_config is set         on_training_run_start
        for each epoch
            model in train mode                    on_train_epoch_start
            for each update
                for each batch of its group
                    before forward                 on_train_step_start
                    after backward                 on_train_step_end
                gradients complete, not clipped    on_optimizer_step_start
                parameters changed, safe point     on_optimizer_step_end
            loss recorded                          on_train_epoch_end
            model in eval mode                     on_eval_epoch_start
            for each batch                         on_eval_step_start, on_eval_step_end
            loss recorded, back in train mode      on_eval_epoch_end
            training and evaluation are done       on_training_run_epoch_end
        normal end or agreed stop                  on_training_run_end
        any exception                              on_exception
        always, last                               on_run_close
    evaluate(...)                                  on_prepare_start, on_evaluation_run_start, the events of an
                                                   evaluation, on_evaluation_run_end, on_run_close

All events fire on all processes. A method of the trainer of the same name (`train_epoch_start`) runs before
the event.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from ..trainer import Trainer


class TrainerCallback:
    """Base of all callbacks: override the events that you need.

    The default of each does nothing and costs nothing. Arguments arrive by keyword, so a method may name
    those that it uses and take the rest as `**kwargs`. What fails in a callback fails the run.
    """

    reads_batches: ClassVar[bool] = True
    """Whether its events of steps may look at more of a batch than the loss does, such as the number of a sample."""
    order: ClassVar[int] = 0
    """Callbacks are called in the order in which they are listed, sorted by this number: those that save have a high one,
    so that what they save holds what the others did."""

    def on_init_end(self, trainer: Trainer) -> None:
        """At the end of `Trainer.__init__`."""

    def on_prepare_start(self, trainer: Trainer) -> None:
        """Last chance to change the module: the accelerator exists, but model, optimizer and data are the user's own.

        Fires when something is about to be prepared: once, and again where the model was exchanged.
        """

    def on_training_run_start(self, trainer: Trainer) -> None:
        """All is prepared and `trainer.run_config` set.

        Reset here; a state to resume from is loaded afterwards.
        """

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """The model is in train mode."""

    def on_train_step_start(self, trainer: Trainer, batch: Any) -> None:
        """Before the forward of `batch`."""

    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int
    ) -> None:
        """After forward and backward of one batch; the parameters have not changed yet.

        Args:
            batch_output: what `calculate_train_batch_loss` returned.
            step: number of the batch in this epoch on this process, from 0.
        """

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        """All gradients of the update are there and synchronised, but not clipped."""

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Parameters, scheduler and progress are updated, gradients cleared: the safe point to save, evaluate, stop."""

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """The epoch's loss is in the history."""

    def on_eval_epoch_start(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """The model is in eval mode.

        Args:
            is_intermediate: the evaluation happens in the middle of an epoch of training.
            metric_prefix: `"eval"`, `"intermediate_eval"`, `"evaluation"` (of `evaluate`) or
                `"ema_model_eval"`.
        """

    def on_eval_step_start(self, trainer: Trainer, batch: Any) -> None:
        """Before the forward of a batch of an evaluation; without gradients."""

    def on_eval_step_end(self, trainer: Trainer, batch: Any, batch_output: dict[str, Any]) -> None:
        """After the forward of a batch of an evaluation; processes may have different numbers of batches."""

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """The loss of the evaluation is in the history, and the model back in its mode.

        What is recorded here under a plain name, such as `accuracy`, gets the prefix of the evaluation:
        `evaluation_accuracy` by `evaluate`, `intermediate_accuracy` in mid-epoch, `ema_model_accuracy`; none
        after an epoch.
        """

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        """Training and evaluation of an epoch are done."""

    def on_training_run_end(self, trainer: Trainer) -> None:
        """Normal end, or an agreed stop: then `trainer.stop_reason` is set."""

    def on_evaluation_run_start(self, trainer: Trainer) -> None:
        """`evaluate` begins."""

    def on_evaluation_run_end(self, trainer: Trainer) -> None:
        """`evaluate` is done."""

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """The folder at `path` is complete."""

    def on_checkpoint_loaded(self, trainer: Trainer, path: Path) -> None:
        """The state at `path` is restored."""

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Any exception, before it is raised on.

        Nothing collective here: the other processes may never come.
        """

    def on_run_close(self, trainer: Trainer) -> None:
        """Always, last: close bars, files, trackers. Nothing collective here."""

    def state_dict(self) -> dict[str, Any]:
        """What has to survive: tensors, numbers, strings, lists and dicts.

        Saved with the training state, by process.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        On resuming it is called twice: before the optimizer's state is loaded, so that what this callback
        changed about the parameter groups can be changed again, and at the place in the loop where the state
        was saved.
        """
