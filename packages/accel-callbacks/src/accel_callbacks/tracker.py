"""TrackerCallback: send a run to an experiment tracker, through the trackers of Accelerate."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from accel_core import ConfigurationError, TrainerCallback
from accel_core.extending import MetricRecord, check_whole_number, did_you_mean, sum_over_processes

from .training_statistics import learning_rates

if TYPE_CHECKING:
    from accel_core import Trainer

_OTHER_NAMES = {"comet": "comet_ml"}
"""Names of trackers that differ from those of Accelerate."""
_PACKAGES = {"tensorboard": '"accel-callbacks[tensorboard]"', "comet_ml": "comet-ml"}
"""Packages to install that are not named like their trackers."""
_KEEP_CONFIG = ("tensorboard", "mlflow")
"""Trackers that show the configuration twice, or refuse a changed one, in a run that continues."""


_NAMED_BY_RUN = "(run id)"
"""Stands for the folder of a run that a former version has begun."""


class TrackerCallback(TrainerCallback):
    """Send hyper-parameters, running loss, learning rates and all records of the history to one tracker.

    Every value is sent with the number of updates completed, so that training, evaluations in mid-epoch and
    epochs share one axis. Names are those of the run history. `train_loss` is the mean over the samples of
    all processes since the previous value, or since the epoch began, and `learning_rate` is named as by
    `TrainingStatisticsCallback`. Only the main process has a tracker. It is always finished, also after an
    exception, and opened again by `evaluate`. The process group stays.

    A run is named by `trainer.run_id`. A resumed run, or a later stage of a run, continues the same run of
    tensorboard, mlflow, trackio and wandb. Other trackers get a new run on the same axis, unless
    `init_kwargs` let them continue one.
    """

    runs_in_replay = False
    order = 850
    """After callbacks that record metrics, and before the state is saved, which holds what was sent."""

    def __init__(
        self,
        name: str,
        project_name: str,
        config: Mapping[str, Any] | None = None,
        logging_dir: str | Path | None = None,
        log_every_n_updates: int = 50,
        init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Choose the tracker; it is opened when the first epoch begins.

        Args:
            name: `"tensorboard"`, `"wandb"`, `"mlflow"`, `"trackio"`, `"aim"`, `"comet"`, `"clearml"`,
                `"dvclive"`, `"swanlab"`, or any other that Accelerate knows.
            project_name: the project or experiment in which the run appears; a folder of tensorboard.
            config: your own hyper-parameters, besides those of `trainer.run_config`; nested mappings are
                flattened.
            logging_dir: the folder of tensorboard and aim, by default that of the accelerator, or `"runs"`;
                mlflow puts its artifacts there. The tracker's own settings, such as MLFLOW_TRACKING_URI,
                choose everything else.
            log_every_n_updates: period of sending the running loss, the learning rates, and what other
                callbacks have recorded meanwhile. Reading the loss waits for the device.
            init_kwargs: arguments for the tracker itself, as Accelerate's `init_trackers` takes them for one
                tracker.

        Raises:
            ConfigurationError: an argument cannot be used, or the tracker's package is not installed.
        """
        way_out = "Use 1 to send the loss of every update."
        self.log_every_n_updates = check_whole_number("log_every_n_updates", log_every_n_updates, way_out)
        self.name = check_tracker(name)
        self.project_name = project_name
        self.config = config or {}
        self.logging_dir = logging_dir
        self.init_kwargs = init_kwargs or {}
        self.tracker: Any = None
        """Accelerate's tracker, while it is open on this process."""
        self._tracker_run_id: str | None = None
        self._folder: str | None = None
        """Name of the folder of tensorboard; a resumed run keeps it."""
        self._is_continued = False
        self._num_records_sent = 0
        self._num_processes = 1
        self._sums = (0.0, 0.0)
        """Total and count of the epoch's loss when it was sent last, on this process."""
        self._rates: dict[str, float] | None = None

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Begin a new run of the tracker, unless a stage before or a state says where to continue."""
        self._sums = (0.0, 0.0)
        self._rates = None
        self._num_processes = trainer.data_group.size
        self._num_records_sent = len(trainer.run_history.get_records())
        # A later stage continues what the stage before has sent.
        self._is_continued = trainer.run_progress.stage > 1
        if not self._is_continued:
            self._tracker_run_id = None
            self._folder = None

    def on_evaluation_run_start(self, trainer: Trainer) -> None:
        """Send what is recorded from now on."""
        self._num_records_sent = len(trainer.run_history.get_records())

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Open the tracker, and begin with sums of the loss at zero."""
        # Not in `on_training_run_start`: only now is it known whether the run continues from a state.
        self._open(trainer)
        self._sums = (0.0, 0.0)

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        """Keep the learning rates, which the scheduler changes afterwards."""
        if (trainer.run_progress.updates_completed + 1) % self.log_every_n_updates == 0:
            self._rates = learning_rates(trainer.optimizer)

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Send the running loss and the learning rates, if it is time."""
        # Empty if the optimizer has no rates: the loss is sent nevertheless.
        if self._rates is not None:
            rates = self._rates
            self._rates = None
            self._send(trainer, {"train_loss": self._running_loss(trainer), **rates})

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        """Send the metrics of the epoch."""
        self._send(trainer)

    def on_evaluation_run_end(self, trainer: Trainer) -> None:
        """Send the metrics of the evaluation."""
        self._open(trainer)
        self._send(trainer)

    def on_run_close(self, trainer: Trainer) -> None:
        """Send the rest, and finish."""
        if self.tracker is not None:
            try:
                self._send(trainer)
            finally:
                # Forgotten first, so that a tracker that fails to finish is not used again.
                tracker = self.tracker
                self.tracker = None
                tracker.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return what was sent, the tracker's run, and the sums of the loss when it was sent last."""
        return {
            "num_records_sent": self._num_records_sent,
            "num_processes": self._num_processes,
            "sums": list(self._sums),
            "tracker_run_id": self._tracker_run_id,
            "folder": self._folder,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self._is_continued = True
        self._num_records_sent = state["num_records_sent"]
        self._tracker_run_id = state["tracker_run_id"]
        # States of former versions have none: their folder is named by the run.
        self._folder = state.get("folder", _NAMED_BY_RUN)
        # The losses of an epoch begun are kept by process, so with another number of them the sums begin
        # again.
        if state["num_processes"] == self._num_processes:
            self._sums = (state["sums"][0], state["sums"][1])

    def _running_loss(self, trainer: Trainer) -> float:
        """Return the mean loss since the last call, or since the epoch began. Every process takes part."""
        sums = float(trainer.train_loss.total), float(trainer.train_loss.count)
        own = [now - before for now, before in zip(sums, self._sums, strict=True)]
        self._sums = sums
        total, count = sum_over_processes(own, trainer.device)
        return total / count if count else float("nan")

    def _open(self, trainer: Trainer) -> None:
        if self.tracker is not None or not trainer.is_main_process:
            return
        tracker_class = LOGGER_TYPE_TO_CLASS[self.name]
        project = self.project_name
        arguments = self._arguments(trainer)
        folder = self.logging_dir or trainer.accelerator.logging_dir or "runs"
        if self.name == "tensorboard":
            # It knows no runs, only folders.
            if self._folder == _NAMED_BY_RUN:
                self._folder = trainer.run_id
            self._folder = self._folder or self._readable_folder(trainer)
            project = str(Path(project) / self._folder)
        # Trackers without a folder of their own do not take the argument.
        directory = [str(folder)] if tracker_class.requires_logging_directory else []
        tracker = tracker_class(project, *directory, **{**arguments, **self.init_kwargs})
        # Before Accelerate 1.8 the constructor starts it, and there is no such method.
        getattr(tracker, "start", lambda: None)()
        self.tracker = tracker
        self._tracker_run_id = getattr(getattr(tracker.tracker, "info", None), "run_id", None)
        if not (self._is_continued and self.name in _KEEP_CONFIG):
            tracker.store_init_configuration(flatten({**trainer.run_config.to_dict(), **self.config}))
        self._is_continued = True

    def _readable_folder(self, trainer: Trainer) -> str:
        """Return day and time with the run's own name, so that folders sort by age."""
        if trainer.run_id is None:
            return "evaluation"
        return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{trainer.run_id}"

    def _arguments(self, trainer: Trainer) -> dict[str, Any]:
        """Return the arguments that name a run, and find it again, for trackers that can continue one."""
        run_id = trainer.run_id
        if self.name == "tensorboard":
            # A killed run has sent values after its state was saved. The resumed run sends them again.
            return {"purge_step": trainer.run_progress.updates_completed + 1} if self._is_continued else {}
        if self.name == "mlflow":
            folder = {} if self.logging_dir is None else {"logging_dir": str(self.logging_dir)}
            # mlflow numbers its runs itself, so its own number is in the state.
            run = {"run_name": run_id} if self._tracker_run_id is None else {"run_id": self._tracker_run_id}
            return {**folder, **run}
        if run_id is not None and self.name in ("wandb", "trackio"):
            return {"name": run_id, "resume": "allow", **({"id": run_id} if self.name == "wandb" else {})}
        return {}

    def _send(self, trainer: Trainer, values: Mapping[str, float] | None = None) -> None:
        """Send new records of the history, each with its update, and `values` with the current update."""
        records = trainer.run_history.get_records()
        new = list(records[self._num_records_sent :])
        self._num_records_sent = len(records)
        update = trainer.run_progress.updates_completed
        epoch = trainer.run_progress.current_epoch
        own = [MetricRecord(name=n, value=v, epoch=epoch, update=update) for n, v in (values or {}).items()]
        # Counted on every process, since each saves a state of its own, but sent by the main one.
        if self.tracker is not None:
            for step, group in itertools.groupby([*new, *own], key=lambda record: record["update"]):
                self.tracker.log({record["name"]: record["value"] for record in group}, step=step)


def check_tracker(name: Any) -> str:
    """Return Accelerate's name for the tracker.

    Raises:
        ConfigurationError: Accelerate has no such tracker, or its package is not installed.
    """
    known = _OTHER_NAMES.get(name, name) if isinstance(name, str) else name
    if known not in LOGGER_TYPE_TO_CLASS:
        raise ConfigurationError(
            f"name is {name!r}, but must be one of the trackers that Accelerate knows: "
            f"{sorted(LOGGER_TYPE_TO_CLASS)}.{did_you_mean(str(name), LOGGER_TYPE_TO_CLASS)}"
        )
    if known in LoggerType.list() and LoggerType(known) not in get_available_trackers():
        raise ConfigurationError(
            f"TrackerCallback({name!r}, ...) needs the package {known!r}, which is not installed. Install it "
            f"with: pip install {_PACKAGES.get(known, known)}"
        )
    return str(known)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by name, those of nested mappings as `outer.inner`.

    Values that are no numbers, strings or None become strings, since trackers accept no others.
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = (
                value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
            )
    return flat
