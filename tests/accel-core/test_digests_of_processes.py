"""States that two processes have saved together: damage of any of their files is noticed by name on both.

ACCEL_TEST_DAMAGES chooses the number of trials.
"""

import os
import random
import shutil

import pytest
import torch

from accel_core import CheckpointError
from case_runner import run_as_script, shared_folder
from states import flip_bit, zero_sector
from tiny import SaveAt, tiny_data, tiny_trainer, weights_of

TRIALS = int(os.environ.get("ACCEL_TEST_DAMAGES", "24"))
DATA = tiny_data()


def trained(*callbacks, **kwargs):
    trainer = tiny_trainer(callbacks=callbacks)
    trainer.train(DATA, 2, per_device_batch_size=4, **kwargs)
    return trainer


def damage(size):
    """For each trial: the file, and what this process raised, or that its end is that of no damage."""
    folder, rng, found = shared_folder(), random.Random(7), []
    whole = trained(SaveAt(6, folder / "state"))
    is_main, accelerator = whole.is_main_process, whole.accelerator
    names = sorted(path.name for path in (folder / "state").iterdir())
    for trial in range(max(TRIALS, len(names))):
        state, name = folder / f"trial_{trial}", names[trial % len(names)]
        if is_main:
            shutil.copytree(folder / "state", state)
            [flip_bit, zero_sector][trial // len(names) % 2](state / name, rng)
        accelerator.wait_for_everyone()
        try:
            resumed = trained(resume_from=state)
        except CheckpointError as error:
            found.append((name, str(error)))
        else:
            found.append((name, torch.equal(weights_of(resumed), weights_of(whole))))
    return found


CASES = {"damage": damage}


@pytest.mark.seconds
def test_damage_of_any_file_is_noticed_by_name_on_every_process_or_has_no_effect(outcome):
    by_process = outcome.of("damage")
    names = {name for name, _ in by_process[0]}
    assert {f"process_{index:05}.pt" for index in range(outcome.processes)} <= names
    for of_all in zip(*by_process, strict=True):
        # One name a trial, and all raise or none.
        assert len({(name, type(what)) for name, what in of_all}) == 1
        for name, what in of_all:
            assert what is True or (isinstance(what, str) and name in what), of_all
    noticed = sum(isinstance(what, str) for _, what in by_process[0])
    # A sector may have been zeros before.
    assert noticed >= 0.9 * len(by_process[0])


if __name__ == "__main__":
    run_as_script(CASES)
