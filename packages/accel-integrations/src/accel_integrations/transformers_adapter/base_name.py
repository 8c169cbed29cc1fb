"""Says in a folder of saved adapters by which name PEFT finds their base."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from accel_core import AccelWarning

_CONFIG = "adapter_config.json"
_KEY = "base_model_name_or_path"


def write_base_name(folder: Path, base_name: str | None) -> None:
    """Write `base_name` into the adapters that were saved in `folder`, or warn if it is a local path.

    Args:
        base_name: a name that works on another machine; None leaves the one that the base was loaded by.
    """
    # An adapter that is not called "default" has a folder of its own.
    for file in sorted(folder.rglob(_CONFIG)):
        config = json.loads(file.read_text(encoding="utf-8"))
        saved = config.get(_KEY)
        if base_name is not None:
            config[_KEY] = base_name
            file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
            _rename_in_card(file.with_name("README.md"), saved, base_name)
        # A name of the hub has at most one slash, and no folder of that name is here.
        elif saved and Path(saved).exists():
            warnings.warn(
                f"The saved adapters name their base {saved!r}, a path of this machine, so no other machine "
                "finds it. Pass base_name='organisation/model' to save_pretrained.",
                AccelWarning,
                stacklevel=2,
            )


def _rename_in_card(card: Path, saved: str | None, base_name: str) -> None:
    """Replace the old name in the page that PEFT writes beside the adapters."""
    if saved and card.exists():
        card.write_text(card.read_text(encoding="utf-8").replace(saved, base_name), encoding="utf-8")
