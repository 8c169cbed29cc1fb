"""Adaptive gradient clipping equals timm's, once an update."""

from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad
from torch import nn
from torch.utils.data import TensorDataset

from accel_callbacks import TrainingStatisticsCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_integrations.timm_adapter import AdaptiveGradientClippingCallback
from tiny import tiny_data, tiny_trainer, weights_of

FACTOR = 0.02
DATA = TensorDataset(
    torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 10
)


def create_model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_nfnet", num_classes=10)  # type: ignore[no-any-return]


def train(callbacks: Any, trainer_class: type[Trainer] = Trainer, **kwargs: Any) -> torch.Tensor:
    model = create_model()
    trainer = trainer_class(
        model, nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.5), callbacks, seed=0
    )
    arguments = {"per_device_batch_size": 3, "train_dataloader_kwargs": {"shuffle": False}, **kwargs}
    trainer.train(DATA, 1, **arguments)
    return weights_of(trainer)


def train_by_hand(batch_size: int, clip: bool = True) -> torch.Tensor:
    model = create_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for images, targets in torch.utils.data.DataLoader(DATA, batch_size):
        nn.functional.cross_entropy(model(images), targets).backward()
        if clip:
            dispatch_clip_grad(model_parameters(model, exclude_head=True), FACTOR, mode="agc")
        optimizer.step()
        optimizer.zero_grad()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_it_equals_that_of_timm() -> None:
    own, timms = train([AdaptiveGradientClippingCallback(FACTOR)]), train_by_hand(3)
    assert torch.equal(own, timms)
    assert not torch.allclose(timms, train_by_hand(3, clip=False), atol=1e-3), (
        "the gradients must be large enough to be clipped"
    )


def test_it_clips_the_gradient_of_the_update_and_not_of_each_step() -> None:
    own = train([AdaptiveGradientClippingCallback(FACTOR)], gradient_accumulation_steps=2)
    torch.testing.assert_close(own, train_by_hand(6), rtol=1e-4, atol=1e-5)


def test_scaled_gradients_are_clipped_as_if_they_were_not() -> None:
    class Scaling(Trainer):
        def create_accelerator(self) -> Accelerator:
            accelerator = Accelerator(cpu=True)
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            return accelerator

    plain = train([AdaptiveGradientClippingCallback(FACTOR)])
    torch.testing.assert_close(train([AdaptiveGradientClippingCallback(FACTOR)], Scaling), plain)


def test_it_works_with_models_that_are_not_of_timm() -> None:
    class Ratios(TrainerCallback):
        order = AdaptiveGradientClippingCallback.order + 1

        def on_optimizer_step_start(self, trainer: Trainer) -> None:
            for parameter in trainer.model.parameters():
                assert parameter.grad is not None
                unit = tuple(range(1, parameter.ndim)) if parameter.ndim > 1 else 0
                ratio = parameter.grad.norm(dim=unit) / parameter.norm(dim=unit)
                assert (ratio <= 0.001 * 1.001).all()

    tiny_trainer(callbacks=[Ratios(), AdaptiveGradientClippingCallback(0.001)]).train(tiny_data(), 1)
    with pytest.raises(AssertionError):
        tiny_trainer(callbacks=[Ratios()]).train(tiny_data(), 1)


@pytest.mark.parametrize(
    "kwargs", [{"clip_factor": 0.0}, {"eps": -1.0}, {"clip_factor": "0.01"}, {"clip_factor": None}]
)
def test_mistakes_are_reported_at_once(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(kwargs))} is"):
        AdaptiveGradientClippingCallback(**kwargs)


def test_the_norm_that_is_recorded_is_the_one_before_it_however_they_are_listed() -> None:
    def norms(*callbacks: TrainerCallback) -> list[float]:
        trainer = tiny_trainer(callbacks=callbacks)
        return trainer.train(tiny_data(), max_num_train_steps=1).get_metric_values("gradient_norm")

    clipping, statistics = (
        AdaptiveGradientClippingCallback(0.001),
        TrainingStatisticsCallback(record_every_n_updates=1),
    )
    assert norms(clipping, statistics) == norms(TrainingStatisticsCallback(record_every_n_updates=1))
