"""TerminateOnNaNCallback stops all processes when the loss is no longer finite."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checks.values import check_flag
from ..notices import notify
from ..processes.arrivals import Arrivals
from ..processes.collectives import all_gather_object
from .callback import TrainerCallback
from .non_finite import NonFiniteOrigin, find_origin

if TYPE_CHECKING:
    from ..trainer import Trainer

_CHOSEN_BY_REPLAY = ("resume_from", "reset_run_history")


class TerminateOnNaNCallback(TrainerCallback):
    """Ask all processes to stop when the loss of a batch is nan or infinite on any of them.

    On a CPU the callback looks at the loss at once. It does not wait for an accelerator, whose loss it reads
    two steps later, or when the epoch ends.
    """

    runs_in_replay = False

    reads_batches = False

    def __init__(self, find: bool = False) -> None:
        """Hold whether to look for the cause.

        Args:
            find: when the run has stopped and is closed, replay from the newest training state with hooks on
                all layers, and print the layer, the parameter and the samples where the first nan or infinity
                arose. `origin` has them too. It needs SaveTrainingStateCallback, and memory for a copy of
                the model and the optimizer.

        Raises:
            ConfigurationError: `find` is neither True nor False.
        """
        self.find = check_flag("find", find)
        self.origin: NonFiniteOrigin | None = None
        """Where the first nan or infinity of the latest run arose; None if it was not looked for, or not
        found."""
        self._found_at = 0

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Forget the run before."""
        self._arrivals = Arrivals(distance=2)
        self.origin = None
        self._found_at = 0

    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int
    ) -> None:
        """Look at the loss, or at an earlier one if it is on an accelerator."""
        place = (step, trainer.run_progress.updates_completed + 1)
        arrived = self._arrivals.add(batch_output["loss"].detach(), place)
        if arrived is not None:
            self._look(trainer, *arrived)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Look at the losses that are still on their way."""
        for arrived in self._arrivals.drain():
            self._look(trainer, *arrived)

    def on_training_run_end(self, trainer: Trainer) -> None:
        """Let the cause be found once all is closed, if that is wanted and the loss has ended the run."""
        # A signal leaves no time. All processes agree on both.
        if not self.find or trainer.stop_reason is None or trainer.agreement.signal_number:
            return
        found = [update for update in all_gather_object(self._found_at) if update]
        if found and trainer._run is not None:
            find = functools.partial(self._find, trainer, min(found))
            trainer._run.afterwards = (*trainer._run.afterwards, find)

    def _look(self, trainer: Trainer, value: torch.Tensor, place: tuple[int, int]) -> None:
        loss = value.item()
        if not math.isfinite(loss):
            self._found_at = self._found_at or place[1]
            self._stop(trainer, loss, place[0])

    def _stop(self, trainer: Trainer, loss: float, step: int) -> None:
        trainer.request_stop(
            f"the loss is {loss} in epoch {trainer.run_progress.current_epoch}, batch {step}"
        )

    def _find(self, trainer: Trainer, update: int) -> None:
        """Replay the update, and print what was found. Every process takes part."""
        arguments: Any = None if trainer._training_run is None else trainer._training_run.arguments
        # A resumed run may not have saved yet.
        newest = trainer.last_checkpoint or getattr(arguments, "resume_from", None)
        if newest is None:
            notify(
                trainer,
                f"The loss of update {update} is not finite. find=True cannot find where this began, "
                "because no training state was saved before. Add "
                "SaveTrainingStateCallback(save_every_n_updates=...), or save more often.",
            )
            return
        names = [field.name for field in dataclasses.fields(arguments) if field.name not in _CHOSEN_BY_REPLAY]
        notify(trainer, f"Replaying up to update {update} to find why its loss is not finite.")
        try:
            given = {name: getattr(arguments, name) for name in names}
            self.origin = find_origin(trainer, update, Path(newest).parent, given)
            notify(trainer, self.origin.text)
        # The run is over, and what it returns is not to be lost because of a search.
        except Exception as error:
            notify(trainer, f"The first value that is not finite could not be found: {error}")
