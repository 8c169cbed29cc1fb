"""Each way out that an error about saved states and exports names works: the mistake is made, then what the message says."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from accel_callbacks import SaveTrainingStateCallback
from accel_core import (
    Trainer,
    TrainerCallback,
    best_checkpoint,
    compare_runs,
    latest_checkpoint,
    verify_checkpoint,
)
from accel_core.state import files
from tiny import tiny_data, tiny_trainer
from ways_out import (
    Row,
    check_every_error_is_known,
    check_every_way_out_is_known,
    make_mistake_and_ways_out,
    name_of,
)

DATA = tiny_data(16)
_numbers = itertools.count()


def new(kind: str) -> str:
    """A name that nothing has yet."""
    return f"{kind}_{next(_numbers)}"


def train(*callbacks: Any, trainer: Trainer | None = None, data: Any = DATA, **kwargs: Any) -> Trainer:
    """Two epochs of four updates, which is a new run unless it resumes or `trainer` is given."""
    trainer = tiny_trainer() if trainer is None else trainer
    for callback in callbacks:
        trainer.callbacks.add_callback(callback)
    trainer.train(data, **{"num_epochs": 2, "per_device_batch_size": 4, **kwargs})
    return trainer


def saver(folder: Any, **kwargs: Any) -> SaveTrainingStateCallback:
    return SaveTrainingStateCallback(folder, **{"save_every_n_updates": 2, **kwargs})


def saved(**kwargs: Any) -> Path:
    """The folder of a run with a state after updates 2, 4, 6 and 8."""
    folder = Path(new("states"))
    train(saver(folder, **kwargs))
    return folder


def states_in(folder: Path | str) -> list[Path]:
    return sorted(Path(folder).glob("update_*"))


def mirrored() -> tuple[Path, Path]:
    """The folder of a run, and its mirror."""
    mirror = Path(new("mirror"))
    return saved(mirror=mirror), mirror


def exported(suffix: str = ".pt") -> Path:
    path = Path(new("model")).with_suffix(suffix)
    tiny_trainer().save_checkpoint(path)
    return path


def load(path: Path | str) -> None:
    tiny_trainer().load_checkpoint(path)


def edited() -> Path:
    """An export in which a number was changed by hand."""
    path = exported()
    content = torch.load(path)
    content["model_state_dict"]["0.bias"] += 1
    torch.save(content, path)
    return path


def with_metadata(text: str) -> Path:
    path = Path(new("model")).with_suffix(".safetensors")
    save_file(tiny_trainer().model.state_dict(), path, {files.ORIGIN: text})
    return path


def without_model() -> Path:
    path = Path(new("other")).with_suffix(".pt")
    torch.save({"weights": torch.zeros(1)}, path)
    return path


def damaged() -> Path:
    """A run whose states have all lost a file."""
    folder = saved()
    for state in states_in(folder):
        (state / "optimizer.pt").unlink()
    return folder


def start_afresh() -> None:
    folder = damaged()
    for state in states_in(folder):
        shutil.rmtree(state)
    assert latest_checkpoint(folder) is None
    run_again(folder)


def cut_off() -> Path:
    """An export whose second half is missing."""
    path = exported()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def looping() -> Path:
    """A link to itself, which nobody can list."""
    path = Path(new("loop"))
    path.symlink_to(path.name)
    return path


def mend_loop() -> None:
    path = looping()
    path.unlink()
    path.mkdir()
    latest_checkpoint(path)


def run_again(folder: Path, **kwargs: Any) -> Trainer:
    """Another run saves where one has saved."""
    return train(saver(folder, **kwargs))


def continue_run() -> None:
    folder = saved()
    train(saver(folder), resume_from=states_in(folder)[-1], num_epochs=3)


def delete_and_run_again() -> None:
    folder = saved()
    shutil.rmtree(folder)
    run_again(folder)


def call_again(**kwargs: Any) -> None:
    folder = new("states")
    trainer = train(saver(folder))
    train(trainer=trainer, **kwargs)


def go_on_from_middle(remove: Callable[[list[Path]], Any] = lambda later: None, save_dir: Any = None) -> None:
    """Resume from the state after 4 updates of a folder that has later ones."""
    folder = saved()
    _, middle, *later = states_in(folder)
    remove(later)
    train(saver(save_dir or folder), resume_from=middle)


def go_on_beside_mirror(
    remove: bool = False, other_mirror: str | None = None, from_mirror: bool = False
) -> None:
    """Resume from the state after 4 updates, where the mirror has later ones."""
    folder, mirror = mirrored()
    _, middle, *later = states_in(folder)
    for state in later:
        shutil.rmtree(state)
        if remove:
            for copied in mirror.glob(f"{state.name}*"):
                shutil.rmtree(copied)
    resume_from = latest_checkpoint(mirror, cache=folder) if from_mirror else middle
    train(saver(folder, mirror=other_mirror or mirror), resume_from=resume_from, num_epochs=3)


def mirror_again(remove: bool = False, **kwargs: Any) -> None:
    """Another run copies to a mirror that has the states of one."""
    _, mirror = mirrored()
    if remove:
        shutil.rmtree(mirror)
    run_again(Path(new("states")), **{"mirror": mirror, **kwargs})


def continue_from_mirror() -> None:
    _, mirror = mirrored()
    folder = Path(new("states"))
    train(saver(folder, mirror=mirror), resume_from=latest_checkpoint(mirror, cache=folder), num_epochs=3)


def fetch_into_other_run(own_mirror: bool = False, empty: bool = False) -> None:
    _, mirror = mirrored()
    other, mirror_of_other = mirrored()
    latest_checkpoint(mirror_of_other if own_mirror else mirror, cache=new("cache") if empty else other)


def below_a_file() -> str:
    Path("file").write_text("mine")
    return "file/inside"


def mirror_below_a_file(mended: bool = False) -> None:
    address = below_a_file()
    if mended:
        Path("file").unlink()
    saved(mirror=address)


def export_below_a_file(mended: bool = False) -> None:
    path = Path(below_a_file())
    if mended:
        Path("file").unlink()
    tiny_trainer().save_checkpoint(path)


class Keeps(TrainerCallback):
    """Has a state of its own."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def keep(value: Any) -> None:
    train(Keeps(value), saver(new("states")))


def resume_with(size: int) -> None:
    # After the second of four updates of an epoch.
    train(resume_from=states_in(saved())[0], data=tiny_data(size))


def new_run_from_export() -> None:
    path = exported()
    trainer = tiny_trainer()
    trainer.load_checkpoint(path)
    train(trainer=trainer, data=tiny_data(12))


def save_to(path: str | Path) -> None:
    train().save_training_state(path)


def taken() -> Path:
    path = Path(new("taken"))
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    return path


def empty() -> Path:
    path = Path(new("empty"))
    path.mkdir()
    return path


def sparse() -> nn.Module:
    """A model with a sparse tensor, which safetensors does not know."""
    model = nn.Linear(5, 2).double()
    model.register_buffer("mask", torch.eye(2).to_sparse())
    return model


def compare_after(*counts: int) -> None:
    folders = []
    for count in counts:
        folders.append(new("run"))
        train(SaveTrainingStateCallback(folders[-1], save_every_n_updates=count), max_num_train_steps=count)
    compare_runs(*folders)


def compare_with(path: Any) -> None:
    compare_runs(path, saved())


ROWS: tuple[Row, ...] = (
    Row(
        "none in common, so nothing can be compared. Save both runs after the same updates.",
        lambda: compare_after(3, 4),
        (lambda: compare_after(3, 3),),
    ),
    Row(
        "which holds no complete training state. Pass a training state, or the folder in which ",
        lambda: compare_with(empty()),
        (lambda: compare_with(states_in(saved())[0]), lambda: compare_with(saved())),
    ),
    Row(
        "' is a folder, but an export is a file. Use train(..., resume_from='{}') to resume.",
        lambda: load(states_in(saved())[-1]),
        (lambda: train(resume_from=states_in(saved())[-1]),),
    ),
    Row(
        "its content is not what was written, since its digest differs. Use another file.",
        lambda: load(edited()),
        (lambda: load(exported()),),
    ),
    Row(
        "' is damaged: its metadata is {}. Use another file.",
        lambda: load(with_metadata("[1]")),
        (lambda: load(exported(".safetensors")),),
    ),
    Row(
        "{} of save_checkpoint. Use another file.",
        lambda: load(without_model()),
        (lambda: load(exported()),),
    ),
    Row(
        ", but the mirror has states of the run {}. Pass an empty folder as cache, or the mirror of that run.",
        fetch_into_other_run,
        (lambda: fetch_into_other_run(empty=True), lambda: fetch_into_other_run(own_mirror=True)),
    ),
    Row(
        "'{}' {}: {}: {}.{}",
        lambda: load(cut_off()),
        (lambda: load(exported()),),
        says="could not be read; use another checkpoint: RuntimeError",
    ),
    Row(
        "'{}' {}: {}: {}.{}",
        export_below_a_file,
        (lambda: export_below_a_file(mended=True), exported),
        says="Save to another place, or make room there and let this process write.",
    ),
    Row(
        ", and none of them can be used: {} To start afresh, move them away or delete them",
        lambda: latest_checkpoint(damaged()),
        (start_afresh, lambda: saved()),
    ),
    Row(
        "'{}' {}. {}",
        lambda: train(resume_from="nowhere"),
        (lambda: train(resume_from=states_in(saved())[0]), lambda: train(resume_from=None)),
        says="Pass the folder of a complete training state, or None to start afresh.",
    ),
    Row(
        "'{}' {}. {}",
        lambda: train(resume_from=saved()),
        (lambda: train(resume_from=latest_checkpoint(saved())),),
        says="/update_00000008'?",
    ),
    Row(
        "' could not be listed: {}: {}. Make it readable, or use another folder.",
        lambda: latest_checkpoint(looping()),
        (mend_loop, lambda: latest_checkpoint(saved())),
    ),
    Row(
        "latest_checkpoint would choose what was given up. Remove it, or save to another folder.",
        go_on_from_middle,
        (
            lambda: go_on_from_middle(lambda later: [shutil.rmtree(state) for state in later]),
            lambda: go_on_from_middle(save_dir=new("states")),
        ),
    ),
    Row(
        "but this is the run {}. Choose another folder, delete '{}' to start again, or let ",
        lambda: run_again(saved()),
        (
            lambda: run_again(Path(new("states"))),
            delete_and_run_again,
            lambda: run_again(saved(), if_other_run="set_aside"),
            continue_run,
        ),
    ),
    Row(
        "or reset_run_history=False to a second call of train.",
        call_again,
        (lambda: call_again(reset_run_history=False),),
    ),
    Row(
        "from which states are downloaded before they are loaded. Pass {}('{}', cache='checkpoints')",
        lambda: latest_checkpoint("memory://states"),
        (
            lambda: latest_checkpoint("memory://states", cache="checkpoints"),
            lambda: best_checkpoint("memory://states", cache="checkpoints"),
        ),
    ),
    Row(
        "{} Correct the address, or pass another one.",
        lambda: saved(mirror="zip://run::file://missing.zip"),
        (lambda: saved(mirror="memory://other"),),
    ),
    Row(
        "where nothing can be written. {} Correct the address, or let this machine write there.",
        mirror_below_a_file,
        (lambda: mirror_below_a_file(mended=True), lambda: saved(mirror=new("mirror"))),
    ),
    Row(
        "Pass another mirror, remove those states, let if_other_run='set_aside' move them out of the way",
        mirror_again,
        (
            lambda: mirror_again(mirror=new("mirror")),
            lambda: mirror_again(remove=True),
            lambda: mirror_again(if_other_run="set_aside"),
            continue_from_mirror,
        ),
    ),
    Row(
        "latest_checkpoint would choose what was given up. Remove it there, pass another mirror, or continue ",
        go_on_beside_mirror,
        (
            lambda: go_on_beside_mirror(remove=True),
            lambda: go_on_beside_mirror(other_mirror=new("mirror")),
            lambda: go_on_beside_mirror(from_mirror=True),
        ),
    ),
    Row(
        " cannot be saved: {} is a {}. Keep tensors, numbers, strings, lists and dicts in state_dict().",
        lambda: keep(open),
        (lambda: keep({"a": [torch.ones(2), 1, 0.5, "b"]}),),
    ),
    Row(
        "of an epoch. Resume with the same data, or start a new run from an export with load_checkpoint.",
        lambda: resume_with(12),
        (lambda: resume_with(16), new_run_from_export),
    ),
    Row(
        "is no dense tensor of a type that safetensors knows, but {}. Save to a .pt file",
        lambda: tiny_trainer(model=sparse()).save_checkpoint("sparse.safetensors"),
        (lambda: tiny_trainer(model=sparse()).save_checkpoint("sparse.pt"),),
    ),
    Row(
        "' is a name for what a crash leaves behind. Choose another one.",
        lambda: save_to("state.incomplete"),
        (lambda: save_to("state"),),
    ),
    Row(
        "' is no folder of a training state. Choose an empty or a new folder.",
        lambda: save_to(taken()),
        (lambda: save_to(empty()), lambda: save_to(new("state"))),
    ),
    Row(
        "itself, but must be another place. Pass a folder of another disk, or the address of a store.",
        lambda: saver("states", mirror="states"),
        (lambda: saved(mirror="disk/states"), lambda: saved(mirror="memory://states")),
    ),
    Row(
        'Install what fsspec needs for {}; for S3: pip install "accel-core[s3]". Or pass another address.',
        lambda: saver("states", mirror="nosuch://bucket"),
        # Saving to S3 itself is tested with a server of its own, in test_states_in_a_store.py.
        (lambda: saver("states", mirror="s3://bucket/run1"), lambda: saved(mirror="memory://run1")),
    ),
    Row(
        "{}: {}: {}.",
        lambda: latest_checkpoint("zip://run::file://missing.zip", cache="cache"),
        (lambda: latest_checkpoint(mirrored()[1], cache=new("cache")),),
        says="could not be opened; pass the address of a mirror",
    ),
    Row(
        "' does not exist. {}",
        lambda: verify_checkpoint("nowhere"),
        (
            lambda: verify_checkpoint(states_in(saved())[0]),
            lambda: verify_checkpoint(exported()),
            lambda: verify_checkpoint(saved()),
        ),
    ),
)

CHECKS: tuple[Row, ...] = (
    Row(
        "Pass a training state, or the folder of a run.",
        lambda: compare_with(3),
        (lambda: compare_with(states_in(saved())[0]), lambda: compare_with(saved())),
    ),
    Row(
        "Pass a folder of this machine, such as 'checkpoints'.",
        lambda: latest_checkpoint("memory://states", cache="s3://bucket"),
        (lambda: latest_checkpoint("memory://states", cache="checkpoints"),),
    ),
    Row(
        "Pass a training state, an export, or a folder of them.",
        lambda: verify_checkpoint(3),  # type: ignore[arg-type]
        (
            lambda: verify_checkpoint(states_in(saved())[0]),
            lambda: verify_checkpoint(exported()),
            lambda: verify_checkpoint(saved()),
        ),
    ),
)
FACTS = {
    "The text does not end with a digest.": "no call reaches it: accel gives the text itself",
    "'{}' is damaged; use another checkpoint: {}.": "test_damaged_states.py flips each bit, and goes on from another",
    "Two tensors of a state are called {}.": "no call reaches it: parameters that are called alike have numbers",
    "{} {}": "joins what the errors of single processes say",
    "On several machines it has to be on a disk that they share.": "test_layout_two_machines.py has machines",
    "' has no tensor {} in its files; use another checkpoint.": "test_sharded_states.py, on two processes",
    "The processes {} have not written their parts to '{}'.": "another error ends the run, and the state before stands",
}
PARTS = ("accel-core/src/accel_core/state", "accel-core/src/accel_core/verify")


def test_every_error_about_states_has_a_row() -> None:
    check_every_error_is_known(*PARTS, rows=(row.text for row in ROWS), facts=FACTS)
    check_every_way_out_is_known(*PARTS, rows=(row.text for row in CHECKS))


@pytest.mark.parametrize("row", [*ROWS, *CHECKS], ids=name_of)
def test_what_an_error_about_states_says_instead_works(row: Row) -> None:
    make_mistake_and_ways_out(row)
