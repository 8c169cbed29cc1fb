"""Batches of samples of similar length, so that little of them is padding."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from accel_core import ConfigurationError
from accel_core.extending import check_choice, check_whole_number, preview

BATCHES_SORTED_TOGETHER = 50
"""Samples are sorted within as many batches: more saves little padding and costs randomness."""


class LengthGroupedSampler(Sampler[int]):
    """Gives each sample once an epoch, in an order in which the samples of a batch are of similar length.

    Pass it as `train_dataloader_kwargs={"sampler": LengthGroupedSampler(lengths, 16)}`. The order is a
    function of seed, epoch and lengths; it is sharded over the processes and resumed by the sample, as every
    order.
    """

    def __init__(
        self, lengths: Sequence[int] | Any, batch_size: int, shuffle: bool = True, *, seed: int = 0
    ) -> None:
        """Take the lengths of all samples.

        Args:
            lengths: of each sample in the order of the data set, such as its tokens.
            batch_size: samples in a batch of one process.
            shuffle: draw which samples and which batches come when; else the longest samples come first.
            seed: of the order, from 0; every process needs the same.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        self.lengths = _checked_lengths(lengths)
        self.batch_size = check_whole_number("batch_size", batch_size, "Use the per_device_batch_size.")
        self.shuffle = check_choice("shuffle", shuffle, (True, False))
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration give the order of `epoch` (from 0); the trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(_longest_first(self.lengths).tolist())
        # Python mixes the text to bits: neighbouring seeds and epochs have unrelated orders.
        seed = random.Random(f"{self.seed}/{self.epoch}").getrandbits(32)
        generator = torch.Generator("cpu").manual_seed(seed)
        order = torch.randperm(len(self.lengths), generator=generator, device="cpu")
        parts = order.split(self.batch_size * BATCHES_SORTED_TOGETHER)
        order = torch.cat([part[_longest_first(self.lengths[part])] for part in parts])
        # What is left over is no full batch: at the end, so that all others begin where a batch does.
        num_batches = len(order) // self.batch_size
        full = order[: num_batches * self.batch_size].reshape(num_batches, self.batch_size)
        rest = order[num_batches * self.batch_size :]
        batches = full[torch.randperm(num_batches, generator=generator, device="cpu")]
        return iter([*batches.reshape(-1).tolist(), *rest.tolist()])


def _longest_first(lengths: torch.Tensor) -> torch.Tensor:
    # Stable, so that equal lengths keep their order on every machine.
    return torch.argsort(lengths, descending=True, stable=True)


def _checked_lengths(lengths: Any) -> torch.Tensor:
    try:
        values = torch.as_tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        values = torch.tensor([])
    is_usable = values.ndim == 1 and len(values) > 0 and values.dtype is not torch.bool
    if not is_usable or not bool((values >= 0).all()):
        raise ConfigurationError(
            f"lengths is {preview(lengths)}, but must be one number of at least 0 for each sample, in the "
            "order of the data set. Pass [len(sample) for sample in dataset]."
        )
    return values
