"""Defines the events of a run. Each is a method of `TrainerCallback`; this is when they fire:

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
                parameters changed, between updates on_optimizer_step_end
            loss recorded                          on_train_epoch_end
            model in eval mode                     on_eval_epoch_start
            for each batch                         on_eval_step_start, on_eval_step_end
            loss recorded, back in train mode      on_eval_epoch_end
            evaluated on all sets, in mid-epoch    on_evaluation_end
              and before the first update too
            training and evaluation are done       on_training_run_epoch_end
        normal end or agreed stop                  on_training_run_end
        any exception                              on_exception
        a training state is complete               on_checkpoint_saved
        a training state is restored               on_checkpoint_loaded
        always, last                               on_run_close
    evaluate(...)                                  on_prepare_start, on_evaluation_run_start, the events of an
                                                   evaluation, on_evaluation_run_end, on_run_close
    predict(...)                                   on_prepare_start, on_run_close

All events fire on all processes. A method of the trainer of the same name (`train_epoch_start`) runs before
the event.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..representation import represent

if TYPE_CHECKING:
    # The only arrow that runs upward, for types: an import at run time would be a circle.
    from ..trainer import Trainer


class TrainerCallback:
    """All callbacks derive from this class: override the events that you need.

    The default of each does nothing and costs nothing. Arguments arrive by keyword, so a method may name
    those that it uses and take the rest as `**kwargs`. An error in a callback ends the run.
    """

    reads_batches: ClassVar[bool] = True
    """Whether its events of steps may read more of a batch than the loss does, such as a sample number."""
    runs_in_replay: ClassVar[bool] = True
    """Whether `Trainer.replay` calls a copy of it, with its state, so that the replay is exact.

    False for what only saves, exports, logs, draws or stops by the clock.
    """
    order: ClassVar[int] = 0
    """Callbacks are called by this number, and those with the same number as they are listed.

    Those that save have a high one, so that what they save holds what the others did.
    """

    argument_sources: ClassVar[Mapping[str, str]] = {}
    """Attributes in which arguments of the constructor are kept under another name, for `repr`."""

    def __repr__(self) -> str:
        return represent(self, self.argument_sources)

    def describe(self, trainer: Trainer) -> str:
        """Return what `Trainer.describe` adds to the line on this callback; by default nothing."""
        return ""

    def on_init_end(self, trainer: Trainer) -> None:
        """React to the end of `Trainer.__init__`; nothing is placed or wrapped yet."""

    def on_prepare_start(self, trainer: Trainer) -> None:
        """Change the module for the last time: model, optimizer and data are still the user's own.

        The accelerator exists. The event fires when something is about to be prepared: once, and again if the
        model was replaced.
        """

    def on_training_run_start(self, trainer: Trainer) -> None:
        """React when all is prepared and `trainer.run_config` is set.

        Reset here; a state to resume from is loaded afterwards.
        """

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """React to the beginning of an epoch; the model is in train mode."""

    def on_train_step_start(self, trainer: Trainer, batch: Any) -> None:
        """React before the forward pass of `batch`."""

    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int
    ) -> None:
        """React to forward and backward pass of one batch; the parameters have not changed yet.

        Args:
            batch_output: what `calculate_train_batch_loss` returned.
            step: number of the batch in this epoch on this process, from 0.
        """

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        """React when all gradients of the update are there and synchronised, but not clipped."""

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """React when parameters, scheduler and progress are updated, and the gradients cleared.

        This is the place to save, evaluate and stop.
        """

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """React when the epoch's loss is in the history."""

    def on_eval_epoch_start(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """React to the beginning of an evaluation; the model is in eval mode.

        Args:
            is_intermediate: the evaluation happens in the middle of an epoch of training.
            metric_prefix: `"eval"`, `"intermediate_eval"`, `"evaluation"` (of `evaluate`) or
                `"ema_model_eval"`, after the name of an evaluation set: `"shifted_eval"`.
        """

    def on_eval_step_start(self, trainer: Trainer, batch: Any) -> None:
        """React before the forward pass of a batch of an evaluation; without gradients."""

    def on_eval_step_end(self, trainer: Trainer, batch: Any, batch_output: dict[str, Any]) -> None:
        """React after the forward pass of `batch`, which gave `batch_output`.

        Processes may have different numbers of batches.
        """

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """React when the loss of the evaluation is in the history, and the model back in its mode.

        What is recorded here under a plain name, such as `accuracy`, gets the prefix of the evaluation:
        `evaluation_accuracy` by `evaluate`, `intermediate_accuracy` in mid-epoch, `ema_model_accuracy`; none
        after an epoch. `is_intermediate` and `metric_prefix` are those of `on_eval_epoch_start`.
        """

    def on_evaluation_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """React between two updates when an evaluation of a training run is done, on all of its sets.

        What is recorded here, such as metrics of averaged weights, belongs to this very evaluation: a
        scheduler that follows it steps afterwards. At the end of an epoch comes `on_training_run_epoch_end`.
        `is_intermediate` and `metric_prefix` are those of `on_eval_epoch_start`.
        """

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        """React when training and evaluation of an epoch are done."""

    def on_training_run_end(self, trainer: Trainer) -> None:
        """React to the normal end, or to an agreed stop: then `trainer.stop_reason` is set."""

    def on_evaluation_run_start(self, trainer: Trainer) -> None:
        """React to the beginning of `evaluate`."""

    def on_evaluation_run_end(self, trainer: Trainer) -> None:
        """React to the end of `evaluate`."""

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """React when the training state in the folder `path` is complete."""

    def on_checkpoint_loaded(self, trainer: Trainer, path: Path) -> None:
        """React when the training state in the folder `path` is restored."""

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """React to `error`, any exception, before `train` raises it.

        Do nothing collective here: the other processes may never come.
        """

    def on_run_close(self, trainer: Trainer) -> None:
        """Close bars, files and trackers: fires always, and last. Do nothing collective here."""

    def state_dict(self) -> dict[str, Any]:
        """Return what has to survive: tensors, numbers, strings, lists and dicts.

        It is saved with the training state, for each process.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`.

        On resuming it is called twice, so assign the state, do not accumulate it. The first call comes before
        the optimizer's state is loaded, so that changes of the parameter groups can be made again; the second
        at the position in the loop at which the state was saved.
        """
