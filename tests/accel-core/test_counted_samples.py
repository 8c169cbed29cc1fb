"""What the loss of a batch is the mean of is counted, whatever the layout of the inputs."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence
from torch.utils.data import DataLoader, TensorDataset

from accel_core import ConfigurationError, Trainer
from tiny import Stream, largest_difference, tiny_data, tiny_network, tiny_trainer

SEQUENCES = [
    (torch.full((2 + 5 * (index % 3), 3), index / 7, dtype=torch.float64), index % 2) for index in range(11)
]
"""Sequences of 2, 7 or 12 equal rows, in two classes."""


class LastRow(nn.Module):
    """Classifies each sequence by its last row, in any layout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False).double()
        nn.init.constant_(self.layer.weight, 0.1)
        self.layer.weight.data[1] *= -2

    def forward(self, inputs: Any) -> torch.Tensor:
        if isinstance(inputs, PackedSequence):
            padded, lengths = nn.utils.rnn.pad_packed_sequence(inputs, batch_first=True)
            return self.layer(padded[torch.arange(len(padded)), lengths - 1])  # type: ignore[no-any-return]
        if isinstance(inputs, tuple):
            rows, ends = inputs if inputs[0].is_floating_point() else reversed(inputs)
            return self.layer(rows[ends - 1])  # type: ignore[no-any-return]
        return self.layer(inputs[-1])  # type: ignore[no-any-return]


def time_first(samples: list[Any]) -> Any:
    # Padded in front, so that the last row is the last of each sequence.
    return pad_sequence([inputs.flip(0) for inputs, _ in samples]).flip(0), targets_of(samples)


def packed(samples: list[Any]) -> Any:
    return pack_sequence([inputs for inputs, _ in samples], enforce_sorted=False), targets_of(samples)


def flat_with_ends(samples: list[Any]) -> Any:
    ends = torch.tensor([len(inputs) for inputs, _ in samples]).cumsum(0)
    return (torch.cat([inputs for inputs, _ in samples]), ends), targets_of(samples)


def ends_before_rows(samples: list[Any]) -> Any:
    """As in graphs, where the first tensor is a list of edges."""
    inputs, targets = flat_with_ends(samples)
    return inputs[::-1], targets


def targets_of(samples: list[Any]) -> torch.Tensor:
    return torch.tensor([target for _, target in samples])


LAYOUTS: dict[str, Callable[[list[Any]], Any]] = {
    "time first": time_first,
    "packed": packed,
    "flat": flat_with_ends,
    "edges first": ends_before_rows,
}


def train(
    batch_size: int,
    steps: int,
    data: Any = SEQUENCES,
    *,
    model: Any = None,
    loss_func: Any = None,
    **kwargs: Any,
) -> Trainer:
    arguments = {"num_epochs": 2, "train_dataloader_kwargs": {"shuffle": False, "num_workers": 0}, **kwargs}
    trainer = tiny_trainer(
        arguments.pop("trainer_class", Trainer),
        model=LastRow() if model is None else model,
        loss_func=loss_func or F.cross_entropy,
    )
    trainer.train(data, per_device_batch_size=batch_size, gradient_accumulation_steps=steps, **arguments)
    return trainer


def losses_of(trainer: Trainer) -> list[float]:
    return trainer.run_history.get_metric_values("train_loss_epoch")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_stream", [False, True], ids=["map", "stream"])
def test_batches_in_any_layout_add_up_to_the_big_batch(layout: str, is_stream: bool) -> None:
    data: Any = Stream(SEQUENCES) if is_stream else SEQUENCES
    kwargs = {"train_dataloader_kwargs": {"num_workers": 0}} if is_stream else {}
    whole = train(6, 1, data, collate_fn=LAYOUTS[layout], **kwargs)
    for batch_size, steps in [(3, 2), (2, 3), (1, 6)]:
        parts = train(batch_size, steps, data, collate_fn=LAYOUTS[layout], **kwargs)
        assert largest_difference(whole, parts) < 1e-14
        assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_an_evaluation_of_any_layout_is_the_mean_over_the_samples(layout: str, batch_size: int) -> None:
    inputs, targets = packed(SEQUENCES)
    by_hand = F.cross_entropy(LastRow()(inputs), targets).item()
    kwargs: dict[str, Any] = {"dataloader_kwargs": {"num_workers": 0}, "collate_fn": LAYOUTS[layout]}
    for data in (SEQUENCES, Stream(SEQUENCES)):
        found = tiny_trainer(model=LastRow()).evaluate(data, batch_size, **kwargs)
        assert found["evaluation_loss"] == pytest.approx(by_hand, rel=1e-12)


def test_workers_count_the_samples_too() -> None:
    whole = train(6, 1, collate_fn=time_first)
    parts = train(2, 3, collate_fn=time_first, train_dataloader_kwargs={"shuffle": False, "num_workers": 1})
    assert largest_difference(whole, parts) < 1e-14


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=14),
    batch_size=st.integers(1, 4),
    steps=st.integers(1, 4),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_sequences_of_any_lengths_add_up_to_the_big_batch(
    lengths: list[int], batch_size: int, steps: int, layout: str
) -> None:
    rows = torch.randn(len(lengths), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = [
        (row.expand(length, 3), index % 2)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True))
    ]
    whole = train(batch_size * steps, 1, data, collate_fn=LAYOUTS[layout])
    parts = train(batch_size, steps, data, collate_fn=LAYOUTS[layout])
    assert largest_difference(whole, parts) < 1e-13
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-12)


# ------------------------------------------------------------------ targets that do not tell


def time_first_targets(samples: list[Any]) -> Any:
    inputs, targets = time_first(samples)
    return inputs, targets.expand(5, len(samples))


class MeanOfRows(Trainer):
    """Knows what its targets are."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        return {**super().calculate_train_batch_loss(batch), "batch_size": batch[1].shape[1]}

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        return {**super().calculate_eval_batch_loss(batch), "batch_size": batch[1].shape[1]}


def loss_of_rows(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, targets[0])


REFUSED: dict[str, Callable[[list[Any]], Any]] = {
    "time first": time_first_targets,
    "one left out": lambda samples: time_first(samples[1:]),
    "twice": lambda samples: time_first(samples * 2),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("method", ["train", "evaluate"])
def test_targets_that_are_not_one_for_each_sample_are_refused(case: str, method: str) -> None:
    length = {"time first": 5, "one left out": 3, "twice": 8}[case]
    loss_func = loss_of_rows if case == "time first" else None
    trainer = tiny_trainer(model=LastRow(), loss_func=loss_func or F.cross_entropy)
    arguments = {
        "per_device_batch_size": 4,
        "collate_fn": REFUSED[case],
        **({"num_epochs": 1} if method == "train" else {}),
    }
    with pytest.raises(ConfigurationError, match=rf"length {length}\b.* 4 samples.*super\(\).*'batch_size'"):
        getattr(trainer, method)(SEQUENCES, **arguments)


def test_a_step_that_sets_its_batch_size_is_believed() -> None:
    kwargs = {"collate_fn": time_first_targets, "loss_func": loss_of_rows, "trainer_class": MeanOfRows}
    whole = train(6, 1, eval_dataset=SEQUENCES, **kwargs)
    parts = train(2, 3, eval_dataset=SEQUENCES, **kwargs)
    assert largest_difference(whole, parts) < 1e-14
    for name in ("train_loss_epoch", "eval_loss_epoch"):
        found = parts.run_history.get_metric_values(name)
        assert found == pytest.approx(whole.run_history.get_metric_values(name), rel=1e-12)


def test_samples_that_are_none_count_neither_for_the_loader_nor_for_the_targets() -> None:
    """The usual way to leave out what cannot be read: the data set gives None, and the collate function filters."""

    def keep_readable(samples: list[Any]) -> Any:
        return time_first([sample for sample in samples if sample is not None])

    data = [None if index in (1, 2, 5, 8) else sample for index, sample in enumerate(SEQUENCES)]
    whole = train(12, 1, data, collate_fn=keep_readable)
    for given_data in (data, Stream(data)):
        kwargs = {"train_dataloader_kwargs": {"num_workers": 0}} if given_data is not data else {}
        parts = train(3, 4, given_data, collate_fn=keep_readable, **kwargs)
        assert largest_difference(whole, parts) < 1e-14
        assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-12)


class Boxes(nn.Module):
    """Gives a multiple of the mean of each picture."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((), 0.1, dtype=torch.float64))

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([picture.mean() for picture in inputs]) * self.factor


def loss_of_boxes(outputs: torch.Tensor, targets: Any) -> torch.Tensor:
    return F.mse_loss(outputs, torch.stack([target["boxes"].sum() for target in targets]))


def test_a_list_of_targets_has_one_for_each_sample() -> None:
    pictures = [torch.full((3, 4 + index), index / 9, dtype=torch.float64) for index in range(7)]
    data = [
        (picture, {"boxes": torch.ones(index + 1, 4, dtype=torch.float64)})
        for index, picture in enumerate(pictures)
    ]

    def as_lists(samples: list[Any]) -> Any:
        return [picture for picture, _ in samples], [target for _, target in samples]

    whole = train(6, 1, data, model=Boxes(), loss_func=loss_of_boxes, collate_fn=as_lists)
    parts = train(2, 3, data, model=Boxes(), loss_func=loss_of_boxes, collate_fn=as_lists)
    assert largest_difference(whole, parts) < 1e-12
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-12)
    assert parts.evaluate(data, 2, collate_fn=as_lists) == pytest.approx(
        parts.evaluate(data, 7, collate_fn=as_lists)
    )


def test_columns_of_targets_count_like_their_samples() -> None:
    """Two targets a sample: `default_collate` makes a list of two columns of them, which is no list of samples."""
    inputs, classes = tiny_data(11).tensors
    data = [(row, (index, index.double())) for row, index in zip(inputs, classes, strict=True)]

    def loss_of_columns(outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        return F.cross_entropy(outputs, targets[0]) + (outputs.mean(1) - targets[1]).square().mean()

    own = partial(torch.utils.data.default_collate)
    ready = partial(DataLoader, data, shuffle=False)
    whole = train(6, 1, data, model=tiny_network(), loss_func=loss_of_columns)
    for parts in (
        train(2, 3, data, model=tiny_network(), loss_func=loss_of_columns),
        train(2, 3, data, model=tiny_network(), loss_func=loss_of_columns, collate_fn=own),
        train(
            2, 3, Stream(data), model=tiny_network(), loss_func=loss_of_columns, train_dataloader_kwargs={}
        ),
        train(
            2,
            3,
            ready(batch_size=2),
            model=tiny_network(),
            loss_func=loss_of_columns,
            train_dataloader_kwargs=None,
        ),
    ):
        assert largest_difference(whole, parts) < 1e-14
        assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-12)


@pytest.mark.parametrize(
    ("loss_func", "collate_fn", "words"),
    [
        (F.mse_loss, None, "samples, as the loader gives them"),
        (F.mse_loss, packed, "samples, by the length of the targets"),
        (F.cross_entropy, None, "targets that are not ignored"),
        (nn.CrossEntropyLoss(torch.ones(2)), None, "targets that are not ignored.*weights of their classes"),
    ],
)
def test_describe_says_what_is_counted(loss_func: Any, collate_fn: Any, words: str) -> None:
    trainer = tiny_trainer(model=tiny_network(), loss_func=loss_func)
    trainer.collate_fn = collate_fn
    assert re.search(f"the loss of a batch is the mean over {words}", trainer.describe())


def test_describe_names_the_step_that_counts() -> None:
    trainer = tiny_trainer(MeanOfRows)
    assert "MeanOfRows.calculate_train_batch_loss" in trainer.describe()


# ------------------------------------------------------------------ losses of torch that are no mean over
# samples

IMAGES = torch.randn(13, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
CLASSES = torch.tensor([0, 1, 2, 1, 1, 0, -100, 2, 2, 0, -100, -100, 1])
WEIGHTS = torch.tensor([0.5, 1.0, 7.0], dtype=torch.float64)
PIXELS = torch.randint(3, (13, 5), generator=torch.Generator().manual_seed(3))
PIXELS[
    torch.rand(13, 5, generator=torch.Generator().manual_seed(4)) < torch.linspace(0, 1, 13)[:, None]
] = -100

LOSSES: dict[str, tuple[Any, torch.Tensor]] = {
    "class weights": (nn.CrossEntropyLoss(WEIGHTS), CLASSES.clamp(min=0)),
    "ignored": (nn.CrossEntropyLoss(), CLASSES),
    "a class is ignored": (nn.CrossEntropyLoss(ignore_index=1), CLASSES.clamp(min=0)),
    "weights, ignored, smoothed": (nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2), CLASSES),
    "function": (F.cross_entropy, CLASSES),
    "partial": (partial(F.cross_entropy, weight=WEIGHTS, ignore_index=2), CLASSES.clamp(min=0)),
    "pixels": (nn.CrossEntropyLoss(), PIXELS),
    "pixels with weights": (nn.CrossEntropyLoss(WEIGHTS), PIXELS),
    "probabilities": (nn.CrossEntropyLoss(WEIGHTS), F.one_hot(CLASSES.clamp(min=0), 3).double() * 0.7 + 0.1),
    "log probabilities": (nn.NLLLoss(WEIGHTS), CLASSES),
    "log probabilities, function": (partial(F.nll_loss, ignore_index=0), CLASSES.clamp(min=0)),
}


def classifier(name: str) -> nn.Module:
    per_pixel = name.startswith("pixels")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(4, 15 if per_pixel else 3).double()]
    layers += [nn.Unflatten(1, (3, 5))] if per_pixel else []
    layers += [nn.LogSoftmax(1)] if name.startswith("log") else []
    return nn.Sequential(*layers)


@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy_counts_what_it_is_the_mean_of(name: str) -> None:
    """The update, the logged loss and the evaluation are those of the batch with all samples, computed by hand."""
    loss_func, targets = LOSSES[name]
    data = TensorDataset(IMAGES, targets)
    by_hand = classifier(name)
    loss = loss_func(by_hand(IMAGES), targets)
    loss.backward()
    with torch.no_grad():
        wanted = torch.cat(
            [(parameter - 0.1 * parameter.grad).flatten() for parameter in by_hand.parameters()]
        )  # type: ignore[operator]
    for batch_size, steps in [(13, 1), (5, 3), (2, 7), (1, 13)]:
        trainer = train(batch_size, steps, data, model=classifier(name), loss_func=loss_func, num_epochs=1)
        found = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
        assert float((found - wanted).abs().max()) < 1e-14
        assert losses_of(trainer) == pytest.approx([loss.item()], rel=1e-12)
        evaluated = tiny_trainer(model=classifier(name), loss_func=loss_func).evaluate(data, batch_size)
        assert evaluated["evaluation_loss"] == pytest.approx(loss.item(), rel=1e-12)


def test_a_cross_entropy_of_the_users_own_is_the_mean_over_samples() -> None:
    class PerSample(nn.CrossEntropyLoss):
        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(outputs, targets, self.weight, reduction="none").mean()

    data = TensorDataset(IMAGES, CLASSES.clamp(min=0))
    whole = train(6, 1, data, model=classifier(""), loss_func=PerSample(WEIGHTS))
    parts = train(2, 3, data, model=classifier(""), loss_func=PerSample(WEIGHTS))
    assert largest_difference(whole, parts) < 1e-14


@settings(max_examples=30, deadline=None)
@given(
    classes=st.lists(st.sampled_from([-100, 0, 1, 2]), min_size=1, max_size=15),
    weights=st.none() | st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    batch_size=st.integers(1, 5),
    steps=st.integers(1, 4),
)
def test_any_targets_and_weights_add_up_to_the_big_batch(
    classes: list[int], weights: list[float] | None, batch_size: int, steps: int
) -> None:
    # An update without any target is another matter.
    classes = [0 if index % (batch_size * steps) == 0 else target for index, target in enumerate(classes)]
    loss_func = nn.CrossEntropyLoss(None if weights is None else torch.tensor(weights, dtype=torch.float64))
    inputs = torch.randn(len(classes), 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = TensorDataset(inputs, torch.tensor(classes))
    whole = train(batch_size * steps, 1, data, model=classifier(""), loss_func=loss_func)
    parts = train(batch_size, steps, data, model=classifier(""), loss_func=loss_func)
    assert largest_difference(whole, parts) < 1e-13
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-12)


def test_an_update_in_which_all_targets_are_ignored_changes_nothing() -> None:
    targets = torch.tensor([0, 1, -100, -100, 2, 1])
    trainer = train(
        2,
        1,
        TensorDataset(IMAGES[:6], targets),
        model=classifier(""),
        num_epochs=1,
        loss_func=nn.CrossEntropyLoss(),
    )
    without = train(
        2,
        1,
        TensorDataset(IMAGES[[0, 1, 4, 5]], targets[[0, 1, 4, 5]]),
        model=classifier(""),
        num_epochs=1,
        loss_func=nn.CrossEntropyLoss(),
    )
    assert largest_difference(trainer, without) == 0
    assert losses_of(trainer) == losses_of(without)
    assert (trainer.run_progress.updates_completed, trainer.run_progress.updates_skipped) == (3, 1)
