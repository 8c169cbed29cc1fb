"""What a user of `Trainer` can rely on: own objects, limits, clipping, schedules, stops, and errors that leave it usable."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from accel_core import AccelWarning, ConfigurationError, Trainer, TrainerCallback
from accel_core.run.run_progress import RunProgress
from tiny import Rates, largest_difference, tiny_data, tiny_network, tiny_trainer, weights_of

# ---------------------------------------------------------------------- the user's own objects


def test_model_and_optimizer_are_the_users_own_before_and_after_every_run() -> None:
    trainer = tiny_trainer()
    model, optimizer = trainer.model, trainer.optimizer
    for run in (
        lambda: trainer.train(tiny_data(), num_epochs=1),
        lambda: trainer.evaluate(tiny_data()),
        lambda: trainer.predict(tiny_data()),
    ):
        run()
        assert trainer.model is model and trainer.optimizer is optimizer
        assert trainer.get_model() is model


def test_a_trainer_without_optimizer_evaluates_and_does_not_train() -> None:
    trainer = Trainer(tiny_network(), nn.functional.cross_entropy, None, callbacks=[])
    assert set(trainer.evaluate(tiny_data())) == {"evaluation_loss"}
    with pytest.raises(ConfigurationError, match=r"optimizer is None.*Pass an optimizer.*evaluate"):
        trainer.train(tiny_data(), num_epochs=1)


def test_parts_are_prepared_once_and_again_where_the_model_was_exchanged() -> None:
    prepared: list[nn.Module] = []

    class Preparing(TrainerCallback):
        def on_prepare_start(self, trainer: Trainer) -> None:
            prepared.append(trainer.model)

    trainer = tiny_trainer(callbacks=[Preparing()])
    first, second = trainer.model, tiny_network()
    trainer.train(tiny_data(), num_epochs=1)
    trainer.evaluate(tiny_data())
    trainer.model, trainer.optimizer = second, torch.optim.SGD(second.parameters(), lr=0.1)
    trainer.run_progress = RunProgress()  # Else the order of the data goes on.
    trainer.train(tiny_data(), num_epochs=1)
    assert prepared == [first, second]
    assert trainer.model is second
    assert largest_difference(trainer, tiny_trainer(model=first)) == 0.0, (
        "both learned the same from the same start"
    )


def test_a_model_that_was_exchanged_stays_where_the_next_run_fails_at_once() -> None:
    class Failing(TrainerCallback):
        def on_prepare_start(self, trainer: Trainer) -> None:
            raise ValueError("broken")

    trainer = tiny_trainer()
    trainer.train(tiny_data(), num_epochs=1)
    other = tiny_network()
    trainer.model, trainer.optimizer = other, torch.optim.SGD(other.parameters(), lr=0.1)
    trainer.callbacks.add_callback(Failing)
    with pytest.raises(ValueError, match="broken"):
        trainer.train(tiny_data(), num_epochs=1)
    assert trainer.model is other


def test_a_model_that_a_callback_puts_in_place_is_the_one_that_is_trained_and_kept() -> None:
    replaced = tiny_network()

    class Replacing(TrainerCallback):
        def on_prepare_start(self, trainer: Trainer) -> None:
            trainer.model = replaced
            trainer.optimizer = torch.optim.SGD(replaced.parameters(), lr=0.1)

    trainer = tiny_trainer(callbacks=[Replacing])
    trainer.train(tiny_data(), num_epochs=1)
    assert trainer.model is replaced
    assert not torch.equal(weights_of(trainer), weights_of(tiny_trainer()))


def test_the_users_accelerator_is_used_and_none_is_made() -> None:
    class Never(Trainer):
        def create_accelerator(self) -> Accelerator:
            raise AssertionError("there is one already")

    accelerator = Accelerator(cpu=True)
    trainer = tiny_trainer(Never, accelerator=accelerator)
    trainer.train(tiny_data(), num_epochs=1)
    assert trainer.accelerator is accelerator


def test_an_accelerator_is_made_when_it_is_first_needed_and_only_once() -> None:
    made: list[Accelerator] = []

    class Making(Trainer):
        def create_accelerator(self) -> Accelerator:
            made.append(Accelerator(cpu=True))
            return made[-1]

    trainer = tiny_trainer(Making)
    assert made == []
    trainer.train(tiny_data(), num_epochs=1)
    trainer.evaluate(tiny_data())
    assert made == [trainer.accelerator]


def test_more_than_the_model_can_be_prepared() -> None:
    class Distilling(Trainer):
        def __init__(self, *args: Any, teacher: nn.Module, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.teacher = teacher

        def prepare(self) -> None:
            super().prepare()
            self.teacher = self.accelerator.prepare_model(self.teacher, evaluation_mode=True)
            self.has_prepared = True

        def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
            outputs = self.model(batch[0])
            loss = nn.functional.mse_loss(outputs, self.teacher(batch[0]).detach())
            return {"loss": loss, "model_outputs": outputs, "batch_size": len(outputs)}

    student = nn.Linear(5, 2).double()
    trainer = tiny_trainer(Distilling, model=student, loss_func=None, teacher=tiny_network())
    losses = trainer.train(tiny_data(), num_epochs=5).get_metric_values("train_loss_epoch")
    assert trainer.has_prepared  # type: ignore[attr-defined]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_model_compiled_by_inductor_trains_and_evaluates_like_the_plain_one() -> None:
    model = tiny_network()
    compiled = tiny_trainer(model=torch.compile(model))  # type: ignore[arg-type]
    plain = tiny_trainer()
    for trainer in (compiled, plain):
        trainer.train(tiny_data(32), num_epochs=2, eval_dataset=tiny_data(8), gradient_accumulation_steps=2)
    assert largest_difference(compiled, plain) < 1e-12
    names = compiled.run_history.get_metric_names()
    assert all(
        compiled.run_history.get_latest_metric(n) == pytest.approx(plain.run_history.get_latest_metric(n))
        for n in names
    )
    assert compiled.get_model(keep_torch_compile=False) is model
    assert not any(
        name.startswith("_orig_mod") for name in compiled.get_model(keep_torch_compile=False).state_dict()
    )


def test_print_and_gather_work_on_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer()
    trainer.print("two", 2, sep="-")
    assert capsys.readouterr().out == "two-2\n"
    assert trainer.is_main_process
    assert torch.equal(trainer.gather(torch.tensor([[1, 2], [3, 4]])), torch.tensor([[1, 2], [3, 4]]))
    assert torch.equal(trainer.gather(torch.tensor(5.0)), torch.tensor([5.0]))


# ---------------------------------------------------------------------- overriding


def test_the_verbs_of_a_step_can_be_overridden() -> None:
    """Sign descent with gradients of half the size, written by overriding two methods."""

    class Own(Trainer):
        def backward_step(self, loss: torch.Tensor) -> None:
            super().backward_step(loss * 0.5)

        def optimizer_step(self) -> None:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    assert parameter.grad is not None
                    parameter -= 0.01 * parameter.grad.sign()

    trainer = tiny_trainer(Own)
    before = weights_of(trainer)
    trainer.train(tiny_data(), max_num_train_steps=1)
    assert (weights_of(trainer) - before).abs().tolist() == pytest.approx([0.01] * len(before))


def test_what_stays_in_eval_mode_in_training_is_so_again_after_each_evaluation() -> None:
    modes: list[bool] = []

    class FrozenStatistics(Trainer):
        def train_epoch_start(self) -> None:
            super().train_epoch_start()
            self.model[1].eval()  # type: ignore[index]

        def backward_step(self, loss: torch.Tensor) -> None:
            modes.append(self.model[1].training)  # type: ignore[index]
            super().backward_step(loss)

        def optimizer_zero_grad(self) -> None:
            super().optimizer_zero_grad()
            self.run_eval_epoch(metric_prefix="intermediate_eval", is_intermediate=True)

    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    trainer = tiny_trainer(FrozenStatistics, model=model)
    trainer.train(tiny_data(), num_epochs=2, eval_dataset=tiny_data(5))
    assert set(modes) == {False}
    assert model[1].num_batches_tracked == 0


def test_what_is_recorded_at_the_end_of_an_evaluation_is_named_after_the_evaluation() -> None:
    class Recording(Trainer):
        def eval_epoch_end(self) -> None:
            self.run_history.update_metric("accuracy", 0.5)

    class Evaluating(TrainerCallback):
        def on_training_run_epoch_end(self, trainer: Trainer) -> None:
            trainer.run_eval_epoch(metric_prefix="intermediate_eval", is_intermediate=True)
            trainer.run_eval_epoch(metric_prefix="ema_model_eval")

        def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
            trainer.run_history.update_metric("recall", 0.4)

    trainer = tiny_trainer(Recording, callbacks=[Evaluating])
    history = trainer.train(tiny_data(), num_epochs=2, eval_dataset=tiny_data(5))
    names = {
        f"{prefix}{name}" for prefix in ("", "intermediate_", "ema_model_") for name in ("accuracy", "recall")
    }
    assert {name: len(history.get_metric_values(name)) for name in names} == dict.fromkeys(names, 2)
    assert trainer.evaluate().keys() == {"evaluation_loss", "evaluation_accuracy", "evaluation_recall"}


def test_an_evaluation_in_mid_epoch_changes_nothing_about_training() -> None:
    class Evaluating(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            trainer.run_eval_epoch(metric_prefix="intermediate_eval", is_intermediate=True)

    def train(*callbacks: TrainerCallback) -> Trainer:
        model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(5).double(), tiny_network())
        trainer = tiny_trainer(callbacks=callbacks, model=model)
        shuffled = {"shuffle": True}
        trainer.train(tiny_data(), num_epochs=2, eval_dataset=tiny_data(13), eval_dataloader_kwargs=shuffled)
        return trainer

    assert torch.equal(weights_of(train(Evaluating())), weights_of(train()))


class EvaluatesTwice(TrainerCallback):
    """Evaluates after each epoch what `arguments` say, and keeps which model and loss tracker the events saw."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.seen: list[Any] = []

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        trainer.run_eval_epoch(metric_prefix="ema_model_eval", **self.arguments)

    def on_eval_epoch_start(self, trainer: Trainer, metric_prefix: str, **kwargs: Any) -> None:
        if metric_prefix == "ema_model_eval":
            self.seen.append(
                (trainer.model, trainer.eval_loss, trainer.model.training, torch.is_grad_enabled())
            )


@pytest.mark.parametrize("kind", ["data set", "loader", "sharded loader"])
def test_an_evaluation_may_have_data_of_its_own(kind: str) -> None:
    data = tiny_data(29)

    class Evaluating(EvaluatesTwice):
        def on_training_run_epoch_end(self, trainer: Trainer) -> None:
            dataset = {
                "data set": data,
                "loader": DataLoader(data, batch_size=5),
                "sharded loader": trainer.train_dataloader,
            }
            trainer.run_eval_epoch(dataset[kind], metric_prefix="ema_model_eval")

    trainer = tiny_trainer(callbacks=[Evaluating()])
    trainer.train(data, num_epochs=1, eval_dataset=tiny_data(5))
    expected = tiny_trainer(model=trainer.model).evaluate(data)["evaluation_loss"]
    assert trainer.run_history.get_latest_metric("ema_model_eval_loss_epoch") == pytest.approx(
        expected, rel=1e-12
    )
    assert len(trainer.eval_dataset) == 5


def test_an_evaluation_may_have_a_model_of_its_own_in_place_of_the_trainers() -> None:
    model = tiny_network()
    callback = EvaluatesTwice(model=model)
    trainer = tiny_trainer(callbacks=[callback])
    history = trainer.train(tiny_data(), num_epochs=2, eval_dataset=tiny_data(5))
    expected = tiny_trainer(model=model).evaluate(tiny_data(5))["evaluation_loss"]
    assert history.get_metric_values("ema_model_eval_loss_epoch") == [expected, expected]
    for seen_model, eval_loss, training, has_gradients in callback.seen:
        assert seen_model is model and seen_model is not trainer.model
        assert eval_loss is not trainer.eval_loss
        assert not training and not has_gradients
    assert model.training, "each module is back in its mode"
    assert trainer.eval_loss.average == history.get_latest_metric("eval_loss_epoch")


def test_the_former_name_of_the_data_of_an_evaluation_still_works_and_warns() -> None:
    class Evaluating(TrainerCallback):
        def on_training_run_epoch_end(self, trainer: Trainer) -> None:
            trainer.run_eval_epoch(dataloader=trainer.train_dataloader, metric_prefix="ema_model_eval")

    trainer = tiny_trainer(callbacks=[Evaluating()])
    with pytest.warns(AccelWarning, match="run_eval_epoch was called with dataloader.*Pass dataset="):
        trainer.train(tiny_data(), num_epochs=1)
    assert trainer.run_history.get_metric_values("ema_model_eval_loss_epoch")


def test_a_loss_function_is_not_needed_where_the_loss_steps_are_overridden() -> None:
    class Own(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
            outputs = self.model(batch[0])
            return {
                "loss": nn.functional.cross_entropy(outputs, batch[1]),
                "model_outputs": outputs,
                "batch_size": len(outputs),
            }

    trainer = tiny_trainer(Own, loss_func=None)
    assert trainer.train(tiny_data(), num_epochs=1).get_metric_names() == {"train_loss_epoch"}
    updates = trainer.run_progress.updates_completed
    with pytest.raises(
        ConfigurationError,
        match=r"loss_func is None.*Pass a loss function.*override calculate_eval_batch_loss",
    ):
        trainer.train(tiny_data(), num_epochs=1, eval_dataset=tiny_data())
    assert trainer.run_progress.updates_completed == updates, "it was noticed before training"


# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("limits", "updates", "epochs"),
    [
        ({"num_epochs": 2}, 10, 2),
        ({"max_num_train_steps": 5}, 5, 1),
        ({"max_num_train_steps": 7}, 7, 1),
        ({"num_epochs": 2, "max_num_train_steps": 3}, 3, 0),
        ({"num_epochs": 2, "max_num_train_steps": 10}, 10, 2),
        ({"num_epochs": 2, "max_num_train_steps": 99}, 10, 2),
    ],
)
def test_the_smaller_limit_ends_the_run(limits: dict[str, int], updates: int, epochs: int) -> None:
    trainer = tiny_trainer()
    history = trainer.train(tiny_data(), per_device_batch_size=8, eval_dataset=tiny_data(5), **limits)  # type: ignore[arg-type]
    progress = trainer.run_progress
    assert (progress.updates_completed, progress.epochs_completed) == (updates, epochs)
    assert trainer.stop_reason is None
    for name in ("train_loss_epoch", "eval_loss_epoch"):
        assert len(history.get_metric_values(name)) == math.ceil(updates / 5), (
            "a cut epoch is closed and evaluated"
        )


def test_limits_count_updates_and_not_batches() -> None:
    trainer = tiny_trainer()
    trainer.train(tiny_data(), max_num_train_steps=4, per_device_batch_size=2, gradient_accumulation_steps=3)
    assert trainer.run_progress.updates_completed == 4
    assert trainer.run_progress.samples_completed_in_epoch == 24


# ---------------------------------------------------------------------- clipping


class Gradients(TrainerCallback):
    """Keeps the gradient of each update as it is before clipping, and what the optimizer made of it."""

    def __init__(self) -> None:
        self.raw: list[torch.Tensor] = []
        self.used: list[torch.Tensor] = []

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        self.raw.append(
            torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]).clone()
        )  # type: ignore[union-attr]
        self.before = weights_of(trainer)

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self.used.append(self.before - weights_of(trainer))


ACCUMULATING = {"num_epochs": 1, "per_device_batch_size": 4, "gradient_accumulation_steps": 3}


def test_the_norm_that_is_clipped_is_that_of_the_whole_update() -> None:
    gradients = Gradients()
    tiny_trainer(callbacks=[gradients], lr=1.0).train(tiny_data(), gradient_clip_norm=0.1, **ACCUMULATING)  # type: ignore[arg-type]
    assert len(gradients.raw) == 4
    for raw, used in zip(gradients.raw, gradients.used, strict=True):
        assert raw.norm() > 0.1
        assert torch.allclose(used, raw * (0.1 / raw.norm()), rtol=1e-4)


def test_values_are_clipped_before_the_norm_and_gradients_within_the_limits_stay() -> None:
    both, loose = Gradients(), Gradients()
    arguments = {"gradient_clip_value": 0.05, "gradient_clip_norm": 0.1, **ACCUMULATING}
    tiny_trainer(callbacks=[both], lr=1.0).train(tiny_data(), **arguments)  # type: ignore[arg-type]
    for raw, used in zip(both.raw, both.used, strict=True):
        clipped = raw.clamp(-0.05, 0.05)
        assert torch.allclose(used, clipped * min(1.0, 0.1 / float(clipped.norm())), rtol=1e-4)
    arguments = {"gradient_clip_value": 100.0, "gradient_clip_norm": 100.0, **ACCUMULATING}
    tiny_trainer(callbacks=[loose], lr=1.0).train(tiny_data(), **arguments)  # type: ignore[arg-type]
    assert all(torch.allclose(raw, used, rtol=1e-9) for raw, used in zip(loose.raw, loose.used, strict=True))


# ---------------------------------------------------------------------- schedules


def harmonic(optimizer: Any) -> LambdaLR:
    return LambdaLR(optimizer, lambda number: 1 / (number + 1))


def test_a_schedule_by_update_steps_once_an_update_under_accumulation() -> None:
    rates = Rates()
    trainer = tiny_trainer(callbacks=[rates])
    trainer.train(
        tiny_data(),
        num_epochs=2,
        per_device_batch_size=4,
        gradient_accumulation_steps=3,
        create_scheduler_fn=harmonic,
    )
    assert rates.of_first_group == pytest.approx([0.1 / n for n in range(1, 9)])
    assert trainer.scheduler.last_epoch == 8


def test_a_schedule_by_epoch_steps_after_the_evaluation_of_a_complete_epoch_only() -> None:
    rates = Rates()
    stepped_at: list[tuple[int, bool]] = []

    class Watching(Trainer):
        def scheduler_step(self) -> None:
            stepped_at.append((self.run_progress.updates_completed, self.run_progress.eval_epoch_completed))
            super().scheduler_step()

    trainer = tiny_trainer(Watching, callbacks=[rates])
    arguments = {
        "create_scheduler_fn": harmonic,
        "scheduler_step_every": "epoch",
        "eval_dataset": tiny_data(5),
    }
    trainer.train(tiny_data(), max_num_train_steps=12, per_device_batch_size=8, **arguments)  # type: ignore[arg-type]
    assert stepped_at == [(5, True), (10, True)]
    assert rates.of_first_group == pytest.approx([0.1] * 5 + [0.05] * 5 + [0.1 / 3] * 2)


def test_a_plateau_schedule_is_given_the_metric_that_was_named() -> None:
    given: list[float] = []

    class Watching(ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: Any = None) -> None:
            given.append(metrics)
            super().step(metrics)

    class Accuracy(TrainerCallback):
        def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
            trainer.run_history.update_metric("accuracy", 0.25 * trainer.run_progress.current_epoch)

    arguments = {"num_epochs": 3, "eval_dataset": tiny_data(5)}
    plateau = partial(Watching, mode="max")
    trainer = tiny_trainer(callbacks=[Accuracy])
    trainer.train(tiny_data(), create_scheduler_fn=plateau, scheduler_metric="accuracy", **arguments)  # type: ignore[arg-type]
    assert given == [0.25, 0.5, 0.75]
    given.clear()
    history = tiny_trainer().train(tiny_data(), create_scheduler_fn=plateau, **arguments)  # type: ignore[arg-type]
    assert given == history.get_metric_values("eval_loss_epoch")


def test_an_update_that_a_gradient_scaler_skips_is_counted_and_steps_no_scheduler() -> None:
    class Scaling(Trainer):
        def create_accelerator(self) -> Accelerator:
            accelerator = Accelerator(cpu=True)
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            return accelerator

        def backward_step(self, loss: torch.Tensor) -> None:
            super().backward_step(loss * float("inf") if self.run_progress.updates_completed == 2 else loss)

    rates, plain = Rates(), tiny_trainer()
    trainer = tiny_trainer(Scaling, callbacks=[rates])
    trainer.train(tiny_data(), num_epochs=1, per_device_batch_size=8, create_scheduler_fn=harmonic)
    assert (trainer.run_progress.updates_completed, trainer.run_progress.updates_skipped) == (5, 1)
    assert rates.of_first_group == pytest.approx([0.1, 0.1 / 2, 0.1 / 3, 0.1 / 3, 0.1 / 4])
    plain.train(tiny_data(), max_num_train_steps=2, per_device_batch_size=8, create_scheduler_fn=harmonic)
    trainer = tiny_trainer(Scaling)
    trainer.train(tiny_data(), max_num_train_steps=3, per_device_batch_size=8, create_scheduler_fn=harmonic)
    assert largest_difference(trainer, plain) < 1e-14, "the third update changed nothing"


# ---------------------------------------------------------------------- stops


STOPS = {
    "on_prepare_start": (0, 0, 0),
    "on_training_run_start": (0, 0, 0),
    "on_train_epoch_start": (1, 0, 0),
    "on_train_step_start": (1, 0, 0),
    "on_train_step_end": (1, 0, 0),
    "on_optimizer_step_start": (1, 0, 0),
    "on_optimizer_step_end": (2, 0, 0),
    "on_train_epoch_end": (5, 1, 2),
    "on_eval_epoch_start": (5, 1, 2),
    "on_eval_step_end": (5, 1, 2),
    "on_eval_epoch_end": (5, 1, 2),
    "on_training_run_epoch_end": (5, 1, 2),
}
"""Where a stop is asked for; the updates and epochs after which the run ends, and the values in its history."""


@pytest.mark.parametrize("event", STOPS)
def test_a_stop_takes_effect_at_the_next_safe_point(event: str) -> None:
    ended: list[str | None] = []

    def stop(self: Any, trainer: Trainer, **kwargs: Any) -> None:
        trainer.request_stop(f"asked for in {event}")

    def end(self: Any, trainer: Trainer) -> None:
        ended.append(trainer.stop_reason)

    callback = type("Stopping", (TrainerCallback,), {event: stop, "on_training_run_end": end})
    trainer = tiny_trainer(callbacks=[callback])
    history = trainer.train(tiny_data(), num_epochs=3, per_device_batch_size=8, eval_dataset=tiny_data(5))
    progress = trainer.run_progress
    assert (progress.updates_completed, progress.epochs_completed, len(history.to_records())) == STOPS[event]
    assert ended == [f"asked for in {event}"] == [trainer.stop_reason]


@pytest.mark.parametrize(("event", "updates"), [("on_train_step_end", 1), ("on_optimizer_step_end", 2)])
def test_a_stop_asked_for_in_the_middle_of_an_update_lets_it_finish(event: str, updates: int) -> None:
    def stop(self: Any, trainer: Trainer, **kwargs: Any) -> None:
        trainer.request_stop("enough")

    trainer = tiny_trainer(callbacks=[type("Stopping", (TrainerCallback,), {event: stop})])
    trainer.train(tiny_data(), num_epochs=1, per_device_batch_size=2, gradient_accumulation_steps=3)
    assert trainer.run_progress.updates_completed == updates
    assert trainer.run_progress.samples_completed_in_epoch == updates * 6


def test_every_callback_sees_a_stop_at_the_same_update_whatever_its_place() -> None:
    saw: list[tuple[str, int]] = []

    class Watching(TrainerCallback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            if trainer.stop_reason is not None:
                saw.append((self.name, trainer.run_progress.updates_completed))

    class Stopping(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            trainer.request_stop("first" if trainer.run_progress.updates_completed == 1 else "later")

    trainer = tiny_trainer(callbacks=[Watching("before"), Stopping(), Watching("behind")])
    trainer.train(tiny_data(), num_epochs=1)
    assert saw == [("before", 2), ("behind", 2)]
    assert trainer.stop_reason == "first"


def test_a_stop_ends_its_run_only() -> None:
    class Once(TrainerCallback):
        done = False

        def on_optimizer_step_start(self, trainer: Trainer) -> None:
            if not self.done:
                self.done = True
                trainer.request_stop("enough")

    trainer = tiny_trainer(callbacks=[Once()])
    assert trainer.stop_reason is None
    trainer.train(tiny_data(), num_epochs=1)
    assert trainer.stop_reason == "enough"
    trainer.evaluate(tiny_data())
    assert trainer.stop_reason == "enough", "an evaluation afterwards leaves it to be read"
    trainer.train(tiny_data(), num_epochs=1)
    assert trainer.stop_reason is None
    assert trainer.run_progress.epochs_completed == 1


def test_a_stop_cannot_be_asked_for_outside_of_a_run() -> None:
    with pytest.raises(ConfigurationError, match=r"request_stop\('enough'\).*outside .*event of a callback"):
        tiny_trainer().request_stop("enough")


# ---------------------------------------------------------------------- exceptions


@pytest.mark.parametrize(
    "event",
    [
        "on_prepare_start",
        "on_training_run_start",
        "on_train_epoch_start",
        "on_train_step_end",
        "on_optimizer_step_start",
        "on_optimizer_step_end",
        "on_train_epoch_end",
        "on_eval_step_start",
        "on_eval_epoch_end",
        "on_training_run_epoch_end",
        "on_training_run_end",
    ],
)
def test_a_run_after_one_that_failed_anywhere_is_like_any_other(event: str) -> None:
    class Failing(TrainerCallback):
        fails = True

    def fail(self: Any, trainer: Trainer, **kwargs: Any) -> None:
        if self.fails:
            raise RuntimeError("broken")

    setattr(Failing, event, fail)
    failing, model = Failing(), tiny_network()
    trainer = tiny_trainer(callbacks=[failing], model=model)
    optimizer = trainer.optimizer
    arguments = {
        "num_epochs": 2,
        "per_device_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "eval_dataset": tiny_data(5),
    }
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train(tiny_data(), **arguments)  # type: ignore[arg-type]
    assert trainer.model is model and trainer.optimizer is optimizer
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())

    failing.fails = False
    model.load_state_dict(tiny_network().state_dict())
    trainer.train(tiny_data(), **arguments)  # type: ignore[arg-type]
    untroubled = tiny_trainer()
    # The order of the data goes on with the epochs that were begun.
    untroubled.run_progress.order_epoch = trainer.run_progress.order_epoch - 2
    untroubled.train(tiny_data(), **arguments)  # type: ignore[arg-type]
    assert torch.equal(weights_of(trainer), weights_of(untroubled))
    assert trainer.run_history.to_records() == untroubled.run_history.to_records()


def test_what_fails_while_an_error_is_on_its_way_is_a_note_of_it() -> None:
    closed: list[str] = []

    class Broken(TrainerCallback):
        def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
            raise RuntimeError("the cause")

        def on_exception(self, trainer: Trainer, error: BaseException) -> None:
            raise ValueError("in on_exception")

        def on_run_close(self, trainer: Trainer) -> None:
            raise ValueError("in on_run_close")

    class Closer(TrainerCallback):
        def on_exception(self, trainer: Trainer, error: BaseException) -> None:
            closed.append(str(error))

        def on_run_close(self, trainer: Trainer) -> None:
            closed.append("closed")

    with pytest.raises(RuntimeError, match="the cause") as caught:
        tiny_trainer(callbacks=[Broken, Closer]).train(tiny_data(), num_epochs=1)
    assert closed == ["the cause", "closed"]
    assert "in on_exception" in "".join(caught.value.__notes__) and "in on_run_close" in "".join(
        caught.value.__notes__
    )


@pytest.mark.parametrize("method", ["train", "evaluate", "predict"])
def test_a_run_inside_a_run_is_refused(method: str) -> None:
    class Nesting(TrainerCallback):
        def on_train_epoch_end(self, trainer: Trainer) -> None:
            getattr(trainer, method)(tiny_data())

    with pytest.raises(
        ConfigurationError, match=f"{method} was called inside.*Call {method} afterwards.*run_eval_epoch"
    ):
        tiny_trainer(callbacks=[Nesting]).train(tiny_data(), num_epochs=1)


# ---------------------------------------------------------------------- histories and data


def test_a_history_is_begun_anew_unless_it_is_to_be_kept() -> None:
    trainer = tiny_trainer()
    for keep, expected in ((False, 2), (True, 4), (False, 2)):
        history = trainer.train(tiny_data(), num_epochs=2, reset_run_history=not keep)
        assert len(history.get_metric_values("train_loss_epoch")) == expected


def test_evaluate_without_data_takes_that_of_training() -> None:
    trainer = tiny_trainer()
    with pytest.raises(ConfigurationError, match=r"dataset is None.*eval_dataset.*Pass the data"):
        trainer.evaluate()
    trainer.train(tiny_data(), num_epochs=1, eval_dataset=tiny_data(13))
    assert trainer.evaluate()["evaluation_loss"] == trainer.run_history.get_latest_metric("eval_loss_epoch")
    trainer.evaluate(TensorDataset(*(tensor[:3] for tensor in tiny_data().tensors)))
    assert trainer.evaluate()["evaluation_loss"] == trainer.run_history.get_latest_metric("eval_loss_epoch")


def test_batches_may_be_mappings_where_the_loss_step_is_overridden() -> None:
    class Mappings(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
            outputs = self.model(batch["inputs"])
            loss = nn.functional.cross_entropy(outputs, batch["labels"])
            return {"loss": loss, "model_outputs": outputs, "batch_size": len(outputs)}

    samples = [{"inputs": inputs, "labels": label} for inputs, label in tiny_data()]
    mapped, plain = tiny_trainer(Mappings, loss_func=None), tiny_trainer()
    mapped.train(samples, num_epochs=2)
    plain.train(tiny_data(), num_epochs=2)
    assert largest_difference(mapped, plain) < 1e-15


def test_a_scheduler_may_be_created_on_the_optimizer_of_the_trainer() -> None:
    class SteppingTrainer(Trainer):
        def create_scheduler(self) -> Any:
            return torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.1)

    trainer = tiny_trainer(SteppingTrainer, lr=1.0)
    trainer.train(
        tiny_data(8), num_epochs=1, per_device_batch_size=4
    )  # torch would warn of a step that it did not see
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
