"""`ModelEmaCallback` works with models of timm, and averages as timm's `ModelEmaV3` does."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import TensorDataset

from accel_callbacks import ModelEmaCallback
from accel_core import Trainer, TrainerCallback
from accel_integrations.timm_adapter import TimmTrainer

DATA = TensorDataset(
    torch.randn(14, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(14) % 10
)


class TimmsAverage(TrainerCallback):
    """timm's own average on the same run, with the decay of each update from `decay_of`."""

    order = 100  # after the one that it is compared with

    def __init__(self, decay_of: Any) -> None:
        self.decay_of = decay_of

    def on_training_run_start(self, trainer: Trainer) -> None:
        self.ema = ModelEmaV3(trainer.get_model())

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self.ema.decay = self.decay_of(trainer.run_progress.updates_completed - 1)
        self.ema.update(trainer.get_model())


def train(callbacks: Any, **kwargs: Any) -> Trainer:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("test_resnet", num_classes=10)  # with batch norm, so with buffers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = TimmTrainer(model, None, optimizer, callbacks, seed=0, num_classes=10, mixup_alpha=0.5)
    trainer.train(DATA, 3, per_device_batch_size=4, eval_dataset=DATA, **kwargs)
    return trainer


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_that_of_timm(warmup: bool, tmp_path: Path) -> None:
    own = ModelEmaCallback(decay=0.9, warmup=warmup, save_path=tmp_path / "ema.pt")
    timms = TimmsAverage(own.calculate_decay)
    trainer = train([own, timms])
    assert own.ema_model is not None
    expected = timms.ema.module.state_dict()
    for name, value in own.ema_model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    model = trainer.model.state_dict()
    changed = [
        name
        for name, value in expected.items()
        if not torch.allclose(value.float(), model[name].float(), atol=1e-4)
    ]
    assert any("running_mean" in name for name in changed) and any("weight" in name for name in changed)


def test_the_average_is_evaluated_like_the_model(tmp_path: Path) -> None:
    own = ModelEmaCallback(decay=0.9, save_path=tmp_path / "ema.pt")
    trainer = train([own])
    assert own.ema_model is not None
    with torch.no_grad():
        loss = nn.functional.cross_entropy(own.ema_model(DATA.tensors[0]), DATA.tensors[1]).item()
    assert trainer.run_history.get_latest_metric("ema_model_eval_loss_epoch") == pytest.approx(loss, rel=1e-4)


def test_the_average_of_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    class SaveAt(TrainerCallback):
        order = 50

        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            if trainer.run_progress.updates_completed == 6:
                trainer.save_training_state(tmp_path / "state")

    whole, resumed = (ModelEmaCallback(decay=0.9, save_path=None) for _ in range(2))
    train([whole, SaveAt()])
    train([resumed], resume_from=tmp_path / "state")
    assert whole.ema_model is not None and resumed.ema_model is not None
    for one, other in zip(
        whole.ema_model.state_dict().values(), resumed.ema_model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)
