"""The loop. A level of nesting is a method:

    train                        check, build and prepare, resume, then
      run_training               for each epoch: run_train_epoch, run_eval_epoch
        run_train_epoch          for each group of batches of one update: run_train_step for each, then
          run_update run_train_step         forward and backward; no synchronisation before the last step of
          the group run_update             clip, optimizer, scheduler, zero the gradients, count
        run_eval_epoch           exact on any number of processes
    evaluate, predict

A *step* is forward and backward of one batch on one process. An *update* is one step of the optimizer, made
of up to `gradient_accumulation_steps` steps on every process. Everything that counts or limits counts
updates.
"""

from __future__ import annotations

import contextlib
import secrets
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, default_collate

from .callbacks.limit_batches import limit_loaders
from .checks.arguments import check_attributes, check_can_run, check_trainable
from .data.loader import ShardedDataLoader
from .engines.engine import Prepared
from .engines.sharded import (
    LEFT_TO_ENGINE,
    check_left_to_engine,
    completed_config,
    has_collective_forward,
    has_own_backward,
    set_clipping,
)
from .engines.step_calls import choose_step_calls
from .engines.weights import (
    check_accelerator,
    evaluation_mode,
    move_modules,
    multiply_gradients,
    preserving_buffers_and_rng,
    renew_step,
)
from .errors import AccelWarning, ConfigurationError, RunInterrupted
from .processes.agreement import Agreement
from .processes.collectives import broadcast_object, run_on_main
from .processes.shutdown import check_processes
from .run.batch_output import call_loss, check_batch_output, num_samples_in, unpack_batch, with_hint
from .run.evaluation_kind import name_prefix
from .run.loss_tracker import LossTracker, MeanTrackers
from .run.predictions import join_over_processes, to_cpu
from .run.rollback import Rollback
from .run.run import note_failures_on
from .run.run_config import check_same_on_all, plan_run
from .run.run_history import RunHistory
from .run.run_progress import RunProgress
from .run.scheduling import scheduler_interval
from .run.train_arguments import check_evaluation_arguments, check_train_arguments
from .run.update_groups import ItemTotals, Step, UpdateGroup, eval_steps, is_unequal, items_of, update_groups
from .saving_trainer import SavingTrainer
from .state import files
from .state.checkpoint import TrainerState, open_training_state
from .state.random import preserving_random_state, seed_process


class Trainer(SavingTrainer):
    """A training loop around a model, a loss function and an optimizer, customised by overriding and by callbacks.

    Saving is in `SavingTrainer`; construction, the parts that you may create and what concerns processes in
    `BaseTrainer`.
    """

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
        eval_per_device_batch_size: int | None = None,
        scheduler_step_every: str = "update",
        scheduler_metric: str = "eval_loss_epoch",
        seed_each_sample: bool = False,
    ) -> RunHistory:
        """Train until the first limit, an agreed stop or an error, and return the run history.

        Args:
            train_dataset: map-style or iterable data, or a ready `DataLoader`.
            num_epochs: passes over the data; this or `max_num_train_steps` is needed, and the smaller ends
                the run.
            eval_dataset: evaluated after each epoch.
            per_device_batch_size: samples in a step of one process.
            max_num_train_steps: limit in updates. On resuming, both limits are totals.
            gradient_accumulation_steps: steps of each process in an update.
            gradient_clip_value: largest absolute value of an element of a gradient.
            create_scheduler_fn: from the optimizer to a scheduler; a partial may hold
                `TrainerPlaceholderValues`.
            train_dataloader_kwargs: arguments of torch's `DataLoader`, which win over the defaults.
            reset_run_history: begin with an empty history; a resumed run always keeps it.
            resume_from: a folder of `save_training_state`; None starts afresh.
            gradient_clip_norm: largest L2 norm of all gradients together.
            eval_per_device_batch_size: `per_device_batch_size` if None.
            scheduler_step_every: `"update"` or `"epoch"`; one whose `step` needs a metric steps every epoch,
                and one that has `step_epoch` too is stepped after every update, and by `step_epoch` at the
                end of every epoch.
            scheduler_metric: the metric of the run history for a scheduler that needs one at the end of an
                epoch.
            seed_each_sample: seed python, numpy and torch for each sample from (seed, epoch, index); the
                samples of every evaluation like those of the first epoch.

        Raises:
            ConfigurationError: an argument cannot be used; nothing was changed.
            CheckpointError: `resume_from` is no complete state.
            RunInterrupted: a signal ended the run, after its state was saved.
        """
        arguments = {
            name: value
            for name, value in locals().items()
            if name not in ("self", "train_dataset", "eval_dataset")
        }
        self._check_can_run("train", "calculate_train_batch_loss")
        if eval_dataset is not None:
            self._check_can_run("train", "calculate_eval_batch_loss")
        check_train_arguments(train_dataset, eval_dataset, arguments)
        # DeepSpeed has exchanged what the optimizer holds when it was prepared.
        if self._prepared is None or not has_own_backward(self.accelerator):
            check_trainable(self.model, self.optimizer, vars(self))
        # The main process's choice counts: disks of several machines may not show the same folder as the
        # newest.
        resume_from, state = run_on_main(
            lambda: (resume_from, resume_from and open_training_state(resume_from)), self.is_main_process
        )
        with self._running():
            self.train_dataset, self.eval_dataset, self.collate_fn = train_dataset, eval_dataset, collate_fn
            self.create_scheduler_fn = create_scheduler_fn
            self._begin_training(arguments, state)
            self.training_run_start()
            self.callbacks.on_training_run_start(self)
            if resume_from is not None and state is not None:
                self._tell_differences(state)
                self._restore_objects(Path(resume_from), state)
            self.run_training()
        if self.agreement.signal_number:
            raise RunInterrupted(self.agreement.signal_number, self.last_checkpoint)
        return self.run_history

    def evaluate(
        self,
        dataset: Any = None,
        per_device_batch_size: int = 8,
        dataloader_kwargs: dict[str, Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> dict[str, float]:
        """Evaluate the model and return the metrics of this evaluation; they are added to the run history.

        Args:
            dataset: like that of `train`; None takes the evaluation data of the latest run.
        """
        self._check_can_run("evaluate", "calculate_eval_batch_loss")
        own_collate_fn = self.collate_fn if dataset is None and collate_fn is None else collate_fn
        dataset = self.eval_dataset if dataset is None else dataset
        check_evaluation_arguments(dataset, per_device_batch_size, dataloader_kwargs, collate_fn)
        with self._running():
            loader = self._begin_evaluation(dataset, per_device_batch_size, dataloader_kwargs, own_collate_fn)
            num_records = len(self.run_history.get_records())
            self.evaluation_run_start()
            self.callbacks.on_evaluation_run_start(self)
            self.run_eval_epoch(loader, metric_prefix="evaluation")
            self.evaluation_run_end()
            self.callbacks.on_evaluation_run_end(self)
            records = self.run_history.get_records()[num_records:]
        return {record["name"]: record["value"] for record in records}

    def predict(
        self,
        dataset: Any,
        per_device_batch_size: int = 8,
        dataloader_kwargs: dict[str, Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> Any:
        """Return what `calculate_predictions` gives for the whole data set, in its order, on the CPU, on every process.

        The structure is that of one batch; tensors are joined on the first dimension. A list of mappings or
        plain values has one item a sample, as detectors give them.
        """
        self._check_can_run("predict")
        check_evaluation_arguments(dataset, per_device_batch_size, dataloader_kwargs, collate_fn)
        with self._running():
            loader = self._begin_evaluation(dataset, per_device_batch_size, dataloader_kwargs, collate_fn)
            with self._evaluating():
                outputs = [
                    (to_cpu(self.calculate_predictions(step.batch)), step.is_idle)
                    for step in self._eval_steps(loader)
                ]
                real = [output for output, is_idle in outputs if not is_idle]
                return join_over_processes(real, self.prediction_padding)

    def load_training_state(self, input_dir: str | Path) -> dict[str, Any]:
        """Restore what `save_training_state` saved, and return its `checkpoint_kwargs`.

        Every process takes part.

        To go on with a run use `train(..., resume_from=input_dir)`, which also finds the place in the data.
        """
        self._check_can_run("load_training_state")
        input_dir, state = run_on_main(
            lambda: (input_dir, open_training_state(input_dir)), self.is_main_process
        )
        extra: dict[str, Any] = files.read_object(Path(input_dir) / "extra.pt", dict)
        with self._running():
            self._begin_run(state, is_training=True)
            self._prepare_once()
            self._restore_objects(Path(input_dir), state)
            self._restore_place()
        return extra

    def _check_can_run(self, method: str, calculation: str | None = None) -> None:
        is_own = calculation is None or getattr(type(self), calculation) is not getattr(Trainer, calculation)
        check_can_run(
            method, self._is_running, calculation if self.loss_func is None and not is_own else None
        )
        check_attributes(vars(self), self.model)

    def _begin_training(self, arguments: dict[str, Any], state: TrainerState | None) -> None:
        """Build everything that a training run needs; what takes long comes last."""
        self._arguments = arguments
        self._begin_run(state, is_training=True)
        batch_size = arguments["per_device_batch_size"]
        eval_batch_size = arguments["eval_per_device_batch_size"] or batch_size
        train_loader = self.create_train_dataloader(batch_size, arguments["train_dataloader_kwargs"])
        self.train_dataloader = self._shard(train_loader, arguments["seed_each_sample"])
        self.eval_dataloader = None
        if self.eval_dataset is not None:
            eval_loader = self.create_eval_dataloader(eval_batch_size, arguments["eval_dataloader_kwargs"])
            self.eval_dataloader = self._shard(eval_loader, arguments["seed_each_sample"])
        for told in limit_loaders(self.callbacks, self.train_dataloader, self.eval_dataloader):
            self.print(told)
        check_same_on_all(arguments, train_dataset=self.train_dataloader, eval_dataset=self.eval_dataloader)
        self.run_config = self.create_run_config(**arguments)
        overridden = [
            name for name in LEFT_TO_ENGINE if getattr(type(self), name) is not getattr(Trainer, name)
        ]
        self._counts_ahead = type(self).count_items is not Trainer.count_items
        has_plan = self.train_dataloader.is_sized or self._counts_ahead
        check_left_to_engine(self.accelerator, overridden, arguments, has_plan)
        self.agreement = Agreement(self.device)
        self._prepare_once()
        set_clipping(self.accelerator, self.model, arguments["gradient_clip_norm"])
        self.train_loss, self._train_logs = LossTracker(self.device), MeanTrackers(self.device)
        self._is_first_step, self._is_cut_short = True, False
        self._way.zero_grad()
        # A scheduler watches the step of the optimizer that it was made for, which has to be the one that
        # steps.
        self.optimizer, prepared_optimizer = self._prepared_parts().user_optimizer, self.optimizer
        self.scheduler = self.create_scheduler()
        self.optimizer = prepared_optimizer
        renew_step(self.optimizer)
        interval = scheduler_interval(self.scheduler, arguments, self.eval_dataset)
        self._scheduler_interval, self._scheduler_needs_metric = interval
        has_own_collate = not (
            isinstance(train_loader, DataLoader) and train_loader.collate_fn is default_collate
        )
        self._counts = ItemTotals(
            has_own_collate or not self.train_dataloader.is_sized, self.accelerator.num_processes
        )
        self.run_progress = RunProgress()
        if arguments["reset_run_history"] and state is None:
            self.run_history.reset()
        self.run_id = state["run_id"] if state is not None else broadcast_object(secrets.token_hex(6))
        self.last_checkpoint = None

    def _begin_evaluation(
        self, dataset: Any, batch_size: int, kwargs: Any, collate_fn: Any
    ) -> ShardedDataLoader:
        """Build what an evaluation needs, and leave the data of the latest training run as it is."""
        self._begin_run(None)
        kept, self.eval_dataset, self.collate_fn = (self.eval_dataset, self.collate_fn), dataset, collate_fn
        try:
            loader = self._shard(self.create_eval_dataloader(batch_size, kwargs))
        finally:
            self.eval_dataset, self.collate_fn = kept
        for told in limit_loaders(self.callbacks, None, loader):
            self.print(told)
        check_same_on_all({}, dataset=loader)
        if not self._arguments:
            self.run_config = plan_run(
                {"eval_dataloader_kwargs": kwargs}, None, loader, self.accelerator, self.data_seed
            )
        self._prepare_once()
        return loader

    def _begin_run(self, state: TrainerState | None, is_training: bool = False) -> None:
        """Choose the seed, and check that the processes are as they should be."""
        check_processes(self.accelerator.num_processes)
        check_accelerator(self.accelerator)
        if self.seed is not None and not self._is_seeded:
            seed_process(self.seed, self.accelerator.process_index)
            self._is_seeded = True
        own_seed = broadcast_object(torch.initial_seed() if self.seed is None else self.seed)
        if (
            is_training or not self._arguments
        ):  # An evaluation leaves the seed of the run before, which may yet be saved.
            self.data_seed = state["seed"] if state is not None else own_seed
        self.eval_loss, self._is_first_eval_step = LossTracker(self.device), True
        self._place = None

    def _prepare_once(self) -> None:
        """Place and wrap model and optimizer, unless they are those of the run before."""
        if self._prepared is None or not self._prepared.is_of(self.model, self.optimizer):
            self.callbacks.on_prepare_start(self)
            user_parts = (self.model, self.optimizer)
            with completed_config(self.accelerator, self._arguments.get("per_device_batch_size", 1)):
                self.prepare()
            self._prepared = Prepared(*user_parts, self.model, self.optimizer)
        self.model, self.optimizer = self._prepared.model, self._prepared.optimizer
        move_modules(vars(self), self.device)
        self._way = choose_step_calls(self.accelerator, self.optimizer)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Close everything at the end, and give the user's own model and optimizer back."""
        self._before = Rollback(self.model, self.optimizer, self.run_history, self.device)
        self._is_running, self._is_in_update = True, False
        model, optimizer, was_seeded, prepared = self.model, self.optimizer, self._is_seeded, self._prepared
        try:
            yield
        except BaseException as raised:
            error = with_hint(raised)
            with note_failures_on(error):
                self.callbacks.on_exception(self, error=error)
            with note_failures_on(error):
                self.callbacks.on_run_close(self)
            if optimizer is not None:
                optimizer.zero_grad()
            if self._before is not None:
                self._before.restore()
                self._is_seeded = was_seeded
            raise error from error.__cause__
        else:
            self.callbacks.on_run_close(self)
        finally:
            while self._open_loaders:
                self._open_loaders.pop().close()
            self._is_running, self._before, self._unequal_step = False, None, None
            if self._prepared is not None and self._prepared is not prepared:
                model, optimizer = self._prepared.user_model, self._prepared.user_optimizer
            self.model, self.optimizer = model, optimizer

    # ------------------------------------------------------------------ the loop

    def run_training(self) -> None:
        """Run epochs until the run is done or all processes stop."""
        progress = self.run_progress
        self.agreement.read(wait=True)
        if self._place is not None and self._is_finished():
            self.print(
                f"The run in {self._place_folder} is finished after {progress.updates_completed} updates: "
                "nothing to do."
            )
        if self._is_done():
            self._restore_place()
        if not self._has_reached_limit():
            progress.reopen_epoch()
        while not self._is_done():
            if not progress.updates_completed_in_epoch:
                self._restore_place()
            if not progress.train_epoch_completed:
                self.run_train_epoch()
            self._restore_place()
            if self._is_cut_short or self.agreement.signal_number:
                break
            if self.eval_dataloader is not None and not progress.eval_epoch_completed:
                self.run_eval_epoch(self.eval_dataloader)
            self._complete_epoch()
        self.training_run_end()
        self.callbacks.on_training_run_end(self)
        self.agreement.read(wait=True)  # A signal may have come since.

    def run_train_epoch(self) -> None:
        """Train on what is left of the epoch."""
        progress, prepared, is_distributed = (
            self.run_progress,
            self._prepared_parts(),
            self.accelerator.num_processes > 1,
        )
        loader = self._start_train_epoch()
        self.train_epoch_start()
        self.callbacks.on_train_epoch_start(self)
        self._restore_place()
        unequal_step = "a training" if is_unequal(loader) else None
        for group in update_groups(loader, self.run_config.gradient_accumulation_steps):
            progress.epoch_cut_by_limit = self._has_reached_limit()
            if progress.epoch_cut_by_limit or self.stop_reason is not None:
                self._is_cut_short = not progress.epoch_cut_by_limit
                break
            self.model = prepared.model_to_train(self.accelerator) if is_distributed else self.model
            self._is_in_update = True
            if self._counts_ahead:
                group.count_ahead(self.count_items, self.accelerator.num_processes, self.device)
            self._unequal_step = unequal_step
            for step in group.steps:
                self.run_train_step(step, group)
            self._unequal_step = None
            self.run_update(group)
        self.agreement.read(wait=True)
        if not self._is_cut_short:
            self._record_losses("train", self.train_loss, self._train_logs)
            progress.train_epoch_completed = True
        self.train_epoch_end()
        self.callbacks.on_train_epoch_end(self)

    def run_train_step(self, step: Step, group: UpdateGroup) -> None:
        """Forward and backward of one batch."""
        if step.is_idle:
            self._run_idle_train_step(step, group)
            return
        self.callbacks.on_train_step_start(self, batch=step.batch)
        with self._way.gradient_sync(self.model, step.is_last):
            output = self.calculate_train_batch_loss(step.batch)
            if self._is_first_step:
                is_fresh = self.run_progress.updates_completed == 0
                check_batch_output(
                    output, "calculate_train_batch_loss", needs_gradient=True, is_first=is_fresh
                )
                self._is_first_step = False
            loss, num_items = output["loss"], items_of(output)
            weight = group.count(step, output, num_items)
            self.backward_step(loss if weight is None else loss * weight)
        self.train_loss.update(loss, num_items)
        if "log" in output:
            self._train_logs.update(output["log"], num_items)
        number = self.run_progress.steps_completed_in_epoch + group.steps_completed - 1
        self.callbacks.on_train_step_end(self, batch=step.batch, batch_output=output, step=number)

    def run_update(self, group: UpdateGroup) -> None:
        """Change the parameters by the gradients of `group`, and count it."""
        factor = None if group.is_alone else self._counts.correction(group, self.device)
        if factor is not None:
            multiply_gradients(self.accelerator, self.model, self.optimizer, factor)
        self.callbacks.on_optimizer_step_start(self)
        self.clip_gradients()
        self._before = None
        self.optimizer_step()
        was_skipped = self._way.may_skip and bool(self.accelerator.optimizer_step_was_skipped)
        if self._scheduler_interval != "epoch" and not was_skipped:
            self.scheduler_step()
        self.optimizer_zero_grad()
        self._is_in_update = False
        self.run_progress.complete_update(group.steps_completed, group.samples_read, was_skipped)
        self.run_history.current_update = self.run_progress.updates_completed
        self.agreement.read()
        self.callbacks.on_optimizer_step_end(self)
        self.agreement.start()

    def run_eval_epoch(
        self,
        dataset: Any = None,
        metric_prefix: str = "eval",
        is_intermediate: bool = False,
        *,
        model: torch.nn.Module | None = None,
        dataloader: ShardedDataLoader | None = None,
    ) -> None:
        """Evaluate on `dataset`, or on the evaluation data of the run. Every process takes part.

        Sums are kept by process and added once at the end, so that no sample counts twice and none is left
        out. In the middle of an epoch the random state is put back.

        Args:
            dataset: a data set or a loader, which is sharded like those of `train`; None takes the evaluation
                data of the run.
            model: the module to evaluate in place of the trainer's own, such as one with averaged weights.
                During the evaluation it is `self.model`, and `eval_loss` is a tracker of its own.
            dataloader: the former name of `dataset`, which will be removed.
        """
        if dataloader is not None:
            warnings.warn(
                "run_eval_epoch was called with dataloader, which is called dataset now and will be removed in "
                "0.2. Pass dataset=... instead.",
                AccelWarning,
                stacklevel=2,
            )
            dataset = dataloader
        loader = self._loader_to_evaluate(dataset)
        with self._in_place_of_the_model(model):
            self._evaluate_loader(loader, metric_prefix, is_intermediate)

    def _evaluate_loader(self, loader: ShardedDataLoader, metric_prefix: str, is_intermediate: bool) -> None:
        logs = MeanTrackers(self.device)
        self.eval_loss.reset()
        with (
            preserving_random_state(self.device) if is_intermediate else contextlib.nullcontext(),
            self._evaluating(),
        ):
            self.eval_epoch_start()
            self.callbacks.on_eval_epoch_start(
                self, is_intermediate=is_intermediate, metric_prefix=metric_prefix
            )
            for step in self._eval_steps(loader, is_intermediate):
                self.run_eval_step(step, logs)
        self._record_losses(metric_prefix, self.eval_loss, logs)
        if metric_prefix == "eval" and not is_intermediate:
            self.run_progress.eval_epoch_completed = True
        with self.run_history.added_prefix(name_prefix(metric_prefix)):
            self.eval_epoch_end()
            self.callbacks.on_eval_epoch_end(
                self, is_intermediate=is_intermediate, metric_prefix=metric_prefix
            )

    def run_eval_step(self, step: Step, logs: MeanTrackers) -> None:
        """Forward of one batch; what an idle process computes is thrown away."""
        if step.is_idle:
            if has_collective_forward(self.accelerator):
                self.calculate_eval_batch_loss(step.batch)
            return
        self.callbacks.on_eval_step_start(self, batch=step.batch)
        output = self.calculate_eval_batch_loss(step.batch)
        if self._is_first_eval_step:
            check_batch_output(output, "calculate_eval_batch_loss", needs_gradient=False, is_first=False)
            self._is_first_eval_step = False
        self.eval_loss.update(output["loss"], items_of(output))
        if "log" in output:
            logs.update(output["log"], items_of(output))
        self.callbacks.on_eval_step_end(self, batch=step.batch, batch_output=output)

    def _start_train_epoch(self) -> ShardedDataLoader:
        """Go to the place in the data where the epoch begins, or goes on."""
        progress, loader = self.run_progress, cast(ShardedDataLoader, self.train_dataloader)
        if progress.updates_completed_in_epoch == 0:
            self.train_loss.reset()
            self._train_logs = MeanTrackers(self.device)
        self.run_history.current_epoch = progress.current_epoch
        loader.begin_epoch(progress.epochs_completed, progress.samples_completed_in_epoch, loader.max_steps)
        return loader

    def _complete_epoch(self) -> None:
        """Count the epoch if the data is through; a run may have reached its limit before."""
        self.run_progress.run_completed = self.run_progress.epoch_cut_by_limit
        if not self.run_progress.epoch_cut_by_limit:
            if self._scheduler_interval != "update":
                self.scheduler_step()
            self.run_progress.complete_epoch()
        self.training_run_epoch_end()
        self.callbacks.on_training_run_epoch_end(self)
        self.agreement.read(wait=True)

    def _run_idle_train_step(self, step: Step, group: UpdateGroup) -> None:
        """Take part in the communication of a step without samples: a batch is repeated with weight zero."""
        with (
            preserving_buffers_and_rng(self.model, self.device),
            self._way.gradient_sync(self.model, step.is_last),
        ):
            group.steps_completed += 1
            self.backward_step(self.calculate_train_batch_loss(step.batch)["loss"] * 0.0)

    def _eval_steps(self, loader: ShardedDataLoader, is_intermediate: bool = False) -> Iterator[Step]:
        """The steps of an evaluation; idle ones only for engines whose forward needs every process."""
        loader.begin_epoch(
            0, max_steps=loader.max_intermediate_steps if is_intermediate else loader.max_steps
        )
        self._unequal_step = "an evaluation" if is_unequal(loader) else None
        return eval_steps(loader, has_collective_forward(self.accelerator))

    def _loader_to_evaluate(self, dataset: Any) -> ShardedDataLoader:
        """Return the loader of `dataset`, or of the evaluation data of the run if it is None."""
        if dataset is None:
            if self.eval_dataloader is None:
                raise ConfigurationError(
                    "eval_dataset is None, so there is nothing to evaluate on. Pass eval_dataset to train."
                )
            return self.eval_dataloader
        if isinstance(dataset, ShardedDataLoader):
            return dataset
        arguments = self._arguments
        batch_size = arguments["eval_per_device_batch_size"] or arguments["per_device_batch_size"]
        kept, self.eval_dataset = self.eval_dataset, dataset
        try:
            loader = self.create_eval_dataloader(batch_size, arguments["eval_dataloader_kwargs"])
        finally:
            self.eval_dataset = kept
        return self._shard(loader, arguments["seed_each_sample"])

    @contextlib.contextmanager
    def _in_place_of_the_model(self, model: torch.nn.Module | None) -> Iterator[None]:
        """Let `model` be `self.model`, with a loss tracker of its own, unless it is None."""
        if model is None:
            yield
            return
        kept = self.model, self.eval_loss
        self.model, self.eval_loss = model, LossTracker(self.device)
        try:
            yield
        finally:
            self.model, self.eval_loss = kept

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Let `self.model` be the module to evaluate."""
        training_model = self.model
        try:
            with evaluation_mode(training_model) as self.model:
                yield
        finally:
            self.model = training_model
            self._unequal_step = None

    def _record_losses(self, prefix: str, loss: LossTracker, logs: MeanTrackers) -> None:
        """Record the mean loss and what was logged; every process takes part."""
        suffix = "" if prefix == "evaluation" else "_epoch"
        self.run_history.update_metric(f"{prefix}_loss{suffix}", loss.reduce())
        for name, value in logs.reduce().items():
            self.run_history.update_metric(f"{prefix}_{name}{suffix}", value)

    # ------------------------------------------------------------------ what you may override

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        """Return `loss` (mean over the batch), `model_outputs` and `batch_size` of a batch, by default `(inputs, targets)`.

        Further keys travel to the callbacks. `num_items_in_batch` says that the loss is the mean over that
        many items, such as tokens. `log`, a dictionary of scalars, is averaged and recorded as
        `train_<name>_epoch`.
        """
        inputs, targets = unpack_batch(batch)
        outputs = self.model(inputs)
        loss = call_loss(self.loss_func, outputs, targets)
        return {"loss": loss, "model_outputs": outputs, "batch_size": num_samples_in(inputs)}

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        """Like `calculate_train_batch_loss`, without gradients; by default the same computation."""
        return Trainer.calculate_train_batch_loss(self, batch)

    def calculate_predictions(self, batch: Any) -> Any:
        """Return the outputs for a batch: by default the model's, of the first element of a tuple or of the batch itself."""
        return self.model(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def count_items(self, batch: Any) -> int | None:
        """Return the items of a batch that its loss is the mean of, before its forward.

        None leaves it to the forward.

        Engines that step inside backward need it for losses that are no mean over samples.
        """
        return None

    def backward_step(self, loss: torch.Tensor) -> None:
        """Compute gradients; `loss` already carries its weight within the update."""
        self._way.backward(loss)

    def clip_gradients(self) -> None:
        """Clip the gradients of the update, by value and by norm, as `train` was told."""
        if self.run_config.gradient_clip_value is not None:
            self.accelerator.clip_grad_value_(self.model.parameters(), self.run_config.gradient_clip_value)
        if self.run_config.gradient_clip_norm is not None:
            self._way.clip_norm(self.model.parameters(), self.run_config.gradient_clip_norm)

    def optimizer_step(self) -> None:
        """Change the parameters."""
        self._way.optimizer.step()

    def scheduler_step(self) -> None:
        """Step the scheduler: after an update, or after an epoch, as `train` was told.

        One that needs a metric gets it.
        """
        if self.scheduler is None:
            return
        is_epoch_of_both = self._scheduler_interval == "both" and not self._is_in_update
        step = self.scheduler.step_epoch if is_epoch_of_both else self.scheduler.step
        if self._scheduler_needs_metric and not self._is_in_update:
            step(self.run_history.get_latest_metric(self._arguments["scheduler_metric"]))
        else:
            step()

    def optimizer_zero_grad(self) -> None:
        """Clear the gradients after an update."""
        self._way.zero_grad()

    def training_run_start(self) -> None:
        """Act when all is prepared; does nothing."""

    def train_epoch_start(self) -> None:
        """Act when an epoch of training begins; puts the model in train mode, so call `super()`."""
        self.model.train()

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

    # ------------------------------------------------------------------ stopping

    def request_stop(self, reason: str, signal_number: int = 0) -> None:
        """Ask all processes to stop at the next safe point, after the same update.

        Args:
            reason: what `stop_reason` says on every process.
            signal_number: of the signal behind it; `train` raises `RunInterrupted` once all is closed.
        """
        if not self._is_running:
            raise ConfigurationError(
                f"request_stop({reason!r}) was called outside of a run. Call it in an event of a callback."
            )
        self.agreement.say_stop(reason, signal_number)

    @property
    def stop_reason(self) -> str | None:
        """Why all processes stop, once they have agreed; None in a run that ends by its own limits."""
        return self.agreement.stop_reason

    def _is_done(self) -> bool:
        return self.stop_reason is not None or self._is_finished()

    def _is_finished(self) -> bool:
        is_closed = self.run_progress.run_completed or not self.run_progress.updates_completed_in_epoch
        return is_closed and self._has_reached_limit()

    def _has_reached_limit(self) -> bool:
        progress, arguments = self.run_progress, self._arguments
        most_epochs, most_updates = arguments["num_epochs"], arguments["max_num_train_steps"]
        has_all_epochs = most_epochs is not None and progress.epochs_completed >= most_epochs
        return has_all_epochs or (most_updates is not None and progress.updates_completed >= most_updates)
