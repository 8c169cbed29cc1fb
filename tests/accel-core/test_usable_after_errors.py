"""What an error in the middle of a run leaves behind: a trainer that works, and nothing half-changed."""

import copy
import multiprocessing
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from accel_core import ConfigurationError, Trainer, TrainerCallback

SIZE = 12
INPUTS = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(INPUTS, (INPUTS.sum(1) > 0).long())


class BoomError(Exception):
    """What fails in these tests."""


class FailsAt(TrainerCallback):
    """Fails once, the n-th time that an event fires."""

    def __init__(self, event: str, number: int = 1) -> None:
        self.event, self.number = event, number

    def _count(self, event: str) -> None:
        if event == self.event:
            self.number -= 1
            if self.number == 0:
                raise BoomError(event)

    def on_training_run_start(self, trainer: Trainer) -> None:
        self._count("on_training_run_start")

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        self._count("on_train_epoch_start")

    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._count("on_train_step_end")

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self._count("on_optimizer_step_end")

    def on_eval_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._count("on_eval_step_end")

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        self._count("on_training_run_epoch_end")

    def on_training_run_end(self, trainer: Trainer) -> None:
        self._count("on_training_run_end")


class Closing(TrainerCallback):
    """Hears how a run ended."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        self.heard.append(error)

    def on_run_close(self, trainer: Trainer) -> None:
        self.heard.append("closed")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))


def create(*callbacks: Any, seed: int | None = 9, model: nn.Module | None = None) -> Trainer:
    model = network() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Trainer(model, nn.functional.cross_entropy, optimizer, callbacks=callbacks, seed=seed)


def train(trainer: Trainer, **arguments: Any) -> Any:
    return trainer.train(
        DATA, **{"num_epochs": 2, "eval_dataset": DATA, "per_device_batch_size": 4, **arguments}
    )


def weights(trainer: Trainer) -> dict[str, Any]:
    return {name: value.tolist() for name, value in trainer.model.state_dict().items()}


EVENTS = [
    ("on_training_run_start", 1),
    ("on_train_epoch_start", 2),
    ("on_train_step_end", 2),
    ("on_optimizer_step_end", 4),
    ("on_eval_step_end", 2),
    ("on_training_run_epoch_end", 1),
    ("on_training_run_end", 1),
]


@pytest.mark.parametrize(("event", "number"), EVENTS)
def test_after_an_error_everything_is_closed_and_the_users_objects_are_back(event: str, number: int) -> None:
    closing = Closing()
    trainer = create(FailsAt(event, number), closing)
    model, optimizer = trainer.model, trainer.optimizer
    with pytest.raises(BoomError) as caught:
        train(trainer)
    assert closing.heard == [caught.value, "closed"]
    assert trainer.model is model
    assert trainer.optimizer is optimizer
    assert all(parameter.grad is None for parameter in model.parameters())
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("event", "number"), EVENTS)
def test_a_failed_trainer_trains_evaluates_and_predicts_as_a_new_one(event: str, number: int) -> None:
    failed = create(FailsAt(event, number))
    with pytest.raises(BoomError):
        train(failed)
    fresh = create(model=copy.deepcopy(failed.model))
    fresh.optimizer.load_state_dict(copy.deepcopy(failed.optimizer.state_dict()))
    for trainer in (failed, fresh):
        trainer.predict(DATA)  # Seeds, where that has not happened yet.
    fresh.run_progress = failed.run_progress  # The order of the data goes on.
    histories = []
    for trainer in (failed, fresh):
        torch.manual_seed(5)
        histories.append(train(trainer).to_records())
        assert trainer.run_progress.epochs_completed == 2
        assert trainer.predict(DATA, 5).shape == (SIZE, 2)
    assert histories[0] == histories[1]
    assert weights(failed) == weights(fresh)
    assert failed.evaluate(DATA) == fresh.evaluate(DATA)


@pytest.mark.parametrize("event", ["on_training_run_start", "on_train_epoch_start", "on_train_step_end"])
def test_an_error_before_the_first_update_leaves_model_seed_and_history_as_they_were(event: str) -> None:
    """The same run afterwards gives what it would have given without the error, dropout and batch norm included."""
    failed, fresh = create(FailsAt(event)), create()
    failed.run_history.update_metric("kept", 1.0)
    failed.model.eval()
    before = weights(failed)
    with pytest.raises(BoomError):
        train(failed)
    assert weights(failed) == before
    assert not any(module.training for module in failed.model.modules())
    assert failed.run_history.get_metric_names() == {"kept"}
    assert train(failed).to_records() == train(fresh).to_records()
    assert weights(failed) == weights(fresh)


def test_an_error_after_updates_keeps_what_was_learned_and_recorded() -> None:
    trainer = create(FailsAt("on_optimizer_step_end", 5))
    with pytest.raises(BoomError):
        train(trainer)
    assert weights(trainer) != weights(create())
    assert trainer.run_progress.updates_completed == 5
    assert trainer.run_history.get_metric_names() == {"train_loss_epoch", "eval_loss_epoch"}


def test_an_error_in_evaluation_gives_every_module_its_mode_back() -> None:
    trainer = create(FailsAt("on_eval_step_end"))
    trainer.model.train()
    trainer.model[1].eval()  # type: ignore[index]
    state = random.getstate(), torch.get_rng_state().tolist()
    with pytest.raises(BoomError):
        trainer.evaluate(DATA)
    assert [module.training for module in trainer.model.modules()] == [True, True, False, True, True]
    assert (random.getstate(), torch.get_rng_state().tolist()) == state
    assert trainer.run_history.to_records() == []


def test_an_evaluation_that_fails_leaves_the_data_of_the_training_run() -> None:
    trainer = create()
    train(trainer)
    expected = trainer.evaluate()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        trainer.evaluate([(torch.zeros(1), 0)])
    assert trainer.eval_dataset is DATA
    assert trainer.evaluate() == expected


def test_a_refused_call_leaves_the_run_before_it_as_it_was() -> None:
    trainer = create()
    records, config = train(trainer).to_records(), trainer.run_config
    for wrong in (
        lambda: trainer.train(DATA, num_epochs=0),
        lambda: trainer.train([], num_epochs=1),
        lambda: trainer.train(DATA, num_epochs=1, create_scheduler_fn="cosine"),  # type: ignore[arg-type]
        lambda: trainer.evaluate(DATA, per_device_batch_size=0),
        lambda: trainer.predict(None),
    ):
        with pytest.raises(ConfigurationError):
            wrong()
    assert trainer.run_history.to_records() == records
    assert trainer.run_config is config
    assert trainer.train_dataset is trainer.eval_dataset is DATA
    assert trainer.run_progress.epochs_completed == 2


class FailsToRead(Dataset[Any]):
    """Fails while `broken`."""

    broken = True

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        if self.broken and index == 3:
            raise BoomError("unreadable")
        return DATA[index]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_that_failed_can_be_mended_and_trained_on(num_workers: int) -> None:
    trainer, data = create(), FailsToRead()
    with pytest.raises(BoomError, match="unreadable"):
        trainer.train(data, num_epochs=1, train_dataloader_kwargs={"num_workers": num_workers})
    assert multiprocessing.active_children() == []
    data.broken = False
    trainer.train(data, num_epochs=1, train_dataloader_kwargs={"num_workers": num_workers})
    assert trainer.run_progress.epochs_completed == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_interrupts_close_the_run_like_errors(error: type[BaseException]) -> None:
    """Lesson A31."""
    closing = Closing()

    class Interrupted(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            if trainer.run_progress.updates_completed == 2:
                raise error

    trainer = create(closing, Interrupted())
    with pytest.raises(error) as caught:
        train(trainer)
    assert closing.heard == [caught.value, "closed"]
    trainer.callbacks.clear_callbacks()
    assert train(trainer).get_metric_names() == {"train_loss_epoch", "eval_loss_epoch"}


def test_an_error_of_torch_stays_what_it_is_and_gets_the_way_out_as_a_note() -> None:
    closing = Closing()
    with pytest.raises(ValueError, match=r"^Expected more than 1 value per channel") as caught:
        create(closing).train(DATA, num_epochs=1, per_device_batch_size=11)
    assert "drop_last" in caught.value.__notes__[0]
    assert closing.heard == [caught.value, "closed"]


def test_the_way_out_of_a_batch_of_one_works() -> None:
    trainer = create()
    trainer.train(DATA, num_epochs=1, per_device_batch_size=11, train_dataloader_kwargs={"drop_last": True})
    assert trainer.run_progress.updates_completed == 1


@pytest.mark.parametrize(
    "pack",
    [
        lambda x: {"a": x, "b": {"c": x}},
        lambda x: (x, [x, x]),
        lambda x: [{"a": x}, x],
    ],
)
def test_the_default_loss_step_takes_nested_inputs(pack: Callable[[torch.Tensor], Any]) -> None:
    """The model gets what the data set gave; the batch size is that of the first tensor in it."""

    def first(value: Any) -> torch.Tensor:
        while not isinstance(value, torch.Tensor):
            value = next(iter(value.values())) if isinstance(value, dict) else value[0]
        return value

    class OfNested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, inputs: Any) -> torch.Tensor:
            return self.inner(first(inputs))  # type: ignore[no-any-return]

    nested, plain = create(model=OfNested()), create()
    samples = [(pack(x), y) for x, y in DATA]
    expected = train(plain, num_epochs=1)
    torch.manual_seed(9)
    history = nested.train(samples, num_epochs=1, eval_dataset=samples, per_device_batch_size=4)
    assert history.get_metric_values("train_loss_epoch") == pytest.approx(
        expected.get_metric_values("train_loss_epoch")
    )
