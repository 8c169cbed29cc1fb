"""A table of warnings and notices, as `ways_out.py` is one of errors. Used by `tests/ways_out/test_warnings.py`.

A notice is a sentence that is logged or printed. All are read from the code, so that a new one fails until it has a
row or is a fact. A row makes it appear, and then does what it says, without hearing it again.
"""

import ast
import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from accel_core import AccelWarning
from ways_out import PACKAGES, Row, contains, has_words, meanings_in

_SAYS = re.compile(
    r"(warnings\.warn|notify|_warn|trainer\.print|(loader\.)?log|.*logger.*\.(info|warning|error)|.*\.(request|flag)_stop)$"
)
_VALUES_OF_LOGGING = re.compile(r"%[sdg]")


# ---------------------------------------------------------------------- what the code says


def read_sources() -> dict[str, ast.Module]:
    """The files of all packages, by their paths inside them."""
    return {
        str(file.relative_to(PACKAGES)).partition("src/")[2]: ast.parse(file.read_text())
        for file in sorted(PACKAGES.rglob("src/**/*.py"))
    }


def texts_of_notices(makers: Iterable[str]) -> tuple[set[str], set[str]]:
    """The texts of all warnings and notices, and the places of those that are made elsewhere.

    Args:
        makers: `file: name` of the functions and constants that give sentences to such a place.

    Returns:
        The texts, with {} for each value, and `file: expression` of each call whose text is not in its file.
    """
    sources = read_sources()
    texts, elsewhere = set(), set()
    for file, module in sources.items():
        meanings = meanings_in(module)
        for call in (node for node in ast.walk(module) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if not _SAYS.match(name) or not call.args:
                continue
            given = call.args[1] if name == "notify" else call.args[0]
            found = set(_sentences(given, meanings))
            texts |= found
            if not found:
                elsewhere.add(f"{file}: {ast.unparse(given)}")
    for maker in makers:
        file, _, name = maker.partition(": ")
        functions = [
            node
            for node in ast.walk(sources[file])
            if isinstance(node, ast.FunctionDef) and node.name == name
        ]
        meant = functions or meanings_in(sources[file]).get(name, [])
        assert meant, f"{maker} is not there"
        texts |= {text for each in meant for text in _literals(each)}
    return texts, elsewhere


def _sentences(node: ast.expr, meanings: Mapping[str, list[ast.expr]]) -> Iterator[str]:
    found = list(_literals(node))
    name = node.id if isinstance(node, ast.Name) else ""
    for meaning in () if found else meanings.get(name, ()):
        found += _literals(meaning)
    yield from found


def _literals(node: ast.AST) -> Iterator[str]:
    """The sentences that stand in a piece of code, but for its docstring."""
    if isinstance(node, ast.FunctionDef):
        for part in node.body[1:] if ast.get_docstring(node) else node.body:
            yield from _literals(part)
    elif isinstance(node, ast.JoinedStr):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        if _is_sentence(text):
            yield text
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, str) and _is_sentence(node.value):
            yield _VALUES_OF_LOGGING.sub("{}", node.value)
    # An error has a row of its own.
    elif not isinstance(node, ast.Raise):
        for part in ast.iter_child_nodes(node):
            yield from _literals(part)


def _is_sentence(text: str) -> bool:
    return has_words(text) and " " in text.strip()


def check_every_notice_is_known(
    elsewhere: Mapping[str, Iterable[str]],
    pieces: Iterable[str],
    rows: Iterable[str],
    facts: Iterable[str],
) -> None:
    """Raise `AssertionError` unless each sentence has a row or is a fact, and each row and fact a sentence.

    Args:
        elsewhere: the functions and constants that make the sentences of a call, by the place of the call.
        pieces: those that make parts of sentences.
    """
    makers = {maker for each in elsewhere.values() for maker in each} | set(pieces)
    texts, found = texts_of_notices(makers)
    assert found == set(elsewhere)
    known = [*rows, *facts]
    assert sorted(text for text in texts if not any(_is_piece(piece, text) for piece in known)) == []
    assert [piece for piece in known if not any(_is_piece(piece, text) for text in texts)] == []


def _is_piece(piece: str, text: str) -> bool:
    """Whether a row or a fact speaks of this sentence. A few words would stand in many."""
    return piece == text or (piece in text and len(re.findall("[A-Za-z]{2,}", piece)) >= 4)


# ---------------------------------------------------------------------- what a user hears


class _Keeping(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def heard(act: Callable[[], Any], may_warn: bool = True) -> str:
    """What `act` warns of, logs and prints, in one line. Warnings of others are as the test has them."""
    logger, handler, printed = logging.getLogger("accel_core"), _Keeping(), io.StringIO()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            warnings.simplefilter("always" if may_warn else "error", AccelWarning)
            act()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    told = [*(str(each.message) for each in caught), *handler.lines, printed.getvalue()]
    return " ".join(" ".join(told).split())


def hear_mistake_and_ways_out(row: Row) -> None:
    """Raise `AssertionError` unless the mistake is answered by its sentence, and no way out is."""
    check_heard(
        row.text,
        [heard(row.mistake), *(heard(way_out, may_warn=False) for way_out in row.ways_out)],
        row.says,
    )


def check_heard(text: str, said: list[str], says: str = "") -> None:
    """Raise `AssertionError` unless the first of what was heard has this text, and the rest has not."""
    assert has_words(text), "each sentence would do"
    mistake, *ways_out = said
    assert contains(mistake, text) and says in mistake, f"{mistake!r}\ndoes not say {text!r}"
    assert ways_out, "a row needs a way out"
    for each in ways_out:
        assert not contains(each, text), f"{each!r}\nstill says {text!r}"
