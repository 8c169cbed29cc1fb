"""Several calls of `train`: the order of the data goes on, a kept history counts on, stages resume exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from accel_callbacks import SaveBestModelCallback, SaveTrainingStateCallback, find_learning_rate
from accel_core import (
    AccelWarning,
    CheckpointError,
    ConfigurationError,
    Trainer,
    TrainerCallback,
    TrainerPlaceholderValues,
    latest_checkpoint,
)
from accel_core.data.order import random_order
from tiny import ONE_CYCLE, Rates, SaveAt, Seen, Stream, tiny_data, tiny_network, tiny_trainer, weights_of

NUMBERS = TensorDataset(*[torch.arange(12.0, dtype=torch.float64)[:, None]] * 2)


class Orders(TrainerCallback):
    """Keeps the samples of each epoch, in their order."""

    def __init__(self) -> None:
        self.of_epochs: list[list[int]] = []

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        self.of_epochs.append([])

    def on_train_step_start(self, trainer: Trainer, batch: Any) -> None:
        self.of_epochs[-1] += [int(number) for number in batch[0].flatten()]


def counting_trainer(*callbacks: Any, seed: int | None = 3) -> Trainer:
    """A trainer that learns nothing, to look at its data."""
    return tiny_trainer(
        callbacks=callbacks, model=nn.Linear(1, 1).double(), loss_func=nn.MSELoss(), lr=0.0, seed=seed
    )


def orders_of(*order_epochs: int, seed: int = 3, size: int = 12) -> list[list[int]]:
    return [random_order(size, seed, epoch).tolist() for epoch in order_epochs]


# ---------------------------------------------------------------------- the order of the data


@pytest.mark.parametrize("keep", [True, False])
def test_each_call_goes_on_with_the_order_of_the_data(keep: bool) -> None:
    orders = Orders()
    trainer = counting_trainer(orders)
    for _ in range(3):
        trainer.train(NUMBERS, num_epochs=2, per_device_batch_size=5, reset_run_history=not keep)
    assert orders.of_epochs == orders_of(0, 1, 2, 3, 4, 5)
    assert trainer.run_progress.order_epoch == 6


def test_evaluations_predictions_and_finders_do_not_move_the_order() -> None:
    orders = Orders()
    trainer = counting_trainer(orders)
    trainer.train(NUMBERS, num_epochs=1, eval_dataset=NUMBERS)
    trainer.evaluate(NUMBERS)
    trainer.predict(NUMBERS)
    find_learning_rate(trainer, NUMBERS, per_device_batch_size=4, num_updates=5)
    trainer.train(NUMBERS, num_epochs=1, eval_dataset=NUMBERS)
    assert orders.of_epochs == orders_of(0, 1)


def test_an_epoch_that_a_limit_a_stop_or_an_error_cut_short_has_begun() -> None:
    class Breaks(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            if trainer.run_progress.updates_completed == 1 and breaking:
                raise KeyboardInterrupt

    breaking = False
    orders = Orders()
    trainer = counting_trainer(orders, Breaks())
    trainer.train(NUMBERS, max_num_train_steps=2, per_device_batch_size=4)
    breaking = True
    with pytest.raises(KeyboardInterrupt):
        trainer.train(NUMBERS, num_epochs=1, per_device_batch_size=4)
    breaking = False
    trainer.train(NUMBERS, num_epochs=1, per_device_batch_size=4)
    first, second, third = orders_of(0, 1, 2)
    assert orders.of_epochs == [first[:8], second[:4], third]


def test_a_run_that_failed_before_its_first_update_was_never_begun() -> None:
    class Fails(TrainerCallback):
        fails = False

        def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
            if self.fails:
                raise ValueError("broken")

    orders, failing = Orders(), Fails()
    trainer = counting_trainer(failing, orders)
    trainer.train(NUMBERS, num_epochs=1)
    run_id, progress = trainer.run_id, trainer.run_progress
    failing.fails = True
    for keep in (True, False):
        with pytest.raises(ValueError, match="broken"):
            trainer.train(NUMBERS, num_epochs=1, reset_run_history=not keep)
        assert (trainer.run_id, trainer.run_progress) == (run_id, progress)
    failing.fails = False
    trainer.train(NUMBERS, num_epochs=1, reset_run_history=False)
    assert (trainer.run_id, trainer.run_progress.stage) == (run_id, 2)
    assert orders.of_epochs[-1] == orders_of(1)[0]


class Drawn(Dataset[Any]):
    """Samples of random numbers, and what `set_epoch` was given."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        self.drawn.append(float(torch.rand(1)))
        return torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)


def test_samplers_streams_and_seeds_of_samples_get_the_order_epoch() -> None:
    class Told(Stream):
        def __init__(self) -> None:
            super().__init__(NUMBERS)
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    stream, drawn = Told(), Drawn()
    trainer = counting_trainer()
    trainer.train(stream, num_epochs=2)
    trainer.train(stream, num_epochs=2)
    assert stream.epochs == [0, 1, 2, 3]
    trainer = counting_trainer()
    for _ in range(2):
        trainer.train(drawn, num_epochs=1, seed_each_sample=True, train_dataloader_kwargs={"num_workers": 0})
    assert len(set(drawn.drawn)) == 8


# ---------------------------------------------------------------------- a kept history


def test_a_kept_history_counts_on() -> None:
    class Epochs(TrainerCallback):
        seen: list[tuple[int, int]] = []  # noqa: RUF012

        def on_train_epoch_start(self, trainer: Trainer) -> None:
            self.seen.append((trainer.run_history.current_epoch, trainer.run_progress.current_epoch))

    trainer = tiny_trainer(callbacks=[Epochs()])
    trainer.train(tiny_data(16), num_epochs=2)
    run_id = trainer.run_id
    trainer.train(tiny_data(16), num_epochs=3, reset_run_history=False)
    records = [(record["epoch"], record["update"]) for record in trainer.run_history.to_records()]
    assert records == [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]
    assert Epochs.seen == [(epoch, epoch) for epoch in range(1, 6)]
    assert trainer.run_id == run_id
    progress = trainer.run_progress
    assert (progress.stage, progress.epochs_before_stage, progress.updates_before_stage) == (2, 2, 4)


def test_both_limits_count_from_the_beginning_of_the_call() -> None:
    trainer = tiny_trainer()
    trainer.train(tiny_data(16), max_num_train_steps=3)
    trainer.train(tiny_data(16), max_num_train_steps=3, reset_run_history=False)
    assert trainer.run_progress.updates_completed == 6
    records = [(record["epoch"], record["update"]) for record in trainer.run_history.to_records()]
    # The second and the fourth epoch are cut by the limit, and have a number of their own.
    assert records == [(1, 2), (2, 3), (3, 5), (4, 6)]
    assert trainer.run_config.num_update_steps == 3


def test_a_schedule_is_that_of_the_call() -> None:
    rates = Rates()
    trainer = tiny_trainer(callbacks=[rates])
    for _ in range(2):
        trainer.train(tiny_data(16), num_epochs=2, create_scheduler_fn=ONE_CYCLE, reset_run_history=False)
    assert rates.of_first_group[:4] == rates.of_first_group[4:]


def test_a_reset_history_begins_a_new_run() -> None:
    trainer = tiny_trainer()
    trainer.train(tiny_data(16), num_epochs=2)
    run_id = trainer.run_id
    trainer.train(tiny_data(16), num_epochs=1)
    assert trainer.run_id != run_id
    assert trainer.run_progress.stage == 1
    assert [(record["epoch"], record["update"]) for record in trainer.run_history.to_records()] == [(1, 2)]


def test_a_saver_refuses_the_folder_of_the_run_before_before_the_first_update(tmp_path: Path) -> None:
    class Updates(TrainerCallback):
        number = 0

        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            self.number += 1

    updates = Updates()
    trainer = tiny_trainer(callbacks=[updates, SaveTrainingStateCallback(tmp_path)])
    trainer.train(tiny_data(16), num_epochs=1)
    weights = weights_of(trainer).clone()
    with pytest.raises(CheckpointError, match=r"reset_run_history=False"):
        trainer.train(tiny_data(16), num_epochs=1)
    assert updates.number == 2
    assert torch.equal(weights_of(trainer), weights)
    trainer.train(tiny_data(16), num_epochs=1, reset_run_history=False)  # The way out that was named.
    assert trainer.run_progress.updates_completed == 4
    assert sorted(path.name for path in tmp_path.glob("update_*")) == ["update_00000002", "update_00000004"]


# ---------------------------------------------------------------------- stages and resume_from


class Killed(BaseException):
    """Stands for the end of the process."""


class KilledAt(TrainerCallback):
    """Ends the process after an update that is counted in this life."""

    def __init__(self, update: int | None, order: int) -> None:
        self.update, self.order = update, order  # type: ignore[misc]
        self.made = 0

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self.made += 1
        if self.made == self.update:
            raise Killed


def network_with_dropout() -> nn.Module:
    network = tiny_network()
    return nn.Sequential(network[0], nn.Dropout(0.3), *network[1:])  # type: ignore[index]


class Script:
    """A script of several stages, each of which thaws more of the model; a life of it may be killed."""

    def __init__(self, folder: Path, stages: list[dict[str, Any]], every: int, with_best: bool) -> None:
        self.folder, self.stages, self.every, self.with_best = folder, stages, every, with_best

    def live(self, life: int, killed_at: int | None = None, order: int = 0) -> tuple[Trainer, list[float]]:
        """Run the script from its beginning, as a new process does."""
        torch.manual_seed(1000 + life)
        model = network_with_dropout()
        model[0].requires_grad_(False)  # type: ignore[index]
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        seen = Seen()
        saver = SaveTrainingStateCallback(
            self.folder / "states", save_every_n_updates=self.every, keep_last=2
        )
        best = SaveBestModelCallback(
            self.folder / "best.pt", watch_metric="train_loss_epoch", greater_is_better=True
        )
        callbacks = [seen, KilledAt(killed_at, order), saver, *([best] if self.with_best else [])]
        trainer = Trainer(model, nn.functional.cross_entropy, optimizer, callbacks=callbacks, seed=5)
        resume_from = latest_checkpoint(self.folder / "states")
        for number, arguments in enumerate(self.stages):
            trainer.train(
                tiny_data(13 + 4 * number),
                per_device_batch_size=4,
                create_scheduler_fn=ONE_CYCLE,
                reset_run_history=number == 0,
                resume_from=resume_from,
                **arguments,
            )
            model[0].requires_grad_(True)  # type: ignore[index]
        return trainer, seen.samples


def assert_same_end(trainer: Trainer, expected: Trainer) -> None:
    assert torch.equal(weights_of(trainer), weights_of(expected))
    assert trainer.run_history.to_records() == expected.run_history.to_records()
    assert trainer.run_progress == expected.run_progress
    assert trainer.optimizer.state_dict()["param_groups"] == expected.optimizer.state_dict()["param_groups"]


STAGE = st.one_of(
    st.integers(1, 3).map(lambda number: {"num_epochs": number}),
    st.integers(1, 7).map(lambda number: {"max_num_train_steps": number}),
    st.tuples(st.integers(1, 3), st.integers(1, 3)).map(
        lambda both: {"num_epochs": both[0], "gradient_accumulation_steps": both[1]}
    ),
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stages=st.lists(STAGE, min_size=2, max_size=3),
    kills=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0, 2000])), min_size=1, max_size=3),
    every=st.integers(1, 9),
    with_best=st.booleans(),
)
def test_a_script_of_stages_that_is_killed_anywhere_ends_with_the_same_bits(
    stages: Any, kills: Any, every: int, with_best: bool, tmp_path_factory: Any
) -> None:
    expected, _ = Script(tmp_path_factory.mktemp("whole"), stages, every, with_best).live(0)
    killed = Script(tmp_path_factory.mktemp("killed"), stages, every, with_best)
    for life, (update, order) in enumerate(kills):
        try:
            killed.live(life, update, order)
        except Killed:
            continue
    trainer, _ = killed.live(9)
    assert_same_end(trainer, expected)


def two_stages(folder: Path, *callbacks: Any, resume_from: Any = None) -> tuple[Trainer, list[int]]:
    """Train in two stages, and return how many updates each of them made."""
    counter = KilledAt(None, 0)
    trainer = tiny_trainer(callbacks=[counter, *callbacks])
    made = []
    for keep in (False, True):
        trainer.train(tiny_data(16), num_epochs=2, reset_run_history=not keep, resume_from=resume_from)
        made.append(counter.made - sum(made))
    return trainer, made


def test_resumed_from_a_later_stage_a_call_does_nothing_and_prints_it(tmp_path: Path, capsys: Any) -> None:
    whole, _ = two_stages(tmp_path, SaveAt(6, tmp_path / "state"))
    capsys.readouterr()
    resumed, made = two_stages(tmp_path, resume_from=tmp_path / "state")
    assert made == [0, 2]
    assert "stage 2" in capsys.readouterr().out
    assert_same_end(resumed, whole)


def test_resumed_from_the_finished_stage_before_a_call_begins_its_own(tmp_path: Path) -> None:
    class SaveAtEndOfFirst(TrainerCallback):
        def on_training_run_end(self, trainer: Trainer) -> None:
            if trainer.run_progress.stage == 1:
                trainer.save_training_state(tmp_path / "state")

    whole, _ = two_stages(tmp_path, SaveAtEndOfFirst())
    resumed, made = two_stages(tmp_path, resume_from=tmp_path / "state")
    assert made == [0, 4]
    assert_same_end(resumed, whole)


def test_resumed_from_the_middle_of_the_first_stage_both_calls_train(tmp_path: Path) -> None:
    whole, _ = two_stages(tmp_path, SaveAt(3, tmp_path / "state"))
    resumed, made = two_stages(tmp_path, resume_from=tmp_path / "state")
    assert made == [1, 4]
    assert_same_end(resumed, whole)


def test_after_a_skipped_stage_its_history_is_there_and_no_export_is_replaced(
    tmp_path: Path,
) -> None:
    trainer = tiny_trainer(callbacks=[SaveAt(6, tmp_path / "state")])
    trainer.train(tiny_data(16), num_epochs=2)
    records = trainer.run_history.to_records()
    trainer.save_checkpoint(tmp_path / "first.pt")
    before = (tmp_path / "first.pt").read_bytes()
    trainer.train(tiny_data(16), num_epochs=2, reset_run_history=False)

    resumed = tiny_trainer()
    history = resumed.train(tiny_data(16), num_epochs=2, resume_from=tmp_path / "state")
    assert history.to_records() == records
    assert resumed.run_progress.stage_skipped
    with pytest.warns(AccelWarning, match=r"first\.pt.*stage 1"):
        resumed.save_checkpoint(tmp_path / "first.pt")
    assert (tmp_path / "first.pt").read_bytes() == before
    resumed.train(tiny_data(16), num_epochs=2, reset_run_history=False, resume_from=tmp_path / "state")
    assert not resumed.run_progress.stage_skipped
    assert torch.equal(weights_of(resumed), weights_of(trainer))


def test_after_a_stage_that_was_skipped_the_next_call_needs_the_state_too(tmp_path: Path) -> None:
    two_stages(tmp_path, SaveAt(6, tmp_path / "state"))
    trainer = tiny_trainer()
    trainer.train(tiny_data(16), num_epochs=2, resume_from=tmp_path / "state")
    weights = weights_of(trainer).clone()
    for keep in (True, False):
        with pytest.raises(ConfigurationError, match=r"resume_from is None.*same resume_from"):
            trainer.train(tiny_data(16), num_epochs=2, reset_run_history=not keep)
    assert torch.equal(weights_of(trainer), weights)


def test_a_later_stage_refuses_a_state_of_another_run(tmp_path: Path) -> None:
    two_stages(tmp_path, SaveAt(3, tmp_path / "state"))
    trainer = tiny_trainer()
    trainer.train(tiny_data(16), num_epochs=1)
    with pytest.raises(ConfigurationError, match=r"stage 1.*stage 2.*another run"):
        trainer.train(tiny_data(16), num_epochs=2, reset_run_history=False, resume_from=tmp_path / "state")


def test_a_trainer_goes_back_to_a_state_of_its_first_stage(tmp_path: Path) -> None:
    trainer, _ = two_stages(tmp_path, SaveAt(3, tmp_path / "state"))
    trainer.callbacks.clear_callbacks()
    trainer.train(tiny_data(16), num_epochs=2, resume_from=tmp_path / "state")
    assert (trainer.run_progress.stage, trainer.run_progress.updates_completed) == (1, 4)


def test_the_newest_state_is_that_of_the_later_stage(tmp_path: Path) -> None:
    class SaveBoth(TrainerCallback):
        def on_training_run_end(self, trainer: Trainer) -> None:
            trainer.save_training_state(tmp_path / f"z_end_of_{trainer.run_progress.stage}")

        def on_training_run_start(self, trainer: Trainer) -> None:
            trainer.save_training_state(tmp_path / f"a_start_of_{trainer.run_progress.stage}")

    trainer = tiny_trainer(callbacks=[SaveBoth()])
    trainer.train(tiny_data(16), max_num_train_steps=3)
    assert latest_checkpoint(tmp_path) == tmp_path / "z_end_of_1"
    trainer.callbacks.clear_callbacks()
    trainer.callbacks.add_callback(SaveBoth())
    trainer.train(tiny_data(16), max_num_train_steps=1, reset_run_history=False)
    assert latest_checkpoint(tmp_path) == tmp_path / "z_end_of_2"


def test_placeholders_and_limits_of_a_resumed_stage_are_those_of_its_call(tmp_path: Path) -> None:
    def run(resume_from: Any, *callbacks: Any) -> Trainer:
        trainer = tiny_trainer(callbacks=callbacks)
        for number in (1, 3):
            trainer.train(
                tiny_data(16),
                num_epochs=number,
                create_scheduler_fn=ONE_CYCLE,
                reset_run_history=number == 1,
                resume_from=resume_from,
            )
        return trainer

    whole_rates, rates = Rates(), Rates()
    whole = run(None, SaveAt(5, tmp_path / "state"), whole_rates)
    resumed = run(tmp_path / "state", rates)
    assert whole.run_config.num_update_steps == resumed.run_config.num_update_steps == 6
    assert whole_rates.rates[5:] == rates.rates
    assert TrainerPlaceholderValues.NUM_UPDATE_STEPS.calculate(resumed.run_config) == 6
    assert_same_end(resumed, whole)
