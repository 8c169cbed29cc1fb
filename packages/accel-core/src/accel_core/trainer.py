"""Holds the trainer with its loop. Each level of nesting is a method:

    train                        check, build and prepare, resume, then
      run_training               for each epoch: run_train_epoch, run_eval_epoch
        run_train_epoch          for each update: run_train_step for each batch of its group, run_update
          run_train_step         forward and backward; no synchronisation before the last step of the group
          run_update             clip, optimizer, scheduler, zero the gradients, count
        run_eval_epoch           exact on any number of processes
    evaluate, predict

A *step* is forward and backward of one batch on one process. An *update* changes the parameters once, after
up to `gradient_accumulation_steps` steps on each process. Everything that counts or limits counts updates.

What is not the loop is called in one line and lives in a room of its own, such as `run`, `data`, `engines`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from . import proving
from .callbacks.callback import TrainerCallback
from .callbacks.callback_list import CallbackList
from .callbacks.defaults import DEFAULT_CALLBACKS
from .checks import arguments as checks
from .data.defaults import create_dataloader, default_dataloader_kwargs
from .data.loader import ShardedDataLoader
from .engines.choose import choose_engine
from .engines.engine import Engine
from .engines.weights import unwrap_model
from .errors import RunInterrupted
from .foreign_names.answers import answer_foreign_names, check_trainer_class, take_old_name
from .processes.agreement import Agreement
from .processes.collectives import gather_tensor
from .processes.gather_with_grad import gather_with_grad
from .processes.group import DataGroup, data_group
from .run import (
    entering,
    evaluations,
    exports,
    loaders,
    modes,
    predicting,
    preparing,
    saved_state,
    trained_state,
)
from .run.batch_output import unpack_batch
from .run.counted_loss import count_targets
from .run.counted_samples import create_batch_output, describe_counting
from .run.description import describe_briefly, describe_run
from .run.epochs import complete_epoch, start_train_epoch
from .run.evaluation_kind import EvaluationKind
from .run.first_steps import check_first_output, check_first_update
from .run.loss_tracker import LossTracker, MeanTrackers, record_losses
from .run.padding import run_padding_step
from .run.placeholders import resolve_placeholders
from .run.run import Phase, Run, outside_run, require_training
from .run.run_config import TrainerRunConfig, plan_run
from .run.run_history import InMemoryRunHistory, RunHistory
from .run.run_progress import RunProgress
from .run.scheduling import build_scheduler
from .run.stages import choose_start, skip_stage
from .run.steps import Step, report_left_out
from .run.train_arguments import EvaluationArguments
from .run.update_groups import WEIGHS_NOTHING, UpdateGroup, check_epoch, items_of, update_groups


@answer_foreign_names
class Trainer:
    """Trains and evaluates a model in a loop that you customise by overriding and by callbacks."""

    data_seed: int
    """Seed of the data order of the current or latest run."""
    prediction_padding: float | None = None
    """Fills up dimensions in which the outputs of `predict` differ between batches; None raises an error."""
    trust_engine_files: bool = False
    """Allows loading states of DeepSpeed and old ones of FSDP, though unpickling can run code in them."""
    load_partial_states: bool = False
    """Loads those parts of a state or an export that fit the model by name and shape; prints the others."""
    replay = proving.replay
    run_card = proving.run_card

    def __init__(
        self,
        model: torch.nn.Module,
        loss_func: Callable[[Any, Any], torch.Tensor] | None,
        optimizer: Any,
        callbacks: Iterable[TrainerCallback | type[TrainerCallback]] = DEFAULT_CALLBACKS,
        run_history: RunHistory | None = None,
        *,
        accelerator: Accelerator | None = None,
        seed: int | None = None,
    ) -> None:
        """Hold the parts; nothing is placed, wrapped or seeded before the first run.

        Args:
            loss_func: takes the model's outputs and the targets, and returns the mean loss of the batch, a
                scalar; None if `calculate_train_batch_loss` is overridden.
            optimizer: over the parameters of `model`; None is enough to evaluate.
            callbacks: instances, or classes without arguments; `run_history` keeps what is measured.
            accelerator: your own, for mixed precision, FSDP2, DeepSpeed, trackers; see `create_accelerator`.
            seed: decides the order of the data, and all random numbers from the first run on. None takes the
                seed of the order from `torch.initial_seed()` and seeds nothing.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        check_trainer_class(type(self), optimizer, TrainerCallback)
        checks.check_parts(model, loss_func, optimizer, accelerator)
        checks.check_instance("run_history", run_history, RunHistory, InMemoryRunHistory)
        cpu = torch.device("cpu")  # The real device could touch CUDA before a notebook launches processes.
        self.model = model
        self.loss_func = loss_func
        self.optimizer = optimizer
        self.run_history: RunHistory = InMemoryRunHistory() if run_history is None else run_history
        self.run_progress = RunProgress()
        self.scheduler: Any = None
        self.create_scheduler_fn: Callable[[Any], Any] | None = None
        self.train_dataset: Any = None
        self.eval_dataset: Any = None
        self.collate_fn: Callable[[list[Any]], Any] | None = None
        self.train_dataloader: ShardedDataLoader | None = None
        self.eval_dataloader: ShardedDataLoader | None = None
        """That of the evaluation set named `""`, or else the first; `eval_dataloaders` has all."""
        self.eval_dataloaders: dict[str, ShardedDataLoader] = {}
        self.seed = checks.check_seed(seed)
        self.is_seeded = False
        """Whether `seed` has seeded this process, which happens once."""
        self.run_id: str | None = None
        """Names the run in its checkpoints; a resumed run keeps it."""
        self.last_checkpoint: Path | None = None
        """The newest complete training state of the latest run."""
        self.agreement = Agreement(cpu)
        """What the processes agree on in a run; callbacks may register topics of their own."""
        self.train_loss = LossTracker(cpu)
        self.eval_loss = LossTracker(cpu)
        self._made_accelerator = accelerator
        self._engine: Engine | None = None
        self._run: Run | None = None
        """The current run; None between runs."""
        self._training_run: Run | None = None
        """The latest training run, whose state may be saved afterwards too."""
        self.callbacks = CallbackList(callbacks, self)
        self.callbacks.on_init_end(self)

    # ------------------------------------------------------------------ the loop

    def run_training(self) -> None:
        """Run epochs until the run is done or all processes stop."""
        run, _ = require_training(self._run, "run_training")
        progress = self.run_progress
        self.agreement.collect(blocking=True)  # A callback may have asked to stop at the start.
        saved_state.report_finished(self, run)
        # The state of a run that is finished is still restored in full.
        if self.stop_reason is not None or run.is_finished(progress) or run.evaluates_start(progress):
            saved_state.restore_resume_point(self, run)
        if not run.has_reached_limit(progress):
            progress.reopen_epoch()
        if run.evaluates_start(progress):
            evaluations.evaluate_start(self, run)
        while self.stop_reason is None and not run.is_finished(progress):
            if not progress.updates_completed_in_epoch:  # The state is from between two epochs.
                saved_state.restore_resume_point(self, run)
            if not progress.train_epoch_completed:
                self.run_train_epoch()
            saved_state.restore_resume_point(self, run)  # The state is from before its evaluation.
            if run.phase is Phase.CUT_SHORT or self.agreement.signal_number:  # A signal leaves no time.
                break
            is_evaluated = bool(self.eval_dataloaders) and run.evaluates_epoch(progress, self.stop_reason)
            if is_evaluated and not progress.eval_epoch_completed:
                self.run_eval_epoch(evaluations.own_sets(self))
            complete_epoch(self, run)
        self.training_run_end()
        self.callbacks.on_training_run_end(self)
        self.agreement.collect(blocking=True)  # A signal may have come since.

    def run_train_epoch(self) -> None:
        """Train on what is left of the epoch."""
        run, _ = require_training(self._run, "run_train_epoch")
        progress, loader = self.run_progress, run.loader_to_train
        start_train_epoch(self, run, loader)
        self.train_epoch_start()
        self.callbacks.on_train_epoch_start(self)
        saved_state.restore_resume_point(self, run)  # After the events, in which callbacks reset themselves.
        run.lacks_batches = loader.may_lack_batches
        for group in update_groups(loader, self.run_config, lambda: run.is_over(progress, self.stop_reason)):
            progress.epoch_cut_by_limit = run.has_reached_limit(progress)
            if progress.epoch_cut_by_limit:
                break
            if self.agreement.stop_reason is not None:
                run.phase = Phase.CUT_SHORT
                break
            if run.may_wrap_anew:
                self.model = run.engine.model_to_train()  # A callback may have frozen or unfrozen parameters.
            run.phase = Phase.IN_STEPS
            if run.counts_before_forward:
                group.count_before_forward(self.count_items, run.engine.group.num_processes, self.device)
            for step in group.steps:
                self.run_train_step(step, group)
            run.phase = Phase.IN_UPDATE
            self.run_update(group)
        self.agreement.collect(blocking=True)  # Whether to evaluate has to be decided alike.
        if run.phase is not Phase.CUT_SHORT:
            check_epoch(loader, run.has_weight, run.unchecked_steps)
            record_losses(self.run_history, EvaluationKind("train"), self.train_loss, run.train_logs)
            progress.train_epoch_completed = True
        self.train_epoch_end()
        self.callbacks.on_train_epoch_end(self)

    def run_train_step(self, step: Step, group: UpdateGroup) -> None:
        """Make the forward and the backward pass of the batch of `step`, which belongs to `group`."""
        run = self._run or outside_run("run_train_step")
        run.step, run.group = step, group
        if run.stepped:
            run.clear_stepped()
        if step.is_padding:
            run_padding_step(self, run, step, group)
            return
        self.callbacks.on_train_step_start(self, batch=step.batch)
        with run.engine.synchronize(self.model, step.is_last):  # DDP reduces in the last step of the group.
            output = self.calculate_train_batch_loss(step.batch)
            if output is None or "calculate_train_batch_loss" in run.unchecked_steps:
                check_first_output(self, run, output, "calculate_train_batch_loss", step.batch)
            loss, num_items = output["loss"], items_of(output)
            weight = group.weigh(step, output, num_items)
            self.backward_step(loss if weight is None else loss * weight)
        self.train_loss.update(loss, num_items)  # The mean itself: accumulation does not shrink it.
        if "log" in output:
            run.train_logs.update(output["log"], num_items)
        number = self.run_progress.steps_completed_in_epoch + group.steps_completed - 1  # From 0.
        self.callbacks.on_train_step_end(self, batch=step.batch, batch_output=output, step=number)

    def run_update(self, group: UpdateGroup) -> None:
        """Change the parameters by the gradients of `group`, and count it."""
        run = self._run or outside_run("run_update")
        if run.may_wrap_anew:
            run.engine.average_beside()  # Backward averages the parameters of the model alone.
        scale = None if group.needs_no_weight else run.item_totals.gradient_scale(group, self.device)
        was_skipped = scale is WEIGHS_NOTHING
        if scale is not None and not was_skipped:
            run.engine.scale_gradients(self.model, scale)
        self.callbacks.on_optimizer_step_start(self)
        if not was_skipped:
            if not run.has_weight:
                check_first_update(self, run, Trainer)
                run.has_weight = True
            self.clip_gradients()  # Once an update: clipping each step would clip partial sums.
            run.rollback = None  # Parameters change from here on, and they are not put back.
            self.optimizer_step()
            # A float16 scaler skips gradients that overflow.
            was_skipped = run.engine.may_skip_updates and bool(self.accelerator.optimizer_step_was_skipped)
        if self.scheduler is not None and run.schedule.after_update and not was_skipped:
            self.scheduler_step()
        self.optimizer_zero_grad()
        run.phase = Phase.BETWEEN_UPDATES  # From here on the state may be saved.
        if not (run.are_weights_compared or was_skipped):
            trained_state.compare_weights_once(run)
        self.run_progress.complete_update(group.steps_completed, group.samples_read, was_skipped)
        self.run_history.current_update = self.run_progress.updates_completed
        self.agreement.collect()  # The message of the update before, so nobody waits for it.
        self.callbacks.on_optimizer_step_end(self)
        self.agreement.launch()  # After the event, so that it carries what callbacks flag there.

    def run_eval_epoch(
        self,
        dataset: Any = None,
        metric_prefix: str = "eval",
        is_intermediate: bool = False,
        *,
        model: torch.nn.Module | None = None,
        dataloader: Any = None,
    ) -> None:
        """Evaluate on `dataset`, or on all evaluation sets. Every process takes part.

        Sums are kept by process and added once at the end, so that no sample counts twice and none is left
        out. In a training run the random state is put back.

        Args:
            dataset: data or a ready loader, or several by name, which the trainer shards; None takes the sets
                of the run, or inside `on_evaluation_end` those of the evaluation that has ended.
            metric_prefix: begins the names of the losses that are recorded, after the name of the set.
            is_intermediate: the evaluation happens between two updates of an epoch.
            model: is evaluated in place of the trainer's, such as an average of its weights.
            dataloader: the former name of `dataset`, which 0.2 removes.
        """
        run = self._run or outside_run("run_eval_epoch")
        dataset = take_old_name("run_eval_epoch", "dataset", dataset, "dataloader", dataloader)
        kind = EvaluationKind(metric_prefix, is_intermediate)
        completes = kind.completes_epoch and run.completes_evaluation(self.run_progress) and model is None
        sets = loaders.sets_to_evaluate(self, dataset)
        with preparing.standing_in(self, model):
            for number, (name, part) in enumerate(sets.items()):
                if completes and number < self.run_progress.eval_sets_completed:
                    continue
                run.is_between_sets = model is not None or (is_intermediate and number + 1 < len(sets))
                self._run_eval_set(run, part, kind.of_set(name), len(sets) if completes else None)
        if is_intermediate and model is None:
            evaluations.end_evaluation(self, run, kind, sets)

    def _run_eval_set(self, run: Run, dataset: Any, kind: EvaluationKind, num_sets: int | None) -> None:
        """Evaluate on one set; `num_sets` belong to the evaluation of the epoch, or None if it is another."""
        logs = MeanTrackers(self.device)
        event: dict[str, Any] = {"is_intermediate": kind.is_intermediate, "metric_prefix": kind.full_prefix}
        with loaders.loader_to_evaluate(self, run, dataset, kind.set_name) as loader:
            with preparing.evaluating(self, run):
                self.eval_epoch_start()
                self.callbacks.on_eval_epoch_start(self, **event)
                for step in run.eval_steps(loader, kind.is_intermediate):
                    self.run_eval_step(step, logs)
            report_left_out(loader)
            record_losses(self.run_history, kind, self.eval_loss, logs)
            if num_sets is not None:
                self.run_progress.complete_eval_set(num_sets)
            with self.run_history.added_prefix(kind.metric_prefix):
                self.eval_epoch_end()
                self.callbacks.on_eval_epoch_end(self, **event)

    def run_eval_step(self, step: Step, logs: MeanTrackers) -> None:
        """Make the forward pass of `step`, and add to `logs`; the result of a padding step is thrown away."""
        run = self._run or outside_run("run_eval_step")
        run.step = step
        if step.is_padding:
            if run.engine.has_collective_forward and step.batch is not None:
                self.calculate_eval_batch_loss(step.batch)
            return
        self.callbacks.on_eval_step_start(self, batch=step.batch)
        output = self.calculate_eval_batch_loss(step.batch)
        if output is None or "calculate_eval_batch_loss" in run.unchecked_steps:
            check_first_output(self, run, output, "calculate_eval_batch_loss", step.batch)
        self.eval_loss.update(output["loss"], items_of(output))
        if "log" in output:
            logs.update(output["log"], items_of(output))
        self.callbacks.on_eval_step_end(self, batch=step.batch, batch_output=output)

    # ------------------------------------------------------------------ what you may override

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        """Return `loss` (mean over the batch), `batch_size`, and for callbacks `model_outputs` of a batch.

        The batch is `(inputs, targets)` unless this is overridden. Callbacks get further keys.
        `num_items_in_batch` says that the loss is the mean over that many items, such as tokens. Scalars
        in the dictionary `log` are averaged and recorded as `train_<name>_epoch`, in `progress` only shown.
        """
        inputs, targets = unpack_batch(batch)
        return create_batch_output(self, self.loss_func, inputs, self.model(inputs), targets)

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        """Return the same of `batch` as `calculate_train_batch_loss`, without gradients.

        By default it is what `Trainer` computes for `(inputs, targets)`, also if your class trains otherwise:
        what regularises training must not leak into an evaluation. Override it to return your own loss.
        """
        return Trainer.calculate_train_batch_loss(self, batch)

    def calculate_predictions(self, batch: Any) -> Any:
        """Return the outputs for a batch.

        The default calls the model with the first element of a tuple, or with the batch itself.
        """
        return self.model(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def count_items(self, batch: Any) -> float | None:
        """Return the items of a batch that its loss is the mean of; None leaves it to the forward pass.

        Engines that step inside backward need it for losses that are no mean over samples. By default it
        counts the targets of the cross entropies of torch.
        """
        return count_targets(self.loss_func, batch)

    def backward_step(self, loss: torch.Tensor) -> None:
        """Compute gradients; `loss` already carries its weight within the update."""
        run = self._run or outside_run("backward_step")
        run.engine.backward(loss)

    def clip_gradients(self) -> None:
        """Clip the gradients of the update, by value and by norm, as `train` was told."""
        run = self._run or outside_run("clip_gradients")
        value, norm = self.run_config.gradient_clip_value, self.run_config.gradient_clip_norm
        if value is not None or norm is not None:
            run.engine.clip_gradients(self.model, value, norm)

    def optimizer_step(self) -> None:
        """Change the parameters."""
        (self._run or outside_run("optimizer_step")).engine.optimizer.step()

    def step_optimizer(
        self,
        optimizer: Any,
        gradient_clip_norm: float | None = None,
        gradient_clip_value: float | None = None,
    ) -> None:
        """Step a further optimizer among the attributes of the trainer. Every process takes part.

        Averages its gradients over the processes, unscales those of float16, clips them by
        `gradient_clip_norm` and `gradient_clip_value`, steps it and the scheduler whose `optimizer` it is,
        and clears its gradients, also of what the loss of the same step adds later.
        """
        run = self._run or outside_run("step_optimizer")
        run.step_optimizer(optimizer, gradient_clip_norm, gradient_clip_value)

    def scheduler_step(self) -> None:
        """Step the scheduler after an update or an epoch, as `train` was told, with the metric it needs."""
        run = self._run or outside_run("scheduler_step")
        if self.scheduler is None:
            return
        if run.is_in_update:
            self.scheduler.step()
        else:
            run.schedule.step_after_epoch(self.scheduler, self.run_history, self.run_progress)

    def optimizer_zero_grad(self) -> None:
        """Clear the gradients after an update."""
        (self._run or outside_run("optimizer_zero_grad")).engine.zero_grad()

    def training_run_start(self) -> None:
        """Act when all is prepared; does nothing."""

    def train_epoch_start(self) -> None:
        """Act when an epoch of training begins; puts all that has modes in train mode, so call `super()`.

        Modules that were in eval mode while the model was in train mode stay so.
        """
        modes.put_in_train_mode(self, self._run or outside_run("train_epoch_start"))

    def train_epoch_end(self) -> None:
        """Act when an epoch of training ends; does nothing."""

    def eval_epoch_start(self) -> None:
        """Act when an evaluation begins; puts the model in eval mode, so call `super()`."""
        if self.model.training:
            self.model.eval()

    def eval_epoch_end(self) -> None:
        """Act when an evaluation ends; does nothing.

        What is recorded here is named like the metrics of callbacks: `accuracy` in a training run,
        `intermediate_accuracy` in mid-epoch, `ema_model_accuracy` for averaged weights, `evaluation_accuracy`
        by `evaluate`.
        """

    def training_run_epoch_end(self) -> None:
        """Act when training and evaluation of an epoch are done; does nothing."""

    def training_run_end(self) -> None:
        """Act at the normal end of a training run, or after an agreed stop; does nothing."""

    def evaluation_run_start(self) -> None:
        """Act when `evaluate` begins; does nothing."""

    def evaluation_run_end(self) -> None:
        """Act when `evaluate` is done; does nothing."""

    # ------------------------------------------------------------------ what you may create

    def create_accelerator(self) -> Accelerator:
        """Return the `Accelerator` of this trainer; called when it is first needed."""
        return Accelerator()

    def prepare(self) -> None:
        """Place and wrap `self.model` and `self.optimizer`; override it to prepare more, with `super()`."""
        self.model, self.optimizer = self.engine.prepare(self.model, self.optimizer)

    def get_default_train_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        """Return defaults of the training `DataLoader` for `batch_size`; `train_dataloader_kwargs` win."""
        return default_dataloader_kwargs(self.train_dataset, batch_size, True, self.accelerator)

    def get_default_eval_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        """Return defaults of the evaluation `DataLoader` for `batch_size`; `eval_dataloader_kwargs` win."""
        return default_dataloader_kwargs(self.eval_dataset, batch_size, False, self.accelerator)

    def create_train_dataloader(self, batch_size: int, train_dl_kwargs: dict[str, Any] | None = None) -> Any:
        """Return a loader for one process by `batch_size` and `train_dl_kwargs`; the trainer shards it."""
        defaults = self.get_default_train_dl_kwargs(batch_size)
        return create_dataloader(self.train_dataset, defaults, train_dl_kwargs, self.collate_fn)

    def create_eval_dataloader(self, batch_size: int, eval_dl_kwargs: dict[str, Any] | None = None) -> Any:
        """Return a loader for one process by `batch_size` and `eval_dl_kwargs`; the trainer shards it."""
        defaults = self.get_default_eval_dl_kwargs(batch_size)
        return create_dataloader(self.eval_dataset, defaults, eval_dl_kwargs, self.collate_fn)

    def create_scheduler(self) -> Any:
        """Return the scheduler of the run or None; gives placeholders in `create_scheduler_fn` values."""
        run, _ = require_training(self._run, "create_scheduler")
        if self.create_scheduler_fn is None:
            return None
        create_scheduler_fn = resolve_placeholders(self.create_scheduler_fn, self.run_config)
        return build_scheduler(create_scheduler_fn, run.prepared.user_optimizer)

    def create_run_config(self, **arguments: Any) -> TrainerRunConfig:
        """Return the numbers of the run, from the `arguments` of `train` and the loaders."""
        run, _ = require_training(self._run, "create_run_config")
        loaders = (self.train_dataloader, self.eval_dataloader)
        return plan_run(arguments, *loaders, self.accelerator, run.engine.group, self.data_seed)

    # ------------------------------------------------------------------ entering

    def train(
        self,
        train_dataset: Any,
        num_epochs: int | None = None,
        eval_dataset: Any = None,
        per_device_batch_size: int = 8,
        max_num_train_steps: int | None = None,
        gradient_accumulation_steps: int = 1,
        gradient_clip_value: float | None = None,
        create_scheduler_fn: Callable[[Any], Any] | None = None,
        train_dataloader_kwargs: dict[str, Any] | None = None,
        eval_dataloader_kwargs: dict[str, Any] | None = None,
        reset_run_history: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        resume_from: str | Path | None = None,
        *,
        gradient_clip_norm: float | None = None,
        eval_per_device_batch_size: int | dict[str, int] | None = None,
        eval_every_n_epochs: int = 1,
        eval_at_start: bool = False,
        scheduler_step_every: str = "update",
        scheduler_metric: str = "eval_loss_epoch",
        seed_each_sample: bool = False,
        data_is_sharded: bool = False,
    ) -> RunHistory:
        """Train until the first limit, an agreed stop or an error, and return the run history.

        Args:
            train_dataset: map-style or iterable data, or a ready `DataLoader`.
            num_epochs: passes over the data. This or `max_num_train_steps` is needed; the smaller wins.
            eval_dataset: evaluated after each epoch; several by name, as `{"": main, "shifted": other}`.
            per_device_batch_size: samples in a step of one process.
            max_num_train_steps: limit in updates. Both limits count from the beginning of the call, in a
                resumed run from that of the call that is resumed.
            gradient_accumulation_steps: steps of each process in an update.
            gradient_clip_value: largest absolute value of an element of a gradient.
            create_scheduler_fn: makes a scheduler of the optimizer; may hold `TrainerPlaceholderValues`.
            train_dataloader_kwargs: of torch's `DataLoader`, as is `collate_fn`; they replace the defaults.
            reset_run_history: begin a new run with an empty history. False continues with the run before, if
                there is one: history, epochs and updates continue, as its next stage. A resumed run keeps it.
            resume_from: a folder of `save_training_state`; None starts afresh. If its state is of a later
                stage, this call does nothing; if it is of an earlier one, the call begins its own.
            gradient_clip_norm: largest L2 norm of all gradients together.
            eval_per_device_batch_size: `per_device_batch_size` if None. This and `eval_dataloader_kwargs`
                may be given by the names of the evaluation sets.
            eval_every_n_epochs: counted from the beginning of the run; the last epoch is always evaluated.
            eval_at_start: evaluate before the first update too, with epoch and update 0 in the history.
            scheduler_step_every: `"update"`, `"epoch"`, or `"evaluation"`, in mid-epoch too. A scheduler
                whose `step` needs a metric steps after every epoch or evaluation that recorded it; one with
                `step_epoch` too steps after every update, and by it after every epoch.
            scheduler_metric: the metric of the run history for a scheduler that needs one after an epoch.
            seed_each_sample: seed python, numpy and torch for each sample from (seed, order epoch, index);
                the samples of every evaluation like those of the first epoch.
            data_is_sharded: each process brings its own share of the data, which is not sharded again.

        Raises:
            ConfigurationError: an argument cannot be used; nothing was changed.
            CheckpointError: `resume_from` is no complete state.
            RunInterrupted: a signal ended the run, after its state was saved.
        """
        # The parameters of this method are the fields of `TrainArguments`, which checks them.
        given = {name: value for name, value in locals().items() if name != "self"}
        arguments = entering.check_training(self, given, Trainer)
        start = choose_start(self, arguments)
        if start.is_skipped:
            skip_stage(self, arguments, start)
            return self.run_history
        with preparing.running(self, Run(self.engine, arguments, None, start.known_states)) as run:
            self._training_run = run
            self.train_dataset, self.eval_dataset, self.collate_fn = train_dataset, eval_dataset, collate_fn
            self.create_scheduler_fn = create_scheduler_fn
            preparing.begin_training(self, run, arguments, start, Trainer)
            self.training_run_start()
            self.callbacks.on_training_run_start(self)
            trained_state.find_made_at_start(run)
            if start.folder is not None and start.state is not None:  # After the event that resets callbacks.
                saved_state.begin_resuming(self, run, arguments, start.folder, start.state)
            self.run_training()
        if self.agreement.signal_received:  # Raised only now, when everything is closed.
            raise RunInterrupted(self.agreement.signal_received, self.last_checkpoint)
        return self.run_history

    def evaluate(
        self,
        dataset: Any = None,
        per_device_batch_size: int | dict[str, int] = 8,
        dataloader_kwargs: dict[str, Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        *,
        data_is_sharded: bool = False,
    ) -> dict[str, float]:
        """Evaluate the model and return the metrics of this evaluation; they are added to the run history.

        Args:
            dataset: like `eval_dataset` of `train`, also several by name; `data_is_sharded` is as there.
                None takes the evaluation data of the latest run.
            per_device_batch_size: of all sets, or by name, as `dataloader_kwargs`; `collate_fn` is of all.
        """
        entering.check_can_run(self, "evaluate", "calculate_eval_batch_loss", Trainer)
        given = (dataset, per_device_batch_size, dataloader_kwargs, collate_fn, data_is_sharded)
        return evaluations.evaluate(self, *given)

    def predict(
        self,
        dataset: Any,
        per_device_batch_size: int = 8,
        dataloader_kwargs: dict[str, Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        *,
        data_is_sharded: bool = False,
        on: str = "all",
        outputs: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Return the outputs of `calculate_predictions` for the whole `dataset`, on the CPU.

        They are in the order of the data, or with `data_is_sharded` in that of the processes. Tensors are
        joined on the first dimension. Lists of mappings or plain values have one item per sample.
        `per_device_batch_size`, `dataloader_kwargs` and `collate_fn` are as for `evaluate`.

        Args:
            on: `"all"`, or `"main"` to join them on the main process only, and return None on the others.
            outputs: what is kept of the outputs of a batch, such as `lambda logits: logits.argmax(1)`.
        """
        entering.check_can_run(self, "predict")
        given = (dataset, per_device_batch_size, dataloader_kwargs, collate_fn, data_is_sharded)
        return predicting.predict(self, EvaluationArguments(*given), on, outputs)

    def iterate_predictions(
        self,
        dataset: Any,
        per_device_batch_size: int = 8,
        dataloader_kwargs: dict[str, Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> Iterator[tuple[torch.Tensor, Any]]:
        """Yield indices of samples and their outputs, batch by batch; the arguments are those of `predict`.

        The outputs are on the CPU, and nothing is gathered: a process has its own share, in the order of the
        data. Every process takes part when the loop begins. On several processes the data needs a length.
        """
        entering.check_can_run(self, "iterate_predictions")
        arguments = EvaluationArguments(dataset, per_device_batch_size, dataloader_kwargs, collate_fn)
        return predicting.iterate(self, arguments)

    def load_training_state(self, input_dir: str | Path) -> dict[str, Any]:
        """Restore what `save_training_state` saved; return its `checkpoint_kwargs`. Every process takes part.

        To continue a run use `train(..., resume_from=input_dir)`, which finds the position in the data too.
        """
        entering.check_can_run(self, "load_training_state")
        with preparing.running(self, self._training_run or Run(self.engine)) as run:
            return saved_state.load_run(self, run, input_dir)

    # ------------------------------------------------------------------ stopping

    def request_stop(self, reason: str, signal_number: int = 0) -> None:
        """Ask all processes to stop after the current update, which is the same for all.

        Args:
            reason: what `stop_reason` is on every process.
            signal_number: the signal behind it, if any; `train` raises `RunInterrupted` once all is closed.
        """
        _ = self._run or outside_run(f"request_stop({reason!r})")
        self.agreement.flag_stop(reason, signal_number)

    @property
    def stop_reason(self) -> str | None:
        """Return why all processes stop, once they agree; None in a run that ends by its own limits."""
        return self.agreement.stop_reason

    # --------------------------------------------------------- saving and loading: every process takes part

    def save_checkpoint(
        self,
        save_path: str | Path,
        checkpoint_kwargs: dict[str, Any] | None = None,
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        *,
        model: torch.nn.Module | None = None,
    ) -> None:
        """Export the model to `save_path`, also an address, atomically; `.safetensors` has weights alone.

        The keys are `model_state_dict`, `optimizer_state_dict` if `save_optimizer`, `scheduler_state_dict`
        if `save_scheduler`, and those of `checkpoint_kwargs`. The main process writes; engines that shard
        leave the optimizer out. Raises `CheckpointError` if parameters are not finite: nothing has changed.

        Args:
            model: is exported in place of the trainer's, such as an average of its weights.
        """
        model = self.model if model is None else model
        exports.save_export(self, save_path, checkpoint_kwargs, save_optimizer, save_scheduler, model)

    def load_checkpoint(
        self, checkpoint_path: str | Path, load_optimizer: bool = True, load_scheduler: bool = True
    ) -> dict[str, Any]:
        """Load and return the export at `checkpoint_path` by `load_optimizer` and `load_scheduler`."""
        return exports.load_export(self, checkpoint_path, load_optimizer, load_scheduler)

    def create_model_state(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return what exports and states hold of the unwrapped model: its `state_dict()`, or enough of it."""
        return model.state_dict()

    def load_model_state(self, model: torch.nn.Module, state: dict[str, Any]) -> None:
        """Load `state` of `create_model_state`; raise `RuntimeError` or `KeyError` for another model's."""
        model.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values of your subclass to save with the training state, for each process."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, which `state_dict` returned; called twice, like that of a callback."""

    def save_training_state(
        self, output_dir: str | Path, checkpoint_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Save all that resuming needs as the folder `output_dir`, complete or not at all.

        Call it between updates. It does nothing if the state of this very update and epoch stands there.

        Args:
            checkpoint_kwargs: your own plain values, which `load_training_state` returns.

        Raises:
            CheckpointError: it could not be written, or parameters are not finite; what was there stays.
        """
        saved_state.save_run(self, self._training_run, output_dir, checkpoint_kwargs)

    # ------------------------------------------------------------------ processes

    @functools.cached_property  # Each run assigns a value; reading it before the first one raises.
    def run_config(self) -> TrainerRunConfig:
        """Return the numbers of the current or latest run, which sets them."""
        raise AttributeError("run_config is known from the first run on. Call train or evaluate before.")

    @property
    def accelerator(self) -> Accelerator:
        """Return the accelerator, which is made when it is first asked for."""
        if self._made_accelerator is None:
            self._made_accelerator = self.create_accelerator()
        return self._made_accelerator

    @property
    def engine(self) -> Engine:
        """Return what runs the steps (one process, DDP, FSDP2, DeepSpeed), chosen when first asked for."""
        if self._engine is None:
            self._engine = choose_engine(self.accelerator, data_group(self.accelerator))
        return self._engine

    @property
    def data_group(self) -> DataGroup:
        """Return how many processes share the data, and which of them this is."""
        return self.engine.group

    @property
    def device(self) -> torch.device:
        """Return where this process computes."""
        return self.accelerator.device  # type: ignore[no-any-return]

    @property
    def is_main_process(self) -> bool:
        """Whether this process prints and writes, once for the whole job."""
        return self.engine.group.is_main

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print `args` on the main process, with the `kwargs` of `print`."""
        if self.is_main_process:
            print(*args, **kwargs)  # noqa: T201

    def gather(self, tensor: torch.Tensor, padding_value: float | None = None) -> torch.Tensor:
        """Join the tensors of `data_group` on the first dimension, of any size. Every process takes part.

        Inside a step it raises `ConfigurationError` if a process may have no batch there, or for a tensor
        that would lose its gradient. `padding_value` fills up other dimensions where they differ.
        """
        if self._run is not None:
            self._run.check_gather(tensor)
        return gather_tensor(tensor, padding_value, self.engine.group)

    def gather_with_grad(self, tensor: torch.Tensor) -> torch.Tensor:
        """Join each `tensor` `(rows, ...)` with gradients, which backward sums: for contrastive losses."""
        return gather_with_grad(tensor, self.engine.group, self._run.check_collective if self._run else None)

    def get_model(self, keep_torch_compile: bool = True) -> torch.nn.Module:
        """Return the model without wrappers, but with that of torch.compile if `keep_torch_compile`."""
        return unwrap_model(self.accelerator, self.model, keep_torch_compile)

    __repr__ = describe_briefly

    def describe(self) -> str:
        """Return what will happen or has happened: data, updates, precision, processes, callbacks."""
        config = None if self._training_run is None else self.run_config
        return describe_run(self, describe_counting(self, Trainer), config)
