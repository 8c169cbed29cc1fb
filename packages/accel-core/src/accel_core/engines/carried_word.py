"""The word of an update that all processes share, carried by DDP's own reduction of gradients.

A message of its own costs a busy CPU as much as a small step. DDP reduces gradients anyway, so one more
parameter travels with them: three numbers that no optimizer holds. It is registered on the user's module only
while DDP is made, so that `state_dict` and `unwrap_model` never see it. Whenever the gradient of one of the
model's own parameters is there, the word's is too: no backward pass leaves DDP waiting for it.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from ..processes.arrivals import Arrivals

_NAME = "_word_of_accel"


class CarriedWord:
    """Says on every process whether any of them has something to tell, at the same update."""

    def __init__(self, accelerator: Accelerator, index: int) -> None:
        self.accelerator = accelerator
        self.index = index
        self.has_news: Callable[[], bool] = lambda: False
        """Whether this process has something to tell."""
        self.differs: Callable[[], bool] = lambda: False
        """Whether this process has counted other items in the update than were planned."""
        self.is_carried = False
        """A word travels with the updates of the model that is wrapped now."""
        self._word: torch.nn.Parameter | None = None
        self._wrapper: Callable[[], DistributedDataParallel | None] = lambda: None
        """Weak: the parameter that carries the word would keep the wrapper alive."""
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._messages: dict[tuple[bool, bool], torch.Tensor] = {}
        self._arrivals = Arrivals(distance=2)

    @contextlib.contextmanager
    def travelling_with(self, model: torch.nn.Module) -> Iterator[None]:
        """Let DDP, which is made within, find the word among the parameters of `model`."""
        self.release()
        first = next((each for each in model.parameters() if each.requires_grad), None)
        if first is None or not self._can_travel(model, first):
            yield
            return
        self._word = torch.nn.Parameter(torch.zeros(3, dtype=first.dtype, device=first.device))
        model.register_parameter(_NAME, self._word)
        try:
            yield
        finally:
            del model._parameters[_NAME]

    def _can_travel(self, model: torch.nn.Module, first: torch.Tensor) -> bool:
        settings = self.accelerator.ddp_handler
        # With unused parameters or a static graph DDP expects each backward pass to be as it has seen it.
        if settings is not None and (settings.find_unused_parameters or settings.static_graph):
            return False
        is_plain = not isinstance(model, torch.jit.ScriptModule) and not hasattr(model, _NAME)
        return is_plain and first.is_floating_point()

    def attach(self, wrapper: DistributedDataParallel | None) -> None:
        """Send the word with every update of `wrapper`, if it holds the word."""
        held = [] if wrapper is None else getattr(wrapper, "_module_parameters", [])
        word = self._word
        if wrapper is None or word is None or not any(each is word for each in held):
            return
        trained = [each for each in held if each.requires_grad and each is not word]
        self._wrapper = weakref.ref(wrapper)
        # The gradient of what comes last in the model is there first.
        self._hook = trained[-1].register_post_accumulate_grad_hook(self)
        # Only the main process marks it. A mean between 0 and 1 shows that it was reduced.
        mark = float(self.index == 0)
        # Made once: a tensor that is made of numbers waits for an accelerator.
        flags = itertools.product((False, True), repeat=2)
        self._messages = {
            (news, differs): word.new_tensor([mark, float(news), float(differs)]) for news, differs in flags
        }
        # A hook may compress what is sent, so the word is not relied on.
        self.is_carried = not getattr(wrapper, "_comm_hooks", None)

    def __call__(self, parameter: torch.Tensor) -> None:
        """Give the word its gradient, when DDP reduces that of `parameter`."""
        wrapper = self._wrapper()
        if self._word is None or wrapper is None or not wrapper.require_backward_grad_sync:
            return
        self._word.grad = None
        # Not a part of the loss, which a float16 scaler multiplies.
        torch.autograd.backward(self._word, self._messages[self.has_news(), self.differs()])

    def read(self) -> bool | None:
        """Return whether any process had news; None if no backward pass of the update was reduced.

        All processes return the same. On an accelerator it is the word of an update before.
        """
        word = self._word
        gradient = None if word is None else word.grad
        if word is None or gradient is None:
            return None
        word.grad = None
        arrived = self._arrivals.add(gradient)
        if arrived is None:
            return False
        mark, news, _ = arrived[0].tolist()
        return news > 0 if 0 < mark < 1 else None

    def any_differs(self) -> bool | None:
        """Return whether some process's items of the current update differ from the plan.

        None if it is not known: no backward pass was reduced, or reading would wait for an accelerator.
        """
        gradient = self._word.grad if self._word is not None and self.is_carried else None
        if gradient is None or not gradient.is_cpu:
            return None
        mark, _, differs = gradient.tolist()
        return differs > 0 if 0 < mark < 1 else None

    def forget(self) -> None:
        """Forget the words that are on their way."""
        self._arrivals.drain()
        if self._word is not None:
            self._word.grad = None

    def release(self) -> None:
        """Leave the wrapper that there was."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._word = None
        self.is_carried = False
        self._arrivals.drain()
