"""timm's schedulers in the plain `Trainer` give the rates of timm's own training loop, update by update."""

import functools
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import timm.scheduler
import torch
from timm.scheduler import (
    CosineLRScheduler,
    MultiStepLRScheduler,
    PlateauLRScheduler,
    PolyLRScheduler,
    StepLRScheduler,
    TanhLRScheduler,
    WSDLRScheduler,
)
from timm.scheduler.scheduler import Scheduler
from torch import nn

from accel_core import CheckpointError, ConfigurationError, Trainer, TrainerCallback
from accel_core import TrainerPlaceholderValues as Values
from accel_integrations.timm_adapter import timm_scheduler_fn
from case_runner import BATCH_SIZE, compare, run_as_script, shared_folder
from tiny import Rates, tiny_data, tiny_network

pytestmark = pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")

NUM_EPOCHS = 6
BATCHES_PER_EPOCH = 5
DATA = tiny_data(BATCHES_PER_EPOCH * BATCH_SIZE - 1, torch.float32)
EVAL_DATA = tiny_data(7, torch.float32)
TOLERANCE = 1e-9

# A unit is an epoch or an update; every schedule has its length in units, with and without warm-up.
Plan = Callable[[Any], dict[str, Any]]
PLANS: dict[type, Plan] = {
    CosineLRScheduler: lambda unit: {"t_initial": 6 * unit, "lr_min": 0.001, "k_decay": 1.5},
    MultiStepLRScheduler: lambda unit: {"decay_t": [2 * unit, 4 * unit], "decay_rate": 0.3},
    PolyLRScheduler: lambda unit: {"t_initial": 6 * unit, "power": 2.0, "lr_min": 0.002},
    StepLRScheduler: lambda unit: {"decay_t": 2 * unit, "decay_rate": 0.5},
    TanhLRScheduler: lambda unit: {"t_initial": 6 * unit, "lr_min": 0.001},
    WSDLRScheduler: lambda unit: {"t_initial": 5 * unit, "decay_t": 3 * unit},
}
PLATEAU: dict[str, Any] = {
    "mode": "max",
    "patience_t": 1,
    "decay_rate": 0.5,
}  # the loss falls, so the rate does too
UNITS = {"epochs": 1, "updates": Values.NUM_UPDATE_STEPS_PER_EPOCH}


def kwargs_of(scheduler_class: type, counts: str, warmup: bool) -> dict[str, Any]:
    """Arguments with placeholders."""
    unit = UNITS[counts]
    started = {"warmup_t": 2 * unit, "warmup_lr_init": 0.0123} if warmup else {}
    if scheduler_class is PlateauLRScheduler:
        return {**PLATEAU, **started}
    return {**PLANS[scheduler_class](unit), **started, "t_in_epochs": counts == "epochs"}


def resolved(kwargs: dict[str, Any], updates_per_epoch: int) -> dict[str, Any]:
    """The same with the numbers that timm's own script would calculate."""

    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(part) for part in value]
        return value.calculate(Planned(updates_per_epoch)) if hasattr(value, "calculate") else value

    return {name: number(value) for name, value in kwargs.items()}


class Planned:
    """Of a run config what the placeholders here ask for."""

    def __init__(self, num_update_steps_per_epoch: int) -> None:
        self.num_update_steps_per_epoch = num_update_steps_per_epoch


def create_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups with rates of their own, of which timm scales the second."""
    first, *rest = model.parameters()
    return torch.optim.SGD([{"params": [first]}, {"params": rest, "lr": 0.05, "lr_scale": 0.5}], lr=0.1)


def rates_of_timm(
    create: Callable[[Any], Scheduler], updates_per_epoch: int, metrics: Iterable[float | None]
) -> list[list[float]]:
    """The rates of each update, and after the last, as timm's training script goes through an epoch."""
    optimizer = create_optimizer(tiny_network())
    scheduler = create(optimizer)
    rates, num_updates = [], 0
    for epoch, metric in enumerate(metrics):
        for _ in range(updates_per_epoch):
            rates.append([group["lr"] for group in optimizer.param_groups])
            num_updates += 1
            scheduler.step_update(num_updates=num_updates)
        scheduler.step(epoch + 1, metric)
    return [*rates, [group["lr"] for group in optimizer.param_groups]]


def train(
    create_scheduler_fn: Any, *, trainer_class: type[Trainer] = Trainer, callbacks: Any = (), **kwargs: Any
) -> tuple[Trainer, list[list[float]]]:
    """Train, and return the rates of each update and after the last."""
    model, rates = tiny_network(torch.float32), Rates()
    trainer = trainer_class(
        model, nn.functional.cross_entropy, create_optimizer(model), callbacks=[rates, *callbacks], seed=3
    )
    arguments = {"num_epochs": NUM_EPOCHS, "per_device_batch_size": BATCH_SIZE, **kwargs}
    trainer.train(DATA, create_scheduler_fn=create_scheduler_fn, **arguments)
    return trainer, [*rates.rates, [group["lr"] for group in trainer.optimizer.param_groups]]


def expect_equal(rates: list[list[float]], expected: list[list[float]]) -> None:
    assert len(rates) == len(expected)
    for update, (own, timms) in enumerate(zip(rates, expected, strict=True)):
        assert own == pytest.approx(timms, rel=0, abs=TOLERANCE), f"update {update + 1}"
    assert len({rate for rate, _ in expected}) > 2, "a schedule that does not change would prove nothing"


CASES = [(scheduler_class, counts) for scheduler_class in PLANS for counts in UNITS] + [
    (PlateauLRScheduler, "epochs")
]


def case_name(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else str(value)


def test_every_scheduler_of_timm_is_among_the_cases() -> None:
    exported = {
        value
        for value in vars(timm.scheduler).values()
        if inspect.isclass(value) and issubclass(value, Scheduler)
    }
    assert {scheduler_class for scheduler_class, _ in CASES} == exported


@pytest.mark.parametrize("warmup", [False, True], ids=["", "warm-up"])
@pytest.mark.parametrize("evaluated", [False, True], ids=["no evaluation", "evaluation"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("scheduler_class", "counts"), CASES, ids=case_name)
def test_rates_equal_those_of_timms_loop(
    scheduler_class: type, counts: str, accumulation: int, evaluated: bool, warmup: bool
) -> None:
    kwargs = kwargs_of(scheduler_class, counts, warmup)
    updates_per_epoch = -(-BATCHES_PER_EPOCH // accumulation)
    metric = "eval_loss_epoch" if evaluated else "train_loss_epoch"
    trainer, rates = train(
        timm_scheduler_fn(scheduler_class, **kwargs),
        eval_dataset=EVAL_DATA if evaluated else None,
        gradient_accumulation_steps=accumulation,
        scheduler_metric=metric,
    )
    metrics = trainer.run_history.get_metric_values(metric)
    create = functools.partial(scheduler_class, **resolved(kwargs, updates_per_epoch))
    expect_equal(rates, rates_of_timm(create, updates_per_epoch, metrics))


def test_noise_is_that_of_timm_and_can_be_left_off() -> None:
    kwargs = {"t_initial": NUM_EPOCHS, "noise_range_t": (1, 5), "noise_seed": 7}
    _, noisy = train(timm_scheduler_fn(CosineLRScheduler, **kwargs))
    expect_equal(
        noisy, rates_of_timm(lambda o: CosineLRScheduler(o, **kwargs), BATCHES_PER_EPOCH, [None] * NUM_EPOCHS)
    )
    _, quiet = train(timm_scheduler_fn(CosineLRScheduler, t_initial=NUM_EPOCHS, noise_range_t=None))
    assert quiet != noisy


def test_the_scheduler_step_argument_of_train_changes_nothing() -> None:
    create = timm_scheduler_fn(CosineLRScheduler, t_initial=Values.NUM_UPDATE_STEPS, t_in_epochs=False)
    assert train(create, scheduler_step_every="epoch")[1] == train(create)[1]


class TestMistakesOfOthers:
    """timm's schedulers elsewhere: an epoch late, not without an evaluation set, blind to accumulation and to the metric."""

    class InTheOldWay(Trainer):
        """Steps at the end of each evaluation with the number of the epoch from 1, and every batch."""

        num_batches = 0

        def scheduler_step(self) -> None:
            pass

        def backward_step(self, loss: torch.Tensor) -> None:
            super().backward_step(loss)
            self.num_batches += 1
            self.scheduler.timm_scheduler.step_update(num_updates=self.num_batches)

        def eval_epoch_end(self) -> None:
            self.scheduler.timm_scheduler.step(self.run_history.current_epoch + 1)

    @pytest.mark.parametrize(
        ("mistake", "scheduler_class", "counts", "arguments"),
        [
            ("an epoch late", CosineLRScheduler, "epochs", {"eval_dataset": EVAL_DATA}),
            ("not without evaluation", CosineLRScheduler, "epochs", {"scheduler_metric": "train_loss_epoch"}),
            ("blind to accumulation", CosineLRScheduler, "updates", {"gradient_accumulation_steps": 2}),
            ("without the metric", PlateauLRScheduler, "epochs", {"eval_dataset": EVAL_DATA}),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_these_tests_compare_differs_after_a_mistake(
        self, mistake: str, scheduler_class: type, counts: str, arguments: dict[str, Any]
    ) -> None:
        kwargs = kwargs_of(scheduler_class, counts, warmup=False)
        updates_per_epoch = -(-BATCHES_PER_EPOCH // arguments.get("gradient_accumulation_steps", 1))
        trainer, right = train(timm_scheduler_fn(scheduler_class, **kwargs), **arguments)
        _, wrong = train(
            timm_scheduler_fn(scheduler_class, **kwargs), trainer_class=self.InTheOldWay, **arguments
        )
        metrics = trainer.run_history.get_metric_values("train_loss_epoch")
        if "eval_dataset" in arguments:
            metrics = trainer.run_history.get_metric_values("eval_loss_epoch")
        create = functools.partial(scheduler_class, **resolved(kwargs, updates_per_epoch))
        expected = rates_of_timm(create, updates_per_epoch, metrics)
        expect_equal(right, expected)
        with pytest.raises(AssertionError):
            expect_equal(wrong, expected)


class StopAfter(TrainerCallback):
    """Saves the state after an update, and ends the run."""

    def __init__(self, updates: int, folder: Path) -> None:
        self.updates = updates
        self.folder = folder

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if trainer.run_progress.updates_completed == self.updates:
            trainer.save_training_state(self.folder)
            trainer.request_stop("to be resumed")


@pytest.mark.parametrize("warmup", [False, True], ids=["", "warm-up"])
@pytest.mark.parametrize(("scheduler_class", "counts"), CASES, ids=case_name)
def test_a_run_resumed_in_mid_epoch_goes_on_with_the_same_rates(
    scheduler_class: type, counts: str, warmup: bool, tmp_path: Path
) -> None:
    create = timm_scheduler_fn(scheduler_class, **kwargs_of(scheduler_class, counts, warmup))
    _, whole = train(create, eval_dataset=EVAL_DATA)
    stop_after = 3 * BATCHES_PER_EPOCH + 2
    _, before = train(create, eval_dataset=EVAL_DATA, callbacks=[StopAfter(stop_after, tmp_path / "state")])
    _, after = train(create, eval_dataset=EVAL_DATA, resume_from=tmp_path / "state")
    assert before[:stop_after] == whole[:stop_after]
    assert after == whole[stop_after:]


def test_a_plateau_remembers_its_bad_epochs(tmp_path: Path) -> None:
    """timm's own state would begin to count again."""
    create = timm_scheduler_fn(PlateauLRScheduler, mode="max", patience_t=4, decay_rate=0.5)
    _, whole = train(create, eval_dataset=EVAL_DATA)
    assert whole[-1] != whole[0], "the rate fell after more than four bad epochs"
    train(
        create, eval_dataset=EVAL_DATA, callbacks=[StopAfter(3 * BATCHES_PER_EPOCH + 1, tmp_path / "state")]
    )
    _, resumed = train(create, eval_dataset=EVAL_DATA, resume_from=tmp_path / "state")
    assert resumed[-1] == whole[-1]


def test_the_saved_plan_wins_over_a_new_one(tmp_path: Path) -> None:
    create = timm_scheduler_fn(CosineLRScheduler, t_initial=Values.NUM_EPOCHS)
    _, whole = train(create)
    train(create, callbacks=[StopAfter(7, tmp_path / "state")])
    _, resumed = train(create, resume_from=tmp_path / "state", num_epochs=NUM_EPOCHS + 3)
    assert resumed[: len(whole) - 8] == whole[7:-1]


def test_the_state_of_another_schedule_is_refused(tmp_path: Path) -> None:
    train(timm_scheduler_fn(CosineLRScheduler, t_initial=6), callbacks=[StopAfter(7, tmp_path / "state")])
    with pytest.raises(
        CheckpointError, match=r"scheduler\.pt'.*CosineLRScheduler.*TanhLRScheduler.*Create it"
    ):
        train(timm_scheduler_fn(TanhLRScheduler, t_initial=6), resume_from=tmp_path / "state")


def test_a_schedule_of_a_function_of_your_own_can_be_saved(tmp_path: Path) -> None:
    create = timm_scheduler_fn(WSDLRScheduler, t_initial=6, decay_t=4, decay_fn=lambda part: (1 - part) ** 3)
    _, whole = train(create)
    train(create, callbacks=[StopAfter(22, tmp_path / "state")])
    assert train(create, resume_from=tmp_path / "state")[1] == whole[22:]


def test_an_own_schedule_by_a_metric_gets_it() -> None:
    class HalveIfWorse(Scheduler):
        """Its own `step` is what tells that it looks at the metric."""

        metrics: list[float] = []  # noqa: RUF012

        def __init__(self, optimizer: Any) -> None:
            super().__init__(optimizer, "lr")

        def _get_lr(self, t: int) -> list[float]:
            return self.base_values

        def step(self, epoch: int, metric: float | None = None) -> None:
            self.metrics.append((epoch, metric))  # type: ignore[arg-type]

    trainer, _ = train(timm_scheduler_fn(HalveIfWorse), eval_dataset=EVAL_DATA)
    losses = trainer.run_history.get_metric_values("eval_loss_epoch")
    assert HalveIfWorse.metrics == list(enumerate(losses, start=1))


class TestMistakesOfCallers:
    @pytest.mark.parametrize(
        ("scheduler_class", "kwargs", "words"),
        [
            (3, {}, ("scheduler_class is 3", "timm.scheduler.CosineLRScheduler")),
            (
                torch.optim.lr_scheduler.StepLR,
                {"step_size": 1},
                ("scheduler_class is", "StepLR", "scheduler of timm", "create_scheduler_fn"),
            ),
            (CosineLRScheduler, {}, ("CosineLRScheduler", "{}", "argument: 't_initial'", "['t_initial', ")),
            (
                CosineLRScheduler,
                {"t_initial": 3, "t_max": 3},
                ("CosineLRScheduler", "argument 't_max'", "['t_initial', "),
            ),
            (PlateauLRScheduler, {}, ("mode", "PlateauLRScheduler", "mode='min' for a loss")),
        ],
    )
    def test_is_reported_at_once(
        self, scheduler_class: Any, kwargs: dict[str, Any], words: tuple[str, ...]
    ) -> None:
        with pytest.raises(ConfigurationError) as caught:
            timm_scheduler_fn(scheduler_class, **kwargs)
        assert all(word in str(caught.value) for word in words), caught.value

    @pytest.mark.parametrize(
        ("scheduler_class", "kwargs", "words"),
        [
            (CosineLRScheduler, {"t_initial": 0}, "{'t_initial': 0}"),
            (WSDLRScheduler, {"t_initial": 3, "decay_t": 9}, "Invalid decay_t (9)"),
        ],
    )
    def test_is_reported_before_training(
        self, scheduler_class: Any, kwargs: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(ConfigurationError) as caught:
            train(timm_scheduler_fn(scheduler_class, **kwargs))
        assert str(caught.value).startswith(scheduler_class.__name__)
        assert words in str(caught.value)

    def test_a_plateau_without_its_metric_is_refused_before_training(self) -> None:
        with pytest.raises(
            ConfigurationError,
            match=r"scheduler_metric is 'eval_loss_epoch'.*scheduler_metric='train_loss_epoch'",
        ):
            train(timm_scheduler_fn(PlateauLRScheduler, **PLATEAU))


# ---------------------------------------------------------------------- several processes


def rates_on_processes(batch_size: int, scheduler_class: type, counts: str) -> Any:
    kwargs = kwargs_of(scheduler_class, counts, warmup=True)
    arguments = {
        "eval_dataset": EVAL_DATA,
        "per_device_batch_size": batch_size,
        "gradient_accumulation_steps": 2,
    }
    trainer, rates = train(timm_scheduler_fn(scheduler_class, **kwargs), **arguments)
    per_epoch = trainer.run_config.num_update_steps_per_epoch
    assert per_epoch is not None
    metrics = trainer.run_history.get_metric_values("eval_loss_epoch")
    expected = rates_of_timm(
        functools.partial(scheduler_class, **resolved(kwargs, per_epoch)), per_epoch, metrics
    )
    return {"rates": rates, "expected": expected}


def resumed_on_processes(batch_size: int, scheduler_class: type, counts: str) -> Any:
    folder = shared_folder()
    create = timm_scheduler_fn(scheduler_class, **kwargs_of(scheduler_class, counts, warmup=True))
    arguments = {"eval_dataset": EVAL_DATA, "per_device_batch_size": batch_size}
    stop_after = 8  # of three updates an epoch
    _, whole = train(create, **arguments)
    train(create, callbacks=[StopAfter(stop_after, folder / "state")], **arguments)
    _, resumed = train(create, resume_from=folder / "state", **arguments)
    return {"rates": [*whole[:stop_after], *resumed], "expected": whole}


PROCESS_CASES: dict[str, Callable[[int], Any]] = {
    f"{scheduler_class.__name__} by {counts}": functools.partial(
        rates_on_processes, scheduler_class=scheduler_class, counts=counts
    )
    for scheduler_class, counts in CASES
}
RESUMED_CASES: dict[str, Callable[[int], Any]] = {
    f"{scheduler_class.__name__} by {counts}, resumed": functools.partial(
        resumed_on_processes, scheduler_class=scheduler_class, counts=counts
    )
    for scheduler_class, counts in [(CosineLRScheduler, "updates"), (PlateauLRScheduler, "epochs")]
}


@pytest.mark.slow
def test_two_processes_give_the_rates_of_timms_loop(tmp_path: Path) -> None:
    outcome = compare({**PROCESS_CASES, **RESUMED_CASES}, __file__, 2, tmp_path)
    for name in RESUMED_CASES:
        for result in outcome.of(name):
            expect_equal(result["rates"], result["expected"])
    for name in PROCESS_CASES:
        for result in outcome.of(name):
            expect_equal(result["rates"], result["expected"])
        assert outcome.of(name)[0]["rates"] == outcome.of(name)[1]["rates"]
        expect_equal(outcome.of(name)[0]["rates"], outcome.alone(name)["rates"])


if __name__ == "__main__":
    run_as_script({**PROCESS_CASES, **RESUMED_CASES}, ignore="PlateauLRScheduler is deprecated")
