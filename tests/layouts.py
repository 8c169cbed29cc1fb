"""Options of DDP, and accelerators with layouts that Accelerate refuses on a CPU.

The state of these is set by hand, as it would be on GPUs. All accelerators that are made afterwards in the process
share it.
"""

from typing import Any

import pytest
from accelerate import Accelerator, DistributedType

from sharding import set_type, shard_by_fsdp2

# Accelerate has it since 1.10.
ParallelismConfig = pytest.importorskip("accelerate.parallelism_config").ParallelismConfig

DDP_OPTIONS = {
    "static graph": {"static_graph": True},
    "unused looked for": {"find_unused_parameters": True},
    "views of buckets": {"gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 1},
}


def set_parallelism(accelerator: Accelerator, config: Any) -> None:
    accelerator.state.parallelism_config = config
    accelerator.state.device_mesh = config.get_device_mesh("cpu")
    config._validate_accelerator(accelerator)


def tensor_parallel(copies: int = 1) -> Accelerator:
    """The processes of each copy hold it together; on one process it is a plain accelerator."""
    accelerator = Accelerator(cpu=True)
    if accelerator.num_processes > 1:
        set_type(accelerator, DistributedType.MULTI_GPU)
        config = ParallelismConfig(tp_size=accelerator.num_processes // copies)
        # The constructor refuses several.
        config.dp_replicate_size = config._sizes["dp_replicate"] = copies
        set_parallelism(accelerator, config)
    return accelerator


def fsdp2(replicas: int = 1, num_parameters: int = 10) -> Accelerator:
    """Parameters are spread over the processes; with `replicas`, over each of so many groups of them (HSDP)."""
    accelerator = Accelerator(cpu=True)
    if accelerator.num_processes > 1:
        shard_by_fsdp2(accelerator, num_parameters)
        if replicas > 1:
            shards = accelerator.num_processes // replicas
            set_parallelism(accelerator, ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards))
    return accelerator
