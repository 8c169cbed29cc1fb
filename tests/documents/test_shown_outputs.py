"""What pages show as output is what their code prints today, but for times, rates and figures."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[2]
OUTPUT = REPOSITORY / "docs" / "output"
SHOWN = sorted(path.name for path in OUTPUT.glob("seeing_*.txt"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of the page on seeing, made anew."""
    specification = importlib.util.spec_from_file_location("makes", REPOSITORY / "docs" / "make_pictures.py")
    assert specification is not None and specification.loader is not None
    makes: ModuleType = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(makes)
    makes.OUTPUT = tmp_path_factory.mktemp("output")
    makes.seeing(tmp_path_factory.mktemp("pages"))
    return Path(makes.OUTPUT)


def form_of(path: Path) -> list[str]:
    """The words of a text. Where lines break depends on the numbers in them, and how far a bar is on the machine."""
    text = re.sub(r"[█▉▊▋▌▍▎▏]+", "", path.read_text(encoding="utf-8")).replace("(best)", "")
    return re.findall(r"[^\W\d][\w.=]*", re.sub(r"[\d.,]+", "", text))


@pytest.mark.parametrize("name", SHOWN)
def test_the_page_shows_what_its_code_prints(made: Path, name: str) -> None:
    assert form_of(OUTPUT / name) == form_of(made / name)
    assert len(form_of(OUTPUT / name)) > 3


def test_each_output_stands_on_the_page() -> None:
    page = (REPOSITORY / "docs" / "seeing.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r'--8<-- "output/(seeing_\w+\.txt)"', page)) == SHOWN
    assert len(SHOWN) >= 6
