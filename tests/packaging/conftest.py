"""The distributions are built once for all tests of this folder."""

from pathlib import Path

import pytest

from installing import IMPORT_NAMES, REPOSITORY, build


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheels and sdists of all three."""
    folder = tmp_path_factory.mktemp("distributions")
    for name in IMPORT_NAMES:
        build(REPOSITORY / "packages" / name, folder, "wheel", "sdist")
    return folder
