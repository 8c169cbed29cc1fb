"""What several processes do run_on_main, without a trainer; the same calls are valid on one process."""

import os
import re

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from accel_core import ConfigurationError
from accel_core.processes.agreement import Agreement
from accel_core.processes.collectives import (
    all_gather_object,
    broadcast_object,
    broadcast_tensors,
    gather_tensor,
    is_distributed,
    run_on_main,
    sum_over_processes,
)
from accel_core.processes.shutdown import check_processes_see_each_other
from case_runner import run_as_script
from launching import launch

CPU = torch.device("cpu")
KINDS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "complex": torch.complex64,
}


def index():
    return Accelerator().process_index


def is_main():
    return index() == 0


def gather_kinds(batch_size):
    """Two rows of the main process, one of each other, of every kind."""
    own = torch.tensor([[0, 1], [1, 0]]) if is_main() else torch.tensor([[1, 1]])
    return {name: gather_tensor(own.to(dtype)) for name, dtype in KINDS.items()}


def gather_rows(batch_size):
    """As many rows as the process's number, so that the main process has none."""
    return gather_tensor(torch.full((index(), 2), float(index())))


def gather_with_gradient(batch_size):
    own = torch.ones(2, requires_grad=True) * index()
    gathered = gather_tensor(own)
    return {
        "values": gathered.detach(),
        "has graph": gathered.requires_grad,
        "turned": gather_tensor(torch.eye(2).T * index()),
    }


def gather_other_dimensions(batch_size):
    own = torch.ones(1, 1 + index(), dtype=torch.int64)
    try:
        gather_tensor(own)
    except ConfigurationError as error:
        return {"error": str(error), "padded": gather_tensor(own, padding_value=-100)}
    return {"padded": gather_tensor(own, padding_value=-100)}


def share(batch_size):
    return {"shared": broadcast_object({"from": index()}), "gathered": all_gather_object(f"value {index()}")}


def add_up(batch_size):
    # The second number has no exact neighbour in float32.
    return sum_over_processes([float(index()), 2.0**30 + index()], CPU)


def act_together(batch_size):
    calls = []
    done = run_on_main(lambda: calls.append(index()) or "done by the main process", is_main())

    def fail():
        raise ConfigurationError(f"process {index()} failed")

    try:
        run_on_main(fail, is_main())
    except ConfigurationError as error:
        return {"done": done, "calls": len(calls), "error": str(error)}
    return {"done": done, "calls": len(calls)}


def broadcast(batch_size):
    parameter = nn.Parameter(torch.full((2, 3), float(index())).T)
    flags = torch.tensor([is_main(), False])
    broadcast_tensors([parameter, flags])
    return parameter.detach(), flags


def agree(batch_size):
    """What each process reads, after what it and the others have said."""
    agreement = Agreement(CPU)
    agreement.register("count")
    read = []

    def next_word(wait=False):
        agreement.collect(wait)
        read.append((dict(agreement.agreed), agreement.stop_reason, agreement.signal_number))

    agreement.launch()
    next_word()  # nobody has said anything
    agreement.flag("count", 5 + index())
    agreement.flag("count", 3)
    agreement.launch()
    agreement.flag("count", 1)  # goes with the word after this one
    next_word()
    agreement.launch()
    next_word()
    if not is_main():
        agreement.flag_stop(f"the reason of {index()}", signal_number=10 + index())
        agreement.flag_stop("a second reason")
    next_word(wait=True)
    next_word(wait=True)  # the reason stays
    return read


CASES = {
    "kinds": gather_kinds,
    "rows": gather_rows,
    "gradient": gather_with_gradient,
    "other dimensions": gather_other_dimensions,
    "share": share,
    "add up": add_up,
    "together": act_together,
    "broadcast": broadcast,
    "agree": agree,
}


def same_on_every_process(outcome, case):
    first, second = outcome.of(case)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    return first


@pytest.mark.parametrize("kind", KINDS)
def test_gathering_joins_tensors_of_any_kind_and_number_of_rows(outcome, kind):
    for result in outcome.of("kinds"):
        assert torch.equal(result[kind], torch.tensor([[0, 1], [1, 0], [1, 1]]).to(KINDS[kind]))


def test_gathering_takes_a_process_without_a_row(outcome):
    assert same_on_every_process(outcome, "rows").tolist() == [[1.0, 1.0]]


def test_gathering_takes_what_comes_from_a_graph_or_is_not_contiguous(outcome):
    result = same_on_every_process(outcome, "gradient")
    assert result["values"].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert not result["has graph"]
    assert result["turned"].tolist() == [[0, 0], [0, 0], [1, 0], [0, 1]]


def test_gathering_other_dimensions_needs_a_value_to_fill_them_up(outcome):
    for result in outcome.of("other dimensions"):
        assert re.search(
            r"gather .*\[\(1, 1\), \(1, 2\)\].* 2 processes.*first dimension.*Pass padding_value",
            result["error"],
        )
        assert result["padded"].tolist() == [[1, -100], [1, 1]]


def test_values_are_shared_and_gathered_in_the_order_of_the_processes(outcome):
    for result in outcome.of("share"):
        assert result == {"shared": {"from": 0}, "gathered": ["value 0", "value 1"]}


def test_sums_are_exact_in_float64(outcome):
    assert outcome.of("add up") == [[1.0, 2.0**31 + 1]] * 2


def test_what_the_main_process_does_is_known_and_fails_on_all(outcome):
    main, other = outcome.of("together")
    assert main == {"done": "done by the main process", "calls": 1, "error": "process 0 failed"}
    assert other == {**main, "calls": 0}


def test_the_main_processs_values_replace_those_of_parameters_and_flags(outcome):
    for parameter, flags in outcome.of("broadcast"):
        assert parameter.shape == (3, 2) and not parameter.any()
        assert flags.tolist() == [True, False]


def test_all_read_the_largest_word_one_reading_later_and_the_first_reason(outcome):
    main, other = outcome.of("agree")
    assert main == other
    assert main[:3] == [({}, None, 0), ({"count": 6}, None, 0), ({"count": 1}, None, 0)]
    assert main[3] == ({"stop": 1, "signal": 11}, "the reason of 1", 11)
    assert main[4] == ({}, "the reason of 1", 11)


def test_one_process_needs_no_others():
    assert not is_distributed()
    rows = torch.ones(2, 3)
    assert gather_tensor(rows) is rows
    assert gather_tensor(torch.tensor(4)).tolist() == [4]
    assert broadcast_object("own") == "own" and all_gather_object("own") == ["own"]
    assert sum_over_processes([1.5], CPU) == [1.5]
    assert run_on_main(lambda: "own", is_main=True) == "own"
    broadcast_tensors([rows])


def test_on_one_process_a_word_is_read_at_once():
    agreement = Agreement(CPU)
    agreement.flag_stop("enough")
    agreement.collect()
    assert agreement.stop_reason == "enough"


@pytest.mark.parametrize(("launched", "num_processes"), [("1", 1), ("2", 2), (None, 1)])
def test_processes_that_know_of_each_other_are_accepted(monkeypatch, launched, num_processes):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if launched is not None:
        monkeypatch.setenv("WORLD_SIZE", launched)
    check_processes_see_each_other(num_processes)


def test_processes_that_do_not_know_of_each_other_are_refused_with_their_number(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        ConfigurationError,
        match=r"accelerate launch.* 3 processes.*ACCELERATE_USE_CPU=true.*--multi_gpu.*examples/configs",
    ):
        check_processes_see_each_other(1)


@pytest.mark.parametrize("found", [True, False])
def test_that_refusal_tells_whether_torch_finds_a_gpu(monkeypatch, found):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found)
    with pytest.raises(ConfigurationError) as raised:
        check_processes_see_each_other(1)
    assert ("finds no GPU here" in str(raised.value)) is not found


ENDS_RIGHT_AFTER_TRAINING = """
    import os
    import torch
    from accel_core import Trainer
    from torch import nn
    from torch.utils.data import TensorDataset

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    model = nn.Linear(3, 1)
    trainer = Trainer(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), callbacks=(), seed=1)
    trainer.train(TensorDataset(torch.randn(40, 3), torch.randn(40, 1)), num_epochs=1, per_device_batch_size=2)
    trainer.accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="all processes have to share one core, which Linux can do"
)
@pytest.mark.parametrize("_attempt", range(6))
def test_a_script_that_ends_right_after_training_is_not_aborted(_attempt):
    """By the threads of gloo: on one core they did that to every fifth launch, before processes waited for them at exit."""
    launch(ENDS_RIGHT_AFTER_TRAINING, processes=2)


if __name__ == "__main__":
    run_as_script(CASES)
