"""Save and load a model with adapters of PEFT: what training can change, without the frozen base."""

from __future__ import annotations

from typing import Any

import torch


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether adapters of PEFT were added to the model."""
    return bool(getattr(model, "peft_config", None))


def create_adapter_state(model: torch.nn.Module, trained: torch.nn.Module) -> dict[str, Any]:
    """Return the entries of the model's `state_dict()`, but for parameters that are frozen in `trained`.

    Args:
        trained: a model of the same structure, or `model` itself.
    """
    # By what is frozen, not by PEFT's own names, so that a new head that is trained is saved too.
    frozen = _frozen_names(trained)
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_adapter_state(model: torch.nn.Module, trained: torch.nn.Module, state: dict[str, Any]) -> None:
    """Load what `create_adapter_state` returned; parameters that are frozen in `trained` keep their values.

    Raises:
        RuntimeError: it is the state of other adapters.
    """
    # Not strict, since the frozen base is missing; so what else is missing has to be found here.
    missing, unexpected = model.load_state_dict(state, strict=False)
    lacking = sorted(set(missing) - _frozen_names(trained))
    if lacking or unexpected:
        raise RuntimeError(
            f"only this model has {lacking[:3] or 'nothing'}, only the state has "
            f"{sorted(unexpected)[:3] or 'nothing'}."
        )


def _frozen_names(model: torch.nn.Module) -> set[str]:
    # With the second names of tied parameters, which `state_dict()` has too.
    parameters = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if not parameter.requires_grad}
