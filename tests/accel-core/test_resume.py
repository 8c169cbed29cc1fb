"""Resuming on one process: from every place in the loop, with other settings, and what is said where it cannot go on."""

import json
import random
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from accel_core import (
    CheckpointError,
    ConfigurationError,
    Trainer,
    TrainerCallback,
    TrainerPlaceholderValues,
    latest_checkpoint,
)
from states import edit

POINTS = torch.randn(29, 4, generator=torch.Generator().manual_seed(0))
TARGETS = (POINTS.sum(1) > 0).long()
DATA = TensorDataset(POINTS, TARGETS)
EVAL_DATA = TensorDataset(POINTS[:11], TARGETS[:11])


class SaveEverywhere(TrainerCallback):
    """Saves in every event in which saving is allowed, in folders numbered in the order of saving."""

    order = 1000

    def __init__(self, folder):
        self.folder = folder
        self.places = []

    def save(self, trainer, place):
        trainer.save_training_state(self.folder / f"{len(self.places):03d}")
        self.places.append(place)

    def on_optimizer_step_end(self, trainer):
        self.save(trainer, "update")

    def on_train_epoch_end(self, trainer):
        self.save(trainer, "train epoch end")

    def on_eval_epoch_end(self, trainer, is_intermediate, metric_prefix):
        self.save(trainer, "eval epoch end")

    def on_training_run_epoch_end(self, trainer):
        self.save(trainer, "run epoch end")

    def on_training_run_end(self, trainer):
        self.save(trainer, "run end")


class Counter(TrainerCallback):
    """A callback whose state changes all the time."""

    def __init__(self):
        self.events = {}

    def count(self, name):
        self.events[name] = self.events.get(name, 0) + 1

    def on_train_step_end(self, trainer, batch, batch_output, step):
        self.count("steps")

    def on_train_epoch_end(self, trainer):
        self.count("train epochs")

    def on_eval_epoch_end(self, trainer, is_intermediate, metric_prefix):
        self.count("evaluations")

    def on_training_run_epoch_end(self, trainer):
        self.count("epochs")

    def state_dict(self):
        return {"events": self.events}

    def load_state_dict(self, state):
        self.events = dict(state["events"])


class Seen(TrainerCallback):
    """Keeps which samples were trained on, and the learning rate of each update."""

    def __init__(self):
        self.batches = []
        self.rates = []

    def on_train_step_start(self, trainer, batch):
        self.batches.append(indices_of(batch[0]))

    def on_optimizer_step_start(self, trainer):
        self.rates.append(trainer.optimizer.param_groups[0]["lr"])

    @property
    def samples(self):
        return [index for batch in self.batches for index in batch]


def indices_of(points):
    return [int((point == POINTS).all(1).nonzero()) for point in points]


def create_trainer(*callbacks, optimizer=torch.optim.AdamW, model=None, **kwargs):
    torch.manual_seed(4)
    model = model or torch.nn.Sequential(
        torch.nn.Linear(4, 6),
        torch.nn.BatchNorm1d(6),
        torch.nn.Dropout(0.25),
        torch.nn.ReLU(),
        torch.nn.Linear(6, 2),
    )
    optimizer = optimizer(model.parameters(), lr=0.02)
    return Trainer(model, torch.nn.functional.cross_entropy, optimizer, callbacks, seed=7, **kwargs)


def assert_same_end(one, other):
    """Weights, buffers, optimizer, scheduler, history and progress are equal to the bit."""
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(one.model.state_dict()[name], tensor), name
    assert_equal(one.optimizer.state_dict(), other.optimizer.state_dict())
    if other.scheduler is not None:
        assert_equal(one.scheduler.state_dict(), other.scheduler.state_dict())
    assert one.run_history.to_records() == other.run_history.to_records()
    assert one.run_progress == other.run_progress


def assert_equal(one, other):
    if isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in other:
            assert_equal(one[key], other[key])
    elif isinstance(other, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    elif isinstance(other, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


OneCycle = partial(
    torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS
)
WAYS = {
    "plain": {"num_epochs": 2},
    "one-cycle, accumulation, evaluation": {
        "num_epochs": 2,
        "eval_dataset": EVAL_DATA,
        "gradient_accumulation_steps": 3,
        "create_scheduler_fn": OneCycle,
        "gradient_clip_norm": 0.5,
    },
    "reduce on plateau": {
        "num_epochs": 4,
        "eval_dataset": EVAL_DATA,
        "per_device_batch_size": 15,
        "create_scheduler_fn": partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5),
    },
    "steps every epoch": {
        "num_epochs": 3,
        "per_device_batch_size": 15,
        "create_scheduler_fn": partial(torch.optim.lr_scheduler.StepLR, step_size=1),
        "scheduler_step_every": "epoch",
    },
    "cut by a limit": {
        "num_epochs": 3,
        "max_num_train_steps": 6,
        "eval_dataset": EVAL_DATA,
        "create_scheduler_fn": OneCycle,
    },
    "drops the last batch": {"num_epochs": 2, "train_dataloader_kwargs": {"drop_last": True}},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_resumed_from_any_place_in_the_loop_ends_with_the_same_bits(way, tmp_path):
    arguments = {"per_device_batch_size": 8, **WAYS[way]}
    expected, counter = create_trainer(first := Counter()), SaveEverywhere(tmp_path)
    expected.train(DATA, **arguments)
    create_trainer(Counter(), counter).train(DATA, **arguments)
    wanted = {"update", "train epoch end", "run epoch end", "run end"}
    assert set(counter.places) - {"eval epoch end"} == wanted
    for number, place in enumerate(counter.places):
        resumed = create_trainer(second := Counter())
        torch.rand(number)
        resumed.train(DATA, **arguments, resume_from=tmp_path / f"{number:03d}")
        assert_same_end(resumed, expected)
        assert second.events == first.events, place


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, momentum=0.9, nesterov=True),
        torch.optim.Adam,
        torch.optim.RMSprop,
        torch.optim.NAdam,
        torch.optim.LBFGS,
    ],
)
def test_the_state_of_any_optimizer_goes_on(optimizer, tmp_path):
    class Closure(Trainer):
        """LBFGS asks for the loss again; the gradients that are there will do."""

        def optimizer_step(self):
            self.optimizer.step(lambda: torch.zeros(()))

    def create(*callbacks):
        model = torch.nn.Linear(4, 2)
        with torch.no_grad():
            model.weight.fill_(0.1)
            model.bias.fill_(0.2)
        return Closure(
            model,
            torch.nn.functional.cross_entropy,
            optimizer(model.parameters(), lr=0.01),
            callbacks,
            seed=2,
        )

    expected, saver = create(), SaveEverywhere(tmp_path)
    expected.train(DATA, 2)
    create(saver).train(DATA, 2)
    resumed = create()
    resumed.train(DATA, 2, resume_from=tmp_path / "002")
    assert_same_end(resumed, expected)


class AugmentedPoints(Dataset):
    def __len__(self):
        return 29

    def __getitem__(self, index):
        return POINTS[index] + random.random() + float(np.random.rand()) + torch.rand(4), TARGETS[index]


@pytest.mark.parametrize(("workers", "seed_each_sample"), [(0, False), (0, True), (2, True)])
def test_random_augmentation_goes_on_to_the_bit(workers, seed_each_sample, tmp_path):
    loading = {"num_workers": workers}
    arguments = {
        "eval_dataset": AugmentedPoints(),
        "train_dataloader_kwargs": loading,
        "eval_dataloader_kwargs": loading,
        "seed_each_sample": seed_each_sample,
    }
    expected = create_trainer()
    expected.train(AugmentedPoints(), 2, **arguments)
    create_trainer(saver := SaveEverywhere(tmp_path)).train(AugmentedPoints(), 2, **arguments)
    for number in (1, len(saver.places) - 3):
        resumed = create_trainer()
        random.seed(number)
        resumed.train(AugmentedPoints(), 2, **arguments, resume_from=tmp_path / f"{number:03d}")
        assert_same_end(resumed, expected)


@pytest.mark.parametrize("of", ["train", "eval"])
def test_augmentation_that_workers_will_not_repeat_is_told(of, tmp_path, capsys):
    arguments = {
        "eval_dataset": AugmentedPoints(),
        "max_num_train_steps": 2,
        "train_dataloader_kwargs": {"num_workers": int(of == "train")},
        "eval_dataloader_kwargs": {"num_workers": int(of == "eval")},
    }
    create_trainer(SaveEverywhere(tmp_path)).train(AugmentedPoints(), **arguments)
    create_trainer().train(AugmentedPoints(), **arguments, resume_from=tmp_path / "000")
    assert "pass seed_each_sample=True" in capsys.readouterr().out


class TestTheOldWay:
    """What goes wrong where resuming means to load weights and to call `train` again."""

    def test_a_finished_epoch_is_not_repeated_and_the_next_begins_where_it_was(self, tmp_path):
        whole, part = Seen(), Seen()
        create_trainer(whole, saver := SaveEverywhere(tmp_path)).train(DATA, 2)
        number = [index for index, place in enumerate(saver.places) if place == "update"][5]
        resumed = create_trainer(part)
        resumed.train(DATA, 2, resume_from=tmp_path / f"{number:03d}")
        assert part.batches == whole.batches[6:]
        assert resumed.run_progress.epochs_completed == 2

    def test_every_save_of_a_run_can_be_resumed_from_also_a_resumed_one(self, tmp_path):
        arguments = {"num_epochs": 2, "create_scheduler_fn": OneCycle}
        rates = Seen()
        create_trainer(rates, SaveEverywhere(tmp_path / "a")).train(DATA, **arguments)
        create_trainer(SaveEverywhere(tmp_path / "b")).train(
            DATA, **arguments, resume_from=tmp_path / "a" / "001"
        )
        last = Seen()
        create_trainer(last).train(DATA, **arguments, resume_from=tmp_path / "b" / "000")
        assert last.rates == rates.rates[3:]

    def test_the_state_of_an_update_is_that_behind_its_backward_and_step(self, tmp_path):
        weights = []

        class Keep(TrainerCallback):
            def on_train_step_start(self, trainer, batch):
                weights.append(trainer.model[0].weight.detach().clone())

        create_trainer(Keep(), SaveEverywhere(tmp_path)).train(DATA, 1)
        for number in (0, 1):
            trainer = create_trainer()
            trainer.load_training_state(tmp_path / f"{number:03d}")
            assert torch.equal(trainer.model[0].weight, weights[number + 1])
            assert trainer.run_progress.updates_completed == number + 1

    def test_history_callbacks_and_position_are_saved(self, tmp_path):
        create_trainer(Counter(), SaveEverywhere(tmp_path)).train(DATA, 2, eval_dataset=EVAL_DATA)
        newest = latest_checkpoint(tmp_path)
        resumed = create_trainer(counter := Counter(), seen := Seen())
        resumed.train(DATA, 3, eval_dataset=EVAL_DATA, resume_from=newest)
        assert len(resumed.run_history.get_metric_values("eval_loss_epoch")) == 3
        assert [r["epoch"] for r in resumed.run_history.to_records() if r["name"] == "train_loss_epoch"] == [
            1,
            2,
            3,
        ]
        assert counter.events["evaluations"] == 3
        assert sorted(seen.samples) == list(range(29))


@pytest.mark.parametrize(
    "changed",
    [
        {"per_device_batch_size": 5},
        {"per_device_batch_size": 3, "gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 2},
    ],
)
def test_another_batch_size_goes_on_with_the_next_sample(changed, tmp_path, capsys):
    seen = Seen()
    create_trainer(seen, SaveEverywhere(tmp_path), model=torch.nn.Linear(4, 2)).train(
        DATA, 1, per_device_batch_size=4
    )
    rest = Seen()
    resumed = create_trainer(rest, model=torch.nn.Linear(4, 2))
    resumed.train(DATA, 1, **{"per_device_batch_size": 4, **changed}, resume_from=tmp_path / "002")
    assert rest.samples == seen.samples[12:]
    assert resumed.run_progress.epochs_completed == 1
    told = capsys.readouterr().out
    for name, number in changed.items():
        assert f" {number} instead of " in told, name


class Stream(IterableDataset):
    """Points in their order; what was read is kept."""

    def __init__(self):
        self.read = []

    def __iter__(self):
        for index in range(29):
            self.read.append(index)
            yield POINTS[index], TARGETS[index]


class StatefulStream(Stream):
    """The same, which can begin in the middle."""

    position = 0

    restores_exactly = True

    def __iter__(self):
        while self.position < 29:
            index, self.position = self.position, self.position + 1
            self.read.append(index)
            yield POINTS[index], TARGETS[index]
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("stream", "begins_at"), [(Stream, 0), (StatefulStream, 12)])
def test_a_stream_goes_on_with_the_next_batch(stream, begins_at, accumulation, tmp_path, capsys):
    arguments = {"num_epochs": 2, "per_device_batch_size": 3, "gradient_accumulation_steps": accumulation}
    expected = create_trainer()
    expected.train(stream(), **arguments)
    create_trainer(saver := SaveEverywhere(tmp_path)).train(stream(), **arguments)
    updates = [number for number, place in enumerate(saver.places) if place == "update"]
    for number in updates:
        resumed = create_trainer()
        resumed.train(stream(), **arguments, resume_from=tmp_path / f"{number:03d}")
        assert_same_end(resumed, expected)
    capsys.readouterr()
    data = stream()
    create_trainer().train(data, **arguments, resume_from=tmp_path / f"{updates[4 // accumulation - 1]:03d}")
    assert data.read[0] == begins_at
    assert ("4 batches of Stream" in capsys.readouterr().out) == (stream is Stream)


@pytest.mark.parametrize("stream", [Stream, StatefulStream])
@pytest.mark.parametrize("changed", [{"per_device_batch_size": 5}, {"per_device_batch_size": 2}])
def test_a_stream_in_batches_of_another_size_goes_on_with_the_next_sample_also_when_resumed_again(
    stream, changed, tmp_path
):
    create_trainer(SaveEverywhere(tmp_path / "a"), model=torch.nn.Linear(4, 2)).train(
        stream(), 1, per_device_batch_size=3
    )
    first, second = Seen(), Seen()
    trainer = create_trainer(first, SaveEverywhere(tmp_path / "b"), model=torch.nn.Linear(4, 2))
    trainer.train(stream(), 1, **changed, resume_from=tmp_path / "a" / "002")
    assert first.samples == list(range(9, 29))
    trainer = create_trainer(second, model=torch.nn.Linear(4, 2))
    trainer.train(stream(), 1, **changed, resume_from=tmp_path / "b" / "001")
    assert second.samples == list(range(9 + 2 * changed["per_device_batch_size"], 29))


class StatefulLoader:
    """Ready batches, from a loader that is not torch's and saves its own position."""

    batch_size = 4

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while self.position < 7:
            start, self.position = 4 * self.position, self.position + 1
            yield POINTS[start : start + 4], TARGETS[start : start + 4]
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_a_loader_with_a_state_goes_on(tmp_path):
    expected = create_trainer()
    expected.train(StatefulLoader(), 2)
    create_trainer(saver := SaveEverywhere(tmp_path)).train(StatefulLoader(), 2)
    for number in [number for number, place in enumerate(saver.places) if place == "update"]:
        resumed = create_trainer()
        resumed.train(StatefulLoader(), 2, resume_from=tmp_path / f"{number:03d}")
        assert_same_end(resumed, expected)


def test_a_ready_loader_goes_on(tmp_path):
    expected = create_trainer()
    expected.train(DataLoader(DATA, 6, shuffle=True), 2)
    create_trainer(SaveEverywhere(tmp_path)).train(DataLoader(DATA, 6, shuffle=True), 2)
    resumed = create_trainer()
    resumed.train(DataLoader(DATA, 6, shuffle=True), 2, resume_from=tmp_path / "001")
    assert_same_end(resumed, expected)


def test_a_sampler_that_shuffles_as_it_likes_is_told(tmp_path, capsys):
    class Own(Sampler):
        def __iter__(self):
            return iter(random.sample(range(29), 29))

        def __len__(self):
            return 29

    arguments = {"num_epochs": 1, "train_dataloader_kwargs": {"sampler": Own()}}
    create_trainer(SaveEverywhere(tmp_path)).train(DATA, **arguments)
    create_trainer().train(DATA, **arguments, resume_from=tmp_path / "001")
    assert re.search(r"\bOwn\b.*set_epoch", capsys.readouterr().out)


class TestLimits:
    def test_resuming_a_finished_run_does_nothing_and_says_so(self, tmp_path, capsys):
        finished = create_trainer(SaveEverywhere(tmp_path))
        finished.train(DATA, 2, eval_dataset=EVAL_DATA)
        seen = Seen()
        resumed = create_trainer(seen)
        history = resumed.train(DATA, 2, eval_dataset=EVAL_DATA, resume_from=latest_checkpoint(tmp_path))
        assert seen.batches == []
        assert_same_end(resumed, finished)
        assert history.to_records() == finished.run_history.to_records()
        assert re.search(
            "finished after 8 updates.*nothing to do.*pass a larger num_epochs", capsys.readouterr().out
        )

    def test_more_epochs_go_on_and_the_scheduler_keeps_its_plan(self, tmp_path, capsys):
        scheduler = partial(
            torch.optim.lr_scheduler.LinearLR, total_iters=TrainerPlaceholderValues.NUM_UPDATE_STEPS
        )
        create_trainer(SaveEverywhere(tmp_path)).train(DATA, 1, create_scheduler_fn=scheduler)
        resumed = create_trainer()
        resumed.train(DATA, 2, create_scheduler_fn=scheduler, resume_from=latest_checkpoint(tmp_path))
        assert resumed.run_progress.epochs_completed == 2
        assert resumed.scheduler.total_iters == 4
        assert re.search("8 instead of 4 updates.*saved scheduler", capsys.readouterr().out)

    def test_without_a_scheduler_none_keeps_its_plan(self, tmp_path, capsys):
        create_trainer(SaveEverywhere(tmp_path)).train(DATA, 1)
        create_trainer().train(DATA, 2, resume_from=latest_checkpoint(tmp_path))
        told = capsys.readouterr().out
        assert "8 instead of 4 updates" in told and "scheduler" not in told

    def test_a_run_that_a_limit_cut_goes_on_in_the_same_epoch_when_it_is_raised(self, tmp_path):
        create_trainer(SaveEverywhere(tmp_path)).train(DATA, max_num_train_steps=2, eval_dataset=EVAL_DATA)
        seen, counter = Seen(), Counter()
        resumed = create_trainer(seen, counter)
        resumed.train(DATA, 1, eval_dataset=EVAL_DATA, resume_from=latest_checkpoint(tmp_path))
        whole = Seen()
        expected = create_trainer(whole)
        expected.train(DATA, 1, eval_dataset=EVAL_DATA)
        assert seen.batches == whole.batches[2:]
        assert torch.equal(resumed.model[0].weight, expected.model[0].weight)
        assert counter.events["evaluations"] == 1
        latest = [trainer.run_history.get_latest_metric("eval_loss_epoch") for trainer in (resumed, expected)]
        assert latest[0] == latest[1]


class TestWhatDoesNotFit:
    @pytest.fixture
    def saved(self, tmp_path):
        create_trainer(Counter(), SaveEverywhere(tmp_path / "states")).train(
            DATA, 1, create_scheduler_fn=OneCycle
        )
        return tmp_path / "states" / "001"

    def resume(self, saved, trainer=None, data=DATA, **arguments):
        trainer = trainer or create_trainer(Counter())
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        try:
            trainer.train(data, 1, **{"create_scheduler_fn": OneCycle, **arguments}, resume_from=saved)
        finally:
            self.is_unchanged = all(map(torch.equal, before, trainer.model.parameters()))
        return trainer

    def test_a_missing_folder_is_an_error_that_names_the_newest_there_is(self, saved):
        with pytest.raises(CheckpointError, match=r"777' .*not exist.*Did you mean '"):
            self.resume(saved.parent / "777")
        assert self.is_unchanged

    def test_starting_where_nothing_was_saved_yet_starts_afresh(self, tmp_path):
        trainer = self.resume(latest_checkpoint(tmp_path / "none"))
        assert trainer.run_progress.epochs_completed == 1

    def test_an_export_is_told_apart(self, saved, tmp_path):
        trainer = create_trainer()
        trainer.save_checkpoint(tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=r"model\.pt' is a file.*folder.*load_checkpoint"):
            self.resume(tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=r"001' is a folder.*file.*train\(\.\.\., resume_from='"):
            trainer.load_checkpoint(saved)

    def test_data_of_another_length_is_refused_in_the_middle_of_an_epoch(self, saved):
        with pytest.raises(
            ConfigurationError, match=r"train_dataset .* 20 samples.* 16 of 29 samples.*load_checkpoint"
        ):
            self.resume(saved, data=TensorDataset(POINTS[:20], TARGETS[:20]))
        assert self.is_unchanged

    def test_data_of_another_length_is_told_between_epochs(self, saved, capsys):
        newest = latest_checkpoint(saved.parent)
        trainer = create_trainer()
        trainer.train(TensorDataset(POINTS[:20], TARGETS[:20]), 2, resume_from=newest)
        assert "from 29 to 20 samples" in capsys.readouterr().out
        assert trainer.run_progress.epochs_completed == 2

    def test_another_model_is_refused_and_both_are_named(self, saved):
        model = torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.Linear(7, 2))
        with pytest.raises(CheckpointError, match=r"(?s)001' .*another model than Sequential.*size mismatch"):
            self.resume(saved, create_trainer(model=model))
        assert self.is_unchanged

    def test_another_model_that_fits_in_part_is_left_as_it_is(self, saved):
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 6),
            torch.nn.BatchNorm1d(6),
            torch.nn.Dropout(0.25),
            torch.nn.ReLU(),
            torch.nn.Linear(6, 3),
        )
        with pytest.raises(CheckpointError, match="size mismatch for 4"):
            self.resume(saved, create_trainer(model=model))
        assert self.is_unchanged
        assert model[1].num_batches_tracked == 0

    @pytest.mark.parametrize(
        ("optimizer", "missing"), [(torch.optim.SGD, "momentum"), (torch.optim.RMSprop, "alpha")]
    )
    def test_another_class_of_optimizer_is_refused(self, optimizer, missing, tmp_path):
        create_trainer(SaveEverywhere(tmp_path)).train(DATA, 1)
        with pytest.raises(
            CheckpointError, match=rf"{optimizer.__name__}.*optimizer\.pt'.*'{missing}'.*Create it"
        ):
            create_trainer(optimizer=optimizer).train(DATA, 1, resume_from=tmp_path / "001")

    def test_a_scheduler_that_is_left_out_is_told(self, saved, capsys):
        self.resume(saved, create_scheduler_fn=None)
        assert re.search("scheduler is dropped.*none", capsys.readouterr().out)

    def test_another_optimizer_is_refused(self, saved):
        def only_some(parameters, lr):
            return torch.optim.AdamW(list(parameters)[:2], lr=lr)

        with pytest.raises(CheckpointError, match=r"AdamW of this run.*optimizer\.pt'.*Create it"):
            self.resume(saved, create_trainer(optimizer=only_some))

    def test_a_scheduler_where_there_was_none_is_refused(self, tmp_path):
        create_trainer(SaveEverywhere(tmp_path)).train(DATA, 1)
        with pytest.raises(CheckpointError, match=r"scheduler\.pt"):
            self.resume(tmp_path / "001")

    def test_a_missing_callback_is_told(self, saved, capsys):
        self.resume(saved, create_trainer())
        assert re.search(r"\['Counter'\] .*dropped", capsys.readouterr().out)

    def test_a_callback_that_is_new_starts_afresh(self, saved, capsys):
        self.resume(saved, create_trainer(Counter(), new := Counter()))
        assert new.events["steps"] == 2
        assert "dropped" not in capsys.readouterr().out

    def test_other_versions_are_told(self, saved, capsys):
        edit(saved, "launched", "versions", "torch", value="1.0")
        self.resume(saved)
        assert f"torch 1.0 → {torch.__version__}" in capsys.readouterr().out

    def test_a_resumed_run_keeps_the_name_of_the_run_and_its_seed(self, saved):
        before = json.loads((saved / "trainer_state.json").read_text())
        resumed = self.resume(saved, create_trainer())
        assert resumed.run_id == before["run_id"]
        assert resumed.data_seed == before["seed"] == 7


def test_values_of_the_user_come_back_with_the_state(tmp_path):
    class Save(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            trainer.save_training_state(tmp_path / "state", {"note": "first", "numbers": [1, 2.5]})

    create_trainer(Save()).train(DATA, max_num_train_steps=1)
    trainer = create_trainer()
    assert trainer.load_training_state(tmp_path / "state") == {"note": "first", "numbers": [1, 2.5]}
    assert trainer.run_progress.updates_completed == 1


def test_the_state_of_a_subclass_goes_on(tmp_path):
    class Counting(Trainer):
        steps = 0

        def calculate_train_batch_loss(self, batch):
            self.steps += 1
            return super().calculate_train_batch_loss(batch)

        def state_dict(self):
            return {"steps": self.steps}

        def load_state_dict(self, state):
            self.steps = state["steps"]

    def create(*callbacks):
        model = torch.nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Counting(model, torch.nn.functional.cross_entropy, optimizer, callbacks, seed=1)

    create(SaveEverywhere(tmp_path)).train(DATA, 2)
    resumed = create()
    resumed.train(DATA, 2, resume_from=tmp_path / "002")
    assert resumed.steps == 8


def test_saving_in_the_middle_of_an_update_is_refused(tmp_path):
    class Save(TrainerCallback):
        def on_train_step_end(self, trainer, batch, batch_output, step):
            trainer.save_training_state(tmp_path / "state")

    with pytest.raises(
        ConfigurationError, match=r"save_training_state.*middle of an update.*on_optimizer_step_end"
    ):
        create_trainer(Save()).train(DATA, 1)
    assert not (tmp_path / "state").exists()


def test_an_evaluation_leaves_the_seed_of_the_run_that_is_saved_behind_it(tmp_path):
    torch.manual_seed(5)
    trainer = create_trainer()
    trainer.seed = None
    trainer.train(DATA, 1)
    seed = trainer.data_seed
    torch.manual_seed(6)
    trainer.evaluate(EVAL_DATA)
    trainer.save_training_state(tmp_path / "state")
    assert json.loads((tmp_path / "state" / "trainer_state.json").read_text())["seed"] == seed


def test_a_state_that_was_given_up_is_no_reason_not_to_save(tmp_path):
    """The run went on from an earlier state, with another learning rate, and comes to the same update again."""

    class Save(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            trainer.save_training_state(tmp_path / f"update_{trainer.run_progress.updates_completed}")

    create_trainer(Save()).train(DATA, 1)

    class Slower(TrainerCallback):
        def on_checkpoint_loaded(self, trainer, path):
            trainer.optimizer.param_groups[0]["lr"] = 1e-5

    trainer = create_trainer(Slower(), Save())
    trainer.train(DATA, 1, resume_from=tmp_path / "update_1")
    again = create_trainer()
    again.load_training_state(tmp_path / "update_4")
    assert torch.equal(again.model[0].weight, trainer.model[0].weight)


def test_loading_a_state_leaves_the_data_of_the_latest_run_where_it_is(tmp_path):
    data = StatefulStream()
    trainer = create_trainer(SaveEverywhere(tmp_path))
    trainer.train(data, 1, per_device_batch_size=3)
    trainer.load_training_state(tmp_path / "002")
    assert data.position == 0
    assert trainer.run_progress.updates_completed == 3


def test_saving_before_any_training_is_refused(tmp_path):
    trainer = create_trainer()
    trainer.evaluate(EVAL_DATA)
    with pytest.raises(
        ConfigurationError, match=r"save_training_state.*before training.*Use save_checkpoint"
    ):
        trainer.save_training_state(tmp_path / "state")
