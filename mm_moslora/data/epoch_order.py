"""The order of an epoch, and the division of an optimiser step among ranks and micro-batches.

The order is a pure function of (seed, epoch), the division of the step's examples. A run's position in the data is
therefore one number, the optimiser steps done, for any number of ranks and workers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

MEGABATCH = 16
"""Optimiser steps that are sorted by length together; more steps balance better, fewer steps mix more."""


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

    `grouped` orders by modality and length as LLaVA does, with its own random generator. Each modality is shuffled and
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
        rows: from `packing.pack`.
        seed: of the run.
        epoch: from 0.
        global_batch: rows per step.
    """
    shuffled = list(rows)
    random.Random(f"{seed} {epoch} rows").shuffle(shuffled)  # packing closes the fullest rows first
    return [shuffled[start : start + global_batch] for start in range(0, len(shuffled), global_batch)]


def plan_llava(
    words: Sequence[int], has_image: Sequence[bool], *, seed: int, epoch: int, global_batch: int
) -> list[list[int]]:
    """The optimiser steps of an epoch as LLaVA's `group_by_modality_length` forms them.

    The same records share a step as in LLaVA with the same torch seed. LLaVA uses the global generator, this function
    its own with `seed + epoch`. Mega-batches of one modality are shuffled; the remainders of both come last, mixed.

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


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def deal(batch: Sequence[int], lengths: Sequence[int], *, world_size: int, micro_batch: int) -> list[list[list[int]]]:
    """Divide the examples of one step among ranks and micro-batches, so that all ranks get about as many tokens.

    Examples are assigned longest first, each to the rank with the fewest tokens that has room (the LPT rule). The
    longest examples of all ranks are in the first micro-batch, so that ranks finish each micro-batch together.

    Args:
        batch: example numbers.
        lengths: tokens per example, by example number.
        world_size: ranks.
        micro_batch: examples per micro-batch and rank.

    Returns:
        ``[rank][micro-batch]`` lists; every example once, every rank the same number of micro-batches. A micro-batch
        is empty only where the step has fewer examples than there are micro-batches over all ranks.
    """
    count = -(-len(batch) // (world_size * micro_batch))
    room = count * micro_batch
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
