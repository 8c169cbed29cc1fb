"""Tensor parallelism on two and four processes: equal to one, and resumed on as many and on another number.

They read the same batches. Accelerate knows none on a CPU, so its state is set by hand (`tests/layouts.py`). Several
copies of a model are refused in `test_layout_tensor_parallel_with_copies.py`.
"""

import warnings

import pytest
import torch
import torchmetrics
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import TensorDataset

import layout_limits
from accel_callbacks import MetricsCallback, ModelEmaCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_core.processes.collectives import all_gather_object
from accel_core.state.files import read_tensors
from case_runner import compare, run_as_script, shared_folder
from layout_limits import KeepsLimits
from layout_promises import GoesOnAnywhere, Layout, LayoutPromises, assert_others_went_on, create_network
from layouts import tensor_parallel
from tiny import EvaluateInMidEpoch, Stream
from tiny_transformers import VOCABULARY
from tiny_transformers import create_model as create_tiny

pytestmark = pytest.mark.slow
PROCESSES = (2, 4)
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
"""In float32 with SGD; what each layout promises is compared more closely."""


def make_data(num_samples=37):
    generator = torch.Generator().manual_seed(num_samples)
    inputs = torch.randn(num_samples, 5, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 3, (num_samples,), generator=generator))


def mesh():
    return Accelerator().torch_device_mesh["tp"]


def is_laid_out():
    return Accelerator().num_processes > 1


def create_model(dtype):
    """Layers in parts stand beside a norm and a layer that each process holds whole."""
    model = create_network(dtype)
    if is_laid_out():
        parallelize_module(model, mesh(), {"2": ColwiseParallel(), "4": RowwiseParallel()})
    return model


LAYOUT = Layout("tensor parallelism", create_model)


def make_trainer(callbacks=(), trainer_class=Trainer, optimizer_class=torch.optim.SGD):
    torch.manual_seed(3)
    model = create_model(torch.float32)
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    return trainer_class(model, nn.CrossEntropyLoss(), optimizer, callbacks, seed=7)


def exported(trainer, name="model.safetensors"):
    path = shared_folder() / name
    trainer.save_checkpoint(path)
    return read_tensors(path) if name.endswith("safetensors") else torch.load(path, weights_only=True)


def outcome_of(trainer):
    records = trainer.run_history.to_records()
    return {
        "weights": exported(trainer),
        "history": {f"{r['name']} {r['epoch']}/{r['update']}": r["value"] for r in records},
        "updates": trainer.run_progress.updates_completed,
    }


def train(batch_size, data=None, callbacks=(), trainer_class=Trainer, **kwargs):
    """Each process of a copy is given what one process would be given."""
    metric = MetricsCallback({"accuracy": torchmetrics.classification.MulticlassAccuracy(3, average="micro")})
    trainer = make_trainer([metric, *callbacks], trainer_class)
    kwargs = {"num_epochs": 2, "eval_dataset": make_data(13), "gradient_accumulation_steps": 3, **kwargs}
    trainer.train(make_data() if data is None else data, per_device_batch_size=8, **kwargs)
    return outcome_of(trainer)


class CountsBefore(Trainer):
    def count_items(self, batch):
        return len(batch[0])


class Seen(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def calculate_train_batch_loss(self, batch):
        self.seen.append(batch[0].sum().item())
        return super().calculate_train_batch_loss(batch)


def read_batches(batch_size):
    trainer = make_trainer(trainer_class=Seen)
    trainer.train(make_data(), 2, per_device_batch_size=8)
    return trainer.seen


def gather(batch_size):
    """One process speaks for a copy of the model."""
    return make_trainer().gather(torch.ones(2))


def load_export(batch_size):
    """An export holds the whole model and the whole state of its optimizer."""
    first = make_trainer(optimizer_class=torch.optim.AdamW)
    first.train(make_data(), 1, per_device_batch_size=8)
    path = shared_folder() / "model.pt"
    first.save_checkpoint(path)
    other = make_trainer(optimizer_class=torch.optim.AdamW)
    other.load_checkpoint(path)
    content = torch.load(path, weights_only=True)
    other.train(make_data(), 1, per_device_batch_size=8)
    states = content["optimizer_state_dict"]["state"]
    return {
        "shapes": [tuple(states[n]["exp_avg"].shape) for n in sorted(states)],
        "loaded": outcome_of(other),
    }


def average(batch_size):
    path = shared_folder() / "ema.safetensors"
    train(batch_size, callbacks=[ModelEmaCallback(decay=0.5, save_path=path)])
    return read_tensors(path)


class StopOnLast(TrainerCallback):
    def on_optimizer_step_end(self, trainer):
        accelerator = trainer.accelerator
        is_last = accelerator.process_index == accelerator.num_processes - 1
        if trainer.run_progress.updates_completed == 3 and is_last:
            trainer.request_stop("enough")


def refuse(batch_size):
    """Every process raises before its first update."""

    def whole_model(trainer):
        torch.manual_seed(3)
        trainer.model = nn.Linear(5, 3)
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)

    def other_batches(trainer):
        index = trainer.accelerator.process_index
        return TensorDataset(make_data().tensors[0] + index, make_data().tensors[1])

    def stale(trainer):
        torch.manual_seed(3)
        trainer.model = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 4))
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
        parallelize_module(trainer.model, mesh(), {"1": ColwiseParallel()})

    def fast(trainer):
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1, foreach=True)

    told = {}
    for case in (whole_model, other_batches, stale, fast):
        trainer = make_trainer()
        data = case(trainer) or make_data()
        with warnings.catch_warnings():
            # Of parameters that the model does not have.
            warnings.simplefilter("ignore")
            try:
                trainer.train(data, 1, per_device_batch_size=8)
            except ConfigurationError as error:
                told[case.__name__] = str(error)
        assert trainer.run_progress.updates_completed == 0
    return told


class Causal(Trainer):
    def calculate_train_batch_loss(self, batch):
        outputs = self.model(input_ids=batch[0], labels=batch[0])
        return {"loss": outputs.loss, "model_outputs": None, "batch_size": len(batch[0])}


SIZES = {"num_attention_heads": 4, "num_key_value_heads": 4}


def pretrained_folder():
    folder = shared_folder()
    if Accelerator().is_main_process:
        create_tiny("causal", **SIZES).save_pretrained(folder)
    all_gather_object(None)
    return folder


def train_transformers(batch_size):
    """A model that was loaded from a folder with the plan of its class."""
    import transformers
    from transformers.distributed import DistributedConfig

    folder = pretrained_folder()
    kwargs = {}
    if is_laid_out():
        size = Accelerator().num_processes
        kwargs = {"distributed_config": DistributedConfig(tp_size=size)}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randint(2, VOCABULARY, (18, 6), generator=generator))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Causal(model, None, optimizer, [], seed=3)
    trainer.train(data, 2, per_device_batch_size=4, gradient_clip_norm=0.5)
    loss = trainer.run_history.get_metric_values("train_loss_epoch")
    return {"weights": exported(trainer), "losses": list(loss)}


EQUAL = {
    "uneven": train,
    "clipped by norm": lambda size: train(size, gradient_clip_norm=0.05),
    "clipped by value": lambda size: train(size, gradient_clip_value=0.01),
    "without accumulation": lambda size: train(size, gradient_accumulation_steps=1),
    "mid-epoch evaluation": lambda size: train(size, callbacks=[EvaluateInMidEpoch()]),
    "counted before": lambda size: train(size, trainer_class=CountsBefore),
    "stream": lambda size: train(size, data=Stream(make_data())),
    "gathered": gather,
    "batches": read_batches,
    "export": load_export,
    "average": average,
    "transformers": train_transformers,
}
CASES = {
    **EQUAL,
    "stop": lambda size: train(size, callbacks=[StopOnLast()]),
    **LAYOUT.cases(),
    **layout_limits.cases(LAYOUT),
    "refusals": refuse,
}


@pytest.fixture
def layout():
    return LAYOUT


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Four processes go on from the states of two."""
    two = compare(CASES, __file__, 2, tmp_path_factory.mktemp("cases"))
    return {2: two, 4: compare(CASES, __file__, 4, tmp_path_factory.mktemp("cases"), args=[two.folder])}


@pytest.fixture(params=PROCESSES, ids="{} processes".format)
def outcome(request, outcomes):
    return outcomes[request.param]


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


class TestTensorParallelism(LayoutPromises, GoesOnAnywhere, KeepsLimits):
    """All that is promised."""


@pytest.mark.parametrize("case", EQUAL)
def test_it_equals_one_process_with_the_same_batches(outcome, case):
    for result in outcome.of(case):
        assert_equal(result, outcome.alone(case))


def test_what_one_process_asks_for_stops_all_after_the_same_update(outcome):
    assert [result["updates"] for result in outcome.of("stop")] == [4] * outcome.processes


def test_a_state_holds_whole_tensors(outcome):
    for result in outcome.of("resume"):
        assert "model.safetensors" in result["files"] and "engine" not in result["files"]


def test_a_state_of_two_processes_goes_on_on_four(outcomes):
    assert_others_went_on(LAYOUT, outcomes[4])


@pytest.mark.parametrize(
    ("case", "named", "way_out"),
    [
        ("whole_model", "tp_size={processes}", "parallelize_module"),
        ("other_batches", "first batch differs", "trainer.data_group.index"),
        ("stale", "The SGD holds none of the DTensors", "after parallelize_module"),
        ("fast", "foreach=True", "Leave foreach out"),
    ],
)
def test_what_is_not_right_is_refused_on_all_processes_before_the_first_update(outcome, case, named, way_out):
    for told in outcome.of("refusals"):
        assert named.format(processes=outcome.processes) in told[case]
        assert way_out in told[case]


if __name__ == "__main__":
    run_as_script(
        CASES,
        ignore="(?s).*(NestedTensor|device_mesh|deprecated).*",
        create_accelerator=tensor_parallel,
        distributed_type=DistributedType.MULTI_GPU,
    )
