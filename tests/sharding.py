"""Engines that shard on the processes of a CPU, for tests: FSDP2, and ZeRO of three stages.

FSDP2 refuses a CPU in Accelerate, so its state is set by hand here. DeepSpeed is found in the folder of
ACCEL_TEST_DEEPSPEED, into which `hatch run install-deepspeed` puts it: in the environment itself, Accelerate
would import it in every test.
"""

import os
from pathlib import Path

import pytest
from accelerate import (
    Accelerator,
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from accelerate.state import PartialState

ROOT = Path(__file__).parents[1]
DEEPSPEED = Path(os.environ.get("ACCEL_TEST_DEEPSPEED", ROOT / ".venv-deepspeed"))
ENGINES = {"fsdp2": DistributedType.FSDP, "zero1": DistributedType.DEEPSPEED}
ENGINES |= {"zero2": DistributedType.DEEPSPEED, "zero3": DistributedType.DEEPSPEED}


def set_type(accelerator: Accelerator, kind: DistributedType) -> None:
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = kind


def shard_by_fsdp2(accelerator: Accelerator, num_parameters: int = 10) -> Accelerator:
    set_type(accelerator, DistributedType.FSDP)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="size_based_wrap",
        min_num_params=num_parameters,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    return accelerator


def create_accelerator(engine):
    """An accelerator with this engine, whose state all that are made afterwards share."""
    if engine == "fsdp2":
        return shard_by_fsdp2(Accelerator(cpu=True))
    plugin = DeepSpeedPlugin(zero_stage=int(engine[-1]), zero3_init_flag=False)
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])


def environment_of(engine):
    """Return what a launch needs besides; skip the test if the engine is not there."""
    if engine == "fsdp2":
        return {}
    if not (DEEPSPEED / "deepspeed").is_dir():
        pytest.skip(f"DeepSpeed is not in {DEEPSPEED}: `hatch run install-deepspeed` puts it there")
    path = os.pathsep.join([str(ROOT / "tests"), str(DEEPSPEED)])
    # DeepSpeed compiles what it needs with ninja, at its first start.
    tools = os.pathsep.join([os.environ["PATH"], str(DEEPSPEED / "bin")])
    return {"PATH": tools, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
