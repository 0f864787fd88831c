"""Micro-batches for one rank, one optimiser step after the other, prepared ahead of the step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType

import torch

from mm_moslora.batch import Batch, Example
from mm_moslora.config import DataConfig
from mm_moslora.data.dataset import TrainingSet
from mm_moslora.data.mixture import expand
from mm_moslora.data.sampler import deal, plan_epoch

AHEAD = 3
"""Optimiser steps prepared ahead."""


class BatchLoader:
    """Iterates over optimiser steps for ever; use it in a `with` block.

    Args:
        data: the training set.
        rank: this process.
        world_size: processes.
        config: the recipe's `data`.
        global_batch: examples per optimiser step over all ranks.
        micro_batch: examples per micro-batch and rank.
        seed: of the order.
        start_step: optimiser steps already done.
    """

    def __init__(
        self,
        data: TrainingSet,
        *,
        rank: int,
        world_size: int,
        config: DataConfig,
        global_batch: int,
        micro_batch: int,
        seed: int = 0,
        start_step: int = 0,
    ) -> None:
        self.data, self.rank, self.world_size, self.config = data, rank, world_size, config
        self.global_batch, self.micro_batch, self.seed, self.start_step = global_batch, micro_batch, seed, start_step
        self.steps_per_epoch = len(self._plan(0))
        self._queue: queue.Queue[list[Batch] | Exception] = queue.Queue(maxsize=AHEAD)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def _plan(self, epoch: int) -> list[list[int]]:
        data = self.data
        usable = set(data.usable)
        chosen = [i for i in expand(data.sizes, data.weights, seed=self.seed, epoch=epoch) if i in usable]
        steps = plan_epoch(
            [data.lengths[i] for i in chosen], [data.has_image[i] for i in chosen], seed=self.seed, epoch=epoch,
            global_batch=self.global_batch, order=self.config.order,
        )  # fmt: skip
        return [[chosen[number] for number in step] for step in steps]

    def _steps(self) -> Iterator[list[Batch]]:
        epoch, offset = divmod(self.start_step, self.steps_per_epoch)
        while True:
            for step in self._plan(epoch)[offset:]:
                mine = deal(step, self.data.lengths, world_size=self.world_size, micro_batch=self.micro_batch)[self.rank]
                yield [self._batch(numbers) for numbers in mine]
            epoch, offset = epoch + 1, 0

    def _batch(self, numbers: list[int]) -> Batch:
        examples = [example for number in numbers if (example := self.data[number]) is not None]
        return Batch.from_examples(examples or [_empty(self.data)])

    def __enter__(self) -> BatchLoader:
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()
        return self

    def _work(self) -> None:
        try:
            for batches in self._steps():
                if not self._put(batches):
                    return
        except Exception as error:  # handed to the training loop, which raises it
            self._put(error)

    def _put(self, item: list[Batch] | Exception) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            item = self._queue.get()
            if isinstance(item, Exception):
                raise item
            yield item

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=30)


def _empty(data: TrainingSet) -> Example:
    """One unsupervised token: what a rank trains on when the last step of an epoch leaves it nothing."""
    token = data.encoder.tokenizer.eos_token_id or 0
    return Example(id="", input_ids=torch.tensor([token]), supervised=torch.tensor([False]))
