"""States of HSDP and DeepSpeed in a mirror: another machine, without the disk of the first, continues from them to the bit.

FSDP2 is killed and loses its disk in `test_kills_of_two_processes.py`.
"""

import shutil
import sys
from collections import Counter
from functools import partial

import pytest
import torch
from accelerate import DistributedType
from torch import nn
from torch.utils.data import TensorDataset

from accel_callbacks import SaveTrainingStateCallback
from accel_core import ConfigurationError, Trainer, latest_checkpoint, verify_checkpoint
from accel_core.state.files import read_tensors
from accel_core.state.store import Store
from case_runner import compare, run_as_script, shared_folder
from layouts import fsdp2
from sharding import create_accelerator, environment_of
from states import flip_last_bit

pytestmark = pytest.mark.slow
PROCESSES = {"hsdp": 4, "zero2": 2, "zero3": 2}


def make_trainer(callbacks=(), seed=3, is_trusted=False):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks, seed=7)
    trainer.trust_engine_files = is_trusted
    return trainer


def train(trainer, **kwargs):
    """Train, and return the whole weights."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(80, 5, generator=generator)
    data = TensorDataset(inputs, torch.randint(0, 3, (80,), generator=generator))
    trainer.train(data, max_num_train_steps=11, per_device_batch_size=4, **kwargs)
    path = shared_folder() / "model.safetensors"
    trainer.save_checkpoint(path)
    return read_tensors(path)


class Downloads:
    """Counts how often this process downloads each file."""

    def __enter__(self):
        self.counts, self.get = Counter(), Store.get

        def get(store, name, local):
            self.counts[name] += 1
            self.get(store, name, local)

        Store.get = get
        return self.counts

    def __exit__(self, *error):
        Store.get = self.get


def lose_the_disk(in_background, is_trusted, batch_size):
    """Save with a mirror, remove the folder of the states, and continue from the mirror; then damage it."""
    folder = shared_folder()
    saver = SaveTrainingStateCallback(
        folder / "states",
        save_every_n_updates=4,
        keep_last=2,
        save_at_end=False,
        in_background=in_background,
        mirror=f"file://{folder / 'mirror'}",
    )
    first = make_trainer([saver])
    result = {"whole": train(first), "engine": first.engine.name}
    if first.is_main_process:
        shutil.rmtree(folder / "states")
    torch.distributed.barrier()
    with Downloads() as result["downloads"]:
        newest = latest_checkpoint(saver.mirror, cache=folder / "other machine")
    result["rest"] = train(make_trainer(seed=4, is_trusted=is_trusted), resume_from=newest)
    (mirrored,) = (folder / "mirror").glob(f"{newest.name}-*")
    files = sorted(file for file in mirrored.rglob("*") if file.is_file())
    result["mirrored"] = [file.relative_to(mirrored).as_posix() for file in files]
    result["newest"], result["flaws"] = newest.name, list(verify_checkpoint(newest).values())
    torch.distributed.barrier()
    if first.is_main_process:
        parts = [file for file in files if file.parent != mirrored]
        flip_last_bit([file for file in parts if file.suffix in (".pt", ".safetensors")][-1])
    torch.distributed.barrier()
    result["before"] = latest_checkpoint(saver.mirror, cache=folder / "third machine").name
    return result


def refuse_the_background(batch_size):
    """DeepSpeed communicates while it writes, with a mirror as without one."""
    folder = shared_folder()
    saver = SaveTrainingStateCallback(
        folder / "states", in_background=True, mirror=f"file://{folder / 'mirror'}"
    )
    trainer = make_trainer([saver])
    try:
        train(trainer)
    except ConfigurationError as error:
        return str(error), trainer.run_progress.updates_completed, (folder / "mirror").exists()


def cases_of(layout):
    if layout == "hsdp":
        return {
            "at once": partial(lose_the_disk, False, False),
            "in the background": partial(lose_the_disk, True, False),
        }
    return {"at once": partial(lose_the_disk, False, True), "in the background": refuse_the_background}


@pytest.fixture(scope="module", params=PROCESSES)
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def outcome(layout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    environment = {} if layout == "hsdp" else environment_of(layout)
    return compare(cases_of(layout), __file__, PROCESSES[layout], folder, args=[layout], env=environment)


def assert_continued(results, engine):
    for result in results:
        assert result["engine"] == engine
        assert result["newest"] == "update_00000008" and result["flaws"] == [None]
        torch.testing.assert_close(result["rest"], result["whole"], rtol=0, atol=0)


def test_without_the_disk_a_run_continues_from_the_mirror_to_the_bit(outcome, layout):
    assert_continued(outcome.of("at once"), "HSDP" if layout == "hsdp" else "DEEPSPEED")


def test_saves_in_the_background_are_mirrored_too_or_refused_before_the_first_update(outcome, layout):
    results = outcome.of("in the background")
    if layout == "hsdp":
        assert_continued(results, "HSDP")
    else:
        for told, updates, is_written in results:
            assert "in_background is True, but DEEPSPEED spreads the model" in told
            assert updates == 0 and not is_written


def test_one_process_downloads_the_files_of_all(outcome):
    results = outcome.of("at once")
    mirrored = results[0]["mirrored"]
    (downloads,) = filter(None, (result["downloads"] for result in results))
    assert set(downloads.values()) == {1}
    assert sorted(name.partition("/")[2] for name in downloads) == mirrored
    # What each process has written is among them.
    assert len([name for name in mirrored if name.startswith("process_")]) == outcome.processes
    assert len([name for name in mirrored if name.startswith("engine/")]) > 1


def test_if_a_part_is_damaged_in_the_mirror_the_state_before_is_taken(outcome):
    assert {result["before"] for result in outcome.of("at once")} == {"update_00000004"}


if __name__ == "__main__":
    chosen = sys.argv[3]
    run_as_script(
        cases_of(chosen),
        # Torch, Accelerate and DeepSpeed warn of their own calls of each other.
        ignore=".*",
        create_accelerator=partial(fsdp2, replicas=2)
        if chosen == "hsdp"
        else partial(create_accelerator, chosen),
        distributed_type=DistributedType.FSDP if chosen == "hsdp" else DistributedType.DEEPSPEED,
    )
