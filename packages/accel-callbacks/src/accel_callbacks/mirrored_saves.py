"""The mirror of a saver: the main process copies, and the others wait for it where they have to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel_core import AccelWarning
from accel_core.extending import (
    Address,
    Mirror,
    check_can_open,
    check_is_elsewhere,
    check_place,
    counted,
    is_distributed,
    run_on_main,
)

if TYPE_CHECKING:
    from accel_core import Trainer


class MirroredSaves:
    """Copies of the states in one folder, in a store elsewhere."""

    def __init__(
        self,
        mirror: str | Path,
        save_dir: Path,
        wait_seconds: float,
        states_to_remove: Callable[[Mapping[str, Any]], Iterable[str]],
    ) -> None:
        """Hold where the copies go.

        Raises:
            ConfigurationError: `mirror` is no place that fsspec knows, or is `save_dir` itself.
        """
        way_out = "Pass an address such as 's3://bucket/run1', or a folder of another disk."
        place = check_place("mirror", mirror, way_out)
        self.address = place if isinstance(place, Address) else Address(str(place.absolute()))
        check_can_open("mirror", self.address)
        check_is_elsewhere("mirror", self.address, "save_dir", save_dir)
        self.folder = save_dir
        self.wait_seconds = wait_seconds
        self.mirror = Mirror(self.address, states_to_remove)

    def start(self, trainer: Trainer, folder: Path, sets_aside: bool) -> None:
        """Look into the store, and begin to copy. Every process takes part."""
        run_on_main(
            lambda: self.mirror.start(folder, str(trainer.run_id), sets_aside), trainer.is_main_process
        )

    def resume(self, trainer: Trainer, path: Path) -> None:
        """Raise if the store holds later states than the one at `path`. Every process takes part."""
        updates = trainer.run_progress.updates_completed
        run_on_main(lambda: self.mirror.resume(path, updates), trainer.is_main_process)

    def check(self, updates: int) -> None:
        """Raise if the store turned out to hold states of another run. The main process calls it."""
        self.mirror.check(updates)

    def add(self, path: Path) -> None:
        """Let a state be copied that stands. The main process calls it."""
        self.mirror.add(path)

    def add_card(self, path: Path) -> None:
        """Let the run card at `path` be copied. The main process calls it."""
        self.mirror.add_card(path)

    def finish(self, trainer: Trainer, by_all: bool = True) -> None:
        """Wait for what is on its way, and warn of what does not stand there after the longest wait.

        Args:
            by_all: every process takes part, and waits for the main one.
        """
        lacking: list[str] = []
        if by_all and is_distributed():
            lacking = run_on_main(lambda: self.mirror.finish(self.wait_seconds), trainer.is_main_process)
        elif trainer.is_main_process:
            lacking = self.mirror.finish(self.wait_seconds)
        if lacking and trainer.is_main_process:
            warnings.warn(
                f"After {counted(self.wait_seconds, 'seconds')} the mirror '{self.address}' does not have "
                f"{', '.join(map(repr, lacking))} yet. This machine has them in '{self.folder}'. To wait "
                f"longer, pass a mirror_wait_seconds of more than {self.wait_seconds:g}.",
                AccelWarning,
                stacklevel=2,
            )
