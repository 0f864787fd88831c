"""The order of an epoch: repeats of every source, packed rows, shuffled optimiser steps, the share of every rank.

The order depends on (seed, epoch) alone. The position of a run in its data is therefore one number, the optimiser steps
done, for any number of ranks and workers.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MEGABATCH = 16
"""Optimiser steps that are sorted by length together; more steps balance better, fewer steps mix more."""
WAITING = 512
"""Examples that packing chooses from; more fill rows better, fewer keep examples near their shuffled order."""
_FREELY = 3.0
"""While a row has room for this many average examples, it takes those that have waited longest."""


def source_repeats(sizes: Sequence[int], parts: Sequence[float], *, records: int | None = None) -> list[float]:
    """Repeats per record of each source that give the sources their parts of an epoch.

    Args:
        sizes: usable records of every source.
        parts: part of every source; only the ratios matter. The part of an empty source is shared by the others.
        records: records of an epoch; None: the number of usable records.
    """
    total = sum(part for part, size in zip(parts, sizes, strict=True) if size)
    wanted = records or sum(sizes)
    return [part / total * wanted / size if size else 1.0 for part, size in zip(parts, sizes, strict=True)]


def records_of_epoch(members: Sequence[Sequence[int]], weights: Sequence[float], *, seed: int, epoch: int) -> list[int]:
    """Record numbers of one epoch, source by source.

    Every epoch has the same number of records. A fractional weight takes successive stretches of a seeded permutation,
    so that over several epochs all records are seen equally often.

    Args:
        members: the record numbers of every source.
        weights: repeats per record: 2 repeats all records, 0.5 takes another half in each epoch. A source gives at
            least one record.
        seed: seed of the run.
        epoch: from 0.
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


def pack(numbers: Iterable[int], lengths: Sequence[int], *, tokens: int, waiting: int = WAITING) -> list[list[int]]:
    """Pack examples into padding-free rows with a maximum number of tokens, so that forward passes cost about the same.

    A row takes the examples that have waited longest until it is nearly full, and then the one or two that leave the
    least room. No example waits for more than `waiting` rows.

    Args:
        numbers: numbers of the examples, in shuffled order.
        lengths: tokens per example, by number; none above `tokens`.
        tokens: per row.
        waiting: see `WAITING`.
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
        place = bisect.bisect_left(self._sorted, (length, key))
        self._sorted.insert(place, (length, key))
        self._sizes.insert(place, length)
        self._waiting[key], self._length[key] = number, length
        self._total += length

    def take(self, key: int) -> int:
        length = self._length.pop(key)
        place = bisect.bisect_left(self._sorted, (length, key))
        del self._sorted[place], self._sizes[place]
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
        places = np.arange(count)
        partners = np.searchsorted(sizes, room - sizes, side="right") - 1
        partners = np.minimum(partners, places - 1)  # the shorter of two: no example pairs with itself
        sums = sizes + np.where(partners >= 0, sizes[partners], 0)
        first = int(sums.argmax())
        chosen = [first, int(partners[first])] if partners[first] >= 0 else [first]
        return [self._sorted[place][1] for place in chosen]


def fill_rate(rows: Sequence[Sequence[int]], lengths: Sequence[int], *, tokens: int) -> float:
    """Fill rate: tokens in the rows divided by the rows' capacity."""
    return sum(lengths[number] for row in rows for number in row) / (tokens * max(1, len(rows)))


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

    Args:
        lengths: tokens per example.
        has_image: modality per example.
        seed: of the run.
        epoch: from 0.
        global_batch: examples per step; the last step may be shorter.
        order: grouped, random, or sequential (the given order).
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
    """The optimiser steps of an epoch of packed rows, each a list of rows; only the last step may be shorter.

    Args:
        rows: from `pack`.
        seed: of the run.
        epoch: from 0.
        global_batch: rows per step.
    """
    shuffled = list(rows)
    random.Random(f"{seed} {epoch} rows").shuffle(shuffled)  # packing closes the fullest rows first
    return _cut(shuffled, global_batch)


def plan_llava(
    words: Sequence[int], has_image: Sequence[bool], *, seed: int, epoch: int, global_batch: int
) -> list[list[int]]:
    """The optimiser steps of an epoch as LLaVA's `group_by_modality_length` forms them.

    The same records share a step as in LLaVA with the same torch seed. LLaVA uses the global generator, this function
    a generator with `seed + epoch`. Mega-batches of one modality are shuffled; the remainders of both come last, mixed.

    Args:
        words: white-space separated words of each record, which LLaVA uses as its length.
        has_image: modality per record.
        seed: of the run.
        epoch: from 0.
        global_batch: records per step.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    groups = [[number for number in range(len(words)) if bool(has_image[number]) == kind] for kind in (True, False)]
    batches: list[list[int]] = []
    left: list[int] = []
    for members in groups:
        order = [members[place] for place in torch.randperm(len(members), generator=generator).tolist()]
        cut = _cut(order, global_batch)
        if all(groups):  # LLaVA joins the last mega-batches of both modalities even when they are whole
            left += cut.pop()
        batches += cut
    if not all(groups):
        return batches
    batches = [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
    return _cut([number for batch in batches for number in batch] + sorted(left), global_batch)


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
        size = max(lengths, default=0) * len(lengths) if self.padded else sum(lengths)
        return self.tokens is None or size <= self.tokens


def deal(
    batch: Sequence[int], lengths: Sequence[int], *, world_size: int, limit: MicroBatchLimit
) -> list[list[list[int]]]:
    """Divide the examples of one step among ranks and micro-batches, so that all ranks get about as many tokens.

    The number of micro-batches grows until each is within the limit.

    Args:
        batch: example numbers.
        lengths: tokens per example, by example number.
        world_size: ranks.
        limit: size of a micro-batch.

    Returns:
        ``[rank][micro-batch]`` lists; every example once, every rank the same number of micro-batches. A micro-batch
        is empty only where the step has fewer examples than there are micro-batches over all ranks.
    """
    count = -(-len(batch) // (world_size * limit.examples))
    if limit.tokens is not None:
        count = max(count, -(-sum(min(limit.tokens, lengths[index]) for index in batch) // (world_size * limit.tokens)))
    while True:
        ranks = _deal(batch, lengths, world_size=world_size, room=count * limit.examples, count=count)
        if all(limit.holds([lengths[index] for index in micro]) for micros in ranks for micro in micros):
            return ranks
        count += 1


def _deal(
    batch: Sequence[int], lengths: Sequence[int], *, world_size: int, room: int, count: int
) -> list[list[list[int]]]:
    """`deal` into a number of micro-batches.

    Examples are assigned longest first, each to the rank with the fewest tokens that has room (the LPT rule). The
    longest examples of all ranks are in the first micro-batch, so that ranks finish each micro-batch together.
    """
    least = min(count, len(batch) // world_size)
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    remaining = len(batch)
    for index in sorted(batch, key=lambda index: (-lengths[index], index)):
        missing = sum(max(0, least - len(members)) for members in ranks)
        limit = least if remaining <= missing else room
        open_ranks = [rank for rank in range(world_size) if len(ranks[rank]) < limit]
        target = min(open_ranks, key=lambda rank: (loads[rank], len(ranks[rank]), rank))
        ranks[target].append(index)
        loads[target] += lengths[index]
        remaining -= 1
    return [[members[step::count] for step in range(count)] for members in ranks]
