"""Finds where the first nan or infinity of a run arose, by a replay with hooks on all layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..processes.collectives import all_gather_object
from .callback import TrainerCallback

_CAUSES_FIRST = ("batch", "input", "output", "loss", "output_gradient", "gradient")


@dataclasses.dataclass(frozen=True)
class NonFiniteOrigin:
    """Says where the first value arose that is not finite."""

    update: int
    """The update, counted from 1."""
    layer: str | None
    """The name of the module; None if it was none."""
    parameter: str | None
    """The name of the parameter: the one that became so, or the largest of the layer."""
    samples: list[Any] | None
    """Indices of the samples in the data set; None if they are not known."""
    text: str
    """All that in a sentence."""

    def __str__(self) -> str:
        return self.text


class Event(NamedTuple):
    """One tensor that was not finite."""

    kind: str
    """"batch", "input", "output", "loss", "output_gradient" or "gradient"."""
    name: str
    """Of the layer or the parameter; empty for others."""
    value: str
    """"nan" or "infinite"."""
    step: int
    """Among the steps of the update, those of all processes."""
    rows: list[int] | None
    """Of the first dimension, where it has one row a sample."""


class NonFiniteWatch(TrainerCallback):
    """Looks at every layer in one update of a replay and the one before, and at the weights after each.

    What is infinite in the update before too, such as a mask, is how this model is.
    """

    order = 10**8
    """Before the recorder of the replay, which ends it."""

    def __init__(self, update: int) -> None:
        self.update = update
        self.events: dict[int, list[Event]] = {}
        """By update, in the order of time."""
        self.sizes: dict[int, list[int | None]] = {}
        """Samples of each step, by update."""
        self.bad_update: int | None = None
        """The first after which the weights are not finite."""
        self.bad_names: list[str] = []
        self._hooks: list[Any] = []
        self._now = 0

    def on_train_step_start(self, trainer: Any, batch: Any) -> None:
        """Watch the layers, and look at the batch."""
        self._now = trainer.run_progress.updates_completed + 1
        if self._now not in (self.update - 1, self.update):
            return
        step = trainer._run.step
        self.sizes.setdefault(self._now, []).append(None if step is None else step.num_samples)
        if not self._hooks:
            for name, module in trainer.get_model(keep_torch_compile=False).named_modules():
                self._hooks.append(module.register_forward_pre_hook(self._on_input(name)))
                self._hooks.append(module.register_forward_hook(self._on_output(name)))
        self._look("batch", "", batch)

    def on_train_step_end(self, trainer: Any, batch: Any, batch_output: dict[str, Any], step: int) -> None:
        """Look at the loss. The backward pass comes before, so it is put where it arose."""
        if self._now in self.sizes:
            self._look("loss", "", batch_output["loss"], is_before_backward=True)

    def on_optimizer_step_start(self, trainer: Any) -> None:
        """Look at the gradients of the whole update."""
        if self._now in self.sizes:
            named = trainer.get_model(keep_torch_compile=False).named_parameters()
            for name, parameter in reversed(list(named)):
                self._look("gradient", name, parameter.grad)
        if self._now == self.update:
            for hook in self._hooks:
                hook.remove()

    def on_optimizer_step_end(self, trainer: Any) -> None:
        """Look at the weights, until they are not finite."""
        if self.bad_update is None:
            state = trainer.get_model(keep_torch_compile=False).state_dict()
            self.bad_names = [name for name, value in state.items() if _flaw_of(value) is not None]
            if self.bad_names:
                self.bad_update = trainer.run_progress.updates_completed

    def first_event(self) -> Event | None:
        """Return what was first not finite in the update, and finite in the one before."""
        before = {(event.kind, event.name, event.value) for event in self.events.get(self.update - 1, ())}
        for event in self.events.get(self.update, ()):
            if (event.kind, event.name, event.value) not in before:
                return event
        return None

    def _on_input(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any) -> None:
            self._look("input", name, inputs)

        return look

    def _on_output(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            self._look("output", name, output)
            for tensor in _tensors_in(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._look("output_gradient", name, gradient))  # type: ignore[no-untyped-call]

        return look

    def _look(self, kind: str, name: str, value: Any, is_before_backward: bool = False) -> None:
        for tensor in _tensors_in(value):
            flaw = _flaw_of(tensor)
            if flaw is None:
                continue
            step = len(self.sizes[self._now]) - 1
            event = Event(kind, name, flaw, step, _rows_of(tensor, self.sizes[self._now][step]))
            events = self.events.setdefault(self._now, [])
            if is_before_backward:
                place = [each.kind == "output_gradient" and each.step == step for each in events]
                events.insert(place.index(True) if True in place else len(events), event)
            else:
                events.append(event)


def find_origin(trainer: Any, update: int, folder: Any, given: Mapping[str, Any]) -> NonFiniteOrigin:
    """Return where the loss of `update` became not finite, by one replay, or two if it came from before.

    Every process takes part.

    Args:
        folder: with the training states of the run.
        given: the arguments of `train`.
    """
    names: list[str] = []
    watch = NonFiniteWatch(update)
    result = trainer.replay(**given, update=update, folder=folder, callbacks=[watch])
    # The weights are the same on all processes.
    if watch.bad_update is not None:
        names, update = watch.bad_names, watch.bad_update
        watch = NonFiniteWatch(update)
        result = trainer.replay(**given, update=update, folder=folder, callbacks=[watch])
    event, sizes = _first_of_all(watch)
    if event is not None:
        return _origin_of(event, update, sizes, result)
    if names:
        text = f"Update {update}: the optimizer made {names[0]!r} not finite, though all gradients are finite"
        return NonFiniteOrigin(update, _layer_of(names[0]), names[0], None, f"{text}.")
    text = f"Update {update}: everything is finite in the replay, so the replay differs from the run"
    return NonFiniteOrigin(update, None, None, None, " ".join([f"{text}.", *result.messages]))


def _first_of_all(watch: NonFiniteWatch) -> tuple[Event | None, list[int | None]]:
    """Return the first event of all processes, and the samples of all steps. Every process takes part."""
    by_process = all_gather_object((watch.first_event(), watch.sizes.get(watch.update, [])))
    found: list[Event] = []
    sizes: list[int | None] = []
    for event, own_sizes in by_process:
        if event is not None:
            found.append(event._replace(step=event.step + len(sizes)))
        sizes += own_sizes
    # What one process has made not finite, all have in the averaged gradients.
    return min(found, key=lambda event: _CAUSES_FIRST.index(event.kind), default=None), sizes


def _origin_of(event: Event, update: int, sizes: list[int | None], result: Any) -> NonFiniteOrigin:
    modules = dict(result.model.named_modules())
    samples = _samples_of(event, sizes, result.indices)
    layer = event.name if event.kind in ("input", "output", "output_gradient") else None
    parameter = _largest_parameter(modules[event.name], event.name) if layer is not None else None
    if event.kind == "gradient":
        layer, parameter = _layer_of(event.name), event.name
    shown = "the model" if not layer else f"the layer {layer!r}"
    if layer:
        shown += f" ({type(modules[layer]).__name__})"
    parent = _layer_of(layer or "") or type(result.model).__name__
    sentence = {
        "batch": f"the batch holds {'nan' if event.value == 'nan' else 'infinity'}",
        "input": f"the input of {shown} is {event.value}, and all layers before it are finite: it comes "
        f"from the forward of {parent}, between its layers",
        "output": f"the output of {shown} is {event.value}, and its input is finite",
        "loss": f"the loss is {event.value}, and all outputs of the model are finite: it comes from the "
        "loss function",
        "output_gradient": f"the gradient of the output of {shown} is {event.value}, and the loss is finite",
        "gradient": f"the gradient of {parameter!r} is {event.value}, and those of all outputs are finite",
    }[event.kind]
    if event.kind in ("input", "output") and parameter is not None:
        largest = dict(result.model.named_parameters())[parameter].detach().abs().max().item()
        sentence += f"; its largest parameter is {parameter!r}, up to {largest:.3g}"
    if samples is not None:
        sentence += f"; samples {samples[:10]}{' …' if len(samples) > 10 else ''}"
    return NonFiniteOrigin(update, layer, parameter, samples, f"Update {update}: {sentence}.")


def _samples_of(event: Event, sizes: list[int | None], indices: list[Any] | None) -> list[Any] | None:
    """Return the indices of the samples in whose rows the tensor is not finite."""
    counts = [size for size in sizes if size is not None]
    if indices is None or event.rows is None or len(counts) != len(sizes) or sum(counts) != len(indices):
        return None
    begin = sum(counts[: event.step])
    return [indices[begin + row] for row in event.rows]


def _rows_of(tensor: torch.Tensor, num_samples: int | None) -> list[int] | None:
    if not tensor.ndim or tensor.shape[0] != num_samples:
        return None
    is_bad = ~torch.isfinite(tensor.detach()).reshape(tensor.shape[0], -1).all(dim=1)
    return is_bad.nonzero().flatten().tolist()


def _largest_parameter(module: nn.Module, name: str) -> str | None:
    own = list(module.named_parameters(recurse=False))
    if not own:
        return None
    largest = max(own, key=lambda each: float(each[1].detach().abs().max()) if each[1].numel() else 0.0)
    return f"{name}.{largest[0]}" if name else largest[0]


def _layer_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _flaw_of(value: Any) -> str | None:
    """Return "nan" or "infinite", or None if the tensor is finite."""
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return None
    if value.layout is not torch.strided or bool(torch.isfinite(value.detach()).all()):
        return None
    return "nan" if bool(torch.isnan(value.detach()).any()) else "infinite"


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors_in(inner)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors_in(vars(value))
