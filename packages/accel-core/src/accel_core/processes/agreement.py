"""Lets the processes agree between two updates on stops, signals, and what callbacks add."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .collectives import all_gather_object, is_distributed


class Agreement:
    """Carries flags that every process may raise, and that all of them act on at the same update.

    They travel in one small all-reduce an update that nobody waits for. Each topic is a whole number, and
    the largest one that any process has flagged is what all of them collect. What is flagged up to `launch`
    is collected by everyone at the next `collect`. On one process there is nothing to wait for: flags are
    collected at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # One element of the message each, so all processes need the same topics in the same order.
        self.topics = ["stop", "signal"]
        self.flagged: dict[str, int] = {}
        """What this process has flagged since the last message was launched."""
        self.agreed: dict[str, int] = {}
        """What was collected last, without the topics that nobody has flagged."""
        self.stop_reason: str | None = None
        """Why to stop, the same on every process once one of them has asked for it."""
        self.signal_number = 0
        """Number of the signal that stops the run; 0 if none does."""
        self._own_reason: str | None = None
        # Kept, since every update asks for it.
        self._is_single_process = not is_distributed()
        self._message: torch.Tensor | None = None
        self._work: Any = None

    @property
    def signal_received(self) -> int:
        """Return the signal that stops all processes, or one that came here after their last agreement."""
        return self.signal_number or self.flagged.get("signal", 0)

    def register(self, topic: str) -> None:
        """Make room for `topic`, when the run starts and on every process."""
        if topic not in self.topics:
            self.topics.append(topic)

    def flag(self, topic: str, value: int = 1) -> None:
        """Let all processes know; they collect it once the next message is through."""
        # 0 is what a message holds for topics that nobody flags.
        if value:
            self.flagged[topic] = max(value, self.flagged.get(topic, 0))

    def flag_stop(self, reason: str, signal_number: int = 0) -> None:
        """Ask all processes to stop; the first reason counts."""
        self._own_reason = self._own_reason or reason
        self.flag("signal", signal_number)
        self.flag("stop")

    def launch(self) -> None:
        """Send what was flagged, without waiting. Every process takes part."""
        if self._is_single_process:
            return
        # Taken before it is sent: a signal handler may flag at any moment, and that goes with the next
        # message.
        flagged, self.flagged = self.flagged, {}
        self._message = torch.tensor(
            [flagged.get(t, 0) for t in self.topics], dtype=torch.int64, device=self.device
        )
        # The maximum: what one process flags holds for all.
        self._work = dist.all_reduce(self._message, op=dist.ReduceOp.MAX, async_op=True)

    def collect(self, blocking: bool = False) -> None:
        """Set `agreed` to the message on its way. Every process takes part.

        Args:
            blocking: collect all that was flagged until now, on any process.
        """
        # Also before a blocking round: an all-reduce that nobody waited for may abort the process at exit.
        self.agreed = self._receive()
        if blocking:
            # The process group may have been made after this object.
            self._is_single_process = not is_distributed()
            self.launch()
            for topic, value in self._receive().items():
                self.agreed[topic] = max(value, self.agreed.get(topic, 0))
        # All processes read the same message, so all or none of them gather the reasons.
        if "stop" in self.agreed and self.stop_reason is None:
            # The first process that has a reason decides, so that all report the same one.
            self.stop_reason = next(reason for reason in all_gather_object(self._own_reason) if reason)
            self.signal_number = self.agreed.get("signal", 0)

    def _receive(self) -> dict[str, int]:
        if self._is_single_process:
            flagged, self.flagged = self.flagged, {}
            return flagged
        if self._message is None:
            return {}
        self._work.wait()
        values = self._message.tolist()
        self._message = None
        self._work = None
        return {topic: value for topic, value in zip(self.topics, values, strict=True) if value}
