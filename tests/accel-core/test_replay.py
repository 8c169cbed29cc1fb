"""A past update can be had again, to the bit, without having recorded anything."""

import copy
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel_core import CheckpointError, ConfigurationError, Trainer, TrainerCallback
from launching import launch
from replaying import (
    ONE_CYCLE,
    Numbered,
    Recording,
    assert_equals_recording,
    averaging,
    numbered_trainer,
    saving,
)
from tiny import Stream, tiny_data, tiny_trainer

TRIALS = int(os.environ.get("ACCEL_REPLAY_TRIALS", "8"))


@settings(max_examples=TRIALS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    accumulation=st.integers(1, 3),
    batch_size=st.integers(2, 9),
    every=st.integers(2, 9),
    has_schedule=st.booleans(),
    has_average=st.booleans(),
    stages=st.integers(1, 2),
    data=st.data(),
)
def test_a_replay_equals_what_was_recorded(
    accumulation, batch_size, every, has_schedule, has_average, stages, data
):
    """Batch norm is left out, since the last batch of an epoch may have one sample."""
    arguments = {
        "num_epochs": 2,
        "per_device_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "create_scheduler_fn": ONE_CYCLE if has_schedule else None,
        "train_dataloader_kwargs": {"num_workers": 0},
        "eval_dataset": Numbered(5),
    }

    def parts():
        return [averaging()] if has_average else []

    with tempfile.TemporaryDirectory() as folder:
        recording = Recording()
        trainer = numbered_trainer([*parts(), recording, saving(Path(folder), every)], norm=False)
        for stage in range(stages):
            trainer.train(Numbered(), **arguments, reset_run_history=stage == 0)
        fresh = numbered_trainer([*parts(), saving(Path(folder), every)], norm=False)
        for _ in range(2):
            update = data.draw(st.sampled_from(sorted(recording.updates)))
            result = fresh.replay(Numbered(), update=update, folder=folder, **arguments)
            assert_equals_recording(result, [recording.updates[update]])


@pytest.mark.slow
def test_samples_that_are_seeded_are_replayed_with_workers(tmp_path):
    """They draw the same numbers in whatever worker they are read."""
    arguments = {
        "num_epochs": 1,
        "train_dataloader_kwargs": {"num_workers": 2},
        "seed_each_sample": True,
    }
    recording = Recording()
    numbered_trainer([recording, saving(tmp_path, 2)], norm=False).train(Numbered(), **arguments)
    result = numbered_trainer(norm=False).replay(Numbered(), update=4, folder=tmp_path, **arguments)
    assert_equals_recording(result, [recording.updates[4]])


SCRIPT = """
    import sys
    from pathlib import Path
    import torch
    from replaying import ONE_CYCLE, Numbered, Recording, numbered_trainer, saving
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    recording = Recording()
    trainer = numbered_trainer([recording, saving(folder / "states", 4)])
    trainer.train(Numbered(), 2, Numbered(7), per_device_batch_size=5, gradient_accumulation_steps=steps,
                  create_scheduler_fn=ONE_CYCLE)
    assert trainer.data_group.size == 2
    torch.save(recording.updates, folder / f"seen_{trainer.data_group.index}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_one_process_replays_what_two_did(tmp_path, steps):
    """With dropout, noise in the data, and batch norm, whose buffers DDP shares: to the bit."""
    launch(SCRIPT, args=[tmp_path, steps], env={"PYTHONPATH": str(Path(__file__).parents[1])})
    seen = [torch.load(tmp_path / f"seen_{index}.pt", weights_only=False) for index in (0, 1)]
    trainer = numbered_trainer()
    for update in sorted(seen[0])[:: 2 if steps == 1 else 1]:
        result = trainer.replay(
            Numbered(),
            2,
            update=update,
            folder=tmp_path / "states",
            eval_dataset=Numbered(7),
            per_device_batch_size=5,
            gradient_accumulation_steps=steps,
            create_scheduler_fn=ONE_CYCLE,
        )
        assert_equals_recording(result, [each[update] for each in seen])
        assert result.messages == []


@pytest.fixture
def folder(tmp_path):
    """States of a run of eight updates, after each third."""
    numbered_trainer([saving(tmp_path, 3)]).train(Numbered(), 2, per_device_batch_size=11)
    return tmp_path


def replay(trainer, folder, update=5, **arguments):
    given = {"num_epochs": 2, "per_device_batch_size": 11, **arguments}
    return trainer.replay(Numbered(), update=update, folder=folder, **given)


class Counting(TrainerCallback):
    """Counts updates, in place."""

    def __init__(self):
        self.seen = {"updates": 0}

    def on_optimizer_step_end(self, trainer):
        self.seen["updates"] += 1

    def state_dict(self):
        return dict(self.seen)

    def load_state_dict(self, state):
        self.seen.update(state)


def test_nothing_changes_by_a_replay(folder):
    counting = Counting()
    trainer = numbered_trainer([counting])
    trainer.train(Numbered(), 1, per_device_batch_size=11)
    weights = copy.deepcopy(trainer.model.state_dict())
    history, progress = trainer.run_history.to_records(), copy.copy(trainer.run_progress)
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    random_state = torch.get_rng_state()
    assert replay(trainer, folder).update == 5
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files
    assert (trainer.run_history.to_records(), trainer.run_progress) == (history, progress)
    assert counting.seen == {"updates": 4}
    assert all(torch.equal(weights[name], value) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_own_callbacks_run_as_copies_with_their_state_and_further_ones_only_look(tmp_path):
    numbered_trainer([Counting(), saving(tmp_path, 3)]).train(Numbered(), 2, per_device_batch_size=11)

    class Looking(TrainerCallback):
        seen = ()

        def on_optimizer_step_start(self, trainer):
            own = next(each for each in trainer.callbacks if isinstance(each, Counting))
            self.seen = (*self.seen, own.seen["updates"])

    looking = Looking()
    replay(numbered_trainer([Counting()]), tmp_path, callbacks=[looking])
    assert looking.seen == (3, 4)


def test_a_callback_that_does_not_run_in_replay_is_not_called(folder):
    class Refusing(TrainerCallback):
        runs_in_replay = False

        def on_training_run_start(self, trainer):
            raise AssertionError("was called")

    assert replay(numbered_trainer([Refusing]), folder).update == 5


def test_layers_are_kept_in_the_order_of_their_calls(folder):
    result = replay(numbered_trainer(), folder, layers=True)
    assert list(result.layers) == ["0", "1", "2", "3", "4"]
    assert torch.equal(result.layers["4"][0], result.model_outputs)
    assert replay(numbered_trainer(), folder).layers == {}


def test_the_model_of_the_result_has_the_weights_before_the_update(folder):
    before, after = (replay(numbered_trainer(), folder, update) for update in (4, 5))
    assert before.folder == folder / "update_00000003"
    assert before.learning_rates == [0.01]
    state = torch.load(folder / "update_00000003" / "optimizer.pt", weights_only=True)
    assert state["state"][0]["step"] == 3
    assert any(not torch.equal(before.weights[name], after.weights[name]) for name in before.weights)


class TestRefusals:
    def test_no_state(self, tmp_path):
        with pytest.raises(CheckpointError, match="holds no complete training state"):
            replay(numbered_trainer(), tmp_path)

    def test_an_update_after_the_end(self, folder):
        with pytest.raises(ConfigurationError, match="the run ends after update 8"):
            replay(numbered_trainer(), folder, 9)

    def test_other_batches(self, folder):
        with pytest.raises(ConfigurationError, match="batch_size is 7, but was 11"):
            replay(numbered_trainer(), folder, per_device_batch_size=7)

    def test_other_accumulation(self, folder):
        with pytest.raises(ConfigurationError, match="gradient_accumulation_steps is 2, but was 1"):
            replay(numbered_trainer(), folder, gradient_accumulation_steps=2)

    def test_other_weights_at_the_beginning(self, folder):
        trainer = numbered_trainer()
        trainer.train(Numbered(), 1)
        with pytest.raises(CheckpointError, match="its model has other weights"):
            replay(trainer, folder, 2)

    def test_another_seed_at_the_beginning(self, folder):
        with pytest.raises(CheckpointError, match="its random state is another one"):
            replay(numbered_trainer(seed=4), folder, 2)

    def test_what_replay_chooses_itself(self, folder):
        with pytest.raises(ConfigurationError, match="replay was given resume_from"):
            replay(numbered_trainer(), folder, resume_from=folder)

    def test_a_callback_that_cannot_be_copied(self, folder):
        class Open(TrainerCallback):
            def __init__(self):
                self.file = Path(__file__).open()  # noqa: SIM115

        opened = Open()
        with opened.file, pytest.raises(ConfigurationError, match="Open cannot be copied"):
            replay(numbered_trainer([opened]), folder)

    def test_an_update_that_is_no_number(self, folder):
        with pytest.raises(ConfigurationError, match="update is 0, but must be at least 1"):
            replay(numbered_trainer(), folder, 0)


def test_data_without_an_index_is_replayed_without_indices(tmp_path):
    data = Stream(tiny_data())
    tiny_trainer(callbacks=[saving(tmp_path, 3)]).train(data, 1, per_device_batch_size=8)
    result = tiny_trainer().replay(data, 1, update=5, folder=tmp_path, per_device_batch_size=8)
    assert result.indices is None
    assert torch.equal(result.batch[0], tiny_data().tensors[0][32:])


def test_the_room_is_imported_only_when_it_is_used():
    finished = launch(
        """
        import sys
        import accel_core
        assert not [name for name in sys.modules if name.startswith("accel_core.replay")]
        """,
        processes=1,
    )
    assert finished.returncode == 0
    assert callable(Trainer.replay)
