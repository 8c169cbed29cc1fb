"""ProfileCallback: where the time of some updates goes, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from accel_core import TrainerCallback
from accel_core.extending import check_flag, check_path, check_whole_number, counted, notify

from .profile_ranges import RANGES, Ranges

if TYPE_CHECKING:
    from accel_core import Trainer


class ProfileCallback(TrainerCallback):
    """Profile some updates of each process once a run, and write a trace and a table.

    `trace_0.json` of process 0 opens in `chrome://tracing` or https://ui.perfetto.dev. It has ranges named
    data, forward, backward, optimizer, callbacks, evaluation and saving. `table_0.txt` has their times in ten
    lines, which the main process also prints. Times are those of Python on the CPU: a GPU computes later what
    it was given, as the trace shows.

    The ranges are set only while the profile is taken, so that other steps pay nothing.
    """

    runs_in_replay = False
    order = 2000
    """After all others, so that an update is profiled with all that belongs to it."""

    def __init__(
        self, folder: str | Path, wait: int = 5, warmup: int = 2, active: int = 5, memory: bool = False
    ) -> None:
        """Hold what to profile.

        Args:
            folder: gets the files.
            wait: updates from the beginning of the call of `train` that are not looked at.
            warmup: further updates for which the profiler runs, but whose times do not count.
            active: updates that are profiled.
            memory: record too how much memory is allocated, which makes the trace larger.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        self.folder = check_path("folder", folder, "Pass the name of a folder, such as 'profile'.")
        self.wait = check_whole_number("wait", wait, "Use 0 to begin at once.", at_least=0)
        self.warmup = check_whole_number(
            "warmup", warmup, "Use 1, since the first update under a profiler is slow."
        )
        self.active = check_whole_number("active", active, "Use 1 to profile one update.")
        self.memory = check_flag("memory", memory)
        self.table = ""
        """What was printed; empty before."""
        self._profiler: Any = None
        self._ranges: Ranges | None = None
        self._updates = 0

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Count updates from zero."""
        self._updates = 0
        self.table = ""
        if self.wait == 0:
            self._start(trainer)

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Begin to wait for data."""
        if self._ranges is not None:
            self._ranges.open_data()

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Stop waiting for data."""
        if self._ranges is not None:
            self._ranges.close_data()

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Begin or end the profile."""
        self._updates += 1
        if self._profiler is None:
            if self._updates == self.wait:
                self._start(trainer)
        elif self._updates == self.wait + self.warmup + self.active:
            self._stop(trainer)
        else:
            self._profiler.step()

    def on_run_close(self, trainer: Trainer) -> None:
        """End a profile that a short run or an error has left open."""
        if self._profiler is not None:
            self._stop(trainer)

    def _start(self, trainer: Trainer) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        # One update more than is wanted: the profile is ended in the middle of that step.
        plan = schedule(wait=0, warmup=self.warmup, active=self.active + 1)
        self._profiler = profile(activities=activities, schedule=plan, profile_memory=self.memory)
        self._ranges = Ranges(trainer)
        self._profiler.start()

    def _stop(self, trainer: Trainer) -> None:
        profiler, ranges = self._profiler, self._ranges
        self._profiler = self._ranges = None
        if ranges is not None:
            ranges.take_off()
        profiler.stop()
        recorded = self._updates - self.wait - self.warmup
        if recorded <= 0:
            needed = self.wait + self.warmup + 1
            notify(
                trainer,
                f"ProfileCallback recorded nothing: the run made {counted(self._updates, 'updates')}, but it "
                f"records from update {needed} on. Train longer, or pass a smaller wait or warmup.",
            )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        number = trainer.data_group.index
        profiler.export_chrome_trace(str(self.folder / f"trace_{number}.json"))
        self.table = table_of(profiler.events(), min(recorded, self.active))
        (self.folder / f"table_{number}.txt").write_text(self.table + "\n", encoding="utf-8")
        trainer.print(self.table)


def table_of(events: Any, updates: int) -> str:
    """Return ten lines: the times of the ranges, of what is in none of them, and of all.

    Args:
        events: of a profile.
        updates: that it has seen.
    """
    steps = [event for event in events if event.name.startswith("ProfilerStep")]
    total = max((event.time_range.end for event in events), default=0) - min(
        (event.time_range.start for event in steps), default=0
    )
    own = own_times(events)
    own["(rest)"] = max(total - sum(own.values()), 0.0)
    rows = [f"{f'{updates} updates':<12} {'ms an update':>13} {'share':>7}"]
    for name, microseconds in [*own.items(), ("all", total)]:
        share = microseconds / total if total else 0.0
        rows.append(f"{name:<12} {microseconds / 1000 / updates:>13.3f} {share:>7.1%}")
    return "\n".join(rows)


def own_times(events: Any) -> dict[str, float]:
    """Return the microseconds of each range, without those of ranges inside of it."""
    own = dict.fromkeys(RANGES, 0.0)
    open_ranges: list[Any] = []
    # An outer range begins no later than those inside of it, and is longer.
    key: Callable[[Any], Any] = lambda event: (event.time_range.start, -event.time_range.end)  # noqa: E731
    for event in sorted((event for event in events if event.name in own), key=key):
        while open_ranges and open_ranges[-1].time_range.end <= event.time_range.start:
            open_ranges.pop()
        length = event.time_range.end - event.time_range.start
        own[event.name] += length
        if open_ranges:
            own[open_ranges[-1].name] -= length
        open_ranges.append(event)
    return {name: max(value, 0.0) for name, value in own.items()}
