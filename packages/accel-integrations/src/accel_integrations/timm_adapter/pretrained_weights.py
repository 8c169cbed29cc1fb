"""Find out whether pretrained weights can be reached, before timm tries for minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from accel_core import ConfigurationError
from accel_core.extending import with_full_stop

from .import_timm import import_timm

_SECONDS_TO_ANSWER = 5.0
"""Time after which an address counts as unreachable."""
_WEIGHTS = ["model.safetensors", "pytorch_model.bin"]
"""Files in which timm looks for weights, unless it knows of others."""


def find_weights(
    name: str, overlay: dict[str, Any], pretrained_cfg: Any, cache_dir: str | None
) -> dict[str, Any]:
    """Return what has to be added to `pretrained_cfg_overlay` so that timm finds the weights.

    It is nothing, or a file of the cache.

    Args:
        name: name of the model, known to timm.
        overlay: the user's overlay, which overrides what timm knows.
        pretrained_cfg: the user's configuration, in place of what timm knows.

    Raises:
        ConfigurationError: there are no weights, a file is missing, or they would have to be downloaded and
            there is no network.
    """
    source, model_id = import_timm("timm.models").parse_model_name(name)
    # The name is a folder, in which timm looks by itself.
    if source == "local-dir":
        return {}
    if source == "hf-hub":
        # With both files in the cache timm needs no network.
        if not (
            _find_cached(model_id, ["config.json"], cache_dir) and _find_cached(model_id, _WEIGHTS, cache_dir)
        ):
            _check_reachable(name, import_timm("huggingface_hub").constants.ENDPOINT)
        return {}
    config = import_timm("timm.models").resolve_pretrained_cfg(model_id, pretrained_cfg, overlay)
    if config.state_dict:
        return {}
    if config.file:
        if not Path(config.file).is_file():
            raise ConfigurationError(
                f"pretrained_cfg_overlay has the file '{config.file}', which is not there. Pass the path of "
                "a file of weights."
            )
        return {}
    if config.hf_hub_id:
        return _find_on_hub(name, config, cache_dir)
    if config.url:
        # timm downloads from plain addresses by torch.hub, into its folder.
        folder = cache_dir or Path(torch.hub.get_dir(), "checkpoints")
        if not Path(folder, Path(urlsplit(config.url).path).name).is_file():
            _check_reachable(name, config.url)
        return {}
    raise ConfigurationError(
        f"pretrained is True, but there are no weights for {name!r}. Pass pretrained=False, or a file of "
        "your own by pretrained_cfg_overlay=dict(file='weights.safetensors')."
    )


def _find_on_hub(name: str, config: Any, cache_dir: str | None) -> dict[str, Any]:
    """Return nothing if the hub answers, else the cached file."""
    # Without the file's path timm would ask the hub first, again and again.
    hub = import_timm("huggingface_hub")
    reason = _why_unreachable(hub.constants.ENDPOINT)
    if reason is None:
        return {}
    # timm prefers a safetensors file to the one that its configuration names.
    own = config.hf_hub_filename
    filenames = [own.replace("pytorch_model.bin", "model.safetensors"), own] if own else _WEIGHTS
    path = _find_cached(config.hf_hub_id, filenames, cache_dir)
    if path is None:
        raise _unreachable(name, hub.constants.ENDPOINT, reason)
    return {"file": path, "custom_load": config.custom_load}


def _find_cached(repository: str, filenames: list[str], cache_dir: str | None) -> str | None:
    """Return the path of the first of the files that is in the cache, or None."""
    find = import_timm("huggingface_hub").try_to_load_from_cache
    # timm writes the revision behind the repository.
    repository, _, revision = repository.partition("@")
    paths = (find(repository, filename, cache_dir, revision or None) for filename in filenames)
    return next((path for path in paths if isinstance(path, str)), None)


def _check_reachable(name: str, address: str) -> None:
    reason = _why_unreachable(address)
    if reason is not None:
        raise _unreachable(name, address, reason)


def _why_unreachable(address: str) -> str | None:
    """Ask once, with the settings of the hub's own client, and return what went wrong."""
    try:
        # The hub's client knows the user's proxies and certificates.
        import_timm("huggingface_hub.utils").get_session().head(address, timeout=_SECONDS_TO_ANSWER)
    except Exception as error:
        # The client's errors are those of another library in each of its versions.
        return with_full_stop(error).rstrip(".") or type(error).__name__
    return None


def _unreachable(name: str, address: str, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"pretrained is True, but the weights of {name!r} are not on this machine, and {address} does not "
        f"answer: {reason}. Pass pretrained=False, or a file by "
        "pretrained_cfg_overlay=dict(file='weights.safetensors'); or call this once with a network, which "
        "fills the cache."
    )
