"""TrackerCallback: the run in an experiment tracker, by the trackers of Accelerate."""

from __future__ import annotations

import itertools
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
_PACKAGES = {"tensorboard": '"accel-callbacks[trackers]"', "comet_ml": "comet-ml"}
"""What to install, where it is not named as the tracker."""
_KEEP_CONFIG = ("tensorboard", "mlflow")
"""Those that would show it twice, or refuse it if it has changed, in a run that goes on."""


class TrackerCallback(TrainerCallback):
    """Send a run to one tracker: hyper-parameters, the running loss, learning rates, and all that the run history gets.

    Every value is sent with the number of updates completed, so that training, evaluations in mid-epoch and
    epochs share one axis. Names are those of the run history; `train_loss` is the mean over the samples of
    all processes since the value before it, or since the epoch began, and `learning_rate` is named as by
    `TrainingStatisticsCallback`. The main process alone has a tracker. It is always finished, also after an
    exception, and opened again by `evaluate`. The process group stays.

    A run is named by `trainer.run_id`. A resumed run goes on in the same place in tensorboard, mlflow,
    trackio and wandb, and in a new one on the same axis elsewhere, unless `init_kwargs` say how to go on.
    """

    order = 850
    """After all that record metrics, before the state is saved that says what was sent."""

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
            config: hyper-parameters of your own, beside those of `trainer.run_config`; nested mappings are
                flattened.
            logging_dir: the folder of tensorboard and aim, by default that of the accelerator, or `"runs"`;
                mlflow puts its artifacts there. Other places are chosen by the tracker's own settings, such
                as MLFLOW_TRACKING_URI.
            log_every_n_updates: how often the running loss and the learning rates are sent, and what other
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
        self._is_continued = False
        self._num_records_sent, self._num_processes, self._sums = 0, 1, (0.0, 0.0)
        self._rates: dict[str, float] = {}

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Begin a new run of the tracker, unless a state is loaded that says where to go on."""
        self._sums, self._rates = (0.0, 0.0), {}
        self._num_processes = trainer.data_group.size
        self._num_records_sent = len(trainer.run_history.get_records())
        self._is_continued, self._tracker_run_id = False, None

    def on_evaluation_run_start(self, trainer: Trainer) -> None:
        """Send what is recorded from now on."""
        self._num_records_sent = len(trainer.run_history.get_records())

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Open the tracker; the sums of the loss begin at zero."""
        self._open(trainer)
        self._sums = (0.0, 0.0)

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        """Note the learning rates, which the scheduler changes afterwards."""
        if (trainer.run_progress.updates_completed + 1) % self.log_every_n_updates == 0:
            self._rates = learning_rates(trainer.optimizer)

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Send the running loss and the learning rates, if it is time."""
        if self._rates:
            rates, self._rates = self._rates, {}
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
                tracker, self.tracker = self.tracker, None
                tracker.finish()

    def state_dict(self) -> dict[str, Any]:
        """What was sent, where, and the sums of the loss at that point."""
        return {
            "num_records_sent": self._num_records_sent,
            "num_processes": self._num_processes,
            "sums": list(self._sums),
            "tracker_run_id": self._tracker_run_id,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._is_continued = True
        self._num_records_sent, self._tracker_run_id = state["num_records_sent"], state["tracker_run_id"]
        if state["num_processes"] == self._num_processes:
            self._sums = (state["sums"][0], state["sums"][1])

    def _running_loss(self, trainer: Trainer) -> float:
        """The mean over all processes, each of which takes part, since the last call or the beginning of the epoch."""
        sums = float(trainer.train_loss.total), float(trainer.train_loss.count)
        own = [now - before for now, before in zip(sums, self._sums, strict=True)]
        self._sums = sums
        total, count = sum_over_processes(own, trainer.device)
        return total / count if count else float("nan")

    def _open(self, trainer: Trainer) -> None:
        if self.tracker is not None or not trainer.is_main_process:
            return
        tracker_class, project, arguments = (
            LOGGER_TYPE_TO_CLASS[self.name],
            self.project_name,
            self._arguments(trainer),
        )
        folder = self.logging_dir or trainer.accelerator.logging_dir or "runs"
        if self.name == "tensorboard":
            project = str(Path(project) / (trainer.run_id or "evaluation"))
        directory = [str(folder)] if tracker_class.requires_logging_directory else []
        tracker = tracker_class(project, *directory, **{**arguments, **self.init_kwargs})
        # Before Accelerate 1.8 the constructor starts it.
        getattr(tracker, "start", lambda: None)()
        self.tracker = tracker
        self._tracker_run_id = getattr(getattr(tracker.tracker, "info", None), "run_id", None)
        if not (self._is_continued and self.name in _KEEP_CONFIG):
            tracker.store_init_configuration(flatten({**trainer.run_config.to_dict(), **self.config}))
        self._is_continued = True

    def _arguments(self, trainer: Trainer) -> dict[str, Any]:
        """How the run is named, and found again, in trackers that can go on with a run."""
        run_id = trainer.run_id
        if self.name == "tensorboard":
            # What a run that was killed has sent after its state was saved comes again.
            return {"purge_step": trainer.run_progress.updates_completed + 1} if self._is_continued else {}
        if self.name == "mlflow":
            place = {} if self.logging_dir is None else {"logging_dir": str(self.logging_dir)}
            run = {"run_name": run_id} if self._tracker_run_id is None else {"run_id": self._tracker_run_id}
            return {**place, **run}
        if run_id is not None and self.name in ("wandb", "trackio"):
            return {"name": run_id, "resume": "allow", **({"id": run_id} if self.name == "wandb" else {})}
        return {}

    def _send(self, trainer: Trainer, values: Mapping[str, float] | None = None) -> None:
        """Send what the history has got since the last time, each with its update, and `values` of the update just made."""
        records = trainer.run_history.get_records()
        new = list(records[self._num_records_sent :])
        self._num_records_sent = len(records)
        update, epoch = trainer.run_progress.updates_completed, trainer.run_progress.current_epoch
        own = [MetricRecord(name=n, value=v, epoch=epoch, update=update) for n, v in (values or {}).items()]
        if self.tracker is not None:
            for step, group in itertools.groupby([*new, *own], key=lambda record: record["update"]):
                self.tracker.log({record["name"]: record["value"] for record in group}, step=step)


def check_tracker(name: Any) -> str:
    """Return Accelerate's name for the tracker.

    Raises `ConfigurationError` if it has none, or its package is missing.
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
    """Values by name, those of nested mappings as `outer.inner`.

    What is neither number, string nor None as its text.
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
