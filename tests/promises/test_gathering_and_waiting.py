"""Losses over the rows of all processes, collectives where a process has no batch, and what a process says that waits."""

import datetime
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_core.run.refused_collectives import COLLECTIVES
from case_runner import BATCH_SIZE, compare, run_as_script
from launching import launch

TIMEOUT = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=90))
CALLS = {
    "gather": lambda accelerator, rows: accelerator.gather(rows),
    "gather_for_metrics": lambda accelerator, rows: accelerator.gather_for_metrics(rows),
    "gather_for_metrics of objects": lambda accelerator, rows: accelerator.gather_for_metrics(["a"]),
    "reduce": lambda accelerator, rows: accelerator.reduce(rows.sum()),
    "pad_across_processes": lambda accelerator, rows: accelerator.pad_across_processes(rows),
    "wait_for_everyone": lambda accelerator, rows: accelerator.wait_for_everyone(),
    "check_trigger": lambda accelerator, rows: accelerator.check_trigger(),
}


def make_data(num_samples):
    generator = torch.Generator().manual_seed(num_samples)
    inputs = torch.randn(num_samples, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(0, 3, (num_samples,), generator=generator))


def make_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def train(batch_size, trainer_class=Trainer, num_samples=37, **kwargs):
    model = make_model()
    trainer = trainer_class(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        callbacks=[],
        seed=0,
    )
    trainer.train(make_data(num_samples), per_device_batch_size=batch_size, **{"num_epochs": 2, **kwargs})
    return {name: value.clone() for name, value in model.state_dict().items()}


class Contrastive(Trainer):
    """Pulls samples of one class together, among the rows of all processes (SupCon).

    Each process computes the loss of its own rows, or of all of them.
    """

    computes_all = False

    def calculate_train_batch_loss(self, batch):
        inputs, classes = batch
        rows = F.normalize(self.model(inputs), dim=1)
        every, all_classes = self.gather_with_grad(rows), self.gather(classes)
        first = sum(self.gather(torch.tensor(len(rows)))[: self.accelerator.process_index].tolist())
        own = range(len(every)) if self.computes_all else range(first, first + len(rows))
        similar = every[list(own)] @ every.T * 4
        is_itself = torch.zeros_like(similar, dtype=torch.bool)
        is_itself[range(len(own)), list(own)] = True
        is_pair = (all_classes[list(own), None] == all_classes[None]) & ~is_itself
        log_probability = similar - similar.masked_fill(is_itself, -torch.inf).logsumexp(1, keepdim=True)
        loss = -(log_probability * is_pair).sum(1) / is_pair.sum(1).clamp(min=1)
        return {"loss": loss.mean(), "model_outputs": rows, "batch_size": len(rows)}


class ContrastiveOfAll(Contrastive):
    computes_all = True


class LosesGradient(Trainer):
    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        self.gather(output["model_outputs"])
        return output


def lose_gradient(batch_size):
    with pytest.raises(ConfigurationError) as raised:
        train(batch_size, LosesGradient)
    return str(raised.value)


def gather_without_gradient(batch_size):
    class Gathers(TrainerCallback):
        def on_train_step_end(self, trainer, batch, batch_output, **kwargs):
            rows.append(len(trainer.gather(batch_output["model_outputs"].detach())))
            with torch.no_grad():
                rows.append(len(trainer.gather(batch_output["model_outputs"])))

        def on_optimizer_step_end(self, trainer):
            rows.append(len(trainer.gather(next(trainer.model.parameters()))))

    rows = []
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=[Gathers()], seed=0)
    trainer.train(make_data(8), num_epochs=1, per_device_batch_size=batch_size)
    return rows


class CallsAccelerator(Trainer):
    call = None

    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        if self.call is not None:
            type(self).call(self.accelerator, output["model_outputs"])
        return output


def call_accelerator(batch_size):
    """What an evaluation of 9, 13 and 16 samples says to each call, and whether one outside of a step works."""
    told = {}
    accelerator = Accelerator()
    model = make_model()
    for name, call in CALLS.items():
        for num_samples in (9, 13, 16):
            trainer_class = type("Calls", (CallsAccelerator,), {"call": call})
            trainer = trainer_class(
                model, nn.CrossEntropyLoss(), None, callbacks=[], seed=0, accelerator=accelerator
            )
            try:
                trainer.evaluate(make_data(num_samples), per_device_batch_size=batch_size)
                told[name, num_samples] = None
            except ConfigurationError as error:
                told[name, num_samples] = str(error)
    told["left behind"] = sorted(set(COLLECTIVES) & set(vars(accelerator)))
    told["outside"] = accelerator.gather(torch.ones(2)).tolist()
    return told


def gather_unlike(batch_size):
    trainer = Trainer(make_model(), nn.CrossEntropyLoss(), None, callbacks=[], seed=0)
    index, size = trainer.data_group.index, trainer.data_group.size
    rows = torch.full((index + 1, 2), float(index), requires_grad=True)
    gathered = trainer.gather_with_grad(rows)
    # What process r computes weighs r + 1, so each row gets the sum of these.
    (gathered * (index + 1)).sum().backward()
    with pytest.raises(ConfigurationError) if size > 1 else pytest.raises(ZeroDivisionError) as raised:
        _ = trainer.gather_with_grad(torch.ones(2, index + 1)), 1 // (size - 1)
    scalar = trainer.gather_with_grad(torch.tensor(1.0))
    return gathered.tolist(), rows.grad.tolist(), str(raised.value), scalar.shape


def describe(batch_size):
    return Trainer(make_model(), nn.CrossEntropyLoss(), None, callbacks=[]).describe()


CASES = {
    "own rows": lambda batch_size: train(batch_size, Contrastive, 32),
    "all rows": lambda batch_size: train(batch_size, ContrastiveOfAll, 32),
    "uneven rows": lambda batch_size: train(batch_size, Contrastive, 37),
    "accumulated": lambda batch_size: train(batch_size, Contrastive, 32, gradient_accumulation_steps=2),
    "gradient lost": lose_gradient,
    "no gradient": gather_without_gradient,
    "accelerator": call_accelerator,
    "unlike": gather_unlike,
    "describe": describe,
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Two processes, since what they give is told in detail."""
    return compare(CASES, __file__, 2, tmp_path_factory.mktemp("cases"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own rows", "all rows", "uneven rows", "accumulated"])
def test_weights_are_those_of_one_process(outcome, name):
    for weights in outcome.of(name):
        torch.testing.assert_close(weights, outcome.alone(name), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_own_rows_and_all_rows_give_the_same_update(outcome):
    for own, every in zip(outcome.of("own rows"), outcome.of("all rows"), strict=True):
        torch.testing.assert_close(own, every, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_gather_in_a_training_step_refuses_a_tensor_with_gradient(outcome):
    """On one process too, where the gradient would be there: the script should be right on several."""
    for told in [*outcome.of("gradient lost"), lose_gradient(BATCH_SIZE)]:
        assert "gather_with_grad" in told and "detach" in told


@pytest.mark.slow
def test_gather_takes_what_has_no_gradient_and_weights_between_updates(outcome):
    assert outcome.of("no gradient") == [[8, 8, 16]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_collectives_of_the_accelerator_are_refused_where_a_process_has_no_batch(outcome, name):
    for told in outcome.of("accelerator"):
        method = name.split(" ")[0]
        assert f"trainer.accelerator.{method} " in told[name, 9] and "MetricsCallback" in told[name, 9]
        assert told[name, 16] is None
        assert told["left behind"] == [] and told["outside"] == [1.0] * 4


@pytest.mark.slow
def test_collectives_of_the_accelerator_are_refused_where_the_rows_differ(outcome):
    """Gloo would end the job by an abort."""
    for told in outcome.of("accelerator"):
        for name in CALLS:
            needs_equal = name in ("gather", "gather_for_metrics")
            assert (told[name, 13] is not None) == needs_equal, told[name, 13]
        assert re.search(r"\(3, 3\).*\(2, 3\).*trainer\.gather", told["gather", 13])


@pytest.mark.slow
def test_each_row_gets_the_gradients_of_all_processes(outcome):
    for index, (gathered, gradient, told, shape) in enumerate(outcome.of("unlike")):
        assert gathered == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
        assert gradient == [[3.0, 3.0]] * (index + 1)
        assert "(2, 1)" in told and "(2, 2)" in told and shape == (2,)
    assert outcome.alone("unlike")[1] == [[1.0, 1.0]]


@pytest.mark.slow
def test_the_time_that_processes_wait_is_described(outcome):
    for text in outcome.of("describe"):
        assert re.search(r"after 1\.5 minutes.*InitProcessGroupKwargs", text)
    assert "minutes" not in outcome.alone("describe")


LEAVES = """
    import datetime, sys, time
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accel_core import Trainer, TrainerCallback

    class Leaves(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            if trainer.accelerator.process_index == 1 and trainer.run_progress.updates_completed == 2:
                sys.exit(0) if sys.argv[1] == "exit" else time.sleep(7)

    timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=4))
    model = torch.nn.Linear(2, 1)
    trainer = Trainer(model, torch.nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), [Leaves],
                      accelerator=Accelerator(kwargs_handlers=[timeout]))
    assert trainer.accelerator.num_processes == 2
    data = torch.utils.data.TensorDataset(torch.randn(24, 2), torch.randn(24, 1))
    trainer.train(data, num_epochs=50, per_device_batch_size=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exit", "sleep"])
def test_a_process_says_what_it_waited_for_and_who_left(how):
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    finished = launch(LEAVES, processes=2, args=[how], env=environment, check=False, timeout=90)
    assert finished.returncode != 0
    waited = r"Process 0 of 2 waited, .*, after \d+ updates, in the reduction of gradients.* Another process"
    assert re.search(waited, finished.stderr), finished.stderr
    assert "The limit of 4 seconds is that of InitProcessGroupKwargs" in finished.stderr
    left = "Process 1 of 2 leaves the run by sys.exit(0), between two updates, after 2 updates"
    assert (left in finished.stderr) == (how == "exit")


if __name__ == "__main__":
    run_as_script(CASES, create_accelerator=lambda: Accelerator(kwargs_handlers=[TIMEOUT]))
