"""Types what the modules `preparing`, `saved_state` and `stages` see of a trainer.

They are given the trainer itself, since its users may override what they call and exchange what they read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from ..callbacks.callback_list import CallbackList
from ..data.loader import ShardedDataLoader
from ..engines.engine import Engine
from ..processes.agreement import Agreement
from .loss_tracker import LossTracker
from .run import Run
from .run_config import TrainerRunConfig
from .run_history import RunHistory
from .run_progress import RunProgress


# A protocol, so that these modules need not import the trainer, which imports them.
class TrainerParts(Protocol):
    """Lists attributes and methods of `Trainer`, which documents them."""

    model: torch.nn.Module
    loss_func: Any
    optimizer: Any
    scheduler: Any
    callbacks: CallbackList
    run_history: RunHistory
    run_progress: RunProgress
    run_id: str | None
    last_checkpoint: Path | None
    agreement: Agreement
    train_loss: LossTracker
    seed: int | None
    is_seeded: bool
    data_seed: int
    eval_loss: LossTracker
    trust_engine_files: bool
    load_partial_states: bool
    train_dataset: Any
    eval_dataset: Any
    collate_fn: Callable[[list[Any]], Any] | None
    train_dataloader: ShardedDataLoader | None
    eval_dataloader: ShardedDataLoader | None
    eval_dataloaders: dict[str, ShardedDataLoader]

    # Private of `Trainer`: `running` sets the first for the length of a call, `train` the second.
    _run: Run | None
    _training_run: Run | None

    @property
    def prediction_padding(self) -> float | None: ...
    @property
    def run_config(self) -> TrainerRunConfig: ...

    @property
    def accelerator(self) -> Accelerator: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def is_main_process(self) -> bool: ...
    def print(self, *args: Any, **kwargs: Any) -> None: ...
    def prepare(self) -> None: ...
    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]: ...
    def backward_step(self, loss: torch.Tensor) -> None: ...
    def create_train_dataloader(
        self, batch_size: int, train_dl_kwargs: dict[str, Any] | None = None
    ) -> Any: ...
    def create_eval_dataloader(
        self, batch_size: int, eval_dl_kwargs: dict[str, Any] | None = None
    ) -> Any: ...
    def run_eval_epoch(self, dataset: Any = None, metric_prefix: str = "eval") -> None: ...
    def evaluation_run_start(self) -> None: ...
    def evaluation_run_end(self) -> None: ...
    def calculate_predictions(self, batch: Any) -> Any: ...
    def training_run_epoch_end(self) -> None: ...
    def scheduler_step(self) -> None: ...
    def create_run_config(self, **arguments: Any) -> TrainerRunConfig: ...
    def create_scheduler(self) -> Any: ...
    def create_model_state(self, model: torch.nn.Module) -> dict[str, Any]: ...
    def load_model_state(self, model: torch.nn.Module, state: dict[str, Any]) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def get_model(self, keep_torch_compile: bool = True) -> torch.nn.Module: ...
