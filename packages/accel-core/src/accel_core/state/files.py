"""File operations that are on the disk when they return, and readers that execute nothing that they read."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin, get_type_hints, is_typeddict

import numpy as np
import safetensors.torch
import torch

from ..errors import AccelError, CheckpointError, ConfigurationError

_COLLECTIONS: set[type] = {dict, OrderedDict, Counter, list, tuple, set}

_NUMBERS_AND_TEXT: set[type] = {type(None), bool, int, float, complex, str, bytes}

_PLAIN = (
    _COLLECTIONS
    | _NUMBERS_AND_TEXT
    | {torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype, torch.device}
)


def as_plain(value: Any, where: str, key: str = "") -> Any:
    """Return a copy of `value` as `read_object` returns it: with Python's numbers in place of numpy's.

    Tensors are not copied.

    Raises:
        ConfigurationError: something else than None, numbers, strings, tensors and collections of them.
            `where` begins the sentence ("The state of 'MyCallback'"), the key follows.
    """
    value = value.item() if isinstance(value, np.generic) else value
    kind = type(value)
    if kind not in _PLAIN:
        name = (
            kind.__name__
            if kind.__module__ == "builtins"
            else f"{kind.__module__.split('.')[0]}.{kind.__name__}"
        )
        keep = "Keep tensors, numbers, strings, lists and dicts in state_dict()."
        raise ConfigurationError(f"{where} cannot be saved: {repr(key) if key else 'it'} is a {name}. {keep}")
    if isinstance(value, dict):
        return kind(
            {as_plain(k, where, key): as_plain(v, where, f"{key}.{k}".lstrip(".")) for k, v in value.items()}
        )
    if kind in _COLLECTIONS:
        return kind(as_plain(item, where, f"{key}.{i}".lstrip(".")) for i, item in enumerate(value))
    return value


def write_object(path: Path, value: Any) -> None:
    """Write a plain value with `torch.save`.

    Raises `ConfigurationError` if it is not plain (see `as_plain`).
    """
    plain = as_plain(value, f"The content of '{path.name}'")
    with raising_checkpoint_error(path, "could not be written"), path.open("wb") as file:
        torch.save(plain, file)
    sync(path)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write dense tensors as safetensors. Those that share memory are written each on its own."""
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        separate[name] = (tensor.detach().clone() if storage in seen else tensor.detach()).contiguous()
        seen.add(storage)
    with raising_checkpoint_error(path, "could not be written"):
        path.touch()
        mode = path.stat().st_mode
        safetensors.torch.save_file(separate, path, metadata={"format": "pt"})
        path.chmod(mode)  # It puts a file in place that only its owner may read.
    sync(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value`, made of what JSON knows, for people to read."""
    with raising_checkpoint_error(path, "could not be written"):
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    sync(path)


def read_object(path: Path, form: Any = object) -> Any:
    """Read what `write_object` wrote, tensors on the CPU.

    Raises `CheckpointError` for any other file, or another `form`.
    """
    with (
        raising_checkpoint_error(path, "could not be read; use another checkpoint"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter(
            "ignore"
        )  # Torch tells how it checks a file; where that fails there is an error.
        value = torch.load(path, map_location="cpu", weights_only=True)
    if flaw := find_flaw(value, form):
        raise CheckpointError(f"'{path}' is damaged; use another checkpoint: {flaw}.")
    return value


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read what `write_tensors` wrote, to the CPU. Raises `CheckpointError` for any other file."""
    with raising_checkpoint_error(path, "could not be read; use another checkpoint"):
        return safetensors.torch.load_file(path)


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote. Raises `CheckpointError` for any other file."""
    with raising_checkpoint_error(path, "could not be read; use another checkpoint"):
        return json.loads(path.read_text(encoding="utf-8"))


def find_flaw(value: Any, form: Any, name: str = "the content") -> str | None:
    """What is wrong with `value`.

    Its `form` is a type, or the forms of the keys that it needs: a dictionary or `TypedDict`.
    """
    form = get_type_hints(form) if is_typeddict(form) else form
    kind = dict if isinstance(form, dict) else get_origin(form) if get_origin(form) in (dict, list) else form
    if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
        return f"{name} is {value!r:.60}, not of the type {getattr(kind, '__name__', kind)}"
    if not isinstance(form, dict):
        return None
    if missing := form.keys() - value.keys():
        return f"{min(missing)!r} is missing"
    return next(filter(None, (find_flaw(value[key], part, repr(key)) for key, part in form.items())), None)


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file and give it the name `path`: there is the old content or the new."""
    staging = path.with_name(
        f"{path.name}.incomplete"
    )  # A folder, so that what safetensors writes beside goes with it.
    with raising_checkpoint_error(path, "could not be written; what was there is untouched"):
        if staging.exists():
            remove_folder(staging)
        try:
            make_folder(staging)
            write(staging / path.name)
            sync(staging / path.name)
            rename(staging / path.name, path)
        finally:
            with contextlib.suppress(OSError):
                remove_folder(staging)


def make_folder(path: Path) -> None:
    """Make the folder, and those above it, where they are missing."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)  # Another process may have made it meanwhile.
        sync(path.parent)


def rename(source: Path, target: Path) -> None:
    """Give a file or a folder another name. A file takes the place of the `target` that is there."""
    source.replace(target)
    sync(target.parent)


def remove_folder(path: Path) -> None:
    """Remove the folder with all that is in it."""
    shutil.rmtree(path)


def sync(path: Path) -> None:
    """Wait until the content of the file, or the names in the folder, are on the disk."""
    if not (path.is_dir() and os.name == "nt"):  # Windows opens no folders.
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def raising_checkpoint_error(path: Path, what: str) -> Iterator[None]:
    """Raise what fails within as a `CheckpointError` about the file; an error of accel passes as it is."""
    try:
        yield
    except AccelError:
        raise
    except Exception as error:
        # torch.save hides the error of the disk behind one of its own, and torch.load advises to trust the
        # file.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        is_refused = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
        reason = "it is damaged or holds objects" if is_refused else str(cause).rstrip(". ")
        raise CheckpointError(f"'{path}' {what}: {type(cause).__name__}: {reason}.") from error
