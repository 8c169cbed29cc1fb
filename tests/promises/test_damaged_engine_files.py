"""States of engines that shard, of which each process has written a part: damage of any file is noticed by name on all.

DeepSpeed's files are pickles, which have no digest of their own. ACCEL_TEST_DAMAGES chooses the number of trials, if
it is larger than what tries each damage of each file once.
"""

import os
import random
import shutil
import sys
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import TensorDataset

from accel_core import CheckpointError, Trainer, verify_checkpoint
from case_runner import compare, run_as_script, shared_folder
from sharding import ENGINES, create_accelerator, environment_of
from states import STATE_FILE, flip_bit, zero_sector
from tiny import SaveAt

pytestmark = pytest.mark.slow
DATA = TensorDataset(torch.randn(37, 5, generator=torch.Generator().manual_seed(1)), torch.arange(37) % 3)
TRIALS = int(os.environ.get("ACCEL_TEST_DAMAGES", "0"))


def trained(batch_size, *callbacks, seed=7, resume_from=None):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks, seed=seed)
    trainer.trust_engine_files = True
    trainer.train(DATA, max_num_train_steps=6, per_device_batch_size=batch_size, resume_from=resume_from)


def damages_of(folder):
    """Pairs of a file and a damage: of one bit or sector, or the same file of an earlier update or another run."""
    whole = folder / "state"
    found = (path for path in whole.rglob("*") if path.is_file() and path.stat().st_size)
    # What damage of trainer_state.json does is tested without processes, in test_digests.py.
    names = sorted(path.relative_to(whole) for path in found if path.name != STATE_FILE)
    damages = [(name, how) for name in names for how in (flip_bit, zero_sector)]
    for source in ("earlier", "other"):
        for name in names:
            found = folder / source / name
            if name.parts[0] == "engine" and found.is_file():
                damages.append((name, found))
    rng = random.Random(8)
    return [*damages, *rng.choices(damages, k=max(0, TRIALS - len(damages)))]


def damage(batch_size):
    """For each trial: the file, the kind of damage, and what this process raised; None if it was no damage."""
    folder, rng, found = shared_folder(), random.Random(7), []
    trained(batch_size, SaveAt(3, folder / "earlier"), SaveAt(4, folder / "state"))
    trained(batch_size, SaveAt(4, folder / "other"), seed=8)
    for trial, (name, how) in enumerate(damages_of(folder)):
        state, is_other = folder / f"trial_{trial}", [True]
        if Accelerator().is_main_process:
            shutil.copytree(folder / "state", state)
            how(state / name, rng) if callable(how) else shutil.copy(how, state / name)
            # A sector may have been zeros, and two states may have files in common.
            is_other = [(state / name).read_bytes() != (folder / "state" / name).read_bytes()]
        broadcast_object_list(is_other)
        kind = how.__name__ if callable(how) else how.relative_to(folder).parts[0]
        if not is_other[0]:
            found.append((str(name), kind, None, None))
            continue
        flaw = [verify_checkpoint(state)[state] if Accelerator().is_main_process else None]
        broadcast_object_list(flaw)
        try:
            trained(batch_size, resume_from=state)
            told = "nothing"
        except CheckpointError as error:
            told = str(error)
        found.append((str(name), kind, told, flaw[0]))
    return found


CASES = {"damage": damage}


@pytest.fixture(scope="module", params=["fsdp2", "zero2"])
def outcome(request, tmp_path_factory):
    engine = request.param
    folder = tmp_path_factory.mktemp("cases")
    return compare(CASES, __file__, 2, folder, timeout=250, args=[engine], env=environment_of(engine))


def test_damage_of_any_file_of_an_engine_is_noticed_by_name_on_every_process(outcome):
    first, second = outcome.of("damage")
    assert len(first) == len(second)
    kinds = set()
    for (name, kind, told, flaw), of_other in zip(first, second, strict=True):
        assert of_other[:2] == (name, kind)
        if told is None:
            continue
        kinds.add((name.split("/")[0], kind))
        for text in (told, of_other[2], flaw):
            assert name in text and ("damaged" in text or "digest differs" in text), (name, kind, text)
    assert kinds >= {("engine", kind) for kind in ("flip_bit", "zero_sector", "earlier", "other")}
    assert {kind for name, kind in kinds if name == "process_00001.pt"} == {"flip_bit", "zero_sector"}


if __name__ == "__main__":
    run_as_script(
        CASES,
        ignore=".*",
        create_accelerator=partial(create_accelerator, sys.argv[3]),
        distributed_type=ENGINES[sys.argv[3]],
    )
