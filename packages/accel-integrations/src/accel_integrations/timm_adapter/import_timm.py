"""Import timm when it is needed, and raise with what to install if it is missing."""

from __future__ import annotations

import importlib
from typing import Any

from accel_core import ConfigurationError


def import_timm(module: str = "timm") -> Any:
    """Return a module of timm, such as `"timm.data"`.

    Raises:
        ConfigurationError: timm, or torchvision that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # timm needs torchvision, but may be installed without it.
        missing = str(error.name).partition(".")[0]
        if missing not in ("timm", "torchvision"):
            raise
        raise ConfigurationError(
            f"accel_integrations.timm_adapter needs the package '{missing}', which is not installed. Install "
            'it with: pip install "accel-core[timm]"'
        ) from None
