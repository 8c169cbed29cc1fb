"""A shuffle of any length that begins at once: each place of the order is computed when it is asked for.

A drawn permutation holds all indices: of 10^9 samples 8 GB and more than a minute on each process, before
the first batch. Here a key gives the index at each place, and the place of each index. It is a Feistel
network over the smallest power of two that holds all indices, with as many rounds as make it look like a
drawn shuffle; what falls outside of the range is sent through it again (cycle walking).

Sources: M. Luby and C. Rackoff, "How to construct pseudorandom permutations from pseudorandom functions",
1988; J. Black and P. Rogaway, "Ciphers with arbitrary finite domains", 2002; the mixing function is that of
splitmix64 by G. L. Steele, D. Lea and C. H. Flood, "Fast splittable pseudorandom number generators", 2014.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Indices = np.ndarray[Any, np.dtype[np.int64]]
_Words = np.ndarray[Any, np.dtype[np.uint64]]

ROUNDS = 10
"""Six fail tests of pairs and steps in small domains. Even, so that both halves are back in their places."""
FEWEST_BITS = 6
"""A network of fewer bits is too small to mix them."""
BLOCK = 2**14
"""Places computed at once: enough that a step costs no more than a slice."""

_GAMMA = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


class KeyedOrder:
    """A permutation of `range(length)` that depends on nothing but `length` and `key`."""

    def __init__(self, length: int, key: int) -> None:
        """Hold no indices. `key` is a whole number below 2^64."""
        self.length = length
        bits = max((length - 1).bit_length(), FEWEST_BITS)
        # Halves of unequal width bound the domain by twice the length.
        self._low, self._high = bits // 2, bits - bits // 2
        # The length too, or one more sample would leave nearly all others in their places.
        base = key ^ _mix_number(length)
        self._keys = [np.uint64(_mix_number(base + number * _GAMMA)) for number in range(1, ROUNDS + 1)]
        self._number = -1
        self._block: Indices = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: Any) -> Any:
        """Return the index at a place, or those at a slice of places, int64."""
        if isinstance(place, slice):
            start, stop, step = place.indices(self.length)
            if step != 1:
                return self._walk(np.arange(start, stop, step), self._forward)
            return self._between(start, max(start, stop))
        place = range(self.length)[place]
        return int(self._between(place, place + 1)[0])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Return all indices."""
        return self[:].astype(dtype or np.int64, copy=False)  # type: ignore[no-any-return]

    def places_of(self, indices: Any) -> Indices:
        """Return where `indices` stand in the order: the inverse."""
        return self._walk(np.asarray(indices, np.int64), self._backward)

    def _between(self, start: int, stop: int) -> Indices:
        parts = []
        for number in range(start // BLOCK, -(-stop // BLOCK)):
            first = number * BLOCK
            if number != self._number:
                places = np.arange(first, min(first + BLOCK, self.length))
                self._number, self._block = number, self._walk(places, self._forward)
            parts.append(self._block[max(start - first, 0) : stop - first])
        return parts[0] if len(parts) == 1 else np.concatenate([self._block[:0], *parts])

    def _walk(self, values: Indices, permute: Any) -> Indices:
        found = permute(values.astype(np.uint64))
        while (outside := found >= self.length).any():
            found[outside] = permute(found[outside])
        return found.astype(np.int64)  # type: ignore[no-any-return]

    def _forward(self, values: _Words) -> _Words:
        low, high = self._low, self._high
        # As many bits on the left as the half that a round leaves alone has on the right.
        left, right = values >> np.uint64(high), values & np.uint64(2**high - 1)
        for number, key in enumerate(self._keys):
            width = high if number % 2 else low
            left, right = right, left ^ (_mix(right + key) >> np.uint64(64 - width))
        return (left << np.uint64(high)) | right

    def _backward(self, values: _Words) -> _Words:
        low, high = self._low, self._high
        left, right = values >> np.uint64(high), values & np.uint64(2**high - 1)
        for number, key in reversed(list(enumerate(self._keys))):
            width = high if number % 2 else low
            left, right = right ^ (_mix(left + key) >> np.uint64(64 - width)), left
        return (left << np.uint64(high)) | right


def _mix(words: _Words) -> _Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _mix_number(number: int) -> int:
    """Return the same of one number, without numpy's warning of an overflow."""
    number &= _MASK
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & _MASK
    return number ^ (number >> 31)
