"""Training states that are edited or damaged on purpose."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from accel_core.state import files

STATE_FILE = "trainer_state.json"


def edit(state: Path, *path: str, value: Any = None) -> None:
    """Give what `path` leads to in trainer_state.json the `value`, or take it out, and seal the file anew.

    The rest is as a program would have written it that saved so: only by what it says can this be noticed.
    """
    content = inner = json.loads((state / STATE_FILE).read_text())
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    is_sealed = content.pop("sha256", None) is not None
    files.write_json(state / STATE_FILE, content, is_sealed)


def reseal(state: Path, name: str) -> None:
    """Write the size and the digest that a file has now into trainer_state.json."""
    content = (state / name).read_bytes()
    edit(state, "files", name, value=len(content))
    if "digests" in json.loads((state / STATE_FILE).read_text()):
        edit(state, "digests", name, value=hashlib.sha256(content).hexdigest())


def flip_bit(path: Path, rng: random.Random) -> str:
    """Flip one bit of a file at random, and say which."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"bit in byte {place} of {path.name}"


def flip_last_bit(path: Path) -> None:
    """Flip the last bit of a file, which belongs to a tensor in a .safetensors file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def zero_sector(path: Path, rng: random.Random) -> str:
    """Let one sector of 512 bytes of a file be zeros, and say which."""
    content = bytearray(path.read_bytes())
    sector = rng.randrange((len(content) + 511) // 512)
    length = len(content[512 * sector : 512 * (sector + 1)])
    content[512 * sector : 512 * sector + length] = bytes(length)
    path.write_bytes(content)
    return f"sector {sector} of {path.name}"
