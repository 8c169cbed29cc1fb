"""Promise 3: metrics and predictions on any number of processes are those of one, for any number of samples."""

import re
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from torchmetrics.regression import MeanSquaredError
from torchmetrics.utilities import dim_zero_cat

from accel_callbacks import MetricsCallback, PredictionMetricsCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback
from case_runner import run_as_script
from tiny import Stream

SIZES = (61, 13, 5, 3, 1)
GATHERED = [(n, kind) for n in (61, 13, 9) for kind in ("tensors", "batches", "iterable")]
"""Every process has a batch in the first step: only who has one can be told that gather is out of place."""
KINDS = ("tensors", "samples", "iterable", "batches", "foreign batches")


class Samples(list):
    """A data set that is read sample by sample."""


class ForeignLoader:
    """A loader of another kind than torch's, without a length."""

    def __init__(self, loader):
        self.loader = loader
        self.batch_size = loader.batch_size

    def __iter__(self):
        return iter(self.loader)


def make_data(num_samples, kind="tensors", batch_size=4):
    generator = torch.Generator().manual_seed(num_samples)
    inputs = torch.randn(num_samples, 5, generator=generator, dtype=torch.float64)
    data = TensorDataset(inputs, torch.arange(num_samples) % 3, torch.arange(num_samples))
    if kind == "tensors":
        return data
    if kind == "samples":
        return Samples(data)
    if kind == "iterable":
        return Stream(list(data))
    if kind == "batches":
        return DataLoader(
            data, batch_sampler=CustomBatches(SequentialSampler(data), batch_size, drop_last=False)
        )
    # Without a generator of its own, torch's loader draws from the global one.
    return ForeignLoader(DataLoader(data, batch_size=batch_size, generator=torch.Generator()))


class CustomBatches(BatchSampler):
    """Ready batches, which are dealt out whole."""


def make_model():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2.0)
    return model


class MeasuringTrainer(Trainer):
    """Measures by subclassing: attributes that are metrics, and scalars that are logged."""

    def __init__(self, *args, **kwargs):
        super().__init__(make_model(), nn.CrossEntropyLoss(), None, *args, **kwargs)
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.confusion = MulticlassConfusionMatrix(3)

    def eval_epoch_start(self):
        super().eval_epoch_start()
        self.accuracy.reset()
        self.confusion.reset()

    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        outputs = output["model_outputs"]
        self.accuracy.update(outputs, batch[1])
        self.confusion.update(outputs, batch[1])
        return {**output, "log": {"share": (outputs.argmax(1) == batch[1]).double().mean()}}

    def eval_epoch_end(self):
        self.run_history.update_metric("own_accuracy", self.accuracy.compute())
        self.run_history.update_metric("own_hits", self.confusion.compute().trace())

    def calculate_predictions(self, batch):
        return {"logits": self.model(batch[0]), "parts": (batch[2], batch[2].tolist())}


class MedianScore(Metric):
    """Keeps every output and target, as metrics do that no sums can give."""

    def __init__(self):
        super().__init__()
        self.add_state("outputs", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, outputs, targets):
        self.outputs.append(outputs)
        self.targets.append(targets)

    def compute(self):
        outputs, targets = dim_zero_cat(self.outputs), dim_zero_cat(self.targets)
        return outputs.gather(1, targets[:, None]).median()


class ForeignBuffers(TrainerCallback):
    """Lets the buffers of all processes but the main one drift away, as those of batch norm do in training."""

    def on_evaluation_run_start(self, trainer):
        with torch.no_grad():
            for buffer in trainer.model.buffers():
                buffer.add_(trainer.accelerator.process_index)


class Seen(TrainerCallback):
    """What this process has seen, and a metric that needs the error of each sample."""

    def __init__(self):
        self.indices = []
        self.error = MeanSquaredError()

    def on_eval_step_end(self, trainer, batch, batch_output):
        self.indices += batch[2].tolist()
        self.error.update(batch_output["model_outputs"].amax(1), batch[1].double())

    def on_eval_epoch_end(self, trainer, **kwargs):
        trainer.run_history.update_metric("error", self.error.compute())


def evaluate(num_samples, kind, batch_size):
    seen = Seen()
    metrics = MetricCollection({"macro": MulticlassAccuracy(3), "median": MedianScore()})
    trainer = MeasuringTrainer([ForeignBuffers, seen, MetricsCallback(metrics)])
    before = torch.get_rng_state()
    measured = trainer.evaluate(make_data(num_samples, kind, batch_size), per_device_batch_size=batch_size)
    assert torch.equal(before, torch.get_rng_state())
    predicted = trainer.predict(make_data(num_samples, kind, batch_size), per_device_batch_size=batch_size)
    return {"metrics": measured, "predictions": predicted, "indices": seen.indices}


class Gathering(TrainerCallback):
    def __init__(self):
        self.gathered = []

    def on_eval_step_end(self, trainer, batch, batch_output):
        self.gathered += trainer.gather(batch[2]).tolist()


def gather(num_samples, kind, batch_size):
    """Gathers in every step; returns what there was, or the error."""
    listener = Gathering()
    trainer = Trainer(make_model(), nn.CrossEntropyLoss(), None, [listener])
    try:
        trainer.evaluate(make_data(num_samples, kind), per_device_batch_size=batch_size)
    except ConfigurationError as error:
        return str(error)
    return listener.gathered


def gather_at_the_end(batch_size):
    """Every process has a tensor of another shape; the evaluation's last event may gather whatever the data."""

    class GatherAtTheEnd(TrainerCallback):
        def on_eval_epoch_end(self, trainer, **kwargs):
            index = trainer.accelerator.process_index
            own = torch.full((index, 1 + index), float(index + 1))
            self.rows = trainer.gather(own, padding_value=-1.0)
            self.scalars = trainer.gather(torch.tensor(index))
            try:
                trainer.gather(own)
            except ConfigurationError as error:
                self.error = str(error)

    listener = GatherAtTheEnd()
    Trainer(make_model(), nn.CrossEntropyLoss(), None, [listener]).evaluate(
        make_data(1), per_device_batch_size=batch_size
    )
    return {"rows": listener.rows, "scalars": listener.scalars, "error": getattr(listener, "error", None)}


class Communicating(nn.Module):
    """A forward that needs every process, as those of engines that shard the parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3).double()

    def forward(self, inputs):
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(torch.ones(1))
        return self.layer(inputs)


def evaluate_with_collective_forward(num_samples, batch_size):
    torch.manual_seed(1)
    trainer = Trainer(Communicating(), nn.CrossEntropyLoss(), None, [])
    trainer.engine.has_collective_forward = not trainer.data_group.is_single
    measured = trainer.evaluate(make_data(num_samples), per_device_batch_size=batch_size)
    predicted = trainer.predict(make_data(num_samples), per_device_batch_size=batch_size)
    return measured, predicted


def evaluate_named(batch_size):
    """Sets of 61, 13 and 1 samples together, and each for itself."""
    sets = {"": make_data(61), "short": make_data(13), "single": make_data(1)}
    metrics = MetricCollection({"macro": MulticlassAccuracy(3), "median": MedianScore()})
    whole = PredictionMetricsCallback({"best": lambda outputs, targets: float(outputs.max())})
    trainer = MeasuringTrainer([ForeignBuffers, MetricsCallback(metrics), whole])
    together = trainer.evaluate(sets, per_device_batch_size=batch_size)
    alone = {}
    for name, data in sets.items():
        own = trainer.evaluate(data, per_device_batch_size=batch_size)
        alone |= {f"{name}_{metric}".lstrip("_"): value for metric, value in own.items()}
    return together, alone


def evaluate_frozen(batch_size):
    model = make_model().requires_grad_(False)
    trainer = Trainer(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), [])
    return trainer.evaluate(make_data(13), per_device_batch_size=batch_size)


class StrangeBuffers(nn.Module):
    """Buffers of many kinds, all of which count; those of other processes than the main one are different."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3).double()
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("turned", torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T)
        self.register_buffer("expanded", torch.ones(1, dtype=torch.float64).expand(3))
        self.register_buffer("low", torch.ones(3, dtype=torch.bfloat16))
        # DDP of torch 2.6 cannot broadcast complex numbers on a CPU.
        waves = torch.complex64 if torch.__version__ >= (2, 7) else torch.float32
        self.register_buffer("waves", torch.ones(3, dtype=waves), persistent=False)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, inputs):
        return (
            self.layer(inputs) * self.mask
            + self.turned[:, 1]
            + self.expanded
            + self.low
            + self.waves.real * self.count
        )


class Drifted(TrainerCallback):
    def on_evaluation_run_start(self, trainer):
        if not trainer.is_main_process:
            model = trainer.get_model()
            for name, buffer in list(model.named_buffers()):
                setattr(model, name, ~buffer if buffer.dtype == torch.bool else buffer + 1)


def evaluate_with_strange_buffers(batch_size):
    torch.manual_seed(2)
    trainer = Trainer(StrangeBuffers(), nn.CrossEntropyLoss(), None, [Drifted])
    return trainer.evaluate(make_data(13), per_device_batch_size=batch_size)


def evaluate_compiled(batch_size):
    """Accelerate compiles what it has wrapped; the wrapper would wait for the process without a batch."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(dynamo_backend="eager")
    model = make_model()
    trainer = Trainer(model, nn.CrossEntropyLoss(), None, [ForeignBuffers], accelerator=accelerator)
    measured = trainer.evaluate(make_data(1), per_device_batch_size=batch_size)
    AcceleratorState._reset_state()
    return measured


CASES = {
    **{f"evaluate {n} {kind}": partial(evaluate, n, kind) for n in SIZES for kind in KINDS},
    **{f"gather {n} {kind}": partial(gather, n, kind) for n, kind in GATHERED},
    **{f"collective {n}": partial(evaluate_with_collective_forward, n) for n in SIZES},
    "gather at the end": gather_at_the_end,
    "named": evaluate_named,
    "frozen": evaluate_frozen,
    "strange buffers": evaluate_with_strange_buffers,
    "compiled": evaluate_compiled,
}


def assert_equal(actual, expected):
    """Equal in structure and order, and to float precision in value."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_samples", SIZES)
def test_metrics_equal_one_process(outcome, num_samples, kind):
    expected = outcome.alone(f"evaluate {num_samples} {kind}")["metrics"]
    by_callback = {"evaluation_macro", "evaluation_median"}
    assert {
        "evaluation_loss",
        "evaluation_share",
        "evaluation_own_accuracy",
        "evaluation_own_hits",
        "evaluation_error",
    } | by_callback == set(expected)
    for result in outcome.of(f"evaluate {num_samples} {kind}"):
        assert list(result["metrics"]) == list(expected)
        # torchmetrics keeps its sums in float32.
        torch.testing.assert_close(result["metrics"], expected, rtol=1e-6, atol=1e-6)
        assert_equal(result["metrics"]["evaluation_loss"], expected["evaluation_loss"])
        assert_equal(result["metrics"]["evaluation_share"], expected["evaluation_share"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_samples", SIZES)
def test_predictions_equal_one_process_in_order(outcome, num_samples, kind):
    expected = outcome.alone(f"evaluate {num_samples} {kind}")["predictions"]
    for result in outcome.of(f"evaluate {num_samples} {kind}"):
        assert_equal(result["predictions"], expected)
        assert result["predictions"]["parts"][1] == list(range(num_samples))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_samples", SIZES)
def test_each_sample_is_seen_once_by_one_process(outcome, num_samples, kind):
    """Lesson A29: a set smaller than the global batch used to raise."""
    seen = [index for result in outcome.of(f"evaluate {num_samples} {kind}") for index in result["indices"]]
    assert sorted(seen) == list(range(num_samples))


@pytest.mark.parametrize("num_samples", SIZES)
def test_engines_with_a_collective_forward_do_as_many_on_every_process(outcome, num_samples):
    expected = outcome.alone(f"collective {num_samples}")
    for result in outcome.of(f"collective {num_samples}"):
        assert_equal(result, expected)


def has_idle_process(kind, num_samples, processes):
    if kind == "batches":
        return -(-num_samples // 4) % processes != 0
    return kind == "iterable" or 0 < num_samples % (4 * processes) < processes


@pytest.mark.parametrize(("num_samples", "kind"), GATHERED)
def test_gather_in_a_step_joins_all_samples_or_is_refused_before_it_hangs(outcome, num_samples, kind):
    last = outcome.processes - 1
    for result in outcome.of(f"gather {num_samples} {kind}"):
        if has_idle_process(kind, num_samples, outcome.processes):
            where = f"gather .*evaluation step.* process {last} of {outcome.processes} has no batch"
            assert re.search(f"{where}.*on_eval_epoch_end.*MetricsCallback", result)
        else:
            assert result == list(range(num_samples))


def test_gather_at_the_end_joins_different_shapes(outcome):
    rows = [[float(index + 1)] * (index + 1) for index in range(outcome.processes) for _ in range(index)]
    rows = [row + [-1.0] * (outcome.processes - len(row)) for row in rows]
    for result in outcome.of("gather at the end"):
        assert result["rows"].tolist() == rows
        assert result["scalars"].tolist() == list(range(outcome.processes))
        assert "Pass padding_value" in result["error"]


def test_named_sets_equal_separate_evaluations(outcome):
    metrics = ("loss", "share", "own_accuracy", "own_hits", "macro", "median", "best")
    names = {f"{name}evaluation_{metric}" for name in ("", "short_", "single_") for metric in metrics}
    for together, alone in outcome.of("named"):
        assert set(together) == names
        assert together == alone
        # torchmetrics keeps its sums in float32.
        torch.testing.assert_close(together, outcome.alone("named")[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["frozen", "strange buffers", "compiled"])
def test_any_model_is_evaluated_as_on_one_process(outcome, case):
    expected = outcome.alone(case)
    for result in outcome.of(case):
        assert_equal(result, expected)


if __name__ == "__main__":
    run_as_script(CASES, ignore="The ``compute`` method of metric")
