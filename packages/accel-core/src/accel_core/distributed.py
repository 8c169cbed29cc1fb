"""What several processes do together: sums, gathering, agreeing. Every process has to call each function here."""

from __future__ import annotations

import atexit
import gc
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object

from .errors import ConfigurationError

SECONDS_TO_LET_GO = 0.01


def check_processes(num_processes: int) -> None:
    """Check that the processes see each other, and let them end in peace: what every run begins with."""
    check_processes_see_each_other(num_processes)
    close_process_group_at_exit()


def check_processes_see_each_other(num_processes: int) -> None:
    """Raise `ConfigurationError` if a launcher started several processes that do not know of each other."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and num_processes == 1:
        raise ConfigurationError(
            f"accelerate launch started {launched} processes, but this Accelerator does not see the others, so each would "
            f"train alone. On a CPU, set ACCELERATE_USE_CPU=true and launch with --multi_gpu, or use the configs in "
            f"examples/configs."
        )


def close_process_group_at_exit() -> None:
    """Destroy the process group when the interpreter ends: gloo may abort the process otherwise."""
    atexit.unregister(_destroy_process_group)
    atexit.register(_destroy_process_group)


def _destroy_process_group() -> None:
    if dist.is_initialized():
        # A wrapper that was replaced, as after unfreezing, is part of a circle and keeps the group's threads alive.
        gc.collect()
        dist.destroy_process_group()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Also where the script has destroyed the group: a thread of gloo lets go of a tensor after it has woken us, and needs the
        # interpreter for it. If that has begun to end meanwhile, the thread aborts the process, which has done all its work.
        time.sleep(SECONDS_TO_LET_GO)


def sum_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Add each of `values` over all processes, in float64 where the device has it."""
    if not is_distributed():
        return list(values)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    tensor = torch.tensor(values, dtype=dtype, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def is_distributed() -> bool:
    """Whether this process is one of several that know of each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def share_from_main(value: Any) -> Any:
    """Return the main process's `value` on every process; it is pickled on the way."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_values(value: Any) -> list[Any]:
    """Return the `value` of every process, in the order of the processes; they are pickled on the way."""
    return gather_object([value]) if is_distributed() else [value]


def broadcast_from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Give every process the main process's values. Every process takes part."""
    if is_distributed():
        with torch.no_grad():
            for tensor in tensors:
                values = tensor.contiguous()
                dist.broadcast(values, src=0)
                if values is not tensor:
                    tensor.copy_(values)


def gather_tensor(tensor: torch.Tensor, padding_value: float | None = None) -> torch.Tensor:
    """Join the tensors of all processes on the first dimension, which may differ between processes.

    Args:
        tensor: of the same number of dimensions and dtype on every process; a scalar counts as shape `(1,)`.
        padding_value: fills up the other dimensions where they differ; without it they have to be equal.
    """
    tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
    if not is_distributed():
        return tensor
    shapes = gather_values(tuple(tensor.shape))
    if padding_value is None and len({shape[1:] for shape in shapes}) > 1:
        raise ConfigurationError(
            f"gather was called with the shapes {shapes} on the {len(shapes)} processes, which differ beyond the first "
            f"dimension. Pass padding_value to fill the shorter ones up."
        )
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    own = padded(tensor, largest, padding_value or 0)
    gathered = [torch.empty_like(own) for _ in shapes]
    dist.all_gather(gathered, own)
    return torch.cat([part[: shape[0]] for part, shape in zip(gathered, shapes, strict=True)])


def padded(tensor: torch.Tensor, sizes: Sequence[int], value: float) -> torch.Tensor:
    """Return a tensor of `sizes` that begins with `tensor` in every dimension and is filled up with `value`."""
    result = tensor.new_full(sizes, value)
    result[tuple(map(slice, tensor.shape))] = tensor
    return result


def together(action: Callable[[], Any], is_main: bool) -> Any:
    """Act on the main process and return its result on every process; what it raises is raised on all of them."""
    outcome, failure = None, None
    try:
        outcome = action() if is_main else None
    except Exception as error:
        failure = error
    outcome, failure = share_from_main((outcome, failure))
    if failure is not None:
        raise failure
    return outcome


class Agreement:
    """What the processes have to tell each other about an update, in one small all-reduce that nobody waits for.

    Each topic is a whole number; the largest one said by any process is what all of them read. Words said up to `start`
    are read by everyone at the next `read`, which is why all processes act on them at the same update. On one process
    there is nothing to wait for: what was said is read at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.topics = ["stop", "signal"]
        self.said: dict[str, int] = {}
        """What this process has said since the last word was started."""
        self.agreed: dict[str, int] = {}
        """What was read last, without the topics of which nobody said anything."""
        self.stop_reason: str | None = None
        """Why to stop, the same on every process once one of them has said so."""
        self.signal_number = 0
        self._own_reason: str | None = None
        self._is_alone = not is_distributed()
        self._word: torch.Tensor | None = None
        self._work: Any = None

    def register(self, topic: str) -> None:
        """Make room for `topic`, when the run starts and on every process."""
        if topic not in self.topics:
            self.topics.append(topic)

    def say(self, topic: str, value: int = 1) -> None:
        """Tell the others; they read it once the next word is through."""
        if value:
            self.said[topic] = max(value, self.said.get(topic, 0))

    def say_stop(self, reason: str, signal_number: int = 0) -> None:
        """Ask all processes to stop; the first reason counts."""
        self._own_reason = self._own_reason or reason
        self.say("signal", signal_number)
        self.say("stop")

    def start(self) -> None:
        """Send what was said, without waiting. Every process takes part."""
        if self._is_alone:
            return
        # Taken before it is read: a signal handler may speak at any moment, and what it says then goes with the next word.
        said, self.said = self.said, {}
        self._word = torch.tensor([said.get(t, 0) for t in self.topics], dtype=torch.int64, device=self.device)
        self._work = dist.all_reduce(self._word, op=dist.ReduceOp.MAX, async_op=True)

    def read(self, wait: bool = False) -> None:
        """Set `agreed` to the word on its way, or with `wait` to all that was said until now. Every process takes part."""
        self.agreed = self._receive()
        if wait:
            self._is_alone = not is_distributed()
            self.start()
            for topic, value in self._receive().items():
                self.agreed[topic] = max(value, self.agreed.get(topic, 0))
        if "stop" in self.agreed and self.stop_reason is None:
            self.stop_reason = next(reason for reason in gather_values(self._own_reason) if reason)
            self.signal_number = self.agreed.get("signal", 0)

    def _receive(self) -> dict[str, int]:
        if self._is_alone:
            said, self.said = self.said, {}
            return said
        if self._word is None:
            return {}
        self._work.wait()
        values, self._word, self._work = self._word.tolist(), None, None
        return {topic: value for topic, value in zip(self.topics, values, strict=True) if value}
