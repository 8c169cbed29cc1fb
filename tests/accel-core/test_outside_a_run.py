"""What only a run may call says so outside of one, before a run, between runs and after them."""

import pytest
import torch

from accel_core import ConfigurationError, Trainer
from accel_core.extending import MeanTrackers, Step, UpdateGroup
from tiny import tiny_data, tiny_trainer

STEP = Step(next(iter(torch.utils.data.DataLoader(tiny_data(), batch_size=4))), True, False, 4)
CALLS = {
    "run_training": lambda trainer: trainer.run_training(),
    "run_train_epoch": lambda trainer: trainer.run_train_epoch(),
    "run_train_step": lambda trainer: trainer.run_train_step(STEP, UpdateGroup(iter([STEP]), True, 4)),
    "run_update": lambda trainer: trainer.run_update(UpdateGroup(iter([STEP]), True, 4)),
    "run_eval_epoch": lambda trainer: trainer.run_eval_epoch(tiny_data()),
    "run_eval_step": lambda trainer: trainer.run_eval_step(STEP, MeanTrackers(torch.device("cpu"))),
    "backward_step": lambda trainer: trainer.backward_step(torch.ones((), requires_grad=True)),
    "clip_gradients": lambda trainer: trainer.clip_gradients(),
    "optimizer_step": lambda trainer: trainer.optimizer_step(),
    "scheduler_step": lambda trainer: trainer.scheduler_step(),
    "optimizer_zero_grad": lambda trainer: trainer.optimizer_zero_grad(),
    "create_run_config": lambda trainer: trainer.create_run_config(num_epochs=1),
    "create_scheduler": lambda trainer: trainer.create_scheduler(),
}


@pytest.mark.parametrize("is_first", [True, False], ids=["before the first run", "after a run"])
@pytest.mark.parametrize("method", CALLS)
def test_a_method_of_a_run_says_so(method: str, is_first: bool) -> None:
    trainer = tiny_trainer()
    if not is_first:
        trainer.train(tiny_data(), num_epochs=1)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(
        ConfigurationError, match=rf"^{method} was called outside of a run.*Call train or evaluate"
    ):
        CALLS[method](trainer)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    "method", ["run_training", "run_train_epoch", "create_run_config", "create_scheduler"]
)
def test_what_belongs_to_training_says_so_inside_an_evaluation(method: str) -> None:
    class Evaluating(Trainer):
        def evaluation_run_start(self) -> None:
            CALLS[method](self)

    with pytest.raises(ConfigurationError, match=rf"^{method} was called outside of a run"):
        tiny_trainer(Evaluating).evaluate(tiny_data())
