"""An engine is one class and one entry in LAYOUTS: here one that no line of the library knows."""

import pytest
import torch
from torch import nn

from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_core.engines import choose
from accel_core.engines.choose import Layout
from accel_core.engines.single import SingleProcess
from tiny import tiny_data


class Recording(SingleProcess):
    """One process; it doubles each gradient, tells what it was asked for, and refuses to clip elements."""

    name = "recording"

    def __init__(self, accelerator, group):
        super().__init__(accelerator, group)
        self.asked = []

    def check(self, overridden, clip_value, clip_norm, has_plan):
        if clip_value is not None:
            raise ConfigurationError(
                f"gradient_clip_value is {clip_value}, but {self.name} clips by norm only."
            )

    def prepare(self, model, optimizer):
        self.asked.append("prepare")
        return super().prepare(model, optimizer)

    def bind(self, optimizer):
        super().bind(optimizer)
        self.asked.append("bind")
        self.backward = lambda loss: (2 * loss).backward()

    def module_to_evaluate(self, model):
        self.asked.append("evaluate")
        return model

    def main_files(self, scheduler, create_state):
        self.asked.append("save")
        return super().main_files(scheduler, create_state)

    def load_files(self, folder, scheduler, load):
        self.asked.append("load")
        super().load_files(folder, scheduler, load)


@pytest.fixture
def _recording_runs(monkeypatch):
    monkeypatch.setattr(choose, "LAYOUTS", [Layout(lambda accelerator: True, Recording), *choose.LAYOUTS])


def create_trainer(callbacks=()):
    torch.manual_seed(0)
    model = nn.Linear(5, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, nn.functional.cross_entropy, optimizer, callbacks, seed=1)


def train(trainer, **arguments):
    trainer.train(tiny_data(), num_epochs=1, eval_dataset=tiny_data(), per_device_batch_size=4, **arguments)
    return trainer.model.weight.detach().clone()


class SaveAtEnd(TrainerCallback):
    def __init__(self, folder):
        self.folder = folder

    def on_training_run_end(self, trainer):
        trainer.save_training_state(self.folder)


@pytest.mark.usefixtures("_recording_runs")
def test_an_engine_of_ones_own_prepares_steps_evaluates_saves_and_loads(tmp_path):
    trainer = create_trainer([SaveAtEnd(tmp_path / "state")])
    weights = train(trainer)
    assert trainer.engine.asked == ["prepare", "bind", "evaluate", "save"]
    resumed = create_trainer()
    assert torch.equal(train(resumed, resume_from=tmp_path / "state"), weights)
    assert "load" in resumed.engine.asked


@pytest.mark.usefixtures("_recording_runs")
def test_what_a_step_calls_is_the_engines():
    doubled = train(create_trainer())
    choose.LAYOUTS.pop(0)
    trainer = create_trainer()
    trainer.optimizer.param_groups[0]["lr"] = 0.2
    assert torch.allclose(train(trainer), doubled)


@pytest.mark.usefixtures("_recording_runs")
def test_what_an_engine_does_not_do_is_refused_before_the_first_update():
    trainer = create_trainer()
    before = trainer.model.weight.detach().clone()
    with pytest.raises(
        ConfigurationError, match=r"gradient_clip_value is 1\.0, but recording clips by norm only"
    ):
        train(trainer, gradient_clip_value=1.0)
    assert torch.equal(trainer.model.weight, before)


def test_a_layout_that_nobody_knows_is_refused(monkeypatch):
    monkeypatch.setattr(choose, "LAYOUTS", [])
    with pytest.raises(ConfigurationError, match=r"which accel does not know.*Use one process, DDP, FSDP"):
        train(create_trainer())
