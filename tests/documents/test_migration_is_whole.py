"""Each public class, method, argument and attribute of pytorch-accelerated is here by its name, or has a row in docs/migration.md."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

import accel_callbacks
import accel_core
import accel_integrations.schedulers
import reference_names

GUIDE = Path(__file__).parents[2] / "docs" / "migration.md"
LINES = [line for line in reference_names.LIST.read_text().splitlines()[3:] if line]


def owner_of(line: str) -> str:
    """The class of a member, or the module of a class or a function."""
    return line.partition("(")[0].rpartition(".")[0].rpartition(".")[2]


OWNERS = sorted({owner_of(line) for line in LINES})


def rows() -> dict[str, list[str]]:
    """The rows of all tables below "Every public name": the old name, and what stands beside it."""
    tables = GUIDE.read_text().partition("## Every public name")[2]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in tables.splitlines()
        if line.startswith("| `")
    ]
    return {old.strip("`"): [new.strip("`"), told] for old, new, told in cells}


ROWS = rows()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One of each class that the reference has too: some attributes exist on an instance only."""
    folder = tmp_path_factory.mktemp("made")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = accel_core.Trainer(model, torch.nn.functional.cross_entropy, optimizer, callbacks=[])
    trainer.train(TensorDataset(torch.randn(4, 2), torch.tensor([0, 1, 0, 1])), num_epochs=1)
    schedulers = accel_integrations.schedulers
    cosine = schedulers.CosineLrScheduler(optimizer, 2, 3)
    instances = [
        trainer,
        trainer.callbacks,
        trainer.run_config,
        trainer.run_history,
        trainer.train_loss,
        accel_core.LogMetricsCallback(),
        accel_core.PrintProgressCallback(),
        accel_core.TerminateOnNaNCallback(),
        accel_core.LimitBatchesCallback(2),
        accel_core.LimitBatches(2),
        accel_callbacks.ProgressBarCallback(),
        accel_callbacks.SaveBestModelCallback(),
        accel_callbacks.EarlyStoppingCallback(),
        accel_callbacks.ModelEmaCallback(),
        accel_callbacks.ConvertSyncBatchNormCallback(),
        accel_callbacks.StepBasedEvaluationCallback(2),
        accel_callbacks.SaveTrainingStateCallback(folder),
        accel_callbacks.ModelFreezer(model),
        schedulers.WSDCheckpointCallback(folder),
        schedulers.WSDLrScheduler(optimizer, total_steps=20),
        cosine,
    ]
    by_name = {type(each).__name__: each for each in instances}
    # What has no instance of its own: base classes, and names that changed.
    by_name |= {
        "RunHistory": trainer.run_history,
        "SchedulerBase": cosine,
        "StatefulSchedulerBase": cosine,
        "TrainerCallback": accel_core.TrainerCallback(),
        "CallbackHandler": trainer.callbacks,
        "TrainerPlaceholderValues": accel_core.TrainerPlaceholderValues,
    }
    return by_name


def has_answer(line: str, made) -> bool:
    owner, member = owner_of(line), line.partition("(")[0].rpartition(".")[2]
    if f"{owner}.{member}" in ROWS:
        return True
    if not owner[:1].isupper():  # A class or a function of a module.
        return any(old.rpartition(".")[2] == member for old in ROWS)
    if owner not in made:  # A class that is gone, or another here, answers for its members.
        return any(old.rpartition(".")[2] == owner for old in ROWS)
    return member == "__init__" or hasattr(made[owner], member)


@pytest.mark.parametrize("owner", OWNERS)
def test_each_name_is_here_or_in_the_guide(owner, made):
    unanswered = [line for line in LINES if owner_of(line) == owner and not has_answer(line, made)]
    assert unanswered == [], "neither here by these names nor rows of docs/migration.md"


def class_of(owner: str, made) -> type:
    return getattr(accel_integrations.schedulers, owner, type(made[owner]))


def arguments_of(line: str) -> list[tuple[str, str]]:
    """Name and default of each argument of a line."""
    given = re.search(r"\((.*)\)$", line)
    parts = re.split(r", (?![^(]*\))", given.group(1)) if given and given.group(1) else []
    return [tuple(part.partition("=")[::2]) for part in parts if not part.startswith("*")]


def problem_with(line: str, place: int, made) -> str | None:
    """What is wrong with an argument that has another name, place or default here, and no row; None if nothing is."""
    argument, default = arguments_of(line)[place]
    owner, member = owner_of(line), line.partition("(")[0].rpartition(".")[2]
    called = owner if member == "__init__" else f"{owner}.{member}"
    # A class that is gone, or another here, answers for its methods, and a method for its arguments.
    if f"{called}({argument})" in ROWS or owner not in made or ROWS.get(called, [""])[0] == "gone":
        return None
    function = class_of(owner, made) if member == "__init__" else getattr(made[owner], member, None)
    if function is None:  # Renamed: the row of the method says to what.
        return None if called in ROWS else f"nothing by the name {called}"
    parameters = list(inspect.signature(function).parameters.values())
    names = [parameter.name for parameter in parameters]
    if argument not in names:
        return f"no argument {called}({argument})"
    # Events are called by name, everything else may be called by place.
    if not member.startswith("on_") and names.index(argument) != place:
        return f"another place of {called}({argument})"
    shown = repr(parameters[names.index(argument)].default)
    is_placeholder = default == "DEFAULT_CALLBACKS" or default.startswith("TrainerPlaceholderValues")
    if default and not is_placeholder and shown != default:
        return f"another default of {called}({argument}): {shown} for {default}"
    return None


@pytest.mark.parametrize("owner", OWNERS)
def test_each_argument_is_here_or_in_the_guide(owner, made):
    problems = [
        problem_with(line, place, made)
        for line in LINES
        if owner_of(line) == owner
        for place in range(len(arguments_of(line)))
    ]
    assert [problem for problem in problems if problem] == []


def test_the_list_tells_no_stories():
    """Names that are surely there, and one of each kind."""
    text = reference_names.LIST.read_text()
    for line in (
        "trainer.Trainer.evaluate(",
        "tracking.LossTracker.total_loss",
        "utils.worker_init_fn(worker_id)",
    ):
        assert f"\n{line}" in text
    assert len(LINES) == len(set(LINES)) > 300


@pytest.mark.network
def test_the_list_is_what_stands_in_the_wheel(tmp_path):
    subprocess.run(
        [
            sys.executable,
            *["-m", "pip", "download", "--no-deps", "pytorch-accelerated==0.1.61", "--dest"],
            tmp_path,
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert reference_names.names_of(wheel) == reference_names.LIST.read_text()
