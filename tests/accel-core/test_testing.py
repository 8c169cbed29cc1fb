"""The functions that users test their own parts with catch planted faults, and name what is missing."""

import random
import time

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from accel_core import DEFAULT_CALLBACKS, ConfigurationError, LogMetricsCallback, Trainer, TrainerCallback
from accel_core.testing import assert_processes_agree, assert_resumes_exactly
from tiny import tiny_data, tiny_network, tiny_trainer


class Curriculum(TrainerCallback):
    """Changes the learning rate by what it has counted."""

    def __init__(self):
        self.curriculum = 0

    def on_optimizer_step_end(self, trainer):
        self.curriculum += 1
        for group in trainer.optimizer.param_groups:
            group["lr"] = 0.1 / (1 + self.curriculum)


class SavedCurriculum(Curriculum):
    def state_dict(self):
        return {"curriculum": self.curriculum}

    def load_state_dict(self, state):
        self.curriculum = state["curriculum"]


class NotLoaded(SavedCurriculum):
    def load_state_dict(self, state):
        pass


class OwnRandomNumbers(TrainerCallback):
    """Draws from a generator that it seeds itself."""

    def __init__(self, seed=1):
        self.generator = random.Random(seed)

    def on_optimizer_step_end(self, trainer):
        trainer.optimizer.param_groups[0]["lr"] = self.generator.random()


class OwnTensorGenerator(OwnRandomNumbers):
    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def on_optimizer_step_end(self, trainer):
        trainer.optimizer.param_groups[0]["lr"] = float(torch.rand(1, generator=self.generator))


OUTSIDE = random.Random(1)


class RandomNumbersOutside(TrainerCallback):
    def on_optimizer_step_end(self, trainer):
        trainer.optimizer.param_groups[0]["lr"] = OUTSIDE.random()


class DrawsWhileItSaves(TrainerCallback):
    def state_dict(self):
        return {"drawn": float(torch.rand(()))}


class Patient(LogMetricsCallback):
    """Has an attribute of its own beside those of a class of accel."""

    def __init__(self):
        super().__init__()
        self.patience = 9

    def on_optimizer_step_end(self, trainer):
        super().on_optimizer_step_end(trainer)
        self.patience -= 1


class CountingTrainer(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.warmth = 1.0

    def calculate_train_batch_loss(self, batch):
        self.warmth *= 0.9
        output = super().calculate_train_batch_loss(batch)
        return {**output, "loss": output["loss"] * self.warmth}


class CountingModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = tiny_network()
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        return self.inner(inputs) * (1 + self.calls)


class CountingLoss:
    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, targets):
        self.calls += 1
        return nn.functional.cross_entropy(outputs, targets) / self.calls


class CountingData(Dataset):
    def __init__(self):
        self.data = tiny_data(24)
        self.reads = 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.reads += 1
        inputs, target = self.data[index]
        return inputs + self.reads, target


class ByTheClock(CountingData):
    def __getitem__(self, index):
        inputs, target = self.data[index]
        return inputs + time.perf_counter(), target


def trainer_with(*callbacks, **kwargs):
    return lambda: tiny_trainer(callbacks=[each() for each in callbacks], **kwargs)


@pytest.mark.parametrize(
    ("make_trainer", "data", "named"),
    [
        (trainer_with(Curriculum), None, "`curriculum` of Curriculum changed and is not in its state_dict"),
        (trainer_with(NotLoaded), None, "`curriculum` of NotLoaded changed and is not put back by"),
        (trainer_with(OwnRandomNumbers), None, "`generator` of OwnRandomNumbers changed"),
        (trainer_with(OwnTensorGenerator), None, "`generator` of OwnTensorGenerator changed"),
        (trainer_with(RandomNumbersOutside), None, "random numbers of a generator that is not seeded anew"),
        (trainer_with(lambda: OwnRandomNumbers(None)), None, "`generator` of OwnRandomNumbers"),
        (trainer_with(Patient), None, ":\n- the attribute `patience` of Patient changed [^-]*$"),
        (trainer_with(trainer_class=CountingTrainer), None, "`warmth` of CountingTrainer changed"),
        (lambda: tiny_trainer(model=CountingModel()), None, "`calls` of CountingModel changed"),
        (lambda: tiny_trainer(loss_func=CountingLoss()), None, "`calls` of CountingLoss changed"),
        (trainer_with(), CountingData(), "`reads` of CountingData changed"),
        (trainer_with(), ByTheClock(), "in the batch.*Something is no function of the seed: the clock"),
        (trainer_with(DrawsWhileItSaves), None, "in the random state of torch.*`state_dict` that changes"),
    ],
)
def test_planted_faults_are_named(make_trainer, data, named):
    with pytest.raises(AssertionError, match=f"(?s){named}"):
        assert_resumes_exactly(make_trainer, data or tiny_data(24), kills=2, per_device_batch_size=4)


def test_what_is_exact_passes_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_trainer = trainer_with(*DEFAULT_CALLBACKS, SavedCurriculum)
    assert_resumes_exactly(make_trainer, tiny_data(), kills=5, eval_dataset=tiny_data())
    assert not list(tmp_path.iterdir())


def test_an_attribute_may_be_left_out_if_it_changes_nothing():
    class Counts(TrainerCallback):
        count = 0

        def on_optimizer_step_end(self, trainer):
            self.count += 1

    with pytest.raises(AssertionError, match="`count` of Counts"):
        assert_resumes_exactly(trainer_with(Counts), tiny_data(), kills=1)
    assert_resumes_exactly(trainer_with(Counts), tiny_data(), kills=1, ignore=("Counts.count",))


def test_a_run_that_cannot_end_in_between_is_refused():
    with pytest.raises(ConfigurationError, match="1 update, but at least 2"):
        assert_resumes_exactly(trainer_with(), tiny_data(8), num_epochs=1)
    with pytest.raises(ConfigurationError, match="kills is 0"):
        assert_resumes_exactly(trainer_with(), tiny_data(8), kills=0)
    with pytest.raises(ConfigurationError, match="num_processes is 1"):
        assert_processes_agree("", 1)
    with pytest.raises(ConfigurationError, match=r"script is 'no.py', which is no file"):
        assert_processes_agree("no.py", 2)


SCRIPT = """
    import torch
    from accel_core import Trainer, TrainerCallback

    class Shifts(TrainerCallback):
        def on_training_run_end(self, trainer):
            with torch.no_grad():
                trainer.get_model().bias.add_({shift} * trainer.accelerator.process_index)

    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(16, 3), torch.randn(16, 1))
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, torch.nn.MSELoss(), optimizer, [Shifts()], seed=1)
    trainer.train(data, 1, per_device_batch_size=4)
"""


@pytest.mark.slow
def test_processes_that_agree_pass_and_others_are_named():
    assert_processes_agree(SCRIPT.format(shift=0), 2)
    with pytest.raises(AssertionError, match=r"(?s)do not agree about `trainer`:.*the parameter bias"):
        assert_processes_agree(SCRIPT.format(shift=1), 2)


@pytest.mark.slow
def test_a_process_that_fails_is_told_with_its_error():
    with pytest.raises(AssertionError, match=r"(?s)failed with exit status.*the planted error"):
        assert_processes_agree("raise ValueError('the planted error')", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("raise SystemExit(0)", r"\[0, 1\] left the script before its end"),
        ("model = None", "has no trainer among its global names"),
    ],
)
def test_a_script_that_proves_nothing_is_no_success(script, told):
    with pytest.raises(AssertionError, match=told):
        assert_processes_agree(script, 2)


def test_processes_that_do_not_end_are_ended():
    with pytest.raises(AssertionError, match="did not end within 1 second"):
        assert_processes_agree("import time\ntime.sleep(600)", 2, timeout=1)
