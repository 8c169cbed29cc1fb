"""The run card tells what a run was made of and what is needed to repeat it."""

import json
import logging

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from accel_callbacks import ModelEmaCallback, SaveTrainingStateCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback, compare_runs, latest_checkpoint
from replaying import ONE_CYCLE, Numbered, numbered_trainer
from tiny import Stream, tiny_data, tiny_network, tiny_trainer


def train(folder, num_epochs=2, callbacks=(), seed=3, data=None, **arguments):
    saver = SaveTrainingStateCallback(folder, save_every_n_updates=5)
    trainer = tiny_trainer(callbacks=[*callbacks, saver], seed=seed)
    trainer.train(tiny_data() if data is None else data, num_epochs, eval_dataset=tiny_data(7), **arguments)
    return trainer


def card_in(folder):
    return json.loads((folder / "run_card.json").read_text())


def test_the_saver_writes_what_run_card_returns(tmp_path):
    trainer = train(tmp_path, callbacks=[ModelEmaCallback(decay=0.9)], create_scheduler_fn=ONE_CYCLE)
    card = card_in(tmp_path)
    assert card == trainer.run_card()
    assert card["run_id"] == trainer.run_id
    assert card["versions"]["torch"] == torch.__version__
    assert card["hardware"]["processes"] == 1 and card["hardware"]["device"] == "cpu"
    assert card["arguments"]["num_epochs"] == 2
    assert "OneCycleLR(max_lr=0.05" in card["arguments"]["create_scheduler_fn"]
    assert card["trainer"]["optimizer"] == {
        "class": "torch.optim.sgd.SGD",
        "defaults": trainer.optimizer.defaults,
    }
    assert card["trainer"]["callbacks"] == ["ModelEmaCallback(decay=0.9)"]
    assert card["seed"]["seed"] == 3 and card["seed"]["order"]["sampler"] == "RandomSampler"
    assert card["metrics"]["eval_loss_epoch"] == {
        "value": trainer.run_history.get_latest_metric("eval_loss_epoch"),
        "update": 10,
    }
    assert card["interruptions"] == 0
    states = {"update_00000005": 5, "update_00000010": 10}
    assert {name: state["update"] for name, state in card["states"].items()} == states
    for name, state in card["states"].items():
        assert state["digest"] == json.loads((tmp_path / name / "trainer_state.json").read_text())["sha256"]
    assert any("seed=3" in sentence for sentence in card["to_repeat"])


def test_a_run_made_by_the_card_alone_is_equal(tmp_path):
    before = train(tmp_path / "a", per_device_batch_size=5, gradient_clip_norm=0.5)
    card = card_in(tmp_path / "a")
    given = {name: value for name, value in card["arguments"].items() if value is not None}
    again = tiny_trainer(
        callbacks=[SaveTrainingStateCallback(tmp_path / "b", save_every_n_updates=5)],
        seed=card["seed"]["seed"],
        lr=card["trainer"]["optimizer"]["defaults"]["lr"],
    )
    again.train(tiny_data(), eval_dataset=tiny_data(7), **given)
    assert again.run_card()["beginning"] == before.run_card()["beginning"]
    found = compare_runs(tmp_path / "a", tmp_path / "b")
    assert (str(found), found.cards) == ("equal", {})


def test_interruptions_are_counted_and_stages_are_none(tmp_path):
    train(tmp_path, 1)
    for num_epochs in (2, 3):
        trainer = train(tmp_path, num_epochs, resume_from=latest_checkpoint(tmp_path))
    trainer.train(tiny_data(), 1, reset_run_history=False)
    card = trainer.run_card()
    assert card["interruptions"] == card_in(tmp_path)["interruptions"] == 2
    assert [launch["stage"] for launch in card["launches"]] == [1, 1, 1, 2]
    assert len(card["states"]) == 4


def test_a_run_that_an_error_ends_leaves_its_card(tmp_path):
    class Fails(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            if trainer.run_progress.updates_completed == 8:
                raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        train(tmp_path, callbacks=[Fails()])
    assert list(card_in(tmp_path)["states"]) == ["update_00000005"]
    assert card_in(tmp_path)["progress"]["updates_completed"] == 8


class TestData:
    def facts(self, data):
        trainer = tiny_trainer()
        trainer.train(data, max_num_train_steps=1)
        return trainer.run_card()["data"]["train_dataset"]

    def test_equal_samples_have_equal_digests_and_others_other_ones(self):
        inputs, targets = tiny_data().tensors
        changed = inputs.clone()
        changed[2, 0] += 1
        digest = self.facts(tiny_data())["first_samples"]
        assert digest == self.facts(TensorDataset(inputs.clone(), targets))["first_samples"]
        assert digest == self.facts(DataLoader(tiny_data(), batch_size=8))["first_samples"]
        assert digest != self.facts(TensorDataset(changed, targets))["first_samples"]

    def test_a_name_and_the_length_are_kept(self):
        data = tiny_data()
        data.name = "digits of 2024"
        facts = self.facts(data)
        assert (facts["class"], facts["length"], facts["name"]) == ("TensorDataset", 37, "digits of 2024")

    def test_data_without_an_index_has_no_digest_and_says_why(self):
        facts = self.facts(Stream(tiny_data()))
        assert facts["first_samples"] is None and "without an index" in facts["why"]

    def test_augmented_samples_have_a_digest_and_change_no_random_numbers(self):
        cards = []
        for _ in range(2):
            trainer = numbered_trainer()
            trainer.train(Numbered(), max_num_train_steps=2)
            before = torch.get_rng_state()
            cards.append(trainer.run_card()["data"])
            assert torch.equal(torch.get_rng_state(), before)
        assert cards[0] == cards[1] and cards[0]["train_dataset"]["first_samples"]

    def test_reading_leaves_the_data_set_as_it_was(self):
        class Counts(Dataset):
            reads = 0

            def __len__(self):
                return 8

            def __getitem__(self, index):
                self.reads += 1
                return tiny_data()[index]

        data = Counts()
        trainer = tiny_trainer()
        trainer.train(torch.utils.data.Subset(data, range(8)), 1)
        assert trainer.run_card()["data"]["train_dataset"]["first_samples"]
        assert data.reads == 8

    def test_samples_that_cannot_be_read_are_no_reason_to_fail(self, tmp_path):
        class Breaks(Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, index):
                if torch.initial_seed() == 0:
                    raise OSError("the disk is gone")
                return tiny_data()[index]

        train(tmp_path, 1, data=Breaks())
        facts = card_in(tmp_path)["data"]["train_dataset"]
        assert facts["first_samples"] is None and "the disk is gone" in facts["why"]


def test_values_that_json_does_not_know_are_text(tmp_path):
    class Own:
        pass

    trainer = tiny_trainer()
    trainer.train(tiny_data(), 1, train_dataloader_kwargs={"generator": torch.Generator(), "num_workers": 0})
    trainer.run_history.update_metric("broken", float("nan"))
    card = trainer.run_card()
    text = json.dumps(card, allow_nan=False)
    assert card["metrics"]["broken"]["value"] == "nan"
    assert " at 0x" not in text


def test_what_cannot_be_shown_is_told_and_leaves_the_card(tmp_path):
    class Unshown:
        def __repr__(self):
            raise OSError("no name")

        def __call__(self, samples):
            return torch.utils.data.default_collate(samples)

    trainer = tiny_trainer(callbacks=[SaveTrainingStateCallback(tmp_path)])
    defaults = trainer.optimizer.defaults
    defaults.update(itself=defaults, list=[defaults], shown=Unshown())
    trainer.train(tiny_data(), 1, collate_fn=Unshown())
    card = card_in(tmp_path)
    told = f"{__name__}.{Unshown.__qualname__}, which raises OSError when it is shown"
    assert card["arguments"]["collate_fn"] == card["trainer"]["optimizer"]["defaults"]["shown"] == told
    assert card["trainer"]["optimizer"]["defaults"]["list"][0]["itself"] == "the same again"


def test_two_runs_show_a_callback_alike_wherever_it_lies_in_memory():
    class Own:
        pass

    class Holds(TrainerCallback):
        def __init__(self, value):
            self.value = value

    cards = []
    for _ in range(2):
        trainer = tiny_trainer(callbacks=[Holds(Own())])
        trainer.train(tiny_data(), 1)
        cards.append(trainer.run_card()["trainer"]["callbacks"])
    assert "Own object" in cards[0][0] and " at 0x" not in cards[0][0] and cards[0] == cards[1]


def test_a_card_before_a_run_is_refused():
    with pytest.raises(ConfigurationError, match=r"run_card was called before train.*Call train first"):
        tiny_trainer().run_card()


def test_a_card_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "run_card.json").mkdir()
    with caplog.at_level(logging.WARNING, "accel_core"):
        train(tmp_path, 1)
    assert "The run card was not written" in caplog.text
    assert latest_checkpoint(tmp_path).name == "update_00000005"


class TestComparison:
    def test_what_differs_in_the_cards_stands_beside_the_weights(self, tmp_path):
        train(tmp_path / "a")
        train(tmp_path / "b", gradient_clip_norm=0.01)
        found = compare_runs(tmp_path / "a", tmp_path / "b")
        assert found.cards == {"arguments.gradient_clip_norm": (None, 0.01)}
        assert "arguments.gradient_clip_norm is None and 0.01" in str(found)
        states = [latest_checkpoint(tmp_path / name) for name in "ab"]
        assert compare_runs(*states).cards == found.cards

    def test_equal_weights_on_other_settings_are_equal_and_the_settings_are_told(self, tmp_path):
        train(tmp_path / "a")
        train(tmp_path / "b")
        card = card_in(tmp_path / "b")
        card["versions"]["torch"] = "3.0"
        (tmp_path / "b" / "run_card.json").write_text(json.dumps(card))
        found = compare_runs(tmp_path / "a", tmp_path / "b")
        assert str(found) == "equal" and found.cards == {"versions.torch": (torch.__version__, "3.0")}

    @pytest.mark.parametrize("content", [None, "no json", "[]"])
    def test_runs_without_a_card_are_compared_by_their_states(self, tmp_path, content):
        train(tmp_path / "a")
        train(tmp_path / "b", gradient_clip_norm=0.01)
        (tmp_path / "b" / "run_card.json").unlink()
        if content is not None:
            (tmp_path / "b" / "run_card.json").write_text(content)
        found = compare_runs(tmp_path / "a", tmp_path / "b")
        assert found.first_difference == 5 and found.cards == {}


class WithProjection(Trainer):
    """Trains a module beside the model, which its loss does not need to name."""

    def __init__(self, *arguments, **kwargs):
        super().__init__(*arguments, **kwargs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.projection = torch.nn.Linear(2, 2).double()
        self.optimizer.add_param_group({"params": self.projection.parameters()})

    def calculate_train_batch_loss(self, batch):
        inputs, targets = batch
        loss = torch.nn.functional.cross_entropy(self.projection(self.model(inputs)), targets)
        return {"loss": loss, "model_outputs": None, "batch_size": len(targets)}


class Changes(TrainerCallback):
    """Changes a value of the optimizer, or a module beside the model, after an update."""

    def __init__(self, update, change):
        self.update, self.change = update, change

    def on_optimizer_step_end(self, trainer):
        if trainer.run_progress.updates_completed == self.update:
            with torch.no_grad():
                self.change(trainer)


def momentum_trainer(folder, *callbacks, trainer_class=Trainer):
    model = tiny_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    saver = SaveTrainingStateCallback(folder, save_every_n_updates=5)
    loss = torch.nn.functional.cross_entropy
    return trainer_class(model, loss, optimizer, [*callbacks, saver], seed=3)


def add_to_momentum(trainer):
    parameter = trainer.get_model()[0].bias
    trainer.optimizer.state[parameter]["momentum_buffer"][0] += 1


def halve_rate(trainer):
    trainer.optimizer.param_groups[0]["lr"] /= 2


@pytest.mark.parametrize(
    ("change", "name"),
    [(add_to_momentum, "optimizer.momentum_buffer of 0.bias"), (halve_rate, "optimizer.lr of group 0")],
)
def test_equal_weights_with_another_optimizer_differ(tmp_path, change, name):
    momentum_trainer(tmp_path / "a").train(tiny_data(), 2)
    momentum_trainer(tmp_path / "b", Changes(5, change)).train(tiny_data(), 2)
    found = compare_runs(tmp_path / "a", tmp_path / "b")
    assert (found.first_difference, found.last_equal, found.differing) == (5, None, [name])


def test_a_module_beside_the_model_is_compared_too(tmp_path):
    def change(trainer):
        trainer.projection.weight[0, 0] += 1

    for name, callbacks in (("a", ()), ("b", [Changes(10, change)])):
        trainer = momentum_trainer(tmp_path / name, *callbacks, trainer_class=WithProjection)
        trainer.train(tiny_data(), 2)
    found = compare_runs(tmp_path / "a", tmp_path / "b")
    assert (found.first_difference, found.last_equal, found.differing) == (10, 5, ["projection.weight"])


def test_a_setting_that_only_one_version_of_torch_keeps_does_not_count(tmp_path):
    def keep_more(trainer):
        trainer.optimizer.param_groups[0]["of_a_newer_torch"] = True

    momentum_trainer(tmp_path / "a").train(tiny_data(), 2)
    momentum_trainer(tmp_path / "b", Changes(1, keep_more)).train(tiny_data(), 2)
    assert str(compare_runs(tmp_path / "a", tmp_path / "b")) == "equal"
