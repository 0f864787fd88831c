"""Property test of the data order: for all numbers of ranks, micro-batches, workers and interruptions, every epoch
contains every sample as often as its weight requires, and the same steps follow in the same order.

    python scripts/soak/data_order.py --cases 5000
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from parts import soak

from mm_moslora.batch import Example
from mm_moslora.config import DataConfig
from mm_moslora.data.batch_loader import BatchLoader
from mm_moslora.data.epoch_order import MicroBatchLimit
from mm_moslora.utils.progress_bar import Progress

EPOCHS = 2
GOOD = "same samples, same order"


class Numbers:
    """A training set with their numbers as its examples, in place of `TrainingSet`."""

    def __init__(self, rng: random.Random) -> None:
        sizes = [rng.randrange(1, 22) for _ in range(rng.choice((1, 1, 2)))]
        total, start = sum(sizes), 0
        self.lengths = [rng.randrange(1, 200) for _ in range(total)]
        self.words = [rng.randrange(1, 60) for _ in range(total)]
        share = rng.choice((0.0, 0.3, 0.7, 1.0))
        self.exact = True
        self.has_image = [rng.random() < share for _ in range(total)]
        self.members, self.quarantine = [], set()
        for size in sizes:
            self.members.append([number for number in range(start, start + size) if rng.random() < 0.95] or [start])
            start += size
        self.encoder = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=0))
        self.weights = [rng.choice((1.0, 1.0, 0.5, 2.0, 1.3)) for _ in sizes]

    def load(self, number: int) -> Example:
        """The example with this number."""
        return Example(id=str(number), input_ids=torch.tensor([0, 1]), supervised=torch.tensor([False, True]))


def _loader(
    data: Numbers, rank: int, world: int, limit: MicroBatchLimit, batch: int, config: DataConfig, seed: int, start: int
):
    return BatchLoader(
        data, rank=rank, world_size=world, config=config, global_batch=batch, limit=limit, seed=seed, start_step=start
    )


def _stretch(data: Numbers, world: int, limit: MicroBatchLimit, count: int, **settings) -> Iterator[list[int]]:
    """The samples of some steps, collected from all ranks as they arrive."""
    ranks = [_loader(data, rank, world, limit, **settings) for rank in range(world)]
    entered = [loader.__enter__() for loader in ranks]
    try:
        arriving = [iter(loader) for loader in entered]
        for _ in range(count):
            batches = [next(rank) for rank in arriving]
            assert len({len(micro_batches) for micro_batches in batches}) == 1, "ranks differ in micro-batches"
            yield sorted(int(id) for rank in batches for batch in rank for id in batch.ids if id)
    finally:
        for loader in ranks:
            loader.__exit__(None, None, None)


def case(seed: int, *, workers: int = 0) -> str:
    """Compare one random data set, run with interruptions on changing ranks, with the plan; returns the outcome."""
    rng = random.Random(seed)
    data, batch = Numbers(rng), rng.randrange(1, 17)
    packed = rng.random() < 0.25
    config = DataConfig(
        order=rng.choice(("grouped", "llava", "random", "sequential")), workers=workers,
        max_length=256, pack_tokens=rng.choice((256, 512)) if packed else 0,
    )  # fmt: skip
    settings = {"batch": batch, "config": config, "seed": rng.randrange(100)}
    plan = _loader(data, 0, 1, MicroBatchLimit(examples=1), start=0, **settings)
    epochs = [[sorted(step) for step in plan.plan(epoch)] for epoch in range(EPOCHS)]
    expected = [step for epoch in epochs for step in epoch]
    arrived: list[list[int]] = []
    while len(arrived) < len(expected):
        count = min(len(expected) - len(arrived), rng.randrange(1, len(expected) + 1))
        limit = MicroBatchLimit(
            examples=rng.randrange(1, 5), tokens=rng.choice((None, 256, 512)), padded=rng.random() < 0.3
        )
        arrived += _stretch(data, rng.randrange(1, 9), limit, count, start=len(arrived), **settings)
    if arrived != expected:
        return "another order"
    return next((fault for epoch in epochs if (fault := _fault(epoch, data))), GOOD)


def _fault(epoch: list[list[int]], data: Numbers) -> str | None:
    """The error in an epoch's samples, if any."""
    counts = Counter(number for step in epoch for number in step)
    for numbers, weight in zip(data.members, data.weights, strict=True):
        if any(not int(weight) <= counts[number] <= -(-weight // 1) for number in numbers):
            return "a sample was seen too often or not often enough"
    if set(counts) - {number for numbers in data.members for number in numbers}:
        return "a sample that does not belong"
    return None


def run(seeds: range, *, with_workers: int = 0) -> Counter[str]:
    """Outcomes of cases in a thread, and of some with worker processes."""
    outcomes: Counter[str] = Counter()
    with Progress("data order", len(seeds) + with_workers, unit="case") as progress:
        for number, seed in enumerate([*seeds, *range(with_workers)]):
            outcomes[case(seed) if number < len(seeds) else case(10**6 + seed, workers=1 + seed % 2)] += 1
            progress.update(number + 1, f"{number + 1 - outcomes[GOOD]} wrong")
    return outcomes


def work(options: argparse.Namespace, _: Path) -> Counter[str]:
    """Cases from a first seed on."""
    return run(range(options.first, options.first + options.cases), with_workers=options.with_workers)


if __name__ == "__main__":
    sys.exit(
        soak(
            __doc__,
            work,
            good={GOOD},
            cases=(5000, "cases with batches prepared in a thread"),
            first=(0, "seed of the first case, to continue or to share the work"),
            with_workers=(10, "more cases, with worker processes"),
        )
    )
