"""The order of an epoch: repeats of every source, packed rows, shuffled optimiser steps, the share of every rank.

The order depends on (seed, epoch) alone. The position of a run in its data is therefore one number, the optimiser steps
done, for any number of ranks and workers.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MEGABATCH = 16
"""Optimiser steps that are sorted by length together; more steps balance better, fewer steps mix more."""


def source_repeats(sizes: Sequence[int], parts: Sequence[float], *, records: int | None = None) -> list[float]:
    """Repeats per record that give the sources their parts of an epoch; empty sources leave theirs to the others."""
    total = sum(part for part, size in zip(parts, sizes, strict=True) if size)
    wanted = records or sum(sizes)
    return [part / total * wanted / size if size else 1.0 for part, size in zip(parts, sizes, strict=True)]


def with_replay(parts: Sequence[float], replayed: Sequence[bool]) -> list[float]:
    """Parts of sources, of which only the ratios matter, such that those replayed are their share of the whole."""
    share = sum(part for part, replay in zip(parts, replayed, strict=True) if replay)
    others = sum(parts) - share
    return [part * others / (1 - share) if replay else part for part, replay in zip(parts, replayed, strict=True)]


def repeats_of(
    sizes: Sequence[int],
    weights: Sequence[float],
    replayed: Sequence[bool],
    *,
    mixing: str = "repeats",
    records: int | None = None,
) -> list[float]:
    """Repeats per record of each source under the recipe's mixing."""
    if mixing == "parts":
        return source_repeats(sizes, with_replay(weights, replayed), records=records)
    parts = [weight if replay else weight * size for size, weight, replay in zip(sizes, weights, replayed, strict=True)]
    parts = with_replay(parts, replayed)
    return [
        part / size if replay and size else weight
        for size, weight, part, replay in zip(sizes, weights, parts, replayed, strict=True)
    ]


def even_size(units: int, most: int) -> int:
    """The largest size of steps of about the same number of units, at most `most`."""
    return -(-units // -(-units // most))


def records_of_epoch(members: Sequence[Sequence[int]], weights: Sequence[float], *, seed: int, epoch: int) -> list[int]:
    """Record numbers of one epoch, source by source; `weights` are repeats per record.

    Every epoch has the same number of records, and of each source at least one. A fractional weight takes successive
    stretches of a seeded permutation, so that over several epochs all records are seen equally often.
    """
    chosen: list[int] = []
    for source, (numbers, weight) in enumerate(zip(members, weights, strict=True)):
        if not numbers:
            continue
        whole, size = int(weight), len(numbers)
        part = round((weight - whole) * size)
        if whole == 0:
            part = max(1, part)
        chosen += list(numbers) * whole
        if part:
            order = list(numbers)
            random.Random(f"{seed} {source}").shuffle(order)
            chosen += [order[(epoch * part + step) % size] for step in range(part)]
    return chosen


def plan_epoch(
    lengths: Sequence[int],
    has_image: Sequence[bool],
    *,
    seed: int,
    epoch: int,
    global_batch: int,
    order: str = "grouped",
) -> list[list[int]]:
    """The optimiser steps of an epoch, each a list of example numbers; every example exactly once.

    `grouped` orders by modality and length as LLaVA does, with another random generator. Each modality is shuffled and
    cut into mega-batches. Each mega-batch is sorted by length and cut into steps of one modality. The remainders of
    both modalities share steps. The steps are shuffled; a step with too few examples comes last.
    """
    rng = random.Random(f"{seed} {epoch}")
    everything = list(range(len(lengths)))
    if order == "sequential":
        return _cut(everything, global_batch)
    rng.shuffle(everything)
    if order == "random":
        return _cut(everything, global_batch)
    steps: list[list[int]] = []
    left: list[int] = []
    for modality in (True, False):
        members = [index for index in everything if bool(has_image[index]) == modality]
        whole = len(members) - len(members) % global_batch
        left += members[whole:]
        for start in range(0, whole, MEGABATCH * global_batch):
            stop = min(whole, start + MEGABATCH * global_batch)
            steps += _cut(sorted(members[start:stop], key=lambda index: lengths[index]), global_batch)
    steps += _cut(left, global_batch)
    short = [steps.pop()] if steps and len(steps[-1]) < global_batch else []
    rng.shuffle(steps)
    return steps + short


def plan_rows(rows: Sequence[list[int]], *, seed: int, epoch: int, global_batch: int) -> list[list[list[int]]]:
    """The optimiser steps of an epoch of packed rows, each a list of rows; only the last step may be shorter."""
    shuffled = list(rows)
    random.Random(f"{seed} {epoch} rows").shuffle(shuffled)  # packing closes the fullest rows first
    return _cut(shuffled, global_batch)


def _cut(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass(frozen=True, kw_only=True)
class MicroBatchLimit:
    """The size of a micro-batch of one rank."""

    examples: int
    """Most examples, or packed rows."""
    tokens: int | None = None
    """Most tokens; None: any number. An example with more is alone in its micro-batch."""
    padded: bool = False
    """Whether the model pads the examples of a micro-batch to the longest, and the padding counts as tokens."""

    def holds(self, lengths: Sequence[int]) -> bool:
        """Whether examples or rows of these lengths may share a micro-batch."""
        return len(lengths) <= 1 or (len(lengths) <= self.examples and self.holds_tokens(lengths))

    def holds_tokens(self, lengths: Sequence[int]) -> bool:
        """Whether the tokens of examples of these lengths, of any number, are within the limit."""
        return self.tokens is None or self.size(lengths) <= self.tokens

    def size(self, lengths: Sequence[int]) -> int:
        """Tokens of a micro-batch of examples of these lengths, padding included."""
        return max(lengths, default=0) * len(lengths) if self.padded else sum(lengths)


def deal(
    batch: Sequence[int], lengths: Sequence[int], *, world_size: int, limit: MicroBatchLimit
) -> list[list[list[int]]]:
    """Divide the examples of one step among ranks and micro-batches, so that all ranks get about as many tokens.

    Examples are spread evenly over the fewest micro-batches that could be enough. Where one of these is beyond the
    limit, micro-batches are filled with the examples that fit best, and ranks share the filled ones.

    Returns:
        ``[rank][micro-batch]`` lists, as many for every rank; one is empty only where the step has too few examples.
    """
    order = sorted(batch, key=lambda index: (-lengths[index], index))
    count = -(-len(order) // (world_size * limit.examples))
    if limit.tokens is not None:
        count = max(count, -(-sum(min(limit.tokens, lengths[index]) for index in order) // (world_size * limit.tokens)))
    ranks = _spread(order, lengths, world_size=world_size, room=count * limit.examples, count=count)
    if all(limit.holds([lengths[index] for index in micro]) for micros in ranks for micro in micros):
        return ranks
    return _share(_filled(order, lengths, limit=limit), lengths, world_size=world_size, limit=limit)


def _spread(
    order: Sequence[int], lengths: Sequence[int], *, world_size: int, room: int, count: int
) -> list[list[list[int]]]:
    """Examples, longest first, in a number of micro-batches per rank.

    Each goes to the rank with the fewest tokens that has room (the LPT rule). The longest examples of all ranks are in
    the first micro-batch, so that ranks finish each micro-batch together.
    """
    least = min(count, len(order) // world_size)
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    remaining, missing = len(order), world_size * least
    open_ranks = [(0, 0, rank) for rank in range(world_size)]  # tokens, examples, rank: a heap
    for index in order:
        while open_ranks[0][1] >= (least if remaining == missing else room):
            heapq.heappop(open_ranks)
        load, examples, rank = open_ranks[0]
        heapq.heapreplace(open_ranks, (load + lengths[index], examples + 1, rank))
        ranks[rank].append(index)
        missing -= examples < least
        remaining -= 1
    return [[members[step::count] for step in range(count)] for members in ranks]


def _filled(order: Sequence[int], lengths: Sequence[int], *, limit: MicroBatchLimit) -> list[list[int]]:
    """Few micro-batches within the limit, filled one after the other from examples that come longest first.

    With padding a micro-batch takes the longest examples that are left, as many as fit; no cut has fewer micro-batches.
    Without padding it takes the longest one that fits, and so on (first fit decreasing). As long as the shortest
    examples can fill it up to the limit of examples, it keeps room for them: neither limit is reached long before the
    other.
    """
    assert limit.tokens is not None
    left = list(reversed(order))
    sizes = [lengths[index] for index in left]
    filled: list[list[int]] = []
    while left:
        room, members = limit.tokens - sizes[-1], [left.pop()]
        longest = sizes.pop()
        while left and len(members) < limit.examples and room >= (longest if limit.padded else sizes[0]):
            index = len(left) - 1
            if not limit.padded:
                others = min(limit.examples - len(members), len(left)) - 1
                index = bisect.bisect_right(sizes, room) - 1
                if others * sizes[0] <= room and (others_size := sum(sizes[:others])) + sizes[others] <= room:
                    index = bisect.bisect_right(sizes, room - others_size) - 1
            members.append(left.pop(index))
            size = sizes.pop(index)
            room -= longest if limit.padded else size
        filled.append(members)
    return filled


def _share(
    micro_batches: Sequence[list[int]], lengths: Sequence[int], *, world_size: int, limit: MicroBatchLimit
) -> list[list[list[int]]]:
    """Micro-batches shared by ranks, as many for each, by size; the largest are halved until there are enough."""
    sized = sorted((-limit.size([lengths[index] for index in members]), members) for members in micro_batches)
    wanted = -(-len(sized) // world_size) * world_size
    while len(sized) < wanted:
        largest = next((index for index, (_, members) in enumerate(sized) if len(members) > 1), None)
        if largest is None:
            sized.append((0, []))
            continue
        _, members = sized.pop(largest)
        for half in (members[::2], members[1::2]):
            bisect.insort(sized, (-limit.size([lengths[index] for index in half]), half))
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for start in range(0, wanted, world_size):
        by_load = sorted(range(world_size), key=lambda rank: (loads[rank], rank))
        for rank, (size, members) in zip(by_load, sized[start : start + world_size], strict=True):
            ranks[rank].append(members)
            loads[rank] -= size
    return ranks


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
