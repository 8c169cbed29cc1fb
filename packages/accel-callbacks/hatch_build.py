"""Pins the sibling distributions to the version that is being built.

Only a checkout needs this: hatchling reads the finished pins of an unpacked sdist from its PKG-INFO.
The file is the same in all three distributions, so that each builds by itself.
"""

from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class SameVersionMetadataHook(MetadataHookInterface):
    """Fills `{version}` into the requirements under `tool.hatch.metadata.hooks.custom`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the requirements to `metadata`, which holds the version already."""

        def pin(requirements: list[str]) -> list[str]:
            return [requirement.replace("{version}", metadata["version"]) for requirement in requirements]

        if "dependencies" in self.config:
            metadata["dependencies"] = pin(self.config["dependencies"])
        if "optional-dependencies" in self.config:
            extras: dict[str, list[str]] = self.config["optional-dependencies"]
            metadata["optional-dependencies"] = {
                name: pin(requirements) for name, requirements in extras.items()
            }
