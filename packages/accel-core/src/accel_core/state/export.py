"""Writes and reads an export: one file with the model, and what is saved beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import files


def write_export(path: Path, content: dict[str, Any]) -> None:
    """Write an export to one file, atomically; `.safetensors` holds the model's tensors only."""
    if path.suffix == ".safetensors":
        files.replace_file(path, lambda staging: files.write_tensors(staging, content["model_state_dict"]))
    else:
        files.replace_file(path, lambda staging: files.write_object(staging, content))


def read_export(path: Path) -> dict[str, Any]:
    """Read an export. Raises `CheckpointError` if the file is none; nothing in it is executed."""
    if path.is_dir():
        raise CheckpointError(
            f"'{path}' is a folder, but an export is a file. Use train(..., resume_from='{path}') to resume."
        )
    if path.suffix == ".safetensors":
        return {"model_state_dict": files.read_tensors(path)}
    content = files.read_object(path)
    if not isinstance(content, dict) or not isinstance(content.get("model_state_dict"), dict):
        raise CheckpointError(
            f"'{path}' has no 'model_state_dict', so it is no export of save_checkpoint. Use another file."
        )
    return content
