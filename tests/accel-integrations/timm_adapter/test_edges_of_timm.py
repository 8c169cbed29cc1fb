"""Schedules by the names of timm's factory, rates by layer in schedulers of the factory, and second-order optimizers."""

import math

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, PlateauLRScheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch.utils.data import DataLoader, TensorDataset

from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_core.engines.single import SingleProcess
from accel_integrations.timm_adapter import TimmScheduler, create_timm_optimizer, timm_scheduler_fn

DATA = TensorDataset(torch.randn(12, 2), torch.randn(12, 1))


class Rates(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_optimizer_step_start(self, trainer):
        self.seen.append([group["lr"] for group in trainer.optimizer.param_groups])


def two_rates():
    first, last = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(1, 1)
    model = torch.nn.Sequential(first, last)
    return model, torch.optim.SGD(
        [{"params": first.parameters(), "lr": 0.1}, {"params": last.parameters()}], lr=0.2
    )


@pytest.mark.parametrize("name", ["cosine", "tanh", "step", "multistep", "poly"])
@pytest.mark.parametrize("step_on_epochs", [True, False])
def test_a_name_gives_the_rates_of_timms_loop(name, step_on_epochs):
    arguments = {
        "warmup_epochs": 1,
        "warmup_lr": 1e-3,
        "decay_epochs": 2,
        "decay_milestones": [2, 3],
        "min_lr": 1e-4,
    }
    model, optimizer = two_rates()
    rates = Rates()
    trainer = Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks=[rates], seed=0)
    create = timm_scheduler_fn(name, step_on_epochs=step_on_epochs, **arguments)
    trainer.train(DATA, num_epochs=4, per_device_batch_size=4, create_scheduler_fn=create)
    _, by_hand = two_rates()
    scheduler, _ = create_scheduler_v2(
        by_hand, name, num_epochs=4, step_on_epochs=step_on_epochs, updates_per_epoch=3, **arguments
    )
    expected = []
    for epoch in range(4):
        for update in range(3):
            expected.append([group["lr"] for group in by_hand.param_groups])
            scheduler.step_update(epoch * 3 + update + 1)
        scheduler.step(epoch + 1)
    torch.testing.assert_close(torch.tensor(rates.seen), torch.tensor(expected))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("kosine", {}, "'kosine'.*no scheduler.*'cosine'"),
        ("none", {}, "'none'.*no scheduler"),
        ("cosine", {"warmup_epoch": 1}, "warmup_epoch.*Did you mean 'warmup_epochs'"),
    ],
)
def test_what_the_factory_does_not_know_is_refused_at_once(name, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        timm_scheduler_fn(name, **arguments)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
def test_a_plateau_by_name_wants_the_direction_of_the_metric():
    with pytest.raises(ConfigurationError, match=r"plateau_mode is not given.*'min' for a loss"):
        timm_scheduler_fn("plateau")


PLATEAU = {"patience_t": 0, "decay_rate": 0.5, "mode": "min", "threshold": 0.9}


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize(
    "create",
    [
        timm_scheduler_fn(PlateauLRScheduler, **PLATEAU),
        lambda optimizer: TimmScheduler(PlateauLRScheduler(optimizer, **PLATEAU)),
    ],
)
def test_a_plateau_gets_its_metric_however_it_is_made(create):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks=[], seed=0)
    trainer.train(DATA, num_epochs=8, eval_dataset=DATA, create_scheduler_fn=create)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**7)


@pytest.mark.parametrize("name", ["cosine", "step"])
def test_layers_keep_their_rates_in_schedulers_of_timms_factory(name):
    def rates(create):
        model = timm.create_model("test_vit", num_classes=4, img_size=32)
        optimizer = create(model, "sgd", lr=1.0, weight_decay=0.05, layer_decay=0.5)
        scheduler, _ = create_scheduler_v2(optimizer, name, num_epochs=3, decay_epochs=1)
        seen = []
        for epoch in range(3):
            scheduler.step(epoch)
            seen.append([group["lr"] for group in optimizer.param_groups])
        return seen

    own, expected = (torch.tensor(rates(create)) for create in (create_timm_optimizer, create_optimizer_v2))
    torch.testing.assert_close(own, expected)


def test_layers_have_timms_rates_to_the_minimum_and_from_the_start_of_the_warm_up():
    arguments = {"warmup_epochs": 2, "warmup_lr": 0.1, "min_lr": 0.05}
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    optimizer = create_timm_optimizer(model, "sgd", lr=1.0, layer_decay=0.5)
    by_timm = create_optimizer_v2(model, "sgd", lr=1.0, layer_decay=0.5, weight_decay=0.05)
    expected, _ = create_scheduler_v2(by_timm, "cosine", num_epochs=6, **arguments)
    schedulers = [timm_scheduler_fn("cosine", num_epochs=6, **arguments)(optimizer)]
    for epoch in range(1, 7):
        expected.step(epoch)
        schedulers[0].step_epoch()
        rates = [[group["lr"] for group in one.param_groups] for one in (optimizer, by_timm)]
        assert rates[0] == pytest.approx(rates[1]), epoch


def test_layers_keep_their_rates_in_schedulers_of_torch_after_one_of_timm():
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    optimizer = create_timm_optimizer(model, "sgd", lr=1.0, layer_decay=0.5)
    rates = [group["lr"] for group in optimizer.param_groups]
    timm_scheduler_fn(CosineLRScheduler, t_initial=3)(optimizer)
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates)


# ---------------------------------------------------------------- second derivatives


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_second_order_optimizer_trains_as_in_timms_loop(steps):
    model, by_hand = small_model(), small_model()
    trainer = Trainer(
        model,
        torch.nn.functional.mse_loss,
        create_timm_optimizer(model, "adahessian", lr=0.1),
        callbacks=[],
        seed=0,
    )
    arguments = {"gradient_accumulation_steps": steps, "train_dataloader_kwargs": {"shuffle": False}}
    trainer.train(DATA, num_epochs=2, per_device_batch_size=4 // steps, **arguments)
    optimizer = create_timm_optimizer(by_hand, "adahessian", lr=0.1)
    assert optimizer.is_second_order
    for _ in range(2):
        for inputs, targets in DataLoader(DATA, batch_size=4):
            loss = torch.nn.functional.mse_loss(by_hand(inputs), targets)
            for parameter, gradient in zip(
                by_hand.parameters(),
                torch.autograd.grad(loss, by_hand.parameters(), create_graph=True),
                strict=True,
            ):
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.state_dict(), by_hand.state_dict())
    assert all(
        math.isfinite(value) for parameter in model.parameters() for value in parameter.flatten().tolist()
    )


def test_second_derivatives_are_refused_on_several_processes(monkeypatch):
    model = small_model()
    optimizer = create_timm_optimizer(model, "adahessian", lr=0.1)
    trainer = Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks=[])
    monkeypatch.setattr(SingleProcess, "steps_in_backward", True)
    with pytest.raises(ConfigurationError, match=r"Adahessian uses second derivatives.*Train on one process"):
        trainer.train(DATA, num_epochs=1)
