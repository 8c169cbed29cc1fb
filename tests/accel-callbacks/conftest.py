"""A store in memory, for the tests of mirrors and of exports."""

import pytest

from accel_core.state import copying as copying_module
from accel_core.state import store as store_module
from stores import Unreliable


@pytest.fixture
def store(monkeypatch):
    """Empty, and asked again at once when it fails."""
    Unreliable.reset()
    monkeypatch.setattr(store_module, "SECONDS_BETWEEN_TRIES", [0.01, 0.01])
    monkeypatch.setattr(copying_module, "FIRST_PAUSE", 0.01)
    yield Unreliable
    Unreliable.reset()
