"""A table of mistakes: each error is made, and then what its message says instead. Used by `tests/ways_out/`.

One file of `tests/ways_out/` a topic. It reads the errors of its part of the packages from the code, so that a
new message fails there until it has a row:

    ROWS = (Row("per_device_batch_size is {}", lambda: train(per_device_batch_size=0), (train,)),)
    FACTS = {"is damaged: ": "nothing that a call could do instead"}

    def test_every_error_has_a_row():
        check_every_error_is_known("accel-core/src/accel_core/run", (row.text for row in ROWS), FACTS)

    @pytest.mark.parametrize("row", ROWS, ids=name_of)
    def test_what_the_error_says_instead_works(row):
        make_mistake_and_ways_out(row)

Each test works in a folder of its own, and what others have left in the store `memory://` is gone.

What only several processes can make is a case of `case_runner.py` that returns what is `told`:

    ON_PROCESSES = {"differ beyond the first dimension": lambda batch_size: told(mistake, way_out)}

    @pytest.mark.parametrize("text", ON_PROCESSES)
    def test_what_an_error_on_two_processes_says_instead_works(outcome, text):
        for said in outcome.of(text):
            check_told(text, said)
"""

import ast
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from accel_core import AccelError, Trainer
from tiny import tiny_data, tiny_trainer

PACKAGES = Path(__file__).parents[1] / "packages"
ABOUT_EVALUATION = re.compile(r"evaluat|eval_|predict|gather|watch|metric")
"""Errors with these words belong to `test_evaluation.py`, wherever they are raised."""
NOTHING = "nothing"
"""What is told where no error is raised."""
DATA = tiny_data(16)


class Row(NamedTuple):
    """A mistake, a part of the text of its message, and what the message says instead."""

    text: str
    """Stands in the code as it is, so that the message is found there; {} for each value that is put in."""
    mistake: Callable[[], Any]
    ways_out: tuple[Callable[[], Any], ...]
    kind: type[Exception] | tuple[type[Exception], ...] = Exception
    """The class of the error."""
    says: str = ""
    """A piece of the message in which a value is put in, such as the way out of just this mistake."""


def name_of(row: Row) -> str:
    """The beginning of its message, as the name of a test."""
    return row.text.strip(" ,.")[:40]


def texts_of_errors(*parts: str) -> Iterator[str]:
    """The texts of the errors that these files and folders of `packages/` make, with {} for values.

    So are those that a name or a function of the same file stands for, as in `raise CheckpointError(failure)`.
    """
    for part in parts:
        path = PACKAGES / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            module = ast.parse(file.read_text())
            meanings = meanings_in(module)
            raised = {node.exc for node in ast.walk(module) if isinstance(node, ast.Raise)}
            for node in ast.walk(module):
                if isinstance(node, ast.Call) and node.args and (node in raised or _makes_error(node.func)):
                    # What a function that makes an error is given need not be its text.
                    yield from texts_in(node.args[0], meanings if _makes_error(node.func) else {})


def ways_out_of_checks(*parts: str) -> Iterator[str]:
    """The sentences that these files give to checks such as `check_whole_number`, which put them in an error."""
    for part in parts:
        path = PACKAGES / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            module = ast.parse(file.read_text())
            meanings = meanings_in(module)
            for node in ast.walk(module):
                if isinstance(node, ast.Call) and "check" in ast.unparse(node.func):
                    given = [*node.args[2:], *(each.value for each in node.keywords if each.arg == "way_out")]
                    texts = (text for each in given for text in texts_in(each, meanings))
                    yield from (text for text in texts if text.endswith("."))


def _makes_error(function: ast.expr) -> bool:
    name = ast.unparse(function)
    return name.endswith("Error") or name == "super().__init__"


def meanings_in(module: ast.Module) -> dict[str, list[ast.expr]]:
    """What each name of a file is set to, and what each of its functions returns."""
    meanings: dict[str, list[ast.expr]] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Assign | ast.NamedExpr) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                meanings.setdefault(ast.unparse(target), []).append(node.value)
        if isinstance(node, ast.FunctionDef):
            returns = [each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value]
            meanings.setdefault(f"{node.name}()", []).extend(returns)
    return meanings


def texts_in(node: ast.expr, meanings: Mapping[str, list[ast.expr]], depth: int = 3) -> Iterator[str]:
    """The texts that an expression may be, with {} for values."""
    if text := _text(node):
        yield text
    elif isinstance(node, ast.IfExp):
        yield from (text for part in (node.body, node.orelse) for text in texts_in(part, meanings, depth))
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".join"):
        # Of several lines the first; in map(function, values) a function makes each.
        lines = node.args[0]
        maps = isinstance(lines, ast.Call) and ast.unparse(lines.func) == "map"
        made = ast.Call(lines.args[0], [], []) if maps else lines
        yield from texts_in(made.elts[0] if isinstance(made, ast.List) else made, meanings, depth)
    elif depth and isinstance(node, ast.Name | ast.Call):
        name = node.id if isinstance(node, ast.Name) else f"{ast.unparse(node.func).removeprefix('self.')}()"
        for meaning in meanings.get(name, []):
            yield from texts_in(meaning, meanings, depth - 1)


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
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
    assert [text for text in texts if not any(_is_piece(each, text) for each in known)] == []
    assert [each for each in known if not any(_is_piece(each, text) for text in texts)] == []


def _is_piece(piece: str, text: str) -> bool:
    """Whether a row speaks of the error with this text. A piece without words would stand in many."""
    return piece in text if has_words(piece) else piece == text


def has_words(text: str) -> bool:
    return bool(re.search("[A-Za-z]{3}", text))


def check_every_way_out_is_known(*parts: str, rows: Iterable[str]) -> None:
    """Do the same for the sentences that these parts give to checks: each row has a whole one, without the values."""
    given = set(ways_out_of_checks(*parts)) - set(texts_of_errors(*parts))
    texts = {text for text in given if not ABOUT_EVALUATION.search(text)}
    known = set(rows)
    assert texts - known == set()
    assert known - texts == set()


def texts_of_rows(*names: str) -> list[str]:
    """The pieces of messages of which these files of `tests/ways_out/` have a row, on one process or several."""
    tables = [runpy.run_path(str(Path(__file__).with_name("ways_out") / name)) for name in names]
    return [
        text
        for each in tables
        for text in (*(row.text for row in each.get("ROWS", ())), *each.get("ON_PROCESSES", ()))
    ]


def make_mistake_and_ways_out(row: Row) -> None:
    """Raise `AssertionError` unless the mistake gives its error, and each way out works."""
    assert has_words(row.text + row.says), "each error would do"
    with pytest.raises(row.kind) as error:
        row.mistake()
    # A way out may be a note on an error of torch.
    said = "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])
    assert contains(said, row.text), f"{error.value!r}\ndoes not say {row.text!r}"
    assert row.says in said
    for way_out in row.ways_out:
        way_out()


def contains(said: str, text: str) -> bool:
    return bool(re.search(re.escape(text).replace(re.escape("{}"), "(?s:.*?)"), said))


def told(*acts: Callable[[], Any]) -> list[str]:
    """What the error of each act says, or `NOTHING`: of a mistake first, then of its ways out."""
    return [_told(act) for act in acts]


def _told(act: Callable[[], Any]) -> str:
    try:
        act()
    except AccelError as error:
        return str(error)
    return NOTHING


def check_told(text: str, said: list[str], says: str = "") -> None:
    """Raise `AssertionError` unless the first of what was `told` is the error with this text, and the rest is nothing."""
    mistake, *ways_out = said
    assert contains(mistake, text) and says in mistake, mistake
    assert ways_out == [NOTHING] * len(ways_out)


# ---------------------------------------------------------------------- acts


def train(trainer: Trainer | None = None, data: Any = DATA, callbacks: Any = (), **kwargs: Any) -> Trainer:
    """An epoch of four updates."""
    trainer = tiny_trainer(callbacks=callbacks) if trainer is None else trainer
    trainer.train(data, **{"num_epochs": 1, "per_device_batch_size": 4, **kwargs})
    assert trainer.run_progress.updates_completed
    return trainer


def training(**kwargs: Any) -> Callable[[], Trainer]:
    return lambda: train(**kwargs)


def without(package: str, act: Callable[[], Any]) -> Callable[[], Any]:
    """What `act` does where a package is not installed."""

    def acting() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            return act()

    return acting
