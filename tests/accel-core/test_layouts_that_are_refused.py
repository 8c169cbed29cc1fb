"""A layout that accel does not run right is refused by name, before anything has changed.

What each message says, and that its way out works, is tested in `ways_out/test_engines.py`.
"""

from types import SimpleNamespace

import pytest
from accelerate import DistributedType

from accel_core import ConfigurationError
from accel_core.engines.choose import REFUSED, choose_engine
from accel_core.processes.group import DataGroup, data_group
from launching import launch
from tiny import tiny_trainer

# Accelerate has it since 1.10.
ParallelismConfig = pytest.importorskip("accelerate.parallelism_config").ParallelismConfig


def accelerator_of(kind=DistributedType.MULTI_GPU, num_processes=4, **sizes):
    """Says what an accelerator says on machines that no test has."""
    config = ParallelismConfig.__new__(ParallelismConfig)
    names = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")
    vars(config).update({name: sizes.get(name, 1) for name in names})
    return SimpleNamespace(
        gradient_accumulation_steps=1,
        distributed_type=kind,
        state=SimpleNamespace(parallelism_config=config),
        is_fsdp2=kind is DistributedType.FSDP,
        num_processes=num_processes,
        process_index=1,
        scaler=None,
    )


def test_xla_is_refused_on_one_process_too():
    with pytest.raises(ConfigurationError, match="runs XLA"):
        choose_engine(accelerator_of(DistributedType.XLA, num_processes=1), DataGroup())


def test_megatron_that_accelerate_has_dropped_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(ConfigurationError, match=r"Megatron-LM.*Remove the plugin"):
        choose_engine(accelerator_of(DistributedType.MULTI_CPU), DataGroup(4))


@pytest.mark.parametrize("plugin", ["DEEPSPEED", "FSDP"])
def test_a_plugin_that_accelerate_has_dropped_is_not_missed_on_one_process(monkeypatch, plugin):
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    alone = accelerator_of(DistributedType.NO, num_processes=1)
    assert choose_engine(alone, DataGroup()).name == "a single process"


@pytest.mark.parametrize(
    ("kind", "sizes", "name"),
    [
        (DistributedType.MULTI_GPU, {"tp_size": 4}, "tensor parallelism"),
        (DistributedType.FSDP, {"dp_shard_size": 4}, "FSDP2"),
        (DistributedType.FSDP, {"dp_shard_size": 2, "dp_replicate_size": 2}, "HSDP"),
        (DistributedType.MULTI_GPU, {"dp_replicate_size": 4}, "DDP"),
        (DistributedType.DEEPSPEED, {}, "DEEPSPEED"),
    ],
)
def test_the_layouts_that_are_right_have_an_engine(kind, sizes, name):
    assert choose_engine(accelerator_of(kind, **sizes), DataGroup(4)).name == name


def test_processes_of_one_copy_are_one_reader_of_data():
    group = data_group(accelerator_of(tp_size=2))
    assert group == DataGroup(size=2, index=0, processes_per_copy=2, index_in_copy=1)
    assert (group.num_processes, group.process_index, group.is_main) == (4, 1, False)


EACH = """
import os
from types import SimpleNamespace
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from torch import nn
from accel_core import ConfigurationError, Trainer
from accel_core.engines.choose import REFUSED

accelerator = Accelerator()
assert accelerator.num_processes == 2
accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randn(8, 4))
SIZES = dict.fromkeys(("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size"), 1)
# The layouts as a job on GPUs would have them, in the order of the table.
LAYOUTS = [
    {"kind": DistributedType.XLA},
    {"kind": DistributedType.MEGATRON_LM},
    {"kind": DistributedType.FSDP},
    {"cp_size": 2},
    {"sp_size": 2},
    {"tp_size": 2, "dp_shard_size": 2},
    {"tp_size": 2, "dp_replicate_size": 2},
    {"non_data_parallel_size": 3},
    {"dp_shard_size": 2},
    {"variable": "ACCELERATE_USE_DEEPSPEED"},
    {"variable": "ACCELERATE_USE_FSDP"},
]
assert len(LAYOUTS) == len(REFUSED)

def set_layout(kind=DistributedType.MULTI_CPU, variable=None, **sizes):
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = kind
    accelerator.state.parallelism_config = SimpleNamespace(**SIZES | sizes) if sizes else None
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ[name] = str(name == variable).lower()

for number, layout in enumerate(LAYOUTS):
    set_layout(**layout)
    assert [each.is_asked(accelerator) for each in REFUSED].index(True) == number, layout
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.MSELoss(), optimizer, [], seed=1, accelerator=accelerator)
    for call in (lambda: trainer.train(data, 1), lambda: trainer.evaluate(data), lambda: trainer.predict(data)):
        try:
            call()
        except ConfigurationError as error:
            assert str(error)[:30] == REFUSED[number].message.format(runs="MULTI_CPU", **SIZES | layout)[:30]
            assert trainer.run_progress.updates_completed == 0 and torch.equal(model.weight, before)
            print(f"process {accelerator.process_index} refused {number}", flush=True)
set_layout()
accelerator.end_training()
"""


@pytest.mark.slow
def test_each_layout_of_the_table_is_refused_on_all_processes_in_every_call():
    printed = launch(EACH).stdout
    for number in range(len(REFUSED)):
        for process in range(2):
            assert printed.count(f"process {process} refused {number}\n") == 3


FOREIGN = """
import sys
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from accel_core import ConfigurationError, Trainer

accelerator = Accelerator()
mesh = init_device_mesh("cpu", (2,))
data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randn(8, 4))

class LateSharding(Trainer):
    def prepare(self):
        super().prepare()
        fully_shard(self.get_model(), mesh=mesh)

def train(model, trainer_class=Trainer):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = trainer_class(model, nn.MSELoss(), optimizer, [], seed=1, accelerator=accelerator)
    try:
        trainer.train(data, 1, per_device_batch_size=2)
    except ConfigurationError as error:
        assert trainer.run_progress.updates_completed == 0
        assert "DTensor" in str(error) and "runs DDP" in str(error), error
        assert "fsdp_version=2" in str(error) and "tp_size" in str(error)
        print(f"process {accelerator.process_index} refused", flush=True)

sharded = nn.Linear(4, 4)
fully_shard(sharded, mesh=mesh)
train(sharded)
train(parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh, {"0": ColwiseParallel()}))
train(nn.Linear(4, 4), LateSharding)
accelerator.end_training()
"""


@pytest.mark.slow
def test_a_model_that_its_user_has_sharded_is_refused_on_all_processes():
    printed = launch(FOREIGN).stdout
    assert printed.count("process 0 refused") == printed.count("process 1 refused") == 3


def test_describe_names_the_layout():
    assert "processes: 1, layout: a single process" in tiny_trainer().describe()
