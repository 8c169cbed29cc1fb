"""How training states are saved: at once or in the background, again after a failure, and to a mirror."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from accel_core import AccelWarning, CheckpointError
from accel_core.extending import (
    BackgroundSaves,
    NotFiniteError,
    OtherRunError,
    bytes_to_copy,
    check_is_shared,
    notify,
    run_on_main,
)

from .failed_saves import FailedSaves
from .mirrored_saves import MirroredSaves
from .run_folder import RunFolder

if TYPE_CHECKING:
    from accel_core import Trainer


class StateSaver:
    """Saves the states of one run. Every process takes part, but for `describe` and `close_after_error`."""

    def __init__(self, folder: RunFolder, in_background: bool, mirrored: MirroredSaves | None) -> None:
        self.folder = folder
        self.background = BackgroundSaves() if in_background else None
        self.mirrored = mirrored
        self.failures = FailedSaves()

    def describe(self, trainer: Trainer) -> str:
        """Tell what the copies of a background save take, and where the mirror is."""
        parts = []
        if self.background is not None:
            megabytes = bytes_to_copy(trainer.model, trainer.optimizer) / 1e6
            where = "all processes together" if trainer.engine.shards_parameters else "the main process"
            parts.append(f"saves in the background, with copies of {megabytes:.1f} MB in memory of {where}")
        if self.mirrored is not None:
            parts.append(f"copies each state to '{self.mirrored.address}'")
        return ", ".join(parts)

    def start(self, trainer: Trainer, folder: RunFolder, sets_aside: bool) -> None:
        """Make ready for a run that saves in `folder`.

        Args:
            sets_aside: move states of another run away, rather than raise for them.

        Raises:
            CheckpointError: the folder or the mirror holds states of another run.
            ConfigurationError: the engine cannot save in the background, or the machines do not share the
                folder.
        """
        if self.background is not None:
            self.background.start(trainer)
        if trainer.engine.shards_parameters:
            check_is_shared(folder.path, trainer.is_main_process)
        self.folder = folder
        aside = run_on_main(lambda: folder.open(str(trainer.run_id), sets_aside), trainer.is_main_process)
        if aside is not None:
            notify(trainer, f"The states of another run in '{folder.path}' were moved to '{aside}'.", "saves")
        if self.mirrored is not None:
            self.mirrored.start(trainer, folder.path, sets_aside)
        self.failures = FailedSaves()

    def resume(self, trainer: Trainer, path: Path) -> None:
        """Raise if there are later states than the one at `path`; set those aside that are damaged."""
        updates = trainer.run_progress.updates_completed
        run_on_main(lambda: self.folder.set_damaged_aside(updates), trainer.is_main_process)
        if self.mirrored is not None:
            self.mirrored.resume(trainer, path)
        self._check_folder(trainer)

    def is_time(self, trainer: Trainer, is_due: bool) -> bool:
        """Whether to save now. What failed is made up for, and what comes due before that waits for it."""
        if self.failures.number and not self._is_on_its_way:
            return trainer.run_progress.updates_completed >= self.failures.retry_at
        return is_due

    def save(self, trainer: Trainer, path: Path, is_last: bool, retries: bool) -> None:
        """Save to `path`, between updates.

        Args:
            is_last: no later save could make up for this one, so that a failure is raised in any case.
            retries: a save that fails is tried again.
        """
        if self.background is not None and trainer.is_main_process and not is_last:
            self.background.warn_of_waiting()
        self.finish(trainer, retries)
        try:
            self._check_folder(trainer)
            # Nothing is won by a thread where training does not go on.
            if self.background is None or is_last:
                trainer.save_training_state(path)
            else:
                with self.background.taking_saves(trainer):
                    trainer.save_training_state(path)
        except NotFiniteError as error:
            warnings.warn(str(error), AccelWarning)
        except OtherRunError:
            raise
        except CheckpointError as error:
            self.failures.add(trainer, error, is_tried_again=retries and not is_last)
        else:
            if not self._is_on_its_way:
                self._after_save(trainer, path)

    def finish(self, trainer: Trainer, retries: bool, goes_on: bool = False) -> None:
        """Wait for the save that is on its way.

        Args:
            goes_on: training goes on meanwhile, so that the writer may remove what need not be kept.
        """
        if self.background is None:
            return
        try:
            path = self.background.finish(trainer)
        except CheckpointError as error:
            self.failures.add(trainer, error, is_tried_again=retries)
        else:
            if path is not None:
                self._after_save(trainer, path, goes_on)

    def finish_mirror(self, trainer: Trainer) -> None:
        """Wait for the copies that are on their way to the mirror, with the run card of all states."""
        if self.mirrored is not None:
            # While the mirror takes it, which ends before the run is closed.
            self._renew_card(trainer)
            self.mirrored.finish(trainer)

    def close_after_error(self, trainer: Trainer) -> None:
        """Wait for what is on its way, without the other processes, which may be anywhere."""
        if self.background is not None:
            path = self.background.close(trainer)
            if path is not None and self.mirrored is not None:
                self.mirrored.add(path)
        if self.mirrored is not None:
            self._renew_card(trainer)
            self.mirrored.finish(trainer, by_all=False)

    def complete_card(self, trainer: Trainer) -> None:
        """Write the run card with all states."""
        self._renew_card(trainer)
        self.folder.is_card_old = False

    @property
    def _is_on_its_way(self) -> bool:
        return self.background is not None and self.background.path is not None

    def _after_save(self, trainer: Trainer, path: Path, goes_on: bool = False) -> None:
        """Do what follows from the state that now stands at `path`."""
        if self.failures.number:
            notify(trainer, f"The training state could be saved again, to '{path}'.", "saves")
            self.failures.number = 0
        if trainer.is_main_process:
            if self.mirrored is not None:
                self.mirrored.add(path)
            tidy = partial(self.folder.tidy, str(trainer.run_id))
            # Not beside the first card, which looks at all that stands in the folder.
            is_beside = goes_on and self.folder.has_card and self.folder.states_to_remove is not None
            if is_beside and self.background is not None:
                self.background.tidy(tidy)
            else:
                tidy()
            # The cost of a save does not grow with their number, so the card is written once more at the end.
            if not self.folder.has_card:
                self._write_card(trainer)
            self.folder.is_card_old = True

    def _renew_card(self, trainer: Trainer) -> None:
        """Write the run card once more if states were saved since."""
        if self.folder.is_card_old:
            self._write_card(trainer)

    def _write_card(self, trainer: Trainer) -> None:
        card = self.folder.write_card(trainer)
        if self.mirrored is not None:
            self.mirrored.add_card(card)

    def _check_folder(self, trainer: Trainer) -> None:
        """Before each save, since another job may have begun to write there."""
        run_id, updates = str(trainer.run_id), trainer.run_progress.updates_completed

        def check() -> None:
            self.folder.check(run_id, updates)
            if self.mirrored is not None:
                self.mirrored.check(updates)

        run_on_main(check, trainer.is_main_process)
