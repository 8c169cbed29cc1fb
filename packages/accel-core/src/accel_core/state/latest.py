"""`latest_checkpoint`: the newest state in a folder of this machine, or in a mirror elsewhere."""

from __future__ import annotations

from pathlib import Path

from ..checks.address import Address
from ..checks.values import check_path, check_place
from ..errors import ConfigurationError
from .fetch import fetch_newest
from .folder import WAY_OUT, newest_state
from .store import check_can_open, check_is_elsewhere


def latest_checkpoint(
    folder: str | Path, *, cache: str | Path | None = None, verify: bool = True
) -> Path | None:
    """Return the newest complete state directly inside `folder`; None if there is none or no folder.

    In a folder of this machine it writes nothing. It passes over damaged states with a warning each. While
    another process saves and removes states there, it finds one as long as one is complete at every moment.

    With `cache`, `folder` is a mirror that `SaveTrainingStateCallback` has written. If the cache has no state
    that is as new, the newest is downloaded into it: complete or absent, by one process of each machine,
    while others wait. Every file is compared with its digest.

    Args:
        folder: a folder, or the address of a store such as `"s3://bucket/run1"`.
        cache: folder of this machine for the states of a mirror; the `save_dir` of the run is a good one.
        verify: read and compare the digests of all files too, unless an engine has sharded the state.
            Sizes are always compared, and loading a state compares the digests in any case.

    Raises:
        CheckpointError: there are states and none of them can be used, or the store does not answer. The
            message says what to do.
        ConfigurationError: an argument cannot be used.
    """
    place = check_place("folder", folder, WAY_OUT)
    if cache is None:
        if isinstance(place, Address):
            raise ConfigurationError(
                f"folder is '{place}', an address of a store, from which states are downloaded before they "
                f"are loaded. Pass latest_checkpoint('{place}', cache='checkpoints'), with a folder of this "
                "machine."
            )
        return newest_state(place, verify)
    kept = check_path("cache", cache, "Pass a folder of this machine, such as 'checkpoints'.")
    address = place if isinstance(place, Address) else Address(str(place.absolute()))
    check_is_elsewhere("folder", address, "cache", kept)
    return fetch_newest(check_can_open("folder", address), kept, verify)
