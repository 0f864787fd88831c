"""Ranks that measure the records of a stream together: each reads its part, and tells the others what it found.

Messages go through the key-value store of the process group. A collective would stand between those of the training
steps, and a rank that has stopped would leave the others waiting in it.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any, NamedTuple

import torch.distributed as dist

from mm_moslora.data.record_faults import RecordError, plain_fault, read_fault
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.untrusted_data import parse_json

_WAIT = 0.005
"""Seconds between two looks into the store."""
_STREAMS = {"opened": 0}
"""Streams of this process, which all ranks open in the same order."""


class RecordSize(NamedTuple):
    """What every rank must know of a record, to plan the same steps."""

    length: int
    """Tokens."""
    pictures: int


class StoppedError(DataError):
    """The stream is not read any further."""


class StreamShare:
    """One rank's share of a stream.

    Args:
        rank: of this process.
        world: ranks.
        store: of the process group.
        name: of the stream among others.
        patience: seconds after which a rank that tells nothing ends the run.
    """

    def __init__(self, *, rank: int, world: int, store: Any, name: str, patience: float = 1800.0) -> None:
        self.rank, self.world, self.patience = rank, world, patience
        self._store, self._name = store, name
        self._begun = self._round = 0
        self._told: list[str] = []

    @classmethod
    def of_group(cls) -> StreamShare | None:
        """The share of this rank in a new stream; None for a rank alone."""
        if distributed.world_size() == 1 or not dist.is_initialized():
            return None
        _STREAMS["opened"] += 1
        store = dist.distributed_c10d._get_default_store()
        return cls(
            rank=distributed.rank(), world=distributed.world_size(), store=store,
            name=f"mm_moslora/stream/{_STREAMS['opened']}",
        )  # fmt: skip

    def begin(self) -> None:
        """The stream goes to a place, on every rank; some may have told of more records before than others."""
        self._begun, self._round = self._begun + 1, 0

    def of_main(self, value: Any) -> Any:
        """What rank 0 has of a value that is known at the start, as JSON."""
        key = f"{self._name}/start"
        if self.rank == 0:
            self._store.set(key, json.dumps(value))
        self._wait(key, 0, threading.Event())
        return parse_json(self._store.get(key), surrogates=True)

    def fail(self, error: Exception) -> None:
        """Tell the other ranks why this one tells no more of its records."""
        if not self._store.check([self._failure]):
            self._store.set(self._failure, f"Rank {self.rank}: {error}")

    @property
    def _failure(self) -> str:
        return f"{self._name}/{self._begun}/failure"

    def mine(self, number: int) -> bool:
        """Whether this rank measures the record with a number."""
        return number % self.world == self.rank

    def gathered(
        self, found: dict[int, RecordSize | RecordError], stop: threading.Event
    ) -> dict[int, RecordSize | RecordError]:
        """What all ranks have found, by number; every rank calls it for the same records.

        Args:
            found: by this rank.
            stop: set where the stream is not read any further.

        Raises:
            StoppedError: it is not.
            DataError: another rank has failed, or tells nothing.
        """
        self._round += 1
        own = {
            str(number): plain_fault(what) if isinstance(what, RecordError) else list(what)
            for number, what in found.items()
        }
        keys = [f"{self._name}/{self._begun}/{self._round}/{rank}" for rank in range(self.world)]
        self._store.set(keys[self.rank], json.dumps(own))
        told: dict[int, RecordSize | RecordError] = {}
        for rank, key in enumerate(keys):
            self._wait(key, rank, stop)
            for number, what in parse_json(self._store.get(key), surrogates=True).items():
                told[int(number)] = RecordSize(*what) if len(what) == 2 else read_fault(what)
        # All ranks have told of this round, so all have read the round before.
        for old in self._told:
            self._store.delete_key(old)
        self._told = [keys[self.rank]]
        return told

    def _wait(self, key: str, rank: int, stop: threading.Event) -> None:
        ends = time.monotonic() + self.patience
        while not self._store.check([key]):
            if stop.wait(_WAIT):
                raise StoppedError("The stream is not read any further.")
            if self._store.check([self._failure]):
                raise DataError(self._store.get(self._failure).decode())
            if time.monotonic() > ends:
                raise DataError(
                    f"Rank {rank} has told nothing of its records of the stream for {self.patience:g} s. Its output "
                    "says why. Checkpoints are untouched; the same command goes on from the last one."
                )
