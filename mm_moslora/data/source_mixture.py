"""Mixing sources: how often each record of each source is seen in an epoch."""

from __future__ import annotations

import random
from collections.abc import Sequence


def repeats(sizes: Sequence[int], parts: Sequence[float], *, records: int | None = None) -> list[float]:
    """How often each record of each source is seen, so that the sources make up given parts of an epoch.

    Args:
        sizes: usable records of every source.
        parts: of every source; only their ratio counts. Empty sources get nothing, the others share.
        records: of an epoch; None: as many as there are.
    """
    total = sum(part for part, size in zip(parts, sizes, strict=True) if size)
    wanted = records or sum(sizes)
    return [part / total * wanted / size if size else 1.0 for part, size in zip(parts, sizes, strict=True)]


def expand(members: Sequence[Sequence[int]], weights: Sequence[float], *, seed: int, epoch: int) -> list[int]:
    """Record numbers of one epoch, source by source.

    Every epoch has the same number of them. A fraction walks through a seeded permutation, so that over the epochs all
    records are seen equally often.

    Args:
        members: the record numbers of every source.
        weights: how often a record is seen: 2 repeats all, 0.5 takes another half each epoch. A source gives at least
            one record.
        seed: of the run.
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
