"""Two copies of a model that two processes hold together each: refused, since nobody averages gradients over the copies.

What is gathered for metrics and predictions is that of one process of each copy even so. The refusal is left out
for this, and Accelerate's state is set by hand (`tests/layouts.py`).
"""

import pytest
import torch
import torchmetrics
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import TensorDataset

from accel_callbacks import MetricsCallback, PredictionMetricsCallback
from accel_core import ConfigurationError, Trainer
from accel_core.engines import choose
from case_runner import compare, run_as_script
from layouts import ParallelismConfig, tensor_parallel

pytestmark = pytest.mark.slow
SIZES = (13, 16, 3)
"""Of data, with batches of 4 for all processes, so that the copies have different numbers of batches and samples.

Each has some: that the processes of a copy read the same first batch is compared over all processes.
"""


def make_data(num_samples, with_targets=True):
    generator = torch.Generator().manual_seed(num_samples)
    inputs = torch.randn(num_samples, 5, generator=generator)
    targets = torch.randint(0, 3, (num_samples,), generator=generator)
    return TensorDataset(inputs, targets) if with_targets else TensorDataset(inputs)


def make_trainer():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, accelerator.torch_device_mesh["tp"], plan)
    callbacks = [
        MetricsCallback({"accuracy": torchmetrics.classification.MulticlassAccuracy(3, average="micro")}),
        MetricsCallback({"entries": torchmetrics.SumMetric()}, update=count_samples),
        # Sums, which would differ if a sample was there twice.
        PredictionMetricsCallback({"total": lambda outputs, targets: (outputs.sum(1) * targets).sum()}),
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks, accelerator=accelerator, seed=7)


def count_samples(metric, batch, batch_output):
    metric.update(len(batch[1]))


def refuse(batch_size):
    data = make_data(16)
    calls = {
        "train": lambda trainer: trainer.train(data, 1),
        "evaluate": lambda trainer: trainer.evaluate(data),
        "predict": lambda trainer: trainer.predict(data),
        "iterate": lambda trainer: list(trainer.iterate_predictions(data)),
    }
    told = {}
    for name, call in calls.items():
        trainer = make_trainer()
        try:
            call(trainer)
        except ConfigurationError as error:
            told[name] = str(error)
        assert trainer.run_progress.updates_completed == 0
    return told


def measure(batch_size):
    """What it gives without the refusal."""
    with pytest.MonkeyPatch.context() as patch:
        others = [refused for refused in choose.REFUSED if "several copies" not in refused.message]
        patch.setattr(choose, "REFUSED", others)
        return measure_unrefused()


def measure_unrefused():
    trainer = make_trainer()
    # A copy takes what two processes of one copy take together.
    kwargs = {"per_device_batch_size": 4 // trainer.data_group.size}
    return {
        size: {
            "metrics": trainer.evaluate(make_data(size), **kwargs),
            "predictions": trainer.predict(make_data(size, with_targets=False), **kwargs),
            "on main": trainer.predict(make_data(size, with_targets=False), on="main", **kwargs),
            "gathered": trainer.gather(torch.tensor([trainer.data_group.index])).tolist(),
            "iterated": [
                (places.tolist(), outputs)
                for places, outputs in trainer.iterate_predictions(make_data(size, False), **kwargs)
            ],
        }
        for size in SIZES
    }


CASES = {"refused": refuse, "measured": measure}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return compare(CASES, __file__, 4, tmp_path_factory.mktemp("cases"))


def test_it_is_refused_by_every_call_on_all_processes(outcome):
    for told in outcome.of("refused"):
        assert set(told) == {"train", "evaluate", "predict", "iterate"}
        for message in told.values():
            assert "tp_size=2 and dp_replicate_size=2" in message and "DDP without tp_size" in message
    with pytest.raises(ValueError, match="dp_replicate_size"):
        ParallelismConfig(tp_size=2, dp_replicate_size=2)


@pytest.mark.parametrize("size", SIZES)
def test_metrics_and_predictions_count_each_copy_once(outcome, size):
    expected = outcome.alone("measured")[size]
    assert expected["metrics"]["evaluation_entries"] == size
    for index, results in enumerate(outcome.of("measured")):
        found = results[size]
        torch.testing.assert_close(found["metrics"], expected["metrics"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["predictions"], expected["predictions"], rtol=1e-5, atol=1e-6)
        assert found["gathered"] == [0, 1]
        assert (found["on main"] is None) == (index > 0)
    on_main = outcome.of("measured")[0][size]["on main"]
    torch.testing.assert_close(on_main, expected["on main"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_iterated_predictions_are_those_of_the_share_of_a_copy(outcome, size):
    whole = outcome.alone("measured")[size]["predictions"]
    shares = []
    for results in outcome.of("measured"):
        share = {}
        for places, outputs in results[size]["iterated"]:
            torch.testing.assert_close(outputs, whole[places], rtol=1e-5, atol=1e-6)
            share |= dict.fromkeys(places)
        shares.append(list(share))
    assert shares[0] == shares[1] and shares[2] == shares[3]
    assert sorted(shares[0] + shares[2]) == list(range(size))


if __name__ == "__main__":
    run_as_script(
        CASES,
        ignore="(?s).*(NestedTensor|device_mesh|deprecated).*",
        create_accelerator=lambda: tensor_parallel(copies=2),
        distributed_type=DistributedType.MULTI_GPU,
    )
