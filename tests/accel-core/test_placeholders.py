"""Placeholders: numbers of the run, written down before it is known."""

import ast
import inspect
import operator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from accel_core import ConfigurationError, Trainer, TrainerPlaceholderValues
from accel_core.run import placeholders
from accel_core.run.placeholders import Placeholder, resolve_placeholders

DATA = TensorDataset(torch.randn(20, 2), torch.zeros(20, 1))
P = TrainerPlaceholderValues


class Config:
    """The numbers that placeholders read."""

    num_epochs, num_update_steps_per_epoch, num_update_steps = 3, 5, 15
    train_dataloader_len, eval_dataloader_len = 10, 4


def run_with(create_scheduler_fn: Any, **arguments: Any) -> Trainer:
    model = nn.Linear(2, 1)
    trainer = Trainer(
        model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1), callbacks=[]
    )
    trainer.train(
        DATA,
        **{"num_epochs": 3, "per_device_batch_size": 2, **arguments},
        create_scheduler_fn=create_scheduler_fn,
    )
    return trainer


class Kept:
    """A scheduler that keeps its arguments; the optimizer comes behind those that the partial has by position."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args[:-1], kwargs

    def step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}


def test_each_placeholder_has_its_number_by_keyword_and_by_position() -> None:
    trainer = run_with(
        partial(
            Kept,
            P.NUM_EPOCHS,
            [P.NUM_UPDATE_STEPS, {"deep": (P.NUM_UPDATE_STEPS_PER_EPOCH,)}],
            train=P.TRAIN_DATALOADER_LEN,
            evaluation=P.EVAL_DATALOADER_LEN,
            plain=7,
        ),
        gradient_accumulation_steps=3,
        eval_dataset=DATA,
        eval_per_device_batch_size=6,
    )
    assert trainer.scheduler.args == (3, [12, {"deep": (4,)}])
    assert trainer.scheduler.kwargs == {"train": 10, "evaluation": 4, "plain": 7}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        (2 * P.NUM_EPOCHS, 6),
        (P.NUM_EPOCHS * P.NUM_UPDATE_STEPS_PER_EPOCH, 15),
        (P.NUM_EPOCHS * 2 + 1, 7),
        (1 + P.NUM_EPOCHS, 4),
        (10 - P.NUM_EPOCHS, 7),
        (P.NUM_EPOCHS - 10, -7),
        (6 / P.NUM_EPOCHS, 2.0),
        (P.NUM_UPDATE_STEPS // 4, 3),
        (100 // (P.NUM_EPOCHS + P.NUM_EPOCHS), 16),
        (0.1 * P.NUM_UPDATE_STEPS, 1.5),
        ((P.TRAIN_DATALOADER_LEN - P.EVAL_DATALOADER_LEN) / 4, 1.5),
    ],
)
def test_arithmetic_on_either_side_and_between_placeholders(expression: Any, value: float) -> None:
    """Lesson A32: `2*P`, `P*Q` and `P*2+1` failed."""
    resolved = resolve_placeholders(expression, Config)
    assert resolved == value
    assert type(resolved) is type(value)


_LEAVES: st.SearchStrategy[tuple[Any, Any]] = st.one_of(
    st.integers(1, 9).map(lambda number: (number, number)),
    st.sampled_from([(P.NUM_EPOCHS, 3), (P.NUM_UPDATE_STEPS, 15), (P.EVAL_DATALOADER_LEN, 4)]),
)


def _combined(parts: st.SearchStrategy[tuple[Any, Any]]) -> st.SearchStrategy[tuple[Any, Any]]:
    operations = st.sampled_from([operator.add, operator.sub, operator.mul])
    return st.tuples(operations, parts, parts).map(
        lambda made: (made[0](made[1][0], made[2][0]), made[0](made[1][1], made[2][1]))
    )


@given(st.recursive(_LEAVES, _combined, max_leaves=8))
def test_any_expression_gives_what_python_gives_for_the_numbers(made: tuple[Any, Any]) -> None:
    expression, expected = made
    assert resolve_placeholders(expression, Config) == expected


def test_an_expression_can_be_read() -> None:
    assert repr(2 * P.NUM_EPOCHS + 1) == "((2 * NUM_EPOCHS) + 1)"


@pytest.mark.parametrize("other", ["3", None, [1], True])
def test_what_is_no_number_cannot_be_combined(other: Any) -> None:
    with pytest.raises(TypeError):
        P.NUM_EPOCHS + other


def test_the_same_partial_serves_several_runs() -> None:
    create_scheduler_fn = partial(Kept, total=P.NUM_UPDATE_STEPS)
    assert run_with(create_scheduler_fn, num_epochs=1).scheduler.kwargs == {"total": 10}
    assert run_with(create_scheduler_fn, num_epochs=4).scheduler.kwargs == {"total": 40}
    assert isinstance(create_scheduler_fn.keywords["total"], Placeholder)


def test_a_scheduler_of_torch_runs_over_exactly_the_updates_of_the_run() -> None:
    """OneCycleLR raises when it is stepped once too often."""
    scheduler = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=P.NUM_UPDATE_STEPS)
    trainer = run_with(scheduler, gradient_accumulation_steps=4, max_num_train_steps=8)
    assert trainer.scheduler.last_epoch == trainer.run_progress.updates_completed == 8


def test_what_is_not_known_is_told_by_its_name() -> None:
    with pytest.raises(ConfigurationError, match=r"EVAL_DATALOADER_LEN .*no length.*Write the number"):
        run_with(partial(Kept, 2 * P.EVAL_DATALOADER_LEN + 1))


def test_nothing_is_evaluated_as_text() -> None:
    """Lesson A32: no `eval`."""
    calls = [
        node.func
        for node in ast.walk(ast.parse(inspect.getsource(placeholders)))
        if isinstance(node, ast.Call)
    ]
    assert not {"eval", "exec", "compile"} & {call.id for call in calls if isinstance(call, ast.Name)}
