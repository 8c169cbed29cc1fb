"""Agreement."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .collectives import all_gather_object, is_distributed


class Agreement:
    """What the processes have to tell each other about an update, in one small all-reduce that nobody waits for.

    Each topic is a whole number; the largest one said by any process is what all of them read. Words said up
    to `start` are read by everyone at the next `read`, which is why all processes act on them at the same
    update. On one process there is nothing to wait for: what was said is read at once.
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
        # Taken before it is read: a signal handler may speak at any moment, and what it says then goes with
        # the next word.
        said, self.said = self.said, {}
        self._word = torch.tensor(
            [said.get(t, 0) for t in self.topics], dtype=torch.int64, device=self.device
        )
        self._work = dist.all_reduce(self._word, op=dist.ReduceOp.MAX, async_op=True)

    def read(self, wait: bool = False) -> None:
        """Set `agreed` to the word on its way, or with `wait` to all that was said until now.

        Every process takes part.
        """
        self.agreed = self._receive()
        if wait:
            self._is_alone = not is_distributed()
            self.start()
            for topic, value in self._receive().items():
                self.agreed[topic] = max(value, self.agreed.get(topic, 0))
        if "stop" in self.agreed and self.stop_reason is None:
            self.stop_reason = next(reason for reason in all_gather_object(self._own_reason) if reason)
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
