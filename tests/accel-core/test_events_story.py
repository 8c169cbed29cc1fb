"""What happens in a run, told in the order in which it happens. Methods of the trainer are in capitals, events are not."""

import functools
import signal
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from accel_core import Trainer, TrainerCallback
from accel_core.callbacks.callback_list import EVENTS
from launching import start, wait_until

METHODS = (
    "create_accelerator",
    "create_train_dataloader",
    "create_eval_dataloader",
    "create_run_config",
    "prepare",
    "create_scheduler",
    "training_run_start",
    "train_epoch_start",
    "calculate_train_batch_loss",
    "backward_step",
    "clip_gradients",
    "optimizer_step",
    "scheduler_step",
    "optimizer_zero_grad",
    "train_epoch_end",
    "eval_epoch_start",
    "calculate_eval_batch_loss",
    "eval_epoch_end",
    "training_run_epoch_end",
    "training_run_end",
    "evaluation_run_start",
    "evaluation_run_end",
)


class Teller(TrainerCallback):
    """Writes down every event."""

    def __init__(self, story: list[str]) -> None:
        self.story = story


class TellingTrainer(Trainer):
    """Writes down every method that one may override, before it acts."""

    story: list[str]


def _telling_event(name: str) -> Any:
    def tell(self: Any, trainer: Any, **kwargs: Any) -> None:
        self.story.append(name.removeprefix("on_"))

    return tell


def _telling_method(name: str) -> Any:
    def tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.story.append(name.upper())
        return getattr(Trainer, name)(self, *args, **kwargs)

    return tell


for _name in EVENTS:
    setattr(Teller, _name, _telling_event(_name))
for _name in METHODS:
    setattr(TellingTrainer, _name, _telling_method(_name))


def tell(*acting: TrainerCallback) -> TellingTrainer:
    """A trainer that tells its story, after the callbacks that act in it."""
    story: list[str] = []
    TellingTrainer.story = story
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return TellingTrainer(
        model, nn.functional.mse_loss, optimizer, callbacks=[*acting, Teller(story)], seed=1
    )


def data(size: int = 5) -> TensorDataset:
    return TensorDataset(torch.ones(size, 2), torch.ones(size, 1))


def in_words(text: str) -> list[str]:
    """The words of a story, without its comments."""
    return [word for line in textwrap.dedent(text).splitlines() for word in line.partition("#")[0].split()]


PREPARATION = """
    CREATE_ACCELERATOR CREATE_TRAIN_DATALOADER CREATE_EVAL_DATALOADER CREATE_RUN_CONFIG
    prepare_start PREPARE CREATE_SCHEDULER
    TRAINING_RUN_START training_run_start
"""
STEP = """
    train_step_start CALCULATE_TRAIN_BATCH_LOSS BACKWARD_STEP train_step_end
"""
UPDATE = """
    optimizer_step_start CLIP_GRADIENTS OPTIMIZER_STEP SCHEDULER_STEP OPTIMIZER_ZERO_GRAD optimizer_step_end
"""
EVALUATION = """
    EVAL_EPOCH_START eval_epoch_start
    eval_step_start CALCULATE_EVAL_BATCH_LOSS eval_step_end
    eval_step_start CALCULATE_EVAL_BATCH_LOSS eval_step_end
    EVAL_EPOCH_END eval_epoch_end
"""
EPOCH = f"""
    TRAIN_EPOCH_START train_epoch_start
        {STEP} {STEP} {UPDATE}  # two batches an update,
        {STEP} {UPDATE}         # and the one that is left
    TRAIN_EPOCH_END train_epoch_end
    {EVALUATION}
    evaluation_end TRAINING_RUN_EPOCH_END training_run_epoch_end
"""
STEPPED = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1)
TRAINING = {
    "num_epochs": 2,
    "per_device_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "create_scheduler_fn": STEPPED,
}


def train(trainer: Trainer, **kwargs: Any) -> None:
    trainer.train(data(5), **{**TRAINING, "eval_dataset": data(3), **kwargs})


def test_without_a_scheduler_none_is_stepped() -> None:
    trainer = tell()
    for step_every in ("update", "epoch"):
        train(trainer, create_scheduler_fn=None, scheduler_step_every=step_every)
    assert "SCHEDULER_STEP" not in trainer.story


def test_a_training_run() -> None:
    trainer = tell()
    train(trainer)
    assert trainer.story == in_words(
        f"init_end {PREPARATION} {EPOCH} {EPOCH} TRAINING_RUN_END training_run_end run_close"
    )


def test_a_second_run_prepares_nothing_again() -> None:
    trainer = tell()
    train(trainer)
    trainer.story.clear()
    train(trainer, num_epochs=1)
    assert trainer.story == in_words(f"""
        CREATE_TRAIN_DATALOADER CREATE_EVAL_DATALOADER CREATE_RUN_CONFIG CREATE_SCHEDULER TRAINING_RUN_START training_run_start
        {EPOCH} TRAINING_RUN_END training_run_end run_close
    """)


def test_an_evaluation() -> None:
    trainer = tell()
    trainer.evaluate(data(3), per_device_batch_size=2)
    assert trainer.story == in_words(f"""
        init_end CREATE_ACCELERATOR CREATE_EVAL_DATALOADER prepare_start PREPARE
        EVALUATION_RUN_START evaluation_run_start {EVALUATION} EVALUATION_RUN_END evaluation_run_end run_close
    """)


class Acting(TrainerCallback):
    """Does something the `at`-th time that an event fires."""

    def __init__(self, event: str, at: int, act: Any) -> None:
        def listen(trainer: Any, **kwargs: Any) -> None:
            self.times += 1
            if self.times == at:
                act(trainer)

        self.times = 0
        setattr(self, event, listen)


def failing_with(error: BaseException) -> Any:
    def act(trainer: Any) -> None:
        raise error

    return act


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_in_the_middle_of_an_update(error: BaseException) -> None:
    trainer = tell(Acting("on_train_step_end", 2, failing_with(error)))
    with pytest.raises(type(error)):
        train(trainer)
    assert trainer.story == in_words(f"""
        init_end {PREPARATION} TRAIN_EPOCH_START train_epoch_start
        {STEP} train_step_start CALCULATE_TRAIN_BATCH_LOSS BACKWARD_STEP  # and here it happens
        exception run_close
    """)


def test_an_exception_in_an_evaluation() -> None:
    trainer = tell(Acting("on_eval_step_start", 2, failing_with(ValueError("broken"))))
    with pytest.raises(ValueError, match="broken"):
        trainer.evaluate(data(3), per_device_batch_size=2)
    assert trainer.story[-6:] == in_words("""
        eval_epoch_start eval_step_start CALCULATE_EVAL_BATCH_LOSS eval_step_end exception run_close
    """)


def test_an_agreed_stop() -> None:
    """The update is finished, the epoch closed without evaluating what was cut short, and the run ends in order."""
    trainer = tell(Acting("on_train_step_end", 1, lambda trainer: trainer.request_stop("seen enough")))
    train(trainer)
    assert trainer.stop_reason == "seen enough"
    assert trainer.story == in_words(f"""
        init_end {PREPARATION} TRAIN_EPOCH_START train_epoch_start
        {STEP} {STEP} {UPDATE}
        TRAIN_EPOCH_END train_epoch_end TRAINING_RUN_END training_run_end run_close
    """)


def test_a_limit_in_the_middle_of_an_epoch() -> None:
    """The run has come to its end, so the epoch is closed and evaluated."""
    trainer = tell()
    train(trainer, max_num_train_steps=1)
    assert trainer.story == in_words(f"""
        init_end {PREPARATION} TRAIN_EPOCH_START train_epoch_start
        {STEP} {STEP} {UPDATE}
        TRAIN_EPOCH_END train_epoch_end {EVALUATION} evaluation_end TRAINING_RUN_EPOCH_END training_run_epoch_end
        TRAINING_RUN_END training_run_end run_close
    """)


def test_an_evaluation_in_the_middle_of_an_epoch() -> None:
    def evaluate(trainer: Trainer) -> None:
        trainer.run_eval_epoch(metric_prefix="intermediate_eval", is_intermediate=True)

    trainer = tell(Acting("on_optimizer_step_end", 1, evaluate))
    train(trainer, num_epochs=1)
    before_event = UPDATE.replace("optimizer_step_end", "")
    assert trainer.story == in_words(f"""
        init_end {PREPARATION} TRAIN_EPOCH_START train_epoch_start
        {STEP} {STEP} {before_event} {EVALUATION} evaluation_end optimizer_step_end {STEP} {UPDATE}
        TRAIN_EPOCH_END train_epoch_end {EVALUATION} evaluation_end TRAINING_RUN_EPOCH_END training_run_epoch_end
        TRAINING_RUN_END training_run_end run_close
    """)


def test_saving_and_loading(tmp_path: Path) -> None:
    trainer = tell(
        Acting("on_optimizer_step_end", 1, lambda trainer: trainer.save_training_state(tmp_path / "state"))
    )
    train(trainer, max_num_train_steps=1)
    saved = trainer.story.index("checkpoint_saved")
    assert trainer.story[saved - 1 : saved + 2] == in_words(
        "OPTIMIZER_ZERO_GRAD checkpoint_saved optimizer_step_end"
    )
    trainer = tell()
    train(trainer, max_num_train_steps=2, resume_from=tmp_path / "state")
    assert trainer.story[trainer.story.index("training_run_start") :][:4] == in_words("""
        training_run_start TRAIN_EPOCH_START train_epoch_start checkpoint_loaded
    """)


def test_what_the_events_are_told() -> None:
    heard: dict[str, dict[str, Any]] = {}

    class Listener(TrainerCallback):
        pass

    for event in EVENTS:

        def listen(self: Any, trainer: Any, _event: str = event, **kwargs: Any) -> None:
            heard[_event] = kwargs

        setattr(Listener, event, listen)
    train(tell(Listener()), num_epochs=1)
    told = {event: set(kwargs) for event, kwargs in heard.items() if kwargs}
    assert told == {
        "on_train_step_start": {"batch"},
        "on_train_step_end": {"batch", "batch_output", "step"},
        "on_eval_epoch_start": {"is_intermediate", "metric_prefix"},
        "on_eval_step_start": {"batch"},
        "on_eval_step_end": {"batch", "batch_output"},
        "on_eval_epoch_end": {"is_intermediate", "metric_prefix"},
        "on_evaluation_end": {"is_intermediate", "metric_prefix"},
    }
    assert heard["on_train_step_end"]["step"] == 2
    assert set(heard["on_train_step_end"]["batch_output"]) == {"loss", "model_outputs", "batch_size"}
    assert heard["on_eval_epoch_end"] == {"is_intermediate": False, "metric_prefix": "eval"}


def test_what_holds_at_each_event() -> None:
    """Modes, gradients, counters and the history are as the table of events says."""

    class Checks(TrainerCallback):
        def on_train_epoch_start(self, trainer: Trainer) -> None:
            assert trainer.model.training

        def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
            self.before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
            assert all(parameter.grad is not None for parameter in trainer.model.parameters())

        def on_optimizer_step_start(self, trainer: Trainer) -> None:
            self.updates = trainer.run_progress.updates_completed
            assert all(map(torch.equal, self.before, trainer.model.parameters()))

        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            assert (
                trainer.run_progress.updates_completed
                == trainer.run_history.current_update
                == self.updates + 1
            )
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
            assert not any(map(torch.equal, self.before, trainer.model.parameters()))

        def on_train_epoch_end(self, trainer: Trainer) -> None:
            assert trainer.run_history.get_metric_names() >= {"train_loss_epoch"}

        def on_eval_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
            assert not trainer.model.training

        def on_eval_step_end(self, trainer: Trainer, batch_output: Any, **kwargs: Any) -> None:
            assert not batch_output["loss"].requires_grad

        def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
            assert trainer.model.training
            assert trainer.run_history.get_metric_names() >= {"eval_loss_epoch"}

        def on_training_run_epoch_end(self, trainer: Trainer) -> None:
            self.epochs = trainer.run_progress.epochs_completed

    checks = Checks()
    train(tell(checks))
    assert (checks.updates, checks.epochs) == (3, 2)


SCRIPT = """
import sys, time
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import TensorDataset
from accel_core import Trainer, TrainerCallback

class Teller(TrainerCallback):
    def on_optimizer_step_end(self, trainer):
        Path(sys.argv[1]).touch()
        time.sleep(0.01)

    def on_exception(self, trainer, error):
        print("exception", type(error).__name__)

    def on_run_close(self, trainer):
        print("run_close")

model = nn.Linear(2, 1)
trainer = Trainer(model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1), callbacks=[Teller])
data = TensorDataset(torch.ones(4, 2), torch.ones(4, 1))
kwargs = {"per_device_batch_size": 2, "train_dataloader_kwargs": {"num_workers": 1}}
try:
    trainer.train(data, num_epochs=100_000, **kwargs)
except KeyboardInterrupt:
    print("interrupted;", trainer.model is model)
    Path(sys.argv[1]).unlink()
    trainer.callbacks.clear_callbacks()
    trainer.train(data, num_epochs=1, **kwargs)
    print("trained again,", trainer.run_progress.epochs_completed)
"""


def test_ctrl_c(tmp_path: Path) -> None:
    """A real SIGINT: everything is closed, the script goes on, and no worker of the data loader is left."""
    with start(SCRIPT, processes=1, args=[tmp_path / "training"]) as running:
        wait_until((tmp_path / "training").exists, running)
        running.process.send_signal(signal.SIGINT)
        finished = running.wait()
        assert finished.returncode == 0, finished.stderr
        told = ["exception KeyboardInterrupt", "run_close", "interrupted; True", "trained again, 1"]
        assert finished.stdout.splitlines() == told
        assert running.tree() == []
