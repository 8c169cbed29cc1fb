"""The newest or the best state in a folder of this machine, or in a mirror elsewhere."""

from __future__ import annotations

from pathlib import Path

from ..checks.address import Address
from ..checks.values import check_path, check_place
from ..errors import ConfigurationError
from .fetch import fetch_best, fetch_newest
from .folder import WAY_OUT, best_state, newest_state
from .store import check_can_open, check_is_elsewhere


def latest_checkpoint(
    folder: str | Path, *, cache: str | Path | None = None, verify: bool = True
) -> Path | None:
    """Return the newest complete state directly inside `folder`; None if there is none or no folder.

    In a folder of this machine it writes nothing. It skips damaged states, with a warning for each. It
    also works while another process saves and removes states there.

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
    place = _check_places("latest_checkpoint", folder, cache)
    return newest_state(place, verify) if isinstance(place, Path) else fetch_newest(*place, verify)


def best_checkpoint(
    folder: str | Path,
    metric: str = "eval_loss_epoch",
    greater_is_better: bool = False,
    *,
    cache: str | Path | None = None,
) -> Path | None:
    """Return the state directly inside `folder` with the best value of `metric`; None if none has one.

    Only states that were saved at the very update at which the metric was recorded have a value. What is
    damaged is passed over with a warning; of equal ones the older is returned.

    With `cache`, `folder` is a mirror, as for `latest_checkpoint`. The states of both count, and the best one
    is downloaded into the cache unless it stands there.

    Args:
        folder: a folder, or the address of a store such as `"s3://bucket/run1"`.
        greater_is_better: the best value is the greatest, and not the smallest.
        cache: folder of this machine for the states of a mirror.

    Raises:
        CheckpointError: the store does not answer.
        ConfigurationError: an argument cannot be used.
    """
    place = _check_places("best_checkpoint", folder, cache)
    if isinstance(place, Path):
        return best_state(place, metric, greater_is_better)
    return fetch_best(*place, metric, greater_is_better)


def _check_places(function: str, folder: str | Path, cache: str | Path | None) -> Path | tuple[Address, Path]:
    """Return the folder of this machine; or the address of a mirror, with the folder for its states."""
    place = check_place("folder", folder, WAY_OUT)
    if cache is None:
        if isinstance(place, Address):
            raise ConfigurationError(
                f"folder is '{place}', an address of a store, from which states are downloaded before they "
                f"are loaded. Pass {function}('{place}', cache='checkpoints'), with a folder of this "
                "machine."
            )
        return place
    kept = check_path("cache", cache, "Pass a folder of this machine, such as 'checkpoints'.")
    address = place if isinstance(place, Address) else Address(str(place.absolute()))
    check_is_elsewhere("folder", address, "cache", kept)
    return check_can_open("folder", address), kept
