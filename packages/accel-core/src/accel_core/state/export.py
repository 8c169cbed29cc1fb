"""Write and read an export: a file with the weights of a model, of a run and an update, with a digest."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ..checks.address import Address
from ..errors import CheckpointError, DamagedError
from . import files, store
from .digests import digest_of_value

NO_EXPORT = "'{}' has no 'model_state_dict', so it is no export"

_logger = logging.getLogger("accel_core")


def write_export(path: Path | Address, content: dict[str, Any], origin: dict[str, Any] | None = None) -> None:
    """Write an export to one file, of this machine or of a store, whole or not at all.

    `.safetensors` holds the model's tensors only.

    Args:
        origin: run and update. With it go the digest of the content, and into `.safetensors` the plain
            values beside the weights too.
    """
    # The digest of the content is in the file, so nobody asks for that of the file itself.
    if path.suffix == ".safetensors":
        tensors = content["model_state_dict"]
        plain = {key: value for key, value in content.items() if isinstance(value, (str, int, float))}
        values = files.as_plain(plain, f"The content of '{path.name}'")
        facts = {**(origin or {}), "values": values}
        facts["digest"] = digest_of_value([_as_dense(tensors), facts])
        store.replace_file(
            path, lambda staging: files.write_tensors(staging, tensors, facts, is_hashed=False)
        )
    else:
        plain = files.as_plain(content, f"The content of '{path.name}'")
        facts = dict(origin or {})
        facts["digest"] = digest_of_value([plain, facts])
        store.replace_file(path, lambda staging: files.write_object(staging, plain, facts, is_hashed=False))


def read_export(place: Path | Address) -> dict[str, Any]:
    """Read an export of this machine or of a store, with its origin. Nothing in it is executed.

    Raises `CheckpointError` if the file is none.
    """
    if isinstance(place, Path):
        return _read_export(place)
    with store.readable(place) as local:
        try:
            return _read_export(local)
        except CheckpointError as error:
            # The copy is gone in a moment.
            raise type(error)(str(error).replace(str(local), str(place))) from error.__cause__


def _read_export(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise CheckpointError(
            f"'{path}' is a folder, but an export is a file. Use train(..., resume_from='{path}') to resume."
        )
    is_safetensors = path.suffix == ".safetensors"
    if is_safetensors:
        content = {"model_state_dict": files.read_tensors(path)}
        facts = _facts_in(path)
    else:
        content, facts = files.read_with_origin(path)
        if not isinstance(content, dict) or not isinstance(content.get("model_state_dict"), dict):
            raise CheckpointError(f"{NO_EXPORT.format(path)} of save_checkpoint. Use another file.")
    if facts is None:
        _logger.info("'%s' has no digest, so its content cannot be checked.", path)
        return content
    digest = facts.get("digest")
    rest = {key: value for key, value in facts.items() if key != "digest"}
    value = _as_dense(content["model_state_dict"]) if is_safetensors else content
    if digest != digest_of_value([value, rest]):
        raise DamagedError(
            f"'{path}' is damaged: its content is not what was written, since its digest differs. "
            "Use another file."
        )
    return {**content, files.ORIGIN: {**rest, "digest": digest}}


def read_origin(path: Path | Address) -> dict[str, Any]:
    """Return of which run and update an export is, and the plain values in it, under `values`.

    All of it is read.

    Raises `CheckpointError` if it is damaged or no export. One of an older version says no run and no update.
    """
    content = read_export(path)
    facts = dict(content.get(files.ORIGIN, {}))
    plain = {key: value for key, value in content.items() if isinstance(value, (str, int, float))}
    return {"run_id": None, "update": None, "values": plain, **facts}


def _facts_in(path: Path) -> dict[str, Any] | None:
    """Return the origin in the metadata of a safetensors file.

    None if another program, or an older one, wrote it.
    """
    text = files.read_metadata(path).get(files.ORIGIN)
    if text is None:
        return None
    with files.reading(path):
        facts = json.loads(text)
    if not isinstance(facts, dict):
        raise DamagedError(f"'{path}' is damaged: its metadata is {facts!r:.60}. Use another file.")
    return facts


def _as_dense(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors in an order that does not depend on where they stand in the file."""
    return {name: tensors[name] for name in sorted(tensors)}
