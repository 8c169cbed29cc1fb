"""The Python of every page of the site and of every README runs, and all links lead somewhere."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from accel_core import Trainer, TrainerCallback
from accel_core.callbacks.callback_list import EVENTS
from run_pages import BLOCK

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
RUNNER = REPOSITORY / "tests" / "run_pages.py"
PAGES = {
    str(path.relative_to(REPOSITORY)): path
    for path in sorted([*DOCS.rglob("*.md"), *REPOSITORY.glob("*.md"), *REPOSITORY.glob("packages/*/*.md")])
}
# Run with the data, models and other libraries that they need.
RUN_ELSEWHERE = {
    "docs/migration.md": "documents/test_migration.py",
    "packages/accel-integrations/README.md": "accel-integrations/timm_adapter/test_readme.py",
}
WITH_CODE = [
    name
    for name, path in PAGES.items()
    if BLOCK.search(path.read_text(encoding="utf-8")) and name not in RUN_ELSEWHERE
]
# What a page includes: of docs/output, which `hatch run pictures` makes, or of the repository.
INCLUDED = re.compile(r'^--8<-- "(.*)"$', flags=re.MULTILINE)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """From each page with code to the error, or None."""
    command = [sys.executable, RUNNER, tmp_path_factory.mktemp("pages"), *(PAGES[name] for name in WITH_CODE)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert finished.returncode == 0, finished.stderr
    results = json.loads(finished.stdout.splitlines()[-1])
    return {name: results[str(PAGES[name])] for name in WITH_CODE}


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE)
def test_all_python_of_a_page_runs(page: str, errors: dict[str, str | None]) -> None:
    assert errors[page] is None, errors[page]


def brought_by_all() -> set[str]:
    """The modules that `pip install "accel-core[all]"` brings by name: all requirements and extras but that of stores."""
    brought = {"accel_core", "accel_callbacks", "accel_integrations", "torch", "accelerate", "tqdm"}
    for path in REPOSITORY.glob("packages/*/pyproject.toml"):
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        extras = project.get("optional-dependencies", {}).values()
        for requirement in [*project.get("dependencies", []), *(name for extra in extras for name in extra)]:
            brought.add(re.split(r"[^\w-]", requirement)[0])
    return brought


@pytest.mark.parametrize("page", [*WITH_CODE, "packages/accel-integrations/README.md"])
def test_a_page_names_what_to_install_for_its_code(page: str) -> None:
    """Beyond `accel-core[all]`, which the quickstart installs. The tests have every library, and a reader has not."""
    text = PAGES[page].read_text(encoding="utf-8")
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse("\n".join(BLOCK.findall(text))))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        )
    }
    needed = {
        "scikit-learn" if name == "sklearn" else name for name in imported - set(sys.stdlib_module_names)
    }
    named = set(re.findall(r"[\w-]+", " ".join(re.findall(r"pip install ((?:[^`\n]|\\\n)*)", text))))
    assert needed - brought_by_all() <= named


def test_the_runner_reports_the_line_of_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    command = [sys.executable, RUNNER, tmp_path / "folder", page]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "line 8" in json.loads(finished.stdout)[str(page)]


@pytest.mark.parametrize("page", RUN_ELSEWHERE)
def test_pages_that_are_run_elsewhere_are_named_there(page: str) -> None:
    test = (REPOSITORY / "tests" / RUN_ELSEWHERE[page]).read_text(encoding="utf-8")
    assert page in PAGES and Path(page).name in test


def anchors_of(page: Path) -> set[str]:
    """The anchors of headings, as the site and GitHub make them, and those of the reference's entries."""
    entries = re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.M)
    headings = re.findall(
        r"^#+ (.*)$",
        re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE),
        re.M,
    )
    return set(entries) | {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", PAGES[page].read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        link = urlsplit(target)
        if link.scheme:
            assert link.scheme == "https" and "." in link.netloc, target
            continue
        path = (PAGES[page].parent / link.path).resolve() if link.path else PAGES[page]
        assert path.exists() and path.is_relative_to(REPOSITORY), target
        if link.fragment:
            # The site shows some pictures on light pages only, and others on dark ones.
            known = anchors_of(path) if path.suffix == ".md" else {"only-light", "only-dark"}
            assert link.fragment in known, target
    for name in INCLUDED.findall(PAGES[page].read_text(encoding="utf-8")):
        assert (DOCS / name).exists() or (REPOSITORY / name).exists(), name


def test_the_page_of_each_example_has_what_it_prints() -> None:
    """`hatch run pictures examples` runs them, and writes it."""
    examples = {path.stem for path in (REPOSITORY / "examples").glob("[0-9]*.py")}
    assert examples == {path.stem for path in (DOCS / "output/examples").glob("*.txt")}


def test_tests_and_examples_that_a_page_names_exist() -> None:
    """A promise that is proved by a test, and messages that were reworded, must not leave the page behind."""
    existing = {str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("tests/**/*.py")}
    names = {Path(name).name for name in existing}
    for page, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"`(tests/[\w/-]+\.py)`", text)) <= existing, page
        assert set(re.findall(r"`(test_\w+\.py)`", text)) <= names, page
        examples = re.findall(r"examples/\d\d_\w+\.py", text)
        assert all((REPOSITORY / name).exists() for name in examples), page


def test_messages_that_troubleshooting_quotes_are_those_of_the_code() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text("utf-8") for path in REPOSITORY.glob("packages/*/src/**/*.py"))
    # Literals that follow each other are one text.
    sources = re.sub(r'"\s+f?"', "", sources)
    # Quoted in a table, or at the beginning of a paragraph before a colon.
    quoted = re.findall(r"^\| `([^`]+)` \|", text, re.M) + re.findall(r"^(?:- )?`([^`]+)`:", text, re.M)
    # The value stands in it.
    quoted = [message.replace("is nan", "is {loss}") for message in quoted]
    assert len(quoted) > 15
    assert [message for message in quoted if message not in sources] == []


@pytest.mark.parametrize("page", [name for name in PAGES if name.startswith("packages/")])
def test_pages_that_leave_the_repository_have_no_links_into_it(page: str) -> None:
    """PyPI shows the README of a package without the files beside it."""
    assert all(
        target.startswith("https://")
        for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page].read_text("utf-8"))
    )


def test_the_loop_is_drawn_with_every_event_and_every_method_that_may_be_overridden() -> None:
    drawn = (DOCS / "loop.md").read_text(encoding="utf-8").split("```")[1]
    assert set(re.findall(r"\bon_\w+", drawn)) == set(EVENTS)
    assert set(EVENTS) <= set(vars(TrainerCallback))
    overridable = {
        name
        for name in dir(Trainer)
        if re.match("(create|calculate|run|count)_|[a-z].*(_start|_end|_step|_grad|_gradients)$", name)
    }
    overridable -= {
        "run_config",
        "run_history",
        "run_progress",
        "run_id",
        "create_model_state",
        "gather_with_grad",
        "run_card",
        "global_step",
    }
    assert overridable <= set(re.findall(r"\b(\w+)\(\)", drawn))


def test_the_loop_is_drawn_in_the_order_in_which_a_run_goes() -> None:
    """Checked against a run of two epochs, by what fires first when."""
    import torch
    from torch.utils.data import TensorDataset

    story: list[str] = []
    listening = {name: lambda self, trainer, _name=name, **kwargs: story.append(_name) for name in EVENTS}
    listener = type("Listener", (TrainerCallback,), listening)
    model = torch.nn.Linear(2, 1)
    trainer = Trainer(
        model, torch.nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1), callbacks=[listener]
    )
    data = TensorDataset(torch.randn(4, 2), torch.randn(4, 1))
    trainer.train(data, num_epochs=2, eval_dataset=data, per_device_batch_size=2)
    drawn = (DOCS / "loop.md").read_text(encoding="utf-8").split("```")[1].partition("trainer.evaluate")[0]
    in_drawing = [name for name in dict.fromkeys(re.findall(r"\bon_\w+", drawn)) if name in story]
    assert in_drawing == list(dict.fromkeys(story))
