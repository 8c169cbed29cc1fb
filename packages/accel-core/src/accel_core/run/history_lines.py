"""The run history in a training state: `history.jsonl`, one JSON line a record, and what else it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..state import files
from ..state.checkpoint import HISTORY_FILE
from ..state.digests import HashedBytes, Written
from .run_history import MetricRecord, RunHistory

_PIECE = 1 << 18
"""Bytes. A shorter piece is joined with what comes next."""


class HistoryLines:
    """The lines of all records of a run, each encoded and hashed once.

    A save writes them as they are: nothing old is encoded or hashed again.
    """

    def __init__(self) -> None:
        self._records: list[MetricRecord] = []
        """Those whose lines are here, to notice if one of them was deleted since."""
        self._begin(b"")

    def _begin(self, lines: bytes) -> None:
        self._pieces = [lines]
        """The lines in their order. Adding to a single piece would copy all of it in each save."""
        self._size = len(lines)
        self._hash = hashlib.sha256(lines)

    def adopt(self, folder: Path, history: RunHistory) -> None:
        """Begin with the lines of the state in `folder`, whose records `history` has just taken over."""
        _, records = split_state(history)
        path = folder / HISTORY_FILE
        lines = path.read_bytes() if path.exists() else b""
        if lines.count(b"\n") == len(records):
            self._records = list(records)
            self._begin(lines)

    def content(self, history: RunHistory) -> HashedBytes:
        """Return the file's content for what `history` holds now."""
        _, records = split_state(history)
        known = len(self._records)
        # Records are the same objects from save to save, which makes comparing them a matter of pointers.
        if records[:known] != self._records:
            self._records, known = [], 0
            self._begin(b"")
        new = records[known:]
        lines = b"".join(json.dumps(record).encode() + b"\n" for record in new)
        self._records += new
        if len(self._pieces[-1]) < _PIECE:
            self._pieces[-1] += lines
        else:
            self._pieces.append(lines)
        self._size += len(lines)
        self._hash.update(lines)
        return HashedBytes(tuple(self._pieces), Written(self._size, self._hash.hexdigest()))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the hash, which cannot be copied or pickled."""
        return {name: value for name, value in vars(self).items() if name != "_hash"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Take over all, and hash the lines."""
        vars(self).update(state, _hash=hashlib.sha256(b"".join(state["_pieces"])))


def split_state(history: RunHistory) -> tuple[dict[str, Any], list[MetricRecord]]:
    """Return the state of a history without its records, and them."""
    if type(history).state_dict is RunHistory.state_dict:
        # Its own state copies every record. A long list is not copied either.
        records = history.get_records()
        rest = {"epoch": history.current_epoch, "update": history.current_update}
        return rest, records if isinstance(records, list) else list(records)
    state = dict(history.state_dict())
    return state, list(state.pop("records", []))


def metrics_of_update(history: RunHistory, update: int) -> dict[str, float]:
    """Return the newest value of each metric that was recorded after the very update `update`."""
    metrics: dict[str, float] = {}
    for record in reversed(history.get_records()):
        if record["update"] != update:
            break
        metrics.setdefault(record["name"], record["value"])
    return metrics


def read_history(folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of the history in a training state.

    Raises `CheckpointError` if the file of its records is damaged. States of version 1 have them in their
    JSON.
    """
    path = folder / HISTORY_FILE
    if HISTORY_FILE not in state["files"]:
        return dict(state["run_history"])
    with files.reading(path):
        return {
            **state["run_history"],
            "records": [json.loads(line) for line in path.read_bytes().splitlines()],
        }
