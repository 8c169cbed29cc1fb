"""What earlier versions have saved is resumed and loaded by this one; `write.py` says how the files were written."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from accel_core import latest_checkpoint
from launching import launch
from past.write import NOTE, EventCounter, create_trainer, end_of, train

PAST = Path(__file__).parent / "format_1"
FOLDERS = ["one_process", "two_processes"]
STATES = ["before_evaluation", "mid_epoch"]
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[1])}


def end_that_was(folder: str) -> dict[str, Any]:
    """The end of the run that nothing had disturbed."""
    return json.loads((PAST / folder / "end.json").read_text())


def resume(state: Path, per_device_batch_size: int = 3) -> dict[str, Any]:
    """Go on to the end with a model of zeros, and return what is there."""
    trainer = create_trainer(counter := EventCounter(), is_empty=True)
    train(trainer, state, per_device_batch_size)
    return end_of(trainer, counter)


def assert_same_weights(weights: dict[str, Any], expected: dict[str, Any]) -> None:
    """Other versions of torch may round otherwise."""
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        tensors = [torch.as_tensor(one, dtype=torch.float64) for one in (weights[name], values)]
        assert torch.allclose(*tensors, rtol=0, atol=1e-6), name


def assert_same_end(end: dict[str, Any], expected: dict[str, Any]) -> None:
    """Weights and metrics but for rounding; counts, and what was recorded when, exactly."""
    assert_same_weights(end["weights"], expected["weights"])
    assert end["learning_rate"] == pytest.approx(expected["learning_rate"])
    # Counters that there were not yet are those of a single stage.
    assert end["run_progress"].items() >= expected["run_progress"].items()
    assert end["run_progress"]["order_epoch"] == expected["run_progress"]["epochs_completed"]
    assert end["run_progress"]["stage"] == 1
    values = [record["value"] for record in expected["history"]]
    assert [record["value"] for record in end["history"]] == pytest.approx(values, abs=1e-6)
    assert [{**record, "value": None} for record in end["history"]] == [
        {**record, "value": None} for record in expected["history"]
    ]
    assert end["counter"] == expected["counter"]
    assert end["num_steps"] == expected["num_steps"]


@pytest.mark.parametrize("state", STATES)
def test_a_run_on_one_process_goes_on_to_the_end_that_it_had(state: str) -> None:
    assert_same_end(resume(PAST / "one_process" / state), end_that_was("one_process"))


def test_a_run_on_two_processes_goes_on_to_the_end_that_it_had(tmp_path: Path) -> None:
    launch(Path(__file__), args=[tmp_path], env=ENVIRONMENT)
    for state in STATES:
        assert_same_end(json.loads((tmp_path / f"{state}.json").read_text()), end_that_was("two_processes"))


@pytest.mark.parametrize("state", STATES)
def test_a_run_on_two_processes_goes_on_alone_with_the_same_samples_in_each_update(state: str) -> None:
    # One process makes as many steps of six samples as the main one of two has made of three.
    assert_same_end(
        resume(PAST / "two_processes" / state, per_device_batch_size=6), end_that_was("two_processes")
    )


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("state", STATES)
def test_a_state_is_loaded_with_all_that_it_holds(folder: str, state: str) -> None:
    path, expected = PAST / folder / state, end_that_was(folder)
    trainer = create_trainer(counter := EventCounter(), is_empty=True)
    assert trainer.load_training_state(path) == NOTE
    saved = load_file(path / "model.safetensors")
    assert all(tensor.any() for tensor in saved.values())
    assert_same_weights(trainer.model.state_dict(), saved)
    assert all(entry["momentum_buffer"].any() for entry in trainer.optimizer.state_dict()["state"].values())
    progress = trainer.run_progress
    assert counter.updates == progress.updates_completed > 0
    assert counter.epochs == progress.epochs_completed == {"before_evaluation": 0, "mid_epoch": 1}[state]
    records = [record for record in expected["history"] if record["update"] <= progress.updates_completed]
    recorded = len(records) if state == "mid_epoch" else 2
    assert trainer.run_history.to_records() == records[:recorded]
    assert trainer.num_steps > 0


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_both_exports_hold_the_weights_of_the_end(folder: str, name: str) -> None:
    trainer = create_trainer(is_empty=True)
    content = trainer.load_checkpoint(PAST / folder / name)
    assert_same_weights(trainer.model.state_dict(), end_that_was(folder)["weights"])
    if name == "model.pt":
        assert {key: content[key] for key in NOTE} == NOTE
        assert all(
            entry["momentum_buffer"].any() for entry in trainer.optimizer.state_dict()["state"].values()
        )
        assert (
            content["scheduler_state_dict"]["last_epoch"]
            == end_that_was(folder)["run_progress"]["updates_completed"]
        )
    else:
        assert set(content) == {"model_state_dict"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_newest_state_is_found(folder: str) -> None:
    assert latest_checkpoint(PAST / folder) == PAST / folder / "mid_epoch"


@pytest.mark.slow
def test_a_run_of_version_1_of_fsdp_goes_on_with_fsdp2_to_the_end_that_it_had(tmp_path: Path) -> None:
    past = Path(__file__).parent
    launch(past / "fsdp1.py", args=[2, tmp_path, past / "fsdp1" / "mid_epoch"], env=ENVIRONMENT)
    expected = json.loads((past / "fsdp1" / "end.json").read_text())
    assert_same_end(json.loads((tmp_path / "end.json").read_text()), expected)


def main(folder: Path) -> None:
    """What two processes do."""
    for state in STATES:
        trainer = create_trainer(counter := EventCounter(), is_empty=True)
        assert trainer.accelerator.num_processes == 2
        train(trainer, PAST / "two_processes" / state)
        if trainer.is_main_process:
            (folder / f"{state}.json").write_text(json.dumps(end_of(trainer, counter)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
