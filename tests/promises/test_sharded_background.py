"""FSDP2 on two processes, HSDP on two times two: each writes its part in the background, and nothing is exchanged meanwhile."""

import os
import sys
import threading
import warnings
from functools import partial

import pytest
import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.utils.data import TensorDataset

from accel_callbacks import SaveTrainingStateCallback
from accel_core import (
    AccelWarning,
    CheckpointError,
    Trainer,
    TrainerCallback,
    latest_checkpoint,
    verify_checkpoint,
)
from accel_core.state.shards import Shards
from case_runner import compare, run_as_script, shared_folder
from layouts import fsdp2

pytestmark = pytest.mark.slow


class Slow:
    """Lets one process write its part only once an update was made."""

    def __init__(self, process=1, error=None):
        self.is_slow = Accelerator().process_index == process
        self.error = error
        self.may_write = threading.Event()

    def __enter__(self):
        self.before = Shards.write
        slow = self

        def write(shards, folder):
            if slow.is_slow:
                assert slow.may_write.wait(60)
                if slow.error is not None:
                    raise slow.error
            return slow.before(shards, folder)

        Shards.write = write
        return self

    def __exit__(self, *error):
        Shards.write = self.before


class Watch(TrainerCallback):
    """Notes after which update a state is told as saved, and acts after others."""

    order = 2000

    def __init__(self, at=None):
        self.at = at or {}
        self.told = []

    def on_optimizer_step_end(self, trainer):
        action = self.at.get(trainer.run_progress.updates_completed)
        if action is not None:
            action()

    def on_checkpoint_saved(self, trainer, path):
        self.told.append((path.name, trainer.run_progress.updates_completed))


def make_trainer(callbacks=(), seed=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks, seed=7)


def train(callbacks=(), seed=3, **kwargs):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(80, 5, generator=generator)
    data = TensorDataset(inputs, torch.randint(0, 3, (80,), generator=generator))
    trainer = make_trainer(callbacks, seed)
    trainer.train(data, max_num_train_steps=10, per_device_batch_size=4, **kwargs)
    return trainer


def weights_of(trainer):
    path = shared_folder() / "model.pt"
    trainer.save_checkpoint(path, save_optimizer=False)
    return dict(torch.load(path, weights_only=True)["model_state_dict"])


def saver(folder, updates=3, **kwargs):
    kwargs = {"save_at_end": False, "in_background": True, **kwargs}
    return SaveTrainingStateCallback(folder, save_every_n_updates=updates, **kwargs)


def go_on(batch_size):
    """The second process writes the state of update 4 after update 6; what it holds is of update 4."""
    folder = shared_folder()
    with Slow() as slow:
        watch = Watch({6: slow.may_write.set})
        whole = train([saver(folder, 4, keep_last=1), watch])
    left = sorted(os.listdir(folder))
    torch.distributed.barrier()
    # The state of update 8, which was told, and then that of update 4 of another run.
    rest = train(seed=4, resume_from=latest_checkpoint(folder))
    other = shared_folder()
    with Slow() as slow:
        train([saver(other, 4, keep_last=3), Watch({6: slow.may_write.set})])
    torch.distributed.barrier()
    rest_of_4 = train(seed=4, resume_from=other / "update_00000004")
    return {
        "told": watch.told,
        "left": left,
        "weights": [weights_of(each) for each in (whole, rest, rest_of_4)],
        "flaws": list(verify_checkpoint(other).values()),
        "engine": whole.engine.name,
    }


def fail(batch_size):
    """The second process cannot write: it is an error of both, and nothing is left."""
    folder = shared_folder()
    with Slow(error=OSError("no space left on device")) as slow:
        slow.may_write.set()
        try:
            train([saver(folder)])
            told = None
        except CheckpointError as error:
            told = str(error)
    torch.distributed.barrier()
    return told, sorted(name for name in os.listdir(folder) if name != "run_card.json")


def raise_error(batch_size):
    """An error of the user's while the state is on its way: it stands when train has raised."""
    folder = shared_folder()

    def stop():
        threading.Timer(0.5, slow.may_write.set).start()
        raise ValueError("the user's")

    with Slow() as slow:
        try:
            train([saver(folder), Watch({4: stop})])
            told = None
        except ValueError as error:
            told = str(error)
    torch.distributed.barrier()
    found = latest_checkpoint(folder)
    return told, found.name, weights_of(train(seed=4, resume_from=found))


def wait(batch_size):
    """A save that is due earlier waits, and the main process says so once."""
    folder = shared_folder()
    with warnings.catch_warnings(record=True) as caught, Slow(process=0) as slow:
        warnings.simplefilter("always", AccelWarning)
        threading.Timer(1.0, slow.may_write.set).start()
        train([saver(folder, 1, keep_last=2)])
    torch.distributed.barrier()
    told = [str(each.message) for each in caught if issubclass(each.category, AccelWarning)]
    return told, sorted(name for name in os.listdir(folder) if name.startswith("update"))


def write_as_before(batch_size):
    """What an older torch makes: Accelerate writes, and training waits for it."""
    folder = shared_folder()
    kept = torch.distributed.checkpoint.HuggingFaceStorageWriter
    del torch.distributed.checkpoint.HuggingFaceStorageWriter
    watch = Watch()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train([saver(folder), watch])
    finally:
        torch.distributed.checkpoint.HuggingFaceStorageWriter = kept
    return watch.told


def whole(batch_size):
    return weights_of(train())


CASES = {
    "whole": whole,
    "go on": go_on,
    "fail": fail,
    "error": raise_error,
    "wait": wait,
    "before": write_as_before,
}
CASES_OF_HSDP = {name: CASES[name] for name in ("whole", "go on")}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return compare(CASES, __file__, 2, tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="module")
def outcome_of_hsdp(tmp_path_factory):
    return compare(CASES_OF_HSDP, __file__, 4, tmp_path_factory.mktemp("cases_of_hsdp"))


@pytest.mark.parametrize("layout", ["outcome", "outcome_of_hsdp"], ids=["FSDP2", "HSDP"])
def test_states_hold_what_stood_when_they_were_due_and_all_hear_of_them_at_once(layout, request):
    outcome = request.getfixturevalue(layout)
    results = outcome.of("go on")
    first = results[0]
    assert first["engine"] == {2: "FSDP2", 4: "HSDP"}[outcome.processes]
    assert [each["told"] for each in results] == [first["told"]] * outcome.processes
    (name, update), *later = first["told"]
    assert name == "update_00000004" and 6 < update <= 8
    assert [name for name, _ in later] == ["update_00000008"]
    for result, bits in zip(results, outcome.of("whole"), strict=True):
        for weights in result["weights"]:
            torch.testing.assert_close(weights, bits, rtol=0, atol=0)
        assert result["flaws"] == [None, None]
    assert [name for name in first["left"] if "update" in name] == ["update_00000008"]


def test_what_one_process_cannot_write_is_an_error_of_all_and_leaves_nothing(outcome):
    for told, left in outcome.of("fail"):
        assert "Process 1: " in told and "in the background" in told and "no space left" in told
        assert left == []


def test_an_error_waits_for_the_state_that_is_on_its_way(outcome):
    for (told, name, weights), bits in zip(outcome.of("error"), outcome.of("whole"), strict=True):
        assert told == "the user's" and name == "update_00000003"
        torch.testing.assert_close(weights, bits, rtol=0, atol=0)


def test_a_save_that_is_due_earlier_waits_and_the_main_process_says_so_once(outcome):
    (told, states), (told_other, states_other) = outcome.of("wait")
    assert len(told) == 1 and "is still being written" in told[0] and told_other == []
    assert states == states_other == ["update_00000009", "update_00000010"]


def test_what_torch_cannot_write_in_shards_is_written_at_once(outcome):
    for told in outcome.of("before"):
        assert told == [(f"update_{update:08d}", update) for update in (3, 6, 9)]


if __name__ == "__main__":
    is_hsdp = sys.argv[1] == "4"
    run_as_script(
        CASES_OF_HSDP if is_hsdp else CASES,
        # Torch and Accelerate warn of their own calls of each other.
        ignore=".*",
        create_accelerator=partial(fsdp2, replicas=2 if is_hsdp else 1),
        distributed_type=DistributedType.FSDP,
    )
