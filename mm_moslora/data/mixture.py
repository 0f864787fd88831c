"""Mixing sources: how often each record of each source is seen in an epoch."""

from __future__ import annotations

import random
from collections.abc import Sequence


def expand(sizes: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int) -> list[int]:
    """Record numbers of one epoch over all sources laid behind each other.

    Args:
        sizes: records per source.
        weights: how often a record is seen: 2 repeats all, 0.5 takes another half each epoch.
        seed: of the run.
        epoch: from 0.

    Returns:
        Numbers into the concatenation of all sources, source by source.
    """
    chosen: list[int] = []
    offset = 0
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        whole, part = int(weight), round((weight - int(weight)) * size)
        numbers = list(range(offset, offset + size))
        chosen += numbers * whole
        if part:
            order = numbers[:]
            random.Random(f"{seed} {source}").shuffle(order)
            start = epoch * part
            chosen += [order[(start + i) % size] for i in range(part)]
        offset += size
    return chosen
