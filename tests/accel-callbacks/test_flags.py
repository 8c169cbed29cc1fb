"""A flag is True or False: "no" would count as true."""

import inspect

import numpy as np
import pytest

import accel_callbacks
import accel_core
from accel_core import ConfigurationError, TrainerCallback

CALLBACKS = {
    value
    for module in (accel_core, accel_callbacks)
    for value in vars(module).values()
    if inspect.isclass(value) and issubclass(value, TrainerCallback)
}
FLAGS = sorted(
    (
        (cls, name)
        for cls in CALLBACKS
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.annotation == "bool"
    ),
    key=str,
)
NEEDED = {"num_batches": 3, "schedule": {2: "0"}, "folder": "profile"}


def create(cls, name, value):
    """The callback with `value` as its flag, and with what it cannot be made without."""
    needed = {key: each for key, each in NEEDED.items() if key in inspect.signature(cls).parameters}
    return cls(**needed, **{name: value})


@pytest.mark.parametrize(("cls", "name"), FLAGS)
def test_what_is_no_flag_is_refused(cls, name):
    for value in ("no", 2, None):
        with pytest.raises(ConfigurationError, match=rf"^{name} is {value!r}, but must be one of \[False, T"):
            create(cls, name, value)
    assert create(cls, name, np.bool_(False))


def test_a_number_that_may_be_zero_is_taken_from_numpy_too_and_its_error_says_so():
    assert accel_callbacks.ModelAverageCallback(start_update=np.int64(0)).start_update == 0
    assert accel_callbacks.ProfileCallback("profile", wait=np.int64(0)).wait == 0
    for value in (-1, True, 0.5):
        for name, create_with in (
            ("start_update", lambda value: accel_callbacks.ModelAverageCallback(start_update=value)),
            ("min_epochs", lambda value: accel_callbacks.EarlyStoppingCallback(min_epochs=value)),
            ("wait", lambda value: accel_callbacks.ProfileCallback("profile", wait=value)),
        ):
            with pytest.raises(ConfigurationError, match=rf"^{name} is {value}, .*at least 0\. Use 0"):
                create_with(value)
