"""Which newest values are better than all before them, known without reading a long history again."""

from accel_core import InMemoryRunHistory
from accel_core.callbacks.metric_names import BestValues


class Counted(list):
    """Counts the records that are read."""

    num_read = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        self.num_read += len(found)
        return found


def records(*values, name="eval_loss_epoch"):
    return [{"name": name, "value": value, "epoch": 1, "update": 1} for value in values]


def bests_after(values, greater=False):
    best, known, found = BestValues({"eval_loss_epoch": greater}), Counted(), []
    for record in records(*values):
        known.append(record)
        best.read(known)
        found.append(best.new_bests == {"eval_loss_epoch"})
    return found, known.num_read


def test_a_value_is_a_new_best_if_all_before_it_are_worse_and_the_first_is_none():
    nan = float("nan")
    values = [nan, 3.0, 3.0, nan, 2.0, 2.5, 1.0]
    assert bests_after(values)[0] == [False, False, False, False, True, False, True]
    assert bests_after([-value for value in values], greater=True)[0] == bests_after(values)[0]


def test_each_record_is_read_once():
    assert bests_after([1.0] * 50)[1] == 50


def test_a_history_from_which_a_metric_was_deleted_is_read_anew():
    history = InMemoryRunHistory()
    for value in (1.0, 2.0, 3.0):
        history.update_metric("eval_loss_epoch", value)
        history.update_metric("other", value)
    best = BestValues({"eval_loss_epoch": False})
    best.read(history.get_records())
    assert best.can_read_on(history.get_records(), {"eval_loss_epoch": False})
    assert not best.can_read_on(history.get_records(), {"other": True}), "nobody has watched it"
    history.delete_metric("other")
    assert not best.can_read_on(history.get_records(), {"eval_loss_epoch": False})
