"""TrainingStatisticsCallback: record learning rates, the norm of the gradients, and speed."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from accel_core import TrainerCallback
from accel_core.extending import all_gather_object, check_whole_number, sum_over_processes

if TYPE_CHECKING:
    from accel_core import Trainer


class TrainingStatisticsCallback(TrainerCallback):
    """Record after the first update and every n updates, with the same values on every process:

    - `learning_rate`: rate of this update for the first group of parameters; `learning_rate_<name>` for each
      further group whose rate differs from it, `<name>` being the group's own `"name"`, or its number from 0;
    - `gradient_norm`: L2 norm of all gradients of this update together, before clipping; not for FSDP2 and
      DeepSpeed, which spread the gradients over the processes;
    - `samples_per_second` and `updates_per_second`: speed of all processes together since the previous
      record, without evaluations;
    - `data_wait_share`: part of that time, from 0 to 1, that was spent waiting for the next batch;
    - `tokens_per_second`: where steps return `num_items_in_batch`, and count more items than samples;
    - `peak_device_memory_mib`: the most that tensors have used on any accelerator, in MiB, since it began.

    `plot_history` draws them by update. The callback waits for the device when it records, and at no other
    update. A resumed run records at the same updates as one that was never stopped; its speed counts from the
    update at which it went on.
    """

    runs_in_replay = False
    order = 700
    """Before callbacks that send the history elsewhere or save it."""

    def __init__(self, record_every_n_updates: int = 10) -> None:
        """Hold the period.

        Args:
            record_every_n_updates: the period in updates; 1 waits for the device after each.

        Raises:
            ConfigurationError: the period is no whole number of at least 1.
        """
        way_out = "Use 1 to record at every update."
        self.record_every_n_updates = check_whole_number(
            "record_every_n_updates", record_every_n_updates, way_out
        )
        self._began: float | None = None
        self._tokens: Any = 0
        """Since the last record, on this process."""

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Begin to count."""
        self._kept: dict[str, Any] | None = None
        self._began = None
        self._begin_period(trainer)

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Start the clock."""
        self._began = perf_counter()
        # A resumed epoch begins behind samples that it has not read.
        self._position = trainer.run_progress.samples_completed_in_epoch

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        """Keep the learning rates, which the scheduler changes afterwards, and the norm of the gradients."""
        update = trainer.run_progress.updates_completed + 1
        # The first one too, so that a run of few updates has something to show.
        if update == 1 or update % self.record_every_n_updates == 0:
            self._kept = {**learning_rates(trainer.optimizer), **gradient_norm(trainer)}

    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int
    ) -> None:
        """Count the tokens, where they are."""
        if "num_items_in_batch" in batch_output:
            # A tensor stays on its device until the record.
            self._tokens = self._tokens + batch_output["num_items_in_batch"]

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Count the update, and record if it is time."""
        position = trainer.run_progress.samples_completed_in_epoch
        self._samples += position - self._position
        self._position = position
        self._updates += 1
        # Empty if the optimizer has no rates: the speed is recorded nevertheless.
        if self._kept is not None:
            self._record(trainer, self._kept)
            self._kept = None

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Stop the clock."""
        self._stop_clock()
        self._began = None

    def on_eval_epoch_start(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Stop the clock for an evaluation in the middle of an epoch."""
        self._stop_clock()

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Start the clock again, unless the evaluation came after the epoch."""
        if self._began is not None:
            self._began = perf_counter()

    def _stop_clock(self) -> None:
        if self._began is not None:
            self._seconds += perf_counter() - self._began
            self._began = perf_counter()

    def _record(self, trainer: Trainer, kept: dict[str, Any]) -> None:
        """Record what was `kept`, and the speed since the previous record. Every process takes part."""
        # Reading the norm waits for the device, so that the clock is read when the work is done.
        values = {name: float(value) for name, value in kept.items()}
        self._stop_clock()
        own_waited = _seconds_waited(trainer) - self._waited_before
        own = [self._seconds, own_waited, float(self._tokens)]
        seconds, waited, tokens = sum_over_processes(own, trainer.device)
        # The coarse clocks of some platforms may not have moved.
        seconds = max(seconds, 1e-9)
        seconds_of_a_process = seconds / trainer.data_group.num_processes
        # Samples and updates are those of all processes already, but seconds were added up over them.
        values["samples_per_second"] = self._samples / seconds_of_a_process
        values["updates_per_second"] = self._updates / seconds_of_a_process
        values["data_wait_share"] = waited / seconds
        # Of classifiers the items are samples, whose speed is told already.
        if tokens > self._samples:
            values["tokens_per_second"] = tokens / seconds_of_a_process
        if trainer.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(trainer.device) / 2**20
            values["peak_device_memory_mib"] = max(all_gather_object(peak))
        for name, value in values.items():
            trainer.run_history.update_metric(name, value)
        self._begin_period(trainer)

    def _begin_period(self, trainer: Trainer) -> None:
        """Count from zero what is recorded the next time."""
        self._samples = 0
        self._tokens = 0
        self._updates = 0
        self._seconds = 0.0
        # The loop adds up for the whole run what steps wait.
        self._waited_before = _seconds_waited(trainer)


def _seconds_waited(trainer: Trainer) -> float:
    """Return the seconds that steps of this process have waited for a batch since the run began."""
    return 0.0 if trainer.train_dataloader is None else trainer.train_dataloader.seconds_waited


def learning_rates(optimizer: Any) -> dict[str, float]:
    """Return the rates of an optimizer by name, as `TrainingStatisticsCallback` records them.

    A group without one, whose optimizer chooses it at each update as Adafactor does, is left out.
    """
    given = [group.get("lr") for group in optimizer.param_groups]
    first, *others = (None if rate is None else float(rate) for rate in given)
    rates = {} if first is None else {"learning_rate": first}
    for number, rate in enumerate(others, start=1):
        if rate is not None and rate != first:
            rates[f"learning_rate_{optimizer.param_groups[number].get('name', number)}"] = rate
    return rates


def gradient_norm(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the L2 norm of all gradients by name, or nothing if they are spread over the processes."""
    parameters = (parameter for group in trainer.optimizer.param_groups for parameter in group["params"])
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if trainer.engine.shards_parameters or not gradients:
        return {}
    # A sparse gradient may hold several values for one element, which have to be added up first.
    dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    norm = torch.nn.utils.get_total_norm(dense)
    # Gradients of float16 are still multiplied by the scale.
    scaler = trainer.accelerator.scaler
    return {"gradient_norm": norm if scaler is None else norm / scaler.get_scale()}
