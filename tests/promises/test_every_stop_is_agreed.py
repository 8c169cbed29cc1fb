"""A stop asked for on one process stops all of them at the same update, for the same reason."""

import json
import time
from pathlib import Path

import pytest

from launching import launch

SCRIPT = """
import json, sys
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import TensorDataset
from accel_core import TerminateOnNaNCallback, Trainer, TrainerCallback

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
assert accelerator.num_processes == 2
data = TensorDataset(torch.ones(40, 3), torch.ones(40, 1))


class AskOnSecond(TrainerCallback):
    def __init__(self, event, update):
        self.event, self.update = event, update

    def ask(self, trainer, event, update):
        if rank == 1 and (event, update) == (self.event, self.update):
            trainer.request_stop(f"asked in {event}")

    def on_train_step_end(self, trainer, **kwargs):
        self.ask(trainer, "on_train_step_end", trainer.run_progress.updates_completed + 1)

    def on_optimizer_step_end(self, trainer):
        self.ask(trainer, "on_optimizer_step_end", trainer.run_progress.updates_completed)

    def on_eval_epoch_end(self, trainer, **kwargs):
        self.ask(trainer, "on_eval_epoch_end", trainer.run_progress.updates_completed)

    def on_training_run_epoch_end(self, trainer):
        self.ask(trainer, "on_training_run_epoch_end", trainer.run_progress.updates_completed)


class Poisoned(Trainer):
    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        if rank == 1 and self.run_progress.updates_completed == 3:
            output["loss"] = output["loss"] * float("nan")
        return output


def train(callbacks, trainer_class=Trainer):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = trainer_class(model, nn.functional.mse_loss, optimizer, callbacks=callbacks, accelerator=accelerator, seed=1)
    trainer.train(data, num_epochs=3, eval_dataset=data, per_device_batch_size=4)
    return [trainer.run_progress.updates_completed, trainer.run_progress.epochs_completed, trainer.stop_reason]


results = {}
for event in ("on_train_step_end", "on_optimizer_step_end", "on_eval_epoch_end", "on_training_run_epoch_end"):
    for update in (2, 5, 15):
        results[f"{event} {update}"] = train([AskOnSecond(event, update)])
results["nan"] = train([TerminateOnNaNCallback], Poisoned)
json.dump(results, open(f"{sys.argv[1]}/{rank}.json", "w"))
"""


def test_all_processes_stop_at_the_same_update_for_the_same_reason(tmp_path: Path) -> None:
    """Lesson A14."""
    launch(SCRIPT, processes=2, args=(str(tmp_path),), timeout=120)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    updates = {name: result[0] for name, result in first.items()}
    assert updates["on_train_step_end 2"] == updates["on_optimizer_step_end 2"] == 3
    assert updates["on_eval_epoch_end 5"] == updates["on_training_run_epoch_end 5"] == 5
    assert updates["on_eval_epoch_end 15"] == 15
    assert first["on_train_step_end 2"][2] == "asked in on_train_step_end"
    assert "nan" in first["nan"][2]
    assert first["nan"][0] == 5


FAILING = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from accel_core import Trainer, TrainerCallback

class Failing(TrainerCallback):
    def on_train_step_start(self, trainer, **kwargs):
        if trainer.accelerator.process_index == 1 and trainer.run_progress.updates_completed == 2:
            raise RuntimeError("the first error")

model = nn.Linear(3, 1)
trainer = Trainer(model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.01), callbacks=[Failing])
trainer.train(TensorDataset(torch.ones(40, 3), torch.ones(40, 1)), num_epochs=100, per_device_batch_size=4)
"""


def test_an_exception_on_one_process_ends_the_others_quickly_with_the_error_to_be_seen() -> None:
    began = time.monotonic()
    with pytest.raises(BaseException, match="the first error"):
        launch(FAILING, processes=2, timeout=100)
    assert time.monotonic() - began < 90


def test_processes_that_do_not_see_each_other_are_refused() -> None:
    with pytest.raises(BaseException, match="does not see the others"):
        launch(FAILING, processes=2, timeout=100, env={"ACCELERATE_USE_CPU": "false"})
