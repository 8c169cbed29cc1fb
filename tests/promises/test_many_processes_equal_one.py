"""Promise 4 across processes: training on several is training on one with the global batch."""

import random
import re
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Sampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from accel_callbacks import SaveTrainingStateCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_core.state.files import read_tensors
from case_runner import BATCH_SIZE, run_as_script, shared_folder
from tiny import ONE_CYCLE, CountsTargets, EvaluateInMidEpoch, Stream

NUM_TOKENS = 6


def make_data(num_samples, num_targets=()):
    generator = torch.Generator().manual_seed(num_samples)
    inputs = torch.randn(num_samples, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 3, (num_samples, *num_targets), generator=generator)
    return TensorDataset(inputs, targets, torch.arange(num_samples))


def make_model(seed=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


class Watcher(TrainerCallback):
    """Which samples each update took on this process, and the learning rate that it had."""

    def on_training_run_start(self, trainer):
        self.updates, self.current, self.rates, self.norms = [], [], [], []

    def on_train_step_end(self, trainer, batch, batch_output, step):
        self.current += batch[2].tolist()

    def on_optimizer_step_start(self, trainer):
        self.rates.append(trainer.optimizer.param_groups[0]["lr"])

    def on_optimizer_step_end(self, trainer):
        self.updates.append(self.current)
        self.current = []


class GatherInTheStep(TrainerCallback):
    """Gathers in every step of training; where that cannot be, the error is kept."""

    def __init__(self):
        self.gathered, self.error = [], None

    def on_train_step_end(self, trainer, batch, **kwargs):
        if self.error is None:
            try:
                self.gathered += trainer.gather(batch[2]).tolist()
            except ConfigurationError as error:
                self.error = str(error)


def gather_in_steps(batch_size):
    """With a tail of one sample, without it, and with one that is dropped."""
    gathered = []
    for num_samples, kwargs in [(25, {}), (24, {}), (25, {"drop_last": True})]:
        listener = GatherInTheStep()
        train(
            batch_size,
            make_data(num_samples),
            [listener],
            num_epochs=1,
            train_dataloader_kwargs={**kwargs, "shuffle": False},
        )
        gathered.append((listener.gathered, listener.error))
    return gathered


def rotate(batch_size):
    """Lesson A20: every process used to remove the old states, and the job died."""
    folder = shared_folder()
    train(
        batch_size,
        callbacks=[SaveTrainingStateCallback(folder, save_every_n_updates=1, keep_last=2)],
        accumulation=1,
    )
    Accelerator().wait_for_everyone()
    return sorted(path.name for path in folder.glob("update_*"))


def train_on_unlike_data(batch_size):
    """What each process was told where the last has a sample less, or was given another limit."""
    is_last, told = Accelerator().process_index == Accelerator().num_processes - 1, []
    for num_samples, num_epochs in [(25 - is_last, 1), (25, 1 + is_last)]:
        with pytest.raises(ConfigurationError) as raised:
            train(batch_size, make_data(num_samples), num_epochs=num_epochs)
        told.append(str(raised.value))
    return told


class DrawingSampler(Sampler):
    """Draws from the global random states, which differ between processes."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        indices = torch.randperm(len(self.data)).tolist()
        random.shuffle(indices)
        return iter(np.random.permutation(indices).tolist())


class EpochSampler(DrawingSampler):
    """Has an order for each epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(np.random.default_rng(self.epoch).permutation(len(self)).tolist())


class DrawingBatches(BatchSampler):
    """Ready batches in an order that is drawn from the global random state."""

    def __iter__(self):
        batches = list(super().__iter__())
        random.shuffle(batches)
        return iter(batches)


class OwnLoader(DataLoader):
    """A loader of another kind than torch's own."""


def drop_every_seventh(samples):
    return torch.utils.data.default_collate([sample for sample in samples if sample[2] % 7])


def train(
    batch_size,
    data=None,
    callbacks=(),
    trainer_class=Trainer,
    accumulation=3,
    model=None,
    weights=None,
    **kwargs,
):
    """Train on 37 samples, and return all that must not depend on the number of processes."""
    data = make_data(37) if data is None else data
    model = make_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    watcher = Watcher()
    trainer = trainer_class(model, nn.CrossEntropyLoss(), optimizer, [watcher, *callbacks], seed=7)
    kwargs = {"num_epochs": 2, "eval_dataset": make_data(13), **kwargs}
    trainer.train(data, per_device_batch_size=batch_size, gradient_accumulation_steps=accumulation, **kwargs)
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "history": {
            f"{r['name']} {r['epoch']}/{r['update']}": r["value"] for r in trainer.run_history.to_records()
        },
        "progress": (trainer.run_progress.updates_completed, trainer.run_progress.epochs_completed),
        "rates": watcher.rates,
        "updates": watcher.updates,
    }


def train_batches(batch_size, kind):
    """Ready batches of four are dealt out whole: one process takes as many to an update as the others together."""
    data = make_data(37)
    if kind == "batch sampler":
        sampler = DrawingBatches(SequentialSampler(data), BATCH_SIZE, drop_last=False)
        loader = DataLoader(data, batch_sampler=sampler)
    elif kind == "iterable batches":
        loader = DataLoader(Stream(list(DataLoader(data, batch_size=BATCH_SIZE))), batch_size=None)
    else:
        loader = OwnLoader(data, batch_size=BATCH_SIZE)
    return train(BATCH_SIZE, loader, accumulation=3 * (batch_size // BATCH_SIZE))


class TokenTrainer(Trainer):
    """A loss that is the mean over the tokens of a batch that count, of which each sample has another number."""

    def calculate_train_batch_loss(self, batch):
        outputs = self.model(batch[0]).reshape(-1, NUM_TOKENS, 3)
        targets = batch[1].clone()
        targets[torch.arange(NUM_TOKENS) > (batch[2] % NUM_TOKENS)[:, None]] = -100
        loss = nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())
        return {
            "loss": loss,
            "model_outputs": outputs,
            "batch_size": len(targets),
            "num_items_in_batch": (targets != -100).sum(),
            "log": {"confidence": nn.functional.softmax(outputs, -1).amax(-1)[targets != -100].mean()},
        }


class EvaluatedTokens(TokenTrainer):
    def calculate_eval_batch_loss(self, batch):
        return self.calculate_train_batch_loss(batch)


def train_tokens(batch_size):
    torch.manual_seed(3)
    model = nn.Linear(5, 3 * NUM_TOKENS).double()
    return train(
        batch_size, make_data(37, (NUM_TOKENS,)), trainer_class=TokenTrainer, model=model, eval_dataset=None
    )


class Unfreeze(TrainerCallback):
    """Unfreezes the first layer before an epoch, in its first event, or in the middle of it."""

    def __init__(self, event):
        self._event = event

    def unfreeze(self, trainer, event):
        if event == self._event and trainer.run_progress.updates_completed >= 2:
            trainer.get_model()[0].requires_grad_(True)

    def on_training_run_epoch_end(self, trainer):
        self.unfreeze(trainer, "epoch end")

    def on_train_epoch_start(self, trainer):
        self.unfreeze(trainer, "epoch start")

    def on_optimizer_step_end(self, trainer):
        self.unfreeze(trainer, "update")


def train_unfreezing(batch_size, event):
    model = make_model()
    model[0].requires_grad_(False)
    return train(batch_size, model=model, callbacks=[Unfreeze(event)], accumulation=1, num_epochs=3)


def train_what_was_frozen(batch_size):
    """Evaluated while there was nothing to train, from other weights on each process; trained afterwards."""
    model = make_model(seed=3 + Accelerator().process_index).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, [], seed=7)
    before = trainer.evaluate(make_data(13), per_device_batch_size=batch_size)
    model.requires_grad_(True)
    trainer.train(make_data(37), num_epochs=1, per_device_batch_size=batch_size)
    return before, dict(model.state_dict())


class Noisy(nn.Module):
    """Batch norm, which accepts a single sample here, and dropout."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm1d(1), nn.Dropout(0.3), nn.Flatten(), nn.Linear(5, 3)
        ).double()

    def forward(self, inputs):
        return self.layers(inputs[:, None])


class Recorder(TrainerCallback):
    """The state that this process alone has, before anything is exported."""

    def on_training_run_end(self, trainer):
        model = trainer.get_model()
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self.random = (torch.get_rng_state(), random.random(), np.random.rand())


def train_noisy(data, callbacks, **kwargs):
    torch.manual_seed(3)
    recorder = Recorder()
    model = Noisy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, [*callbacks, recorder], seed=7)
    trainer.train(data, num_epochs=1, **kwargs)
    return trainer, {
        "weights": dict(model.state_dict()),
        "buffers": recorder.buffers,
        "random": recorder.random,
    }


def train_with_and_without_evaluating(batch_size):
    kwargs = {
        "per_device_batch_size": batch_size,
        "gradient_accumulation_steps": 2,
        "eval_dataset": make_data(13),
    }
    return [train_noisy(make_data(37), callbacks, **kwargs)[1] for callbacks in ([], [EvaluateInMidEpoch()])]


def train_with_and_without_idle_steps(batch_size):
    """The last sample of the second run falls to the main process; the others repeat a batch."""
    num_samples = batch_size * Accelerator().num_processes
    kwargs = {"per_device_batch_size": batch_size, "train_dataloader_kwargs": {"shuffle": False}}
    data = make_data(num_samples + 1)
    return [train_noisy(data, [], **kwargs)[1] for data in (Subset(data, range(num_samples)), data)]


def save_and_export(batch_size):
    """What is saved, exported, evaluated and predicted with, and the buffers that each process had."""
    folder = shared_folder()

    class Save(TrainerCallback):
        order = 1

        def on_training_run_end(self, trainer):
            trainer.save_checkpoint(f"{folder}/model.safetensors")
            trainer.save_training_state(f"{folder}/state")

    trainer, result = train_noisy(
        make_data(37), [Save()], per_device_batch_size=batch_size, gradient_accumulation_steps=2
    )
    used = trainer.evaluate(make_data(5), per_device_batch_size=batch_size)
    trainer.accelerator.wait_for_everyone()
    exported, saved = (
        read_tensors(f"{folder}/model.safetensors"),
        read_tensors(f"{folder}/state/model.safetensors"),
    )
    return {"own": result["buffers"], "exported": exported, "saved": saved, "evaluation": used}


ALL_AT_ONCE = {
    "callbacks": [EvaluateInMidEpoch()],
    "gradient_clip_norm": 0.05,
    "create_scheduler_fn": ONE_CYCLE,
    "num_epochs": None,
    "max_num_train_steps": 7,
}


def train_with_all_at_once(batch_size):
    """Uneven data, short windows, counted tokens, a limit in the middle of an epoch, clipping, a schedule and evaluations."""
    torch.manual_seed(3)
    model = nn.Linear(5, 3 * NUM_TOKENS).double()
    eval_dataset = make_data(13, (NUM_TOKENS,))
    data = make_data(37, (NUM_TOKENS,))
    return train(
        batch_size, data, trainer_class=EvaluatedTokens, model=model, eval_dataset=eval_dataset, **ALL_AT_ONCE
    )


EQUAL = {
    "plain": train,
    "in memory in order": partial(train, train_dataloader_kwargs={"shuffle": False}),
    "from a list": lambda batch_size: train(batch_size, list(make_data(37))),
    "with workers": partial(train, num_epochs=1, train_dataloader_kwargs={"num_workers": 1}),
    "without accumulation": partial(train, accumulation=1),
    "less than a step": lambda batch_size: train(batch_size, make_data(2)),
    "a single sample": lambda batch_size: train(batch_size, make_data(1)),
    "drop_last": partial(train, accumulation=2, train_dataloader_kwargs={"drop_last": True}),
    "clipped by value": partial(train, gradient_clip_value=0.02),
    "clipped by norm": partial(train, gradient_clip_norm=0.05),
    "tokens": train_tokens,
    "all at once": train_with_all_at_once,
    "collate that drops": partial(train, collate_fn=drop_every_seventh, trainer_class=CountsTargets),
    "one cycle": partial(train, create_scheduler_fn=ONE_CYCLE, accumulation=1),
    "rate by epoch": partial(
        train,
        create_scheduler_fn=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        scheduler_step_every="epoch",
    ),
    "rate by metric": partial(
        train,
        create_scheduler_fn=partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=1.0),
        num_epochs=4,
    ),
    "limited updates": partial(train, accumulation=1, num_epochs=None, max_num_train_steps=10),
    "limited updates in one epoch": partial(train, accumulation=2, max_num_train_steps=1),
    "mid-epoch evaluation": partial(train, callbacks=[EvaluateInMidEpoch()]),
    "iterable": lambda batch_size: train(batch_size, Stream(make_data(37))),
    "iterable of one sample": lambda batch_size: train(batch_size, Stream(make_data(1))),
    "generator": lambda batch_size: train(
        batch_size, DataLoader(Stream(make_data(37)), batch_size=batch_size)
    ),
    "drawing sampler": lambda batch_size: train(
        batch_size, train_dataloader_kwargs={"sampler": DrawingSampler(make_data(37))}
    ),
    "sampler by epoch": lambda batch_size: train(
        batch_size, train_dataloader_kwargs={"sampler": EpochSampler(make_data(37))}
    ),
    "weighted sampler": lambda batch_size: train(
        batch_size, train_dataloader_kwargs={"sampler": WeightedRandomSampler(torch.arange(1.0, 38.0), 37)}
    ),
    **{
        kind: partial(train_batches, kind=kind)
        for kind in ("batch sampler", "iterable batches", "foreign loader")
    },
    **{
        f"unfreezing by {event}": partial(train_unfreezing, event=event)
        for event in ("epoch end", "epoch start", "update")
    },
}
CASES = {
    **EQUAL,
    "what was frozen": train_what_was_frozen,
    "with and without evaluating": train_with_and_without_evaluating,
    "with and without idle steps": train_with_and_without_idle_steps,
    "save and export": save_and_export,
    "gather in steps": gather_in_steps,
    "rotate": rotate,
    "unlike data": train_on_unlike_data,
}


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", EQUAL)
def test_training_equals_one_process_with_the_global_batch(outcome, case):
    alone = outcome.alone(case)
    for result in outcome.of(case):
        assert result["progress"] == alone["progress"]
        assert_equal(result["rates"], alone["rates"])
        assert_equal(result["weights"], alone["weights"])
        assert_equal(result["history"], alone["history"])


@pytest.mark.parametrize("case", EQUAL)
def test_each_update_takes_the_same_samples_as_on_one_process(outcome, case):
    by_process = [result["updates"] for result in outcome.of(case)]
    together = [sorted(index for part in parts for index in part) for parts in zip(*by_process, strict=True)]
    assert together == [sorted(update) for update in outcome.alone(case)["updates"]]


def test_every_process_makes_as_many_updates_as_were_asked_for(outcome):
    """Lesson A12: two processes used to make 8 of 10."""
    assert [result["progress"][0] for result in outcome.of("limited updates")] == [10] * outcome.processes


def test_gathering_in_a_step_joins_the_samples_or_is_refused_before_it_hangs(outcome):
    last = outcome.processes - 1
    for with_tail, without_tail, dropped in outcome.of("gather in steps"):
        where = f"gather .*training step.* process {last} of {outcome.processes} has no batch"
        way_out = "on_optimizer_step_end.*train_dataloader_kwargs={'drop_last': True}"
        assert with_tail[0] == [] and re.search(f"{where}.*{way_out}", with_tail[1])
        assert without_tail == dropped == (list(range(24)), None)


def test_unlike_data_or_numbers_are_refused_on_every_process_before_they_hang(outcome):
    processes = outcome.processes
    samples, epochs = [*[25] * (processes - 1), 24], [*[1] * (processes - 1), 2]
    for of_samples, of_epochs in outcome.of("unlike data"):
        assert re.search(
            rf"samples.* train_dataset is {re.escape(str(samples))} .*\b{processes} processes", of_samples
        )
        assert re.search(rf"num_epochs is {re.escape(str(epochs))} .*\b{processes} processes", of_epochs)


def test_old_states_are_removed_by_one_process(outcome):
    assert all(names == outcome.alone("rotate") for names in outcome.of("rotate"))
    assert len(outcome.alone("rotate")) == 2


def test_a_schedule_is_run_to_its_end_on_every_process(outcome):
    for result in outcome.of("one cycle"):
        assert max(result["rates"]) > 0.29 and result["rates"][-1] < 0.3 / 25


def test_a_model_that_was_frozen_when_it_was_wrapped_begins_equal_and_stays_equal(outcome):
    for result in outcome.of("what was frozen"):
        assert_equal(result, outcome.alone("what was frozen"))


def test_evaluating_in_mid_epoch_changes_nothing(outcome):
    for without, with_evaluation in outcome.of("with and without evaluating"):
        torch.testing.assert_close(with_evaluation, without, rtol=0, atol=0)


def test_an_idle_step_leaves_buffers_and_random_state_as_they_were(outcome):
    results = outcome.of("with and without idle steps")
    assert [with_rest["buffers"]["layers.0.num_batches_tracked"].item() for _, with_rest in results][:2] == [
        2,
        1,
    ]
    for without_rest, with_rest in results[1:]:
        torch.testing.assert_close(with_rest["random"], without_rest["random"], rtol=0, atol=0)
        torch.testing.assert_close(with_rest["buffers"], without_rest["buffers"], rtol=0, atol=0)


def test_buffers_of_the_main_process_are_saved_exported_and_evaluated(outcome):
    results = outcome.of("save and export")
    own = [result["own"] for result in results]
    assert not torch.equal(own[0]["layers.0.running_mean"], own[1]["layers.0.running_mean"])
    for result in results:
        for name, buffer in own[0].items():
            assert torch.equal(result["exported"][name], buffer)
            assert torch.equal(result["saved"][name], buffer)
        assert result["evaluation"] == results[0]["evaluation"]


if __name__ == "__main__":
    run_as_script(CASES)
