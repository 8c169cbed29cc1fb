"""What trains without an error and learns nothing good gets one warning with the way out, and only where accel is sure."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from accel_core import AccelWarning, Trainer, TrainerCallback
from tiny import tiny_data, tiny_network, tiny_trainer

INPUTS = tiny_data(12).tensors[0]


def warnings_of(run: Any) -> list[str]:
    """The sentences of accel, each as often as it was raised; torch has some of its own."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if issubclass(warning.category, AccelWarning)]


def train(
    data: Any,
    model: nn.Module | None = None,
    loss_func: Any = F.mse_loss,
    *,
    parameters: Any = None,
    **kwargs: Any,
) -> list[str]:
    model = nn.Linear(5, 1).double() if model is None else model
    optimizer = torch.optim.SGD(list(model.parameters()) if parameters is None else parameters, lr=0.01)
    trainer = kwargs.pop("trainer_class", Trainer)(
        model, loss_func, optimizer, kwargs.pop("callbacks", ()), seed=0
    )
    return warnings_of(lambda: trainer.train(data, num_epochs=2, per_device_batch_size=4, **kwargs))


# ------------------------------------------------------------------ shapes that broadcast

ROWS = INPUTS.sum(1, keepdim=True)
ELEMENTWISE = [
    nn.MSELoss(),
    nn.L1Loss(),
    nn.SmoothL1Loss(),
    nn.HuberLoss(),
    nn.PoissonNLLLoss(),
    F.mse_loss,
    F.l1_loss,
    partial(F.huber_loss, delta=0.5),
]


def name_of(loss_func: Any) -> str:
    """Without an address in memory, so that a test that failed is found again in the next process."""
    loss_func = getattr(loss_func, "func", loss_func)
    return str(getattr(loss_func, "__name__", loss_func))


@pytest.mark.parametrize("loss_func", ELEMENTWISE, ids=name_of)
def test_targets_that_broadcast_against_the_outputs_are_warned_of_once(loss_func: Any) -> None:
    found = train(
        TensorDataset(INPUTS, ROWS.flatten()),
        loss_func=loss_func,
        eval_dataset=TensorDataset(INPUTS, ROWS.flatten()),
    )
    assert len(found) == 1
    for word in ("(4, 1)", "(4,)", "squeeze"):
        assert word in found[0]


def test_outputs_that_broadcast_against_the_targets_are_warned_of_too() -> None:
    found = train(TensorDataset(INPUTS, ROWS), nn.Sequential(nn.Linear(5, 1).double(), nn.Flatten(0)))
    assert len(found) == 1 and "(4, 1)" in found[0] and "(4,)" in found[0]


def test_an_evaluation_alone_warns() -> None:
    trainer = tiny_trainer(model=nn.Linear(5, 1).double(), loss_func=nn.MSELoss())
    found = warnings_of(lambda: trainer.evaluate(TensorDataset(INPUTS, ROWS.flatten()), 4))
    assert len(found) == 1 and "squeeze" in found[0]


@pytest.mark.parametrize(
    "loss_func",
    [
        nn.MSELoss(),
        nn.BCEWithLogitsLoss(),
        lambda outputs, targets: (outputs[:, 0] - targets).square().mean(),
    ],
)
def test_equal_shapes_and_losses_of_the_users_own_are_no_matter(loss_func: Any) -> None:
    targets = ROWS.flatten() if not isinstance(loss_func, nn.Module) else ROWS.sigmoid()
    assert train(TensorDataset(INPUTS, targets), loss_func=loss_func) == []


def test_one_number_for_all_outputs_may_broadcast() -> None:
    def one_target(samples: list[Any]) -> Any:
        inputs, targets = torch.utils.data.default_collate(samples)
        return inputs, targets

    model = nn.Linear(5, 3).double()
    assert (
        train(
            TensorDataset(INPUTS, ROWS),
            model,
            loss_func=lambda o, t: F.mse_loss(o, t.expand_as(o)),
            collate_fn=one_target,
        )
        == []
    )


def test_a_sum_is_warned_of() -> None:
    for loss_func in (nn.MSELoss(reduction="sum"), partial(F.mse_loss, reduction="sum")):
        found = train(TensorDataset(INPUTS, ROWS), loss_func=loss_func)
        assert len(found) == 1 and "reduction='mean'" in found[0]


# ------------------------------------------------------------------ a third element

TRIPLES = TensorDataset(INPUTS, ROWS, torch.ones(12))


class Hears(TrainerCallback):
    def on_train_step_end(self, trainer: Trainer, batch: Any, batch_output: Any, step: int) -> None:
        assert len(batch) == 3


class Uses(Trainer):
    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        output = super().calculate_train_batch_loss(batch)
        return {**output, "loss": output["loss"] * batch[2].mean()}


def test_a_third_element_that_nobody_reads_is_warned_of_once() -> None:
    found = train(TRIPLES, eval_dataset=TRIPLES)
    assert len(found) == 1
    for word in ("3 elements", "calculate_train_batch_loss", "calculate_eval_batch_loss"):
        assert word in found[0]
    trainer = tiny_trainer(model=nn.Linear(5, 1).double(), loss_func=F.mse_loss)
    assert len(warnings_of(lambda: trainer.evaluate(TRIPLES))) == 1


def test_a_third_element_for_a_callback_or_a_step_of_ones_own_is_no_matter() -> None:
    assert train(TRIPLES, callbacks=[Hears()]) == []
    assert train(TRIPLES, trainer_class=Uses) == []
    assert train(TensorDataset(INPUTS, ROWS)) == []
    assert train(TensorDataset(INPUTS, ROWS, torch.arange(12))) == [], "it may number the samples"


# ------------------------------------------------------------------ parameters that are not reached


class Half(nn.Module):
    """Leaves a layer out, except in some batches."""

    def __init__(self, uses_all_from: int | None = None) -> None:
        super().__init__()
        self.used = nn.Linear(5, 1).double()
        self.spare = nn.Linear(5, 1).double()
        self.uses_all_from = uses_all_from
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        outputs = self.used(inputs)
        if self.uses_all_from is not None and self.calls >= self.uses_all_from:
            outputs = outputs + self.spare(inputs)
        return outputs  # type: ignore[no-any-return]


DATA = TensorDataset(INPUTS, ROWS)


def test_parameters_that_the_first_update_does_not_reach_are_named_once() -> None:
    found = train(DATA, Half())
    assert len(found) == 1
    for word in ("spare.weight", "spare.bias", "requires_grad_(False)"):
        assert word in found[0]
    assert "used" not in found[0]


def test_parameters_of_other_modules_of_the_trainer_are_named_too() -> None:
    class WithHead(Trainer):
        def __init__(
            self, model: nn.Module, loss_func: Any, optimizer: Any, *args: Any, **kwargs: Any
        ) -> None:
            super().__init__(model, loss_func, optimizer, *args, **kwargs)
            self.head = nn.Linear(2, 2)
            optimizer.add_param_group({"params": list(self.head.parameters())})

    found = train(DATA, trainer_class=WithHead)
    assert len(found) == 1 and "trainer.head.weight" in found[0]


def test_a_loss_that_depends_on_nothing_trained_is_warned_of() -> None:
    model = Half()
    found = train(DATA, model, parameters=list(model.spare.parameters()))
    assert len(found) == 1 and "nothing is trained" in found[0]


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        (Half(uses_all_from=1), {}),
        (Half(uses_all_from=2), {"gradient_accumulation_steps": 3}),
        (Half().requires_grad_(True), {"freeze": True}),
    ],
    ids=["reached", "reached in the second step of the update", "frozen"],
)
def test_what_is_reached_or_frozen_is_no_matter(model: Any, kwargs: dict[str, Any]) -> None:
    model = Half(model.uses_all_from)
    if kwargs.pop("freeze", False):
        model.spare.requires_grad_(False)
    assert train(DATA, model, **kwargs) == []


def test_a_backward_of_ones_own_is_left_alone() -> None:
    class ByHand(Trainer):
        def backward_step(self, loss: torch.Tensor) -> None:
            for parameter, gradient in zip(
                self.model.used.parameters(),
                torch.autograd.grad(loss, list(self.model.used.parameters())),
                strict=True,
            ):
                parameter.grad = gradient

    assert train(DATA, Half(), trainer_class=ByHand) == []


def test_a_warning_that_is_an_error_leaves_everything_as_it_was() -> None:
    model = Half()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = tiny_trainer(model=model, loss_func=F.mse_loss)
    with pytest.raises(AccelWarning):
        trainer.train(DATA, num_epochs=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert trainer.run_progress.updates_completed == 0


def test_ordinary_training_has_no_warning() -> None:
    assert train(tiny_data(), tiny_network(), F.cross_entropy, eval_dataset=tiny_data()) == []
