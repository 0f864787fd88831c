"""The order of an epoch, and how an optimiser step is dealt to ranks and micro-batches.

Both are pure functions: of (seed, epoch) and of the step's examples. A run's place in the data is therefore one number,
the optimiser steps done.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

MEGABATCH = 16
"""Optimiser steps that are sorted by length together; more gives better balance, fewer gives more mixing."""


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

    Args:
        lengths: tokens per example.
        has_image: modality per example.
        seed: of the run.
        epoch: from 0.
        global_batch: examples per step; the last step may be shorter.
        order: grouped (steps of one modality and similar length, in random order), random, or sequential.
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
        members = [index for index in everything if has_image[index] == modality]
        for start in range(0, len(members), MEGABATCH * global_batch):
            mega = sorted(members[start : start + MEGABATCH * global_batch], key=lambda index: lengths[index])
            steps += _cut(mega, global_batch)
        if steps and len(steps[-1]) < global_batch:
            left += steps.pop()
    rng.shuffle(steps)
    return steps + _cut(left, global_batch)


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def deal(batch: Sequence[int], lengths: Sequence[int], *, world_size: int, micro_batch: int) -> list[list[list[int]]]:
    """Deal the examples of one step to ranks and micro-batches, so that ranks get about as many tokens each.

    Args:
        batch: example numbers.
        lengths: tokens per example, by example number.
        world_size: ranks.
        micro_batch: examples per micro-batch and rank.

    Returns:
        ``[rank][micro-batch]`` lists; every rank has the same number of micro-batches. In the last, short step of an
        epoch some may be empty.
    """
    count = -(-len(batch) // (world_size * micro_batch))
    ordered = sorted(batch, key=lambda index: (-lengths[index], index))
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    room = count * micro_batch
    for index in ordered:
        target = min((r for r in range(world_size) if len(ranks[r]) < room), key=lambda r: (loads[r], r))
        ranks[target].append(index)
        loads[target] += lengths[index]
    return [[members[i::count] for i in range(count)] for members in ranks]
