"""Messages count in plain English: one process, two processes."""

import ast
import re
from pathlib import Path

import pytest

from accel_core.extending import counted

PACKAGES = Path(__file__).parents[2] / "packages"


@pytest.mark.parametrize(
    ("number", "things", "text"),
    [
        (1, "processes", "1 process"),
        (2, "processes", "2 processes"),
        (0, "updates", "0 updates"),
        (1, "batches", "1 batch"),
        (1, "epochs", "1 epoch"),
        (1, "more parameters", "1 more parameter"),
        (1.0, "minutes", "1 minute"),
        (0.5, "seconds", "0.5 seconds"),
        ("1", "samples", "1 sample"),
        ("1,024", "samples", "1,024 samples"),
    ],
)
def test_what_is_counted_is_in_the_singular_if_it_is_one(number, things, text):
    assert counted(number, things) == text


def test_no_message_leaves_the_plural_to_the_reader():
    for path in PACKAGES.glob("*/src/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"[a-z]\((s|es)\)(?!\w)", node.value), (path, node.value)
