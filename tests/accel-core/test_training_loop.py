"""The loop on tiny real models: weights, losses, limits, clipping, schedulers, stops, errors."""

from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from accel_core import ConfigurationError, Trainer, TrainerCallback, TrainerPlaceholderValues
from tiny import CountsTargets, tiny_data, tiny_network, tiny_trainer, weights_of


class Recorder(TrainerCallback):
    """Keeps what the loop shows."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradient_norms: list[float] = []
        self.learning_rates: list[float] = []

    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.losses.append(kwargs["batch_output"]["loss"].item())

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        norms = [
            parameter.grad.norm() for parameter in trainer.model.parameters() if parameter.grad is not None
        ]
        self.gradient_norms.append(float(torch.stack(norms).norm()))
        self.learning_rates.append(trainer.optimizer.param_groups[0]["lr"])


def test_the_loop_gives_the_weights_of_the_loop_one_writes_by_hand() -> None:
    trainer = tiny_trainer()
    trainer.train(tiny_data(), num_epochs=2, per_device_batch_size=8)
    model, order = tiny_network(), trainer.train_dataloader.source.sampler.order  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(2):
        for indices in order.of_epoch(epoch).split(8):  # type: ignore[union-attr]
            inputs, targets = tiny_data()[indices]
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    by_hand = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert torch.equal(weights_of(trainer), by_hand)


@pytest.mark.parametrize(("batch_size", "steps"), [(4, 3), (2, 6), (1, 12), (6, 2), (3, 4)])
def test_accumulation_equals_the_big_batch_also_in_short_windows(batch_size: int, steps: int) -> None:
    """37 samples: the last window is short and its last batch smaller (lesson A9)."""
    whole, parts = tiny_trainer(), tiny_trainer()
    whole.train(tiny_data(), num_epochs=3, per_device_batch_size=12)
    parts.train(
        tiny_data(), num_epochs=3, per_device_batch_size=batch_size, gradient_accumulation_steps=steps
    )
    assert torch.allclose(weights_of(whole), weights_of(parts), atol=1e-12)


def test_loss_is_logged_unscaled_under_accumulation() -> None:
    """Lesson A1: the logged loss is that of the unaccumulated run."""
    whole, parts = tiny_trainer(), tiny_trainer()
    losses = [
        trainer.train(
            tiny_data(), num_epochs=2, per_device_batch_size=12 // steps, gradient_accumulation_steps=steps
        )
        for trainer, steps in ((whole, 1), (parts, 4))
    ]
    assert losses[0].get_metric_values("train_loss_epoch") == pytest.approx(
        losses[1].get_metric_values("train_loss_epoch")
    )


class TokenTrainer(Trainer):
    """Samples weigh as many items as their first feature says."""

    as_tensor = False

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        outputs = self.model(batch[0])
        tokens = (batch[0][:, 0].abs() * 10).long() + 1
        losses = nn.functional.cross_entropy(outputs, batch[1], reduction="none")
        num_items = tokens.sum()
        loss = (losses * tokens).sum() / num_items
        items = num_items if self.as_tensor else int(num_items)
        return {
            "loss": loss,
            "model_outputs": outputs,
            "batch_size": len(tokens),
            "num_items_in_batch": items,
        }


class TensorTokenTrainer(TokenTrainer):
    as_tensor = True


class CountingTokenTrainer(TokenTrainer):
    def count_items(self, batch: Any) -> int:
        return int(((batch[0][:, 0].abs() * 10).long() + 1).sum())


@pytest.mark.parametrize("trainer_class", [TokenTrainer, TensorTokenTrainer, CountingTokenTrainer])
def test_losses_per_token_are_weighted_by_their_tokens(trainer_class: type[Trainer]) -> None:
    """Lesson A10 on one process."""
    whole, parts = tiny_trainer(TokenTrainer), tiny_trainer(trainer_class)
    histories = [
        trainer.train(
            tiny_data(), num_epochs=3, per_device_batch_size=12 // steps, gradient_accumulation_steps=steps
        )
        for trainer, steps in ((whole, 1), (parts, 3))
    ]
    assert torch.allclose(weights_of(whole), weights_of(parts), atol=1e-12)
    assert histories[0].get_latest_metric("train_loss_epoch") == pytest.approx(
        histories[1].get_latest_metric("train_loss_epoch")
    )


def test_a_collate_function_that_drops_samples_leaves_the_mean_over_those_that_are_there() -> None:
    def keep_positive(samples: list[Any]) -> Any:
        kept = [sample for sample in samples if sample[0][0] > -1.0] or samples[:1]
        return torch.stack([sample[0] for sample in kept]), torch.stack([sample[1] for sample in kept])

    by_hand: list[torch.Tensor] = []

    class Watcher(TrainerCallback):
        def on_train_step_start(self, trainer: Trainer, batch: Any) -> None:
            self.batches = [*getattr(self, "batches", []), batch]

        def on_optimizer_step_start(self, trainer: Trainer) -> None:
            inputs, targets = (torch.cat(parts) for parts in zip(*self.batches, strict=True))
            self.batches = []
            loss = nn.functional.cross_entropy(trainer.model(inputs), targets)
            gradient = torch.autograd.grad(loss, trainer.model[0].weight)[0]  # type: ignore[index]
            by_hand.append(gradient - trainer.model[0].weight.grad)  # type: ignore[index]

    trainer = tiny_trainer(CountsTargets, callbacks=[Watcher()])
    trainer.train(
        tiny_data(),
        num_epochs=1,
        per_device_batch_size=4,
        gradient_accumulation_steps=3,
        collate_fn=keep_positive,
    )
    assert len(by_hand) == 4
    assert all(difference.abs().max() < 1e-12 for difference in by_hand)


def test_bfloat16_through_the_users_accelerator_trains_with_accumulation() -> None:
    model = tiny_network(torch.float32)
    trainer = tiny_trainer(model=model, accelerator=Accelerator(mixed_precision="bf16", cpu=True))
    history = trainer.train(
        tiny_data(dtype=torch.float32), num_epochs=4, per_device_batch_size=4, gradient_accumulation_steps=3
    )
    losses = history.get_metric_values("train_loss_epoch")
    assert losses[-1] < losses[0]
    assert trainer.run_config.mixed_precision == "bf16"


def test_gradients_are_clipped_once_an_update() -> None:
    """Lesson A8: by norm and by value, on the whole gradient and not on its parts."""
    by_norm, by_value = tiny_trainer(lr=1.0), tiny_trainer(lr=1.0)
    before = weights_of(by_norm)
    arguments = {"max_num_train_steps": 1, "per_device_batch_size": 4, "gradient_accumulation_steps": 3}
    by_norm.train(tiny_data(), gradient_clip_norm=0.01, **arguments)
    assert float((weights_of(by_norm) - before).norm()) == pytest.approx(0.01, rel=1e-3)
    by_value.train(tiny_data(), gradient_clip_value=0.001, **arguments)
    assert float((weights_of(by_value) - before).abs().max()) == pytest.approx(0.001)


def test_an_accelerator_that_accumulates_is_refused() -> None:
    """Lesson A11."""
    trainer = tiny_trainer(accelerator=Accelerator(gradient_accumulation_steps=4, cpu=True))
    with pytest.raises(ConfigurationError, match="gradient_accumulation_steps=4 to train"):
        trainer.train(tiny_data(), num_epochs=1)


def test_schedulers_step_every_update_or_every_epoch() -> None:
    schedule = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda n: 1 / (n + 1))
    for every, expected in (
        ("update", [0.1 / (n + 1) for n in range(10)]),
        ("epoch", [0.1] * 5 + [0.05] * 5),
    ):
        recorder = Recorder()
        trainer = tiny_trainer(callbacks=[recorder])
        trainer.train(
            tiny_data(),
            num_epochs=2,
            per_device_batch_size=8,
            create_scheduler_fn=schedule,
            scheduler_step_every=every,
        )
        assert recorder.learning_rates == pytest.approx(expected)


def test_a_scheduler_that_needs_a_metric_gets_it_each_epoch() -> None:
    recorder = Recorder()
    trainer = tiny_trainer(callbacks=[recorder], lr=1e-6)
    schedule = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5)
    trainer.train(
        tiny_data(),
        num_epochs=3,
        eval_dataset=tiny_data(),
        per_device_batch_size=37,
        create_scheduler_fn=schedule,
        gradient_clip_norm=1e-9,
    )
    assert recorder.learning_rates == [1e-6, 1e-6, 5e-7]


def test_placeholders_are_resolved_without_arithmetic_from_the_user() -> None:
    trainer = tiny_trainer()
    total = TrainerPlaceholderValues.NUM_EPOCHS * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH + 1
    schedule = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=total)
    trainer.train(tiny_data(), num_epochs=3, per_device_batch_size=8, create_scheduler_fn=schedule)
    assert trainer.scheduler.total_steps == 3 * 5 + 1


def test_the_smaller_limit_ends_the_run_and_a_cut_epoch_is_closed() -> None:
    trainer = tiny_trainer()
    history = trainer.train(
        tiny_data(), num_epochs=9, max_num_train_steps=7, eval_dataset=tiny_data(), per_device_batch_size=8
    )
    assert trainer.run_progress.updates_completed == 7
    assert [record["update"] for record in history.to_records()] == [5, 5, 7, 7]
    trainer.train(tiny_data(), num_epochs=1, max_num_train_steps=7, per_device_batch_size=8)
    assert trainer.run_progress.updates_completed == 5


class Stopper(TrainerCallback):
    def __init__(self, event: str, at_update: int) -> None:
        self.event, self.at_update = event, at_update

    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._stop("on_train_step_end", trainer, trainer.run_progress.updates_completed + 1)

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self._stop("on_optimizer_step_end", trainer, trainer.run_progress.updates_completed)

    def _stop(self, event: str, trainer: Trainer, update: int) -> None:
        if (event, update) == (self.event, self.at_update):
            trainer.request_stop("enough")


@pytest.mark.parametrize(("event", "ends_after"), [("on_train_step_end", 2), ("on_optimizer_step_end", 3)])
def test_a_stop_takes_effect_at_the_next_safe_point(event: str, ends_after: int) -> None:
    trainer = tiny_trainer(callbacks=[Stopper(event, 2)])
    history = trainer.train(tiny_data(), num_epochs=2, eval_dataset=tiny_data(), per_device_batch_size=8)
    assert trainer.stop_reason == "enough"
    assert trainer.run_progress.updates_completed == ends_after
    assert history.get_metric_names() == set()


def test_a_nan_stops_the_run_without_ending_the_interpreter() -> None:
    """Lesson A30."""
    from accel_core import TerminateOnNaNCallback

    class PoisonedTrainer(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
            output = super().calculate_train_batch_loss(batch)
            if self.run_progress.updates_completed == 3:
                output["loss"] = output["loss"] * float("nan")
            return output

    trainer = tiny_trainer(PoisonedTrainer, callbacks=[TerminateOnNaNCallback])
    trainer.train(tiny_data(), num_epochs=3, per_device_batch_size=8)
    assert "nan" in str(trainer.stop_reason)
    assert trainer.run_progress.updates_completed == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_an_exception_closes_everything_and_leaves_a_usable_trainer(error: BaseException) -> None:
    """Lesson A31."""
    heard: list[str] = []

    class Failing(TrainerCallback):
        fails = True

        def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
            if self.fails and kwargs["step"] == 3:
                raise error

        def on_exception(self, trainer: Trainer, error: BaseException) -> None:
            heard.append(type(error).__name__)

        def on_run_close(self, trainer: Trainer) -> None:
            heard.append("closed")

    failing = Failing()
    model = tiny_network()
    trainer = tiny_trainer(model=model, callbacks=[failing])
    optimizer = trainer.optimizer
    with pytest.raises(type(error)):
        trainer.train(tiny_data(), num_epochs=1, per_device_batch_size=4)
    assert heard == [type(error).__name__, "closed"]
    assert trainer.model is model
    assert trainer.optimizer is optimizer
    assert all(parameter.grad is None for parameter in model.parameters())
    failing.fails = False
    trainer.train(tiny_data(), num_epochs=1, per_device_batch_size=4)
    assert trainer.run_progress.epochs_completed == 1


def test_a_closing_callback_that_fails_keeps_no_other_from_closing() -> None:
    closed: list[str] = []

    class Broken(TrainerCallback):
        def on_run_close(self, trainer: Trainer) -> None:
            raise ValueError("stuck")

    class Closer(TrainerCallback):
        def on_run_close(self, trainer: Trainer) -> None:
            closed.append("closed")

    with pytest.raises(ValueError, match="stuck"):
        tiny_trainer(callbacks=[Broken(), Closer()]).train(tiny_data(), num_epochs=1)
    assert closed == ["closed"]


def test_evaluate_returns_its_metrics_and_keeps_the_history_and_the_mode() -> None:
    """Lesson A35."""
    trainer = tiny_trainer()
    trainer.train(tiny_data(), num_epochs=1)
    trainer.model.train()
    metrics = trainer.evaluate(tiny_data(13))
    model = trainer.get_model()
    inputs, targets = tiny_data(13).tensors
    assert metrics == {
        "evaluation_loss": pytest.approx(nn.functional.cross_entropy(model(inputs), targets).item())
    }
    assert trainer.run_history.get_metric_names() == {"train_loss_epoch", "evaluation_loss"}
    assert trainer.model.training


def test_a_user_seed_counts_and_none_seeds_nothing() -> None:
    """Lesson A26: the seed of the data order is read from torch where none is given, and nothing is drawn."""
    runs = []
    for seed in (1, 1, 2):
        model = tiny_network()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        trainer = Trainer(
            model, nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), callbacks=[]
        )
        trainer.train(tiny_data(), num_epochs=1)
        assert torch.equal(before, torch.get_rng_state())
        runs.append(weights_of(trainer))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_predictions_come_in_the_order_of_the_data_in_eval_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.9), tiny_network())
    trainer = tiny_trainer(model=model)
    predictions = trainer.predict(tiny_data(13), per_device_batch_size=4)
    model.eval()
    assert torch.allclose(predictions, model(tiny_data(13).tensors[0]), atol=1e-12)


def test_a_compiled_model_is_trained_and_unwrapped() -> None:
    model = tiny_network()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(compiled, nn.functional.cross_entropy, optimizer, callbacks=[], seed=3)
    trainer.train(tiny_data(), num_epochs=1, per_device_batch_size=8)
    plain = tiny_trainer()
    plain.train(tiny_data(), num_epochs=1, per_device_batch_size=8)
    assert torch.allclose(weights_of(trainer), weights_of(plain), atol=1e-12)
    assert trainer.get_model(keep_torch_compile=False) is model


def test_logged_values_are_averaged_over_the_samples() -> None:
    class LoggingTrainer(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
            return {**super().calculate_train_batch_loss(batch), "log": {"size": float(len(batch[0]))}}

    history = tiny_trainer(LoggingTrainer).train(tiny_data(10), num_epochs=1, per_device_batch_size=8)
    assert history.get_latest_metric("train_size_epoch") == pytest.approx((8 * 8 + 2 * 2) / 10)
