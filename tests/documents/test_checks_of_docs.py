"""The checks of prose and site find what they are for."""

import json
import runpy
import shutil
import zlib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROSE = runpy.run_path(str(REPOSITORY / "docs" / "check_prose.py"))
SITE = runpy.run_path(str(REPOSITORY / "docs" / "check_site.py"))
WIDTHS = runpy.run_path(str(REPOSITORY / "docs" / "check_widths.py"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" ".join(["word"] * 26) + ".", "26 words"),
        ("One, two, three, four, five, six.", "5 commas"),
        ("It stops without a word.", "silently"),
        ("| head |\n|---|\n| " + " ".join(["word"] * 17) + " |", "a cell of 17 words"),
        ("- in a list it stops\n  without a word", "silently"),
    ],
)
def test_prose_that_is_hard_to_read_is_named_with_what_to_write(text: str, expected: str) -> None:
    ((line, message),) = PROSE["problems_of"](f"# Title\n\n{text}\n")
    assert expected in message
    assert line >= 3


def test_code_and_short_sentences_pass() -> None:
    text = f"```python\n# {'word ' * 40}\n```\n\nPass `a, b, c, d, e, f, g`. {'word ' * 25}. Another one."
    assert list(PROSE["problems_of"](text)) == []


def test_a_word_in_a_docstring_is_named_and_one_in_a_message_is_not() -> None:
    source = 'class A:\n    """Stops without a word, as `without a word` says."""\n    b = "without a word"\n'
    assert [line for line, _ in PROSE["problems_of_docstrings"](source)] == [2]


def inventory(*names: str) -> bytes:
    lines = "".join(f"{name} py:class 1 page.html#$ -\n" for name in names)
    return b"# 1\n# 2\n# 3\n# 4\n" + zlib.compress(lines.encode())


def test_a_public_name_without_an_entry_in_the_reference_is_found() -> None:
    listing = "A title.\n\n# accel_core\n\nclass A(Exception)\n    A(x)\n    run(y)\nb = 1\nf(x)\n"
    assert list(SITE["public_names"](listing)) == [
        "accel_core.A",
        "accel_core.A.run",
        "accel_core.b",
        "accel_core.f",
    ]
    assert SITE["missing_names"](listing, inventory("accel_core.A", "accel_core.b", "accel_core.f")) == [
        "accel_core.A.run"
    ]


def test_the_list_of_public_names_is_read_whole() -> None:
    names = list(SITE["public_names"]((REPOSITORY / "tests" / "public_api.txt").read_text("utf-8")))
    assert {"accel_core.Trainer.train", "accel_integrations.timm_adapter.timm_scheduler_fn"} <= set(names)


def test_an_entry_of_an_internal_name_is_found() -> None:
    content = inventory("accel_core.TrainerCallback.order", "accel_core.TrainerCallback.argument_sources")
    assert SITE["internal_entries"](content) == ["accel_core.TrainerCallback.argument_sources"]


def test_an_entry_of_the_reference_that_tells_nothing_is_named() -> None:
    heading = '<h4 id="{}" class="doc doc-heading">{}</h4><div class="doc-signature">{}</div>'
    told, typed = "<p>What it is.</p>", '<span class="p">:</span> <span class="nb">int</span>'
    page = "<h1>Title</h1><p>Text.</p>" + "".join(
        heading.format(f"a.B.{name}", name, signature) + text
        for name, signature, text in (("x", "x", told), ("y", "y", ""), ("z", typed, ""), ("w", "w", told))
    )
    assert SITE["empty_entries"](page) == ["a.B.y"]


def test_a_search_that_finds_nothing_is_named() -> None:
    index = {
        "config": {"separator": r"[\s\-()]+|\.(?!\d)"},
        "docs": [
            {"title": "Speed", "text": "<p>Call <code>torch.compile(model)</code>.</p>"},
            {"title": "s3://", "text": ""},
        ],
    }
    found = SITE["missing_searches"](json.loads(json.dumps(index)), ("torch.compile", "s3://", "slurm"))
    assert found == ["slurm"]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, WIDTHS["BROWSERS"])), reason="needs Chromium")
def test_what_does_not_fit_is_measured(tmp_path: Path) -> None:
    name = "x" * 300
    body = f'<article class="md-content"><pre style="overflow:auto"><code style="display:block;overflow:auto">{name}</code></pre>'
    (tmp_path / "wide.html").write_text(
        f"<!doctype html><body>{body}<p style='width:600px'>text</p></article>"
    )
    # A table scrolls by itself or in a box around it, and its last column is then out of sight.
    cell, frame = f"<table {{}}><tr><td>{'y' * 300}</td></tr></table>", "style='display:block;overflow:auto'"
    (tmp_path / "wide_table.html").write_text(
        f"<!doctype html><body><article class='md-content'>{cell.format(frame)}"
        f"<div class='md-typeset__table' {frame}>{cell.format('')}</div></article>"
    )
    heading = "<h2 style='width:9em;overflow-wrap:anywhere'>Unbreakable.{}Unbreakable</h2>"
    (tmp_path / "wide_heading.html").write_text(
        f"<!doctype html><body><article class='md-content'>{heading.format('') + heading.format('<wbr>')}</article>"
    )
    (tmp_path / "fits.html").write_text("<!doctype html><body><article class='md-content'>text</article>")
    browser = next(filter(None, map(shutil.which, WIDTHS["BROWSERS"])))
    problems = WIDTHS["measure"](tmp_path, browser)
    assert len(problems) == 6
    assert "wide.html at 1280 pixels has code that scrolls" in problems[0]
    assert "wide.html at 390 pixels is wider" in problems[1]
    # At both widths, and not the heading that may break after the point.
    assert all("has a heading that breaks in mid-word" in each for each in problems[2:4])
    assert all("wide_table.html at 1280 pixels has a table that scrolls" in each for each in problems[4:])


def test_without_a_browser_the_check_of_widths_says_so_and_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert WIDTHS["main"](tmp_path) == 0
    assert "no Chromium" in capsys.readouterr().out
