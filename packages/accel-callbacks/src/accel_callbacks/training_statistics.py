"""TrainingStatisticsCallback: what the optimizer does and how fast it goes, in the run history."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from accel_core import TrainerCallback
from accel_core.extending import check_whole_number, sum_over_processes

if TYPE_CHECKING:
    from accel_core import Trainer


class TrainingStatisticsCallback(TrainerCallback):
    """Record after the first update and every n updates, with the same values on every process:

    - `learning_rate`: with which this update was made, of the first group of parameters;
      `learning_rate_<name>` of each further group whose rate differs from it, `<name>` being the group's own
      `"name"`, or its number from 0;
    - `gradient_norm`: L2 norm of all gradients of this update together, before clipping; not for FSDP and
      DeepSpeed, which spread the gradients over the processes;
    - `samples_per_second` and `updates_per_second`: of all processes, since the record before, without
      evaluations;
    - `data_wait_share`: which part of that time, from 0 to 1, was spent waiting for the next batch.

    `plot_history` draws them by update. The device is waited for when they are recorded, and at no other
    update. A resumed run records at the same updates as one that was never stopped; its speed counts from
    where it went on.
    """

    order = 700
    """Before those that send the history elsewhere or save it."""

    def __init__(self, record_every_n_updates: int = 10) -> None:
        """Hold the period.

        Raises:
            ConfigurationError: it is no whole number of at least 1.
        """
        way_out = "Use 1 to record at every update."
        self.record_every_n_updates = check_whole_number(
            "record_every_n_updates", record_every_n_updates, way_out
        )
        self._began: float | None = None

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Begin to count."""
        self._noted: dict[str, Any] = {}
        self._began = None
        self._begin_period(trainer)

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Go on with the clock."""
        self._began = perf_counter()
        self._position = trainer.run_progress.samples_completed_in_epoch

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        """Note the learning rates, which the scheduler changes afterwards, and the norm of the gradients."""
        update = trainer.run_progress.updates_completed + 1
        # The first one too, so that a run of few updates has something to show.
        if update == 1 or update % self.record_every_n_updates == 0:
            self._noted = {**learning_rates(trainer.optimizer), **gradient_norm(trainer)}

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Count the update, and record if it is time."""
        position = trainer.run_progress.samples_completed_in_epoch
        self._samples += position - self._position
        self._position = position
        self._updates += 1
        if self._noted:
            self._record(trainer)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Stop the clock."""
        self._stop_clock()
        self._began = None

    def on_eval_epoch_start(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Stop the clock for an evaluation in the middle of an epoch."""
        self._stop_clock()

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Go on with the clock."""
        if self._began is not None:
            self._began = perf_counter()

    def _stop_clock(self) -> None:
        if self._began is not None:
            self._seconds += perf_counter() - self._began
            self._began = perf_counter()

    def _record(self, trainer: Trainer) -> None:
        """Record what was noted and the speed since the record before; every process takes part."""
        # Reading the norm waits for the device, so that the clock is looked at when the work is done.
        noted, self._noted = {name: float(value) for name, value in self._noted.items()}, {}
        self._stop_clock()
        own_waited = _seconds_waited(trainer) - self._waited_before
        seconds, waited = sum_over_processes([self._seconds, own_waited], trainer.device)
        mean = max(seconds, 1e-9) / trainer.data_group.size
        speed = {"samples_per_second": self._samples / mean, "updates_per_second": self._updates / mean}
        for name, value in {**noted, **speed, "data_wait_share": waited / max(seconds, 1e-9)}.items():
            trainer.run_history.update_metric(name, value)
        self._begin_period(trainer)

    def _begin_period(self, trainer: Trainer) -> None:
        """Count from zero what is recorded the next time."""
        self._samples = 0
        self._updates = 0
        self._seconds = 0.0
        # The loop adds up for the whole run what steps wait.
        self._waited_before = _seconds_waited(trainer)


def _seconds_waited(trainer: Trainer) -> float:
    """Return the seconds that steps of this process have waited for a batch since the run began."""
    return 0.0 if trainer.train_dataloader is None else trainer.train_dataloader.seconds_waited


def learning_rates(optimizer: Any) -> dict[str, float]:
    """The rates of an optimizer by name, as `TrainingStatisticsCallback` records them."""
    first, *others = (float(group["lr"]) for group in optimizer.param_groups)
    rates = {"learning_rate": first}
    for number, rate in enumerate(others, start=1):
        if rate != first:
            rates[f"learning_rate_{optimizer.param_groups[number].get('name', number)}"] = rate
    return rates


def gradient_norm(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The L2 norm of all gradients, not read from the device yet.

    Nothing where they are spread over the processes.
    """
    parameters = (parameter for group in trainer.optimizer.param_groups for parameter in group["params"])
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if trainer.engine.shards_parameters or not gradients:
        return {}
    dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    norm = torch.nn.utils.get_total_norm(dense)
    scaler = trainer.accelerator.scaler
    return {"gradient_norm": norm if scaler is None else norm / scaler.get_scale()}
