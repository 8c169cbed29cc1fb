"""WSDCheckpointCallback: save states that a WSD run can be continued from, and its decayed models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from accel_core import AccelWarning, ConfigurationError, TrainerCallback
from accel_core.extending import (
    KnownStates,
    NotFiniteError,
    check_path,
    complete_checkpoints,
    refuse_other_run,
    run_on_main,
    write_card,
)

from .wsd_scheduler import WSDLrScheduler

if TYPE_CHECKING:
    from accel_core import Trainer


class WSDCheckpointCallback(TrainerCallback):
    """Save the training state before each decay of a `WSDLrScheduler`, and export the model after it.

    For a decay from update 900 to 1000, `save_dir` gets the folder `checkpoint_900_wsd_pre_decay`, from which
    the run can be continued for longer, and the file `checkpoint_1000_wsd_post_decay.pt`, a model that is
    ready for use. `run_card.json` beside them says what is needed to repeat the run. To continue:

    ```python
    create_scheduler_fn = WSDLrScheduler.create_scheduler_fn(
        is_continuation_from_checkpoint=True
    )
    folder = "checkpoints/checkpoint_900_wsd_pre_decay"
    trainer.train(
        dataset,
        num_epochs=20,
        create_scheduler_fn=create_scheduler_fn,
        resume_from=folder,
    )
    ```
    """

    runs_in_replay = False
    order = 1000
    """After all others, so that the saved state holds what they did after the same update."""

    def __init__(
        self,
        save_dir: str | Path = "checkpoints",
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        initial_checkpoint: str | Path | None = None,
    ) -> None:
        """Hold the folder and what exports contain.

        Args:
            save_dir: folder of one run; several machines have to share its disk.
            save_optimizer: whether exports hold the optimizer's state. Training states hold everything.
            save_scheduler: whether exports hold the scheduler's state.
            initial_checkpoint: an exported file. A new run begins with its weights, and with its state of
                the optimizer if it has one. It is read once, when the model is prepared; the schedule
                begins at its first update. To continue from a training state, which is a folder, pass
                `resume_from` to `train`.
        """
        self.save_dir = check_path("save_dir", save_dir, "Pass the name of a folder.")
        self.save_optimizer = save_optimizer
        self.save_scheduler = save_scheduler
        way_out = "Pass an exported file, or None."
        self.initial_checkpoint = initial_checkpoint and check_path(
            "initial_checkpoint", initial_checkpoint, way_out
        )
        self._steps_seen = 0

    def on_prepare_start(self, trainer: Trainer) -> None:
        """Begin with the weights of another run, if that is wanted."""
        if self.initial_checkpoint is not None:
            # A new run makes a schedule of its own, so that of the export is left out.
            load_optimizer = trainer.optimizer is not None
            trainer.load_checkpoint(
                self.initial_checkpoint, load_optimizer=load_optimizer, load_scheduler=False
            )

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Raise `ConfigurationError` without such a schedule, or for a folder with states of another run."""
        if not isinstance(trainer.scheduler, WSDLrScheduler):
            found = "None" if trainer.scheduler is None else f"a {type(trainer.scheduler).__name__}"
            raise ConfigurationError(
                f"WSDCheckpointCallback follows a WSDLrScheduler, but the scheduler of this run is {found}. "
                "Pass create_scheduler_fn=WSDLrScheduler.create_scheduler_fn() to train, or leave the "
                "callback out."
            )
        run_on_main(lambda: self._check_folder(str(trainer.run_id)), trainer.is_main_process)
        self._steps_seen = 0

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Save the training state if a decay begins now, and export the model if one has ended."""
        scheduler: WSDLrScheduler = trainer.scheduler
        step = scheduler.get_current_step()
        if step == self._steps_seen:
            # A gradient scaler has skipped this update, so the schedule has not moved.
            return
        self._steps_seen = step
        # The schedule of a later stage begins at its first update, the names go on counting.
        before = trainer.run_progress.updates_before_stage
        periods = scheduler.get_decay_info()
        try:
            if any(step == period["pre_decay_step"] for period in periods):
                trainer.save_training_state(self.save_dir / f"checkpoint_{before + step}_wsd_pre_decay")
                if trainer.is_main_process:
                    write_card(trainer, KnownStates(self.save_dir))
            if any(step == period["period_end"] for period in periods):
                path = self.save_dir / f"checkpoint_{before + step}_wsd_post_decay.pt"
                trainer.save_checkpoint(
                    path, save_optimizer=self.save_optimizer, save_scheduler=self.save_scheduler
                )
        except NotFiniteError as error:
            # What was saved before is intact, and a run may recover.
            warnings.warn(str(error), AccelWarning)

    def _check_folder(self, run_id: str) -> None:
        # Names are numbers of updates, so states of another run would be overwritten.
        for path in complete_checkpoints(self.save_dir):
            refuse_other_run(path, run_id)
