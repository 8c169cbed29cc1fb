"""What the site takes from elsewhere in the repository: a page for each example, the changelogs, and its own address."""

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
ABOUT = REPOSITORY / "packages/accel-core/src/accel_core/__about__.py"
PACKAGES = ("accel-core", "accel-callbacks", "accel-integrations")


def read_about() -> dict[str, str]:
    """The assignments of `__about__.py`, without importing the package, which would need torch."""
    tree = ast.parse(ABOUT.read_text(encoding="utf-8"))
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
    }


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the pages of examples, the version, and the address of site and repository once a release has one."""
    pages = [
        {
            example.stem[3:]
            .replace("_", " ")
            .capitalize(): f"examples/{example.stem}.md"
        }
        for example in sorted(EXAMPLES.glob("[0-9]*.py"))
    ]
    place = next(
        index for index, entry in enumerate(config.nav) if "Reference" in entry
    )
    config.nav.insert(place, {"Examples": pages})
    about = read_about()
    config.extra["version_of_site"] = about["__version__"]
    config.copyright = f"accel {about['__version__']}, Apache-2.0"
    if about["__repository__"]:
        config.repo_url = about["__repository__"]
        config.repo_name = "accel"
        config.edit_uri = "edit/main/docs/"
    if about["__site__"]:
        config.site_url = about["__site__"]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of examples and changelogs."""
    for example in sorted(EXAMPLES.glob("[0-9]*.py")):
        page = f"examples/{example.stem}.md"
        files.append(
            File.generated(config, page, content=example_page(example))
        )
    files.append(
        File.generated(config, "changelog.md", content=changelog_page())
    )
    return files


def example_page(example: Path) -> str:
    """The docstring as text, what the example prints and draws, and its code."""
    source = example.read_text(encoding="utf-8")
    # As it is written: Python would join lines that end in a backslash.
    docstring = inspect.cleandoc(source.split('"""')[1])
    title, _, text = docstring.partition("\n\n")
    code = re.sub(r'^""".*?"""\n+', "", source, count=1, flags=re.DOTALL)
    name = example.stem
    parts = [f"# {title.rstrip('.')}"]
    for paragraph in text.split("\n\n"):
        # Commands stand indented.
        is_code = paragraph.startswith("    ")
        parts.append(
            f"```sh\n{textwrap.dedent(paragraph)}\n```"
            if is_code
            else paragraph
        )
    output = REPOSITORY / "docs/output/examples" / f"{name}.txt"
    if output.exists():
        parts.append(
            f"## What it prints\n\n```text\n{output.read_text('utf-8')}```"
        )
    for picture in sorted(
        (REPOSITORY / "docs/pictures/examples").glob(f"{name}*.png")
    ):
        # Of a picture with a dark version a page shows one, by the colours that the reader has chosen.
        is_dark = picture.stem.endswith("_dark")
        has_dark = picture.with_stem(f"{picture.stem}_dark").exists()
        shown = "#only-dark" if is_dark else "#only-light" * has_dark
        parts.append(
            f"![What {name} draws](../pictures/examples/{picture.name}{shown})"
        )
    parts.append(
        f"## The code\n\n`examples/{example.name}`\n\n```py\n{code}```"
    )
    return "\n\n".join(parts) + "\n"


def changelog_page() -> str:
    """The three changelogs below each other, a level of headings deeper."""
    parts = ["# Changelog\n"]
    for package in PACKAGES:
        text = (REPOSITORY / "packages" / package / "CHANGELOG.md").read_text(
            encoding="utf-8"
        )
        body = re.sub(r"^# .*\n", "", text, count=1)
        parts.append(
            f"## {package}\n\n" + re.sub(r"^#", "##", body, flags=re.MULTILINE)
        )
    return "\n".join(parts)


def on_page_content(html: str, page: Page, **_kwargs: Any) -> str:
    """Link the names of examples to their pages, and let long names in tables take two lines."""
    if not page.file.src_uri.startswith("examples/"):
        root = "../" * page.file.src_uri.count("/")
        html = re.sub(
            r"(?<!\">)<code>examples/(\d\d_\w+)\.py</code>",
            rf'<a href="{root}examples/\g<1>.html">\g<0></a>',
            html,
        )
    return re.sub(r"<td>.*?</td>", allow_breaks_in_cell, html)


def allow_breaks_in_cell(cell: re.Match[str]) -> str:
    """Let long names break after a point, `(` or `=`, and never in mid-word."""

    def allow_breaks(code: re.Match[str]) -> str:
        return re.sub(
            r"(?<=\w)[.(=](?=[\w\"][^\s<]{7})", r"\g<0><wbr>", code[0]
        )

    return re.sub(r"(?<=<code>)[^<]{28,}(?=</code>)", allow_breaks, cell[0])


def on_post_page(output: str, **_kwargs: Any) -> str:
    """Let names in headings of the reference break at their parts; after the search has read the titles, which would break too."""

    def allow_breaks(name: re.Match[str]) -> str:
        return re.sub(r"(?<=[._])(?=\w)|(?<=[a-z])(?=[A-Z])", "<wbr>", name[0])

    return re.sub(r"(?<=-name\">)[\w.]+(?=</span>)", allow_breaks, output)


def on_page_context(context: dict[str, Any], **_kwargs: Any) -> dict[str, Any]:
    """Leave out the link for editing of pages that no file of docs/ holds."""
    if context["page"].file.generated_by:
        context["page"].edit_url = None
    return context
