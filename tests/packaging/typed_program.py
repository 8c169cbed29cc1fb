"""A small program of a user who runs a strict type checker; what it reveals is checked too, and it runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, assert_type

import torch
from torch.utils.data import TensorDataset

from accel_callbacks import (
    DEFAULT_CALLBACKS,
    EarlyStoppingCallback,
    MetricsCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    plot_history,
)
from accel_core import (
    InMemoryRunHistory,
    RunHistory,
    RunInterrupted,
    Trainer,
    TrainerCallback,
    TrainerRunConfig,
    latest_checkpoint,
)
from accel_integrations.schedulers import CosineLrScheduler


class CountUpdates(TrainerCallback):
    """A callback with state."""

    def __init__(self) -> None:
        self.updates = 0

    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int
    ) -> None:
        assert_type(trainer.run_config, TrainerRunConfig)

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self.updates += 1
        if self.updates == 1000:
            trainer.request_stop("that is enough")

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]


class SmoothTrainer(Trainer):
    """A trainer with a loss of its own."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        inputs, targets = batch
        outputs = self.model(inputs)
        loss = torch.nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)
        return {"loss": loss, "model_outputs": outputs, "batch_size": len(targets)}

    def create_scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.StepLR(self.optimizer, 5)


def main(folder: Path) -> dict[str, float]:
    data = TensorDataset(torch.randn(16, 5), torch.arange(16) % 2)
    model = torch.nn.Linear(5, 2)
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (
        CountUpdates(),
        EarlyStoppingCallback(early_stopping_patience=2),
        SaveBestModelCallback(folder / "best.pt"),
        SaveTrainingStateCallback(folder / "states", save_every_n_epochs=1, keep_last=2),
        *DEFAULT_CALLBACKS,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SmoothTrainer(
        model, torch.nn.functional.cross_entropy, optimizer, callbacks, InMemoryRunHistory(), seed=1
    )
    try:
        history = trainer.train(
            data,
            num_epochs=2,
            eval_dataset=data,
            create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
            gradient_clip_norm=1.0,
            resume_from=latest_checkpoint(folder / "states"),
        )
    except RunInterrupted as interrupted:
        assert_type(interrupted.checkpoint, Path | None)
        raise
    assert_type(history, RunHistory)
    assert_type(history.get_metric_values("eval_loss_epoch"), list[float])
    assert_type(trainer.stop_reason, str | None)
    assert_type(trainer.accelerator.num_processes, Any)
    plot_history(history, folder / "history.png")
    Trainer(model, torch.nn.functional.cross_entropy, None, callbacks=[MetricsCallback({})])
    return trainer.evaluate(data)
