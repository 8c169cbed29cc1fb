"""`describe()`: what will happen, in words."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from accel_core import LimitBatches, LimitBatchesCallback, Trainer, TrainerCallback
from tiny import tiny_data, tiny_trainer

DATA = TensorDataset(torch.randn(1000, 2), torch.zeros(1000, 1))


class Late(TrainerCallback):
    order = 5

    def on_run_close(self, trainer: Trainer) -> None: ...


class Early(TrainerCallback):
    def on_train_epoch_start(self, trainer: Trainer) -> None: ...

    def on_optimizer_step_end(self, trainer: Trainer) -> None: ...


class Describing(TrainerCallback):
    """Asks in the run itself."""

    def on_training_run_start(self, trainer: Trainer) -> None:
        self.text = trainer.describe()


def create(*callbacks: Any) -> Trainer:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    return Trainer(
        model,
        nn.functional.mse_loss,
        torch.optim.SGD(model.parameters(), lr=0.0),
        callbacks=callbacks,
        seed=8,
    )


def test_before_a_run_it_tells_what_is_known() -> None:
    text = create(Late(), Early()).describe()
    assert re.search(r"model: Linear, 3 parameters.*\b2\b.* trainable", text)
    assert "optimizer: SGD" in text
    assert "processes: 1, layout: a single process, device: cpu, precision: no" in text
    assert re.search("training: .*before train", text)


def test_callbacks_stand_in_their_order_with_what_they_listen_to() -> None:
    lines = create(Late(), Early(), TrainerCallback()).describe().splitlines()
    assert lines[-3:] == [
        "  Early (order 0): on_train_epoch_start, on_optimizer_step_end",
        "  TrainerCallback (order 0): no events",
        "  Late (order 5): on_run_close",
    ]
    assert create().describe().splitlines()[-1] == "  none"


def test_in_a_run_it_tells_data_batches_updates_and_clipping() -> None:
    describing = Describing()
    create(describing).train(
        DATA,
        num_epochs=5,
        max_num_train_steps=60,
        eval_dataset=DataLoader(TensorDataset(torch.zeros(7, 2), torch.zeros(7, 1)), batch_size=4),
        per_device_batch_size=10,
        gradient_accumulation_steps=3,
        gradient_clip_norm=0.5,
    )
    for words in (
        "train_dataset: TensorDataset, 1,000 ",
        "eval_dataset: DataLoader, 7 ",
        r"\bbatches: 10 samples.*\b3 steps.*\b30 samples",
        "evaluation batches: 4 samples",
        r"updates: 60\b.*\b34\b.*\b2 epochs",
        "gradients: .*norm 0.5",
        "seed.*data: 8",
    ):
        assert re.search(words, describing.text), words


def test_what_is_not_known_is_told_as_unknown() -> None:
    class Unsized(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(DATA)

    describing = Describing()
    create(describing).train(Unsized(), max_num_train_steps=2)
    assert re.search("train_dataset: Unsized, .*unknown", describing.text)
    assert re.search(r"updates: 2\b.*unknown.* epoch, .*unknown.* epochs", describing.text)
    assert "gradients: not clipped" in describing.text


def test_limits_are_told_whoever_sets_them() -> None:
    assert "limit" not in create().describe()
    with LimitBatches(2, overfit=True):
        text = create(LimitBatchesCallback(3, eval_only=True)).describe()
    assert re.search("limit: .*evaluation.* 3 batches", text)
    assert re.search("limit: .*epoch.* 2 batches.*same ones", text)


def test_a_trainer_that_only_evaluates_describes_itself() -> None:
    trainer = Trainer(nn.Linear(2, 1), nn.functional.mse_loss, None, callbacks=[])
    trainer.evaluate(DATA)
    assert "optimizer: none" in trainer.describe()
    assert re.search("training: .*before train", trainer.describe())


def test_a_part_of_a_data_set_has_its_own_size() -> None:
    trainer = tiny_trainer()
    trainer.train(Subset(tiny_data(37), range(8)), num_epochs=1)
    assert "train_dataset: Subset, 8 samples" in trainer.describe()
