"""What engines that shard give on several processes beside what each layout promises: FSDP2, and ZeRO of three stages.

`tests/promises/test_layout_fsdp2.py` and `test_layout_zero.py` run the cases and have the tests. How the engines run
on a CPU is told in `tests/sharding.py`.
"""

import contextlib
import io
import os
import re
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import TensorDataset

from accel_callbacks import SaveBestModelCallback
from accel_core import (
    CheckpointError,
    ConfigurationError,
    TerminateOnNaNCallback,
    Trainer,
    TrainerCallback,
)
from accel_core.engines.parts import local_shard
from accel_core.state.files import read_tensors
from case_runner import assert_equal, shared_folder
from tiny import ONE_CYCLE, EvaluateInMidEpoch, SaveAt, Stream

ROOT = Path(__file__).parents[1]
NUM_TOKENS = 6


def make_data(num_samples, num_targets=()):
    generator = torch.Generator().manual_seed(num_samples)
    inputs = torch.randn(num_samples, 5, generator=generator)
    return TensorDataset(
        inputs,
        torch.randint(0, 3, (num_samples, *num_targets), generator=generator),
        torch.arange(num_samples),
    )


def make_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def make_trainer(callbacks=(), trainer_class=Trainer, model=None, optimizer_class=torch.optim.AdamW):
    model = make_model() if model is None else model
    optimizer = optimizer_class(model.parameters(), lr=0.05)
    return trainer_class(model, nn.CrossEntropyLoss(), optimizer, callbacks, seed=7)


def exported(trainer):
    path = shared_folder() / "model.safetensors"
    trainer.save_checkpoint(path)
    return read_tensors(path)


def outcome_of(trainer):
    return {
        "weights": exported(trainer),
        "history": {
            f"{r['name']} {r['epoch']}/{r['update']}": r["value"] for r in trainer.run_history.to_records()
        },
        "updates": trainer.run_progress.updates_completed,
        "is stopped": trainer.stop_reason == "enough",
    }


class Export(TrainerCallback):
    """Exports at the end of the run, while the model is wrapped."""

    order = 1

    def on_training_run_end(self, trainer):
        self.weights = exported(trainer)


def train(batch_size, data=None, callbacks=(), trainer_class=Trainer, accumulation=3, model=None, **kwargs):
    """Train on uneven data, with windows that are shorter at the end."""
    trainer = make_trainer(callbacks, trainer_class, model)
    kwargs = {"num_epochs": 2, "eval_dataset": make_data(13), **kwargs}
    data = make_data(37) if data is None else data
    trainer.train(data, per_device_batch_size=batch_size, gradient_accumulation_steps=accumulation, **kwargs)
    return outcome_of(trainer)


class StopAt(TrainerCallback):
    """Asks on the last process only, in the last update of an epoch, from within a step."""

    def on_train_step_end(self, trainer, **kwargs):
        accelerator = trainer.accelerator
        is_last = accelerator.process_index == accelerator.num_processes - 1
        if is_last and trainer.run_progress.updates_completed == 5:
            trainer.request_stop("enough")


class TokenTrainer(Trainer):
    """A loss that is the mean over the tokens that count, of which each sample has another number."""

    def targets_of(self, batch):
        targets = batch[1].clone()
        targets[torch.arange(NUM_TOKENS) > (batch[2] % NUM_TOKENS)[:, None]] = -100
        return targets

    def calculate_train_batch_loss(self, batch):
        outputs, targets = self.model(batch[0]).reshape(-1, NUM_TOKENS, 3), self.targets_of(batch)
        loss = nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())
        count = (targets != -100).sum()
        return {
            "loss": loss,
            "model_outputs": outputs,
            "batch_size": len(targets),
            "num_items_in_batch": count,
        }


class TokensCountedAhead(TokenTrainer):
    def count_items(self, batch):
        return int((self.targets_of(batch) != -100).sum())


class SamplesCountedAhead(Trainer):
    def count_items(self, batch):
        return len(batch[0])


def train_tokens(batch_size, trainer_class):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3 * NUM_TOKENS))
    data = make_data(37, (NUM_TOKENS,))
    return train(batch_size, data, trainer_class=trainer_class, model=model, eval_dataset=None)


def keep_all(samples):
    return torch.utils.data.default_collate(samples)


def two_trainers(batch_size):
    """One accelerator: they train by turns and are evaluated between, and each state holds its own model."""
    accelerator, folder = Accelerator(), shared_folder()
    kwargs = {"per_device_batch_size": batch_size, "eval_dataset": make_data(13), "gradient_clip_norm": 0.5}

    def create(seed, callbacks=()):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks, accelerator=accelerator, seed=7)
        trainer.trust_engine_files = True
        return trainer

    one, other = (create(seed, [SaveAt(2, folder / str(seed))]) for seed in (3, 5))
    for trainer in (one, other, one):
        trainer.train(make_data(37), 1, reset_run_history=False, **kwargs)
    resumed = create(6)
    resumed.train(make_data(37), 1, resume_from=folder / "5", **kwargs)
    measured = [trainer.evaluate(make_data(13)) for trainer in (one, other, resumed)]
    return outcome_of(one), outcome_of(other), outcome_of(resumed), measured


def export_and_load(batch_size):
    """The best weights are in the model at the end of the first run, and the second goes on from them, whatever came before."""
    path = shared_folder() / "best.pt"
    kwargs = {"per_device_batch_size": batch_size, "eval_dataset": make_data(13)}
    best = SaveBestModelCallback(path, watch_metric="train_loss_epoch", greater_is_better=True)
    first = make_trainer([best], optimizer_class=torch.optim.SGD)
    first.train(make_data(37), 3, **kwargs)
    first.train(make_data(37), 1, **kwargs)
    other = make_trainer(optimizer_class=torch.optim.SGD)
    other.load_checkpoint(path, load_optimizer=False)
    other.train(make_data(37), 1, **kwargs)
    keys = sorted(torch.load(path, weights_only=True))
    return {"first": exported(first), "other": exported(other), "keys": keys}


def poison(batch_size):
    """From the third update on a weight that the last process holds is not finite; no process writes it down."""
    folder = shared_folder()

    class Poison(TrainerCallback):
        error = None

        def on_optimizer_step_end(self, trainer):
            accelerator, update = trainer.accelerator, trainer.run_progress.updates_completed
            if update == 3 and accelerator.process_index == accelerator.num_processes - 1:
                with torch.no_grad():
                    for parameter in trainer.model.parameters():
                        local_shard(parameter).fill_(float("inf"))
            try:
                trainer.save_training_state(folder / f"update_{update}")
            except CheckpointError as error:
                self.error = str(error)

    listener = Poison()
    trainer = make_trainer([listener])
    trainer.train(make_data(37), max_num_train_steps=3, per_device_batch_size=batch_size)
    return {"error": listener.error, "saved": sorted(os.listdir(folder))}


def diverge(batch_size):
    """The loss of the last process is not a number in the third update."""
    accelerator, losses = Accelerator(), []

    def loss_func(outputs, targets):
        losses.append(nn.functional.cross_entropy(outputs, targets))
        is_last = accelerator.process_index == accelerator.num_processes - 1
        return losses[-1] * (float("nan") if len(losses) == 3 and is_last else 1.0)

    trainer = make_trainer([TerminateOnNaNCallback])
    trainer.loss_func = loss_func
    trainer.train(make_data(37), 2, per_device_batch_size=batch_size)
    return {"updates": trainer.run_progress.updates_completed, "reason": trainer.stop_reason}


def normalise(batch_size):
    """Batch statistics are those of the main process when the model is evaluated and exported."""
    torch.manual_seed(3)
    export = Export()
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    trainer = make_trainer([export], model=model)
    trainer.train(make_data(36), 1, per_device_batch_size=batch_size)
    measured = trainer.evaluate(make_data(13), per_device_batch_size=batch_size)
    alone = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    alone.load_state_dict(export.weights)
    inputs, targets, _ = make_data(13).tensors
    with torch.no_grad():
        return measured["evaluation_loss"], nn.functional.cross_entropy(alone(inputs), targets).item()


class OwnStep(Trainer):
    def optimizer_step(self):
        super().optimizer_step()


def refuse(batch_size):
    """What an engine cannot do is said before anything has changed."""
    data = make_data(37)
    # What accel does not know has to be counted by the user; of a cross entropy it counts the targets itself.
    unknown = make_trainer()
    unknown.loss_func = lambda outputs, targets: nn.functional.cross_entropy(outputs, targets) + 0.0
    runs = {
        "clipping by value": (make_trainer(), data, {"gradient_clip_value": 0.1}),
        "own step": (make_trainer(trainer_class=OwnStep), data, {}),
        "stream": (unknown, Stream(data), {}),
    }
    told = {}
    for name, (trainer, train_data, kwargs) in runs.items():
        before = [parameter.clone() for parameter in trainer.model.parameters()]
        try:
            trainer.train(train_data, 1, per_device_batch_size=batch_size, **kwargs)
        except ConfigurationError as error:
            told[name] = str(error)
            assert all(map(torch.equal, before, trainer.model.parameters()))
    try:
        train_tokens(batch_size, TokenTrainer)
    except ConfigurationError as error:
        told["tokens"] = str(error)
    return told


def run_example(batch_size):
    """What examples/06_two_processes.py prints, as it stands."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(ROOT / "examples" / "06_two_processes.py"), run_name="__main__")
    return printed.getvalue().splitlines()


EQUAL = {
    "uneven": train,
    "without accumulation": partial(train, accumulation=1, create_scheduler_fn=ONE_CYCLE),
    "clipped by norm": partial(train, gradient_clip_norm=0.05),
    "clipped hardly": partial(train, gradient_clip_norm=100.0),
    "limited updates": partial(train, accumulation=2, num_epochs=None, max_num_train_steps=5),
    "mid-epoch evaluation": partial(train, callbacks=[EvaluateInMidEpoch()]),
    "stopped in the last update of an epoch": partial(
        train, callbacks=[StopAt()], accumulation=2, num_epochs=5
    ),
    "two trainers": two_trainers,
    "less than a step": lambda batch_size: train(batch_size, make_data(1)),
    "own collate": partial(train, collate_fn=keep_all),
    "tokens counted ahead": partial(train_tokens, trainer_class=TokensCountedAhead),
    "iterable": lambda batch_size: train(
        batch_size, Stream(make_data(37)), trainer_class=SamplesCountedAhead
    ),
}
CASES = {
    **EQUAL,
    "export": export_and_load,
    "poison": poison,
    "nan": diverge,
    "batch norm": normalise,
    "refusals": refuse,
    "example": run_example,
}


class ShardingPromises:
    """What FSDP2 and ZeRO have in common."""

    @pytest.mark.parametrize("case", EQUAL)
    def test_training_equals_one_process_with_the_global_batch(self, outcome, case):
        for result in outcome.of(case):
            assert_equal(result, outcome.alone(case))

    def test_an_export_holds_whole_weights_and_can_be_gone_on_from(self, outcome):
        alone = outcome.alone("export")
        for result in outcome.of("export"):
            assert set(alone["keys"]) - set(result["keys"]) == {"optimizer_state_dict"}
            assert_equal(result["first"], alone["first"])
            assert_equal(result["other"], alone["other"])

    def test_parameters_that_are_not_finite_on_one_process_are_saved_by_nobody(self, outcome):
        for result in outcome.of("poison"):
            assert re.search("is not finite.*not saved", result["error"])
            assert result["saved"] == ["update_1", "update_2"]

    def test_a_loss_that_is_nan_on_one_process_stops_all(self, outcome):
        first, second = outcome.of("nan")
        assert first == second
        assert first["updates"] == 4 and re.search("loss.* nan", first["reason"])

    def test_batch_statistics_of_the_main_process_are_evaluated_and_exported(self, outcome):
        results = outcome.of("batch norm")
        for measured, alone in results:
            assert measured == results[0][0]
            assert measured == pytest.approx(alone, rel=1e-5)

    def test_the_example_prints_what_it_prints_on_one_process(self, outcome):
        main, other = outcome.of("example")
        # How long an epoch took is told too.
        lines, alone = (
            [re.sub(r"[\d,]+ samples/s · [\d.]+ s$", "", line) for line in printed]
            for printed in (main, outcome.alone("example"))
        )
        assert lines == alone and other == []
        assert any(line.startswith("Training ended after") for line in main)
