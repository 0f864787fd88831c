"""Mixing of sources: repeats of each source's records in an epoch."""

from __future__ import annotations

import random
from collections.abc import Sequence


def repeats(sizes: Sequence[int], parts: Sequence[float], *, records: int | None = None) -> list[float]:
    """Repeats per record of each source that give the sources their parts of an epoch.

    Args:
        sizes: usable records of every source.
        parts: part of every source; only the ratios matter. The part of an empty source is shared by the others.
        records: records of an epoch; None: the number of usable records.
    """
    total = sum(part for part, size in zip(parts, sizes, strict=True) if size)
    wanted = records or sum(sizes)
    return [part / total * wanted / size if size else 1.0 for part, size in zip(parts, sizes, strict=True)]


def expand(members: Sequence[Sequence[int]], weights: Sequence[float], *, seed: int, epoch: int) -> list[int]:
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
