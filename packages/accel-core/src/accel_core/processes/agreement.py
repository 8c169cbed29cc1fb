"""Lets the processes agree between two updates on stops, signals, and what callbacks add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .arrivals import Arrivals
from .collectives import all_gather_object, is_distributed


class Word(Protocol):
    """What may travel with the gradients of an update."""

    has_news: Callable[[], bool]
    is_carried: bool

    def read(self) -> bool | None:
        """Return whether any process has news; None if nothing travelled."""

    def forget(self) -> None:
        """Forget what is on its way."""


class Agreement:
    """Carries flags that every process may raise, and that all of them act on at the same update.

    Each topic is a whole number, and the largest one that any process has flagged is what all of them
    collect. That somebody has flagged something travels with the gradients of an update where the engine has
    a word for it; what it is follows in a message. Elsewhere one small all-reduce an update carries all
    topics, and nobody waits for it: what is flagged up to `launch` is collected by everyone at the next
    `collect`. An accelerator is read two updates later, since reading it would wait for its latest work. On
    one process there is nothing to wait for: flags are collected at once.
    """

    def __init__(self, device: torch.device, word: Word | None = None) -> None:
        self.device = device
        self._word = word
        if word is not None:
            word.has_news = lambda: bool(self.flagged)
        self._arrivals = Arrivals(distance=1)
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
        if not (self._is_single_process or self._is_carried):
            self._send()

    def _send(self) -> None:
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
        if blocking:
            # The process group may have been made after this object.
            self._is_single_process = not is_distributed()
        if self._is_single_process:
            self.agreed, self.flagged = self.flagged, {}
        elif blocking:
            self._collect_all()
        elif self._is_carried:
            self._collect_carried()
        else:
            self.agreed = self._topics_in(self._receive())
        # All processes read the same message, so all or none of them gather the reasons.
        if "stop" in self.agreed and self.stop_reason is None:
            # The first process that has a reason decides, so that all report the same one.
            self.stop_reason = next(reason for reason in all_gather_object(self._own_reason) if reason)
            self.signal_number = self.agreed.get("signal", 0)

    @property
    def _is_carried(self) -> bool:
        return self._word is not None and self._word.is_carried

    def _collect_carried(self) -> None:
        """Look at the word of the update, and ask what was flagged if anything was."""
        has_news = self._word.read() if self._word is not None else None
        if has_news is None:
            # No backward pass was reduced: all processes had left out batches, or a step of the user's own.
            self._collect_all()
            return
        self.agreed = {}
        if has_news:
            # A signal handler may flag at any moment, and that goes with the next word.
            flagged, self.flagged = self.flagged, {}
            for of_process in all_gather_object(flagged):
                self._merge(of_process)

    def _collect_all(self) -> None:
        """Collect all that was flagged until now, on any process."""
        self.agreed = {}
        if self._is_carried and self._word is not None:
            self._word.forget()  # What it told is still flagged.
        # An all-reduce that nobody waited for may abort the process at exit.
        earlier = [values for values, _ in self._arrivals.drain()]
        messages = [*earlier, *self._wait()]
        self._send()
        for message in (*messages, *self._wait()):
            self._merge(self._topics_in(message))

    def _merge(self, topics: dict[str, int]) -> None:
        for topic, value in topics.items():
            self.agreed[topic] = max(value, self.agreed.get(topic, 0))

    def _topics_in(self, message: torch.Tensor | None) -> dict[str, int]:
        values = [] if message is None else message.tolist()
        topics = self.topics if values else []
        return {topic: value for topic, value in zip(topics, values, strict=True) if value}

    def _wait(self) -> list[torch.Tensor]:
        """Return the message on its way, if there is one, on its device."""
        if self._message is None:
            return []
        message, work = self._message, self._work
        self._message = self._work = None
        work.wait()
        return [message]

    def _receive(self) -> torch.Tensor | None:
        """Return the message that is due, on the CPU, or None."""
        for message in self._wait():
            arrived = self._arrivals.add(message)
            return None if arrived is None else arrived[0]
        return None
