"""Which samples an update saw, and which updates saw a sample, is known from a state alone."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

from accel_core import CheckpointError, ConfigurationError, latest_checkpoint, samples_of, updates_of
from launching import launch
from replaying import Numbered, Recording, numbered_trainer, saving
from tiny import Stream, tiny_data, tiny_trainer

SCRIPT = """
    import json, sys
    from pathlib import Path
    from accel_core import latest_checkpoint
    from replaying import Numbered, Recording, numbered_trainer, saving
    folder, batch_size, steps, limit = Path(sys.argv[1]), *map(int, sys.argv[2:])
    recording = Recording()
    trainer = numbered_trainer([recording, saving(folder / "states", 5)], norm=False)
    trainer.train(Numbered(), 4, per_device_batch_size=batch_size, gradient_accumulation_steps=steps,
                  max_num_train_steps=limit, resume_from=latest_checkpoint(folder / "states"))
    group = trainer.data_group
    seen = {update: [i for batch, _, _ in each["steps"] for i in batch[2].tolist()]
            for update, each in recording.updates.items()}
    (folder / f"seen_{group.size}_{batch_size}_{steps}_{group.index}.json").write_text(json.dumps(seen))
"""


def assert_equal_recording(folder, recording):
    """Both functions say what was recorded, of every update and every sample."""
    for update, indices in recording.items():
        assert samples_of(folder, update) == indices, update
    for sample in range(44):
        seen = [update for update, indices in sorted(recording.items()) if sample in indices]
        assert updates_of(folder, sample) == seen, sample


@pytest.mark.slow
def test_they_equal_a_recording_over_changes_of_processes_and_batch_size(tmp_path):
    import json

    recording = {}
    launches = ((2, 3, 1, 13), (1, 4, 2, 22), (2, 5, 3, 30))
    for processes, batch_size, steps, limit in launches:
        environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
        launch(SCRIPT, processes, [tmp_path, batch_size, steps, limit], env=environment)
        parts = [
            json.loads((tmp_path / f"seen_{processes}_{batch_size}_{steps}_{index}.json").read_text())
            for index in range(processes)
        ]
        for update in parts[0]:
            recording[int(update)] = [sample for part in parts for sample in part[update]]
    assert_equal_recording(tmp_path / "states", recording)


@pytest.mark.parametrize("drop_last", [False, True])
def test_stages_short_windows_and_replacement(tmp_path, drop_last):
    recording = Recording()
    trainer = numbered_trainer([recording, saving(tmp_path, 50)], norm=False)
    data = Numbered()
    loader = DataLoader(data, 5, sampler=RandomSampler(data, True, 31), drop_last=drop_last)
    trainer.train(loader, 2, gradient_accumulation_steps=2)
    kwargs = {"drop_last": drop_last}
    trainer.train(data, 3, max_num_train_steps=9, train_dataloader_kwargs=kwargs, reset_run_history=False)
    trainer.train(data, 1, per_device_batch_size=3, reset_run_history=False)
    seen = {
        update: torch.cat([batch[2] for batch, _, _ in each["steps"]]).tolist()
        for update, each in recording.updates.items()
    }
    assert_equal_recording(tmp_path, seen)


class TestRefusals:
    def test_no_state(self, tmp_path):
        with pytest.raises(CheckpointError, match="holds no complete training state"):
            samples_of(tmp_path, 1)

    def test_an_update_after_the_state(self, tmp_path):
        numbered_trainer([saving(tmp_path, 3)]).train(Numbered(), 1)
        with pytest.raises(ConfigurationError, match="update is 7, but the state was saved after update 6"):
            samples_of(latest_checkpoint(tmp_path), 7)

    @pytest.mark.parametrize("sample", [-1, 44, 1.5])
    def test_a_sample_that_is_none(self, tmp_path, sample):
        numbered_trainer([saving(tmp_path, 3)]).train(Numbered(), 1)
        with pytest.raises(ConfigurationError, match=f"sample is {sample}, but"):
            updates_of(tmp_path, sample)

    def test_a_stream(self, tmp_path):
        tiny_trainer(callbacks=[saving(tmp_path, 3)]).train(Stream(tiny_data()), 1)
        with pytest.raises(CheckpointError, match="Stream is read without an index"):
            samples_of(tmp_path, 1)

    def test_weights_that_the_state_does_not_hold(self, tmp_path):
        loader = DataLoader(tiny_data(), 8, sampler=WeightedRandomSampler(torch.ones(37), 37))
        tiny_trainer(callbacks=[saving(tmp_path, 3)]).train(loader, 1)
        with pytest.raises(CheckpointError, match="WeightedRandomSampler draws from values of its own"):
            updates_of(tmp_path, 3)

    def test_a_state_of_an_older_version(self, tmp_path):
        from states import edit

        numbered_trainer([saving(tmp_path, 50)]).train(Numbered(), 1)
        edit(latest_checkpoint(tmp_path), "launches")
        with pytest.raises(CheckpointError, match="an older version began it"):
            samples_of(tmp_path, 1)

    def test_another_version_of_the_order(self, tmp_path):
        from states import edit

        numbered_trainer([saving(tmp_path, 50)]).train(Numbered(), 1)
        state = latest_checkpoint(tmp_path)
        import json

        launches = json.loads((state / "trainer_state.json").read_text())["launches"]
        launches[0]["order"]["version"] = 77
        edit(state, "launches", value=launches)
        with pytest.raises(CheckpointError, match="in version 77 of the order"):
            samples_of(tmp_path, 1)
