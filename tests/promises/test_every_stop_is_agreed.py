"""Promise 5: a stop asked for on one process stops all of them after the same update, for a reason that all know."""

import os
import re
import signal
import time
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import compare_versions
from torch import nn
from torch.utils.data import TensorDataset

from accel_callbacks import EarlyStoppingCallback, MaxTimeCallback, SaveTrainingStateCallback
from accel_core import RunInterrupted, TerminateOnNaNCallback, Trainer, TrainerCallback
from case_runner import run_as_script, shared_folder
from launching import launch

NUM_EPOCHS, UPDATES_OF_EPOCH = 3, 5
EVENTS = {
    # An event, and after which update (counted from 1) a stop asked for in the event of update 2, of 5 (the
    # last one of an epoch) and of 15 (the last one of the run) takes effect on several processes.
    "on_train_step_start": (2, 5, 15),
    "on_train_step_end": (3, 5, 15),
    "on_optimizer_step_start": (3, 5, 15),
    "on_optimizer_step_end": (3, 5, 15),
    "on_train_epoch_end": (None, 5, 15),
    "on_eval_epoch_start": (None, 5, 15),
    "on_eval_step_end": (None, 5, 15),
    "on_eval_epoch_end": (None, 5, 15),
    "on_training_run_epoch_end": (None, 5, 15),
}
UPDATES = (2, 5, 15)


class Listener(TrainerCallback):
    """Notes when this process first knows the reason, and acts once at an event."""

    def __init__(self, event="", update=0, action=lambda trainer: None):
        self.event, self.update, self.action = event, update, action
        self.known_since = None
        self.closed = []

    def hear(self, trainer, event, update):
        if trainer.stop_reason is not None and self.known_since is None:
            self.known_since = (event, update)
        if (event, update) == (self.event, self.update):
            self.event = None
            self.action(trainer)

    def on_training_run_start(self, trainer):
        self.hear(trainer, "on_training_run_start", 0)

    def on_train_epoch_start(self, trainer):
        self.hear(trainer, "on_train_epoch_start", trainer.run_progress.updates_completed)

    def on_train_step_start(self, trainer, **kwargs):
        self.hear(trainer, "on_train_step_start", trainer.run_progress.updates_completed + 1)

    def on_train_step_end(self, trainer, **kwargs):
        self.hear(trainer, "on_train_step_end", trainer.run_progress.updates_completed + 1)

    def on_optimizer_step_start(self, trainer):
        self.hear(trainer, "on_optimizer_step_start", trainer.run_progress.updates_completed + 1)

    def on_optimizer_step_end(self, trainer):
        self.hear(trainer, "on_optimizer_step_end", trainer.run_progress.updates_completed)

    def on_train_epoch_end(self, trainer):
        self.hear(trainer, "on_train_epoch_end", trainer.run_progress.updates_completed)

    def on_eval_epoch_start(self, trainer, **kwargs):
        self.hear(trainer, "on_eval_epoch_start", trainer.run_progress.updates_completed)

    def on_eval_step_end(self, trainer, **kwargs):
        self.hear(trainer, "on_eval_step_end", trainer.run_progress.updates_completed)

    def on_eval_epoch_end(self, trainer, **kwargs):
        self.hear(trainer, "on_eval_epoch_end", trainer.run_progress.updates_completed)

    def on_training_run_epoch_end(self, trainer):
        self.hear(trainer, "on_training_run_epoch_end", trainer.run_progress.updates_completed)

    def on_training_run_end(self, trainer):
        self.closed.append("on_training_run_end")
        self.hear(trainer, "on_training_run_end", trainer.run_progress.updates_completed)

    def on_run_close(self, trainer):
        self.closed.append("on_run_close")


def make_data(batch_size):
    """Five updates on any number of processes."""
    num_samples = UPDATES_OF_EPOCH * batch_size * Accelerator().num_processes
    return TensorDataset(torch.linspace(0, 1, 3 * num_samples).reshape(-1, 3), torch.ones(num_samples, 1))


def train(batch_size, listener, callbacks=(), loss_func=nn.functional.mse_loss, **kwargs):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, loss_func, optimizer, [listener, *callbacks], seed=1)
    data = make_data(batch_size)
    kwargs = {"num_epochs": NUM_EPOCHS, "eval_dataset": data, **kwargs}
    interrupted = None
    try:
        trainer.train(data, per_device_batch_size=batch_size, **kwargs)
    except RunInterrupted as error:
        interrupted = str(error)
    return {
        "updates": trainer.run_progress.updates_completed,
        "epochs": trainer.run_progress.epochs_completed,
        "reason": trainer.stop_reason,
        "known since": listener.known_since,
        "closed": listener.closed,
        "history": [(record["name"], record["update"]) for record in trainer.run_history.to_records()],
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "interrupted": interrupted,
    }


def is_last():
    return Accelerator().process_index == Accelerator().num_processes - 1


def ask(batch_size, event, update):
    """The last process asks in an event of an update."""
    action = (
        (lambda trainer: trainer.request_stop(f"asked in {event}")) if is_last() else (lambda trainer: None)
    )
    return train(batch_size, Listener(event, update, action))


def ask_before_the_first_update(batch_size):
    return ask(batch_size, "on_training_run_start", 0)


def ask_for_several_reasons(batch_size):
    """Every process has one of its own at the same update, and another one later."""
    index = Accelerator().process_index

    def action(trainer):
        trainer.request_stop(f"the reason of process {index}")
        trainer.request_stop("another reason")

    return train(batch_size, Listener("on_train_step_end", 7, action))


def diverge(batch_size):
    """The loss of the last process is not a number in update 3."""
    steps = []

    def loss_func(outputs, targets):
        steps.extend([1] if torch.is_grad_enabled() else [])
        loss = nn.functional.mse_loss(outputs, targets)
        return loss * float("nan") if len(steps) == 3 and is_last() else loss

    return train(batch_size, Listener(), [TerminateOnNaNCallback], loss_func)


class DoubtfulMetric(TrainerCallback):
    """A metric that gets worse on the last process only, as one that nobody reduced."""

    def on_eval_epoch_end(self, trainer, **kwargs):
        worse = (
            trainer.run_progress.updates_completed if is_last() else -trainer.run_progress.updates_completed
        )
        trainer.run_history.update_metric("doubtful", worse)


def stop_early(batch_size):
    return train(batch_size, Listener(), [DoubtfulMetric, EarlyStoppingCallback(watch_metric="doubtful")])


def run_out_of_time(batch_size):
    """The time of the last process is over in update 7."""
    limit = MaxTimeCallback(minutes=60)

    def action(trainer):
        limit.ends_at = time.monotonic()

    return train(
        batch_size, Listener("on_train_step_start", 7, action if is_last() else lambda trainer: None), [limit]
    )


def receive_signal(batch_size, event, update, times=1):
    """The last process gets a signal."""

    def send(trainer):
        for _ in range(times if is_last() else 0):
            os.kill(os.getpid(), signal.SIGUSR1)

    folder = shared_folder()
    result = train(batch_size, Listener(event, update, send), [SaveTrainingStateCallback(save_dir=folder)])
    return {**result, "saved": sorted(path.name for path in folder.glob("update_*"))}


SIGNALLED = {"in an update": ("on_train_step_end", 7), "in an evaluation": ("on_eval_step_end", 10)}
CASES = {
    **{
        f"{event} {update}": partial(ask, event=event, update=update)
        for event in EVENTS
        for update in UPDATES
    },
    "before the first update": ask_before_the_first_update,
    "several reasons": ask_for_several_reasons,
    "nan": diverge,
    "early stop": stop_early,
    "time": run_out_of_time,
    **{
        f"signal {name}": partial(receive_signal, event=event, update=update)
        for name, (event, update) in SIGNALLED.items()
    },
    "signal and its echo": partial(receive_signal, event="on_train_step_end", update=7, times=2),
}


def agreed(outcome, case):
    """What the case gave, which has to be the same on every process."""
    first, *others = [{**result, "weights": None} for result in outcome.of(case)]
    weights = [result["weights"] for result in outcome.of(case)]
    for other, own in zip(others, weights[1:], strict=True):
        assert other == first
        torch.testing.assert_close(own, weights[0], rtol=0, atol=0, equal_nan=True)
    return first


ASKED = [
    (event, update, stopped)
    for event, stops in EVENTS.items()
    for update, stopped in zip(UPDATES, stops, strict=True)
    if stopped is not None
]


@pytest.mark.parametrize(("event", "update", "stopped"), ASKED)
def test_a_stop_asked_for_on_one_process_takes_effect_on_all_after_the_same_update(
    outcome, event, update, stopped
):
    result = agreed(outcome, f"{event} {update}")
    assert result["reason"] == f"asked in {event}"
    assert result["updates"] == stopped
    assert result["closed"] == ["on_training_run_end", "on_run_close"]


@pytest.mark.parametrize("update", UPDATES)
def test_a_stop_asked_for_at_the_safe_point_takes_effect_at_the_next_on_any_number_of_processes(
    outcome, update
):
    result, alone = (
        agreed(outcome, f"on_optimizer_step_end {update}"),
        outcome.alone(f"on_optimizer_step_end {update}"),
    )
    keys = ("updates", "epochs", "reason", "closed", "history")
    assert {key: result[key] for key in keys} == {key: alone[key] for key in keys}


def test_an_epoch_that_a_stop_cut_short_leaves_no_record_and_one_that_was_complete_is_evaluated(outcome):
    assert agreed(outcome, "on_train_step_end 2")["history"] == []
    assert agreed(outcome, "on_train_step_end 5")["history"] == [
        ("train_loss_epoch", 5),
        ("eval_loss_epoch", 5),
    ]


def test_no_update_follows_a_stop_asked_for_before_the_first(outcome):
    result = agreed(outcome, "before the first update")
    assert (result["updates"], result["reason"]) == (0, "asked in on_training_run_start")


def test_one_of_several_reasons_is_known_to_all(outcome):
    assert agreed(outcome, "several reasons")["reason"] == "the reason of process 0"


def test_a_loss_that_is_nan_on_one_process_stops_all(outcome):
    """Lesson A14: the others used to wait for ever."""
    result = agreed(outcome, "nan")
    assert result["updates"] == 4 and re.search("loss.* nan", result["reason"])


def test_an_early_stop_that_only_one_process_wants_stops_all(outcome):
    """Lesson A14 again."""
    result = agreed(outcome, "early stop")
    assert result["updates"] == 2 * UPDATES_OF_EPOCH and "'doubtful'" in result["reason"]


def test_the_time_of_one_process_is_the_time_of_all(outcome):
    result = agreed(outcome, "time")
    assert result["updates"] == 8 and "time limit of 60 minutes" in result["reason"]


@pytest.mark.parametrize("case", ["signal in an update", "signal and its echo"])
def test_a_signal_to_one_process_saves_one_state_and_interrupts_all(outcome, case):
    """Also one that the launcher forwards to a process that has received it already."""
    result = agreed(outcome, case)
    assert result["updates"] == 8
    assert result["saved"] == ["update_00000008"]
    assert "update_00000008" in result["interrupted"]


def test_a_signal_in_an_evaluation_interrupts_all_with_the_state_saved(outcome):
    result = agreed(outcome, "signal in an evaluation")
    assert result["updates"] == 10
    assert result["saved"] == ["update_00000010"]
    assert "update_00000010" in result["interrupted"]


FAILING = """
    import sys, time, torch
    from accelerate import Accelerator
    from accel_core import Trainer, TrainerCallback
    from torch import nn
    from torch.utils.data import TensorDataset

    event, process = sys.argv[1], int(sys.argv[2])

    class Failing(TrainerCallback):
        def fail(self, trainer):
            if trainer.accelerator.process_index == process and trainer.run_progress.updates_completed >= 2:
                print(f"failed at {time.time()} failed")
                raise RuntimeError("this is the first error")

    setattr(Failing, event, lambda self, trainer, **kwargs: self.fail(trainer))
    data = TensorDataset(torch.ones(40, 3), torch.ones(40, 1))
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, nn.functional.mse_loss, optimizer, [Failing])
    assert trainer.accelerator.num_processes == 2 or event == "never"
    trainer.train(data, num_epochs=100, eval_dataset=data, per_device_batch_size=4)
    """


@pytest.mark.parametrize(
    ("event", "process"),
    [
        ("on_train_step_end", 1),
        pytest.param("on_eval_step_end", 0, marks=pytest.mark.slow),
        pytest.param("on_training_run_epoch_end", 1, marks=pytest.mark.slow),
    ],
)
def test_an_exception_on_one_process_ends_the_others_in_seconds_with_the_error_to_be_seen(event, process):
    finished = launch(FAILING, processes=2, args=[event, process], check=False)
    seconds = time.time() - float(finished.stdout.split("failed")[1].removeprefix(" at "))
    assert finished.returncode != 0
    assert "RuntimeError: this is the first error" in finished.stderr
    assert seconds < 20


@pytest.mark.skipif(compare_versions("accelerate", "<", "1.13"), reason="there the processes see each other")
def test_processes_that_do_not_see_each_other_are_refused():
    """Without ACCELERATE_USE_CPU, the launcher starts two trainings on a CPU that do not know of each other."""
    finished = launch(
        FAILING, processes=2, args=["never", 0], env={"ACCELERATE_USE_CPU": "false"}, check=False
    )
    assert finished.returncode != 0
    told = "accelerate launch.* 2 processes.*ACCELERATE_USE_CPU=true.*--multi_gpu.*examples/configs"
    assert re.search(told, finished.stderr)


if __name__ == "__main__":
    run_as_script(CASES)
