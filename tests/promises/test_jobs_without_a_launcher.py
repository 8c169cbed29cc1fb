"""Two processes that no launcher has started, as `srun` does it: a signal stops both, a kill ends both, and both go on."""

import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType
from torch.utils.data import TensorDataset

from accel_callbacks import SaveTrainingStateCallback
from accel_core import Trainer, TrainerCallback, latest_checkpoint
from launching import free_port, start

ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[1])}


class Signal(TrainerCallback):
    """Sends a signal to this process after an update."""

    def __init__(self, number, update):
        self.number, self.update = number, update

    def on_optimizer_step_end(self, trainer):
        if trainer.run_progress.updates_completed == self.update:
            os.kill(os.getpid(), self.number)


def main(folder, number, update):
    """What each process does; the last one gets the signal."""
    accelerator = Accelerator()
    assert accelerator.num_processes == 2 and accelerator.distributed_type == DistributedType.MULTI_CPU
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.3), torch.nn.Linear(4, 1))
    # Alone it has no state of its own, so its place among the callbacks says nothing.
    callbacks = [Signal(number, update)] if number and not accelerator.is_main_process else []
    callbacks.append(SaveTrainingStateCallback(folder, save_every_n_updates=3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks, seed=3)
    points = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(points, points.sum(1, keepdim=True))
    trainer.train(data, 2, data, per_device_batch_size=4, resume_from=latest_checkpoint(folder))
    values = [value for parameter in model.parameters() for value in parameter.flatten().tolist()]
    print("weights", trainer.run_progress.updates_completed, values, flush=True)


def run(folder, number=0, update=0):
    """Start both as `srun bash -c 'RANK=$SLURM_PROCID ...'` does, and return how each has ended."""
    environment = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                start(
                    Path(__file__),
                    processes=1,
                    args=[folder, number, update],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
                )
            )
            for rank in range(2)
        ]
        return [process.wait(90) for process in running]


def weights_of(finished):
    assert [process.returncode for process in finished] == [0, 0], finished
    return [re.findall(r"^weights .*$", process.stdout, re.M) for process in finished]


@pytest.mark.slow
def test_a_job_that_is_stopped_and_one_that_loses_a_process_go_on_to_the_bit(tmp_path):
    whole = weights_of(run(tmp_path / "whole"))
    assert whole[0] == whole[1] and len(whole[0]) == 1

    # As `scancel --signal=TERM` of one task, or a machine that is taken away: both stop at one update, saved.
    stopped = run(tmp_path / "states", int(signal.SIGTERM), 4)
    assert [process.returncode for process in stopped] == [128 + signal.SIGTERM] * 2
    saved = latest_checkpoint(tmp_path / "states").name
    assert saved == "update_00000005"

    killed = run(tmp_path / "states", int(signal.SIGKILL), 11)
    left, gone = killed
    assert gone.returncode == -signal.SIGKILL
    # It neither hangs nor goes on alone, and says what it waited for.
    assert left.returncode == 1
    assert re.search(r"Process 0 of 2 waited, .*, after 1\d updates", left.stderr), left.stderr
    assert latest_checkpoint(tmp_path / "states").name == "update_00000009"

    assert weights_of(run(tmp_path / "states")) == whole


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
