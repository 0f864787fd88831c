"""Micro-batches for one rank, one optimiser step after the other, prepared ahead of the step.

The batches depend only on the step's number, not on the number of workers or on how far ahead they prepare.
"""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from mm_moslora.batch import Batch, Example
from mm_moslora.config import DataConfig
from mm_moslora.data.epoch_order import MicroBatchLimit, deal, even_size, pack, plan_epoch, plan_rows, records_of_epoch
from mm_moslora.data.record_examples import MeasuredRecords
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.training_set import TrainingSet
from mm_moslora.data.training_stream import TrainingStream
from mm_moslora.launch.child_processes import fork_context
from mm_moslora.utils import distributed

AHEAD = 3
"""Optimiser steps that the thread prepares ahead, or micro-batches that each worker process prepares ahead."""


class _Prepared(NamedTuple):
    """A micro-batch, and the faults of records that were left out of it."""

    batches: list[Batch]
    """One; none without usable records; several where the records have more tokens than was known."""
    faults: list[tuple[int, RecordError]]


class _Preparation(Dataset[_Prepared]):
    """Micro-batches by the numbers of their records; runs in the thread or in a worker process."""

    def __init__(self, data: MeasuredRecords, limit: MicroBatchLimit, pool: Executor | None = None) -> None:
        self.data, self.limit = data, limit
        self.map = map if pool is None else pool.map

    def __getitem__(self, numbers: list[int]) -> _Prepared:
        loaded = list(self.map(self._load, numbers))
        examples = [item for item in loaded if isinstance(item, Example)]
        faults = [(number, item) for number, item in zip(numbers, loaded, strict=True) if isinstance(item, RecordError)]
        return _Prepared([Batch.from_examples(part) for part in self._parts(examples)], faults)

    def _load(self, number: int) -> Example | RecordError:
        try:
            return self.data.load(number)
        except RecordError as error:
            return error

    def _parts(self, examples: list[Example]) -> Iterator[list[Example]]:
        """The examples in their order, cut where the tokens go beyond the limit."""
        part: list[Example] = []
        for example in examples:
            if part and not self.limit.holds_tokens([member.length for member in (*part, example)]):
                yield part
                part = []
            part.append(example)
        if part:
            yield part


class BatchLoader:
    """Endless iterator over optimiser steps, each a list of micro-batches; use it in a `with` block.

    A micro-batch without examples holds one token without supervision, so that all ranks take the same number of
    forward passes. Where lengths are estimates, a micro-batch beyond the limit is cut, and one collective per step
    evens the number out. `start_step` is the only state.
    """

    def __init__(
        self,
        data: TrainingSet | TrainingStream,
        *,
        rank: int,
        world_size: int,
        config: DataConfig,
        global_batch: int,
        limit: MicroBatchLimit,
        seed: int = 0,
        start_step: int = 0,
        pin: bool = False,
    ) -> None:
        self.stream = data if isinstance(data, TrainingStream) else None
        self.data: MeasuredRecords = data.at_hand if isinstance(data, TrainingStream) else data
        """The training set, or the window at hand of a stream."""
        self.rank, self.world_size, self.config, self.pin = rank, world_size, config, pin
        self.global_batch, self.limit, self.seed, self.start_step = global_batch, limit, seed, start_step
        plan = self.plan(0)
        self.tokens_per_step = sum(self.data.lengths[number] for step in plan for number in step) / max(1, len(plan))
        """Of all ranks, on average over these steps."""
        self.steps_per_epoch = len(plan)
        """Optimiser steps per epoch; with packing those of the first epoch, as later ones differ by a few steps. Of a
        stream those of the window at hand."""
        self._queue: queue.Queue[list[Batch] | Exception] = queue.Queue(maxsize=AHEAD)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._workers: Iterator[_Prepared] | None = None

    def plan(self, epoch: int) -> list[list[int]]:
        """The optimiser steps of an epoch over all ranks, as record numbers."""
        return [[number for unit in step for number in unit] for step in self.plan_units(epoch)]

    def plan_units(self, epoch: int) -> list[list[list[int]]]:
        """The optimiser steps of an epoch or a window over all ranks; a unit is a record or a packed row."""
        data, config = self.data, self.config
        chosen = records_of_epoch(data.members, data.weights, seed=self.seed, epoch=epoch)
        if config.pack_tokens:
            if config.order != "sequential":
                random.Random(f"{self.seed} {epoch}").shuffle(chosen)
            rows = pack(chosen, data.lengths, tokens=config.pack_tokens)
            size = even_size(len(rows), self.global_batch) if self.stream is not None else self.global_batch
            return plan_rows(rows, seed=self.seed, epoch=epoch, global_batch=size)
        has_image = [bool(data.has_image[number]) for number in chosen]
        steps = plan_epoch(
            [data.lengths[number] for number in chosen], has_image,
            seed=self.seed, epoch=epoch, global_batch=self.global_batch, order=config.order,
        )  # fmt: skip
        return [[[chosen[index]] for index in step] for step in steps]

    def __enter__(self) -> BatchLoader:
        if self.stream is not None:
            self.stream.read_ahead()
        if self.config.workers and self.stream is None:
            self._workers = self._start_workers()
        else:
            self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
            self._thread.start()
        return self

    def __iter__(self) -> Iterator[list[Batch]]:
        if self._workers is not None:
            for micro_batches in self._dealt():
                yield self._evened([batch for _ in micro_batches for batch in self._received(next(self._workers))])
        while self._thread is not None:
            item = self._queue.get()
            if isinstance(item, Exception):
                raise item
            yield self._evened(item)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self.stream is not None:  # the thread may wait for a window
            self.stream.stop()
        self._workers = None  # torch ends the processes when their iterator is deleted
        if self._thread is not None:
            # The thread puts at most one more item; the emptied queue has room for it.
            while not self._queue.empty():
                self._queue.get()
            self._thread.join(timeout=30)
            self._thread = None

    def _dealt(self) -> Iterator[list[list[int]]]:
        """This rank's micro-batches of every step, as record numbers; endless."""
        for step in self._steps_of_epochs() if self.stream is None else self._steps_of_stream(self.stream):
            lengths = [sum(self.data.lengths[number] for number in unit) for unit in step]
            shares = deal(range(len(step)), lengths, world_size=self.world_size, limit=self.limit)
            yield [[number for index in micro for number in step[index]] for micro in shares[self.rank]]

    def _steps_of_stream(self, stream: TrainingStream) -> Iterator[list[list[int]]]:
        offset = self.start_step - stream.at_hand.place.step
        while True:
            steps = self.plan_units(stream.at_hand.place.window)
            yield from steps[offset:]
            self.data, offset = stream.next_window(steps=len(steps)), 0

    def _steps_of_epochs(self) -> Iterator[list[list[int]]]:
        epoch, offset = 0, self.start_step
        while True:
            if not self.config.pack_tokens and offset >= self.steps_per_epoch:  # all epochs have as many steps
                epoch, offset = epoch + offset // self.steps_per_epoch, offset % self.steps_per_epoch
            steps = self.plan_units(epoch)
            yield from steps[offset:]
            epoch, offset = epoch + 1, max(0, offset - len(steps))

    def _evened(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches of a step, as many as on every other rank."""
        if self.limit.tokens is None or self.data.exact:
            return batches
        (most,) = distributed.max_over_ranks([float(len(batches))])
        return batches + [Batch.from_examples([_empty(self.data)])] * (int(most) - len(batches))

    def _received(self, prepared: _Prepared) -> list[Batch]:
        for number, fault in prepared.faults:
            self.data.leave_out(number, fault)
        return prepared.batches or [Batch.from_examples([_empty(self.data)])]

    def _start_workers(self) -> Iterator[_Prepared]:
        # Forked, so that the data set need not be picklable. A separate generator leaves the run's random state alone,
        # which checkpoints restore bit for bit.
        numbers = (micro for step in self._dealt() for micro in step)
        loader = DataLoader(
            _Preparation(self.data, self.limit), batch_size=None, sampler=_Endless(numbers),
            num_workers=self.config.workers or 0, collate_fn=lambda item: item, prefetch_factor=AHEAD,
            multiprocessing_context=fork_context(), generator=torch.Generator(), pin_memory=self.pin,
        )  # fmt: skip
        return iter(loader)

    def _work(self) -> None:
        pool = ThreadPoolExecutor(self.config.workers) if self.config.workers else None
        preparation = _Preparation(self.data, self.limit, pool)
        try:
            for micro_batches in self._dealt():
                preparation.data = self.data
                batches = [batch for numbers in micro_batches for batch in self._received(preparation[numbers])]
                self._queue.put([batch.pin_memory() for batch in batches] if self.pin else batches)
                if self._stop.is_set():
                    return
        except Exception as error:  # handed to the training loop, which raises it
            self._queue.put(error)
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)


class _Endless(torch.utils.data.Sampler[list[int]]):
    """A sampler over an iterator that never ends."""

    def __init__(self, numbers: Iterator[list[int]]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[list[int]]:
        return self.numbers


def largest_batch(data: MeasuredRecords, limit: MicroBatchLimit) -> Batch:
    """The micro-batch that needs the most memory: the longest examples, with pictures if any example has pictures."""
    units = [[number] for number in data.usable]
    if data.config.pack_tokens:
        units = pack(data.usable, data.lengths, tokens=data.config.pack_tokens)
    tokens, pictures = (
        [sum(of[number] for number in unit) for unit in units] for of in (data.lengths, data.has_image)
    )  # fmt: skip
    order = sorted(range(len(units)), key=lambda index: (tokens[index], pictures[index]), reverse=True)
    first = next((index for index in order if pictures[index]), order[0])
    chosen: list[int] = []
    for index in (first, *(index for index in order if index != first)):
        if limit.holds([tokens[other] for other in (*chosen, index)]):
            chosen.append(index)
        if len(chosen) == limit.examples:
            break
    examples: list[Example] = []
    for number in (number for index in chosen for number in units[index]):
        try:
            example = data.load(number)
        except RecordError:  # the iterator finds and counts it later
            continue
        if not examples or limit.holds_tokens([member.length for member in (*examples, example)]):
            examples.append(example)
    return Batch.from_examples(examples or [_empty(data)])


def _empty(data: MeasuredRecords) -> Example:
    """One token without supervision."""
    token = data.encoder.tokenizer.eos_token_id or 0
    return Example(id="", input_ids=torch.tensor([token]), supervised=torch.tensor([False]))
