"""Packing of examples into padding-free rows."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

WAITING = 512
"""Examples that packing chooses from; more fill rows better, fewer keep examples near their shuffled order."""
_FREELY = 3.0
"""While a row has room for this many average examples, it takes those that have waited longest."""


def pack(numbers: Iterable[int], lengths: Sequence[int], *, tokens: int, waiting: int = WAITING) -> list[list[int]]:
    """Pack examples, by number, into padding-free rows of about so many tokens, so that forward passes cost the same.

    A row takes the examples that have waited longest until it is nearly full, and then the one or two that leave the
    least room. No example waits for more than `waiting` rows.
    """
    coming, pool = iter(numbers), _Pool()
    rows: list[list[int]] = []
    while True:
        for number in itertools.islice(coming, waiting - len(pool)):
            assert lengths[number] <= tokens, "an example is longer than a row"
            pool.add(number, lengths[number])
        if not len(pool):
            return rows
        row, room = [pool.take(pool.oldest())], tokens
        room -= lengths[row[0]]
        while keys := pool.oldest_that_fits(room) if room > _FREELY * pool.mean else pool.best(room):
            taken = [pool.take(key) for key in keys]
            row += taken
            room -= sum(lengths[number] for number in taken)
        rows.append(row)


class _Pool:
    """Waiting examples, by length and by age."""

    def __init__(self) -> None:
        self._sorted: list[tuple[int, int]] = []  # length, key
        self._sizes: list[int] = []
        self._waiting: dict[int, int] = {}  # key: number, in order of age
        self._length: dict[int, int] = {}
        self._next, self._total = 0, 0

    def __len__(self) -> int:
        return len(self._sorted)

    @property
    def mean(self) -> float:
        """Average length."""
        return self._total / max(1, len(self))

    def add(self, number: int, length: int) -> None:
        key, self._next = self._next, self._next + 1
        index = bisect.bisect_left(self._sorted, (length, key))
        self._sorted.insert(index, (length, key))
        self._sizes.insert(index, length)
        self._waiting[key], self._length[key] = number, length
        self._total += length

    def take(self, key: int) -> int:
        length = self._length.pop(key)
        index = bisect.bisect_left(self._sorted, (length, key))
        del self._sorted[index], self._sizes[index]
        self._total -= length
        return self._waiting.pop(key)

    def oldest(self) -> int:
        return next(iter(self._waiting))

    def oldest_that_fits(self, room: int) -> list[int]:
        return list(itertools.islice((key for key in self._waiting if self._length[key] <= room), 1))

    def best(self, room: int) -> list[int]:
        """The one or two examples that fill the given room best; none if no example fits."""
        count = bisect.bisect_right(self._sizes, room)
        if not count:
            return []
        sizes = np.array(self._sizes[:count])
        indices = np.arange(count)
        partners = np.searchsorted(sizes, room - sizes, side="right") - 1
        partners = np.minimum(partners, indices - 1)  # the shorter of two: no example pairs with itself
        sums = sizes + np.where(partners >= 0, sizes[partners], 0)
        first = int(sums.argmax())
        chosen = [first, int(partners[first])] if partners[first] >= 0 else [first]
        return [self._sorted[index][1] for index in chosen]


def fill_rate(rows: Sequence[Sequence[int]], lengths: Sequence[int], *, tokens: int) -> float:
    """Fill rate: tokens in the rows divided by the rows' capacity."""
    return sum(lengths[number] for row in rows for number in row) / (tokens * max(1, len(rows)))
