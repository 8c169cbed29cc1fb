"""Each way out that an error about replaying, or about resuming in a test, names works."""

import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from accel_core import CheckpointError, ConfigurationError, Trainer, TrainerCallback
from accel_core.extending import files
from accel_core.testing import assert_processes_agree, assert_resumes_exactly
from case_runner import Outcome, compare, run_as_script
from replaying import Numbered, numbered_trainer, saving
from tiny import Stream, tiny_data, tiny_trainer
from ways_out import (
    NOTHING,
    Row,
    check_every_error_is_known,
    make_mistake_and_ways_out,
    name_of,
    told,
    ways_out_of_checks,
)

PLACES = ("accel-core/src/accel_core/replay", "accel-core/src/accel_core/testing")
DATA = tiny_data(24)


def recorded(folder: str = "states", seed: int | None = 3, **kwargs: Any) -> Path:
    """States of a run of eight updates, after each third and at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    given = {"num_epochs": 2, "per_device_batch_size": 11, **kwargs}
    numbered_trainer([saving(Path(folder), 3)], seed=seed).train(Numbered(), **given)
    return Path(folder)


def replay(update: Any = 5, folder: Any = None, trainer: Any = None, **kwargs: Any) -> Any:
    given = {"num_epochs": 2, "per_device_batch_size": 11, **kwargs}
    folder = recorded() if folder is None else folder
    trainer = numbered_trainer() if trainer is None else trainer
    return trainer.replay(Numbered(), update=update, folder=folder, **given)


def without(folder: Path, *updates: int) -> Path:
    for update in updates:
        shutil.rmtree(folder / f"update_{update:08d}")
    return folder


def two_stages() -> Path:
    folder = Path("stages")
    shutil.rmtree(folder, ignore_errors=True)
    trainer = numbered_trainer([saving(folder, 3)])
    for is_first in (True, False):
        trainer.train(Numbered(), 2, per_device_batch_size=11, reset_run_history=is_first)
    return folder


def resumed(from_update: int, **kwargs: Any) -> Path:
    """The run ends after its sixth update, and goes on from a state, perhaps with other batches."""
    folder = without(recorded(), 8)
    trainer = numbered_trainer([saving(folder, 3)])
    given = {"num_epochs": 3, "per_device_batch_size": 11, **kwargs}
    trainer.train(Numbered(), resume_from=folder / f"update_{from_update:08d}", **given)
    return folder


def without_first_weights() -> Path:
    """As an older version has saved it."""
    folder = recorded()
    for path in folder.glob("update_*/trainer_state.json"):
        state = json.loads(path.read_text())
        del state["beginning"]["weights"], state["sha256"]
        files.write_json(path, state, is_sealed=True)
    return folder


def trained() -> Trainer:
    trainer = numbered_trainer()
    trainer.train(Numbered(), 1)
    return trainer


class Locked(TrainerCallback):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class LockedAside(Locked):
    runs_in_replay = False


class LockedAgain(Locked):
    def __deepcopy__(self, memo: Any) -> Any:
        return LockedAgain()


OF_REPLAY: tuple[Row, ...] = (
    Row(
        "cannot be copied, but a replay works on copies: {} Set runs_in_replay = False in {} if it has no influence",
        lambda: replay(trainer=numbered_trainer([Locked()])),
        (
            lambda: replay(trainer=numbered_trainer([LockedAside()])),
            lambda: replay(trainer=numbered_trainer([LockedAgain()])),
        ),
    ),
    Row(
        "but with these arguments the run ends after update {}. Pass what train was given, and an update that it made.",
        lambda: replay(9),
        (lambda: replay(8),),
    ),
    Row(
        "The data of update {} was read in another way: {}. Pass what train was given.",
        lambda: replay(per_device_batch_size=7),
        (lambda: replay(per_device_batch_size=11),),
    ),
    Row(
        "replay was given {}, but chooses the state and the stage by itself. Leave it out.",
        lambda: replay(resume_from="states"),
        (lambda: replay(),),
    ),
    Row(
        "so the replay begins with the trainer itself, which is not as the run began: {}.",
        lambda: replay(2, trainer=trained()),
        (lambda: replay(2, trainer=numbered_trainer()),),
        says="Make the trainer as for the run, without training it",
    ),
    Row(
        "so the replay begins with the trainer itself, which is not as the run began: {}.",
        lambda: replay(2, trainer=numbered_trainer(seed=4)),
        (lambda: replay(2, trainer=numbered_trainer(seed=3)),),
        says="Give the trainer the seed of the run",
    ),
    Row(
        "so the replay begins with the trainer itself, which is not as the run began: {}.",
        lambda: replay(2, recorded(seed=None), trainer=numbered_trainer(seed=None)),
        (lambda: replay(4, recorded(seed=None), trainer=numbered_trainer(seed=None)),),
        says="if it had none, replay an update after its first state",
    ),
    Row(
        " of the stage before. Replay an update after the first state of that stage, and let later runs save at the",
        lambda: replay(9, without(two_stages(), 8)),
        (lambda: replay(10, without(two_stages(), 8)), lambda: replay(9, two_stages())),
        CheckpointError,
    ),
    Row(
        " holds no complete training state, so nothing says how the run was. Pass the folder in which",
        lambda: replay(folder="elsewhere"),
        (lambda: replay(folder=recorded("elsewhere")),),
        CheckpointError,
    ),
    Row(
        " the run went on with other processes, batches or data, and no state from there is left. Keep the states",
        lambda: replay(
            9, without(resumed(6, per_device_batch_size=6), 6, 9), num_epochs=3, per_device_batch_size=6
        ),
        (lambda: replay(9, resumed(6, per_device_batch_size=6), num_epochs=3, per_device_batch_size=6),),
        CheckpointError,
    ),
    Row(
        " holds no state before update {}, and the run was interrupted before it. {}",
        lambda: replay(8, without(resumed(6), 3, 6), num_epochs=3),
        (lambda: replay(10, without(resumed(6), 3, 6), num_epochs=3),),
        CheckpointError,
        says="Replay an update after 9, the first that has a state before it.",
    ),
    Row(
        "and its oldest one does not say with which weights the run began: an older version saved it, or an engine",
        lambda: replay(2, without_first_weights()),
        (lambda: replay(4, without_first_weights()),),
        CheckpointError,
        says="Replay an update after 3, the first that has a state before it.",
    ),
    Row("Updates are counted from 1.", lambda: replay(0), (lambda: replay(1),)),
    Row(
        "Pass the folder in which the run has saved its training states.",
        lambda: replay(folder=3),
        (lambda: replay(folder=recorded()),),
    ),
)


# ---------------------------------------------------------------------- tests of users


class Curriculum(TrainerCallback):
    """Changes the learning rate by what it has counted."""

    def __init__(self) -> None:
        self.count = 0

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self.count += 1
        trainer.optimizer.param_groups[0]["lr"] = 0.1 / (1 + self.count)


class Saved(Curriculum):
    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class NotPutBack(Saved):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


GENERATOR = torch.Generator().manual_seed(1)


class Draws(TrainerCallback):
    """Takes the learning rate from a generator of the module."""

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        trainer.optimizer.param_groups[0]["lr"] = float(torch.rand(1, generator=GENERATOR))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": GENERATOR.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        GENERATOR.set_state(state["generator"])


class DrawsAsItSaves(TrainerCallback):
    def state_dict(self) -> dict[str, Any]:
        return {"drawn": float(torch.rand(()))}


class ReadsAsItSaves(TrainerCallback):
    def state_dict(self) -> dict[str, Any]:
        return {"seed": torch.initial_seed()}


def resumes(kind: Any = Saved, data: Any = DATA, seeds_anew: bool = False, **kwargs: Any) -> None:
    def make_trainer() -> Trainer:
        if seeds_anew:
            GENERATOR.manual_seed(1)
        return tiny_trainer(callbacks=[kind()])

    assert_resumes_exactly(make_trainer, data, **{"kills": 2, "per_device_batch_size": 4, **kwargs})


SCRIPT = """
import torch
from accel_core import Trainer

torch.manual_seed(0)
data = torch.utils.data.TensorDataset(torch.randn(16, 3), torch.randn(16, 1))
model = torch.nn.Linear(3, 1)
trainer = Trainer(model, torch.nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), [], seed=1)
trainer.train(data, 1, per_device_batch_size=4)
"""


def processes_agree() -> None:
    Path("script.py").write_text(SCRIPT)
    assert_processes_agree("script.py", 2)


OF_TESTING: tuple[Row, ...] = (
    Row(
        "The run has {}, but at least 2 are needed to end in between. Pass more data or more epochs.",
        lambda: resumes(data=tiny_data(4), num_epochs=1),
        (
            lambda: resumes(data=tiny_data(8), num_epochs=1),
            lambda: resumes(data=tiny_data(4), num_epochs=2),
        ),
        ConfigurationError,
    ),
    Row(
        "random numbers of a generator that is not seeded anew by `make_trainer`, or a `state_dict` that changes",
        lambda: resumes(Draws),
        (lambda: resumes(Draws, seeds_anew=True),),
        AssertionError,
    ),
    Row(
        "random numbers of a generator that is not seeded anew by `make_trainer`, or a `state_dict` that changes",
        lambda: resumes(DrawsAsItSaves),
        (lambda: resumes(ReadsAsItSaves),),
        AssertionError,
    ),
    Row(
        "A run that goes on from update {} is another one at update {}:",
        lambda: resumes(Curriculum),
        (lambda: resumes(Saved),),
        AssertionError,
        says="the attribute `count` of Curriculum changed and is not in its state_dict",
    ),
    Row(
        "A run that goes on from update {} is another one at update {}:",
        lambda: resumes(NotPutBack),
        (lambda: resumes(Saved),),
        AssertionError,
        says="is not put back by its load_state_dict, although its state_dict has 'count'",
    ),
    Row("Pass how many states to go on from.", lambda: resumes(kills=0), (lambda: resumes(kills=1),)),
)

AGREEING = {
    "num_processes is {}, but one agrees with itself. Pass 2 or more.": lambda: assert_processes_agree("", 1),
    "script is '{}', which is no file. Pass a path, or the source.": lambda: assert_processes_agree(
        "no.py", 2
    ),
    "Pass 2 or more.": lambda: assert_processes_agree("", "two"),  # type: ignore[arg-type]
}
"""Mistakes with one way out in common, which starts processes."""

MADE_ELSEWHERE = {
    "The script has no trainer among its global names, so nothing can be compared. Give each trainer a global name.",
    "left the script before its end, or did not know of each other. Let the script run to its end, without sys.exit.",
    "Process 0 has the trainers {}, process {} {}. Make the same trainers on every process.",
    "The {} processes {}.",
    "Processes 0 and {} do not agree about `{}`:",
}
"""Made in `accel-core/test_testing.py`, where each starts processes; the script here does what they say."""


# ---------------------------------------------------------------------- on two processes


SEEDS = {"without a seed": None, "with a seed": 3}


def of_one_process(batch_size: int) -> list[str]:
    """The run was made on one process."""
    return told(lambda: replay(folder=Path(sys.argv[3]) / "alone"))


def in_turn(batch_size: int) -> Any:
    """Runs of two processes: one of data without an index, and two that one process has begun."""
    folder = Path(sys.argv[3])
    kwargs: dict[str, Any] = {"per_device_batch_size": 4, "num_epochs": 1}
    tiny_trainer(callbacks=[saving(folder / "stream", 2)]).train(Stream(DATA), **kwargs)
    resumed = {"resume_from": folder / "stream" / "update_00000002", "max_num_train_steps": 3}
    went_on = told(lambda: tiny_trainer().train(Stream(DATA), **kwargs, **resumed))
    for name, seed in SEEDS.items():
        begun = folder / name
        trainer = numbered_trainer([saving(begun, 3)], seed=seed)
        trainer.train(Numbered(), 2, per_device_batch_size=6, resume_from=begun / "update_00000003")
    return folder, went_on


CASES = {"of one process": of_one_process, "in turn": in_turn}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder, cases = (tmp_path_factory.mktemp(name) for name in ("runs", "cases"))
    recorded(str(folder / "alone"))
    for name, seed in SEEDS.items():
        without(recorded(str(folder / name), seed), 6, 8)
    return compare(CASES, __file__, 2, cases, args=[folder])


IN_TURN = "processes made this update, and one process cannot take their batches in turn: {}. Resume the run on as many"
WITHOUT_SEED = (
    "seed is None, so nothing says with which random states the other processes began. Replay an update after"
)
OTHER_NUMBER = "replay was called on {}, but {} made update {}. Start the script on {}{}."
SPREAD = "replay trains a copy of the model, but {} spreads the model over the processes, where it cannot be copied."


@pytest.mark.slow
def test_what_a_replay_of_several_processes_says_instead_works(outcome: Outcome, tmp_path: Path) -> None:
    for (mistake,) in outcome.of("of one process"):
        assert "replay was called on 2 processes, but 1 made update 5. Start the script on 1." in mistake
    assert replay(folder=recorded(str(tmp_path / "alone"))).update == 5
    folder, went_on = outcome.of("in turn")[0]
    kwargs: dict[str, Any] = {"num_epochs": 1, "per_device_batch_size": 4, "folder": folder / "stream"}
    with pytest.raises(ConfigurationError, match=r"2 processes made this update.*max_num_train_steps"):
        tiny_trainer().replay(Stream(DATA), update=3, **kwargs)
    assert went_on == [NOTHING]
    batch: dict[str, Any] = {"per_device_batch_size": 6}
    with pytest.raises(ConfigurationError, match="seed is None, so nothing says with which random states"):
        replay(5, folder / "without a seed", numbered_trainer(seed=None), **batch)
    assert replay(7, folder / "without a seed", numbered_trainer(seed=None), **batch).update == 7
    assert replay(5, folder / "with a seed", numbered_trainer(seed=3), **batch).update == 5


# ---------------------------------------------------------------------- the tests


def test_every_error_about_replaying_is_known() -> None:
    rows = {row.text for row in (*OF_REPLAY, *OF_TESTING)} | {*AGREEING}
    checks = set(ways_out_of_checks(*PLACES))
    assert checks <= rows
    on_processes = {IN_TURN, WITHOUT_SEED, OTHER_NUMBER}
    elsewhere = {*MADE_ELSEWHERE, SPREAD}
    check_every_error_is_known(*PLACES, rows=(rows - checks) | on_processes, facts=elsewhere)


@pytest.mark.parametrize("row", [*OF_REPLAY, *OF_TESTING], ids=name_of)
def test_what_an_error_about_replaying_says_instead_works(row: Row) -> None:
    make_mistake_and_ways_out(row)


@pytest.mark.slow
def test_what_an_error_about_processes_that_agree_says_instead_works() -> None:
    for text, mistake in AGREEING.items():
        make_mistake_and_ways_out(Row(text, mistake, ()))
    processes_agree()


if __name__ == "__main__":
    run_as_script(CASES)
