"""What the loop costs: exact counts, which hold on any machine, and ratios to a loop written by hand, which are loose."""

import importlib.util
import inspect
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split

from accel_core import Trainer, TrainerCallback
from accel_core.data.loader import ShardedDataLoader
from accel_core.engines.single import SingleProcess
from accel_core.processes.group import DataGroup

NOT_NEEDED = (
    "torchmetrics",
    "transformers",
    "timm",
    "torchvision",
    "tqdm.notebook",
    "matplotlib",
    "pandas",
    "sklearn",
)


class Pairs(Dataset):
    def __init__(self, *tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, index):
        return tuple(tensor[index] for tensor in self.tensors)


def data(num_samples, num_features=4):
    inputs = torch.randn(num_samples, num_features, generator=torch.Generator().manual_seed(0))
    return inputs, inputs[:, :3].argmax(1)


def create_trainer(num_features=4, **kwargs):
    torch.manual_seed(0)
    model = torch.nn.Linear(num_features, 3)
    return Trainer(
        model,
        torch.nn.functional.cross_entropy,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        **kwargs,
    )


class CountCalls(TrainerCallback):
    """Counts calls of a function from the first update on, so that what is done once a run is not seen."""

    def __init__(self, monkeypatch, owner, name):
        self.calls, self.is_counting, function = 0, False, getattr(owner, name)

        def counted(*args, **kwargs):
            self.calls += self.is_counting
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    def on_optimizer_step_end(self, trainer):
        self.is_counting = True

    def on_train_epoch_end(self, trainer):
        self.is_counting = False


@pytest.mark.parametrize(("owner", "name"), [(importlib.util, "find_spec"), (inspect, "signature")])
def test_no_step_searches_for_a_package_or_reads_a_signature(monkeypatch, owner, name):
    counter = CountCalls(monkeypatch, owner, name)
    trainer = create_trainer(callbacks=[counter])
    trainer.train(
        TensorDataset(*data(80)), num_epochs=2, gradient_accumulation_steps=2, gradient_clip_norm=1.0
    )
    assert counter.calls == 0
    monkeypatch.setattr(SingleProcess, "bypasses_accelerate", lambda engine, optimizer: False)
    trainer.train(TensorDataset(*data(80)), num_epochs=2)
    assert counter.calls > 0, "the counter sees what the long way does"


def count_python_calls(function):
    """Calls of functions written in Python, those of this library and all together."""
    own = total = 0

    def profile(frame, event, argument):
        nonlocal own, total
        if event == "call":
            total += 1
            own += "accel_core" in frame.f_code.co_filename

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return own, total


@pytest.mark.parametrize(("kind", "most_own"), [("memory", 33), ("any", 33)])
def test_a_training_step_makes_few_calls_and_as_many_in_a_long_epoch(monkeypatch, kind, most_own):
    # Whether the waiting is worth a sentence depends on how busy the machine is.
    monkeypatch.setattr("accel_core.data.waiting.SHARE_WORTH_A_REPORT", 2.0)
    calls = {}
    # The first run also learns which classes of objects may hold data.
    for num_steps in (20, 20, 40, 80):
        trainer = create_trainer()
        dataset = (TensorDataset if kind == "memory" else Pairs)(*data(8 * num_steps))
        calls[num_steps], _ = count_python_calls(
            lambda trainer=trainer, dataset=dataset: trainer.train(
                dataset, 1, train_dataloader_kwargs={"num_workers": 0}
            )
        )
    per_step = (calls[40] - calls[20]) / 20
    assert (calls[80] - calls[40]) / 40 == per_step
    assert per_step <= most_own


@pytest.mark.parametrize(("kind", "most_own"), [("memory", 14), ("any", 14)])
def test_an_evaluation_step_makes_few_calls_and_as_many_on_long_data(kind, most_own):
    calls = {}
    # The first run also learns which classes of objects may hold data.
    for num_steps in (20, 20, 40, 80):
        trainer = create_trainer()
        dataset = (TensorDataset if kind == "memory" else Pairs)(*data(8 * num_steps))
        calls[num_steps], _ = count_python_calls(
            lambda trainer=trainer, dataset=dataset: trainer.evaluate(
                dataset, dataloader_kwargs={"num_workers": 0}
            )
        )
    per_step = (calls[40] - calls[20]) / 20
    assert (calls[80] - calls[40]) / 40 == per_step
    assert per_step <= most_own


@pytest.mark.parametrize(("kind", "most_own"), [("memory", 375), ("any", 365)])
def test_a_short_epoch_with_its_evaluation_makes_few_calls(monkeypatch, kind, most_own):
    monkeypatch.setattr("accel_core.data.waiting.SHARE_WORTH_A_REPORT", 2.0)
    calls = {}
    for num_epochs in (10, 10, 20, 40):
        trainer = create_trainer()
        dataset = (TensorDataset if kind == "memory" else Pairs)(*data(8))
        calls[num_epochs], _ = count_python_calls(
            lambda trainer=trainer, dataset=dataset, num_epochs=num_epochs: trainer.train(
                dataset,
                num_epochs,
                dataset,
                train_dataloader_kwargs={"num_workers": 0},
                eval_dataloader_kwargs={"num_workers": 0},
            )
        )
    per_epoch = (calls[20] - calls[10]) / 10
    assert (calls[40] - calls[20]) / 20 <= per_epoch + 1, "a long run costs no more"
    assert per_epoch <= most_own


def test_an_event_that_nobody_hears_costs_no_call_of_a_callback():
    class HearsEpochs(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            pass

    counts = []
    for callbacks in ([], [HearsEpochs()] * 20):
        trainer = create_trainer(callbacks=callbacks)
        dataset = TensorDataset(*data(160))
        own = []
        for num_updates in (10, 20):
            own.append(
                count_python_calls(
                    lambda t=trainer, d=dataset, n=num_updates: t.train(d, max_num_train_steps=n)
                )[0]
            )
        counts.append(own[1] - own[0])
    assert counts[0] == counts[1]


def test_following_the_loss_never_waits_for_a_device_that_is_not_the_cpu():
    from accel_core import LossTracker

    tracker = LossTracker(torch.device("meta"))
    for _ in range(3):
        tracker.update(torch.zeros((), device="meta"), 8)
    with pytest.raises((RuntimeError, NotImplementedError)):
        tracker.average  # noqa: B018


IMPORTS = """
import json, sys, time
import torch, accelerate
before, start = set(sys.modules), time.process_time()
import {module}
print(json.dumps({{"seconds": time.process_time() - start, "modules": sorted(set(sys.modules) - before)}}))
"""


@pytest.mark.parametrize("module", ["accel_core", "accel_callbacks", "accel_integrations"])
def test_importing_a_package_imports_no_heavy_library(module):
    finished = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(module=module)], capture_output=True, text=True, check=True
    )
    imported = json.loads(finished.stdout)["modules"]
    assert module in imported
    assert [name for name in NOT_NEEDED if name in imported] == []


def batches_of(loader):
    sharded = ShardedDataLoader(loader, 5, torch.device("cpu"), DataGroup())
    sharded.begin_epoch(1)
    return sharded, [list(batch) for batch in sharded]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("part", ["all", "subset", "subset of a subset", "random split"])
def test_batches_by_index_are_those_that_are_read_sample_by_sample(part, shuffle):
    whole = TensorDataset(*data(50))
    parts = {
        "all": lambda: whole,
        "subset": lambda: Subset(whole, [3, 1, 40, 7, 7, 22, 10]),
        "subset of a subset": lambda: Subset(Subset(whole, list(range(40, 5, -2))), [0, 3, 5, 7, 9]),
        "random split": lambda: random_split(whole, [20, 30], generator=torch.Generator().manual_seed(1))[1],
    }
    dataset = parts[part]()
    by_index, found = batches_of(DataLoader(dataset, batch_size=4, shuffle=shuffle))
    usual, expected = batches_of(DataLoader(list(dataset), batch_size=4, shuffle=shuffle))
    assert type(by_index.source.torch_loader.dataset).__name__ == "IndexedTensors"
    assert type(usual.source.torch_loader.dataset).__name__ == "SampleReader"
    assert len(found) == len(expected) > 1
    for batch, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, wanted, strict=True))


class Doubled(TensorDataset):
    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return inputs * 2, target


def test_a_subclass_of_tensor_dataset_is_read_by_its_own_method():
    sharded, batches = batches_of(DataLoader(Doubled(*data(8)), batch_size=4))
    assert type(sharded.source.torch_loader.dataset).__name__ == "SampleReader"
    assert torch.equal(batches[0][0], data(8)[0][:4] * 2)


def collate_as_sum(samples):
    return [sum(inputs for inputs, _ in samples)]


def test_a_collate_function_of_ones_own_gets_samples():
    sharded, batches = batches_of(
        DataLoader(TensorDataset(*data(8)), batch_size=4, collate_fn=collate_as_sum)
    )
    assert type(sharded.source.torch_loader.dataset).__name__ == "SampleReader"
    assert torch.allclose(batches[0][0], data(8)[0][:4].sum(0))


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(8.0))


def test_iterable_data_takes_the_usual_way():
    _, batches = batches_of(DataLoader(Numbers(), batch_size=4))
    assert torch.equal(torch.cat([torch.stack(batch) for batch in batches]), torch.arange(8.0))


def by_hand(model, optimizer, dataset, batch_size, is_training):
    model.train(is_training)
    total = 0.0
    for inputs, targets in DataLoader(dataset, batch_size=batch_size, shuffle=True):
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        total += loss.item() * len(inputs)
        if is_training:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return total


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dataset_class", [TensorDataset, Pairs])
def test_a_step_makes_fewer_python_calls_than_one_written_by_hand(monkeypatch, dataset_class, is_training):
    monkeypatch.setattr("accel_core.data.waiting.SHARE_WORTH_A_REPORT", 2.0)
    calls = {"ours": {}, "by hand": {}}
    # The first runs also import, and learn which classes of objects may hold data.
    for num_steps in (20, 20, 40):
        trainer, dataset = create_trainer(), dataset_class(*data(8 * num_steps))

        def ours(trainer=trainer, dataset=dataset):
            if is_training:
                trainer.train(dataset, 1, train_dataloader_kwargs={"num_workers": 0})
            else:
                trainer.evaluate(dataset, dataloader_kwargs={"num_workers": 0})

        _, calls["ours"][num_steps] = count_python_calls(ours)
        with torch.set_grad_enabled(is_training):
            _, calls["by hand"][num_steps] = count_python_calls(
                lambda trainer=trainer, dataset=dataset: by_hand(
                    trainer.model, trainer.optimizer, dataset, 8, is_training
                )
            )
    per_step = {side: (counts[40] - counts[20]) / 20 for side, counts in calls.items()}
    assert per_step["ours"] < per_step["by hand"]


def ratio_to_by_hand(dataset_class, is_training, pairs):
    """CPU time of a run over that of the hand-written loop, in pairs back to back; the median."""
    dataset = dataset_class(*data(32 * 100, 784))
    ratios = []
    for _ in range(pairs):
        seconds = []
        for is_ours in (False, True):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            trainer = Trainer(
                model,
                torch.nn.functional.cross_entropy,
                optimizer,
                callbacks=[],
                accelerator=Accelerator(cpu=True),
            )
            start = time.process_time()
            if not is_ours:
                with torch.set_grad_enabled(is_training):
                    by_hand(model, optimizer, dataset, 32, is_training)
            elif is_training:
                trainer.train(
                    dataset, 1, per_device_batch_size=32, train_dataloader_kwargs={"num_workers": 0}
                )
            else:
                trainer.evaluate(dataset, 32, dataloader_kwargs={"num_workers": 0})
            seconds.append(time.process_time() - start)
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset_class", "is_training", "target"),
    [(TensorDataset, True, 0.88), (Pairs, True, 1.04), (TensorDataset, False, 0.70), (Pairs, False, 1.03)],
    ids=["training in memory", "training", "evaluation in memory", "evaluation"],
)
def test_a_step_costs_hardly_more_than_one_written_by_hand(dataset_class, is_training, target):
    allowed = target * 1.1
    ratio = ratio_to_by_hand(dataset_class, is_training, pairs=9)
    if ratio > allowed:
        ratio = min(ratio, ratio_to_by_hand(dataset_class, is_training, pairs=15))
    assert ratio <= allowed


@pytest.mark.slow
def test_a_long_run_costs_at_its_end_what_it_cost_at_its_beginning():
    script = Path(__file__).parents[2] / "benchmarks" / "long_run.py"
    finished = subprocess.run(
        [sys.executable, str(script), "20000"], capture_output=True, text=True, check=True
    )
    figures = json.loads(finished.stdout)
    before, after = figures["CPU microseconds of an update"]
    assert after <= 1.3 * before
    before, after = figures["memory, MB"]
    assert after - before <= 5
    before, after = figures["training state, kB"]
    assert after - before <= 5, "the history of ten epochs"
