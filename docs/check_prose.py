"""Check the prose of README, changelogs, site and docstrings: `python docs/check_prose.py [PAGE...]`.

Sentences are short and have few commas, words are those of the field, and cells of tables are brief. Each message names the place,
what is wrong and what to write. Of docstrings it checks the words alone. Pages that are still to be rewritten are listed in
prose_to_rewrite.txt: a page that passes has to leave the list, and no page may join it.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import markdown_it

REPOSITORY = Path(__file__).parents[1]
MAX_WORDS, MAX_COMMAS, MAX_WORDS_OF_A_CELL = 25, 4, 16
# What stands in a pattern on the left reads like a translation; on the right stands what a reader expects.
WORDS = {
    r"without a word": "silently",
    r"to the (?:last )?bits?": "bit-identical",
    r"says so": "raises ConfigurationError, or warns",
    r"(?:is|are) refused": "name the actor: `train` raises ConfigurationError",
    r"that never was": "that was never interrupted",
    r"as long as you like|whenever you like": "at any time",
    r"(?:the )?one that one": "a loop written by hand",
    r"go(?:es)? on (?:with|after|from|to|in)|that goes? on": "continues, current",
    r"belongs? into": "belongs in",
    r"safe point": "after the current update",
    r"an update is that": "an update equals",
    r"what it is that": "what",
    r"dealt out|deal out|shared? out": "assigned round-robin, or sharded",
    r"idle steps?": "padding step",
    r"told apart": "distinguished",
    r"behind your back": "never changes global state",
    r"comes? by": "reaches",
    r"by hand-written": "of a hand-written",
    r"of one's own|of your own": "your own",
    r"from nothing": "from scratch",
    r"weighs? (?:nothing|what)": "has weight zero, is weighted by",
    r"the direct way|the long way": "bypasses Accelerate, goes through Accelerate",
    r"in peace": "cleanly",
    r"anew": "again, from the start",
    r"thankful": "builds on",
    r"(?:a|the) stream": "iterable dataset",
    r"whoever": "anyone who, any process that",
    r"hitherto|thereby|therein|thereof|whereof": "a plain word",
}
# Marks of the site: a note, a tab, and an entry of the reference with the lines of its options.
NO_PROSE = (
    r"^!!!.*$|^=== .*$|^:::.*$|^ +(?:options|inherited_members|members):.*$"
)
PATTERN = re.compile(
    "|".join(
        rf"(?P<w{number}>\b(?:{left})\b)" for number, left in enumerate(WORDS)
    ),
    re.I,
)


def pieces(text: str) -> Iterator[tuple[int, str, str]]:
    """The prose of a page as (line, kind, text): paragraphs, headings and cells, with code as one word and no links."""
    parser = markdown_it.MarkdownIt("commonmark").enable("table")
    line, kind = 1, "text"
    for token in parser.parse(re.sub(NO_PROSE, "", text, flags=re.MULTILINE)):
        if token.map:
            line = token.map[0] + 1
        if token.type in ("td_open", "th_open"):
            kind = "cell"
        elif token.type in ("paragraph_open", "heading_open"):
            kind = "text"
        if token.type != "inline":
            continue
        words = []
        for child in token.children or []:
            if child.type == "code_inline":
                words.append("CODE")
            elif child.type in ("softbreak", "hardbreak"):
                words.append(" ")
            elif child.type == "text":
                words.append(child.content)
        yield line, kind, "".join(words)


def sentences(text: str) -> list[str]:
    """Sentences end in . ! ? or : before a space, or in a semicolon."""
    return [
        part
        for part in re.split(r"(?<=[.!?:;])[)\"]?\s+", text)
        if part.strip()
    ]


def problems_of(text: str) -> Iterator[tuple[int, str]]:
    """Each thing to mend, as (line, message)."""
    for line, kind, piece in pieces(text):
        for message in words_to_mend(piece):
            yield line, message
        if (
            kind == "cell"
            and (words := len(piece.split())) > MAX_WORDS_OF_A_CELL
        ):
            yield (
                line,
                f"a cell of {words} words: at most {MAX_WORDS_OF_A_CELL}; move the rest below the table: {piece[:60]}…",
            )
        for sentence in sentences(piece):
            words = len(re.findall(r"[\w'/-]*[A-Za-z][\w'/-]*", sentence))
            if words > MAX_WORDS:
                yield (
                    line,
                    f"{words} words: at most {MAX_WORDS} a sentence, make two of it: {sentence[:60]}…",
                )
            elif sentence.count(",") > MAX_COMMAS:
                commas = sentence.count(",")
                yield (
                    line,
                    f"{commas} commas: at most {MAX_COMMAS} a sentence, make a list of it: {sentence[:60]}…",
                )


def words_to_mend(piece: str) -> Iterator[str]:
    """A message for each word of the table."""
    for match in PATTERN.finditer(piece):
        better = list(WORDS.values())[int(match.lastgroup[1:])]
        yield f"{match.group()!r}: write {better!r}, or say it another way"


def problems_of_docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Each word to mend in strings that stand alone: docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            prose = re.sub(r"`[^`]*`", "CODE", value.value)
            for message in words_to_mend(prose):
                yield value.lineno, message


def main(names: list[str]) -> int:
    """Print the problems of the pages, all if none is named; return how many that are."""
    found = [
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        REPOSITORY / "SECURITY.md",
    ]
    found += [
        *REPOSITORY.glob("docs/**/*.md"),
        *REPOSITORY.glob("packages/*/README.md"),
        *REPOSITORY.glob("packages/*/CHANGELOG.md"),
        *REPOSITORY.glob("packages/*/src/**/*.py"),
    ]
    pages = [Path(name).resolve() for name in names] or sorted(found)
    count = 0
    for page in pages:
        name = (
            page.relative_to(REPOSITORY).as_posix()
            if page.is_relative_to(REPOSITORY)
            else str(page)
        )
        is_code = page.suffix == ".py"
        check = problems_of_docstrings if is_code else problems_of
        problems = list(check(page.read_text(encoding="utf-8")))
        for line, message in problems:
            print(f"{name}:{line}: {message}")
        count += len(problems)
    return count


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
