"""The finders train a copy: the trainer, its data, random numbers and the run that follows are as if they had not been called."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler

from accel_callbacks import MetricsCallback, SaveTrainingStateCallback, find_batch_size, find_learning_rate
from accel_core import ConfigurationError, Trainer, TrainerCallback
from tiny import Seen, tiny_data, tiny_network, tiny_trainer, weights_of

Finder = Callable[..., Any]
FINDERS = {
    "learning rate": lambda trainer, data: find_learning_rate(trainer, data, 4, num_updates=6),
    "batch size": lambda trainer, data: find_batch_size(trainer, data, 4),
}


@pytest.fixture(params=FINDERS)
def find(request: pytest.FixtureRequest) -> Finder:
    return FINDERS[request.param]


class Everything(TrainerCallback):
    """Counts the events of a run."""

    def __init__(self) -> None:
        self.events = 0

    def on_prepare_start(self, trainer: Trainer) -> None:
        self.events += 1

    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.events += 1

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self.events += 1

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        self.events += 1

    def on_run_close(self, trainer: Trainer) -> None:
        self.events += 1


class Augmented(TensorDataset):
    """Draws from all global generators."""

    def __getitem__(self, index: int) -> Any:
        inputs, target = super().__getitem__(index)
        return inputs + torch.randn(5) * 0.1 + np.random.rand() + random.random(), target


class WithSecondOptimizer(Trainer):
    """Trains a module of its own beside the model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head = nn.Linear(2, 2).double()
        self.head_optimizer = torch.optim.Adam(self.head.parameters())

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        outputs = self.head(self.model(batch[0]))
        loss = self.loss_func(outputs, batch[1])
        return {"loss": loss, "model_outputs": outputs, "batch_size": len(outputs)}

    def optimizer_step(self) -> None:
        super().optimizer_step()
        self.head_optimizer.step()
        self.head_optimizer.zero_grad()


def with_dropout() -> nn.Module:
    return nn.Sequential(tiny_network(torch.float32), nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2))


def build(**kwargs: Any) -> Trainer:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(5)
    model = with_dropout()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Trainer(model, nn.functional.cross_entropy, optimizer, callbacks=(Seen(), Everything()), **kwargs)


def train(trainer: Trainer, data: Any, **kwargs: Any) -> None:
    trainer.train(
        data,
        num_epochs=2,
        eval_dataset=data,
        per_device_batch_size=4,
        create_scheduler_fn=lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=40),
        train_dataloader_kwargs={"num_workers": 0},
        **kwargs,
    )


def everything_of(trainer: Trainer) -> dict[str, Any]:
    """All that a run leaves behind, and the next random numbers."""
    seen, counted = trainer.callbacks.callback_list
    return {
        "model": {name: value.tolist() for name, value in trainer.model.state_dict().items()},
        "optimizer": repr(trainer.optimizer.state_dict()),
        "scheduler": repr(trainer.scheduler.state_dict()) if trainer.scheduler else None,
        "history": trainer.run_history.to_records(),
        "progress": trainer.run_progress,
        "order": seen.samples,
        "events": counted.events,
        "modes": [module.training for module in trainer.model.modules()],
        "random": (torch.rand(1).item(), np.random.rand(), random.random()),
    }


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("runs_before", [0, 1])
@pytest.mark.seconds
def test_a_run_that_follows_is_the_same_to_the_last_bit(
    find: Finder, seed: int | None, runs_before: int
) -> None:
    data = Augmented(*tiny_data(30, torch.float32).tensors)
    outcomes = []
    for does_find in (False, True):
        trainer = build(seed=seed)
        for _ in range(runs_before):
            train(trainer, data)
        if does_find:
            find(trainer, data)
        train(trainer, data, reset_run_history=False)
        outcomes.append(everything_of(trainer))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("runs_before", [0, 1])
def test_nothing_has_changed_right_afterwards(find: Finder, runs_before: int) -> None:
    data = tiny_data(30, torch.float32)
    trainer = build()
    for _ in range(runs_before):
        train(trainer, data)
    known = trainer.accelerator._models, trainer.accelerator._optimizers
    assert trainer.engine is not None, "like the accelerator, made when it is first asked for"
    kept = [*map(list, known)], vars(trainer).copy()
    state = torch.get_rng_state()
    before = everything_of(trainer)
    torch.set_rng_state(state)
    find(trainer, data)
    after = everything_of(trainer)
    assert {**before, "random": None} == {**after, "random": None}
    assert before["random"][0] == after["random"][0]
    assert [*map(list, known)] == kept[0]
    assert vars(trainer) == kept[1]


def test_nothing_has_changed_after_an_exception_in_the_middle(find: Finder) -> None:
    calls = []

    def failing(outputs: Any, targets: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(outputs, targets)

    data = tiny_data(30, torch.float32)
    outcomes = []
    for does_find in (False, True):
        trainer = build()
        if does_find:
            trainer.loss_func = failing
            with pytest.raises(KeyboardInterrupt):
                find(trainer, data)
            trainer.loss_func = nn.functional.cross_entropy
        train(trainer, data)
        outcomes.append(everything_of(trainer))
    assert outcomes[0] == outcomes[1]


def test_modules_and_optimizers_of_a_subclass_are_copied_too(find: Finder) -> None:
    torch.manual_seed(0)
    trainer = tiny_trainer(WithSecondOptimizer)
    before = trainer.head.weight.detach().clone()
    find(trainer, tiny_data())
    assert torch.equal(trainer.head.weight, before)
    assert not trainer.head_optimizer.state
    trainer.train(tiny_data(), num_epochs=1)
    assert not torch.equal(trainer.head.weight, before)


def test_a_step_that_a_scheduler_has_wrapped_does_not_step_the_original(find: Finder) -> None:
    trainer = build()
    train(trainer, tiny_data(30, torch.float32))
    assert "step" in vars(trainer.optimizer)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = weights_of(trainer)
    find(trainer, tiny_data(30, torch.float32))
    assert torch.equal(weights_of(trainer), before)
    assert all(bool((parameter.grad == 1).all()) for parameter in trainer.model.parameters())


def test_an_optimizer_with_attributes_of_its_own_is_copied_whole(find: Finder) -> None:
    model = tiny_network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1)

    class Closing(Trainer):
        def optimizer_step(self) -> None:
            self.optimizer.optimizer.step(lambda: 1.0)

    trainer = Closing(model, nn.functional.cross_entropy, optimizer, callbacks=())
    before = weights_of(trainer)
    find(trainer, tiny_data())
    assert torch.equal(weights_of(trainer), before)


def test_data_with_a_state_and_generators_of_a_loader_are_where_they_were() -> None:
    class Counting(IterableDataset[Any]):
        position = 0

        def __iter__(self) -> Iterator[Any]:
            for sample in tiny_data(30):
                self.position += 1
                yield sample

        def state_dict(self) -> dict[str, Any]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.position = state["position"]

    dataset = Counting()
    dataset.position = 7
    FINDERS["learning rate"](tiny_trainer(), dataset)
    assert dataset.position == 7
    generator = torch.Generator().manual_seed(1)
    sampler: Any = WeightedRandomSampler(torch.ones(30), 30, generator=generator)
    loader = DataLoader(tiny_data(30), sampler=sampler, batch_size=4)
    before = generator.get_state()
    FINDERS["learning rate"](tiny_trainer(), loader)
    assert torch.equal(generator.get_state(), before)
    own = DataLoader(tiny_data(30), sampler=RandomSampler(tiny_data(30)), batch_size=4)
    assert len(find_learning_rate(tiny_trainer(), own, num_updates=5).records) == 5


def test_callbacks_with_files_and_metrics_stay_out_of_it(find: Finder, tmp_path: Any) -> None:
    callbacks = (SaveTrainingStateCallback(tmp_path / "states"), MetricsCallback({}, on="both"))
    find(tiny_trainer(callbacks=callbacks), tiny_data())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["eval_dataset", "num_epochs", "max_num_train_steps", "resume_from", "create_scheduler_fn"]
)
def test_arguments_of_train_that_a_trial_has_no_use_for_are_reported(name: str) -> None:
    for function in (find_learning_rate, find_batch_size):
        with pytest.raises(
            ConfigurationError, match=rf"{function.__name__} .*\['{name}'\].*\['collate_fn', .*Leave out"
        ):
            function(tiny_trainer(), tiny_data(), 4, **{name: None})


def test_a_call_in_the_middle_of_a_run_is_refused(find: Finder) -> None:
    class Calls(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            find(trainer, tiny_data())

    with pytest.raises(ConfigurationError, match=r"called inside a run.*afterwards.*run_eval_epoch"):
        tiny_trainer(callbacks=[Calls()]).train(tiny_data(), num_epochs=1)


def test_a_model_that_cannot_be_copied_is_reported(find: Finder) -> None:
    model = tiny_network()
    model.cached = model[0].weight * 2  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match=r"trainer\.model.*Sequential.*copied.*copy\.deepcopy"):
        find(tiny_trainer(model=model), tiny_data())
