"""ModelFreezer: freeze and unfreeze parts of a model, by layer group or by the names of parameters."""

from __future__ import annotations

import fnmatch
import numbers
from collections.abc import Iterable, Sequence
from typing import TypedDict

from torch import nn

from accel_core import ConfigurationError
from accel_core.extending import allow_train_mode, did_you_mean, keep_in_eval_mode, preview

from .layer_groups import BN_MODULES as BN_MODULES
from .layer_groups import Layer as Layer
from .layer_groups import LayerGroup as LayerGroup
from .layer_groups import (
    any_frozen,
    find_layers,
    find_modules_by_group,
    has_modules,
    parameters_in,
)


class ParameterGroup(TypedDict):
    """A parameter group, as `add_param_group` of an optimizer takes it."""

    params: list[nn.Parameter]


class ModelFreezer:
    """Freezes parts of a model for fine-tuning, and unfreezes them again.

    The *layer groups* are the modules that are attributes of the model, in the order of their definition: in
    most models from the input to the head. Parameters that the model holds directly (`cls_token`,
    `pos_embed`) go with the first group. A model without modules in it is one group.

    ```python
    freezer = ModelFreezer(model)
    freezer.freeze()  # all but the head
    optimizer = AdamW(freezer.get_trainable_parameters(), lr=1e-3)
    ```

    Constructing a freezer changes nothing, so what is frozen already (as by LoRA) stays so. A frozen
    parameter has `requires_grad=False` and no gradient, so that no optimizer changes it, not even by weight
    decay. Freeze before the model is prepared, or in `on_prepare_start`, on every process alike.

    Args:
        model: the model, compiled or not, but not wrapped.
        freeze_batch_norms: `freeze` freezes the weights of batch norms too. By default they stay trainable
            and in their mode, since their statistics go on following the data in train mode.

    Raises:
        ConfigurationError: the model is no module.
    """

    def __init__(self, model: nn.Module, freeze_batch_norms: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigurationError(
                f"model is {preview(model)}, but must be a torch.nn.Module. Pass the model itself."
            )
        # The modules of a compiled model have the names of the plain one only inside of its wrapper.
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.freeze_batch_norms = freeze_batch_norms
        self.modules_kept_in_eval: list[nn.Module] = []
        """Modules that were frozen with `set_modules_as_eval=True` and are not unfrozen since."""

    def get_layer_groups(self) -> list[LayerGroup]:
        """Return the layer groups as they are now."""
        groups = self._groups()
        return [
            LayerGroup((index, index - len(groups)), module, any_frozen(parameters_in(modules)))
            for index, (module, modules) in enumerate(groups)
        ]

    def get_layers(self) -> list[Layer]:
        """Return the layers as they are now, in the order of the groups."""
        return find_layers(self._groups())

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are not frozen, for the optimizer."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def get_parameters(self, part: int | str) -> list[nn.Parameter]:
        """Return the parameters that `freeze(part, part)`, or `freeze_parameters(part)` of a name, freezes.

        Raises:
            ConfigurationError: there is no such layer group or parameter.
        """
        return (
            self._find(part)
            if isinstance(part, str)
            else parameters_in(self._modules_to_freeze(self._index("part", part)))
        )

    def freeze(self, from_index: int = 0, to_index: int = -2, set_modules_as_eval: bool = False) -> None:
        """Freeze the layer groups between two indices, both included: by default all but the last.

        Args:
            from_index: from 0; a negative one counts from the end.
            to_index: likewise; may be the smaller one.
            set_modules_as_eval: put their modules in eval mode, which stops dropout and, with
                `freeze_batch_norms`, the statistics of batch norms. The trainer leaves them in it until
                they are unfrozen; in your own loop call `restore_eval_modes` after `model.train()`.

        Raises:
            ConfigurationError: there is no such layer group.
        """
        for index in self._range(from_index, to_index):
            chosen = self._modules_to_freeze(index)
            _freeze(parameters_in(chosen))
            if set_modules_as_eval:
                self._keep_in_eval(chosen)

    def unfreeze(
        self, from_index: int = -1, to_index: int = 0, set_modules_as_training: bool = True
    ) -> dict[int, ParameterGroup]:
        """Unfreeze the layer groups between two indices, both included: by default all.

        Args:
            from_index: from 0; a negative one counts from the end.
            to_index: likewise; may be the smaller one.
            set_modules_as_training: put their modules in train mode.

        Returns:
            The parameters that were frozen, by layer group, for `optimizer.add_param_group` if the optimizer
            does not have them: `{3: {"params": [...]}}`.

        Raises:
            ConfigurationError: there is no such layer group.
        """
        unfrozen: dict[int, ParameterGroup] = {}
        for index in self._range(from_index, to_index):
            _, modules = self._groups()[index]
            if parameters := _unfreeze(parameters_in(modules)):
                unfrozen[index] = {"params": parameters}
            if set_modules_as_training:
                self._set_as_training(modules)
        return unfrozen

    def freeze_parameters(self, names: str | Sequence[str], set_modules_as_eval: bool = False) -> None:
        """Freeze the parameters with these names, batch norms too if their names match.

        Args:
            names: one or more names as in `model.named_parameters()`; `*` stands for anything, as in
                `"encoder.*"` or `"*.bias"`.
            set_modules_as_eval: put the modules that hold them in eval mode; see `freeze`.

        Raises:
            ConfigurationError: a name matches no parameter.
        """
        parameters = self._find(names)
        _freeze(parameters)
        if set_modules_as_eval:
            self._keep_in_eval(self._owners(parameters))

    def unfreeze_parameters(
        self, names: str | Sequence[str], set_modules_as_training: bool = True
    ) -> dict[int, ParameterGroup]:
        """Unfreeze the parameters with these names, given as in `freeze_parameters`.

        Args:
            names: one or more names; `*` stands for anything.
            set_modules_as_training: put the modules that hold them in train mode.

        Returns:
            The parameters that were frozen, by layer group, as `unfreeze` returns them.

        Raises:
            ConfigurationError: a name matches no parameter.
        """
        parameters = self._find(names)
        unfrozen = {id(parameter) for parameter in _unfreeze(parameters)}
        if set_modules_as_training:
            self._set_as_training(self._owners(parameters))
        by_group: dict[int, ParameterGroup] = {}
        for index, (_, modules) in enumerate(self._groups()):
            for parameter in parameters_in(modules):
                if id(parameter) in unfrozen:
                    unfrozen.remove(id(parameter))
                    by_group.setdefault(index, {"params": []})["params"].append(parameter)
        return by_group

    def restore_eval_modes(self) -> None:
        """Put `modules_kept_in_eval` in eval mode again, after `model.train()`."""
        # Not `module.eval()`, which would reach modules inside that are to train.
        for module in self.modules_kept_in_eval:
            module.training = False

    def _groups(self) -> list[tuple[nn.Module, list[nn.Module]]]:
        # Found again each time, since the user may replace layers, such as the head.
        return find_modules_by_group(self.model)

    def _modules_to_freeze(self, index: int) -> list[nn.Module]:
        _, modules = self._groups()[index]
        return [module for module in modules if self.freeze_batch_norms or not isinstance(module, BN_MODULES)]

    def _range(self, from_index: int, to_index: int) -> range:
        # They may be given in any order.
        low, high = sorted((self._index("from_index", from_index), self._index("to_index", to_index)))
        return range(low, high + 1)

    def _index(self, name: str, index: int) -> int:
        """Return the index of a layer group from 0; a negative one counts from the end."""
        number = len(self._groups())
        if not isinstance(index, numbers.Integral) or not -number <= index < number:
            owner = type(self.model).__name__
            names = [child for child, _ in self.model.named_children()]
            raise ConfigurationError(
                f"{name} is {index!r}, but must be a whole number from {-number} to {number - 1}, as {owner} "
                f"has the layer groups {names or '[the model itself]'}. Pass another index, or the names of "
                "parameters: freeze_parameters and unfreeze_parameters take them, and so does a schedule."
            )
        return index % number

    def _find(self, names: str | Sequence[str]) -> list[nn.Parameter]:
        # By identity, since tied parameters have several names, and two patterns may match the same one.
        found: dict[int, nn.Parameter] = {}
        by_name = dict(self.model.named_parameters(remove_duplicate=False))
        for pattern in [names] if isinstance(names, str) else names:
            matching = fnmatch.filter(by_name, pattern)
            if not matching:
                raise ConfigurationError(
                    f"The name {pattern!r} matches no parameter of "
                    f"{type(self.model).__name__}.{did_you_mean(pattern, by_name)} model.named_parameters() "
                    "has the names; '*' stands for anything, as in 'encoder.*'."
                )
            found.update((id(by_name[name]), by_name[name]) for name in matching)
        return list(found.values())

    def _owners(self, parameters: Iterable[nn.Parameter]) -> list[nn.Module]:
        wanted = {id(parameter) for parameter in parameters}
        return [
            module
            for module in self.model.modules()
            if wanted & set(map(id, module.parameters(recurse=False)))
        ]

    def _keep_in_eval(self, modules: Iterable[nn.Module]) -> None:
        known = {id(module) for module in self.modules_kept_in_eval}
        kept = [
            module
            for module in modules
            if id(module) not in known and not self._is_model_with_modules(module)
        ]
        self.modules_kept_in_eval += kept
        keep_in_eval_mode(self.modules_kept_in_eval)

    def _set_as_training(self, modules: Iterable[nn.Module]) -> None:
        chosen = {id(module): module for module in modules if not self._is_model_with_modules(module)}
        self.modules_kept_in_eval = [
            module for module in self.modules_kept_in_eval if id(module) not in chosen
        ]
        allow_train_mode(chosen.values())

    def _is_model_with_modules(self, module: nn.Module) -> bool:
        """Whether `module` is the whole model, and not a group of its own."""
        # The mode of the whole model does not depend on the parameters that it holds directly.
        return module is self.model and has_modules(module)


def _freeze(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad = False
        # An optimizer that holds the parameter would still apply a gradient that is left.
        parameter.grad = None


def _unfreeze(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Unfreeze those that are frozen, and return them."""
    # Whole numbers, as of quantised weights, cannot have a gradient.
    frozen = [
        parameter
        for parameter in parameters
        if not parameter.requires_grad and (parameter.is_floating_point() or parameter.is_complex())
    ]
    for parameter in frozen:
        parameter.requires_grad = True
    return frozen
