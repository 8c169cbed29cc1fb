"""A past update can be had again, to the bit, without having recorded anything."""

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel_core import CheckpointError, ConfigurationError, Trainer, TrainerCallback
from accel_core.extending import files
from accel_core.processes.group import DataGroup
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
from tiny import Stream, linear_of_constants, tiny_data, tiny_trainer

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


def edit_states(folder, edit):
    """Let `edit` change what each state of the folder says."""
    for path in folder.glob("update_*/trainer_state.json"):
        state = json.loads(path.read_text())
        edit(state)
        state.pop("sha256")
        files.write_json(path, state, is_sealed=True)


class TestTwoProcessesThatOneCannotReplay:
    """States of one process say that two made the updates, which is all that the checks look at."""

    @staticmethod
    def pretend(folder):
        edit_states(folder, lambda state: [each.update(num_processes=2) for each in state["launches"]])

    def test_data_without_an_index(self, tmp_path):
        data = Stream(tiny_data())
        tiny_trainer(callbacks=[saving(tmp_path, 2)]).train(data, 1, per_device_batch_size=8)
        self.pretend(tmp_path)
        with pytest.raises(ConfigurationError, match=r"2 processes made this update.*not read by index"):
            tiny_trainer().replay(data, 1, update=3, folder=tmp_path, per_device_batch_size=8)

    def test_a_batch_norm_over_all_processes(self, folder):
        self.pretend(folder)
        trainer = numbered_trainer()
        trainer.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(trainer.model)
        with pytest.raises(ConfigurationError, match="SyncBatchNorm takes its mean over the batches of all"):
            replay(trainer, folder)

    def test_further_optimizers(self, tmp_path):
        class Two(Trainer):
            def __init__(self, *arguments, **kwargs):
                super().__init__(*arguments, **kwargs)
                self.other = linear_of_constants(2)
                self.other_optimizer = torch.optim.SGD(self.other.parameters(), lr=0.1)

        def train_or_replay(callbacks, **replayed):
            trainer = tiny_trainer(Two, callbacks)
            call = trainer.replay if replayed else trainer.train
            return call(tiny_data(), 1, per_device_batch_size=8, **replayed)

        train_or_replay([saving(tmp_path, 2)])
        self.pretend(tmp_path)
        with pytest.raises(ConfigurationError, match="further optimizers may step inside a step"):
            train_or_replay([], update=3, folder=tmp_path)

    def test_random_states_that_nothing_tells(self, tmp_path):
        numbered_trainer([saving(tmp_path, 3)], seed=None).train(Numbered(), 2, per_device_batch_size=11)
        self.pretend(tmp_path)
        with pytest.raises(ConfigurationError, match=r"seed is None.*pass seed to the Trainer"):
            replay(numbered_trainer(seed=None), tmp_path)


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

    def test_arguments_that_neither_it_nor_train_has(self, folder):
        with pytest.raises(
            ConfigurationError, match=r"^IgnoresIndex\.replay was given max_epochs=2, but .* num_epochs"
        ):
            replay(numbered_trainer(), folder, max_epochs=2)
        with pytest.raises(ConfigurationError, match=r"Did you mean 'per_device_batch_size'\?"):
            replay(numbered_trainer(), folder, device_batch_size=2)
        with pytest.raises(ConfigurationError, match=r"^layers is 'no', but must be one of"):
            replay(numbered_trainer(), folder, layers="no")

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

    @pytest.mark.parametrize(
        ("name", "value"),
        [("shards_parameters", True), ("group", DataGroup(1, 0, processes_per_copy=2))],
    )
    def test_an_engine_that_spreads_the_model(self, folder, monkeypatch, name, value):
        trainer = numbered_trainer()
        monkeypatch.setattr(trainer.engine, name, value)
        weights = copy.deepcopy(trainer.model.state_dict())
        with pytest.raises(
            ConfigurationError, match=rf"replay trains a copy.*but {trainer.engine.name} spreads the model"
        ):
            replay(trainer, folder)
        assert all(torch.equal(weights[key], each) for key, each in trainer.model.state_dict().items())

    def test_a_folder_that_is_no_path(self):
        with pytest.raises(ConfigurationError, match="folder is 3, but must be a path"):
            replay(numbered_trainer(), 3)

    def test_arguments_that_train_would_refuse(self, folder):
        with pytest.raises(ConfigurationError, match="gradient_accumulation_steps is 0"):
            replay(numbered_trainer(), folder, gradient_accumulation_steps=0)

    def test_inside_a_run(self, folder):
        class Replays(TrainerCallback):
            def on_optimizer_step_end(self, trainer):
                replay(trainer, folder)

        with pytest.raises(ConfigurationError, match="replay was called inside"):
            numbered_trainer([Replays()]).train(Numbered(), 1)

    def test_a_trainer_without_an_optimizer(self, folder):
        trainer = numbered_trainer()
        trainer.optimizer = None
        with pytest.raises(ConfigurationError, match="optimizer"):
            replay(trainer, folder)

    def test_data_of_another_length(self, folder):
        with pytest.raises(ConfigurationError, match=r"train_dataset has 40 samples.*of 44 samples"):
            numbered_trainer().replay(Numbered(40), 2, update=4, folder=folder, per_device_batch_size=11)

    def test_a_stage_whose_beginning_was_not_saved(self, tmp_path):
        trainer = numbered_trainer([saving(tmp_path, 3)])
        for keep in (False, True):
            trainer.train(Numbered(), 2, per_device_batch_size=11, reset_run_history=not keep)
        shutil.rmtree(tmp_path / "update_00000008")
        with pytest.raises(CheckpointError, match=r"update 9 is of stage 2 .*began after update 8"):
            replay(numbered_trainer(), tmp_path, 9)

    def test_a_run_that_went_on_with_other_batches(self, folder):
        trainer = numbered_trainer([saving(folder, 3)])
        shutil.rmtree(folder / "update_00000008")
        trainer.train(Numbered(), 2, per_device_batch_size=6, resume_from=folder / "update_00000006")
        shutil.rmtree(folder / "update_00000006")
        with pytest.raises(
            CheckpointError, match=r"cannot be replayed from .*update_00000003.*other processes"
        ):
            replay(numbered_trainer(), folder, 8, per_device_batch_size=6)

    def test_an_update_before_the_first_state_of_an_interrupted_run(self, folder):
        shutil.rmtree(folder / "update_00000008")
        trainer = numbered_trainer([saving(folder, 3)])
        trainer.train(Numbered(), 3, per_device_batch_size=11, resume_from=folder / "update_00000006")
        for update in (3, 6):
            shutil.rmtree(folder / f"update_{update:08d}")
        with pytest.raises(CheckpointError, match=r"before update 8, and the run was interrupted before it"):
            replay(numbered_trainer(), folder, 8)

    def test_a_run_whose_first_weights_are_not_known(self, folder):
        edit_states(folder, lambda state: state["beginning"].pop("weights"))
        with pytest.raises(
            CheckpointError, match=r"does not say with which weights.*Replay an update after 3"
        ):
            replay(numbered_trainer(), folder, 2)

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


ON_TWO = """
    import sys
    from pathlib import Path
    import torch
    from replaying import ONE_CYCLE, Numbered, Recording, averaging, numbered_trainer, saving
    from accel_core import ConfigurationError
    folder = Path(sys.argv[1])
    given = dict(num_epochs=2, eval_dataset=Numbered(7), per_device_batch_size=5, gradient_accumulation_steps=2,
                 create_scheduler_fn=ONE_CYCLE)
    recording = Recording()
    trainer = numbered_trainer([recording, averaging(), saving(folder / "states", 3)])
    trainer.train(Numbered(), **given)
    size, index = trainer.data_group.size, trainer.data_group.index
    torch.save(recording.updates, folder / f"seen_{index}.pt")
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    results = {}
    for update in {2: (2, 4, 5), 3: (2, 4)}[size]:
        # Before the first state it begins with the trainer's own weights.
        replayer = numbered_trainer([averaging()]) if update < 3 else trainer
        result = replayer.replay(Numbered(), update=update, folder=folder / "states", layers=True, **given)
        assert len(result.layers["0"]) == len(result.batch) >= size and not result.messages
        results[update] = (result.batch, result.indices, result.model_outputs, result.loss, result.gradients)
    assert all(torch.equal(weights[name], value) for name, value in trainer.model.state_dict().items())
    torch.save(results, folder / f"results_{index}.pt")
    trainer.train(Numbered(), reset_run_history=False, **given)
    print("trained again on", index)
    try:
        numbered_trainer().replay(Numbered(), 2, update=5, folder=folder / "alone", per_device_batch_size=11)
    except ConfigurationError as error:
        assert f"replay was called on {size} processes, but 1 made update 5. Start the script on 1" in str(error)
        print("refused on", index)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_a_job_replays_what_as_many_processes_did(tmp_path, processes):
    """To the bit on three too, since the network adds the gradients as it did."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    numbered_trainer([saving(tmp_path / "alone", 3)]).train(Numbered(), 2, per_device_batch_size=11)
    finished = launch(ON_TWO, processes=processes, args=[tmp_path], env=environment)
    assert finished.stdout.count("trained again on") == finished.stdout.count("refused on") == processes
    seen = [torch.load(tmp_path / f"seen_{index}.pt", weights_only=False) for index in range(processes)]
    for index in range(processes):
        results = torch.load(tmp_path / f"results_{index}.pt", weights_only=False)
        for update, (batch, indices, outputs, loss, gradients) in results.items():
            steps = [step for each in seen for step in each[update]["steps"]]
            assert all(torch.equal(one[2], other[2]) for (one, _, _), other in zip(steps, batch, strict=True))
            assert all(torch.equal(one, other) for (_, _, one), other in zip(steps, outputs, strict=True))
            assert indices == torch.cat([one[2] for one, _, _ in steps]).tolist()
            weighed = [(value * len(one[2]), len(one[2])) for one, value, _ in steps]
            assert loss == sum(value for value, _ in weighed) / sum(size for _, size in weighed)
            for name, gradient in seen[0][update]["gradients"].items():
                assert torch.equal(gradient, gradients[name]), name
