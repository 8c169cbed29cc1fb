"""What is frozen stays to the bit, what is unfrozen trains, with its rate, on every process and after a resume."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel_callbacks import ModelFreezer, UnfreezeCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_integrations.schedulers import CosineLrScheduler
from case_runner import run_as_script
from tiny import SaveAt, tiny_data


class Network(nn.Module):
    """Parameters held by the model itself and by a module with others in it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.token = nn.Parameter(torch.randn(5))
            self.embed = nn.Linear(5, 6)
            self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.0))
            self.body.scale = nn.Parameter(torch.ones(6))
            self.norm = nn.LayerNorm(6)
            self.head = nn.Linear(6, 2)
        self.double()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(self.embed(inputs + self.token)) * self.body.scale))


class Changes(TrainerCallback):
    """Which parameters have changed in each epoch."""

    def __init__(self) -> None:
        self.by_epoch: list[set[str]] = []

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        self.before = {name: value.clone() for name, value in trainer.get_model().named_parameters()}

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        named = trainer.get_model().named_parameters()
        self.by_epoch.append({name for name, value in named if not torch.equal(value, self.before[name])})


ALWAYS = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
BODY = {"body.scale", "body.0.weight", "body.0.bias"}
EMBED = {"token", "embed.weight", "embed.bias"}


def create(*callbacks: Any, model: nn.Module | None = None, optimizer: Any = None) -> Trainer:
    model = Network() if model is None else model
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1) if optimizer is None else optimizer
    )
    return Trainer(model, nn.functional.cross_entropy, optimizer, callbacks, seed=3)


def train(trainer: Trainer, epochs: int = 4, **kwargs: Any) -> Trainer:
    trainer.train(tiny_data(40), num_epochs=epochs, **{"per_device_batch_size": 8, **kwargs})
    return trainer


def rates(trainer: Trainer) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize(
    "schedule", [{2: 1, 4: 0}, {4: -4, 2: [-3]}, {2: ["body.*"], 4: ("token", "embed.*")}]
)
def test_lesson_13_frozen_parameters_stay_to_the_bit_until_their_epoch(schedule: Any) -> None:
    """Also those that the model, or a module with others in it, holds directly."""
    trainer = train(create(UnfreezeCallback(schedule), changes := Changes()), epochs=5)
    assert changes.by_epoch == [
        ALWAYS,
        ALWAYS | BODY,
        ALWAYS | BODY,
        ALWAYS | BODY | EMBED,
        ALWAYS | BODY | EMBED,
    ]
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_what_is_named_twice_is_trained_from_the_first_of_its_epochs_on() -> None:
    train(create(UnfreezeCallback({2: "body.scale", 3: "body.*"}), changes := Changes()), epochs=3)
    assert [names & BODY for names in changes.by_epoch] == [set(), {"body.scale"}, BODY]


def test_the_number_of_parameters_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    train(create(UnfreezeCallback({2: "head.*", 3: "body.scale"})))
    first, second = capsys.readouterr().out.splitlines()
    assert re.search(r"\b14 .*parameters.* epoch 2\b", first) and re.search(
        r"\b6 .*parameters.* epoch 3\b", second
    )


def test_what_the_schedule_does_not_name_stays_as_it_is() -> None:
    """As adapters on a frozen base: the base is frozen before, and is so afterwards."""
    model = Network()
    ModelFreezer(model).freeze_parameters(["embed.*", "body.0.*"])
    trainer = train(create(UnfreezeCallback({2: "token"}), changes := Changes(), model=model))
    assert changes.by_epoch[0] == ALWAYS | {"body.scale"}
    assert changes.by_epoch[-1] == ALWAYS | {"body.scale", "token"}
    assert not trainer.model.embed.weight.requires_grad


def test_a_second_run_begins_frozen() -> None:
    trainer = train(create(UnfreezeCallback({2: 1}), changes := Changes()), epochs=2)
    train(trainer, epochs=2)
    assert changes.by_epoch == [ALWAYS | EMBED, ALWAYS | EMBED | BODY] * 2


def test_modules_are_kept_in_eval_mode_as_long_as_they_are_frozen() -> None:
    modes = []

    class Looking(TrainerCallback):
        def on_train_step_start(self, trainer: Trainer, batch: Any) -> None:
            modes.append((trainer.model.training, trainer.model.body[2].training))

    train(
        create(UnfreezeCallback({3: 1}, set_modules_as_eval=True), Looking()),
        per_device_batch_size=40,
        eval_dataset=tiny_data(8),
    )
    assert modes == [(True, False), (True, False), (True, True), (True, True)]


def test_without_it_modes_that_a_trainer_sets_are_left() -> None:
    class KeptInEval(Trainer):
        def train_epoch_start(self) -> None:
            super().train_epoch_start()
            self.model.body.eval()

    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = KeptInEval(model, nn.functional.cross_entropy, optimizer, [UnfreezeCallback({2: 1})], seed=3)
    train(trainer, epochs=2)
    modes = [module.training for module in model.body.modules()]
    assert modes == [False] * len(modes)


# ---------------------------------------------------------------------- learning rates


def test_parts_have_learning_rates_of_their_own_and_the_other_settings_of_their_group() -> None:
    trainer = train(create(UnfreezeCallback({2: {1: 1e-3}, 3: {"token": 1e-4, "embed.*": 1e-5}})))
    expected = (
        dict.fromkeys(ALWAYS, 0.01)
        | dict.fromkeys(BODY, 1e-3)
        | {"token": 1e-4, "embed.weight": 1e-5, "embed.bias": 1e-5}
    )
    assert rates(trainer) == expected
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.1}
    assert len(trainer.optimizer.param_groups) == 4


def test_a_part_that_is_a_whole_group_already_keeps_it() -> None:
    model = Network()
    groups = [
        {"params": model.body.parameters(), "weight_decay": 0.0},
        {"params": [*model.norm.parameters(), *model.head.parameters()]},
    ]
    trainer = create(
        UnfreezeCallback({2: {1: 1e-3}}), model=model, optimizer=torch.optim.AdamW(groups, lr=0.01)
    )
    train(trainer, epochs=1)
    assert [(group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups] == [
        (1e-3, 0.0),
        (0.01, 0.01),
    ]


@pytest.mark.parametrize(("part", "rate"), [(1, 0.01), ({1: 1e-3}, 1e-3)])
def test_what_the_optimizer_does_not_hold_joins_it_before_the_first_update(part: Any, rate: float) -> None:
    model = Network()
    optimizer = torch.optim.AdamW([*model.norm.parameters(), *model.head.parameters()], lr=0.01)
    trainer = train(
        create(UnfreezeCallback({2: part}), changes := Changes(), model=model, optimizer=optimizer)
    )
    assert rates(trainer) == dict.fromkeys(ALWAYS, 0.01) | dict.fromkeys(BODY, rate)
    assert changes.by_epoch[:2] == [ALWAYS, ALWAYS | BODY]


def test_an_optimizer_that_knows_names_keeps_knowing_them() -> None:
    model = Network()
    optimizer = torch.optim.AdamW(list(model.named_parameters())[3:], lr=0.01)
    trainer = train(
        create(UnfreezeCallback({2: {"body.*": 1e-3}, 3: "token"}), model=model, optimizer=optimizer)
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]


def test_a_scheduler_knows_all_groups_and_acts_from_the_beginning() -> None:
    trainer = create(UnfreezeCallback({2: {1: 1e-3}}))
    train(
        trainer,
        epochs=2,
        create_scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    )
    assert rates(trainer)["body.scale"] == pytest.approx(1e-3 * 0.9**10)
    assert rates(trainer)["head.weight"] == pytest.approx(1e-2 * 0.9**10)


def test_a_second_trainer_on_the_same_optimizer_gives_the_rates_anew() -> None:
    first = train(
        create(UnfreezeCallback({2: {1: 1e-3}})), create_scheduler_fn=CosineLrScheduler.create_scheduler_fn()
    )
    second = create(UnfreezeCallback({2: {1: 2e-3}}), model=first.model, optimizer=first.optimizer)
    train(second, epochs=1)
    assert rates(second)["body.scale"] == 2e-3
    assert len(second.optimizer.param_groups) == 2


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("update", [3, 5, 7, 10, 12])
def test_a_resumed_run_gives_the_same_weights(tmp_path: Path, update: int) -> None:
    def callback() -> UnfreezeCallback:
        return UnfreezeCallback({2: {1: 1e-3}, 3: [0]})

    arguments = {"create_scheduler_fn": CosineLrScheduler.create_scheduler_fn(lr_min=0.0)}
    whole = train(create(callback(), SaveAt(update, tmp_path / "state")), **arguments)
    resumed = train(create(callback()), **arguments, resume_from=tmp_path / "state")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert resumed.run_history.to_records() == whole.run_history.to_records()


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({}, r"schedule is \{\}.*dictionary.*\{2: -2, "),
        ([2, 3], r"schedule is \[2, 3\].*dictionary.*\{2: -2, "),
        ({0: -2}, r"epoch in schedule is 0.*at least 1.*\{2: -2, "),
        ({"2": -2}, r"epoch in schedule is '2'.*whole number.*\{2: -2, "),
        ({1: -2}, "schedule has -2 for epoch 1.*Begin with epoch 2"),
        ({2: [None]}, "schedule has None for epoch 2.*index of a layer group.*name of parameters"),
        ({2: 0.5}, r"schedule has 0.5 for epoch 2.*index of a layer group.*\{2: -2, "),
        ({2: {-2: 0}}, r"learning rate of -2 in schedule is 0.*above 0.*\{2: -2, "),
    ],
)
def test_a_schedule_that_cannot_be_used_is_reported(schedule: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        UnfreezeCallback(schedule)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({2: 1, 3: 7}, r"part is 7.*from -4 to 3.*Network.*\['embed', .*freeze_parameters"),
        ({2: 1, 3: "haed.*"}, r"'haed\.\*'.*Network.*Did you mean 'head\.bias'"),
        ({2: "*"}, "UnfreezeCallback freezes all of Network.*Leave out"),
        ({2: [0, 1], 3: [2, 3]}, "UnfreezeCallback freezes all of Network.*Leave out"),
    ],
)
def test_a_schedule_that_does_not_fit_the_model_is_reported_and_changes_nothing(
    schedule: Any, message: str
) -> None:
    trainer = create(UnfreezeCallback(schedule))
    before = copy.deepcopy(trainer.optimizer.state_dict())
    with pytest.raises(ConfigurationError, match=message):
        train(trainer)
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert trainer.optimizer.state_dict() == before


def test_an_epoch_with_nothing_but_modules_without_parameters_is_reported() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    with pytest.raises(
        ConfigurationError, match=r"schedule has 1 for epoch 3.*no parameters.*get_layer_groups"
    ):
        train(create(UnfreezeCallback({2: [0, 1], 3: 1}), model=model))
    train(create(UnfreezeCallback({2: [0, 1]}), model=model), epochs=2)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_callback_that_comes_too_late_is_reported() -> None:
    trainer = train(create(), epochs=1)
    trainer.callbacks.add_callback(UnfreezeCallback({2: 1}))
    with pytest.raises(ConfigurationError, match=r"UnfreezeCallback.*after.*prepared.*Pass it to Trainer\("):
        train(trainer)


# ---------------------------------------------------------------------- processes


def unfreeze(batch_size: int) -> dict[str, Any]:
    trainer = create(UnfreezeCallback({2: {1: 1e-3}, 3: "embed.*"}), changes := Changes())
    train(trainer, per_device_batch_size=batch_size)
    return {"state": dict(trainer.model.state_dict()), "changes": changes.by_epoch}


def resume(batch_size: int) -> list[Any]:
    folder = Path(STATES) / f"{batch_size}"
    states = []
    for callbacks, kwargs in (((SaveAt(7, folder),), {}), ((), {"resume_from": folder})):
        trainer = create(UnfreezeCallback({2: {1: 1e-3}, 3: "embed.*"}), *callbacks)
        states.append(dict(train(trainer, per_device_batch_size=batch_size, **kwargs).model.state_dict()))
    return states


STATES = ""
CASES = {"unfreeze": unfreeze, "resume": resume}


@pytest.mark.slow
def test_two_processes_agree_after_unfreezing_and_equal_one(outcome: Any) -> None:
    """Parameters that were frozen when DDP wrapped them are not synchronised by it, and drift apart silently."""
    alone = outcome.alone("unfreeze")
    first, second = outcome.of("unfreeze")
    assert first["changes"] == second["changes"] == alone["changes"]
    for name, value in alone["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        assert torch.allclose(first["state"][name], value, rtol=1e-9, atol=1e-12), name


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(outcome: Any) -> None:
    for whole, resumed in outcome.of("resume"):
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


if __name__ == "__main__":
    import sys

    STATES = sys.argv[2]
    run_as_script(CASES)
