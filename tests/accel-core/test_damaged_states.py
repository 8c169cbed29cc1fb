"""States and exports that are damaged, edited or of something else: an error that names the file, and nothing changed."""

import functools
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR

from accel_core import CheckpointError, Trainer, TrainerCallback, verify_checkpoint
from accel_core.run.run_progress import RunProgress
from states import STATE_FILE, edit, reseal
from tiny import tiny_data, tiny_network, tiny_trainer, weights_of

DATA = tiny_data()
PROCESS_KEYS = ["random", "train_loss", "train_logs", "callbacks", "trainer", "data"]


class Counter(TrainerCallback):
    """Has a state."""

    def state_dict(self) -> dict[str, Any]:
        return {"number": 1}


def adam_trainer() -> Trainer:
    model = tiny_network()
    return Trainer(
        model, torch.nn.functional.cross_entropy, torch.optim.AdamW(model.parameters()), callbacks=(), seed=3
    )


@pytest.fixture
def state(tmp_path: Path) -> Path:
    trainer = adam_trainer()
    trainer.train(DATA, 1, create_scheduler_fn=functools.partial(ExponentialLR, gamma=0.5))
    trainer.save_training_state(tmp_path / "state")
    return tmp_path / "state"


def exchange(state: Path, name: str, value: Any) -> None:
    """Put another value into a file, with its right size and digest."""
    torch.save(value, state / name)
    reseal(state, name)


def assert_refused(state: Path, name: str) -> None:
    """The error names the file, and whoever catches it and starts afresh trains as if nothing had been tried."""
    trainer, fresh = adam_trainer(), adam_trainer()
    with pytest.raises(CheckpointError, match=rf"(?s){state}.*{name}.*\.$"):
        trainer.train(
            DATA,
            2,
            create_scheduler_fn=functools.partial(OneCycleLR, max_lr=1, total_steps=99),
            resume_from=state,
        )
    for each in (trainer, fresh):
        each.train(DATA, 1, reset_run_history=False)
    assert torch.equal(weights_of(trainer), weights_of(fresh))
    assert trainer.run_history.to_records() == fresh.run_history.to_records()


@pytest.mark.parametrize(
    "path", [["run_id"], ["launched", "num_processes"], ["run_history", "epoch"]], ids=str
)
@pytest.mark.parametrize("value", [None, [1]])
def test_a_value_of_the_json_that_is_missing_or_of_another_type_is_told(
    path: list[str], value: Any, state: Path
) -> None:
    edit(state, *path, value=value)
    assert_refused(state, STATE_FILE)


@pytest.mark.parametrize("key", [*vars(RunProgress()), "unheard_of"])
def test_progress_is_read_whole_or_not_at_all(key: str, state: Path) -> None:
    edit(state, "run_progress", key, value=1 if key == "unheard_of" else None)
    assert_refused(state, STATE_FILE)


@pytest.mark.parametrize("key", PROCESS_KEYS)
def test_a_key_missing_in_the_file_of_a_process_is_told(key: str, state: Path) -> None:
    content = torch.load(state / "process_00000.pt", weights_only=True)
    del content[key]
    exchange(state, "process_00000.pt", content)
    assert_refused(state, f"process_00000.pt' .*damaged.*'{key}' is missing")


@pytest.mark.parametrize("name", ["process_00000.pt", "model_extra.pt", "optimizer.pt", "scheduler.pt"])
def test_a_file_that_holds_something_else_is_told(name: str, state: Path) -> None:
    exchange(state, name, [1, 2])
    assert_refused(state, name)


@pytest.mark.parametrize("name", ["process_00000.pt", "model.safetensors", "optimizer.pt", "scheduler.pt"])
def test_zeros_in_place_of_a_file_are_told_without_advice_to_trust_it(name: str, state: Path) -> None:
    (state / name).write_bytes(bytes((state / name).stat().st_size))
    assert_refused(state, name)
    with pytest.raises(CheckpointError) as caught:
        adam_trainer().train(
            DATA, 2, create_scheduler_fn=functools.partial(ExponentialLR, gamma=0.5), resume_from=state
        )
    assert "weights_only" not in str(caught.value)


def test_a_callback_without_a_saved_state_is_told(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = adam_trainer()
    trainer.callbacks.add_callback(Counter())
    trainer.train(DATA, 2, resume_from=state)
    assert re.search(r"\['Counter'\].*start from scratch.*nothing", capsys.readouterr().out)


@pytest.mark.parametrize("content", [{"model_state_dict": 3}, {"optimizer_state_dict": {"a": 1}}])
def test_an_export_that_holds_something_else_is_told_and_changes_nothing(
    content: dict[str, Any], tmp_path: Path
) -> None:
    torch.save({"model_state_dict": torch.nn.Linear(5, 2).state_dict(), **content}, tmp_path / "export.pt")
    model = torch.nn.Linear(5, 2)
    trainer = tiny_trainer(model=model)
    before = weights_of(trainer).clone()
    with pytest.raises(CheckpointError, match=r"export\.pt"):
        trainer.load_checkpoint(tmp_path / "export.pt")
    assert torch.equal(weights_of(trainer), before)


def test_run_config_says_when_it_is_known() -> None:
    trainer = tiny_trainer()
    with pytest.raises(AttributeError, match=r"run_config .*first run.*Call train or evaluate"):
        trainer.run_config  # noqa: B018
    assert getattr(trainer, "run_config", None) is None
    trainer.evaluate(DATA)
    assert trainer.run_config.num_processes == 1


def test_a_trainer_is_pickled_after_a_run_and_saves_and_trains_on(tmp_path: Path) -> None:
    trainer = tiny_trainer()
    trainer.train(DATA, 1)
    copied = pickle.loads(pickle.dumps(trainer))
    for name, each in (("whole", trainer), ("copied", copied)):
        each.save_training_state(tmp_path / name)
        assert verify_checkpoint(tmp_path / name) == {tmp_path / name: None}
        each.train(DATA, 1)
    assert torch.equal(weights_of(trainer), weights_of(copied))


def test_an_optimizer_that_wants_a_closure_is_told_how_to_get_it() -> None:
    model = tiny_network()
    trainer = Trainer(
        model, torch.nn.functional.cross_entropy, torch.optim.LBFGS(model.parameters()), callbacks=()
    )
    with pytest.raises(
        TypeError, match=r"(?s)closure.*Override optimizer_step.*self\.optimizer\.step\(closure\)"
    ):
        trainer.train(DATA, 1)
