"""Two processes are killed, both or one, while they write in the background; then started again.

Under DDP the main process writes. Under FSDP2 each writes its part, the main one copies the states to a mirror, and
the folder of the states is lost after every second kill.

ACCEL_TEST_KILLS chooses the number of kills. ACCEL_TEST_SEED chooses which process is killed at which save, as in a run
that has printed its seed; the machine chooses how far the save has come. The script forks the processes from one that
has imported torch.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.utils.data import TensorDataset

from accel_callbacks import SaveTrainingStateCallback
from accel_core import Trainer, TrainerCallback, latest_checkpoint, verify_checkpoint
from accel_core.state import files
from accel_core.state.checkpoint import read_model_state, read_optimizer_state
from accel_core.state.shards import Shards
from launching import launch
from layouts import fsdp2

KILLS = {name: int(os.environ.get("ACCEL_TEST_KILLS", number)) for name, number in (("ddp", 6), ("fsdp2", 4))}
SEED = int(os.environ.get("ACCEL_TEST_SEED", time.time_ns()))
UPDATES = 40
SECONDS_OF_A_FILE = 0.02
LONGEST = 0.2
"""Seconds after the beginning of a save within which a kill comes."""
LONGEST_LIFE = 300
"""Seconds after which a job hangs. Alone on two cores it takes five, beside ten other tests it took 64."""


class Told(TrainerCallback):
    """Writes down what begins to be saved and what was told as saved, and makes sure that none of it was lost."""

    order = 2000

    def __init__(self, folder, newest):
        self.folder = folder
        told = lines(folder / "told")
        assert not told or (newest is not None and newest.name >= told[-1]), (told, newest)

    def on_optimizer_step_end(self, trainer):
        if trainer.is_main_process and trainer.run_progress.updates_completed % 3 == 0:
            self.note("begun", str(trainer.run_progress.updates_completed))
        # So that a state takes the time of several updates.
        time.sleep(0.01)

    def on_checkpoint_saved(self, trainer, path):
        if trainer.is_main_process:
            self.note("told", path.name)

    def note(self, name, text):
        with (self.folder / name).open("a") as file:
            file.write(f"{text}\n")


def lines(path):
    return path.read_text().split() if path.exists() else []


def slow_down():
    """Let each file, and the part of each process, take some time."""

    def slow(function):
        def slowed(*args, **kwargs):
            time.sleep(SECONDS_OF_A_FILE)
            return function(*args, **kwargs)

        return slowed

    files.create, Shards.write = slow(files.create), slow(Shards.write)


def address_of_mirror(folder):
    return f"file://{folder / 'mirror'}"


def job(folder, engine, is_saved):
    slow_down()
    accelerator = fsdp2() if engine == "fsdp2" else Accelerator(cpu=True)
    kind = DistributedType.FSDP if engine == "fsdp2" else DistributedType.MULTI_CPU
    assert accelerator.num_processes == 2 and accelerator.distributed_type == kind
    mirror = address_of_mirror(folder) if engine == "fsdp2" and is_saved else None
    newest = latest_checkpoint(mirror or folder / "states", cache=folder / "states" if mirror else None)
    torch.manual_seed(time.time_ns() if newest else 0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.3), nn.Tanh(), nn.Linear(12, 2))
    saver = SaveTrainingStateCallback(
        folder / "states", save_every_n_updates=3, keep_last=2, in_background=True, mirror=mirror
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    callbacks = [Told(folder, newest), *[saver][:is_saved]]
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks, seed=3, accelerator=accelerator)
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(torch.randn(96, 6, generator=generator), torch.arange(96) % 2)
    trainer.train(data, max_num_train_steps=UPDATES, per_device_batch_size=4, resume_from=newest)
    # A state has whole tensors, whatever a process holds of them.
    trainer.save_training_state(folder / "last")
    if trainer.is_main_process:
        content = content_of(folder / "last")
        files.replace_file(folder / "result.pt", lambda aside: torch.save(content, aside))
    accelerator.end_training()


def content_of(state):
    return {"model": read_model_state(state), "optimizer": read_optimizer_state(state)}


def start_both(folder, engine, is_saved=True):
    """Fork the two processes, and return their numbers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in world.items()}, MASTER_ADDR="127.0.0.1")
            status = 1
            try:
                job(folder, engine, is_saved)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        started.append(pid)
    return started


def kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for(pids, seconds=LONGEST_LIFE):
    """Wait until all have ended, killing what is still there at last, and return their statuses."""
    statuses, give_up = {}, time.monotonic() + seconds
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses and (found := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > give_up:
            kill(pids)
        time.sleep(0.01)
    return [statuses[pid] for pid in pids]


def run_series(folder, engine, kills, seed):
    """Kill and start again, and look at the folder after each kill. A job that is through gives way to a new one."""
    rng, met = random.Random(seed), {"one": 0, "both": 0, "in the middle of a state": 0, "lost": 0}
    number = 0
    while True:
        own = folder / f"killed_{number}"
        own.mkdir(exist_ok=True)
        pids = start_both(own, engine)
        is_killed = met["one"] + met["both"] < kills and wait_for_save(own, rng)
        if is_killed:
            how = rng.choice(["one", "both"])
            kill(pids if how == "both" else [rng.choice(pids)])
            met[how] += 1
        statuses = wait_for(pids)
        met["in the middle of a state"] += is_killed and any((own / "states").glob("*.incomplete"))
        check_whole(own / "states")
        if (own / "mirror").exists():
            check_whole(address_of_mirror(own))
            if is_killed and (met["one"] + met["both"]) % 2 == 0:
                shutil.rmtree(own / "states")
                # What only the lost machine had was told as saved there, and not as mirrored.
                (own / "told").unlink(missing_ok=True)
                met["lost"] += 1
        if (own / "result.pt").exists():
            number += 1
            if met["one"] + met["both"] >= kills:
                return met
        else:
            assert is_killed, statuses


def check_whole(place):
    flaws = verify_checkpoint(place)
    assert set(flaws.values()) <= {None}, flaws


def wait_for_save(folder, rng):
    """Wait for a random moment after a save has begun; return False if the job is through before."""
    begun, give_up = len(lines(folder / "begun")) + rng.randint(1, 4), time.monotonic() + LONGEST_LIFE
    while len(lines(folder / "begun")) < begun:
        assert time.monotonic() < give_up
        if (folder / "result.pt").exists():
            return False
        time.sleep(0.002)
    time.sleep(rng.uniform(0, LONGEST))
    return True


@pytest.fixture(params=KILLS)
def engine(request):
    return request.param


@pytest.mark.slow
@pytest.mark.timeout(120 + 20 * max(KILLS.values()))
def test_killed_while_they_write_they_end_with_the_same_bits(tmp_path, engine):
    (tmp_path / "whole").mkdir()
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    arguments = [tmp_path, engine, KILLS[engine], SEED]
    print(f"To repeat these kills: ACCEL_TEST_SEED={SEED}")
    # With a limit of its own, after which the forked processes are killed too.
    limit = 100 + 20 * KILLS[engine]
    finished = launch(Path(__file__), processes=1, args=arguments, timeout=limit, env=environment)
    whole = torch.load(tmp_path / "whole" / "result.pt")
    for job_folder in tmp_path.glob("killed_*"):
        killed = torch.load(job_folder / "result.pt")
        torch.testing.assert_close(killed, whole, rtol=0, atol=0)
        states = sorted(path.name for path in (job_folder / "states").glob("update_*"))
        # The processes may be killed when the last one stands and the oldest is not removed yet.
        assert states[-1] == f"update_{UPDATES:08d}" and len(states) <= 3
        if engine == "fsdp2":
            # Another machine gets the parts of all processes.
            newest = latest_checkpoint(
                address_of_mirror(job_folder), cache=tmp_path / "other" / job_folder.name
            )
            assert newest.name == states[-1] and verify_checkpoint(newest) == {newest: None}
            assert len(list((newest / "engine").iterdir())) == 2
            torch.testing.assert_close(content_of(newest), whole, rtol=0, atol=0)
    print(finished.stdout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Imports what torch imports at the first optimizer.
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    target, chosen = Path(sys.argv[1]), sys.argv[2]
    if chosen == "fsdp2":
        import torch.distributed.checkpoint
        import torch.distributed.fsdp
    assert wait_for(start_both(target / "whole", chosen, is_saved=False)) == [0, 0]
    print(run_series(target, chosen, *map(int, sys.argv[3:])))
