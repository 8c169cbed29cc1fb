"""What a trainer is made of: construction, preparation, saving, processes.

The loop itself is in trainer.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator

from .callbacks.callback import TrainerCallback
from .callbacks.callback_list import CallbackList
from .callbacks.log_metrics import LogMetricsCallback
from .callbacks.print_progress import PrintProgressCallback
from .callbacks.terminate_on_nan import TerminateOnNaNCallback
from .checks.arguments import check_parts
from .data.defaults import create_dataloader, default_dataloader_kwargs
from .data.loader import ShardedDataLoader
from .engines.engine import Engine, Prepared
from .engines.sharded import is_sharded
from .engines.weights import is_frozen, place_frozen
from .errors import ConfigurationError
from .foreign_names import check_trainer_class
from .processes.agreement import Agreement
from .processes.collectives import gather_tensor
from .processes.group import DataGroup, data_group
from .run.description import describe_run
from .run.loss_tracker import LossTracker, MeanTrackers
from .run.placeholders import resolve_placeholders
from .run.rollback import Rollback
from .run.run_config import TrainerRunConfig, plan_run
from .run.run_history import InMemoryRunHistory, RunHistory
from .run.run_progress import RunProgress
from .run.scheduling import build_scheduler

DEFAULT_CALLBACKS: tuple[type[TrainerCallback], ...] = (
    TerminateOnNaNCallback,
    PrintProgressCallback,
    LogMetricsCallback,
)


WITHOUT_GATHER = {
    "an "
    "evaluation": "Update the metric on each process and compute it in on_eval_epoch_end, or use MetricsCallback.",
    "a training": "Gather in on_optimizer_step_end, or pass train_dataloader_kwargs={'drop_last': True}.",
}


"""What to do where a process has no batch in some step of an epoch, by the kind of the step."""

if TYPE_CHECKING:
    from .trainer import Trainer


class BaseTrainer:
    """A training loop around a model, a loss function and an optimizer, customised by overriding and by callbacks."""

    data_seed: int
    """Of the order of the data in the current or latest run."""
    prediction_padding: float | None = None
    """Fills up the dimensions in which the outputs of `predict` differ between batches.

    None refuses such outputs.
    """
    trust_engine_files: bool = False
    """Allow loading the sharded states of FSDP and DeepSpeed, which those libraries unpickle: code in them would run."""

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
            loss_func: from the model's outputs and the targets to the mean loss of the batch, a scalar; None
                where `calculate_train_batch_loss` is overridden.
            optimizer: over the parameters of `model`; None is enough to evaluate.
            callbacks: instances, or classes that need no arguments.
            accelerator: your own, for mixed precision, FSDP, DeepSpeed or trackers; else `create_accelerator`
                makes one.
            seed: of the order of the data, and of all random numbers from the first run on. None takes the
                order's seed from `torch.initial_seed()` and seeds nothing.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        check_trainer_class(type(self))
        check_parts(model, loss_func, optimizer, run_history, accelerator, seed)
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
        self.seed = seed
        self._known_states: dict[Path, dict[str, Any]] = {}
        self.run_id: str | None = None
        """Names the run in its checkpoints; a resumed run keeps it."""
        self._accelerator = accelerator
        nowhere = torch.device("cpu")
        self.agreement = Agreement(nowhere)
        """What the processes tell each other in a run; callbacks may register topics of their own."""
        self.train_loss, self.eval_loss = LossTracker(nowhere), LossTracker(nowhere)
        self._train_logs = MeanTrackers(nowhere)
        self._is_in_update = False
        self._prepared: Prepared | None = None
        self._place: dict[str, Any] | None = None
        self._before: Rollback | None = None
        self.last_checkpoint: Path | None = None
        """The newest complete training state of the latest run."""
        self._arguments: dict[str, Any] = {}
        self._open_loaders: list[ShardedDataLoader] = []
        self._is_running = self._is_seeded = False
        self._unequal_step: str | None = None
        self.callbacks = CallbackList(callbacks, self)
        self.callbacks.on_init_end(cast("Trainer", self))

    # ------------------------------------------------------------------ what you may create

    def create_accelerator(self) -> Accelerator:
        """Return the `Accelerator` of this trainer; called when it is first needed."""
        return Accelerator()

    def prepare(self) -> None:
        """Place and wrap `self.model` and `self.optimizer`.

        Override it to prepare more, and call `super().prepare()`.
        """
        if is_frozen(self.model) and not is_sharded(self.accelerator):
            self.model = place_frozen(self.accelerator, self.model)
            self.optimizer = self.optimizer and self.accelerator.prepare_optimizer(self.optimizer)
        elif self.optimizer is None:
            self.model = self.accelerator.prepare_model(self.model)
        else:
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def get_default_train_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        """Return the arguments of the training `DataLoader` that hold unless `train_dataloader_kwargs` says otherwise."""
        return default_dataloader_kwargs(self.train_dataset, batch_size, True, self.accelerator)

    def get_default_eval_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        """Return the arguments of the evaluation `DataLoader` that hold unless `eval_dataloader_kwargs` says otherwise."""
        return default_dataloader_kwargs(self.eval_dataset, batch_size, False, self.accelerator)

    def create_train_dataloader(self, batch_size: int, train_dl_kwargs: dict[str, Any] | None = None) -> Any:
        """Return a loader of `self.train_dataset` as for a single process.

        The trainer shares it out afterwards.
        """
        defaults = self.get_default_train_dl_kwargs(batch_size)
        return create_dataloader(self.train_dataset, defaults, train_dl_kwargs, self.collate_fn)

    def create_eval_dataloader(self, batch_size: int, eval_dl_kwargs: dict[str, Any] | None = None) -> Any:
        """Return a loader of `self.eval_dataset` as for a single process.

        The trainer shares it out afterwards.
        """
        defaults = self.get_default_eval_dl_kwargs(batch_size)
        return create_dataloader(self.eval_dataset, defaults, eval_dl_kwargs, self.collate_fn)

    def create_scheduler(self) -> Any:
        """Return the scheduler of the run, or None.

        Placeholders in `create_scheduler_fn` get their values.
        """
        if self.create_scheduler_fn is None:
            return None
        create_scheduler_fn = resolve_placeholders(self.create_scheduler_fn, self.run_config)
        return build_scheduler(create_scheduler_fn, self._prepared_parts().user_optimizer)

    def create_run_config(self, **arguments: Any) -> TrainerRunConfig:
        """Return the numbers of the run, from the `arguments` of `train` and the loaders."""
        return plan_run(
            arguments, self.train_dataloader, self.eval_dataloader, self.accelerator, self.data_seed
        )

    def _prepared_parts(self) -> Prepared:
        if self._prepared is None:
            raise ConfigurationError(
                "Nothing is prepared yet, so there is no state to save. Call train or evaluate first."
            )
        return self._prepared

    def _shard(self, loader: Any, seed_each_sample: bool = False) -> ShardedDataLoader:
        """Share a loader out over the processes."""
        processes = (self.accelerator.num_processes, self.accelerator.process_index)
        sharded = ShardedDataLoader(loader, self.data_seed, self.device, *processes, seed_each_sample)
        sharded.tell = self.print
        self._open_loaders.append(sharded)
        return sharded

    # ------------------------------------------------------------------ processes

    @functools.cached_property
    def run_config(self) -> TrainerRunConfig:
        """The numbers of the current or latest run, which sets them."""
        raise AttributeError("run_config is known from the first run on. Call train or evaluate before.")

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator, made when it is first asked for."""
        if self._accelerator is None:
            self._accelerator = self.create_accelerator()
        return self._accelerator

    @property
    def engine(self) -> Engine:
        """What runs the steps: a single process, DDP, or an engine that shards the model."""
        return Engine(self.accelerator)

    @property
    def data_group(self) -> DataGroup:
        """The processes that share the data."""
        return data_group(self.accelerator)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device  # type: ignore[no-any-return]

    @property
    def is_main_process(self) -> bool:
        """Whether this process prints and writes, once for the whole job."""
        return self.accelerator.process_index == 0  # type: ignore[no-any-return]

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the main process."""
        if self.is_main_process:
            print(*args, **kwargs)  # noqa: T201

    def gather(self, tensor: torch.Tensor, padding_value: float | None = None) -> torch.Tensor:
        """Join the tensors of all processes on the first dimension, which may differ.

        Every process takes part.

        Inside a step it is refused where a process has no batch in some step of the epoch: it would never
        answer.

        Args:
            padding_value: fills up other dimensions where they differ.
        """
        if self._unequal_step is not None:
            last, way_out = self.accelerator.num_processes - 1, WITHOUT_GATHER[self._unequal_step]
            raise ConfigurationError(
                f"gather was called inside {self._unequal_step} step, but process {last} of {last + 1} has "
                f"no batch there and would never answer. {way_out}"
            )
        return gather_tensor(tensor, padding_value)

    def get_model(self, keep_torch_compile: bool = True) -> torch.nn.Module:
        """Return the model without what was wrapped around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=keep_torch_compile)  # type: ignore[no-any-return]

    def describe(self) -> str:
        """Return what will happen, or happened last: data, batch sizes, updates, precision, processes, callbacks in order."""
        datasets = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        config = self.run_config if self._arguments else None
        return describe_run(self.model, self.optimizer, self.callbacks, datasets, self.accelerator, config)
