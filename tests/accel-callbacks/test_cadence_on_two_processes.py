"""However often is evaluated, and in whichever evaluation two processes are killed, there is one history.

The table is that of cadence, start and mid-epoch, on uneven sets, each row with a place of its own to be killed at.
"""

import itertools
from functools import partial

import pytest
import torch
from torch import nn

from accel_callbacks import (
    EarlyStoppingCallback,
    ModelAverageCallback,
    ModelEmaCallback,
    StepBasedEvaluationCallback,
)
from accel_core import TrainerCallback
from case_runner import run_as_script, shared_folder
from tiny import tiny_data, tiny_network, tiny_trainer, weights_of

EVERY, START, MID = (1, 2, 3), (False, True), (None, "sets of the run", "own set")
TABLE = list(itertools.product(EVERY, START, MID))
SETS = {"": 13, "shifted": 5, "single": 1}
EPOCHS = 3


class KilledError(Exception):
    """Stands for processes that end in the middle of something."""


class SaveAndKill(TrainerCallback):
    """Saves after every third update and each set of an evaluation of an epoch; fails where it is told."""

    order = 1000

    def __init__(self, folder, kill=None):
        self.folder = folder
        self.kill = kill
        """Number of an evaluation of a set from 1, and whether its beginning is meant, or its end."""
        self.number = {"start": 0, "end": 0}
        self.saved = 0

    def save(self, trainer):
        self.saved += 1
        trainer.save_training_state(self.folder / f"{self.saved}")

    def count(self, event):
        self.number[event] += 1
        if self.kill == (event, self.number[event]):
            raise KilledError

    def on_optimizer_step_end(self, trainer):
        if trainer.run_progress.updates_completed % 3 == 0:
            self.save(trainer)

    def on_eval_epoch_start(self, trainer, **kwargs):
        self.count("start")

    def on_eval_epoch_end(self, trainer, is_intermediate, metric_prefix):
        if not is_intermediate and "model" not in metric_prefix:
            self.save(trainer)
        self.count("end")


def create(every, at_start, mid, folder, kill):
    own = {"far": tiny_data(3), "near": tiny_data(7)} if mid == "own set" else None
    callbacks = [
        *([] if mid is None else [StepBasedEvaluationCallback(2, own)]),
        ModelEmaCallback(0.8, save_path=None, evaluate_in_mid_epoch=True),
        ModelAverageCallback(start_update=2, every_n_updates=2, save_path=None),
        EarlyStoppingCallback(50, 0.0, "shifted_eval_loss_epoch"),
        SaveAndKill(folder, kill),
    ]
    return tiny_trainer(callbacks=callbacks, model=nn.Sequential(nn.Dropout(0.3), tiny_network()))


def run(trainer, every, at_start, batch_size, **kwargs):
    sets = {name: tiny_data(size) for name, size in SETS.items()}
    trainer.train(
        tiny_data(27), EPOCHS, sets, batch_size, eval_every_n_epochs=every, eval_at_start=at_start, **kwargs
    )
    return trainer.run_history.to_records(), weights_of(trainer)


def row(number, batch_size):
    """The history of the undisturbed run, and that of one that was killed and went on."""
    every, at_start, mid = TABLE[number]
    folder = shared_folder()
    whole = create(every, at_start, mid, folder / "whole", None)
    results = [run(whole, every, at_start, batch_size)]
    evaluations = next(each for each in whole.callbacks if isinstance(each, SaveAndKill)).number["end"]
    # Within the first evaluation after an update, after its first set, and in the last evaluation.
    first = 1 + len(SETS) * at_start
    kill = [("start", first), ("end", first + 1), ("start", evaluations)][(number + number // 3) % 3]
    killed = create(every, at_start, mid, folder / "killed", kill)
    with pytest.raises(KilledError):
        run(killed, every, at_start, batch_size)
    rest = create(every, at_start, mid, folder / "rest", None)
    results.append(run(rest, every, at_start, batch_size, resume_from=killed.last_checkpoint))
    return results


NAMES = {f"{every} {at_start} {mid}": number for number, (every, at_start, mid) in enumerate(TABLE)}
CASES = {name: partial(row, number) for name, number in NAMES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_killed_in_an_evaluation_has_the_history_of_the_undisturbed_one(outcome, name):
    every, at_start, mid = TABLE[NAMES[name]]
    for whole, resumed in outcome.of(name):
        assert resumed[0] == whole[0]
        assert torch.equal(resumed[1], whole[1])
    records = outcome.of(name)[0][0][0]
    assert all(whole[0] == records for whole, _ in outcome.of(name))
    epochs = [r["epoch"] for r in records if r["name"] == "single_eval_loss_epoch"]
    assert epochs == [
        epoch
        for epoch in range(EPOCHS + 1)
        if (at_start if epoch == 0 else epoch % every == 0 or epoch == EPOCHS)
    ]
    mids = {r["name"] for r in records if "intermediate_eval_loss" in r["name"]}
    expected = {None: [], "sets of the run": ["", "shifted_", "single_"], "own set": ["far_", "near_"]}[mid]
    assert mids == {
        f"{start}{ema}intermediate_eval_loss_epoch" for start in expected for ema in ("", "ema_model_")
    }


@pytest.mark.slow
@pytest.mark.parametrize("every", EVERY)
def test_evaluations_never_change_training(outcome, every):
    names = [name for name in NAMES if TABLE[NAMES[name]][0] == every]
    weights = outcome.of("1 False None")[0][0][1]
    for name in names:
        assert torch.equal(outcome.of(name)[0][0][1], weights), name


if __name__ == "__main__":
    run_as_script(CASES)
