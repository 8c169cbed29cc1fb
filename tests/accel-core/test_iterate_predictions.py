"""Predictions a batch at a time, on the main process only, and of a part of the outputs."""

import weakref
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from numpy.lib.format import open_memmap
from torch.utils.data import DataLoader

from accel_core import ConfigurationError, Trainer
from case_runner import run_as_script, shared_folder
from tiny import Stream, tiny_data, tiny_network, tiny_trainer

SIZES = (13, 5, 1)


def trainer_without_optimizer() -> Trainer:
    return Trainer(tiny_network(), None, None, callbacks=())


def iterate(batch_size: int) -> Any:
    """The places and the outputs of all processes, and what `predict` gives on one and on all of them."""
    found = []
    for size in SIZES:
        trainer = trainer_without_optimizer()
        own = list(trainer.iterate_predictions(tiny_data(size), batch_size))
        places = torch.cat([torch.empty(0, dtype=torch.long), *(places for places, _ in own)])
        rows = torch.cat([torch.empty(0, 2, dtype=torch.float64), *(rows for _, rows in own)])
        whole = trainer.predict(tiny_data(size), batch_size)
        classes = trainer.predict(tiny_data(size), batch_size, on="main", outputs=lambda rows: rows.argmax(1))
        found.append({"places": places, "rows": rows, "whole": whole, "classes": classes})
    return found


def write(batch_size: int) -> Any:
    """What the recipes of the docs write: a memory-mapped array, and a file of parquet a process."""
    folder, trainer = shared_folder(), trainer_without_optimizer()
    data = tiny_data(61)
    whole = trainer.predict(data, batch_size)
    if trainer.is_main_process:
        open_memmap(folder / "rows.npy", "w+", "float64", (61, 2))
    trainer.accelerator.wait_for_everyone()
    written = open_memmap(folder / "rows.npy", "r+")
    kind = pyarrow.list_(pyarrow.float64(), 2)
    schema = pyarrow.schema([("index", pyarrow.int64()), ("rows", kind)])
    (folder / "table").mkdir(exist_ok=True)
    path = folder / "table" / f"{trainer.data_group.index}.parquet"
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for places, rows in trainer.iterate_predictions(data, batch_size):
            written[places] = rows.numpy()
            flat = pyarrow.FixedSizeListArray.from_arrays(rows.flatten().numpy(), type=kind)
            columns = [pyarrow.array(places.numpy()), flat]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))
    written.flush()
    trainer.accelerator.wait_for_everyone()
    table = pyarrow.parquet.read_table(folder / "table").sort_by("index")
    mapped = torch.from_numpy(numpy.load(folder / "rows.npy"))
    return mapped, table["index"].to_pylist(), torch.tensor(table["rows"].to_pylist()), whole


CASES = {"iterate": iterate, "write": write}


def test_each_process_has_its_share_with_its_places(outcome: Any) -> None:
    for number, size in enumerate(SIZES):
        parts = [results[number] for results in outcome.of("iterate")]
        places = torch.cat([part["places"] for part in parts])
        assert places.sort().values.tolist() == list(range(size))
        for process, part in enumerate(parts):
            assert part["places"].tolist() == sorted(part["places"].tolist())
            torch.testing.assert_close(part["rows"], part["whole"][part["places"]], rtol=1e-12, atol=1e-12)
            if process == 0:
                assert torch.equal(part["classes"], part["whole"].argmax(1))
            else:
                assert part["classes"] is None


def test_what_the_recipes_write_is_whole(outcome: Any) -> None:
    for mapped, places, rows, whole in (outcome.alone("write"), *outcome.of("write")):
        torch.testing.assert_close(mapped, whole, rtol=1e-12, atol=1e-12)
        assert places == list(range(61))
        torch.testing.assert_close(rows.double(), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "data", [tiny_data(13), Stream(tiny_data(13)), DataLoader(tiny_data(13), batch_size=4)]
)
def test_on_one_process_all_kinds_of_data_have_places(data: Any) -> None:
    trainer = trainer_without_optimizer()
    found = list(
        trainer.iterate_predictions(data, 4)
        if not isinstance(data, DataLoader)
        else (trainer.iterate_predictions(data))
    )
    assert [places.tolist() for places, _ in found] == [[*range(4)], [*range(4, 8)], [*range(8, 12)], [12]]
    torch.testing.assert_close(torch.cat([rows for _, rows in found]), trainer.predict(tiny_data(13)))


def test_memory_is_constant() -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    for _, rows in trainer_without_optimizer().iterate_predictions(tiny_data(40), 2):
        alive.add(rows)
        most = max(most, len(alive))
    assert most <= 2


def test_a_loop_that_is_left_leaves_the_trainer_usable_and_its_body_has_gradients() -> None:
    trainer = tiny_trainer()
    trainer.model.train()
    for _, rows in trainer.iterate_predictions(tiny_data(13), 4):
        assert torch.is_grad_enabled()
        assert not rows.requires_grad
        with pytest.raises(ConfigurationError, match="inside a run"):
            trainer.predict(tiny_data(3))
        break
    assert trainer.model.training
    trainer.train(tiny_data(8), 1)


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [({"on": "rank 0"}, ("on is 'rank 0'", "main")), ({"outputs": 3}, ("outputs is 3", "Pass a function"))],
)
def test_arguments_of_predict_are_checked(kwargs: Any, parts: Any) -> None:
    with pytest.raises(ConfigurationError) as raised:
        trainer_without_optimizer().predict(tiny_data(3), **kwargs)
    assert all(part in str(raised.value) for part in parts)


if __name__ == "__main__":
    run_as_script(CASES)
