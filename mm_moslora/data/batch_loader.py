"""Micro-batches for one rank, one optimiser step after the other, prepared ahead of the step.

The batches depend only on the step's number, not on the number of workers or on how far ahead they prepare.
"""

from __future__ import annotations

import logging
import multiprocessing
import queue
import random
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from mm_moslora.batch import Batch, Example
from mm_moslora.config import DataConfig
from mm_moslora.data.epoch_order import deal, pack, plan_epoch, plan_llava, plan_rows, records_of_epoch
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.training_set import TrainingSet

logger = logging.getLogger(__name__)

AHEAD = 3
"""Optimiser steps that the thread prepares ahead, or micro-batches that each worker process prepares ahead."""


class _Prepared(NamedTuple):
    """A micro-batch, and the faults of records that were left out of it."""

    batch: Batch | None
    faults: list[tuple[int, RecordError]]


class _Preparation(Dataset[_Prepared]):
    """Micro-batches by the numbers of their records; runs in the thread or in a worker process."""

    def __init__(self, data: TrainingSet) -> None:
        self.data = data

    def __getitem__(self, numbers: list[int]) -> _Prepared:
        examples: list[Example] = []
        faults: list[tuple[int, RecordError]] = []
        for number in numbers:
            try:
                examples.append(self.data.load(number))
            except RecordError as error:
                faults.append((number, error))
        return _Prepared(Batch.from_examples(examples) if examples else None, faults)


def _as_it_is(item: Any) -> Any:
    return item


class BatchLoader:
    """Endless iterator over optimiser steps, each a list of micro-batches; use it in a `with` block.

    A damaged record is left out of its micro-batch, counted and written to quarantine. A micro-batch without examples
    holds one token without supervision, so that all ranks take the same number of forward passes.

    Args:
        data: the training set.
        rank: this process.
        world_size: processes.
        config: the recipe's `data`; 0 workers prepare in a thread.
        global_batch: examples, or packed rows, per optimiser step over all ranks.
        micro_batch: examples, or packed rows, per micro-batch and rank.
        seed: seed of the order.
        start_step: optimiser steps already done; the loader has no other state.
        pin: put batches into pinned memory, for asynchronous copies to an accelerator.

    Raises:
        DataError: while iterating, when more records than `max_bad_share` are bad, or any with `on_bad` error.
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
        pin: bool = False,
    ) -> None:
        self.data, self.rank, self.world_size, self.config, self.pin = data, rank, world_size, config, pin
        self.global_batch, self.micro_batch, self.seed, self.start_step = global_batch, micro_batch, seed, start_step
        self.steps_per_epoch = len(self.plan(0))
        """Optimiser steps per epoch; with packing those of the first epoch, as later ones differ by a few steps."""
        self._queue: queue.Queue[list[Batch] | Exception] = queue.Queue(maxsize=AHEAD)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._workers: Iterator[_Prepared] | None = None

    def plan(self, epoch: int) -> list[list[int]]:
        """The optimiser steps of an epoch over all ranks, as record numbers."""
        return [[number for unit in step for number in unit] for step in self.plan_units(epoch)]

    def plan_units(self, epoch: int) -> list[list[list[int]]]:
        """The optimiser steps of an epoch over all ranks; a unit is a record or a packed row."""
        data, config = self.data, self.config
        chosen = records_of_epoch(data.members, data.weights, seed=self.seed, epoch=epoch)
        if config.pack_tokens:
            if config.order != "sequential":
                random.Random(f"{self.seed} {epoch}").shuffle(chosen)
            rows = pack(chosen, data.lengths, tokens=config.pack_tokens)
            return plan_rows(rows, seed=self.seed, epoch=epoch, global_batch=self.global_batch)
        has_image = [bool(data.has_image[number]) for number in chosen]
        if config.order == "llava":
            words = [data.words[number] for number in chosen]
            steps = plan_llava(words, has_image, seed=self.seed, epoch=epoch, global_batch=self.global_batch)
        else:
            steps = plan_epoch(
                [data.lengths[number] for number in chosen], has_image,
                seed=self.seed, epoch=epoch, global_batch=self.global_batch, order=config.order,
            )  # fmt: skip
        return [[[chosen[place]] for place in step] for step in steps]

    def __enter__(self) -> BatchLoader:
        if self.config.workers:
            self._workers = self._start_workers()
        else:
            self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
            self._thread.start()
        return self

    def __iter__(self) -> Iterator[list[Batch]]:
        if self._workers is not None:
            for micro_batches in self._dealt():
                yield [self._received(next(self._workers)) for _ in micro_batches]
        while self._thread is not None:
            item = self._queue.get()
            if isinstance(item, Exception):
                raise item
            yield item

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._workers = None  # torch ends the processes when their iterator is deleted
        if self._thread is not None:
            # The thread puts at most one more item; the emptied queue has room for it.
            while not self._queue.empty():
                self._queue.get()
            self._thread.join(timeout=30)
            self._thread = None

    def _dealt(self) -> Iterator[list[list[int]]]:
        """This rank's micro-batches of every step, as record numbers; endless."""
        epoch, offset = 0, self.start_step
        while True:
            if not self.config.pack_tokens and offset >= self.steps_per_epoch:  # all epochs have as many steps
                epoch, offset = epoch + offset // self.steps_per_epoch, offset % self.steps_per_epoch
            steps = self.plan_units(epoch)
            for step in steps[offset:]:
                yield [[number for unit in micro for number in unit] for micro in self._deal(step)]
            epoch, offset = epoch + 1, max(0, offset - len(steps))

    def _deal(self, step: list[list[int]]) -> list[list[list[int]]]:
        """This rank's micro-batches of a step, as units."""
        lengths = [sum(self.data.lengths[number] for number in unit) for unit in step]
        places = deal(range(len(step)), lengths, world_size=self.world_size, micro_batch=self.micro_batch)[self.rank]
        return [[step[place] for place in micro] for micro in places]

    def _received(self, prepared: _Prepared) -> Batch:
        for number, fault in prepared.faults:
            if number not in self.data.quarantine:
                logger.warning("Left out: %s", fault)
            self.data.quarantine.add(number, fault)
        return prepared.batch or Batch.from_examples([_empty(self.data)])

    def _start_workers(self) -> Iterator[_Prepared]:
        # Forked, so that the data set need not be picklable. A separate generator leaves the run's random state alone,
        # which checkpoints restore bit for bit.
        context = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        numbers = (micro for step in self._dealt() for micro in step)
        loader = DataLoader(
            _Preparation(self.data), batch_size=None, sampler=_Endless(numbers), num_workers=self.config.workers,
            collate_fn=_as_it_is, prefetch_factor=AHEAD, multiprocessing_context=context, generator=torch.Generator(),
            pin_memory=self.pin,
        )  # fmt: skip
        return iter(loader)

    def _work(self) -> None:
        preparation = _Preparation(self.data)
        try:
            for micro_batches in self._dealt():
                batches = [self._received(preparation[numbers]) for numbers in micro_batches]
                self._queue.put([batch.pin_memory() for batch in batches] if self.pin else batches)
                if self._stop.is_set():
                    return
        except Exception as error:  # handed to the training loop, which raises it
            self._queue.put(error)


class _Endless(torch.utils.data.Sampler[list[int]]):
    """A sampler over an iterator that never ends."""

    def __init__(self, numbers: Iterator[list[int]]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[list[int]]:
        return self.numbers


def largest_batch(data: TrainingSet, micro_batch: int) -> Batch:
    """The micro-batch that needs the most memory: the longest examples, with pictures if any example has pictures."""
    order = sorted(data.usable, key=lambda number: (data.lengths[number], data.has_image[number]), reverse=True)
    if data.config.pack_tokens:
        rows = pack(data.usable, data.lengths, tokens=data.config.pack_tokens)
        rows.sort(
            key=lambda row: (sum(data.lengths[n] for n in row), sum(data.has_image[n] for n in row)), reverse=True
        )
        order = [number for row in rows[:micro_batch] for number in row]
        micro_batch = len(order)
    with_image = next((number for number in order if data.has_image[number]), order[0])
    chosen = order[:micro_batch]
    if with_image not in chosen:
        chosen[-1] = with_image
    examples = []
    for number in chosen:
        try:
            examples.append(data.load(number))
        except RecordError:  # the iterator finds and counts it later
            continue
    return Batch.from_examples(examples or [_empty(data)])


def _empty(data: TrainingSet) -> Example:
    """One token without supervision."""
    token = data.encoder.tokenizer.eos_token_id or 0
    return Example(id="", input_ids=torch.tensor([token]), supervised=torch.tensor([False]))
