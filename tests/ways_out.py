"""A table of mistakes: each error is made, and then what its message says instead. Used by `tests/ways_out/`.

One file of `tests/ways_out/` a topic. It reads the errors of its part of the packages from the code, so that a
new message fails there until it has a row:

    ROWS = (Row("per_device_batch_size is {}", lambda: train(per_device_batch_size=0), (train,)),)
    FACTS = {"is damaged: ": "nothing that a call could do instead"}

    def test_every_error_has_a_row():
        check_every_error_is_known("accel-core/src/accel_core/run", (row.text for row in ROWS), FACTS)

    @pytest.mark.parametrize("row", ROWS, ids=name_of)
    def test_what_the_error_says_instead_works(row, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        make_mistake_and_ways_out(row)
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"
ABOUT_EVALUATION = re.compile(r"evaluat|eval_|predict|gather|watch|metric")
"""Errors with these words belong to `test_evaluation.py`, wherever they are raised."""


class Row(NamedTuple):
    """A mistake, a part of the text of its message, and what the message says instead."""

    text: str
    """Stands in the code as it is, so that the message is found there; {} for each value that is put in."""
    mistake: Callable[[], Any]
    ways_out: tuple[Callable[[], Any], ...]
    kind: type[Exception] | tuple[type[Exception], ...] = Exception
    """The class of the error."""


def name_of(row: Row) -> str:
    """The beginning of its message, as the name of a test."""
    return row.text.strip(" ,.")[:40]


def texts_of_errors(*parts: str) -> Iterator[str]:
    """The texts of the errors that these files and folders of `packages/` raise, with {} for values."""
    for part in parts:
        path = PACKAGES / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                    yield _text(node.exc.args[0])


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return _text(node.left) + _text(node.right) if isinstance(node, ast.BinOp) else ""


def check_every_error_is_known(*parts: str, rows: Iterable[str], facts: Iterable[str] = ()) -> None:
    """Raise `AssertionError` unless each error of these parts has a row or is a fact, and each row an error.

    Args:
        parts: files and folders of `packages/`.
        rows: a piece of the message of each error that a test makes.
        facts: a piece of each message that names no way out.
    """
    texts = [text for text in texts_of_errors(*parts) if text and not ABOUT_EVALUATION.search(text)]
    known = [*rows, *facts]
    assert [text for text in texts if not any(each in text for each in known)] == []
    assert [each for each in known if not any(each in text for text in texts)] == []


def make_mistake_and_ways_out(row: Row) -> None:
    """Raise `AssertionError` unless the mistake gives its error, and each way out works."""
    with pytest.raises(row.kind) as error:
        row.mistake()
    pattern = re.escape(row.text).replace(re.escape("{}"), "(?s:.*?)")
    assert re.search(pattern, str(error.value)), f"{error.value!r}\ndoes not say {row.text!r}"
    for way_out in row.ways_out:
        way_out()
