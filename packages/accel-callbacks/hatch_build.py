"""Pins the sibling distributions to the version that is being built, and names the project's addresses.

Only a checkout needs this: hatchling reads the finished pins of an unpacked sdist from its PKG-INFO.
The file is the same in all three distributions, so that each builds by itself.
"""

import ast
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class SameVersionMetadataHook(MetadataHookInterface):
    """Fills `{version}` into the requirements under `tool.hatch.metadata.hooks.custom`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the requirements to `metadata`, which holds the version already."""
        metadata["urls"] = self.addresses()

        def pin(requirements: list[str]) -> list[str]:
            return [requirement.replace("{version}", metadata["version"]) for requirement in requirements]

        if "dependencies" in self.config:
            metadata["dependencies"] = pin(self.config["dependencies"])
        if "optional-dependencies" in self.config:
            extras: dict[str, list[str]] = self.config["optional-dependencies"]
            metadata["optional-dependencies"] = {
                name: pin(requirements) for name, requirements in extras.items()
            }

    def addresses(self) -> dict[str, str]:
        """The project's addresses, of `__about__.py` of accel-core, where a release sets them once."""
        about = Path(self.root).parent / "accel-core" / "src" / "accel_core" / "__about__.py"
        if not about.exists():  # An unpacked sdist has them in its PKG-INFO.
            return {}
        values = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(about.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        repository, site = values["__repository__"], values["__site__"]
        addresses = {
            "Repository": repository,
            "Issues": repository and f"{repository}/issues",
            "Documentation": site,
        }
        return {name: address for name, address in addresses.items() if address}
