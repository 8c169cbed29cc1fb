"""Import transformers when it is needed, and raise with what to install if it is missing."""

from __future__ import annotations

import importlib
from typing import Any

from accel_core import ConfigurationError


def import_transformers(module: str = "transformers") -> Any:
    """Return transformers, or a module of it.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Something that transformers itself needs is missing, which its own message names.
        if error.name != "transformers":
            raise
        raise ConfigurationError(
            "accel_integrations.transformers_adapter needs the package 'transformers', which is not "
            'installed. Install it with: pip install "accel-core[transformers]"'
        ) from None
