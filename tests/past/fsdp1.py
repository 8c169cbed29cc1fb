"""The run of `write.py` by version 1 of FSDP, which earlier versions ran, and FSDP2 that goes on from its state.

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 tests/past/fsdp1.py 1
    tests/past/fsdp1

wrote `fsdp1/` with the code of its time: `mid_epoch`, a training state, and `end.json`, the end of the run. Like
the files of `write.py` they are never written anew.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import PartialState

from accel_core import Trainer
from accel_core.state.files import read_tensors
from past.write import EventCounter, Saver, create_trainer, end_of, train


def shard(version: int) -> None:
    """Set the state of Accelerate, which has neither version on a CPU, for all accelerators of this process."""
    state = Accelerator(cpu=True).state
    PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
    # Version 1 refuses `cpu:0`.
    PartialState._shared_state["device"] = state.device = torch.device("cpu")
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="size_based_wrap",
        min_num_params=10,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
        use_orig_params=True if version == 1 else None,
    )


class MidEpochSaver(Saver):
    """Saves the state in mid-epoch alone."""

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Save nothing."""


def exported_end(trainer: Any, counter: EventCounter, folder: Path) -> dict[str, Any]:
    """Return the end of a run; the whole weights are those of an export."""
    path = folder / "model.safetensors"
    trainer.save_checkpoint(path)
    weights = {name: tensor.tolist() for name, tensor in read_tensors(path).items()}
    trainer.model = torch.nn.Identity()
    return {**end_of(trainer, counter), "weights": weights}


def main(version: int, folder: Path, state: Path | None = None) -> None:
    """Train to the end and write that into a folder; save a state there on the way, or begin from `state`."""
    shard(version)
    callbacks = [counter := EventCounter(), *([MidEpochSaver(folder)] if state is None else [])]
    trainer = create_trainer(*callbacks, is_empty=state is not None)
    trainer.trust_engine_files = True
    # Version 1 takes norms of float32 only.
    train(trainer, state, gradient_clip_norm=None)
    end = exported_end(trainer, counter, folder)
    if trainer.is_main_process:
        (folder / "end.json").write_text(json.dumps(end, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), *map(Path, sys.argv[2:]))
