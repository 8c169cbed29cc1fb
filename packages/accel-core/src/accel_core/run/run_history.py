"""Keeps the metrics of a run: each value with the epoch and the update at which it was recorded."""

from __future__ import annotations

import contextlib
import csv
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from ..callbacks.metric_table import html_table
from ..checks.values import check_path
from ..errors import ConfigurationError
from ..foreign_names.answers import ForeignName
from ..text import counted, did_you_mean


class MetricRecord(TypedDict):
    """Holds one value of one metric."""

    name: str
    value: float
    epoch: int
    """The epoch that went on when the value was recorded, from 1."""
    update: int
    """Updates completed by then."""


class RunHistory(ABC):
    """Keeps the metrics of a run.

    A subclass gives `add_record`, `get_records`, `delete_metric` and `clear`; everything else rests on them.
    A value is a plain float.
    """

    history = ForeignName("Use get_metric_values(name), or to_dataframe().")
    plot = ForeignName("Use plot_history(history, path) of accel_callbacks.")

    def __init__(self) -> None:
        self.metric_name_prefix: str = ""
        """`update_metric` puts it before each name."""
        self.current_epoch: int = 1
        """The current epoch, from 1; set by the trainer."""
        self.current_update: int = 0
        """Updates completed; set by the trainer."""

    @abstractmethod
    def add_record(self, record: MetricRecord) -> None:
        """Keep `record`, behind those of the same name."""

    @abstractmethod
    def get_records(self) -> Sequence[MetricRecord]:
        """Return all records, in the order in which they were added."""

    @abstractmethod
    def delete_metric(self, name: str) -> None:
        """Forget all values of `name`. Raises `ConfigurationError` if there are none."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all records."""

    def update_metric(self, name: str, value: Any) -> None:
        """Record `value`, a number or a tensor of one element, under the prefix and `name`.

        Raises:
            ConfigurationError: `value` is not a number.
        """
        try:
            # `float` alone would accept the strings '1' and 'nan'.
            number = float("no number" if isinstance(value, str) else value)
        # RuntimeError is what a tensor of several elements raises.
        except (TypeError, ValueError, RuntimeError):
            raise ConfigurationError(
                f"The value of the metric {name!r} is {value!r}, but must be a number or a tensor of one "
                "element. Record several numbers under several names."
            ) from None
        name = f"{self.metric_name_prefix}{name}"
        self.add_record(
            {"name": name, "value": number, "epoch": self.current_epoch, "update": self.current_update}
        )

    def get_metric_names(self) -> set[str]:
        """Return the names that have at least one value."""
        return {record["name"] for record in self.get_records()}

    def get_metric_values(self, name: str) -> list[float]:
        """Return all values of `name`, oldest first; the list is the caller's own.

        Raises `ConfigurationError` if unknown.
        """
        values = [record["value"] for record in self.get_records() if record["name"] == name]
        if not values:
            raise self._unknown(name)
        return values

    def get_latest_metric(self, name: str) -> float:
        """Return the newest value of `name`. Raises `ConfigurationError` if unknown."""
        return self.get_metric_values(name)[-1]

    def set_metric_name_prefix(self, prefix: str = "") -> None:
        """Put `prefix` before each name that `update_metric` gets from now on."""
        self.metric_name_prefix = prefix

    @contextlib.contextmanager
    def added_prefix(self, prefix: str) -> Iterator[None]:
        """Put `prefix` too before each name that `update_metric` gets within the context."""
        before = self.metric_name_prefix
        self.set_metric_name_prefix(f"{before}{prefix}")
        try:
            yield
        finally:
            self.set_metric_name_prefix(before)

    def reset(self) -> None:
        """Forget everything and begin at epoch 1."""
        self.clear()
        self.metric_name_prefix, self.current_epoch, self.current_update = "", 1, 0

    def by_epoch(self) -> dict[int, dict[str, float]]:
        """Return the newest value of each metric by epoch, from 1, and name."""
        epochs: dict[int, dict[str, float]] = {}
        for record in self.get_records():
            epochs.setdefault(record["epoch"], {})[record["name"]] = record["value"]
        return epochs

    def __len__(self) -> int:
        """Return the number of epochs that have values."""
        return len({record["epoch"] for record in self.get_records()})

    def __bool__(self) -> bool:
        # A history is there also if it is empty: a length alone would make it false.
        return True

    def __iter__(self) -> Iterator[dict[str, float]]:
        """Yield `{"epoch": 1, "train_loss_epoch": 0.5}` for each epoch: the newest value of each metric."""
        return iter([{"epoch": epoch, **values} for epoch, values in self.by_epoch().items()])

    def __repr__(self) -> str:
        names = ", ".join(sorted(self.get_metric_names())) or "no metrics yet"
        epochs, updates = counted(len(self), "epochs"), counted(self.current_update, "updates")
        return f"{type(self).__name__}({epochs}, {updates}: {names})"

    def _repr_html_(self) -> str:
        rows = [
            {"epoch": str(epoch)} | {name: f"{value:.4g}" for name, value in values.items()}
            for epoch, values in self.by_epoch().items()
        ]
        return html_table(rows)

    def to_records(self) -> list[MetricRecord]:
        """Return a copy of all records, in the order in which they were added."""
        return [record.copy() for record in self.get_records()]

    def to_csv(self, path: str | Path) -> None:
        """Write one line a record to the file `path`: name, value, epoch, update; floats are exact."""
        # The csv module writes line ends itself; on Windows they would be doubled without `newline`.
        path = check_path("path", path, "Pass the name of a file, such as 'history.csv'.")
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["name", "value", "epoch", "update"])
            writer.writeheader()
            writer.writerows(self.get_records())

    def to_dataframe(self) -> Any:
        """Return a `pandas.DataFrame`: one row a record, with the columns name, value, epoch, update.

        Raises:
            ConfigurationError: pandas is not installed.
        """
        try:
            # Imported only here: training does not need it.
            pandas = importlib.import_module("pandas")
        except ImportError:
            raise ConfigurationError(
                "to_dataframe needs the package 'pandas', which is not installed. Install it with: pip "
                "install pandas, or use to_records() or to_csv(path)."
            ) from None
        return pandas.DataFrame(self.to_records(), columns=["name", "value", "epoch", "update"])

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs, as plain values."""
        return {"records": self.to_records(), "epoch": self.current_epoch, "update": self.current_update}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace everything by what `state` holds."""
        self.reset()
        for record in state["records"]:
            self.add_record(record)
        self.current_epoch, self.current_update = state["epoch"], state["update"]

    def snapshot(self) -> Any:
        """Return what `restore` needs to undo all that is recorded, deleted or reset from now on."""
        return self.state_dict(), self.metric_name_prefix

    def restore(self, snapshot: Any) -> None:
        """Go back to what a `snapshot` has seen."""
        state, prefix = snapshot
        # Loading is left out if it would change nothing: a subclass may keep its records in a file.
        if self.state_dict() != state:
            self.load_state_dict(state)
        self.set_metric_name_prefix(prefix)

    def _unknown(self, name: str) -> ConfigurationError:
        return ConfigurationError(
            f"The run history has no metric {name!r}, only {sorted(self.get_metric_names())}."
            f"{did_you_mean(name, self.get_metric_names())}"
        )


class InMemoryRunHistory(RunHistory):
    """Keeps the metrics in lists."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[MetricRecord] = []
        # The values once more by name, so that asking for the latest one searches no records.
        self._values: dict[str, list[float]] = {}

    def add_record(self, record: MetricRecord) -> None:
        """Keep `record`, behind those of the same name."""
        self._values.setdefault(record["name"], []).append(record["value"])
        self._records.append(record)

    def get_records(self) -> Sequence[MetricRecord]:
        """Return all records, in the order in which they were added."""
        return self._records

    def get_metric_names(self) -> set[str]:
        """Return the names that have at least one value."""
        return set(self._values)

    def get_metric_values(self, name: str) -> list[float]:
        """Return all values of `name`, oldest first; the list is the caller's own.

        Raises `ConfigurationError` if unknown.
        """
        if name not in self._values:
            raise self._unknown(name)
        return list(self._values[name])

    def get_latest_metric(self, name: str) -> float:
        """Return the newest value of `name`. Raises `ConfigurationError` if unknown."""
        if name not in self._values:
            raise self._unknown(name)
        return self._values[name][-1]

    def delete_metric(self, name: str) -> None:
        """Forget all values of `name`. Raises `ConfigurationError` if there are none."""
        if self._values.pop(name, None) is None:
            raise self._unknown(name)
        # A new list, since a snapshot may hold the old one.
        self._records = [record for record in self._records if record["name"] != name]

    def clear(self) -> None:
        """Forget all records."""
        self._records, self._values = [], {}

    def snapshot(self) -> Any:
        """Return the list of records, its length, and the counters."""
        # Deleting and resetting make new lists, so this very list only grows, and its length is enough.
        return (
            self._records,
            len(self._records),
            self.current_epoch,
            self.current_update,
            self.metric_name_prefix,
        )

    def restore(self, snapshot: Any) -> None:
        """Go back to what a `snapshot` has seen; nothing is copied if nothing was recorded since."""
        records, length, epoch, update, prefix = snapshot
        # The list of the snapshot has only grown, so its first records are those of then.
        if self._records is not records or len(records) != length:
            self.load_state_dict({"records": records[:length], "epoch": epoch, "update": update})
        self.current_epoch, self.current_update = epoch, update
        self.set_metric_name_prefix(prefix)
