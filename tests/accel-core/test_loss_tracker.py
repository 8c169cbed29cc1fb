"""The mean loss of an epoch."""

import json
import math

import pytest
import torch

from accel_core import LossTracker
from accel_core.run.loss_tracker import MeanTrackers

CPU = torch.device("cpu")


def tracker_of(*parts: tuple[float, float]) -> LossTracker:
    tracker = LossTracker(CPU)
    for loss, num_items in parts:
        tracker.update(torch.tensor(loss), num_items)
    return tracker


def test_each_loss_weighs_as_many_items_as_it_is_the_mean_of() -> None:
    tracker = tracker_of((1.0, 8), (4.0, 2))
    assert tracker.average == tracker.reduce() == pytest.approx((8 + 8) / 10)


def test_counts_may_be_tensors_of_any_kind() -> None:
    tracker = LossTracker(CPU)
    tracker.update(torch.tensor(1.0), torch.tensor(8))
    tracker.update(torch.tensor(4.0), torch.tensor(2.0))
    assert tracker.average == pytest.approx(1.6)


def test_a_batch_without_items_weighs_nothing() -> None:
    assert tracker_of((1.0, 2), (9.0, 0)).average == 1.0


def test_sums_keep_their_precision_over_a_long_epoch() -> None:
    """In float32 the sum of a hundred thousand tenths is off by more than one in a hundred thousand."""
    tracker = LossTracker(CPU)
    loss = torch.tensor(0.1)
    for _ in range(100_000):
        tracker.update(loss, 1)
    assert tracker.average == pytest.approx(loss.item(), rel=1e-12)


def test_losses_of_low_precision_are_summed_in_high_precision() -> None:
    tracker = LossTracker(CPU)
    for _ in range(1000):
        tracker.update(torch.tensor(1.5, dtype=torch.bfloat16), 3)
    assert tracker.average == 1.5


def test_there_is_no_mean_before_the_first_batch_and_after_a_reset() -> None:
    assert math.isnan(LossTracker(CPU).average)
    tracker = tracker_of((1.0, 2))
    tracker.reset()
    assert math.isnan(tracker.reduce())
    tracker.update(torch.tensor(3.0), 1)
    assert tracker.average == 3.0


def test_no_graph_is_kept() -> None:
    weight = torch.ones((), requires_grad=True)
    loss = weight * 2
    tracker = LossTracker(CPU)
    tracker.update(loss, 1)
    assert tracker.average == 2.0
    assert not (isinstance(tracker.total, torch.Tensor) and tracker.total.requires_grad)


def test_an_epoch_goes_on_from_a_saved_state() -> None:
    state = json.loads(json.dumps(tracker_of((0.1, 8), (0.7, 3)).state_dict()))
    resumed = LossTracker(CPU)
    resumed.load_state_dict(state)
    for tracker in (resumed, whole := tracker_of((0.1, 8), (0.7, 3))):
        tracker.update(torch.tensor(0.2), 5)
    assert resumed.average == whole.average


def test_logged_values_have_means_of_their_own() -> None:
    trackers = MeanTrackers(CPU)
    trackers.update({"size": 2, "rate": torch.tensor(0.5)}, 1)
    trackers.update({"size": 4.0}, 3)
    assert trackers.reduce() == {"size": 3.5, "rate": 0.5}
    again = MeanTrackers(CPU)
    again.load_state_dict(trackers.state_dict())
    again.update({"rate": torch.tensor([1.0])}, 1)
    assert again.reduce() == {"size": 3.5, "rate": 0.75}
