"""What is saved before and after each decay, and that a run goes on from there."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel_core import AccelWarning, CheckpointError, ConfigurationError, Trainer, TrainerCallback
from accel_core.state.folder import complete_checkpoints
from accel_integrations.schedulers import CosineLrScheduler, WSDCheckpointCallback, WSDLrScheduler
from case_runner import run_as_script
from tiny import Rates, SaveAt, assert_same_tensors, tiny_data, tiny_network


class Remember(Rates):
    """The weights and the rate of each update."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        state = trainer.get_model().state_dict()
        self.weights[trainer.run_progress.updates_completed] = {
            name: value.clone() for name, value in state.items()
        }


def create(*callbacks: Any) -> Trainer:
    model = tiny_network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Trainer(model, nn.functional.cross_entropy, optimizer, callbacks, seed=3)


def train(
    trainer: Trainer, epochs: int = 4, batch_size: int = 4, schedule: Any = None, **kwargs: Any
) -> Trainer:
    """Ten updates an epoch on one process."""
    schedule = {"num_warmup_epochs": 0.5} if schedule is None else schedule
    create_scheduler_fn = WSDLrScheduler.create_scheduler_fn(**schedule)
    kwargs = {"create_scheduler_fn": create_scheduler_fn, **kwargs}
    trainer.train(tiny_data(40), num_epochs=epochs, per_device_batch_size=batch_size, **kwargs)
    return trainer


def names_in(folder: Path) -> set[str]:
    """What the schedule has saved, without the run card."""
    return {path.name for path in folder.iterdir()} - {"run_card.json"}


def test_the_run_card_names_the_states(tmp_path: Path) -> None:
    trainer = train(create(WSDCheckpointCallback(tmp_path)), schedule=TWICE)
    card = json.loads((tmp_path / "run_card.json").read_text())
    assert card["run_id"] == trainer.run_id
    states = {name: state["update"] for name, state in card["states"].items()}
    assert states == {"checkpoint_18_wsd_pre_decay": 18, "checkpoint_38_wsd_pre_decay": 38}


TWICE = {"num_warmup_epochs": 0.5, "num_checkpoints": 2}


def test_each_decay_has_a_state_before_it_and_an_export_after_it(tmp_path: Path) -> None:
    train(create(remember := Remember(), WSDCheckpointCallback(tmp_path)), schedule=TWICE)
    states = ["checkpoint_18_wsd_pre_decay", "checkpoint_38_wsd_pre_decay"]
    assert names_in(tmp_path) == {
        *states,
        "checkpoint_20_wsd_post_decay.pt",
        "checkpoint_40_wsd_post_decay.pt",
    }
    found = complete_checkpoints(tmp_path)
    assert [(path.name, state["run_progress"]["updates_completed"]) for path, state in found.items()] == list(
        zip(states, (18, 38), strict=True)
    )
    for update in (20, 40):
        content = torch.load(tmp_path / f"checkpoint_{update}_wsd_post_decay.pt")
        assert_same_tensors(content["model_state_dict"], remember.weights[update])
        assert content["scheduler_state_dict"]["num_updates"] == update


def test_exports_hold_what_is_asked_for(tmp_path: Path) -> None:
    train(create(WSDCheckpointCallback(tmp_path, save_optimizer=False, save_scheduler=False)), epochs=1)
    keys = torch.load(tmp_path / "checkpoint_10_wsd_post_decay.pt").keys()
    assert keys == {"model_state_dict", "accel_origin"}


def test_a_run_without_decay_has_both_at_its_end(tmp_path: Path) -> None:
    train(create(WSDCheckpointCallback(tmp_path)), epochs=1, schedule={"decay_phase_ratio": 0.0})
    assert names_in(tmp_path) == {"checkpoint_10_wsd_pre_decay", "checkpoint_10_wsd_post_decay.pt"}


def test_a_run_is_continued_from_before_its_decay_as_if_it_had_been_longer(tmp_path: Path) -> None:
    schedule = {"num_warmup_epochs": 0.5, "decay_phase_ratio": 0.2}
    train(create(WSDCheckpointCallback(tmp_path)), epochs=2, schedule=schedule)
    longer = train(create(whole := Remember()), epochs=6, schedule=schedule)
    assert longer.scheduler.get_decay_info()[0]["pre_decay_step"] == 48
    trainer = create(continued := Remember(), WSDCheckpointCallback(tmp_path))
    folder = tmp_path / "checkpoint_16_wsd_pre_decay"
    train(trainer, 6, schedule={**schedule, "is_continuation_from_checkpoint": True}, resume_from=folder)
    assert trainer.scheduler.get_decay_info()[0]["pre_decay_step"] == 51
    for update in range(17, 49):
        assert_same_tensors(continued.weights[update], whole.weights[update])
    assert set(continued.of_first_group[:35]) == {0.01}
    assert continued.of_first_group[36] < 0.01
    assert {"checkpoint_51_wsd_pre_decay", "checkpoint_60_wsd_post_decay.pt"} <= names_in(tmp_path)


@pytest.mark.parametrize("update", [10, 18, 19, 25])
def test_a_resumed_run_saves_the_same(tmp_path: Path, update: int) -> None:
    train(
        create(SaveAt(update, tmp_path / "state"), WSDCheckpointCallback(tmp_path / "whole")), schedule=TWICE
    )
    folder = tmp_path / "resumed"
    train(create(WSDCheckpointCallback(folder)), schedule=TWICE, resume_from=tmp_path / "state")
    steps = {
        "checkpoint_18_wsd_pre_decay": 18,
        "checkpoint_20_wsd_post_decay.pt": 20,
        "checkpoint_38_wsd_pre_decay": 38,
    }
    steps["checkpoint_40_wsd_post_decay.pt"] = 40
    assert names_in(folder) == {name for name, step in steps.items() if step > update}
    found, expected = (
        torch.load(tmp_path / name / "checkpoint_40_wsd_post_decay.pt") for name in ("resumed", "whole")
    )
    assert_same_tensors(found["model_state_dict"], expected["model_state_dict"])


def test_a_new_run_begins_with_the_weights_and_the_optimizer_of_an_export_and_a_schedule_of_its_own(
    tmp_path: Path,
) -> None:
    first = train(create(WSDCheckpointCallback(tmp_path / "first")), epochs=2)
    assert first.optimizer.param_groups[0]["lr"] < 1e-4
    begun = []

    class Beginning(TrainerCallback):
        def on_train_epoch_start(self, trainer: Trainer) -> None:
            if not begun:
                weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
                state = next(iter(trainer.optimizer.state.values()))
                begun.append((weights, float(state["step"]), trainer.scheduler.get_current_step()))

    path = tmp_path / "first/checkpoint_20_wsd_post_decay.pt"
    trainer = create(
        Beginning(),
        remember := Remember(),
        WSDCheckpointCallback(tmp_path / "second", initial_checkpoint=path),
    )
    train(trainer, epochs=1, schedule={"is_continuation_from_checkpoint": True})
    assert_same_tensors(begun[0][0], torch.load(path)["model_state_dict"])
    assert begun[0][1:] == (20.0, 0)
    assert remember.of_first_group == [0.01] * 10
    assert trainer.run_progress.updates_completed == 10


def test_a_resumed_run_does_not_begin_again_with_the_initial_weights(tmp_path: Path) -> None:
    train(create(WSDCheckpointCallback(tmp_path / "first")), epochs=1)
    arguments = {"initial_checkpoint": tmp_path / "first/checkpoint_10_wsd_post_decay.pt"}
    whole = train(
        create(SaveAt(13, tmp_path / "state"), WSDCheckpointCallback(tmp_path / "second", **arguments)),
        epochs=2,
    )
    resumed = create(WSDCheckpointCallback(tmp_path / "third", **arguments))
    train(resumed, epochs=2, resume_from=tmp_path / "state")
    assert_same_tensors(resumed.model.state_dict(), whole.model.state_dict())


def test_a_training_state_as_initial_checkpoint_raises_with_how_to_continue_it(tmp_path: Path) -> None:
    train(create(WSDCheckpointCallback(tmp_path)), epochs=1)
    trainer = create(
        WSDCheckpointCallback(tmp_path / "other", initial_checkpoint=tmp_path / "checkpoint_9_wsd_pre_decay")
    )
    with pytest.raises(
        CheckpointError, match=r"checkpoint_9_wsd_pre_decay' is a folder.*train\(\.\.\., resume_from="
    ):
        train(trainer, epochs=1)


@pytest.mark.parametrize(
    ("create_scheduler_fn", "found"),
    [(None, "None"), (CosineLrScheduler.create_scheduler_fn(), "a CosineLrScheduler")],
)
def test_another_schedule_is_reported_before_training(
    tmp_path: Path, create_scheduler_fn: Any, found: str
) -> None:
    with pytest.raises(
        ConfigurationError,
        match=rf"WSDCheckpointCallback.* {found}\b.*create_scheduler_fn=WSDLrScheduler\.create_scheduler_fn\(\)",
    ):
        train(create(WSDCheckpointCallback(tmp_path)), create_scheduler_fn=create_scheduler_fn)


def test_the_folder_of_another_run_is_reported_before_training(tmp_path: Path) -> None:
    train(create(WSDCheckpointCallback(tmp_path)), epochs=1)
    trainer = create(remember := Remember(), WSDCheckpointCallback(tmp_path))
    with pytest.raises(CheckpointError, match=r"the run '\w+'.* the run '\w+'.*another folder.*resume_from="):
        train(trainer, epochs=1)
    assert remember.weights == {}


def test_weights_that_are_not_finite_are_reported_and_not_saved(tmp_path: Path) -> None:
    class Poisoning(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            with torch.no_grad():
                trainer.model[0].weight.fill_(math.inf)

    with pytest.warns(AccelWarning, match="is not finite"):
        train(create(Poisoning(), WSDCheckpointCallback(tmp_path)), epochs=1)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- processes


def continue_for_longer(batch_size: int) -> dict[str, Any]:
    """Five updates an epoch, on two processes and on one with twice the batch size."""
    folder = Path(FOLDER) / f"{batch_size}"
    train(create(WSDCheckpointCallback(folder)), epochs=2, batch_size=batch_size)
    trainer = create(remember := Remember(), WSDCheckpointCallback(folder))
    arguments = {
        "resume_from": folder / "checkpoint_9_wsd_pre_decay",
        "schedule": {"is_continuation_from_checkpoint": True},
    }
    train(trainer, epochs=4, batch_size=batch_size, **arguments)
    exported = torch.load(folder / "checkpoint_20_wsd_post_decay.pt")["model_state_dict"]
    return {
        "rates": remember.of_first_group,
        "exported": dict(exported),
        "own": dict(trainer.model.state_dict()),
        "names": names_in(folder),
    }


FOLDER = ""
CASES = {"continue": continue_for_longer}


@pytest.mark.slow
def test_two_processes_save_and_continue_like_one(outcome: Any, tmp_path: Path) -> None:
    global FOLDER
    FOLDER = str(tmp_path)
    alone = outcome.alone("continue")
    for result in outcome.of("continue"):
        assert result["rates"] == alone["rates"]
        assert result["names"] == alone["names"]
        assert_same_tensors(result["exported"], result["own"])
        for name, value in alone["exported"].items():
            assert torch.allclose(result["exported"][name], value, rtol=1e-9, atol=1e-12), name


if __name__ == "__main__":
    import sys

    FOLDER = sys.argv[2]
    run_as_script(CASES)
